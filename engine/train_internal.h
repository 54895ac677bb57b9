/* Private to training: a run, and what its files do for each other. */
#ifndef FLAP_ENGINE_TRAIN_INTERNAL_H
#define FLAP_ENGINE_TRAIN_INTERNAL_H

#include "engine/evaluate.h"
#include "engine/planner/prepare.h"
#include "engine/step/schedule.h"
#include "engine/store/checkpoint.h"
#include "engine/store/finished.h"
#include "engine/store/run_lock.h"
#include "engine/store/saver.h"
#include "io/formats/metrics.h"
#include "io/formats/trace.h"

#include <stdio.h>

#define TRAINER_TIMES_MAX 1024 /* the newest steady steps, for the median */

typedef struct trainer {
  const flap_run_config *config;
  flap_observer observer;
  const volatile sig_atomic_t *stop; /* may be NULL */
  flap_train_result *result;
  uint64_t started_ns;

  flap_prepared prepared;
  flap_companions companions;
  flap_dataset *dataset;
  flap_metrics *metrics;
  flap_runtime runtime;
  flap_run_lock lock;        /* of output_dir */
  flap_room room, line_room; /* in output_dir: for checkpoints and the export, for lines of metrics.jsonl */
  uint64_t shared_bytes;     /* of the checkpoint begun last, those that it shares */
  uint64_t room_checkpoints; /* that must have room */
  flap_write_behind behind;  /* that writes them */
  bool opened, made_output;
  char resume_folder[FLAP_PATH_MAX]; /* "": from the start */
  flap_trainer_state state;          /* read from it */
  bool goes_on_here;                 /* it stands in output_dir, and what else is there is of the same run */
  bool clears;                       /* what an earlier run left in output_dir goes before the first file is written */
  flap_finished finished;            /* an earlier life that came to its end here; with resume_from_checkpoint: auto */

  /* The evaluation of the step that the run goes on from, in metrics.jsonl; no tokens: there is none. */
  flap_eval_report on_record;
  uint64_t sequences, step_sequences; /* of an epoch; of a step */
  uint64_t steps, warmup;
  uint64_t step, cursor; /* done; training sequences consumed */
  flap_saver saver;
  uint64_t saved_step; /* of the newest checkpoint that is durable */
  uint64_t saved_ns;   /* when that, or the save in progress, or the loop began */
  uint64_t due_step;   /* after which save_minutes wants one; 0: none yet */
  bool pending;        /* the last step's update waits for the next program */
  uint64_t runs[FLAP_SETUP_PROGRAM_COUNT];
  uint64_t predicted[FLAP_SETUP_PROGRAM_COUNT][FLAP_LANE_COUNT];
  double times[TRAINER_TIMES_MAX];
  uint64_t time_count;
  double usual_seconds; /* of a step, of late */
} trainer;

/* ---- train_loop.c: the steps --------------------------------------------------------------------------------- */

FLAP_CHECKED flap_status trainer_loop(trainer *t);

/* ---- train_output.c: output_dir ------------------------------------------------------------------------------ */

bool trainer_is_auto(const flap_run_config *config); /* resume_from_checkpoint: auto */
/* Locks the folder, if it is there, and finds where the run starts: resume_folder, state, finished. Errors name the key
 * and what to do. result->complete: there is nothing left to do. */
FLAP_CHECKED flap_status trainer_take_output(trainer *t);
/* Makes it, once the plan is known, with room for a checkpoint and the trained model. */
FLAP_CHECKED flap_status trainer_make_output(trainer *t);
/* A run of so many steps may have come to its end there: then result->complete, or FLAP_INVALID. */
FLAP_CHECKED flap_status trainer_check_finished(trainer *t, uint64_t steps);
/* Room for all checkpoints that are there at once, once it is known how many the run writes. */
FLAP_CHECKED flap_status trainer_check_space(trainer *t);

/* ---- train_saves.c: checkpoints ------------------------------------------------------------------------------ */

void trainer_numerics_key(const trainer *t, char key[FLAP_NUMERICS_MAX]);
flap_artifacts trainer_artifacts(trainer *t);
/* At rest, with nothing pending: waits for the checkpoint. */
FLAP_CHECKED flap_status trainer_save(trainer *t);
/* Begins a checkpoint of the present step, between two programs: at rest, or with the next one queued. `read_by_step`:
 * a step reads all states as it has them before anybody waits for it. */
FLAP_CHECKED flap_status trainer_begin_save(trainer *t, bool read_by_step);
/* A program ran well: the one that makes the update that is saved, or one that reads what is. */
void trainer_approve_save(trainer *t);
/* What came of a save that was begun, if it is over or `wait`. */
FLAP_CHECKED flap_status trainer_collect_save(trainer *t, bool wait);
/* The run ends with the error that is on record, and stays so: a checkpoint in the works is finished or given up. */
void trainer_end_save(trainer *t, flap_status status);

/* ---- train.c: what is before the steps and after them, and evaluations between them ------------------------------ */

/* Of the first step of this life: taken from metrics.jsonl where an earlier life made it. */
FLAP_CHECKED flap_status trainer_evaluate_first(trainer *t);
/* Given up, without a trace, when the person wants to stop. */
FLAP_CHECKED flap_status trainer_evaluate(trainer *t);

#endif
