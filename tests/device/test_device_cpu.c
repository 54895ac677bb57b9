/* The cpu device: streams, events, notifies, the ring's end, and closing. */
#include "kernels/device/device.h"

#include "base/units.h"

#include <check.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define VRAM ((uint64_t)1 << 20)

/* A gate that a notify stands before, so that a test decides how long a copy stream is held up. */
typedef struct gate {
  pthread_mutex_t lock;
  pthread_cond_t moved;
  bool open;
  uint32_t calls; /* how many notifies came */
  pthread_t last_caller;
} gate;

static void gate_init(gate *g, bool open) {
  pthread_mutex_init(&g->lock, NULL);
  pthread_cond_init(&g->moved, NULL);
  g->open = open;
  g->calls = 0;
}

static void gate_notify(void *context) {
  gate *g = context;
  pthread_mutex_lock(&g->lock);
  g->calls++;
  g->last_caller = pthread_self();
  pthread_cond_broadcast(&g->moved);
  while (!g->open)
    pthread_cond_wait(&g->moved, &g->lock);
  pthread_mutex_unlock(&g->lock);
}

static void gate_open(gate *g) {
  pthread_mutex_lock(&g->lock);
  g->open = true;
  pthread_cond_broadcast(&g->moved);
  pthread_mutex_unlock(&g->lock);
}

static void gate_await_calls(gate *g, uint32_t calls) {
  pthread_mutex_lock(&g->lock);
  while (g->calls < calls)
    pthread_cond_wait(&g->moved, &g->lock);
  pthread_mutex_unlock(&g->lock);
}

static uint32_t gate_calls(gate *g) {
  pthread_mutex_lock(&g->lock);
  uint32_t calls = g->calls;
  pthread_mutex_unlock(&g->lock);
  return calls;
}

static void gate_destroy(gate *g) {
  pthread_cond_destroy(&g->moved);
  pthread_mutex_destroy(&g->lock);
}

static void sleep_ms(long ms) {
  nanosleep(&(struct timespec){.tv_sec = ms / 1000, .tv_nsec = ms % 1000 * 1000000}, NULL);
}

static flap_device *open_cpu(gate *g) {
  flap_device_config config = {.kind = FLAP_DEVICE_CPU, .vram_bytes = VRAM, .events_max = 16};
  if (g) {
    config.notify = gate_notify;
    config.notify_context = g;
  }
  flap_device *device = NULL;
  ck_assert_int_eq(flap_device_open(&config, &device), FLAP_OK);
  return device;
}

/* Holds the H2D stream at the gate, with event 0 recorded before it. */
static void hold_h2d(flap_device *device, gate *g) {
  flap_device_event_record(device, 0, FLAP_STREAM_H2D, true);
  gate_await_calls(g, 1);
}

START_TEST(open_with_unusable_config_is_refused_with_a_reason) {
  flap_device *device = (flap_device *)&device;
  flap_device_config config;
#ifndef FLAP_CUDA
  config = (flap_device_config){.kind = FLAP_DEVICE_CUDA, .vram_bytes = VRAM};
  ck_assert_int_eq(flap_device_open(&config, &device), FLAP_UNSUPPORTED);
  ck_assert_ptr_null(device);
  ck_assert_ptr_nonnull(strstr(flap_error_message(), "this build has no CUDA"));
#endif
  config = (flap_device_config){.kind = FLAP_DEVICE_CPU, .vram_bytes = 0};
  ck_assert_int_eq(flap_device_open(&config, &device), FLAP_INVALID);
  ck_assert_ptr_nonnull(strstr(flap_error_message(), "vram"));
  config.vram_bytes = (uint64_t)1 << 60;
  ck_assert_int_eq(flap_device_open(&config, &device), FLAP_NO_MEMORY);
  ck_assert_ptr_nonnull(strstr(flap_error_message(), "vram"));
  config.vram_bytes = (uint64_t)1 << 45; /* addressable, but beyond the memory of the machine: asked before taken */
  ck_assert_int_eq(flap_device_open(&config, &device), FLAP_NO_MEMORY);
  ck_assert_ptr_nonnull(strstr(flap_error_message(), "32.0 TiB"));
  flap_device_close(NULL);
}
END_TEST

