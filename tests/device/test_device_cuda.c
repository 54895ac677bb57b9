/* The cuda device: the arena and its budget, copies in order, events, notifies, pinned memory, sticky errors; and
 * random programs against the same program run in sequence. Where there is no GPU: that open says so, then it is
 * skipped. */
#include "kernels/device/device.h"
#include "kernels/device/device_cuda.h"

#include "base/philox.h"
#include "base/units.h"

#include <check.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#define VRAM ((uint64_t)2 << 30)
#define MIB ((uint64_t)1 << 20)

static _Atomic uint32_t notifies;
static void count_notify(void *context) {
  (void)context;
  atomic_fetch_add(&notifies, 1);
}

static flap_device *open_device(uint64_t vram, uint32_t events) {
  flap_device_config config = {
      .kind = FLAP_DEVICE_CUDA, .vram_bytes = vram, .events_max = events, .notify = count_notify};
  flap_device *device = NULL;
  if (flap_device_open(&config, &device) != FLAP_OK)
    ck_abort_msg("%s", flap_error_message());
  atomic_store(&notifies, 0);
  return device;
}

static void synchronize(flap_device *device) {
  if (flap_device_synchronize(device) != FLAP_OK)
    ck_abort_msg("%s", flap_error_message());
}

static unsigned char *pinned(flap_device *device, uint64_t bytes) {
  unsigned char *memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  ck_assert(memory != MAP_FAILED);
  if (flap_device_pin_host(device, memory, bytes) != FLAP_OK)
    ck_abort_msg("%s", flap_error_message());
  return memory;
}

static void pattern(unsigned char *memory, uint64_t bytes, uint32_t seed) {
  for (uint64_t i = 0; i < bytes; i++)
    memory[i] = (unsigned char)(i * 31 + i / 253 + i / 65521 + seed);
}

START_TEST(open_takes_the_budget_and_no_more) {
  flap_device *device = open_device(VRAM, 1);
  uint64_t bytes = 0;
  unsigned char *arena = flap_device_arena(device, &bytes);
  uint64_t peak = flap_device_memory_peak(device);
  printf("budget %llu MiB, arena %llu MiB, charged %llu MiB\n", (unsigned long long)(VRAM / MIB),
         (unsigned long long)(bytes / MIB), (unsigned long long)(peak / MIB));
  ck_assert_uint_eq((uintptr_t)arena % 4096, 0);
  ck_assert_uint_lt(bytes, VRAM);
  ck_assert_uint_gt(bytes, VRAM / 4); /* a context takes some hundred megabytes */
  ck_assert_uint_ge(peak, bytes);
  ck_assert_uint_le(peak, VRAM);
  unsigned char *zeros = calloc(1, bytes), *got = malloc(bytes);
  ck_assert_int_eq(flap_device_download(device, got, arena, bytes), FLAP_OK);
  ck_assert_int_eq(memcmp(zeros, got, bytes), 0);
  free(zeros);
  free(got);
  ck_assert_int_eq(flap_device_get_kind(device), FLAP_DEVICE_CUDA);
  ck_assert(flap_device_has_bytes(device));
  ck_assert_uint_ge(flap_device_cuda_properties(device)->capability, 80);
  flap_device_close(device);
}
END_TEST

START_TEST(later_opens_get_what_the_first_one_got) {
  uint64_t first = 0, later = 0;
  for (int i = 0; i < 3; i++) {
    flap_device *device = open_device(VRAM, 1);
    (void)flap_device_arena(device, &later);
    first = i == 0 ? later : first;
    flap_device_close(device);
    ck_assert_uint_eq(later, first);
  }
}
END_TEST

