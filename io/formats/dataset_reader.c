/* Invariants, under the lock:
 *  1. slots are a ring: `ready` filled ones start at `head`; the consumer holds the one before it;
 *  2. the thread fills one slot at a time, outside the lock, and only a free one: ready + held + filling <= depth;
 *  3. after a failed fill the thread waits until next() has handed the failure out.
 */
#include "io/formats/dataset_reader.h"

#include "base/assert.h"

#include <pthread.h>
#include <stdio.h>
#include <string.h>

#define STACK_BYTES (256u << 10)
#define MESSAGE_BYTES 512u

struct flap_reader {
  const flap_dataset *dataset;
  uint32_t sequences, depth;
  uint64_t batch_tokens;
  int32_t *tokens, *targets; /* (depth, sequences, S) */
  pthread_t thread;
  pthread_mutex_t lock;
  pthread_cond_t wake_thread, wake_consumer;
  uint64_t cursor;      /* of the next next() */
  uint64_t fill_cursor; /* of the next fill */
  uint32_t head, ready;
  bool held; /* slot head-1 is with the consumer */
  bool stop;
  flap_status failure; /* FLAP_OK: none waits */
  char message[MESSAGE_BYTES];
};

static int32_t *slot_of(int32_t *base, const flap_reader *reader, uint32_t slot) {
  return base + (uint64_t)slot * reader->batch_tokens;
}

static bool may_fill(const flap_reader *reader) {
  return reader->failure == FLAP_OK && reader->ready + (reader->held ? 1u : 0u) < reader->depth;
}

static void *fill_ring(void *argument) {
  flap_reader *reader = argument;
  (void)pthread_mutex_lock(&reader->lock);
  for (;;) {
    while (!reader->stop && !may_fill(reader))
      (void)pthread_cond_wait(&reader->wake_thread, &reader->lock);
    if (reader->stop)
      break;
    uint32_t slot = (reader->head + reader->ready) % reader->depth;
    uint64_t cursor = reader->fill_cursor;
    (void)pthread_mutex_unlock(&reader->lock);
    flap_status status =
        flap_dataset_fetch(reader->dataset, cursor, reader->sequences, slot_of(reader->tokens, reader, slot),
                           slot_of(reader->targets, reader, slot));
    (void)pthread_mutex_lock(&reader->lock);
    if (status == FLAP_OK) {
      reader->ready++;
      reader->fill_cursor += reader->sequences;
    } else {
      reader->failure = status;
      (void)snprintf(reader->message, sizeof reader->message, "%s", flap_error_message());
    }
    (void)pthread_cond_signal(&reader->wake_consumer);
  }
  (void)pthread_mutex_unlock(&reader->lock);
  return NULL;
}

/* The same takes for measuring and for opening. NULL while measuring. */
static flap_reader *take(const flap_reader_config *config, flap_arena *arena) {
  flap_assert(config->sequences > 0 && config->depth >= 2 && config->sequence_length > 0);
  uint64_t tokens = (uint64_t)config->sequences * config->sequence_length;
  flap_reader *reader = flap_arena_take(arena, sizeof *reader, 64);
  uint64_t bytes = (tokens * config->depth * sizeof(int32_t) + 63) / 64 * 64;
  int32_t *inputs = flap_arena_take(arena, bytes, 64);
  int32_t *targets = flap_arena_take(arena, bytes, 64);
  if (reader == NULL)
    return NULL;
  *reader = (flap_reader){.dataset = config->dataset,
                          .sequences = config->sequences,
                          .depth = config->depth,
                          .batch_tokens = tokens,
                          .tokens = inputs,
                          .targets = targets,
                          .cursor = config->cursor,
                          .fill_cursor = config->cursor};
  return reader;
}

uint64_t flap_reader_measure(const flap_reader_config *config) {
  flap_arena arena;
  flap_arena_measure(&arena, "reader");
  (void)take(config, &arena);
  return (arena.bytes_used + 63) / 64 * 64;
}

flap_status flap_reader_open(const flap_reader_config *config, flap_arena *arena, flap_reader **reader_out) {
  *reader_out = NULL;
  flap_reader *reader = take(config, arena);
  if (reader == NULL)
    return FLAP_OK;
  flap_assert(config->dataset != NULL && flap_dataset_sequence_length(config->dataset) == config->sequence_length);
  (void)pthread_mutex_init(&reader->lock, NULL);
  (void)pthread_cond_init(&reader->wake_thread, NULL);
  (void)pthread_cond_init(&reader->wake_consumer, NULL);
  pthread_attr_t attributes;
  int error = pthread_attr_init(&attributes);
  if (error == 0) {
    (void)pthread_attr_setstacksize(&attributes, STACK_BYTES);
    error = pthread_create(&reader->thread, &attributes, fill_ring, reader);
    (void)pthread_attr_destroy(&attributes);
  }
  if (error != 0) {
    (void)pthread_mutex_destroy(&reader->lock);
    (void)pthread_cond_destroy(&reader->wake_thread);
    (void)pthread_cond_destroy(&reader->wake_consumer);
    (void)flap_error_set_os(error, "dataset: cannot start the thread that reads ahead");
    return FLAP_NO_MEMORY;
  }
  *reader_out = reader;
  return FLAP_OK;
}

flap_status flap_reader_next(flap_reader *reader, const int32_t **tokens_out, const int32_t **targets_out) {
  *tokens_out = *targets_out = NULL;
  (void)pthread_mutex_lock(&reader->lock);
  reader->held = false; /* what the last call gave is given back */
  (void)pthread_cond_signal(&reader->wake_thread);
  while (reader->ready == 0 && reader->failure == FLAP_OK)
    (void)pthread_cond_wait(&reader->wake_consumer, &reader->lock);
  flap_status status = FLAP_OK;
  if (reader->ready > 0) {
    *tokens_out = slot_of(reader->tokens, reader, reader->head);
    *targets_out = slot_of(reader->targets, reader, reader->head);
    reader->head = (reader->head + 1) % reader->depth;
    reader->ready--;
    reader->held = true;
    reader->cursor += reader->sequences;
  } else {
    status = flap_error_set(reader->failure, "%s", reader->message);
    reader->failure = FLAP_OK; /* the thread tries again */
    (void)pthread_cond_signal(&reader->wake_thread);
  }
  (void)pthread_mutex_unlock(&reader->lock);
  return status;
}

/* The cursor is the consumer's own: no lock. */
uint64_t flap_reader_cursor(const flap_reader *reader) {
  return reader->cursor;
}

void flap_reader_close(flap_reader *reader) {
  if (reader == NULL)
    return;
  (void)pthread_mutex_lock(&reader->lock);
  reader->stop = true;
  (void)pthread_cond_signal(&reader->wake_thread);
  (void)pthread_mutex_unlock(&reader->lock);
  (void)pthread_join(reader->thread, NULL);
  (void)pthread_mutex_destroy(&reader->lock);
  (void)pthread_cond_destroy(&reader->wake_thread);
  (void)pthread_cond_destroy(&reader->wake_consumer);
}
