/* The Chrome trace format: complete events ("ph":"X") in microseconds, on one thread row per lane, or several where
 * events of a lane overlap.
 *
 * Threads: `claimed` hands out slots; `ready` of an event is stored last, with release order, so a writer that sees it
 * sees the whole event. Events that were claimed but not filled when the file is written are left out.
 */
#include "io/formats/trace.h"

#include "base/assert.h"
#include "base/system.h"
#include "io/formats/durable.h"
#include "io/formats/json_escape.h"

#include <fcntl.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>

#define ALIGN 64u
#define OUT_BYTES 32768u
#define EVENT_TEXT_BYTES 1024u
#define NAME_TEXT_BYTES 512u
#define BEGINNING "{\"displayTimeUnit\":\"ms\",\"otherData\":{\"events\":"

typedef struct trace_event {
  const char *name;
  uint64_t start_ns, end_ns, bytes;
  uint32_t detail;
  uint8_t lane;
  atomic_bool ready;
} trace_event;

struct flap_trace {
  _Alignas(ALIGN) atomic_uint_fast64_t claimed;
  _Alignas(ALIGN) uint32_t capacity;
  trace_event *events;
  uint32_t *order; /* the writer's */
};

static const char *const lane_names[FLAP_TRACE_LANE_COUNT] = {
    [FLAP_TRACE_COMPUTE] = "compute",
    [FLAP_TRACE_H2D] = "h2d",
    [FLAP_TRACE_D2H] = "d2h",
    [FLAP_TRACE_DISK_READ] = "disk read",
    [FLAP_TRACE_DISK_WRITE] = "disk write",
    [FLAP_TRACE_HOST] = "host",
    [FLAP_TRACE_STALL] = "stall",
};

/* ---- collecting ---------------------------------------------------------------------------------------- */

flap_trace *flap_trace_open(flap_arena *arena, uint32_t capacity) {
  flap_trace *trace = flap_arena_take(arena, sizeof *trace, ALIGN);
  trace_event *events = FLAP_ARENA_ARRAY(arena, trace_event, capacity);
  uint32_t *order = FLAP_ARENA_ARRAY(arena, uint32_t, capacity);
  if (!trace)
    return NULL;
  trace->capacity = capacity;
  trace->events = events;
  trace->order = order;
  atomic_store(&trace->claimed, capacity); /* all slots count as used, so all are cleared */
  flap_trace_reset(trace);
  return trace;
}

uint64_t flap_trace_measure(uint32_t capacity) {
  flap_arena arena;
  flap_arena_measure(&arena, "trace");
  (void)flap_trace_open(&arena, capacity);
  return arena.bytes_used + ALIGN - 1; /* the arena it is taken from may stand at any byte */
}

void flap_trace_add(flap_trace *trace, flap_trace_lane lane, const char *name, uint32_t detail, uint64_t start_ns,
                    uint64_t end_ns, uint64_t bytes) {
  if (!trace)
    return;
  flap_assert((unsigned)lane < FLAP_TRACE_LANE_COUNT);
  uint64_t slot = atomic_fetch_add_explicit(&trace->claimed, 1, memory_order_relaxed);
  if (slot >= trace->capacity)
    return;
  trace_event *event = &trace->events[slot];
  event->name = name;
  event->start_ns = start_ns;
  event->end_ns = end_ns > start_ns ? end_ns : start_ns;
  event->bytes = bytes;
  event->detail = detail;
  event->lane = (uint8_t)lane;
  atomic_store_explicit(&event->ready, true, memory_order_release);
}

uint64_t flap_trace_count(const flap_trace *trace) {
  uint64_t claimed = atomic_load(&trace->claimed);
  return claimed < trace->capacity ? claimed : trace->capacity;
}

uint64_t flap_trace_dropped(const flap_trace *trace) {
  return atomic_load(&trace->claimed) - flap_trace_count(trace);
}

