/* The cuda device: an arena of the card's memory, three streams of its own, and a thread per stream that sees things
 * end.
 *
 * 1. What is launched goes straight into CUDA's streams; CUDA's events order them. A flap_event is one CUDA event,
 *    whose rules are the same: recording it again moves it, waits that were asked for earlier stay.
 * 2. What somebody wants to hear of (a copy's times, a notify, when labelled work ran) takes a slot in the stream's
 *    lane, with events of its own. The lane's thread waits until each slot's end event is complete, in order, and
 *    reports it. It only reports: no stream ever waits for it.
 * 3. A lane's lock is never held during a CUDA call, a notify or a trace.
 * 4. Labelled work of the compute stream is timed in intervals. One opens with the first launch after the last one was
 *    closed (flap_device_cuda_compute), and closes when an event is recorded there, when the stream has to wait, or
 *    when the label changes. Other work is not timed, for that would take longer than to launch what a slice needs.
 * 5. What an event costs its stream depends on its kind. Beside copies both ways an H200 takes 12 microseconds for one
 *    that is timed and that a thread can sleep by, 7 for one that is only timed, and nothing that can be measured for
 *    one that is neither; a slice is 10 to 90, a copy of 4 MiB 90. So slots end with plain events, at which their
 *    threads look every POLL_NS and, behind long waits, LOOK_NS. What is behind LONG_THINGS on the compute stream takes
 *    milliseconds, and ends with one to sleep by. Times are taken by events where somebody wants them exactly
 *    (flap_device_time_exactly), else from when the thread saw what was before end, or the copy launched, until it saw
 *    the end: right on average, but rests that are over before it looks count nothing.
 *    Of events to sleep by (cudaEventBlockingSync) CUDA 13 lets 55 stand on a stream of an H100, and of launches 1,001;
 *    the next record or launch blocks its thread until the stream moves on. So at most SLEEPERS_MAX stand there, beside
 *    those of STAGES, and flap_device_limit_ahead keeps all things that do (launches, records, waits) far from the
 *    other number.
 * 6. A wait of the compute stream takes a slot too: from the end of what was launched before to the end of the wait the
 *    stream rests. It is idle when all that stands on it is over, as its lane's thread knows by slots.
 * 7. The first error sticks: its text is kept, synchronize returns it, and events then count as complete, so that
 *    nobody waits for what will never happen.
 */
#include "kernels/device/device_cuda.h"
#include "kernels/device/device_cuda_internal.h"
#include "kernels/device/device_cuda_move.h"
#include "kernels/device/device_internal.h"

#include "base/assert.h"
#include "base/thread.h"
#include "base/units.h"

#include <cuda_runtime_api.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <time.h>

#define RING_SLOTS 2048u /* more than the contract's 1024, for the intervals of the compute stream */
#define STAGES 8u        /* pinned buffers that uploads and downloads pass through */
#define STAGE_BYTES ((uint64_t)256 << 10)
#define CAPABILITY_MIN 80u
#define SLEEPERS_MAX 24u /* slots of the compute stream that are not over and whose end wakes the lane's thread */
#define LONG_THINGS 8u   /* on the compute stream since its last slot: a layer's, where a slice has a few */
#define UNMARKED_MAX 16u /* things on the compute stream behind its last slot, where its thread limits itself */
#define POLL_NS 20000u   /* an event that nobody sleeps by is looked at so often, */
#define LOOK_NS 100000u  /* and so often, where it was waited for 16 times as long */
#define BYTE_NS_MIN (1 / 128.0) /* of a copy: no bus is faster, so nobody looks for its end before that */

/* By which kind of event a slot ends. */
typedef enum end_kind { END_PLAIN, END_TIMED, END_SLEEPS, END_KINDS } end_kind;
static const unsigned end_flags[END_KINDS] = {[END_PLAIN] = cudaEventDisableTiming,
                                              [END_TIMED] = cudaEventDefault,
                                              [END_SLEEPS] = cudaEventBlockingSync | cudaEventDisableTiming};

typedef struct slot {
  cudaEvent_t start;           /* only where `timed` */
  cudaEvent_t ends[END_KINDS]; /* of copies none to sleep by */
  end_kind kind;               /* which of them is recorded */
  uint64_t bytes;              /* of a copy; of the compute stream the label */
  uint64_t things;             /* of the compute stream: how many stood on it in all up to here */
  uint64_t asked_ns;           /* of a copy or a rest that is not timed: when it was launched */
  bool timed, notify;
  bool rests; /* nothing but a wait of the compute stream is in it */
} slot;

