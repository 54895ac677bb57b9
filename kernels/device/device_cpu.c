/* The CPU device: VRAM is a host arena of exactly the budget, and each copy stream is a lane with a thread.
 *
 * 1. A lane numbers its commands 1, 2, 3, ... and runs them in that order. `completed` only grows; it says that the
 *    commands up to it have ended, and that their bytes are visible to whoever reads it.
 * 2. An event is one word: the stream, and the number of the last command that was launched there when it was
 *    recorded. It is complete when that stream's `completed` has come so far. Whoever waits takes a copy of the
 *    word, so recording the event again moves the event and no wait that was asked for earlier.
 * 3. A wait names only commands that were launched before it, so waits form no circle.
 * 4. The compute stream has no commands: its work has happened when a launch returns. Its events are complete at once.
 * 5. A lane's lock is never held during a copy, a wait for another lane, a notify or a trace.
 */
#include "kernels/device/device_internal.h"

#include "base/assert.h"
#include "base/thread.h"
#include "base/units.h"

#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define RING_COMMANDS 2048u /* the contract asks for 1024 copies and records; waits take places too */
#define STREAM_SHIFT 62     /* an event word: stream above, command number below */
#define NUMBER_MASK (((uint64_t)1 << STREAM_SHIFT) - 1)
#define ARENA_ALIGN (2u << 20) /* so that the system may back the arena with huge pages */

typedef enum command_kind { COMMAND_COPY, COMMAND_NOTIFY, COMMAND_WAIT } command_kind;

typedef struct command {
  command_kind kind;
  void *to;
  const void *from;
  uint64_t bytes;
  uint64_t word; /* COMMAND_WAIT: the event's word when the wait was asked for */
} command;

typedef struct cpu_device cpu_device;

typedef struct lane {
  cpu_device *device;
  flap_stream stream;
  pthread_t thread;
  bool thread_started, lock_made, work_made, moved_made;
  pthread_mutex_t lock;
  pthread_cond_t work;  /* a command was launched, or stop */
  pthread_cond_t moved; /* `completed` grew; for whoever counts himself into `waiters` */
  uint32_t waiters;     /* under lock */
  bool stop;            /* under lock */
  uint64_t launched;    /* under lock */
  _Atomic uint64_t completed;
  command ring[RING_COMMANDS]; /* command n is at n % RING_COMMANDS */
} lane;

struct cpu_device {
  flap_device base;
  void *mapping; /* the arena between inaccessible pages */
  size_t mapping_bytes;
  _Atomic uint64_t *events;
  lane lanes[2];
};

static cpu_device *self(flap_device *device) {
  return (cpu_device *)device;
}

static lane *lane_of(cpu_device *device, flap_stream stream) {
  flap_assert(stream == FLAP_STREAM_H2D || stream == FLAP_STREAM_D2H);
  return &device->lanes[stream - FLAP_STREAM_H2D];
}

/* ---- lanes ---------------------------------------------------------------------------------------------- */

static uint64_t lane_completed(lane *l) {
  return atomic_load_explicit(&l->completed, memory_order_acquire);
}

/* Under l->lock. */
static void wait_until(lane *l, uint64_t number) {
  l->waiters++;
  while (lane_completed(l) < number)
    pthread_cond_wait(&l->moved, &l->lock);
  l->waiters--;
}

static bool word_done(cpu_device *device, uint64_t word) {
  uint64_t number = word & NUMBER_MASK;
  return number == 0 || lane_completed(lane_of(device, (flap_stream)(word >> STREAM_SHIFT))) >= number;
}

static void word_wait(cpu_device *device, uint64_t word) {
  if (word_done(device, word))
    return;
  lane *l = lane_of(device, (flap_stream)(word >> STREAM_SHIFT));
  pthread_mutex_lock(&l->lock);
  wait_until(l, word & NUMBER_MASK);
  pthread_mutex_unlock(&l->lock);
}

static void lane_launch(lane *l, const command *c) {
  pthread_mutex_lock(&l->lock);
  if (l->launched - lane_completed(l) >= RING_COMMANDS)
    wait_until(l, l->launched + 1 - RING_COMMANDS);
  l->launched++;
  l->ring[l->launched % RING_COMMANDS] = *c;
  pthread_cond_signal(&l->work);
  pthread_mutex_unlock(&l->lock);
}