START_TEST(a_card_is_found_without_being_opened) {
  char name[128];
  uint64_t most = 0;
  ck_assert_int_eq(flap_device_find(FLAP_DEVICE_CUDA, name, sizeof name), FLAP_OK);
  ck_assert_ptr_nonnull(strstr(name, ", driver 1"));
  ck_assert_int_eq(flap_device_budget_max(FLAP_DEVICE_CUDA, &most), FLAP_OK);
  flap_device *device = open_device(VRAM, 1);
  ck_assert_int_eq(strncmp(name, flap_device_describe(device), strlen(flap_device_describe(device))), 0);
  flap_device_close(device);
  device = open_device(most / 16 * 15, 1); /* the context is part of it */
  flap_device_close(device);
  ck_assert_int_eq(flap_device_find(FLAP_DEVICE_CPU, name, sizeof name), FLAP_UNSUPPORTED);
  ck_assert_int_eq(flap_device_budget_max(FLAP_DEVICE_CPU, &most), FLAP_UNSUPPORTED);
}
END_TEST

START_TEST(open_with_an_impossible_budget_says_what_to_do) {
  flap_device_config config = {.kind = FLAP_DEVICE_CUDA, .vram_bytes = 64 * MIB, .events_max = 1};
  flap_device *device = NULL;
  ck_assert_int_eq(flap_device_open(&config, &device), FLAP_NO_MEMORY);
  ck_assert_ptr_nonnull(strstr(flap_error_message(), "raise vram"));
  config.vram_bytes = (uint64_t)1 << 45;
  ck_assert_int_eq(flap_device_open(&config, &device), FLAP_NO_MEMORY);
  ck_assert_ptr_nonnull(strstr(flap_error_message(), "lower vram"));
  ck_assert_ptr_null(device);
  flap_device_close(open_device(VRAM, 1)); /* a failed open leaves nothing behind */
}
END_TEST

START_TEST(upload_and_download_are_in_order_with_compute) {
  flap_device *device = open_device(VRAM, 1);
  unsigned char *arena = flap_device_arena(device, NULL);
  const uint64_t bytes = 9 * MIB + 13; /* more than all upload buffers hold */
  unsigned char *from = malloc(bytes), *got = malloc(bytes);
  for (uint32_t round = 0; round < 3; round++) {
    pattern(from, bytes, round);
    ck_assert_int_eq(flap_device_upload(device, arena + 5, from, bytes), FLAP_OK);
    memset(from, 0, bytes); /* taken when the call returns */
    flap_device_copy(device, FLAP_STREAM_COMPUTE, arena + 32 * MIB, arena + 5, bytes);
    ck_assert_int_eq(flap_device_download(device, got, arena + 32 * MIB, bytes), FLAP_OK);
    pattern(from, bytes, round);
    ck_assert_int_eq(memcmp(from, got, bytes), 0);
  }
  free(from);
  free(got);
  flap_device_close(device);
}
END_TEST

START_TEST(copies_cross_the_seams_of_pinned_memory) {
  flap_device *device = open_device(VRAM, 2);
  unsigned char *arena = flap_device_arena(device, NULL);
  const uint64_t bytes = 1100 * MIB, piece = 64 * MIB, seam = 512 * MIB;
  unsigned char *host = pinned(device, bytes);
  for (uint64_t k = 1; k <= 2; k++) { /* over the seam, where an address rounded to 2 MiB begins a new piece */
    uint64_t at = k * seam - (uintptr_t)host % (2 * MIB) - piece / 2;
    pattern(host + at, piece, (uint32_t)k);
    flap_device_copy(device, FLAP_STREAM_H2D, arena, host + at, piece);
    flap_device_event_record(device, 0, FLAP_STREAM_H2D, false);
    flap_device_stream_wait(device, FLAP_STREAM_D2H, 0);
    flap_device_copy(device, FLAP_STREAM_D2H, host, arena, piece);
    synchronize(device);
    ck_assert_int_eq(memcmp(host, host + at, piece), 0);
  }
  flap_device_close(device);
  munmap(host, bytes);
}
END_TEST