START_TEST(open_gives_an_aligned_zeroed_arena_of_the_budget) {
  flap_pool *pool = NULL;
  ck_assert_int_eq(flap_pool_open(2, &pool), FLAP_OK);
  flap_device_config config = {.kind = FLAP_DEVICE_CPU, .vram_bytes = 12345, .events_max = 1, .pool = pool};
  flap_device *device = NULL;
  ck_assert_int_eq(flap_device_open(&config, &device), FLAP_OK);
  uint64_t bytes = 0;
  unsigned char *arena = flap_device_arena(device, &bytes);
  ck_assert_uint_eq(bytes, 12345);
  ck_assert_uint_eq((uintptr_t)arena % 4096, 0);
  for (uint64_t i = 0; i < bytes; i++)
    ck_assert_uint_eq(arena[i], 0);
  memset(arena, 1, bytes);
  ck_assert_str_eq(flap_device_describe(device), "cpu, 2 threads");
  ck_assert_int_eq(flap_device_get_kind(device), FLAP_DEVICE_CPU);
  ck_assert(flap_device_has_bytes(device));
  ck_assert_ptr_eq(flap_device_pool(device), pool);
  ck_assert_uint_eq(flap_device_memory_peak(device), 12345);
  ck_assert_int_eq(flap_device_pin_host(device, &config, sizeof config), FLAP_OK);
  flap_device_note_compute(device, 40);
  flap_device_note_compute(device, 2);
  ck_assert_uint_eq(flap_device_busy_ns(device, FLAP_STREAM_COMPUTE), 42);
  flap_device_close(device);
  flap_pool_close(pool);
}
END_TEST

/* Running out of the arena faults: the page after it is nobody's. */
START_TEST(arena_write_past_its_last_page_faults) {
  flap_device *device = open_cpu(NULL);
  volatile char *arena = flap_device_arena(device, NULL);
  signal(SIGSEGV, SIG_DFL); /* a sanitizer would make an exit of it */
  arena[VRAM] = 1;
  flap_device_close(device);
}
END_TEST

START_TEST(upload_and_download_move_bytes_at_once) {
  flap_device *device = open_cpu(NULL);
  char *arena = flap_device_arena(device, NULL);
  char text[6] = "hello", back[6] = "";
  ck_assert_int_eq(flap_device_upload(device, arena + 100, text, sizeof text), FLAP_OK);
  text[0] = 'j';                                                              /* the upload has read it */
  flap_device_copy(device, FLAP_STREAM_COMPUTE, arena + 101, arena + 100, 5); /* overlapping */
  ck_assert_int_eq(flap_device_download(device, back, arena + 100, sizeof back), FLAP_OK);
  ck_assert_mem_eq(back, "hhello", 6);
  flap_device_close(device);
}
END_TEST

START_TEST(event_never_recorded_is_complete) {
  flap_device *device = open_cpu(NULL);
  for (flap_event event = 0; event < 16; event++) {
    ck_assert(flap_device_event_done(device, event));
    flap_device_event_wait(device, event);
    for (int stream = 0; stream < FLAP_STREAM_COUNT; stream++)
      flap_device_stream_wait(device, (flap_stream)stream, event);
  }
  flap_device_event_record(device, 3, FLAP_STREAM_D2H, false); /* nothing was launched before it */
  ck_assert(flap_device_event_done(device, 3));
  ck_assert_int_eq(flap_device_synchronize(device), FLAP_OK);
  flap_device_close(device);
}
END_TEST

START_TEST(event_on_compute_notifies_on_the_recording_thread) {
  gate g;
  gate_init(&g, true);
  flap_device *device = open_cpu(&g);
  flap_device_event_record(device, 1, FLAP_STREAM_COMPUTE, true);
  ck_assert_uint_eq(gate_calls(&g), 1);
  ck_assert(pthread_equal(g.last_caller, pthread_self()));
  ck_assert(flap_device_event_done(device, 1));
  flap_device_event_record(device, 1, FLAP_STREAM_COMPUTE, false);
  ck_assert_uint_eq(gate_calls(&g), 1);
  flap_device_close(device);
  gate_destroy(&g);
}
END_TEST