typedef struct cuda_device cuda_device;

typedef struct lane {
  cuda_device *device;
  flap_stream stream;
  cudaStream_t cuda;
  pthread_t thread;
  bool thread_started, lock_made, work_made, moved_made;
  pthread_mutex_t lock;
  pthread_cond_t work;  /* a slot was launched, or stop */
  pthread_cond_t moved; /* `completed` grew */
  bool stop;            /* under lock */
  uint64_t launched;    /* under lock; slot n is at n % RING_SLOTS */
  uint64_t completed;   /* under lock */
  uint64_t things_over; /* under lock; of the compute stream: those up to the last slot that completed */
  uint64_t over_ns;     /* under lock; when that was seen */
  uint64_t sleepers;    /* under lock; slots that are not over by whose end the thread sleeps */
  uint64_t seen_ns;     /* the thread's: when it saw the last slot's end */
  uint64_t ended_ns;    /* the thread's: when the last timed slot ended */
  uint64_t last_timed;  /* the thread's: its number, 0 for none */
  bool waits;    /* the launching thread's: the stream waits, so the next copy's start is not known from outside */
  slot *copying; /* the launching thread's: of a copy that was enqueued, without its end; NULL for none */
  slot ring[RING_SLOTS];
} lane;

struct cuda_device {
  flap_device base;
  flap_cuda_properties properties;
  lane lanes[FLAP_STREAM_COUNT];
  cudaEvent_t *events;
  bool interval_open;      /* the compute stream's launching thread's */
  uint64_t label;          /* of the interval that is open, or that opens next; likewise */
  _Atomic uint64_t things; /* that were put on the compute stream, by its launching thread */
  uint64_t things_marked;  /* of these, up to its last slot; likewise */
  unsigned char *stages;
  cudaEvent_t stage_free[STAGES];
  uint32_t stage_next;
  flap_cuda_memory memory;
  _Atomic bool failed;
  pthread_mutex_t failure_lock;
  char failure[256];
};

static cuda_device *self(flap_device *device) {
  return (cuda_device *)device;
}

static const cuda_device *self_const(const flap_device *device) {
  flap_assert(device->config.kind == FLAP_DEVICE_CUDA);
  return (const cuda_device *)device;
}

/* ---- errors --------------------------------------------------------------------------------------------- */

void flap_device_cuda_fail(flap_device *base, const char *what, int error, const char *reason) {
  cuda_device *device = self(base);
  pthread_mutex_lock(&device->failure_lock);
  if (!atomic_load(&device->failed)) {
    (void)snprintf(device->failure, sizeof device->failure, "cuda: %s: %s (error %d)", what, reason, error);
    atomic_store(&device->failed, true);
  }
  pthread_mutex_unlock(&device->failure_lock);
}

bool flap_device_cuda_failed(const flap_device *device) {
  return atomic_load(&self_const(device)->failed);
}

static bool check(cuda_device *device, const char *what, cudaError_t error) {
  if (error != cudaSuccess)
    flap_device_cuda_fail(&device->base, what, (int)error, cudaGetErrorString(error));
  return error == cudaSuccess;
}

static flap_status failure_of(cuda_device *device) {
  if (!atomic_load(&device->failed))
    return FLAP_OK;
  return flap_error_set(FLAP_DEVICE, "%s", device->failure); /* written before `failed`, and never again */
}

/* For open: an error of CUDA as a status. */
static flap_status status_of(const char *what, cudaError_t error) {
  if (error == cudaSuccess)
    return FLAP_OK;
  return flap_error_set(error == cudaErrorMemoryAllocation ? FLAP_NO_MEMORY : FLAP_DEVICE, "cuda: %s: %s (error %d)",
                        what, cudaGetErrorString(error), (int)error);
}

/* ---- lanes ---------------------------------------------------------------------------------------------- */

static lane *lane_of(cuda_device *device, flap_stream stream) {
  return &device->lanes[stream];
}

/* The next slot, free to be filled; waits for one. Two are kept back: the one that the thread reports, and the one
 * before it, whose end it measures from. */
static slot *lane_take(lane *l) {
  pthread_mutex_lock(&l->lock);
  while (l->launched - l->completed >= RING_SLOTS - 2)
    pthread_cond_wait(&l->moved, &l->lock);
  slot *s = &l->ring[(l->launched + 1) % RING_SLOTS];
  pthread_mutex_unlock(&l->lock);
  return s;
}