START_TEST(notify_comes_once_for_each_recording_after_its_event) {
  flap_device *device = open_device(VRAM, 8);
  unsigned char *arena = flap_device_arena(device, NULL), *host = pinned(device, 64 * MIB);
  ck_assert(flap_device_event_done(device, 7)); /* never recorded */
  flap_device_event_wait(device, 7);
  uint32_t asked = 0;
  for (uint32_t i = 0; i < 300; i++) {
    flap_stream stream = (flap_stream)(i % FLAP_STREAM_COUNT);
    bool up = stream == FLAP_STREAM_H2D;
    flap_device_copy(device, stream, stream == FLAP_STREAM_D2H ? host : arena + 8 * MIB, up ? host : arena, 4 * MIB);
    flap_device_event_record(device, i % 7, stream, i % 2 == 0);
    asked += i % 2 == 0;
  }
  synchronize(device);
  ck_assert_uint_eq(atomic_load(&notifies), asked);
  for (flap_event e = 0; e < 7; e++)
    ck_assert(flap_device_event_done(device, e));
  flap_device_close(device);
  munmap(host, 64 * MIB);
}
END_TEST

START_TEST(ring_end_blocks_and_loses_nothing) {
  flap_device *device = open_device(VRAM, 2);
  unsigned char *arena = flap_device_arena(device, NULL), *host = pinned(device, MIB);
  uint32_t asked = 0;
  for (uint32_t i = 0; i < 9000; i++) {
    flap_device_copy(device, FLAP_STREAM_H2D, arena + i % 7, host, 1 + i % 100);
    if (i % 3 == 0) {
      flap_device_event_record(device, 0, FLAP_STREAM_H2D, true);
      asked++;
    }
  }
  synchronize(device);
  ck_assert_uint_eq(atomic_load(&notifies), asked);
  flap_device_close(device);
  munmap(host, MIB);
}
END_TEST

/* ---- trace and busy time ---- */

typedef struct heard {
  uint64_t copies, bytes, first_ns, last_ns;
  bool disordered;
} heard;

static void hear(void *context, flap_stream stream, uint64_t started_ns, uint64_t ended_ns, uint64_t bytes) {
  heard *h = context;
  h->copies++;
  h->bytes += bytes;
  h->disordered |= started_ns < h->last_ns || stream != FLAP_STREAM_H2D;
  h->first_ns = h->copies == 1 ? started_ns : h->first_ns;
  h->last_ns = ended_ns;
}

/* With and without marks of the caller's; 50 microseconds each, so the launching thread is far ahead at once. */
START_TEST(whoever_limits_himself_is_never_far_ahead) {
  enum { LAUNCHES = 2000 };
  flap_device *device = open_device(VRAM, LAUNCHES);
  unsigned char *arena = flap_device_arena(device, NULL);
  uint32_t open_most = 0;
  for (uint32_t i = 0, over = 0; i < LAUNCHES; i++) {
    flap_device_limit_ahead(device);
    flap_device_copy(device, FLAP_STREAM_COMPUTE, arena + 64 * MIB, arena, 64 * MIB);
    flap_device_event_record(device, i, FLAP_STREAM_COMPUTE, i % 500 > 250);
    while (over <= i && flap_device_event_done(device, over))
      over++;
    open_most = i + 1 - over > open_most ? i + 1 - over : open_most;
  }
  synchronize(device);
  printf("at most %u of %u launches ahead\n", open_most, LAUNCHES);
  ck_assert_uint_gt(open_most, 8); /* and not one by one either */
  ck_assert_uint_le(open_most, FLAP_DEVICE_AHEAD_MAX);
  flap_device_close(device);
}
END_TEST

/* The slices of an optimizer, say, launched while a layer is computed before them: with a notify behind each, more than
 * CUDA lets wait by which threads can sleep. */
START_TEST(slices_are_launched_while_what_is_before_them_runs) {
  enum { LONG = 64, SLICES = 100 };
  flap_device *device = open_device(VRAM, LONG + SLICES);
  unsigned char *arena = flap_device_arena(device, NULL);
  uint32_t ahead = 0; /* rounds in which it was; this thread may be held up in others */
  for (uint32_t round = 0; round < 5; round++) {
    const uint32_t before = atomic_load(&notifies);
    synchronize(device);
    for (uint32_t i = 0; i < LONG; i++) { /* 0.2 ms each */
      flap_device_limit_ahead(device);
      flap_device_copy(device, FLAP_STREAM_COMPUTE, arena + 256 * MIB, arena, 256 * MIB);
    }
    flap_device_event_record(device, 0, FLAP_STREAM_COMPUTE, false);
    for (uint32_t i = 0; i < SLICES; i++) {
      flap_device_limit_ahead(device);
      flap_device_copy(device, FLAP_STREAM_COMPUTE, arena + i * MIB, arena + 256 * MIB, MIB);
      flap_device_event_record(device, 1 + i, FLAP_STREAM_COMPUTE, true);
    }
    ahead += !flap_device_event_done(device, 0);
    synchronize(device);
    ck_assert_uint_eq(atomic_load(&notifies) - before, SLICES);
  }
  printf("ahead in %u of 5 rounds\n", ahead);
  ck_assert_uint_ge(ahead, 2);
  flap_device_close(device);
}
END_TEST