static void run_command(lane *l, const command *c) {
  flap_device *base = &l->device->base;
  switch (c->kind) {
  case COMMAND_COPY: {
    uint64_t started_ns = flap_units_now_ns();
    memcpy(c->to, c->from, c->bytes);
    flap_device_copied(base, l->stream, started_ns, flap_units_now_ns(), c->bytes);
    break;
  }
  case COMMAND_NOTIFY:
    base->config.notify(base->config.notify_context);
    break;
  case COMMAND_WAIT:
    word_wait(l->device, c->word);
    break;
  }
}

static void *lane_main(void *context) {
  flap_thread_prefer_latency();
  lane *l = context;
  pthread_mutex_lock(&l->lock);
  for (uint64_t number = 1;; number++) {
    while (l->launched < number && !l->stop)
      pthread_cond_wait(&l->work, &l->lock);
    if (l->launched < number)
      break; /* told to stop, and nothing is left */
    command c = l->ring[number % RING_COMMANDS];
    pthread_mutex_unlock(&l->lock);
    run_command(l, &c);
    pthread_mutex_lock(&l->lock);
    atomic_store_explicit(&l->completed, number, memory_order_release);
    if (l->waiters > 0)
      pthread_cond_broadcast(&l->moved);
  }
  pthread_mutex_unlock(&l->lock);
  return NULL;
}

/* Copy threads take no signals: Ctrl-C is for the thread that called us. */
static int start_thread(lane *l) {
  sigset_t all, before;
  sigfillset(&all);
  int error = pthread_sigmask(SIG_SETMASK, &all, &before);
  if (error)
    return error;
  error = pthread_create(&l->thread, NULL, lane_main, l);
  pthread_sigmask(SIG_SETMASK, &before, NULL);
  if (error)
    return error;
  l->thread_started = true;
  pthread_setname_np(l->thread, l->stream == FLAP_STREAM_H2D ? "flap-h2d" : "flap-d2h");
  return 0;
}

static flap_status lane_open(cpu_device *device, lane *l, flap_stream stream) {
  l->device = device;
  l->stream = stream;
  int error = pthread_mutex_init(&l->lock, NULL);
  l->lock_made = !error;
  if (!error) {
    error = pthread_cond_init(&l->work, NULL);
    l->work_made = !error;
  }
  if (!error) {
    error = pthread_cond_init(&l->moved, NULL);
    l->moved_made = !error;
  }
  if (!error)
    error = start_thread(l);
  if (!error)
    return FLAP_OK;
  (void)flap_error_set_os(error, "device cpu: cannot start a copy thread");
  return FLAP_NO_MEMORY;
}

/* The thread runs what was launched before it looks at stop. */
static void lane_close(lane *l) {
  if (l->thread_started) {
    pthread_mutex_lock(&l->lock);
    l->stop = true;
    pthread_cond_signal(&l->work);
    pthread_mutex_unlock(&l->lock);
    pthread_join(l->thread, NULL);
    flap_assert(lane_completed(l) == l->launched);
  }
  if (l->moved_made)
    pthread_cond_destroy(&l->moved);
  if (l->work_made)
    pthread_cond_destroy(&l->work);
  if (l->lock_made)
    pthread_mutex_destroy(&l->lock);
}

/* ---- open and close ------------------------------------------------------------------------------------- */

/* The number after `key` in a small file of the system, or UINT64_MAX where there is none ("max", no file). */
static uint64_t read_number(const char *path, const char *key) {
  FILE *file = fopen(path, "re");
  if (!file)
    return UINT64_MAX;
  char line[128];
  unsigned long long number = 0;
  bool found = false;
  while (!found && fgets(line, sizeof line, file))
    found = strncmp(line, key, strlen(key)) == 0 && sscanf(line + strlen(key), "%llu", &number) == 1;
  fclose(file);
  return found ? number : UINT64_MAX;
}

/* What the system could give now without swapping; UINT64_MAX if it does not say. Linux promises more than it has, and
 * ends a process that believes it, so the arena asks before it takes. */
