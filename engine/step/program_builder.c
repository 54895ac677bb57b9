#include "base/assert.h"
#include "base/units.h"
#include "engine/step/program_internal.h"

#include <stdlib.h>
#include <string.h>

const char *flap_program_op_name(flap_op_kind kind) {
  static const char *const names[] = {"pin",      "unpin",      "embed",  "forward",    "recompute", "head",
                                      "backward", "embed back", "zero",   "store grad", "adamw",     "host adamw",
                                      "losses",   "norm",       "decode", "logits"};
  _Static_assert(sizeof names / sizeof *names == FLAP_OP_KIND_COUNT, "a name per kind");
  flap_assert(kind < FLAP_OP_KIND_COUNT);
  return names[kind];
}

static bool grow(void **list, uint32_t *max, uint32_t count, size_t element_bytes) {
  if (count < *max)
    return true;
  const uint32_t larger = *max == 0 ? 256 : *max * 2;
  void *memory = realloc(*list, (size_t)larger * element_bytes);
  if (memory == NULL)
    return false;
  *list = memory;
  *max = larger;
  return true;
}

flap_op *program_append_op(program_builder *b) {
  flap_program *p = b->program;
  if (b->failed || !grow((void **)&p->ops, &p->ops_max, p->op_count, sizeof *p->ops)) {
    b->failed = true;
    return NULL;
  }
  return &p->ops[p->op_count++];
}

static bool streams(const program_builder *b, uint32_t region) {
  return b->resident == NULL || !b->resident[region];
}

flap_operand program_add_lease(program_builder *b, flap_lease lease) {
  flap_program *p = b->program;
  flap_assert(lease.region < b->layout->region_count);
  if (b->counts_only) {
    p->lease_count++;
    return lease.region;
  }
  if (b->failed || !grow((void **)&p->leases, &p->leases_max, p->lease_count, sizeof *p->leases)) {
    b->failed = true;
    return FLAP_OPERAND_NONE;
  }
  p->leases[p->lease_count] = lease;
  return p->lease_count++;
}

flap_operand program_pin(program_builder *b, uint32_t region, flap_lease_mode mode) {
  flap_program *p = b->program;
  const flap_operand lease = program_add_lease(b, (flap_lease){.region = region, .mode = mode});
  if (b->failed)
    return FLAP_OPERAND_NONE;
  OP(b, FLAP_OP_PIN, 0, 0, lease);
  if (streams(b, region)) {
    const flap_region_class klass = b->layout->regions[region].klass;
    if (++b->live[klass] > p->live_max[klass])
      p->live_max[klass] = b->live[klass];
  }
  return lease;
}

void program_unpin(program_builder *b, flap_operand lease) {
  if (b->failed)
    return;
  flap_assert(b->counts_only || lease < b->program->lease_count);
  OP(b, FLAP_OP_UNPIN, 0, 0, lease);
  const uint32_t region = b->counts_only ? lease : b->program->leases[lease].region;
  if (streams(b, region))
    b->live[b->layout->regions[region].klass]--;
}

void flap_program_place(flap_program *program, flap_arena *arena) {
  flap_assert(program->ops_max > 0 || flap_arena_is_measuring(arena));
  const uint64_t op_bytes = (uint64_t)program->op_count * sizeof(flap_op);
  const uint64_t lease_bytes = (uint64_t)program->lease_count * sizeof(flap_lease);
  flap_op *ops = flap_arena_take(arena, flap_units_round_up(op_bytes, 64), 64);
  flap_lease *leases = flap_arena_take(arena, flap_units_round_up(lease_bytes, 64), 64);
  if (flap_arena_is_measuring(arena))
    return;
  memcpy(ops, program->ops, op_bytes);
  memcpy(leases, program->leases, lease_bytes);
  flap_program_close(program);
  program->ops = ops;
  program->leases = leases;
}

void flap_program_close(flap_program *program) {
  if (program->ops_max > 0)
    free(program->ops);
  if (program->leases_max > 0)
    free(program->leases);
  program->ops = NULL;
  program->leases = NULL;
  program->ops_max = program->leases_max = 0;
}