START_TEST(trace_hears_of_every_copy_at_plausible_times) {
  flap_device *device = open_device(VRAM, 2);
  unsigned char *arena = flap_device_arena(device, NULL), *host = pinned(device, 256 * MIB);
  heard h = {0};
  flap_device_set_trace(device, hear, &h);
  uint64_t before = flap_units_now_ns();
  for (uint32_t i = 0; i < 64; i++)
    flap_device_copy(device, FLAP_STREAM_H2D, arena + i * 4 * MIB, host + i * 4 * MIB, 4 * MIB);
  synchronize(device);
  uint64_t after = flap_units_now_ns(), busy = flap_device_busy_ns(device, FLAP_STREAM_H2D);
  printf("64 copies of 4 MiB: busy %.2f ms of %.2f ms, %.1f GB/s\n", (double)busy * 1e-6,
         (double)(after - before) * 1e-6, (double)h.bytes / (double)busy);
  ck_assert_uint_eq(h.copies, 64);
  ck_assert_uint_eq(h.bytes, 256 * MIB);
  ck_assert(!h.disordered);
  ck_assert_uint_ge(h.first_ns + 2000000, before); /* the two clocks meet within two milliseconds */
  ck_assert_uint_le(h.last_ns, after);
  ck_assert_uint_gt(busy, 256 * MIB / 200); /* 200 GB/s is more than any link */
  ck_assert_uint_le(busy, after - before + 1000000);
  flap_device_close(device);
  munmap(host, 256 * MIB);
}
END_TEST

/* Busy time of so many copies of 4 MiB one behind the other, ns. */
static uint64_t time_copies(flap_device *device, unsigned char *host, uint32_t count) {
  unsigned char *arena = flap_device_arena(device, NULL);
  const uint64_t before = flap_device_busy_ns(device, FLAP_STREAM_H2D);
  for (uint32_t i = 0; i < count; i++)
    flap_device_copy(device, FLAP_STREAM_H2D, arena + i * 4 * MIB, host + i * 4 * MIB, 4 * MIB);
  synchronize(device);
  return flap_device_busy_ns(device, FLAP_STREAM_H2D) - before;
}

START_TEST(copies_seen_from_outside_take_as_long_as_those_that_are_timed) {
  flap_device *device = open_device(VRAM, 2);
  unsigned char *arena = flap_device_arena(device, NULL), *host = pinned(device, 256 * MIB);
  (void)time_copies(device, host, 64);
  const uint64_t seen = time_copies(device, host, 64);
  flap_device_time_exactly(device, true);
  const uint64_t exact = time_copies(device, host, 64);
  printf("64 copies of 4 MiB: seen %.3f ms, timed %.3f ms\n", (double)seen * 1e-6, (double)exact * 1e-6);
  ck_assert_uint_gt(seen, exact / 10 * 7);
  ck_assert_uint_lt(seen, exact / 10 * 13);
  /* A copy behind a wait is timed in any case: what it waited for does not count. */
  flap_device_time_exactly(device, false);
  for (uint32_t i = 0; i < 8; i++)
    flap_device_copy(device, FLAP_STREAM_COMPUTE, arena + 768 * MIB, arena, 512 * MIB);
  flap_device_event_record(device, 0, FLAP_STREAM_COMPUTE, false);
  const uint64_t before = flap_device_busy_ns(device, FLAP_STREAM_H2D);
  flap_device_stream_wait(device, FLAP_STREAM_H2D, 0);
  flap_device_copy(device, FLAP_STREAM_H2D, arena, host, 4 * MIB);
  synchronize(device);
  ck_assert_uint_lt(flap_device_busy_ns(device, FLAP_STREAM_H2D) - before, exact / 16); /* of 4 copies */
  flap_device_close(device);
  munmap(host, 256 * MIB);
}
END_TEST