START_TEST(event_behind_held_stream_is_not_done_until_it_moves) {
  gate g;
  gate_init(&g, false);
  flap_device *device = open_cpu(&g);
  char *arena = flap_device_arena(device, NULL);
  char bytes[64] = {1};
  hold_h2d(device, &g);
  ck_assert(flap_device_event_done(device, 0)); /* recorded before what holds the stream */
  flap_device_copy(device, FLAP_STREAM_H2D, arena, bytes, sizeof bytes);
  flap_device_event_record(device, 1, FLAP_STREAM_H2D, false);
  sleep_ms(20);
  ck_assert(!flap_device_event_done(device, 1));
  ck_assert_int_eq(arena[0], 0);
  gate_open(&g);
  flap_device_event_wait(device, 1);
  ck_assert(flap_device_event_done(device, 1));
  ck_assert_int_eq(arena[0], 1);
  flap_device_close(device);
  gate_destroy(&g);
}
END_TEST

START_TEST(stream_wait_holds_the_other_copy_stream) {
  gate g;
  gate_init(&g, false);
  flap_device *device = open_cpu(&g);
  char *arena = flap_device_arena(device, NULL);
  char there[64] = {7}, back[64] = {0};
  hold_h2d(device, &g);
  flap_device_copy(device, FLAP_STREAM_H2D, arena, there, sizeof there);
  flap_device_event_record(device, 1, FLAP_STREAM_H2D, false);
  flap_device_stream_wait(device, FLAP_STREAM_D2H, 1);
  flap_device_copy(device, FLAP_STREAM_D2H, back, arena, sizeof back);
  flap_device_event_record(device, 2, FLAP_STREAM_D2H, false);
  sleep_ms(20);
  ck_assert(!flap_device_event_done(device, 2));
  gate_open(&g);
  flap_device_event_wait(device, 2);
  ck_assert_int_eq(back[0], 7);
  flap_device_close(device);
  gate_destroy(&g);
}
END_TEST

/* The wait was asked for against the first recording; moving the event must not move the wait. */
START_TEST(event_recorded_again_moves_but_earlier_waits_stay) {
  gate g;
  gate_init(&g, false);
  flap_device *device = open_cpu(&g);
  char *arena = flap_device_arena(device, NULL);
  char there[64] = {9}, back[64] = {0};
  hold_h2d(device, &g);
  flap_device_copy(device, FLAP_STREAM_H2D, arena, there, sizeof there);
  flap_device_event_record(device, 1, FLAP_STREAM_H2D, false);
  ck_assert(!flap_device_event_done(device, 1));
  flap_device_stream_wait(device, FLAP_STREAM_D2H, 1);
  flap_device_event_record(device, 1, FLAP_STREAM_COMPUTE, false);
  ck_assert(flap_device_event_done(device, 1));
  flap_device_copy(device, FLAP_STREAM_D2H, back, arena, sizeof back);
  flap_device_event_record(device, 1, FLAP_STREAM_D2H, false);
  ck_assert(!flap_device_event_done(device, 1));
  sleep_ms(20);
  ck_assert(!flap_device_event_done(device, 1));
  gate_open(&g);
  flap_device_event_wait(device, 1);
  ck_assert_int_eq(back[0], 9);
  flap_device_close(device);
  gate_destroy(&g);
}
END_TEST

static void *open_later(void *context) {
  sleep_ms(30);
  gate_open(context);
  return NULL;
}

START_TEST(stream_wait_on_compute_blocks_the_caller) {
  gate g;
  gate_init(&g, false);
  flap_device *device = open_cpu(&g);
  char *arena = flap_device_arena(device, NULL);
  char there[64] = {5};
  hold_h2d(device, &g);
  flap_device_copy(device, FLAP_STREAM_H2D, arena, there, sizeof there);
  flap_device_event_record(device, 1, FLAP_STREAM_H2D, false);
  pthread_t helper;
  pthread_create(&helper, NULL, open_later, &g);
  flap_device_stream_wait(device, FLAP_STREAM_COMPUTE, 1);
  ck_assert_int_eq(arena[0], 5);
  pthread_join(helper, NULL);
  flap_device_close(device);
  gate_destroy(&g);
}
END_TEST

typedef struct launcher {
  flap_device *device;
  unsigned char *from;
  _Atomic uint32_t launched;
} launcher;

#define MANY 6000u