/* `wanted`: END_SLEEPS becomes END_PLAIN where so many stand on the compute stream already. */
static void record_end(lane *l, slot *s, end_kind wanted) {
  pthread_mutex_lock(&l->lock);
  s->kind = wanted == END_SLEEPS && l->sleepers >= SLEEPERS_MAX ? END_PLAIN : wanted;
  l->sleepers += s->kind == END_SLEEPS;
  pthread_mutex_unlock(&l->lock);
  check(l->device, "cannot record an event", cudaEventRecord(s->ends[s->kind], l->cuda));
}

static void lane_put(lane *l) {
  pthread_mutex_lock(&l->lock);
  l->launched++;
  pthread_cond_signal(&l->work);
  pthread_mutex_unlock(&l->lock);
}

static void lane_drain(lane *l) {
  pthread_mutex_lock(&l->lock);
  uint64_t launched = l->launched;
  while (l->completed < launched)
    pthread_cond_wait(&l->moved, &l->lock);
  pthread_mutex_unlock(&l->lock);
}

static cudaEvent_t end_of(const slot *s) {
  return s->ends[s->kind];
}

static uint64_t elapsed_ns(cudaEvent_t from, cudaEvent_t to) {
  float milliseconds = 0;
  if (cudaEventElapsedTime(&milliseconds, from, to) != cudaSuccess || !(milliseconds > 0))
    return 0;
  return (uint64_t)((double)milliseconds * 1e6);
}

/* Tells when the slot's work ran on the host's clock. CUDA only knows distances between events, in a float that is
 * good for short ones: a slot that the thread had to wait for ended now, one that it found complete is measured from
 * the one before. */
static void report_times(lane *l, uint64_t number, const slot *s, bool waited) {
  uint64_t now = flap_units_now_ns(), ended = now, took = elapsed_ns(s->start, end_of(s));
  if (!waited && l->last_timed != 0 && l->last_timed + 1 == number) {
    uint64_t by_distance = l->ended_ns + elapsed_ns(end_of(&l->ring[l->last_timed % RING_SLOTS]), end_of(s));
    ended = by_distance < now ? by_distance : now;
  }
  uint64_t started = ended - (took < ended ? took : ended);
  if (started < l->ended_ns && l->ended_ns <= ended)
    started = l->ended_ns;
  l->ended_ns = ended;
  l->last_timed = number;
  if (s->rests) {
    atomic_fetch_add_explicit(&l->device->base.rested_ns, took, memory_order_relaxed);
    if (s->bytes != 0)
      flap_device_observe(&l->device->base, l->stream, started, ended, s->bytes);
  } else if (l->stream == FLAP_STREAM_COMPUTE) {
    atomic_fetch_add_explicit(&l->device->base.busy_ns[l->stream], took, memory_order_relaxed);
    flap_assert(s->bytes != 0); /* nothing else is timed */
    flap_device_observe(&l->device->base, l->stream, started, ended, s->bytes);
  } else {
    flap_device_copied(&l->device->base, l->stream, started, ended, s->bytes);
  }
}

static void sleep_ns(uint64_t ns) {
  const struct timespec pause = {.tv_sec = (time_t)(ns / 1000000000u), .tv_nsec = (long)(ns % 1000000000u)};
  (void)nanosleep(&pause, NULL);
}

/* When what the slot is about began, as far as that is seen from outside. */
static uint64_t seen_start_ns(const lane *l, const slot *s) {
  return l->seen_ns > s->asked_ns ? l->seen_ns : s->asked_ns;
}

static cudaError_t wait_for_end(const lane *l, const slot *s) {
  if (s->kind == END_SLEEPS)
    return cudaEventSynchronize(end_of(s));
  cudaError_t error = cudaEventQuery(end_of(s));
  const bool copies = l->stream != FLAP_STREAM_COMPUTE;
  const uint64_t began_ns = flap_units_now_ns(), least_ns = copies ? (uint64_t)(BYTE_NS_MIN * (double)s->bytes) : 0;
  if (error == cudaErrorNotReady && seen_start_ns(l, s) + least_ns > began_ns)
    sleep_ns(seen_start_ns(l, s) + least_ns - began_ns);
  while (error == cudaErrorNotReady && (error = cudaEventQuery(end_of(s))) == cudaErrorNotReady) {
    const uint64_t pause_ns = s->timed ? POLL_NS : (flap_units_now_ns() - began_ns) / 16;
    sleep_ns(pause_ns < POLL_NS ? POLL_NS : pause_ns < LOOK_NS ? pause_ns : LOOK_NS);
  }
  return error;
}

