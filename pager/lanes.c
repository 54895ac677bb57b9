/* The two copy lanes: a bounded window of copies on each of the device's copy streams.
 *
 * A stream is first in, first out, so copies are retired from the head of the window, one event each. The window is
 * bounded so that a lease that is needed first never stands behind everything that was ready before it.
 */
#include "pager/pager_internal.h"

#include "base/assert.h"

bool pager_lane_has_room(const pager_lane *lane) {
  return lane->issued - lane->retired < PAGER_WINDOW && lane->bytes < PAGER_WINDOW_BYTES;
}

void pager_lane_copy(flap_pager *pager, pager_lane *lane, void *to, const void *from, const pager_copy *copy) {
  flap_assert(pager_lane_has_room(lane));
  uint64_t number = lane->issued++;
  lane->copies[number % PAGER_WINDOW] = *copy;
  lane->labels[number % PAGER_LABELS] = copy->region;
  lane->bytes += copy->bytes;
  flap_device_copy(pager->device, lane->stream, to, from, copy->bytes);
  flap_device_event_record(pager->device, lane->first_event + (flap_event)(number % PAGER_WINDOW), lane->stream, true);
  if (copy->slot != PAGER_NONE)
    pager->slots[copy->slot].copies_left++;
}

static void retire(flap_pager *pager, pager_lane *lane, const pager_copy *copy) {
  flap_assert(lane->bytes >= copy->bytes);
  lane->bytes -= copy->bytes;
  if (copy->slot == PAGER_NONE) { /* fill and drain look at the counter, the drain of a snapshot at its buffer */
    if (copy->buffer != PAGER_NONE)
      pager->buffers[copy->buffer].state = BUFFER_VERIFIED;
    return;
  }
  pager->stats.bytes[lane->lane] += copy->bytes;
  flap_assert(pager->slots[copy->slot].copies_left > 0);
  pager->slots[copy->slot].copies_left--;
  if (lane->lane == FLAP_LANE_D2H) {
    pager_stores_copied(pager, copy);
    return;
  }
  pager->regions[copy->region].loading--;
  if (copy->buffer != PAGER_NONE)
    pager_buffer_free(pager, copy->buffer);
}

bool pager_lane_retire(flap_pager *pager, pager_lane *lane) {
  bool progress = false;
  while (lane->retired < lane->issued) {
    uint32_t place = (uint32_t)(lane->retired % PAGER_WINDOW);
    if (!flap_device_event_done(pager->device, lane->first_event + place))
      break;
    retire(pager, lane, &lane->copies[place]);
    lane->retired++;
    progress = true;
  }
  return progress;
}

/* On the copying thread. Copies of a stream are told in the order in which they were enqueued, which names them; work
 * on the compute stream comes with its label in place of the bytes. */
void pager_lane_traced(void *context, flap_stream stream, uint64_t started_ns, uint64_t ended_ns, uint64_t bytes) {
  flap_pager *pager = context;
  if (stream == FLAP_STREAM_COMPUTE) {
    if (pager->trace_compute)
      pager->trace_compute(pager->trace_context, bytes, started_ns, ended_ns);
    return;
  }
  pager_lane *lane = stream == FLAP_STREAM_H2D ? &pager->h2d : &pager->d2h;
  uint32_t region = lane->labels[lane->traced++ % PAGER_LABELS];
  pager->trace(pager->trace_context, lane->lane, region, started_ns, ended_ns, bytes);
}