START_TEST(compute_busy_time_is_of_labelled_work_and_leaves_out_what_it_waits_for) {
  flap_device *device = open_device(VRAM, 4);
  unsigned char *arena = flap_device_arena(device, NULL), *host = pinned(device, 512 * MIB);
  flap_device_copy(device, FLAP_STREAM_COMPUTE, arena + 600 * MIB, arena, MIB);
  synchronize(device);
  ck_assert_uint_eq(flap_device_busy_ns(device, FLAP_STREAM_COMPUTE), 0);
  flap_device_label_compute(device, 1);
  for (uint32_t i = 0; i < 4; i++) {
    flap_device_copy(device, FLAP_STREAM_H2D, arena, host, 512 * MIB); /* milliseconds */
    flap_device_event_record(device, i, FLAP_STREAM_H2D, false);
    flap_device_stream_wait(device, FLAP_STREAM_COMPUTE, i);
    flap_device_copy(device, FLAP_STREAM_COMPUTE, arena + 600 * MIB, arena, MIB); /* microseconds */
    flap_device_event_record(device, i, FLAP_STREAM_COMPUTE, true);
  }
  synchronize(device);
  uint64_t copying = flap_device_busy_ns(device, FLAP_STREAM_H2D);
  uint64_t computing = flap_device_busy_ns(device, FLAP_STREAM_COMPUTE);
  printf("copying %.2f ms, computing %.3f ms\n", (double)copying * 1e-6, (double)computing * 1e-6);
  ck_assert_uint_gt(computing, 0);
  ck_assert_uint_lt(computing, copying / 10);
  ck_assert_uint_eq(atomic_load(&notifies), 4);
  flap_device_close(device);
  munmap(host, 512 * MIB);
}
END_TEST

static _Atomic uint64_t rest_ns;
static void hear_rests(void *context, flap_stream stream, uint64_t started_ns, uint64_t ended_ns, uint64_t label) {
  (void)context;
  if (stream == FLAP_STREAM_COMPUTE && label == 7)
    atomic_fetch_add(&rest_ns, ended_ns - started_ns);
}