/* What was not timed, as it is seen from outside. */
static void report_seen(lane *l, const slot *s, uint64_t seen_ns) {
  const uint64_t since_ns = seen_start_ns(l, s), took_ns = seen_ns - since_ns;
  if (l->stream == FLAP_STREAM_COMPUTE) {
    atomic_fetch_add_explicit(&l->device->base.rested_ns, took_ns, memory_order_relaxed);
    return;
  }
  l->ended_ns = seen_ns;
  flap_device_copied(&l->device->base, l->stream, since_ns, seen_ns, s->bytes);
}

static void report(lane *l, uint64_t number, const slot *s) {
  const bool copies = l->stream != FLAP_STREAM_COMPUTE && s->bytes > 0;
  const bool waited = (s->timed || s->rests) && cudaEventQuery(end_of(s)) == cudaErrorNotReady;
  const bool well = check(l->device, copies ? "a copy" : "a kernel", wait_for_end(l, s));
  const uint64_t seen_ns = flap_units_now_ns();
  if (well && s->timed)
    report_times(l, number, s, waited);
  else if (well && (copies || (s->rests && waited)))
    report_seen(l, s, seen_ns);
  l->seen_ns = seen_ns;
  if (s->notify)
    l->device->base.config.notify(l->device->base.config.notify_context);
}

static void *lane_main(void *context) {
  flap_thread_prefer_latency();
  (void)prctl(PR_SET_TIMERSLACK, 1000UL); /* nanoseconds by which it may sleep longer; else 50,000 */
  lane *l = context;
  pthread_mutex_lock(&l->lock);
  for (uint64_t number = 1;; number++) {
    while (l->launched < number && !l->stop)
      pthread_cond_wait(&l->work, &l->lock);
    if (l->launched < number)
      break; /* told to stop, and nothing is left */
    const slot *s = &l->ring[number % RING_SLOTS];
    pthread_mutex_unlock(&l->lock);
    report(l, number, s);
    pthread_mutex_lock(&l->lock);
    l->completed = number;
    l->things_over = s->things;
    l->over_ns = l->seen_ns;
    l->sleepers -= s->kind == END_SLEEPS;
    pthread_cond_broadcast(&l->moved);
  }
  pthread_mutex_unlock(&l->lock);
  return NULL;
}

static flap_status lane_open(cuda_device *device, flap_stream stream) {
  lane *l = lane_of(device, stream);
  l->device = device;
  l->stream = stream;
  FLAP_TRY(status_of("cannot make a stream", cudaStreamCreateWithFlags(&l->cuda, cudaStreamNonBlocking)));
  for (uint32_t i = 0; i < RING_SLOTS; i++) {
    slot *s = &l->ring[i];
    FLAP_TRY(status_of("cannot make an event", cudaEventCreateWithFlags(&s->start, cudaEventDefault)));
    for (int k = 0; k < END_KINDS; k++)
      if (k != END_SLEEPS || stream == FLAP_STREAM_COMPUTE)
        FLAP_TRY(status_of("cannot make an event", cudaEventCreateWithFlags(&s->ends[k], end_flags[k])));
  }
  int error = pthread_mutex_init(&l->lock, NULL);
  l->lock_made = error == 0;
  if (error == 0)
    error = pthread_cond_init(&l->work, NULL);
  l->work_made = l->lock_made && error == 0;
  if (error == 0)
    error = pthread_cond_init(&l->moved, NULL);
  l->moved_made = l->work_made && error == 0;
  if (error == 0) {
    sigset_t all, before; /* signals are for the threads of the program */
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    error = pthread_create(&l->thread, NULL, lane_main, l);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
  }
  l->thread_started = l->moved_made && error == 0;
  return error == 0 ? FLAP_OK : flap_error_set_os(error, "device cuda: cannot start a thread");
}