static uint64_t memory_available(void) {
  uint64_t available_kib = read_number("/proc/meminfo", "MemAvailable:");
  uint64_t available = available_kib > UINT64_MAX / 1024 ? UINT64_MAX : available_kib * 1024;
  uint64_t limit = read_number("/sys/fs/cgroup/memory.max", ""),
           used = read_number("/sys/fs/cgroup/memory.current", "");
  if (limit != UINT64_MAX && used != UINT64_MAX) {
    uint64_t left = limit > used ? limit - used : 0;
    available = left < available ? left : available;
  }
  return available;
}

/* Reserves addresses, aligns within them and opens exactly the pages of the budget; what lies around stays
 * inaccessible, so running out of the arena faults instead of corrupting. The pages are taken now, not at first touch:
 * a run that starts does not run out. */
static flap_status map_arena(cpu_device *device) {
  flap_device *base = &device->base;
  uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE);
  uint64_t budget = base->config.vram_bytes;
  uint64_t available = memory_available();
  if (budget > available || budget > (uint64_t)1 << 46) {
    char wanted[FLAP_UNITS_TEXT_MAX], there[FLAP_UNITS_TEXT_MAX];
    return flap_error_set(FLAP_NO_MEMORY,
                          "vram: the cpu device takes its %s from host memory, of which %s are available; lower vram",
                          flap_units_format_bytes(budget, wanted, sizeof wanted),
                          flap_units_format_bytes(available, there, sizeof there));
  }
  uint64_t bytes = flap_units_round_up(budget, page);
  device->mapping_bytes = (size_t)(bytes + ARENA_ALIGN + page);
  device->mapping = mmap(NULL, device->mapping_bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (device->mapping == MAP_FAILED) {
    device->mapping = NULL;
    return flap_error_set_os(errno, "vram: cannot map %llu bytes of host memory for the cpu device; lower vram",
                             (unsigned long long)budget);
  }
  /* At least one page before the arena, and one after it. */
  uintptr_t start = (uintptr_t)device->mapping + page;
  char *arena = (char *)device->mapping + page + (ARENA_ALIGN - start % ARENA_ALIGN) % ARENA_ALIGN;
  if (mprotect(arena, bytes, PROT_READ | PROT_WRITE) != 0)
    return flap_error_set_os(errno, "vram: cannot take %llu bytes of host memory for the cpu device; lower vram",
                             (unsigned long long)budget);
  (void)madvise(arena, bytes, MADV_HUGEPAGE); /* only faster where it is there */
#ifdef MADV_POPULATE_WRITE
  if (madvise(arena, bytes, MADV_POPULATE_WRITE) != 0 && errno == ENOMEM) /* older systems: taken at first touch */
    return flap_error_set_os(ENOMEM, "vram: the system does not give %llu bytes of memory; lower vram",
                             (unsigned long long)budget);
#endif
  base->arena = arena;
  base->arena_bytes = budget;
  return FLAP_OK;
}

static void cpu_close(flap_device *base) {
  cpu_device *device = self(base);
  /* A lane may wait for the other one, whose thread still runs what it has. */
  for (uint32_t i = 0; i < 2; i++)
    if (device->lanes[i].thread_started)
      word_wait(device, (uint64_t)device->lanes[i].stream << STREAM_SHIFT | device->lanes[i].launched);
  for (uint32_t i = 0; i < 2; i++)
    lane_close(&device->lanes[i]);
  free(device->events);
  if (device->mapping)
    munmap(device->mapping, device->mapping_bytes);
}

static flap_status cpu_open(flap_device *base) {
  cpu_device *device = self(base);
  flap_status status = FLAP_OK;
  uint32_t threads = base->config.pool ? flap_pool_threads(base->config.pool) : 1;
  snprintf(base->description, sizeof base->description, "cpu, %u thread%s", threads, threads == 1 ? "" : "s");
  FLAP_TRY_GOTO(status, map_arena(device));
  device->events = calloc(base->config.events_max ? base->config.events_max : 1, sizeof *device->events);
  if (!device->events) {
    status = flap_error_set(FLAP_NO_MEMORY, "device cpu: no memory for %u events", base->config.events_max);
    goto fail;
  }
  FLAP_TRY_GOTO(status, lane_open(device, &device->lanes[0], FLAP_STREAM_H2D));
  FLAP_TRY_GOTO(status, lane_open(device, &device->lanes[1], FLAP_STREAM_D2H));
  return FLAP_OK;
fail:
  cpu_close(base);
  return status;
}