void flap_trace_reset(flap_trace *trace) {
  uint64_t count = flap_trace_count(trace);
  for (uint64_t i = 0; i < count; i++)
    atomic_store_explicit(&trace->events[i].ready, false, memory_order_relaxed);
  atomic_store(&trace->claimed, 0);
}

/* ---- ordering ------------------------------------------------------------------------------------------ */

/* By lane, then start, then slot: a total order, so the file is a function of the events. */
static bool comes_before(const flap_trace *trace, uint32_t a, uint32_t b) {
  const trace_event *one = &trace->events[a], *two = &trace->events[b];
  if (one->lane != two->lane)
    return one->lane < two->lane;
  if (one->start_ns != two->start_ns)
    return one->start_ns < two->start_ns;
  return a < b;
}

static void sift_down(const flap_trace *trace, uint32_t *heap, uint64_t root, uint64_t count) {
  for (;;) {
    uint64_t child = 2 * root + 1;
    if (child >= count)
      return;
    if (child + 1 < count && comes_before(trace, heap[child], heap[child + 1]))
      child++;
    if (!comes_before(trace, heap[root], heap[child]))
      return;
    uint32_t moved = heap[root];
    heap[root] = heap[child];
    heap[child] = moved;
    root = child;
  }
}

/* Heapsort, because it needs no memory of its own. Returns how many events there are. */
static uint64_t sort_events(flap_trace *trace) {
  uint64_t claimed = flap_trace_count(trace), count = 0;
  for (uint64_t i = 0; i < claimed; i++)
    if (atomic_load_explicit(&trace->events[i].ready, memory_order_acquire))
      trace->order[count++] = (uint32_t)i;
  for (uint64_t i = count / 2; i-- > 0;)
    sift_down(trace, trace->order, i, count);
  for (uint64_t end = count; end-- > 1;) {
    uint32_t last = trace->order[0];
    trace->order[0] = trace->order[end];
    trace->order[end] = last;
    sift_down(trace, trace->order, 0, end);
  }
  return count;
}

/* ---- writing ------------------------------------------------------------------------------------------- */

typedef struct trace_out {
  flap_durable_file file;
  flap_status status; /* the first failure; nothing is written after it */
  bool needs_comma;
  size_t used;
  char text[OUT_BYTES];
} trace_out;

static void flush(trace_out *out) {
  if (out->status == FLAP_OK)
    out->status = flap_durable_append(&out->file, out->text, out->used);
  out->used = 0;
}

static void put(trace_out *out, const char *format, ...) FLAP_PRINTF(2, 3);
static void put(trace_out *out, const char *format, ...) {
  if (OUT_BYTES - out->used < EVENT_TEXT_BYTES)
    flush(out);
  va_list arguments;
  va_start(arguments, format);
  int length = vsnprintf(out->text + out->used, OUT_BYTES - out->used, format, arguments);
  va_end(arguments);
  if (length > 0)
    out->used += (size_t)length;
}

static void put_separator(trace_out *out) {
  put(out, "%s\n", out->needs_comma ? "," : "");
  out->needs_comma = true;
}

static uint32_t thread_of(uint32_t lane, uint32_t row) {
  return lane * FLAP_TRACE_ROWS_MAX + row + 1;
}

static void put_row_name(trace_out *out, uint32_t lane, uint32_t row) {
  uint32_t thread = thread_of(lane, row);
  char number[16] = "";
  if (row > 0)
    (void)snprintf(number, sizeof number, " %u", row + 1);
  put_separator(out);
  put(out, "{\"ph\":\"M\",\"pid\":1,\"tid\":%u,\"name\":\"thread_name\",\"args\":{\"name\":\"%s%s\"}}", thread,
      lane_names[lane], number);
  put_separator(out);
  put(out, "{\"ph\":\"M\",\"pid\":1,\"tid\":%u,\"name\":\"thread_sort_index\",\"args\":{\"sort_index\":%u}}", thread,
      thread);
}

