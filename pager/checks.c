/* What is done to the bytes of buffers between disk and copies, and by whom.
 *
 * A buffer that was read is verified and unpacked, one that is full is packed and summed up (compression.c). Workers do
 * that, several buffers at a time, what is needed first before the rest; the pump hands buffers over, goes on, and
 * takes them further when they are done:
 *
 *   read or full ──add──► waiting ──worker_thread──► under way ──worker_thread──► done ──collect──► verified or packed
 *
 * What does not agree with its checksum, or cannot be decoded, is read once more, the whole request; then the pager
 * fails.
 *
 * A buffer that is read or full is nobody's but its worker's, and the table entries of its pages stay as they are,
 * since a page is neither read nor written while it is written: so nothing of this needs the pager's lock. Waking a
 * worker takes longer than summing up a small buffer; those are done by the pump.
 */
#include "pager/pager_internal.h"

#include "base/log.h"
#include "base/thread.h"

#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>

#define CORRUPT_TEXT_MAX 512u
#define WARNINGS_EACH 16u /* of reading again; then those whose number is a power of two */

uint64_t pager_small_bytes = 64u << 10; /* a few microseconds of summing up */

/* ---- bytes, without the lock ---------------------------------------------------------------------------- */

static bool is_read(const flap_pager *pager, uint32_t index) {
  return index < pager->read_buffers || pager_is_snapshot_buffer(pager, index);
}

static void work_on(flap_pager *pager, uint32_t index, pager_packing packing, const pager_scratch *scratch,
                    pager_packed *packed_out) {
  pager_buffer *buffer = &pager->buffers[index];
  if (is_read(pager, index)) {
    buffer->corrupt_page = buffer->pooled ? pager_pool_unpack(pager, buffer, scratch, packed_out)
                                          : pager_unpack(pager, buffer, scratch, packed_out);
    return;
  }
  buffer->pooled = buffer->pooled && pager_pool_pack(pager, buffer, scratch, packed_out);
  if (buffer->pooled)
    return;
  pager_pool_forget(pager, buffer);
  pager_pack(pager, buffer, packing, scratch, packed_out);
}

static pager_packing choose(flap_pager *pager, uint32_t index) {
  pager_buffer *buffer = &pager->buffers[index];
  if (is_read(pager, index))
    return PACKING_PLAIN;
  buffer->pooled = pager_pool_wants(pager, buffer);
  return pager_compression_choose(pager, buffer); /* for the disk, where the pool does not take it */
}

/* ---- what follows, with it ------------------------------------------------------------------------------- */

/* The page of the buffer that is not what was written, where it lies, and how much there is of it. */
static const char *name_corrupt(flap_pager *pager, uint32_t index, char text[CORRUPT_TEXT_MAX]) {
  const pager_buffer *buffer = &pager->buffers[index];
  const uint32_t number = buffer->first_page + buffer->corrupt_page;
  const pager_page *page = pager_pages_of(pager, &pager->regions[buffer->region]) + number;
  uint64_t place = pager_disk_offset(page);
  if (pager->buffers[index].pooled) {
    (void)snprintf(text, CORRUPT_TEXT_MAX,
                   "ram: region %u, page %u: the %u bytes in the pool are not what was put there (writing %u)",
                   buffer->region, number, page->stored_bytes, page->epoch);
    return text;
  }
  const char *disk = page->file > 0 ? pager->shared_folder : flap_block_locate(pager->block, place, &place);
  (void)snprintf(text, CORRUPT_TEXT_MAX,
                 "disk %.300s: region %u, page %u: the %u bytes at byte %llu are not what was written there "
                 "(writing %u)",
                 disk, buffer->region, number, page->stored_bytes, (unsigned long long)place, page->epoch);
  return text;
}

static void fail_corrupt(flap_pager *pager, uint32_t index) {
  char text[CORRUPT_TEXT_MAX];
  if (pager->buffers[index].pooled)
    pager_fail(pager, flap_error_set(FLAP_CORRUPT,
                                     "%s: this machine's memory lost or damaged them; test it, then go on from the "
                                     "last checkpoint with resume_from_checkpoint: true",
                                     name_corrupt(pager, index, text)));
  else
    pager_fail(pager, flap_error_set(FLAP_CORRUPT,
                                     "%s, and were not when they were read again: the disk lost, mixed up or damaged "
                                     "them; look into the system's log and check the disk, then go on from the last "
                                     "checkpoint with resume_from_checkpoint: true, on another disk if in doubt",
                                     name_corrupt(pager, index, text)));
  pager_buffer_free(pager, index);
}

/* Once: what a bus or a controller's memory turned over on the way comes right by that, what lies on the disk does not.
 * A drive that does so all the time is told of again and again, but not in each line of the log. */
static void read_again(flap_pager *pager, uint32_t index) {
  char text[CORRUPT_TEXT_MAX];
  pager_buffer *buffer = &pager->buffers[index];
  const uint64_t count = ++pager->stats.reread;
  if (count <= WARNINGS_EACH || (count & (count - 1)) == 0)
    flap_log(FLAP_LOG_WARNING, "%s: reading them again (the %llu. time in this run)", name_corrupt(pager, index, text),
             (unsigned long long)count);
  buffer->again = true;
  buffer->state = BUFFER_READING;
  pager_buffer_read(pager, index);
}

