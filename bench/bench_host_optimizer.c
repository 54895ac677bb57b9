/* Measures AdamW over memory of the host (kernels/host_optimizer.h) by threads, beside what the same number of threads
 * reads, changes and writes back (kernels/device/measure_memory.h).
 *
 *   bench_host_optimizer [threads] [Mi of elements] [rounds]
 *
 * The default is all cores, 32 Mi elements (448 MiB with fp32 moments) and 25 rounds. A round measures all three in
 * turn, because a virtual machine's memory may be twice as fast a second later. Printed are medians in 10^9 bytes per
 * second, read and written bytes counted, and the median of the rounds' ratios with what a quarter of the rounds was
 * below and above. Threads are not pinned: the pool runs as it does in training. */
#include "base/arena.h"
#include "base/pool.h"
#include "base/units.h"
#include "kernels/device/measure_memory.h"
#include "kernels/host_optimizer.h"
#include "kernels/measure_ops.h"

#include <stdio.h>
#include <stdlib.h>

#define ROUNDS 25u
#define MI_ELEMENTS 32u
#define ROUND_NS 10000000u /* of the bare loop */

typedef struct states {
  flap_arena arena;
  uint64_t elements;
  uint16_t *high, *grad;
  int16_t *low;
  float *m, *v, *m_largest, *v_largest;
  int8_t *m_codes;
  uint8_t *v_codes, *decay_blocks;
} states;

enum { MODIFY, ADAMW, ADAMW_8BIT, RATES };

static void take(states *s) {
  flap_arena *arena = &s->arena;
  s->high = FLAP_ARENA_ARRAY(arena, uint16_t, s->elements);
  s->low = FLAP_ARENA_ARRAY(arena, int16_t, s->elements);
  s->grad = FLAP_ARENA_ARRAY(arena, uint16_t, s->elements);
  s->m = FLAP_ARENA_ARRAY(arena, float, s->elements);
  s->v = FLAP_ARENA_ARRAY(arena, float, s->elements);
  s->m_codes = FLAP_ARENA_ARRAY(arena, int8_t, s->elements);
  s->v_codes = FLAP_ARENA_ARRAY(arena, uint8_t, s->elements);
  s->m_largest = FLAP_ARENA_ARRAY(arena, float, s->elements / FLAP_OPS_MOMENT_BLOCK);
  s->v_largest = FLAP_ARENA_ARRAY(arena, float, s->elements / FLAP_OPS_MOMENT_BLOCK);
  s->decay_blocks = FLAP_ARENA_ARRAY(arena, uint8_t, s->elements / FLAP_OPS_BLOCK / 8);
}

static flap_status open_states(states *s, uint64_t elements) {
  s->elements = elements;
  flap_arena_measure(&s->arena, "optimizer states");
  take(s);
  FLAP_TRY(flap_arena_open(&s->arena, "optimizer states", s->arena.bytes_used));
  take(s);
  for (uint64_t i = 0; i < elements; ++i) {
    const uint16_t value = flap_f32_to_bf16((float)(i * 2654435761u % 2001) * 1e-3f - 1.0f);
    s->high[i] = value;
    s->grad[i] = value;
  }
  return FLAP_OK;
}

static double update(states *s, flap_host_optimizer *optimizer, bool eight_bit) {
  const flap_adamw scalars = {.learning_rate = 1e-6f,
                              .beta1 = 0.9f,
                              .beta2 = 0.95f,
                              .one_minus_beta1 = 0.1f,
                              .one_minus_beta2 = 0.05f,
                              .inverse_bias1 = 1,
                              .inverse_sqrt_bias2 = 1,
                              .epsilon = 1e-8f,
                              .decay = 1,
                              .gradient_scale = 1};
  int32_t fault = 0;
  const uint64_t start_ns = flap_units_now_ns();
  if (eight_bit)
    flap_host_adamw_8bit(optimizer, &scalars, FLAP_BF16, FLAP_BF16, s->high, s->low, s->m_codes, s->v_codes,
                         s->m_largest, s->v_largest, s->grad, s->decay_blocks, &fault, s->elements);
  else
    flap_host_adamw(optimizer, &scalars, FLAP_BF16, FLAP_BF16, s->high, s->low, s->m, s->v, s->grad, s->decay_blocks,
                    &fault, s->elements);
  const double seconds = (double)(flap_units_now_ns() - start_ns) * 1e-9;
  return (eight_bit ? FLAP_OPS_ADAMW_8BIT_BYTES : FLAP_OPS_ADAMW_BYTES) * (double)s->elements / seconds;
}

