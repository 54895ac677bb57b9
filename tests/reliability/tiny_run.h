/* A whole life of a tiny model, in process and in tens of milliseconds: text made a token shard, trained, interrupted
 * after a checkpoint, resumed, trained to its end and exported. What the tests of reliability break, repair, and
 * compare to the bit.
 *
 * The folder lies in /dev/shm where that is there: what is tested is which calls are made, and not the disk.
 */
#ifndef FLAP_TESTS_RELIABILITY_TINY_RUN_H
#define FLAP_TESTS_RELIABILITY_TINY_RUN_H

#include "base/status.h"

#include <stdbool.h>
#include <stdint.h>

#define TINY_STEPS 4u
#define TINY_INTERRUPT 1u /* the first part of the life ends after so many steps, with a checkpoint */
#define TINY_PATH_MAX 512u

typedef enum tiny_kind {
  TINY_IN_RAM,  /* all data stay in RAM: most system calls are those of files that must last */
  TINY_ON_DISK, /* with the least vram and ram that works, so nearly all data stream from extent files, by threads;
                   checkpoints share those of the states, and updates are folded into the next step */
  TINY_TWICE,   /* the same, but updates happen in a second backward */
  TINY_COPIED,  /* the same, but checkpoints are copies, as where the disk is on another file system */
  TINY_ON_URING /* as TINY_ON_DISK by io_uring, where the system allows it, and else by threads */
} tiny_kind;

typedef struct tiny_run {
  tiny_kind kind;
  char folder[TINY_PATH_MAX];   /* of this life; its output is in `out`, the export in `exported` */
  uint64_t saved_step;          /* of the newest checkpoint that the run said was saved */
  uint64_t resumed_step;        /* where the newest call of tiny_run_live went on from; 0: from the start */
  void (*saved)(uint64_t step); /* called after each checkpoint; may be NULL */
  bool removals_fail;           /* for ever: names may stay that should not */
  const char *phase;            /* what is going on: for messages */
} tiny_run;

/* A folder of its own with data in it, and FLAP_MACHINE set, so that nothing is measured. Failures end the process. */
void tiny_run_open(tiny_run *run, tiny_kind kind);
/* Everything that training and exporting wrote goes; the data stay. */
void tiny_run_clear(tiny_run *run);
/* Removes the folder. */
void tiny_run_close(tiny_run *run);

/* The life, from its start. */
FLAP_CHECKED flap_status tiny_run_live(tiny_run *run);
/* What a person does after a failure: the same commands again. TINY_IN_RAM trains with resume_from_checkpoint: auto,
 * whatever is there; the others with `true` where there is a checkpoint, and else with overwrite_output_dir. Ends where
 * tiny_run_live ends. */
FLAP_CHECKED flap_status tiny_run_repair(tiny_run *run);
/* All that must be the same to the bit at the end: the shard, every file of the last checkpoint but those of states,
 * the states however they are kept, the trained model, the exported model, and loss and norm of each step. The pages of
 * any checkpoint that is there must be what was saved. A text that names what is missing, or "" and the digest. Static
 * storage. */
const char *tiny_run_digest(const tiny_run *run, uint64_t *digest_out);

#endif