static void lane_close(lane *l) {
  if (l->thread_started) {
    pthread_mutex_lock(&l->lock);
    l->stop = true;
    pthread_cond_signal(&l->work);
    pthread_mutex_unlock(&l->lock);
    pthread_join(l->thread, NULL);
  }
  if (l->moved_made)
    pthread_cond_destroy(&l->moved);
  if (l->work_made)
    pthread_cond_destroy(&l->work);
  if (l->lock_made)
    pthread_mutex_destroy(&l->lock);
  for (uint32_t i = 0; i < RING_SLOTS; i++) {
    if (l->ring[i].start)
      (void)cudaEventDestroy(l->ring[i].start);
    for (int k = 0; k < END_KINDS; k++)
      if (l->ring[i].ends[k])
        (void)cudaEventDestroy(l->ring[i].ends[k]);
  }
  if (l->cuda)
    (void)cudaStreamDestroy(l->cuda);
}

/* ---- the compute stream's intervals --------------------------------------------------------------------- */

void *flap_device_cuda_compute(flap_device *base) {
  flap_assert(base->config.kind == FLAP_DEVICE_CUDA);
  cuda_device *device = self(base);
  lane *l = lane_of(device, FLAP_STREAM_COMPUTE);
  device->things++;
  if (!device->interval_open && device->label != 0) {
    device->interval_open = true;
    device->things++;
    check(device, "cannot record an event", cudaEventRecord(lane_take(l)->start, l->cuda));
  }
  return l->cuda;
}

/* Launches the slot of the compute stream that was taken last. */
static void end_slot(cuda_device *device, slot *s) {
  lane *l = lane_of(device, FLAP_STREAM_COMPUTE);
  const bool is_long = device->things - device->things_marked >= LONG_THINGS;
  s->things = device->things_marked = ++device->things;
  record_end(l, s, s->timed ? END_TIMED : is_long ? END_SLEEPS : END_PLAIN);
  lane_put(l);
}

/* Launches a slot that ends here, the one that the interval's start was recorded in if one is open, which it closes; it
 * may notify. */
static void put_mark(cuda_device *device, bool notify) {
  slot *s = lane_take(lane_of(device, FLAP_STREAM_COMPUTE));
  s->timed = device->interval_open;
  s->rests = false;
  s->notify = notify;
  s->bytes = device->label;
  device->interval_open = false;
  end_slot(device, s);
}

static void compute_mark(cuda_device *device, bool notify) {
  if (device->interval_open || notify)
    put_mark(device, notify);
}

static void cuda_label_compute(flap_device *base, uint64_t label) {
  cuda_device *device = self(base);
  if (label == device->label)
    return;
  compute_mark(device, false);
  device->label = label;
}

/* Whether more than so many quarters of what may stand on the compute stream do. Under the lane's lock. */
static bool is_ahead(const cuda_device *device, const lane *l, uint64_t quarters) {
  return device->things - l->things_over > FLAP_DEVICE_AHEAD_MAX / 4 * quarters;
}

/* How far the stream has come is known at its marks: some are made for this where there are none. */
static void cuda_limit_ahead(flap_device *base) {
  cuda_device *device = self(base);
  lane *l = lane_of(device, FLAP_STREAM_COMPUTE);
  if (device->things - device->things_marked > UNMARKED_MAX)
    put_mark(device, false);
  pthread_mutex_lock(&l->lock);
  if (is_ahead(device, l, 4))
    while (is_ahead(device, l, 3))
      pthread_cond_wait(&l->moved, &l->lock);
  pthread_mutex_unlock(&l->lock);
}

static void cuda_expect_rest(flap_device *base) {
  cuda_device *device = self(base);
  if (device->things > device->things_marked)
    put_mark(device, false);
}

static uint64_t cuda_idle_since_ns(flap_device *base) {
  cuda_device *device = self(base);
  lane *l = lane_of(device, FLAP_STREAM_COMPUTE);
  pthread_mutex_lock(&l->lock);
  const uint64_t since = l->things_over == atomic_load(&device->things) ? l->over_ns : UINT64_MAX;
  pthread_mutex_unlock(&l->lock);
  return since;
}

const flap_cuda_properties *flap_device_cuda_properties(const flap_device *device) {
  return &self_const(device)->properties;
}

/* ---- open and close ------------------------------------------------------------------------------------- */

