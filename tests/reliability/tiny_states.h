/* The optimizer states of a checkpoint of the tiny model, whether they are in optimizer-*.safetensors or in pages that
 * the run's disk shares (engine/store/state_pages.h): the same states have the same digest. */
#ifndef FLAP_TESTS_RELIABILITY_TINY_STATES_H
#define FLAP_TESTS_RELIABILITY_TINY_STATES_H

#include <stdbool.h>
#include <stdint.h>

/* Of low halves and both moments of each tensor; mixed into *digest. Why that cannot be, or "". Static storage. */
const char *tiny_states_digest(const char *folder, uint64_t *digest);
/* Whether they are in pages; then each page was read and compared with its checksum, and `problem_out` says what is
 * wrong, or is "". */
bool tiny_states_are_pages(const char *folder, const char **problem_out);

#endif
