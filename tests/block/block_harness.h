/* What the tests of io/block share: an opened block with its folders and buffers, and random programs over it that are
 * checked against a model in memory. */
#ifndef FLAP_TESTS_BLOCK_BLOCK_HARNESS_H
#define FLAP_TESTS_BLOCK_BLOCK_HARNESS_H

#include "io/block/block.h"

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>

typedef struct block_harness {
  flap_block_config config; /* set what you like before harness_open */
  flap_block *block;
  unsigned char *memory;
  char folders[FLAP_BLOCK_DISKS_MAX][64];
  pthread_mutex_t mutex;
  pthread_cond_t news;
  uint64_t notices; /* under the mutex */
} block_harness;

/* A configuration with `disk_count` folders made under `parent`; sizes are in stripes. */
void harness_init(block_harness *harness, flap_block_backend backend, const char *parent, uint32_t disk_count,
                  const uint64_t *stripes, uint64_t stripe_bytes, uint64_t memory_bytes);
/* Opens and asserts success. */
void harness_open(block_harness *harness);
/* Closes and removes folders; asserts that they are empty. */
void harness_close(block_harness *harness);

/* The next completed request; sleeps until there is one. */
flap_block_request *harness_wait(block_harness *harness);
/* One request, from submit to poll. */
void harness_run(block_harness *harness, flap_block_request *request);

/* `count` random reads and writes of random sizes at random places, several in flight, never overlapping; every byte
 * read is compared with what the model says was last written there. Asserts. */
void harness_random_program(block_harness *harness, uint64_t seed, uint32_t count);

/* Asserts that opening fails with this status and this text in the message, and leaves no descriptor open. */
void harness_check_refused(const flap_block_config *config, flap_status status, const char *text);

bool harness_folder_is_empty(const char *path);
uint32_t harness_count_descriptors(void);
/* Runs fn in a child process, so that what it does to the process does not last; its result, or -1 for a crash. */
int harness_in_child(int (*fn)(void *context), void *context);

#endif