static void cuda_close(flap_device *base) {
  cuda_device *device = self(base);
  for (uint32_t i = 0; i < FLAP_STREAM_COUNT; i++)
    if (device->lanes[i].cuda)
      (void)cudaStreamSynchronize(device->lanes[i].cuda);
  for (uint32_t i = 0; i < FLAP_STREAM_COUNT; i++)
    lane_close(&device->lanes[i]);
  for (uint32_t i = 0; device->events && i < base->config.events_max; i++)
    if (device->events[i])
      (void)cudaEventDestroy(device->events[i]);
  free(device->events);
  for (uint32_t i = 0; i < STAGES; i++)
    if (device->stage_free[i])
      (void)cudaEventDestroy(device->stage_free[i]);
  if (device->stages)
    (void)cudaFreeHost(device->stages);
  if (base->arena)
    (void)cudaFree(base->arena);
  flap_cuda_memory_close(&device->memory);
  (void)cudaGetLastError(); /* what failed here, failed before, and was told */
  pthread_mutex_destroy(&device->failure_lock);
}

flap_status flap_device_cuda_find(flap_cuda_properties *card_out) {
  int count = 0;
  cudaError_t error = cudaGetDeviceCount(&count);
  if (error == cudaErrorInsufficientDriver || error == cudaErrorNoDevice || (error == cudaSuccess && count == 0)) {
    int driver = 0;
    (void)cudaDriverGetVersion(&driver);
    (void)cudaGetLastError();
    if (error == cudaErrorInsufficientDriver && driver == 0)
      return flap_error_set(FLAP_NOT_FOUND,
                            "cuda: this machine has no NVIDIA driver; install it, or set device to cpu");
    if (error == cudaErrorInsufficientDriver)
      return flap_error_set(FLAP_DEVICE,
                            "cuda: the NVIDIA driver is for CUDA %d.%d, older than this build's %d.%d; update the "
                            "driver, or set device to cpu",
                            driver / 1000, driver % 1000 / 10, CUDART_VERSION / 1000, CUDART_VERSION % 1000 / 10);
    return flap_error_set(FLAP_NOT_FOUND, "cuda: the driver shows no NVIDIA GPU (is CUDA_VISIBLE_DEVICES empty?); set "
                                          "device to cpu to run without one");
  }
  FLAP_TRY(status_of("cannot count the GPUs", error));
  struct cudaDeviceProp p;
  FLAP_TRY(status_of("cannot read the GPU's properties", cudaGetDeviceProperties(&p, 0)));
  flap_cuda_properties *own = card_out;
  own->capability = (uint32_t)(p.major * 10 + p.minor);
  own->multiprocessors = (uint32_t)p.multiProcessorCount;
  own->shared_bytes_max = (uint32_t)p.sharedMemPerBlockOptin;
  (void)snprintf(own->name, sizeof own->name, "%.63s", p.name);
  int version = 0;
  (void)cudaDriverGetVersion(&version);
  own->driver = (uint32_t)version;
  own->runtime = CUDART_VERSION;
  if (own->capability < CAPABILITY_MIN)
    return flap_error_set(FLAP_DEVICE,
                          "cuda: %s has compute capability %u.%u; FLAP needs 8.0 (Ampere) or newer; set device to cpu",
                          own->name, own->capability / 10, own->capability % 10);
  return FLAP_OK;
}

static flap_status cuda_open(flap_device *base) {
  cuda_device *device = self(base);
  flap_status status = FLAP_OK;
  int error = pthread_mutex_init(&device->failure_lock, NULL);
  if (error)
    return flap_error_set_os(error, "device cuda: cannot make a lock");
  FLAP_TRY_GOTO(status, flap_device_cuda_find(&device->properties));
  (void)snprintf(base->description, sizeof base->description, "%s", device->properties.name);
  FLAP_TRY_GOTO(status, flap_cuda_memory_start(&device->memory));
  for (uint32_t i = 0; i < FLAP_STREAM_COUNT; i++)
    FLAP_TRY_GOTO(status, lane_open(device, (flap_stream)i));
  uint32_t events = base->config.events_max;
  device->events = calloc(events ? events : 1, sizeof *device->events);
  if (!device->events) {
    status = flap_error_set(FLAP_NO_MEMORY, "device cuda: no memory for %u events", events);
    goto fail;
  }
  for (uint32_t i = 0; i < events; i++)
    FLAP_TRY_GOTO(status, status_of("cannot make an event",
                                    cudaEventCreateWithFlags(&device->events[i], cudaEventDisableTiming)));
  void *stages = NULL;
  FLAP_TRY_GOTO(status, status_of("cannot pin memory for small transfers",
                                  cudaHostAlloc(&stages, STAGES * STAGE_BYTES, cudaHostAllocDefault)));
  device->stages = stages;
  for (uint32_t i = 0; i < STAGES; i++)
    FLAP_TRY_GOTO(status, status_of("cannot make an event",
                                    cudaEventCreateWithFlags(&device->stage_free[i],
                                                             cudaEventBlockingSync | cudaEventDisableTiming)));
  FLAP_TRY_GOTO(status,
                flap_cuda_memory_arena(&device->memory, base->config.vram_bytes, &base->arena, &base->arena_bytes));
  return FLAP_OK;
fail:
  cuda_close(base);
  return status;
}

