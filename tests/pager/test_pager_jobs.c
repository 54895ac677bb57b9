/* Jobs of the host: bytes of a program that is run over and over, when they begin, and what waits for them. */
#include "pager/pager.h"

#include "base/units.h"
#include "pager/pager_internal.h"

#include <check.h>
#include <stdlib.h>
#include <string.h>

#define BYTES ((uint64_t)8 * FLAP_BLOCK_ALIGN)
enum { STATES, GRADIENT, WEIGHTS, REGIONS };
enum { RING_GRADIENTS, RING_KEPT, RINGS };

static const flap_pager_region regions[REGIONS] = {
    [STATES] = {.bytes = BYTES, .ring = FLAP_PAGER_HOST, .ram_pages = 8},
    [GRADIENT] = {.bytes = BYTES, .ring = RING_GRADIENTS, .ram_pages = 8},
    [WEIGHTS] = {.bytes = BYTES, .ring = RING_KEPT, .ram_pages = 8}};
static const flap_pager_ring rings[RINGS] = {
    [RING_GRADIENTS] = {.name = "gradients", .slot_bytes = BYTES, .slots = 1},
    [RING_KEPT] = {.name = "kept weights", .slot_bytes = BYTES, .slots = 1, .keeps = true}};
/* A step: the update, two passes over the weights, and the gradient of the next update. */
static const flap_lease step[] = {{.region = STATES, .mode = FLAP_LEASE_UPDATE, .host_bytes = BYTES},
                                  {.region = GRADIENT, .mode = FLAP_LEASE_CONSUME, .host_bytes = BYTES},
                                  {.region = WEIGHTS, .mode = FLAP_LEASE_UPDATE, .host_bytes = BYTES / 2},
                                  {.region = WEIGHTS, .mode = FLAP_LEASE_READ},
                                  {.region = WEIGHTS, .mode = FLAP_LEASE_READ},
                                  {.region = GRADIENT, .mode = FLAP_LEASE_CREATE}};
#define LEASES (sizeof step / sizeof *step)

typedef struct rig {
  flap_arena arena;
  flap_clock *clock;
  flap_pager_config config;
  flap_pager *pager;
  uint32_t runs;
} rig;

static void must(flap_status status) {
  ck_assert_msg(status == FLAP_OK, "%s", flap_error_message());
}

static flap_status fill_zeros(void *context, uint64_t offset, uint64_t bytes, void *memory) {
  (void)context, (void)offset;
  memset(memory, 0, bytes);
  return FLAP_OK;
}

static void open_rig(rig *r, flap_device_kind kind, flap_machine machine) {
  flap_pager_sizes sizes;
  memset(r, 0, sizeof *r);
  r->config = (flap_pager_config){.page_bytes = FLAP_BLOCK_ALIGN,
                                  .transfer_bytes = 2 * FLAP_BLOCK_ALIGN,
                                  .region_count = REGIONS,
                                  .regions = regions,
                                  .ring_count = RINGS,
                                  .rings = rings,
                                  .leases_max = LEASES,
                                  .jobs_max = 1};
  flap_pager_measure(&r->config, &sizes);
  r->config.device = (flap_device_config){.kind = kind, .vram_bytes = sizes.vram_bytes, .machine = machine};
  if (kind == FLAP_DEVICE_SIM) {
    must(flap_clock_open(&r->clock));
    r->config.clock = r->clock;
    flap_arena_measure(&r->arena, "ram");
  } else {
    must(flap_arena_open(&r->arena, "ram", sizes.ram_bytes));
  }
  must(flap_pager_open(&r->config, &r->arena, &r->pager));
  for (uint32_t i = 0; i < REGIONS; i++)
    must(flap_pager_fill(r->pager, i, fill_zeros, NULL));
}

static void close_rig(rig *r) {
  flap_pager_close(r->pager);
  if (r->clock)
    flap_clock_close(r->clock);
  else
    flap_arena_close(&r->arena);
}

/* states += gradient, weights = states. */
static void update(void *context, void *const memory[]) {
  rig *r = context;
  unsigned char *states = memory[0], *weights = memory[2];
  const unsigned char *gradient = memory[1];
  for (uint64_t i = 0; i < BYTES; i++)
    weights[i] = states[i] = (unsigned char)(states[i] + gradient[i]);
  r->runs++;
}

static unsigned char *pin(rig *r, uint32_t lease) {
  void *memory = NULL;
  must(flap_pager_pin(r->pager, lease, &memory));
  return memory;
}