static void *launch_many(void *context) {
  launcher *l = context;
  char *arena = flap_device_arena(l->device, NULL);
  for (uint32_t i = 0; i < MANY; i++) {
    flap_device_copy(l->device, FLAP_STREAM_H2D, arena + i, l->from + i, 1);
    atomic_store(&l->launched, i + 1);
  }
  return NULL;
}

START_TEST(ring_full_blocks_the_launcher_and_recovers) {
  gate g;
  gate_init(&g, false);
  launcher l = {.device = open_cpu(&g), .from = malloc(MANY)};
  for (uint32_t i = 0; i < MANY; i++)
    l.from[i] = (unsigned char)(i * 7 + 1);
  hold_h2d(l.device, &g);
  pthread_t thread;
  pthread_create(&thread, NULL, launch_many, &l);
  uint32_t before = 0, still = 0;
  while (still < 5) { /* until nothing moved for 50 ms */
    sleep_ms(10);
    uint32_t launched = atomic_load(&l.launched);
    still = launched == before && launched > 0 ? still + 1 : 0;
    before = launched;
  }
  ck_assert_uint_ge(before, 1024);
  ck_assert_uint_lt(before, MANY);
  flap_device_copy(l.device, FLAP_STREAM_D2H, l.from, flap_device_arena(l.device, NULL), 0); /* others are not stuck */
  gate_open(&g);
  pthread_join(thread, NULL);
  ck_assert_int_eq(flap_device_synchronize(l.device), FLAP_OK);
  ck_assert_mem_eq(flap_device_arena(l.device, NULL), l.from, MANY);
  flap_device_close(l.device);
  free(l.from);
  gate_destroy(&g);
}
END_TEST

START_TEST(notify_comes_once_per_recording_that_asked) {
  gate g;
  gate_init(&g, true);
  flap_device *device = open_cpu(&g);
  char *arena = flap_device_arena(device, NULL);
  char there[256] = {0}, back[256];
  uint32_t asked = 0;
  for (uint32_t i = 0; i < 3000; i++) {
    flap_stream stream = i % 2 ? FLAP_STREAM_H2D : FLAP_STREAM_D2H;
    if (i % 2)
      flap_device_copy(device, stream, arena, there, sizeof there);
    else
      flap_device_copy(device, stream, back, arena + 4096, sizeof back);
    flap_device_event_record(device, i % 16, stream, i % 3 == 0);
    asked += i % 3 == 0;
  }
  ck_assert_int_eq(flap_device_synchronize(device), FLAP_OK);
  ck_assert_uint_eq(gate_calls(&g), asked);
  for (flap_event event = 0; event < 16; event++)
    ck_assert(flap_device_event_done(device, event));
  flap_device_close(device);
  ck_assert_uint_eq(gate_calls(&g), asked);
  gate_destroy(&g);
}
END_TEST

START_TEST(close_with_work_in_flight_finishes_it) {
  gate g;
  gate_init(&g, true);
  flap_device *device = open_cpu(&g);
  unsigned char *arena = flap_device_arena(device, NULL);
  enum { COPIES = 700, BYTES = 1000 };
  unsigned char *there = malloc(COPIES * BYTES), *back = calloc(COPIES, BYTES);
  for (uint32_t i = 0; i < COPIES * BYTES; i++)
    there[i] = (unsigned char)(i % 251);
  for (uint32_t i = 0; i < COPIES; i++) {
    flap_device_copy(device, FLAP_STREAM_H2D, arena + i * BYTES, there + i * BYTES, BYTES);
    flap_device_event_record(device, i % 16, FLAP_STREAM_H2D, true);
    flap_device_stream_wait(device, FLAP_STREAM_D2H, i % 16);
    flap_device_copy(device, FLAP_STREAM_D2H, back + i * BYTES, arena + i * BYTES, BYTES);
  }
  flap_device_close(device);
  ck_assert_mem_eq(there, back, COPIES * BYTES);
  ck_assert_uint_eq(gate_calls(&g), COPIES);
  free(there);
  free(back);
  gate_destroy(&g);
}
END_TEST

typedef struct observed {
  uint32_t copies[FLAP_STREAM_COUNT];
  uint64_t bytes[FLAP_STREAM_COUNT], busy_ns[FLAP_STREAM_COUNT], ended_ns[FLAP_STREAM_COUNT];
} observed;