static void take_further(flap_pager *pager, uint32_t index) {
  if (!is_read(pager, index)) {
    pager_buffer_write(pager, index);
  } else if (pager->has_bytes && pager->buffers[index].corrupt_page < pager->buffers[index].page_count) {
    (pager->buffers[index].again ? fail_corrupt : read_again)(pager, index);
  } else {
    pager_loads_verified(pager, index);
  }
}

/* A buffer waits, is under way or is done with: so both ends of the array have room. */
static uint32_t *worked_at(const flap_pager *pager, uint32_t number) {
  return &pager->works.of[pager->buffer_count - 1 - number];
}

static bool collect(flap_pager *pager) {
  if (atomic_load(&pager->works_done) == pager->works_collected)
    return false;
  pthread_mutex_lock(&pager->work_lock);
  while (pager->worked_count > 0 && pager->error == FLAP_OK) {
    const uint32_t index = *worked_at(pager, --pager->worked_count);
    pthread_mutex_unlock(&pager->work_lock);
    pager->works_collected++;
    take_further(pager, index);
    pthread_mutex_lock(&pager->work_lock);
  }
  pthread_mutex_unlock(&pager->work_lock);
  return true;
}

/* ---- who works -------------------------------------------------------------------------------------------- */

/* Where anything may be compressed, only workers have the memory for it. */
static bool is_for_pump(const flap_pager *pager, const pager_buffer *buffer) {
  return pager->worker_count == 0 ||
         (!pager->compresses && buffer->page_count * pager->page_bytes <= pager_small_bytes);
}

/* Without the pager's lock. */
static void work_here(flap_pager *pager, uint32_t index) {
  pager_packed packed;
  pthread_mutex_lock(&pager->work_lock);
  const pager_packing packing = choose(pager, index);
  pthread_mutex_unlock(&pager->work_lock);
  work_on(pager, index, packing, &pager->workers[0].scratch, &packed);
  pthread_mutex_lock(&pager->work_lock);
  pager_compression_learn(pager, &pager->buffers[index], &packed);
  pthread_mutex_unlock(&pager->work_lock);
}

void pager_checks_add(flap_pager *pager, uint32_t index) {
  if (pager->error != FLAP_OK || pager_codec_simulate(pager, index))
    return;
  if (!pager->has_bytes || is_for_pump(pager, &pager->buffers[index])) {
    pager_heap_add(pager, &pager->checks, index);
    return;
  }
  pthread_mutex_lock(&pager->work_lock);
  pager_heap_add(pager, &pager->works, index);
  pthread_cond_signal(&pager->work_wake);
  pthread_mutex_unlock(&pager->work_lock);
}

/* What is needed first; of a lease that both reads and waits for its slot's last occupant, any. */
bool pager_checks_advance(flap_pager *pager) {
  const bool progress = collect(pager);
  pager_compression_watch(pager);
  if (pager->checks.count == 0 || pager->error != FLAP_OK)
    return progress;
  const uint32_t first = pager_heap_take(pager, &pager->checks);
  if (pager->has_bytes) {
    pager_leave(pager);
    work_here(pager, first);
    pager_lock(pager);
  }
  take_further(pager, first);
  return true;
}

static void *worker_thread(void *context) {
  pager_worker *worker = context;
  flap_pager *pager = worker->pager;
  flap_thread_prefer_latency();
  pthread_mutex_lock(&pager->work_lock);
  for (;;) {
    uint32_t index = PAGER_NONE;
    while (!pager->work_stop && (index = pager_heap_take(pager, &pager->works)) == PAGER_NONE)
      pthread_cond_wait(&pager->work_wake, &pager->work_lock);
    if (pager->work_stop)
      break;
    pager_packed packed;
    const pager_packing packing = choose(pager, index);
    pthread_mutex_unlock(&pager->work_lock);
    work_on(pager, index, packing, &worker->scratch, &packed);
    pthread_mutex_lock(&pager->work_lock);
    pager_compression_learn(pager, &pager->buffers[index], &packed);
    *worked_at(pager, pager->worked_count++) = index;
    atomic_fetch_add(&pager->works_done, 1);
    pthread_mutex_unlock(&pager->work_lock);
    pager_ring_bell(pager);
    pthread_mutex_lock(&pager->work_lock);
  }
  pthread_mutex_unlock(&pager->work_lock);
  return NULL;
}

/* Signals are for the threads of the program. */
flap_status pager_checks_open(flap_pager *pager) {
  sigset_t all, before;
  int error = 0;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  while (error == 0 && pager->workers_started < pager->worker_count) {
    pager_worker *worker = &pager->workers[pager->workers_started];
    worker->pager = pager;
    error = pthread_create(&worker->thread, NULL, worker_thread, worker);
    pager->workers_started += error == 0;
  }
  pthread_sigmask(SIG_SETMASK, &before, NULL);
  return error ? flap_error_set_os(error, "pager: cannot start thread %u of %u that check what the disk holds",
                                   pager->workers_started + 1, pager->worker_count)
               : FLAP_OK;
}

void pager_checks_close(flap_pager *pager) {
  pthread_mutex_lock(&pager->work_lock);
  pager->work_stop = true;
  pthread_cond_broadcast(&pager->work_wake);
  pthread_mutex_unlock(&pager->work_lock);
  for (uint32_t i = 0; i < pager->workers_started; i++)
    pthread_join(pager->workers[i].thread, NULL);
  pager->workers_started = 0;
}