START_TEST(rests_of_the_compute_stream_are_told) {
  flap_device *device = open_device(VRAM, 2);
  unsigned char *arena = flap_device_arena(device, NULL), *host = pinned(device, 512 * MIB);
  flap_device_set_trace(device, hear_rests, NULL);
  flap_device_label_rests(device, 7);
  ck_assert_uint_eq(flap_device_rested_ns(device), 0);
  flap_device_copy(device, FLAP_STREAM_H2D, arena, host, 512 * MIB); /* milliseconds */
  flap_device_event_record(device, 0, FLAP_STREAM_H2D, false);
  flap_device_stream_wait(device, FLAP_STREAM_COMPUTE, 0);
  flap_device_copy(device, FLAP_STREAM_COMPUTE, arena + 600 * MIB, arena, MIB);
  ck_assert_uint_eq(flap_device_idle_since_ns(device), UINT64_MAX);
  flap_device_expect_rest(device);
  synchronize(device);
  const uint64_t copying = flap_device_busy_ns(device, FLAP_STREAM_H2D), rested = flap_device_rested_ns(device);
  printf("copying %.3f ms, resting %.3f ms, told %.3f ms\n", (double)copying * 1e-6, (double)rested * 1e-6,
         (double)atomic_load(&rest_ns) * 1e-6);
  ck_assert_uint_gt(rested, copying / 10 * 9); /* from when the wait was launched, which is at once */
  ck_assert_uint_le(rested, copying + 1000000);
  ck_assert_uint_gt(atomic_load(&rest_ns), rested / 10 * 9);
  ck_assert_uint_le(atomic_load(&rest_ns), rested + 1000000);
  const uint64_t now = flap_units_now_ns(), idle = flap_device_idle_since_ns(device);
  ck_assert_uint_le(idle, now);
  ck_assert_uint_lt(now - idle, 100000000);
  /* What is over when it is waited for is no rest, nor is a wait behind work that takes longer. */
  flap_device_stream_wait(device, FLAP_STREAM_COMPUTE, 0);
  flap_device_copy(device, FLAP_STREAM_H2D, arena, host, MIB);
  flap_device_event_record(device, 1, FLAP_STREAM_H2D, false);
  for (uint32_t i = 0; i < 64; i++) /* 0.5 ms each at 4 TB/s */
    flap_device_copy(device, FLAP_STREAM_COMPUTE, arena + 600 * MIB, arena, 512 * MIB);
  flap_device_stream_wait(device, FLAP_STREAM_COMPUTE, 1);
  synchronize(device);
  ck_assert_uint_lt(flap_device_rested_ns(device) - rested, 100000);
  /* Without a label nobody hears of rests; and the end of what nobody asked for is not known. */
  const uint64_t told = atomic_load(&rest_ns), before = flap_device_rested_ns(device);
  flap_device_label_rests(device, 0);
  flap_device_copy(device, FLAP_STREAM_H2D, arena, host, 512 * MIB);
  flap_device_event_record(device, 0, FLAP_STREAM_H2D, false);
  flap_device_stream_wait(device, FLAP_STREAM_COMPUTE, 0);
  synchronize(device);
  ck_assert_uint_gt(flap_device_rested_ns(device) - before, copying / 2);
  ck_assert_uint_eq(atomic_load(&rest_ns), told);
  flap_device_copy(device, FLAP_STREAM_COMPUTE, arena + 600 * MIB, arena, MIB);
  synchronize(device);
  ck_assert_uint_eq(flap_device_idle_since_ns(device), UINT64_MAX);
  flap_device_close(device);
  munmap(host, 512 * MIB);
}
END_TEST

START_TEST(error_sticks_and_nobody_waits_for_ever) {
  flap_device *device = open_device(VRAM, 2);
  unsigned char *arena = flap_device_arena(device, NULL);
  ck_assert(!flap_device_cuda_failed(device));
  flap_device_cuda_fail(device, "a test", 700, "the first reason");
  flap_device_cuda_fail(device, "a test", 701, "the second reason");
  ck_assert(flap_device_cuda_failed(device));
  flap_device_event_record(device, 0, FLAP_STREAM_COMPUTE, true);
  flap_device_event_wait(device, 0);
  ck_assert(flap_device_event_done(device, 0));
  for (uint32_t i = 0; i < 2; i++) {
    ck_assert_int_eq(flap_device_synchronize(device), FLAP_DEVICE);
    ck_assert_ptr_nonnull(strstr(flap_error_message(), "a test: the first reason"));
  }
  char byte = 0;
  ck_assert_int_eq(flap_device_upload(device, arena, &byte, 1), FLAP_DEVICE);
  ck_assert_int_eq(flap_device_download(device, &byte, arena, 1), FLAP_DEVICE);
  ck_assert_uint_eq(atomic_load(&notifies), 1);
  flap_device_close(device);
}
END_TEST

/* ---- random programs ---- */

#define BLOCKS 10u /* of the arena, then as many of host memory */
#define EVENTS 5u
#define HOST_THREAD FLAP_STREAM_COUNT
#define USERS (FLAP_STREAM_COUNT + 1)

typedef struct program {
  flap_philox random;
  uint64_t drawn, block_bytes;
  flap_device *device;
  unsigned char *block[2 * BLOCKS], *model[2 * BLOCKS]; /* the real bytes, and those of running in sequence */
  uint64_t read_by[2 * BLOCKS][USERS], written_by[2 * BLOCKS][USERS]; /* numbers of operations */
  uint64_t launched[USERS];
  uint64_t seen[USERS][USERS]; /* seen[a][b]: a is ordered after b's operations up to this one */
  uint32_t asked;
} program;

static uint32_t draw(program *p, uint32_t bound) {
  return (uint32_t)flap_philox_below(&p->random, p->drawn++, bound);
}