static flap_status cpu_pin_host(flap_device *device, void *memory, uint64_t bytes) {
  (void)device, (void)memory, (void)bytes; /* every host address can be copied from */
  return FLAP_OK;
}

/* ---- streams and events --------------------------------------------------------------------------------- */

static void cpu_copy(flap_device *device, flap_stream stream, void *to, const void *from, uint64_t bytes) {
  if (stream == FLAP_STREAM_COMPUTE) {
    memmove(to, from, bytes); /* within the arena, where the two may overlap */
    return;
  }
  lane_launch(lane_of(self(device), stream), &(command){.kind = COMMAND_COPY, .to = to, .from = from, .bytes = bytes});
}

static void cpu_event_record(flap_device *base, flap_event event, flap_stream stream, bool notify) {
  cpu_device *device = self(base);
  if (stream == FLAP_STREAM_COMPUTE) {
    atomic_store_explicit(&device->events[event], 0, memory_order_release);
    if (notify)
      base->config.notify(base->config.notify_context);
    return;
  }
  lane *l = lane_of(device, stream);
  pthread_mutex_lock(&l->lock);
  uint64_t word = l->launched == 0 ? 0 : (uint64_t)stream << STREAM_SHIFT | l->launched;
  pthread_mutex_unlock(&l->lock);
  atomic_store_explicit(&device->events[event], word, memory_order_release);
  if (notify)
    lane_launch(l, &(command){.kind = COMMAND_NOTIFY});
}

static uint64_t event_word(cpu_device *device, flap_event event) {
  return atomic_load_explicit(&device->events[event], memory_order_acquire);
}

static bool cpu_event_done(flap_device *base, flap_event event) {
  return word_done(self(base), event_word(self(base), event));
}

static void cpu_event_wait(flap_device *base, flap_event event) {
  word_wait(self(base), event_word(self(base), event));
}

static void cpu_stream_wait(flap_device *base, flap_stream stream, flap_event event) {
  cpu_device *device = self(base);
  uint64_t word = event_word(device, event);
  if (stream == FLAP_STREAM_COMPUTE) {
    word_wait(device, word);
    return;
  }
  if ((flap_stream)(word >> STREAM_SHIFT) == stream || word_done(device, word))
    return; /* earlier in the same stream, or over */
  lane_launch(lane_of(device, stream), &(command){.kind = COMMAND_WAIT, .word = word});
}

static flap_status cpu_synchronize(flap_device *base) {
  cpu_device *device = self(base);
  for (uint32_t i = 0; i < 2; i++) {
    lane *l = &device->lanes[i];
    pthread_mutex_lock(&l->lock);
    wait_until(l, l->launched);
    pthread_mutex_unlock(&l->lock);
  }
  return FLAP_OK;
}

/* The compute stream works on the calling thread, so being in order with it means: now. */
static flap_status cpu_transfer(flap_device *device, void *to, const void *from, uint64_t bytes) {
  (void)device;
  memcpy(to, from, bytes);
  return FLAP_OK;
}

static void cpu_note_compute(flap_device *device, uint64_t ns) {
  atomic_fetch_add_explicit(&device->busy_ns[FLAP_STREAM_COMPUTE], ns, memory_order_relaxed);
}

static uint64_t cpu_memory_peak(const flap_device *device) {
  return device->arena_bytes;
}

const flap_device_table flap_device_cpu_table = {
    .struct_bytes = sizeof(cpu_device),
    .has_bytes = true,
    .open = cpu_open,
    .close = cpu_close,
    .pin_host = cpu_pin_host,
    .copy = cpu_copy,
    .event_record = cpu_event_record,
    .event_done = cpu_event_done,
    .event_wait = cpu_event_wait,
    .stream_wait = cpu_stream_wait,
    .synchronize = cpu_synchronize,
    .upload = cpu_transfer,
    .download = cpu_transfer,
    .note_compute = cpu_note_compute,
    .memory_peak = cpu_memory_peak,
};