static void observe(void *context, flap_stream stream, uint64_t started_ns, uint64_t ended_ns, uint64_t bytes) {
  observed *o = context;
  ck_assert_uint_le(o->ended_ns[stream], started_ns);
  ck_assert_uint_le(started_ns, ended_ns);
  o->copies[stream]++;
  o->bytes[stream] += bytes;
  o->busy_ns[stream] += ended_ns - started_ns;
  o->ended_ns[stream] = ended_ns;
}

START_TEST(trace_sees_every_copy_in_real_time) {
  flap_device *device = open_cpu(NULL);
  char *arena = flap_device_arena(device, NULL);
  char *host = calloc(2, VRAM / 2);
  observed o = {0};
  uint64_t begun_ns = flap_units_now_ns();
  o.ended_ns[FLAP_STREAM_H2D] = o.ended_ns[FLAP_STREAM_D2H] = begun_ns;
  flap_device_set_trace(device, observe, &o);
  for (uint32_t i = 0; i < 100; i++) {
    flap_device_copy(device, FLAP_STREAM_H2D, arena, host, VRAM / 2);
    flap_device_copy(device, FLAP_STREAM_D2H, host + VRAM / 2, arena + VRAM / 2, VRAM / 4);
  }
  ck_assert_int_eq(flap_device_synchronize(device), FLAP_OK);
  flap_device_set_trace(device, NULL, NULL);
  uint64_t busy_ns = flap_device_busy_ns(device, FLAP_STREAM_H2D);
  flap_device_copy(device, FLAP_STREAM_H2D, arena, host, VRAM / 2);
  ck_assert_int_eq(flap_device_synchronize(device), FLAP_OK);
  ck_assert_uint_eq(o.copies[FLAP_STREAM_H2D], 100);
  ck_assert_uint_eq(o.copies[FLAP_STREAM_D2H], 100);
  ck_assert_uint_eq(o.bytes[FLAP_STREAM_H2D], 100 * VRAM / 2);
  ck_assert_uint_eq(o.bytes[FLAP_STREAM_D2H], 100 * VRAM / 4);
  ck_assert_uint_eq(o.busy_ns[FLAP_STREAM_H2D], busy_ns);
  ck_assert_uint_eq(o.busy_ns[FLAP_STREAM_D2H], flap_device_busy_ns(device, FLAP_STREAM_D2H));
  ck_assert_uint_gt(busy_ns, 0);
  ck_assert_uint_gt(flap_device_busy_ns(device, FLAP_STREAM_H2D), busy_ns);
  ck_assert_uint_le(busy_ns, flap_units_now_ns() - begun_ns);
  flap_device_close(device);
  free(host);
}
END_TEST

int main(void) {
  Suite *suite = suite_create("device");
  TCase *tests = tcase_create("cpu");
  tcase_set_timeout(tests, 60);
  tcase_add_test(tests, open_with_unusable_config_is_refused_with_a_reason);
  tcase_add_test(tests, open_gives_an_aligned_zeroed_arena_of_the_budget);
  tcase_add_test(tests, upload_and_download_move_bytes_at_once);
  tcase_add_test(tests, event_never_recorded_is_complete);
  tcase_add_test(tests, event_on_compute_notifies_on_the_recording_thread);
  tcase_add_test(tests, event_behind_held_stream_is_not_done_until_it_moves);
  tcase_add_test(tests, stream_wait_holds_the_other_copy_stream);
  tcase_add_test(tests, event_recorded_again_moves_but_earlier_waits_stay);
  tcase_add_test(tests, stream_wait_on_compute_blocks_the_caller);
  tcase_add_test(tests, ring_full_blocks_the_launcher_and_recovers);
  tcase_add_test(tests, notify_comes_once_per_recording_that_asked);
  tcase_add_test(tests, close_with_work_in_flight_finishes_it);
  tcase_add_test(tests, trace_sees_every_copy_in_real_time);
  SRunner *runner = srunner_create(suite);
  if (srunner_fork_status(runner) == CK_FORK)
    tcase_add_test_raise_signal(tests, arena_write_past_its_last_page_faults, SIGSEGV);
  suite_add_tcase(suite, tests);
  srunner_run_all(runner, CK_NORMAL);
  int failed = srunner_ntests_failed(runner);
  srunner_free(runner);
  return failed ? 1 : 0;
}