/* `user` may start only after `other` has ended its operation `number`. */
static void order(program *p, uint32_t user, uint32_t other, uint64_t number) {
  if (user == other || p->seen[user][other] >= number || other == HOST_THREAD)
    return; /* what this thread did, it did before it launched anything later */
  flap_event event = draw(p, EVENTS);
  bool notify = draw(p, 4) == 0;
  p->asked += notify;
  flap_device_event_record(p->device, event, (flap_stream)other, notify);
  if (user == HOST_THREAD)
    flap_device_event_wait(p->device, event);
  else
    flap_device_stream_wait(p->device, (flap_stream)user, event);
  p->seen[user][other] = p->launched[other];
  if (draw(p, 3) == 0) /* moving the event must not weaken the wait */
    flap_device_event_record(p->device, event, (flap_stream)draw(p, FLAP_STREAM_COUNT), false);
}

static void use(program *p, uint32_t user, uint32_t block, bool write) {
  for (uint32_t other = 0; other < USERS; other++) {
    order(p, user, other, p->written_by[block][other]);
    if (write)
      order(p, user, other, p->read_by[block][other]);
  }
  uint64_t *by = write ? p->written_by[block] : p->read_by[block];
  by[user] = p->launched[user] + 1;
}

static void launch(program *p, uint32_t user, uint32_t to, uint32_t from, uint64_t bytes) {
  use(p, user, from, false);
  use(p, user, to, true);
  p->launched[user]++;
  if (user == HOST_THREAD)
    memcpy(p->block[to], p->block[from], bytes);
  else
    flap_device_copy(p->device, (flap_stream)user, p->block[to], p->block[from], bytes);
  memcpy(p->model[to], p->model[from], bytes);
}

static void step(program *p) {
  uint32_t arena = draw(p, BLOCKS), other = (arena + 1 + draw(p, BLOCKS - 1)) % BLOCKS;
  uint32_t host = BLOCKS + draw(p, BLOCKS), next = BLOCKS + (host - BLOCKS + 1) % BLOCKS;
  uint64_t bytes = 1 + draw(p, (uint32_t)p->block_bytes);
  switch (draw(p, 5)) {
  case 0:
    launch(p, FLAP_STREAM_H2D, arena, host, bytes);
    break;
  case 1:
    launch(p, FLAP_STREAM_D2H, host, arena, bytes);
    break;
  case 2:
    launch(p, FLAP_STREAM_COMPUTE, arena, other, bytes);
    break;
  case 3:
    use(p, HOST_THREAD, host, true); /* new bytes, so that something always changes */
    p->launched[HOST_THREAD]++;
    for (uint64_t i = 0; i < bytes; i++)
      p->block[host][i] = p->model[host][i] = (unsigned char)(p->model[host][i] * 5u + i + p->drawn);
    launch(p, HOST_THREAD, next, host, bytes);
    break;
  default:
    use(p, HOST_THREAD, host, false);
    use(p, FLAP_STREAM_COMPUTE, arena, true);
    p->launched[FLAP_STREAM_COMPUTE]++;
    ck_assert_int_eq(flap_device_upload(p->device, p->block[arena], p->block[host], bytes), FLAP_OK);
    memcpy(p->model[arena], p->model[host], bytes);
    break;
  }
}