static flap_status cuda_pin_host(flap_device *base, void *memory, uint64_t bytes) {
  cuda_device *device = self(base);
  FLAP_TRY(failure_of(device));
  return flap_cuda_memory_pin(&device->memory, memory, bytes);
}

/* ---- streams and events --------------------------------------------------------------------------------- */

/* A transfer must not cross the seam of two pieces that were pinned one by one. */
static void transfer(cuda_device *device, lane *l, void *to, const void *from, uint64_t bytes) {
  bool to_device = l->stream == FLAP_STREAM_H2D;
  unsigned char *target = to;
  const unsigned char *source = from;
  while (bytes > 0) {
    uint64_t piece = flap_cuda_memory_piece(&device->memory, to_device ? source : target, bytes);
    if (!check(device, to_device ? "a copy to the GPU" : "a copy from the GPU",
               cudaMemcpyAsync(target, source, piece, to_device ? cudaMemcpyHostToDevice : cudaMemcpyDeviceToHost,
                               l->cuda)))
      return;
    target += piece;
    source += piece;
    bytes -= piece;
  }
}

/* The slot of the last copy ends here. Left open until then, so that an event which is recorded behind the copy, and
 * notifies, takes no slot of its own. */
static bool end_copy(lane *l, bool notify) {
  slot *s = l->copying;
  if (s == NULL)
    return false;
  l->copying = NULL;
  s->notify = notify;
  record_end(l, s, s->timed ? END_TIMED : END_PLAIN);
  lane_put(l);
  return true;
}

static void cuda_copy(flap_device *base, flap_stream stream, void *to, const void *from, uint64_t bytes) {
  cuda_device *device = self(base);
  if (stream == FLAP_STREAM_COMPUTE) {
    cudaStream_t cuda = flap_device_cuda_compute(base);
    check(device, "a copy within the GPU", cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, cuda));
    return;
  }
  lane *l = lane_of(device, stream);
  end_copy(l, false);
  slot *s = lane_take(l);
  s->timed = l->waits || atomic_load_explicit(&base->exact, memory_order_relaxed);
  s->bytes = bytes;
  s->asked_ns = flap_units_now_ns();
  l->waits = false;
  if (s->timed)
    check(device, "cannot record an event", cudaEventRecord(s->start, l->cuda));
  transfer(device, l, to, from, bytes);
  l->copying = s;
}

static void cuda_event_record(flap_device *base, flap_event event, flap_stream stream, bool notify) {
  cuda_device *device = self(base);
  lane *l = lane_of(device, stream);
  check(device, "cannot record an event", cudaEventRecord(device->events[event], l->cuda));
  if (stream == FLAP_STREAM_COMPUTE) {
    device->things++;
    compute_mark(device, notify);
    return;
  }
  if (end_copy(l, notify) || !notify)
    return;
  slot *s = lane_take(l);
  s->timed = false;
  s->notify = true;
  s->bytes = 0;
  record_end(l, s, END_PLAIN);
  lane_put(l);
}

static bool cuda_event_done(flap_device *base, flap_event event) {
  cuda_device *device = self(base);
  cudaError_t error = cudaEventQuery(device->events[event]);
  if (error == cudaErrorNotReady)
    return atomic_load(&device->failed);
  check(device, "the work before an event", error);
  return true;
}

static void cuda_event_wait(flap_device *base, flap_event event) {
  const struct timespec pause = {.tv_nsec = POLL_NS};
  while (!cuda_event_done(base, event))
    (void)nanosleep(&pause, NULL);
}

