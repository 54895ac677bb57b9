/* Random programs of copies, kernels and events on the cpu device against the same program run in sequence.
 *
 * Blocks of arena and host memory are read and written by the three streams and by this thread. Before an operation
 * touches a block that another stream still uses, the program records an event there and lets this stream wait for
 * it; events are few and recorded again and again. The model runs each operation at once. If order were lost
 * anywhere, bytes would differ, and ThreadSanitizer would see the race.
 */
#include "kernels/device/device.h"

#include "base/philox.h"
#include "base/units.h"

#include <check.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define BLOCKS 12u /* arena blocks, then as many host blocks */
#define EVENTS 5u
#define HOST_THREAD FLAP_STREAM_COUNT /* this thread, as one who uses blocks */
#define USERS (FLAP_STREAM_COUNT + 1)

typedef struct program {
  flap_philox random;
  uint64_t drawn;
  uint64_t block_bytes;
  flap_device *device;
  unsigned char *block[2 * BLOCKS]; /* real */
  unsigned char *model[2 * BLOCKS];
  /* The number of the last operation of each stream that reads or writes a block; what a stream is known to have waited
   * for. */
  uint64_t read_by[2 * BLOCKS][USERS], written_by[2 * BLOCKS][USERS];
  uint64_t launched[USERS];
  uint64_t seen[USERS][USERS]; /* seen[a][b]: a is ordered after b's operations up to this one */
  uint32_t waits, notifies_asked;
} program;

static _Atomic uint32_t notifies;
static void count_notify(void *context) {
  (void)context;
  atomic_fetch_add(&notifies, 1);
}

static uint32_t draw(program *p, uint32_t bound) {
  return (uint32_t)flap_philox_below(&p->random, p->drawn++, bound);
}

/* The compute stream is this thread: the two see what the other sees. */
static void know(program *p, uint32_t user, uint32_t other, uint64_t number) {
  uint32_t users[2] = {user, user};
  if (user == FLAP_STREAM_COMPUTE || user == HOST_THREAD)
    users[0] = FLAP_STREAM_COMPUTE, users[1] = HOST_THREAD;
  for (uint32_t i = 0; i < 2; i++)
    if (p->seen[users[i]][other] < number)
      p->seen[users[i]][other] = number;
}

/* `user` may start only after `other` has finished its operation `number`. */
static void order(program *p, uint32_t user, uint32_t other, uint64_t number) {
  if (user == other || p->seen[user][other] >= number || other == HOST_THREAD || other == FLAP_STREAM_COMPUTE)
    return; /* this thread's work is over before anything is launched after it */
  flap_event event = draw(p, EVENTS);
  bool notify = draw(p, 4) == 0;
  p->notifies_asked += notify;
  p->waits++;
  flap_device_event_record(p->device, event, (flap_stream)other, notify);
  if (user == HOST_THREAD)
    flap_device_event_wait(p->device, event);
  else
    flap_device_stream_wait(p->device, (flap_stream)user, event);
  know(p, user, other, p->launched[other]);
  /* Moving the event somewhere else must not weaken the wait. */
  if (draw(p, 3) == 0)
    flap_device_event_record(p->device, event, (flap_stream)draw(p, FLAP_STREAM_COUNT), false);
}

static void use(program *p, uint32_t user, uint32_t block, bool write) {
  for (uint32_t other = 0; other < USERS; other++) {
    order(p, user, other, p->written_by[block][other]);
    if (write)
      order(p, user, other, p->read_by[block][other]);
  }
  uint64_t number = p->launched[user] + 1;
  if (write)
    p->written_by[block][user] = number;
  else
    p->read_by[block][user] = number;
}

/* A "kernel": every byte of `to` from the bytes of `from`. */
static void mix(unsigned char *to, const unsigned char *from, uint64_t bytes, unsigned char salt) {
  for (uint64_t i = 0; i < bytes; i++)
    to[i] = (unsigned char)(5u * to[i] + from[i] + salt + i);
}