static void run_program(flap_device *device, unsigned char *host, uint64_t seed) {
  program *p = calloc(1, sizeof *p);
  p->random = flap_philox_stream(seed, "cuda program");
  p->block_bytes = (uint64_t)64 << draw(p, 15);
  p->device = device;
  unsigned char *model = calloc(2 * BLOCKS, p->block_bytes), *arena = flap_device_arena(device, NULL);
  pattern(host, BLOCKS * p->block_bytes, (uint32_t)seed);
  memcpy(model + BLOCKS * p->block_bytes, host, BLOCKS * p->block_bytes);
  ck_assert_int_eq(flap_device_upload(device, arena, model, BLOCKS * p->block_bytes), FLAP_OK);
  synchronize(device);
  for (uint32_t i = 0; i < 2 * BLOCKS; i++) {
    p->block[i] = i < BLOCKS ? arena + i * p->block_bytes : host + (i - BLOCKS) * p->block_bytes;
    p->model[i] = model + i * p->block_bytes;
  }
  atomic_store(&notifies, 0);
  for (uint32_t i = 0; i < 400; i++)
    step(p);
  synchronize(device);
  unsigned char *got = malloc(BLOCKS * p->block_bytes);
  ck_assert_int_eq(flap_device_download(device, got, arena, BLOCKS * p->block_bytes), FLAP_OK);
  ck_assert_msg(memcmp(got, model, BLOCKS * p->block_bytes) == 0, "seed %llu: the arena differs",
                (unsigned long long)seed);
  ck_assert_msg(memcmp(host, model + BLOCKS * p->block_bytes, BLOCKS * p->block_bytes) == 0,
                "seed %llu: host memory differs", (unsigned long long)seed);
  ck_assert_uint_eq(atomic_load(&notifies), p->asked);
  free(got);
  free(model);
  free(p);
}

START_TEST(random_programs_equal_the_sequential_model) {
  const char *given = getenv("FLAP_TEST_SEED");
  uint64_t seed = given ? strtoull(given, NULL, 10) : flap_units_now_ns() % 1000000;
  printf("FLAP_TEST_SEED=%llu\n", (unsigned long long)seed);
  flap_device *device = open_device(VRAM, EVENTS);
  unsigned char *host = pinned(device, 16 * MIB);
  for (uint64_t i = 0; i < 40; i++)
    run_program(device, host, seed + i);
  flap_device_close(device);
  munmap(host, 16 * MIB);
}
END_TEST

/* Every machine without a GPU can check this: a clear status, nothing left behind. */
static bool is_there(void) {
  flap_device_config config = {.kind = FLAP_DEVICE_CUDA, .vram_bytes = VRAM, .events_max = 1};
  flap_device *device = NULL;
  flap_status status = flap_device_open(&config, &device);
  flap_device_close(device);
  if (status == FLAP_OK)
    return true;
  printf("%s: %s\n", flap_status_name(status), flap_error_message());
  if (status != FLAP_NOT_FOUND || device || strncmp(flap_error_message(), "cuda: ", 6) != 0)
    exit(1);
  return false;
}

int main(void) {
  setvbuf(stdout, NULL, _IOLBF, 0);
  if (!is_there())
    return 77;
  Suite *suite = suite_create("device");
  TCase *tests = tcase_create("cuda");
  tcase_add_test(tests, open_takes_the_budget_and_no_more);
  tcase_add_test(tests, later_opens_get_what_the_first_one_got);
  tcase_add_test(tests, a_card_is_found_without_being_opened);
  tcase_add_test(tests, open_with_an_impossible_budget_says_what_to_do);
  tcase_add_test(tests, upload_and_download_are_in_order_with_compute);
  tcase_add_test(tests, copies_cross_the_seams_of_pinned_memory);
  tcase_add_test(tests, notify_comes_once_for_each_recording_after_its_event);
  tcase_add_test(tests, ring_end_blocks_and_loses_nothing);
  tcase_add_test(tests, whoever_limits_himself_is_never_far_ahead);
  tcase_add_test(tests, slices_are_launched_while_what_is_before_them_runs);
  tcase_add_test(tests, trace_hears_of_every_copy_at_plausible_times);
  tcase_add_test(tests, compute_busy_time_is_of_labelled_work_and_leaves_out_what_it_waits_for);
  tcase_add_test(tests, copies_seen_from_outside_take_as_long_as_those_that_are_timed);
  tcase_add_test(tests, rests_of_the_compute_stream_are_told);
  tcase_add_test(tests, error_sticks_and_nobody_waits_for_ever);
  tcase_add_test(tests, random_programs_equal_the_sequential_model);
  suite_add_tcase(suite, tests);
  SRunner *runner = srunner_create(suite);
  srunner_set_fork_status(runner, CK_NOFORK); /* a context does not survive a fork */
  srunner_run_all(runner, CK_NORMAL);
  int failed = srunner_ntests_failed(runner);
  srunner_free(runner);
  return failed ? 1 : 0;
}