static flap_status measure_round(states *s, flap_pool *pool, flap_host_optimizer *optimizer, uint32_t round,
                                 double values[RATES][FLAP_RATE_ROUNDS_MAX]) {
  const flap_rate_effort effort = {.rounds = 1, .round_ns = ROUND_NS};
  for (uint32_t turn = 0; turn < RATES; ++turn) {
    const uint32_t rate = (turn + round) % RATES;
    flap_rate memory[FLAP_MEMORY_PATTERNS];
    if (rate != MODIFY) {
      values[rate][round] = update(s, optimizer, rate == ADAMW_8BIT);
      continue;
    }
    FLAP_TRY(flap_measure_host_memory(pool, flap_measure_host_bytes(), 1u << FLAP_MEMORY_MODIFY, &effort, memory));
    values[rate][round] = memory[FLAP_MEMORY_MODIFY].median;
  }
  return FLAP_OK;
}

static void print_row(uint32_t threads, uint32_t rounds, double values[RATES][FLAP_RATE_ROUNDS_MAX]) {
  double ratios[RATES][FLAP_RATE_ROUNDS_MAX], medians[RATES];
  for (uint32_t rate = 0; rate < RATES; ++rate)
    for (uint32_t round = 0; round < rounds; ++round)
      ratios[rate][round] = values[rate][round] / values[MODIFY][round];
  for (uint32_t rate = 0; rate < RATES; ++rate)
    medians[rate] = flap_rate_of(values[rate], rounds).median * 1e-9;
  printf("%7u %18.1f", threads, medians[MODIFY]);
  for (uint32_t rate = ADAMW; rate <= ADAMW_8BIT; ++rate) {
    const double ratio = flap_rate_of(ratios[rate], rounds).median; /* and they are sorted */
    printf(" %12.1f  %.2f (%.2f, %.2f)", medians[rate], ratio, ratios[rate][rounds / 4],
           ratios[rate][rounds - 1 - rounds / 4]);
  }
  printf("\n");
  (void)fflush(stdout);
}

static flap_status measure(states *s, uint32_t threads, uint32_t rounds) {
  double values[RATES][FLAP_RATE_ROUNDS_MAX];
  flap_host_optimizer *optimizer = NULL;
  flap_pool *pool;
  FLAP_TRY(flap_pool_open(threads, &pool));
  flap_status status = flap_host_optimizer_open(threads, &optimizer);
  if (status == FLAP_OK) { /* moments of ordinary size, and awake threads */
    (void)update(s, optimizer, false);
    (void)update(s, optimizer, true);
  }
  for (uint32_t round = 0; round < rounds && status == FLAP_OK; ++round)
    status = measure_round(s, pool, optimizer, round, values);
  flap_host_optimizer_close(optimizer);
  flap_pool_close(pool);
  if (status == FLAP_OK)
    print_row(threads, rounds, values);
  return status;
}

static flap_status count_threads(uint32_t wanted, uint32_t *threads_out) {
  flap_pool *pool;
  FLAP_TRY(flap_pool_open(wanted, &pool));
  *threads_out = flap_pool_threads(pool);
  flap_pool_close(pool);
  return FLAP_OK;
}

static flap_status bench(uint32_t threads, uint64_t elements, uint32_t rounds) {
  states s = {0};
  uint32_t all = 0;
  FLAP_TRY(count_threads(threads, &all));
  FLAP_TRY(open_states(&s, elements));
  printf(
      "AdamW over %llu parameters on the host: bf16 weights, split masters, bf16 gradients; %.2f bytes each with fp32 "
      "moments, %.2f with 8-bit ones; %u rounds, GB/s\n"
      "threads  read-modify-write   AdamW fp32  of it              AdamW 8-bit  of it\n",
      (unsigned long long)elements, FLAP_OPS_ADAMW_BYTES, FLAP_OPS_ADAMW_8BIT_BYTES, rounds);
  flap_status status = FLAP_OK;
  for (uint32_t n = 1; n <= all && status == FLAP_OK; n = n < all && 2 * n > all ? all : 2 * n)
    status = measure(&s, n, rounds);
  flap_arena_close(&s.arena);
  return status;
}

int main(int argc, char **argv) {
  const uint32_t threads = argc > 1 ? (uint32_t)strtoul(argv[1], NULL, 10) : 0;
  const uint64_t elements = (argc > 2 ? strtoull(argv[2], NULL, 10) : MI_ELEMENTS) << 20;
  const uint32_t rounds = argc > 3 ? (uint32_t)strtoul(argv[3], NULL, 10) : ROUNDS;
  if (elements == 0 || rounds == 0 || rounds > FLAP_RATE_ROUNDS_MAX) {
    (void)fprintf(stderr, "usage: bench_host_optimizer [threads] [Mi of elements] [rounds, at most %u]\n",
                  FLAP_RATE_ROUNDS_MAX);
    return EXIT_FAILURE;
  }
  if (bench(threads, elements, rounds) != FLAP_OK) {
    (void)fprintf(stderr, "bench_host_optimizer: %s\n", flap_error_message());
    return EXIT_FAILURE;
  }
  return EXIT_SUCCESS;
}