static void step(program *p) {
  uint32_t arena = draw(p, BLOCKS), other = draw(p, BLOCKS), host = BLOCKS + draw(p, BLOCKS);
  uint64_t bytes = 1 + draw(p, (uint32_t)p->block_bytes);
  switch (draw(p, 5)) {
  case 0:
  case 1: {
    bool to_device = draw(p, 2) == 0;
    flap_stream stream = to_device ? FLAP_STREAM_H2D : FLAP_STREAM_D2H;
    uint32_t to = to_device ? arena : host, from = to_device ? host : arena;
    use(p, stream, from, false);
    use(p, stream, to, true);
    p->launched[stream]++;
    flap_device_copy(p->device, stream, p->block[to], p->block[from], bytes);
    memcpy(p->model[to], p->model[from], bytes);
    break;
  }
  case 2:
    use(p, FLAP_STREAM_COMPUTE, other, false);
    use(p, FLAP_STREAM_COMPUTE, arena, true);
    p->launched[FLAP_STREAM_COMPUTE]++;
    mix(p->block[arena], p->block[other], bytes, (unsigned char)other);
    mix(p->model[arena], p->model[other], bytes, (unsigned char)other);
    break;
  case 3:
    use(p, HOST_THREAD, host, true);
    p->launched[HOST_THREAD]++;
    mix(p->block[host], p->block[host], bytes, 3);
    mix(p->model[host], p->model[host], bytes, 3);
    break;
  default:
    use(p, HOST_THREAD, host, false);
    use(p, FLAP_STREAM_COMPUTE, arena, true);
    p->launched[HOST_THREAD]++;
    p->launched[FLAP_STREAM_COMPUTE]++;
    ck_assert_int_eq(flap_device_upload(p->device, p->block[arena], p->block[host], bytes), FLAP_OK);
    memcpy(p->model[arena], p->model[host], bytes);
    break;
  }
}

static void run_program(uint64_t seed) {
  program *p = calloc(1, sizeof *p);
  p->random = flap_philox_stream(seed, "device program");
  p->block_bytes = (uint64_t)64 << draw(p, 11);
  flap_device_config config = {
      .kind = FLAP_DEVICE_CPU, .vram_bytes = BLOCKS * p->block_bytes, .events_max = EVENTS, .notify = count_notify};
  ck_assert_int_eq(flap_device_open(&config, &p->device), FLAP_OK);
  unsigned char *host = malloc(BLOCKS * p->block_bytes), *model = calloc(2 * BLOCKS, p->block_bytes);
  unsigned char *arena = flap_device_arena(p->device, NULL);
  for (uint64_t i = 0; i < BLOCKS * p->block_bytes; i++)
    host[i] = model[BLOCKS * p->block_bytes + i] = (unsigned char)(i * 31 + i / 253);
  for (uint32_t i = 0; i < 2 * BLOCKS; i++) {
    p->block[i] = i < BLOCKS ? arena + i * p->block_bytes : host + (i - BLOCKS) * p->block_bytes;
    p->model[i] = model + i * p->block_bytes;
  }
  atomic_store(&notifies, 0);
  for (uint32_t i = 0; i < 400; i++)
    step(p);
  ck_assert_int_eq(flap_device_synchronize(p->device), FLAP_OK);
  for (uint32_t i = 0; i < 2 * BLOCKS; i++)
    ck_assert_msg(memcmp(p->block[i], p->model[i], p->block_bytes) == 0, "seed %llu: block %u differs",
                  (unsigned long long)seed, i);
  ck_assert_uint_eq(atomic_load(&notifies), p->notifies_asked);
  ck_assert_uint_gt(p->waits, 20); /* the program did depend on order */
  flap_device_close(p->device);
  free(host);
  free(model);
  free(p);
}

START_TEST(random_programs_equal_the_sequential_model) {
  const char *given = getenv("FLAP_TEST_SEED");
  uint64_t seed = given ? strtoull(given, NULL, 10) : flap_units_now_ns() % 1000000;
  printf("FLAP_TEST_SEED=%llu\n", (unsigned long long)seed);
  fflush(stdout);
  for (uint64_t i = 0; i < 60; i++)
    run_program(seed + i);
}
END_TEST

int main(void) {
  Suite *suite = suite_create("device");
  TCase *tests = tcase_create("programs");
  tcase_set_timeout(tests, 120);
  tcase_add_test(tests, random_programs_equal_the_sequential_model);
  suite_add_tcase(suite, tests);
  SRunner *runner = srunner_create(suite);
  srunner_run_all(runner, CK_NORMAL);
  int failed = srunner_ntests_failed(runner);
  srunner_free(runner);
  return failed ? 1 : 0;
}
