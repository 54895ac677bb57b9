#include "engine/update.h"

/* NULL where the format has no such section. */
static void *section_of(const flap_update *u, flap_state_section which) {
  if (u->format->sections[which].value_bytes == 0)
    return NULL;
  return (unsigned char *)u->states + flap_layout_state_offset(u->format, which, u->elements);
}

void flap_update_launch(flap_ops *ops, const flap_adamw *scalars, const flap_update *u) {
  void *master = section_of(u, FLAP_STATE_MASTER);
  void *m = section_of(u, FLAP_STATE_MOMENT1), *v = section_of(u, FLAP_STATE_MOMENT2);
  void *m_largest = section_of(u, FLAP_STATE_LARGEST1), *v_largest = section_of(u, FLAP_STATE_LARGEST2);
  if (m_largest != NULL)
    flap_ops_adamw_8bit(ops, scalars, u->weight_dtype, u->gradient_dtype, u->weights, master, m, v, m_largest,
                        v_largest, u->gradient, u->decay_blocks, u->fault, u->elements);
  else
    flap_ops_adamw(ops, scalars, u->weight_dtype, u->gradient_dtype, u->weights, master, m, v, u->gradient,
                   u->decay_blocks, u->fault, u->elements);
}