static void cuda_stream_wait(flap_device *base, flap_stream stream, flap_event event) {
  cuda_device *device = self(base);
  lane *l = lane_of(device, stream);
  slot *rest = NULL;
  if (cudaEventQuery(device->events[event]) == cudaSuccess)
    return; /* nothing to wait for, so no interval ends either */
  if (stream == FLAP_STREAM_COMPUTE) {
    cuda_expect_rest(base); /* the end of what is before it */
    rest = lane_take(l);
    rest->timed = base->rest_label != 0 || atomic_load_explicit(&base->exact, memory_order_relaxed);
    rest->rests = true;
    rest->notify = false;
    rest->bytes = base->rest_label;
    device->things += rest->timed ? 2 : 1; /* and the end */
    rest->asked_ns = flap_units_now_ns();
    if (rest->timed)
      check(device, "cannot record an event", cudaEventRecord(rest->start, l->cuda));
  } else {
    (void)end_copy(l, false); /* before the wait, not behind it */
    l->waits = true;
  }
  check(device, "cannot let a stream wait", cudaStreamWaitEvent(l->cuda, device->events[event], 0));
  if (rest != NULL)
    end_slot(device, rest);
}

static flap_status cuda_synchronize(flap_device *base) {
  cuda_device *device = self(base);
  compute_mark(device, false);
  for (uint32_t i = 0; i < FLAP_STREAM_COUNT; i++)
    (void)end_copy(&device->lanes[i], false);
  for (uint32_t i = 0; i < FLAP_STREAM_COUNT; i++)
    check(device, "the work of a stream", cudaStreamSynchronize(device->lanes[i].cuda));
  for (uint32_t i = 0; i < FLAP_STREAM_COUNT; i++)
    lane_drain(&device->lanes[i]);
  return failure_of(device);
}

static flap_status cuda_outcome(flap_device *base) {
  return failure_of(self(base));
}

/* Through pinned buffers, so that the caller's bytes are taken when the call returns and nobody waits for the stream
 * unless all buffers are under way. */
static flap_status cuda_upload(flap_device *base, void *to, const void *from, uint64_t bytes) {
  cuda_device *device = self(base);
  FLAP_TRY(failure_of(device));
  cudaStream_t cuda = flap_device_cuda_compute(base);
  for (uint64_t at = 0; at < bytes; at += STAGE_BYTES) {
    uint64_t piece = bytes - at < STAGE_BYTES ? bytes - at : STAGE_BYTES;
    uint32_t stage = device->stage_next;
    device->stage_next = (stage + 1) % STAGES;
    check(device, "an upload", cudaEventSynchronize(device->stage_free[stage]));
    unsigned char *buffer = device->stages + stage * STAGE_BYTES;
    memcpy(buffer, (const unsigned char *)from + at, piece);
    check(device, "an upload", flap_cuda_move((unsigned char *)to + at, buffer, piece, cuda));
    check(device, "an upload", cudaEventRecord(device->stage_free[stage], cuda));
  }
  return failure_of(device);
}

/* As many pieces at a time as there are buffers. What was uploaded from these is behind what comes, in the same stream.
 */
static flap_status cuda_download(flap_device *base, void *to, const void *from, uint64_t bytes) {
  cuda_device *device = self(base);
  FLAP_TRY(failure_of(device));
  lane *l = lane_of(device, FLAP_STREAM_COMPUTE);
  compute_mark(device, false);
  for (uint64_t at = 0; at < bytes; at += STAGES * STAGE_BYTES) {
    const uint64_t some = bytes - at < STAGES * STAGE_BYTES ? bytes - at : STAGES * STAGE_BYTES;
    if (!check(device, "a download", flap_cuda_move(device->stages, (const unsigned char *)from + at, some, l->cuda)) ||
        !check(device, "a download", cudaStreamSynchronize(l->cuda)))
      break;
    memcpy((unsigned char *)to + at, device->stages, some);
  }
  return failure_of(device);
}

static uint64_t cuda_memory_peak(const flap_device *device) {
  return flap_cuda_memory_peak(&((cuda_device *)(uintptr_t)device)->memory);
}

const flap_device_table flap_device_cuda_table = {
    .struct_bytes = sizeof(cuda_device),
    .has_bytes = true,
    .open = cuda_open,
    .close = cuda_close,
    .pin_host = cuda_pin_host,
    .copy = cuda_copy,
    .event_record = cuda_event_record,
    .event_done = cuda_event_done,
    .event_wait = cuda_event_wait,
    .stream_wait = cuda_stream_wait,
    .synchronize = cuda_synchronize,
    .outcome = cuda_outcome,
    .upload = cuda_upload,
    .download = cuda_download,
    .limit_ahead = cuda_limit_ahead,
    .expect_rest = cuda_expect_rest,
    .idle_since_ns = cuda_idle_since_ns,
    .label_compute = cuda_label_compute,
    .memory_peak = cuda_memory_peak,
};
