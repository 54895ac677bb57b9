#include "engine/step/update.h"

const flap_adamw flap_update_usual_scalars = {.learning_rate = 1e-6f,
                                              .beta1 = 0.9f,
                                              .beta2 = 0.999f,
                                              .one_minus_beta1 = 0.1f,
                                              .one_minus_beta2 = 0.001f,
                                              .inverse_bias1 = 1,
                                              .inverse_sqrt_bias2 = 1,
                                              .epsilon = 1e-8f,
                                              .decay = 1,
                                              .gradient_scale = 1};

/* The sections of a states region; NULL where the format has none. */
typedef struct sections {
  void *master, *m, *v, *m_largest, *v_largest;
} sections;

static void *section_of(const flap_update *u, flap_state_section which) {
  if (u->format->sections[which].value_bytes == 0)
    return NULL;
  return (unsigned char *)u->states + flap_layout_state_offset(u->format, which, u->elements);
}

static sections sections_of(const flap_update *u) {
  return (sections){.master = section_of(u, FLAP_STATE_MASTER),
                    .m = section_of(u, FLAP_STATE_MOMENT1),
                    .v = section_of(u, FLAP_STATE_MOMENT2),
                    .m_largest = section_of(u, FLAP_STATE_LARGEST1),
                    .v_largest = section_of(u, FLAP_STATE_LARGEST2)};
}

void flap_update_launch(flap_ops *ops, const flap_adamw *scalars, const flap_update *u) {
  const sections s = sections_of(u);
  if (s.m_largest != NULL)
    flap_ops_adamw_8bit(ops, scalars, u->weight_dtype, u->gradient_dtype, u->weights, s.master, s.m, s.v, s.m_largest,
                        s.v_largest, u->gradient, u->decay_blocks, u->fault, u->elements);
  else
    flap_ops_adamw(ops, scalars, u->weight_dtype, u->gradient_dtype, u->weights, s.master, s.m, s.v, u->gradient,
                   u->decay_blocks, u->fault, u->elements);
}

uint32_t flap_update_host_threads(uint32_t threads) {
  return threads > 3 ? threads - 2 : 1;
}

void flap_update_on_host(flap_host_optimizer *optimizer, const flap_adamw *scalars, const flap_update *u) {
  const sections s = sections_of(u);
  if (s.m_largest != NULL)
    flap_host_adamw_8bit(optimizer, scalars, u->weight_dtype, u->gradient_dtype, u->weights, s.master, s.m, s.v,
                         s.m_largest, s.v_largest, u->gradient, u->decay_blocks, u->fault, u->elements);
  else
    flap_host_adamw(optimizer, scalars, u->weight_dtype, u->gradient_dtype, u->weights, s.master, s.m, s.v, u->gradient,
                    u->decay_blocks, u->fault, u->elements);
}