static void put_event(trace_out *out, const trace_event *event, uint32_t row, uint64_t first_ns) {
  char name[NAME_TEXT_BYTES], number[16] = "", bytes[48] = "";
  uint64_t start = event->start_ns - first_ns, duration = event->end_ns - event->start_ns;
  if (flap_json_escape(event->name, name, sizeof name) == 0)
    (void)snprintf(name, sizeof name, "\"(a name too long)\"");
  if (event->detail != FLAP_TRACE_NO_DETAIL)
    (void)snprintf(number, sizeof number, " %u", event->detail);
  if (event->bytes > 0)
    (void)snprintf(bytes, sizeof bytes, ",\"args\":{\"bytes\":%llu}", (unsigned long long)event->bytes);
  name[strlen(name) - 1] = '\0'; /* the closing quote comes after the number */
  put_separator(out);
  put(out, "{\"ph\":\"X\",\"pid\":1,\"tid\":%u,\"ts\":%llu.%03llu,\"dur\":%llu.%03llu,\"name\":%s%s\"%s}",
      thread_of(event->lane, row), (unsigned long long)(start / 1000), (unsigned long long)(start % 1000),
      (unsigned long long)(duration / 1000), (unsigned long long)(duration % 1000), name, number, bytes);
}

/* The events of one lane, from order[i]; returns where the next lane begins. An event goes to the first row that is
 * free by its start. */
static uint64_t put_lane(trace_out *out, const flap_trace *trace, uint32_t lane, uint64_t i, uint64_t count,
                         uint64_t first_ns) {
  uint64_t row_end_ns[FLAP_TRACE_ROWS_MAX];
  uint32_t rows = 1;
  row_end_ns[0] = 0;
  put_row_name(out, lane, 0);
  for (; i < count && trace->events[trace->order[i]].lane == lane; i++) {
    const trace_event *event = &trace->events[trace->order[i]];
    uint32_t row = 0;
    while (row < rows && row_end_ns[row] > event->start_ns)
      row++;
    if (row == rows && rows < FLAP_TRACE_ROWS_MAX) {
      put_row_name(out, lane, row);
      rows++;
    } else if (row == rows) {
      row--;
    }
    row_end_ns[row] = event->end_ns;
    put_event(out, event, row, first_ns);
  }
  return i;
}

static void put_all(trace_out *out, flap_trace *trace) {
  uint64_t count = sort_events(trace), first_ns = UINT64_MAX, next = 0;
  for (uint64_t i = 0; i < count; i++)
    if (trace->events[trace->order[i]].start_ns < first_ns)
      first_ns = trace->events[trace->order[i]].start_ns;
  put(out, BEGINNING "%llu,\"dropped_events\":%llu},\"traceEvents\":[", (unsigned long long)count,
      (unsigned long long)flap_trace_dropped(trace));
  put_separator(out);
  put(out, "{\"ph\":\"M\",\"pid\":1,\"name\":\"process_name\",\"args\":{\"name\":\"flap\"}}");
  for (uint32_t lane = 0; lane < FLAP_TRACE_LANE_COUNT; lane++)
    next = put_lane(out, trace, lane, next, count, first_ns);
  put(out, "\n]}\n");
  flush(out);
}

flap_status flap_trace_write(flap_trace *trace, const char *path) {
  trace_out out;
  out.status = FLAP_OK;
  out.used = 0;
  out.needs_comma = false;
  FLAP_TRY(flap_durable_begin_file(&out.file, path));
  put_all(&out, trace);
  if (out.status != FLAP_OK) {
    flap_durable_abort_file(&out.file);
    return out.status;
  }
  return flap_durable_commit_file(&out.file);
}

bool flap_trace_is_one(const char *path) {
  char text[sizeof BEGINNING - 1];
  const int fd = flap_system_open(path, O_RDONLY | O_NONBLOCK | O_CLOEXEC, 0);
  if (fd < 0)
    return false;
  const bool is_one =
      flap_system_read(fd, text, sizeof text) == (ssize_t)sizeof text && memcmp(text, BEGINNING, sizeof text) == 0;
  (void)flap_system_close(fd);
  return is_one;
}