/* One step: the weights are `weights` in both passes, and the next gradient is `gradient`. */
static void run_step(rig *r, unsigned char weights, unsigned char gradient) {
  must(flap_pager_begin(r->pager, step, LEASES));
  flap_pager_run_job(r->pager, 0, 3,
                     &(flap_pager_job){.run = update, .context = r, .ns = 5000, .beside_copies_ns = 5000});
  for (uint32_t lease = 3; lease < 5; lease++) {
    const unsigned char *here = pin(r, lease);
    for (uint64_t i = 0; r->clock == NULL && i < BYTES; i++)
      ck_assert_uint_eq(here[i], weights);
    flap_pager_unpin(r->pager, lease);
  }
  unsigned char *here = pin(r, 5);
  if (r->clock == NULL)
    memset(here, gradient, BYTES);
  flap_pager_unpin(r->pager, 5);
  must(flap_pager_end(r->pager));
}

START_TEST(job_weights_are_loaded_once_per_change) {
  rig r;
  uint64_t predicted[FLAP_LANE_COUNT];
  flap_pager_stats stats;
  open_rig(&r, FLAP_DEVICE_CPU, (flap_machine){.launch_ns = 0});
  run_step(&r, 0, 1);
  run_step(&r, 1, 2);
  run_step(&r, 3, 4);
  must(flap_pager_settle(r.pager));
  ck_assert_uint_eq(r.runs, 3);
  flap_pager_predict(&r.config, step, LEASES, predicted);
  ck_assert_uint_eq(predicted[FLAP_LANE_H2D], BYTES); /* not twice */
  ck_assert_uint_eq(predicted[FLAP_LANE_D2H], BYTES);
  ck_assert_uint_eq(predicted[FLAP_LANE_HOST], 2 * BYTES + BYTES + 2 * (BYTES / 2));
  flap_pager_get_stats(r.pager, &stats);
  for (int lane = 0; lane < FLAP_LANE_COUNT; lane++)
    ck_assert_uint_eq(stats.bytes[lane], 3 * predicted[lane]);
  ck_assert_uint_gt(stats.busy_ns[FLAP_LANE_HOST], 0);
  close_rig(&r);
}
END_TEST

START_TEST(job_without_work_leaves_bytes_as_they_are) {
  rig r;
  open_rig(&r, FLAP_DEVICE_CPU, (flap_machine){.launch_ns = 0});
  run_step(&r, 0, 7);
  must(flap_pager_begin(r.pager, step, LEASES));
  flap_pager_run_job(r.pager, 0, 3, &(flap_pager_job){.run = NULL});
  for (uint32_t lease = 3; lease < LEASES; lease++) {
    const unsigned char *here = pin(&r, lease);
    ck_assert(lease == 5 || here[0] == 0);
    flap_pager_unpin(r.pager, lease);
  }
  must(flap_pager_end(r.pager));
  ck_assert_uint_eq(r.runs, 1);
  close_rig(&r);
}
END_TEST

/* What is behind a job waits for its 5 us, charged to the host; nothing else here takes time. */
START_TEST(job_is_waited_for_on_a_virtual_clock) {
  rig r;
  flap_pager_stats stats;
  flap_machine machine;
  flap_device_default_machine(FLAP_DEVICE_CUDA, &machine);
  machine.h2d_bytes = machine.d2h_bytes = 1e18;
  machine.copy_ns = machine.launch_ns = 0;
  open_rig(&r, FLAP_DEVICE_SIM, machine);
  run_step(&r, 0, 0);
  run_step(&r, 0, 0);
  must(flap_pager_settle(r.pager));
  flap_pager_get_stats(r.pager, &stats);
  ck_assert_uint_eq(stats.busy_ns[FLAP_LANE_HOST], 10000);
  ck_assert_uint_eq(stats.stall_ns[FLAP_LANE_HOST], 10000);
  ck_assert_uint_ge(flap_clock_now_ns(r.clock), 10000);
  ck_assert_uint_lt(flap_clock_now_ns(r.clock), 10200);
  close_rig(&r);
}
END_TEST

/* A program whose last lease is a job's ends when the job does. */
START_TEST(job_at_the_end_is_waited_for_by_end) {
  rig r;
  open_rig(&r, FLAP_DEVICE_CPU, (flap_machine){.launch_ns = 0});
  must(flap_pager_begin(r.pager, step, 3));
  flap_pager_run_job(r.pager, 0, 3, &(flap_pager_job){.run = update, .context = &r});
  must(flap_pager_end(r.pager));
  ck_assert_uint_eq(r.runs, 1);
  close_rig(&r);
}
END_TEST

int main(void) {
  pager_full_checks = true;
  Suite *suite = suite_create("pager");
  TCase *tcase = tcase_create("jobs");
  tcase_add_test(tcase, job_weights_are_loaded_once_per_change);
  tcase_add_test(tcase, job_without_work_leaves_bytes_as_they_are);
  tcase_add_test(tcase, job_is_waited_for_on_a_virtual_clock);
  tcase_add_test(tcase, job_at_the_end_is_waited_for_by_end);
  suite_add_tcase(suite, tcase);
  SRunner *runner = srunner_create(suite);
  srunner_run_all(runner, CK_ENV);
  int failed = srunner_ntests_failed(runner);
  srunner_free(runner);
  return failed ? EXIT_FAILURE : EXIT_SUCCESS;
}
