/* What the engine tests share: a small model that is trained in memory by the executor, as the train loop would, in
 * whatever placement a test asks for; and all of its bits afterwards, in an order that no placement changes.
 *
 * A rig_model is what decides the numbers, a rig_place and a flap_choice (or a plan) are what must not. Failures end
 * the test. Disks are folders that are gone with the rig: in memory (/dev/shm), because the first write to each place
 * of a real disk can take 15 ms; or beside the test program, where a test wants the real thing.
 */
#ifndef FLAP_TESTS_ENGINE_RIG_H
#define FLAP_TESTS_ENGINE_RIG_H

#include "engine/planner/planner.h"
#include "engine/run/runtime.h"

#include <check.h>

#define RIG_STEPS_MAX 16u
#define RIG_DISKS_MAX 3u
#define RIG_PATH_MAX 512u
#define RIG_EVERYTHING (UINT64_MAX / 4)
#define MUST(call) ck_assert_msg((call) == FLAP_OK, "%s: %s", #call, flap_error_message())

typedef struct rig_model {
  flap_model_config config;
  flap_model_shape shape;
  uint32_t micro_batches;
  flap_dtype gradient_dtype;
  uint64_t seed;           /* of weights and data */
  const char *folder;      /* whose weights are loaded; NULL: from the seed */
  flap_run_config options; /* of the optimizer; max_steps is the length of the schedule */
  int32_t *tokens;         /* (max_steps, n, T), then the step that is evaluated. Owned */
  int32_t *targets;        /* the same; negative ones do not count */
} rig_model;

/* Two layers of 48 in bf16, grouped queries, biases, tied; two micro-batches of 2 × 24 tokens. No data yet. */
void rig_model_small(rig_model *model);
/* Random tokens, and targets of which one in eight does not count, for max_steps and an evaluation. */
void rig_model_random_data(rig_model *model);
void rig_model_close(rig_model *model);

typedef struct rig_place {
  uint32_t threads;
  flap_block_backend io;
  uint32_t disks;
  bool real_disks;
  bool weighted;                /* disks have different weights */
  flap_compression compression; /* auto: as on slow disks */
} rig_place;

typedef struct engine_rig {
  const rig_model *model;
  flap_setup_spec spec;
  char disks[RIG_DISKS_MAX][RIG_PATH_MAX];
  bool is_open;
  flap_setup setup; /* of the open run: numbers only, its lists are gone */
  flap_runtime runtime;
  bool pending;                        /* an update waits for the next step */
  uint64_t predicted[FLAP_LANE_COUNT]; /* bytes of a steady program */
} engine_rig;

/* Makes the folders and the specification; nothing is open yet. */
void rig_begin(engine_rig *rig, const rig_model *model, const rig_place *place);
/* Opens the run of a setup, which is used up, and fills it with the model's weights. */
void rig_open_setup(engine_rig *rig, flap_setup *setup, const flap_budgets *budgets);
/* The same with a choice and budgets of exactly what it takes. */
void rig_open_choice(engine_rig *rig, const flap_choice *choice);
void rig_shut(engine_rig *rig); /* the run; another may be opened */
void rig_close(engine_rig *rig);

/* A choice to change: all layers in one segment, all micro-batches in one group, no layer saves (if one did, it would
 * save all tensors), folded; slices of 16 blocks, pages of 16 KiB; everything in VRAM. */
flap_choice rig_choice_resident(const rig_model *model);
/* The same, but everything streams, from RAM or from disk. */
flap_choice rig_choice_streaming(const rig_model *model, bool from_disk);

/* ---- running --------------------------------------------------------------------------------------------- */

/* Part by part: weights, low halves (bf16) or masters (fp16), first moments, second moments; with adamw_8bit, but for
 * the embedding, these as codes, then the largest of first and of second moments. */
typedef struct rig_state {
  uint64_t bytes, digest;
  unsigned char *data; /* owned */
} rig_state;

typedef struct rig_result {
  double losses[RIG_STEPS_MAX], grad_norms[RIG_STEPS_MAX], learning_rates[RIG_STEPS_MAX], clips[RIG_STEPS_MAX];
  double loss_scales[RIG_STEPS_MAX], skipped[RIG_STEPS_MAX]; /* with fp16; skipped: 0 or 1 */
  uint32_t steps, evaluations;
  double evaluated[RIG_STEPS_MAX];
  rig_state state;
} rig_result;

/* How a row of steps ends. In a setup that sweeps every step updates at its end, whatever is asked for. */
typedef enum rig_ending {
  RIG_UPDATED, /* the last step's update happens at its end */
  RIG_SWEPT,   /* it stays pending, and a program of its own makes up for it: an interruption */
  RIG_PENDING  /* it stays pending */
} rig_ending;

/* Steps [first, end), each program begun before the one before it runs. At rest afterwards. */
void rig_train(engine_rig *rig, uint32_t first, uint32_t end, rig_ending ending, rig_result *result);
/* The loss of the evaluation's tokens, without an update. Nothing may be pending. */
void rig_evaluate(engine_rig *rig, rig_result *result);
/* One more step as rig_train (pending stays pending), alone between two looks at the pager's counters. */
void rig_measure_step(engine_rig *rig, uint32_t step, rig_result *result, uint64_t moved_out[FLAP_LANE_COUNT]);
/* Copies all weights and states. At rest only. */
void rig_read_state(engine_rig *rig, rig_state *state_out);
/* Where the weights of a part (embedding, layers, head) are in it. */
const unsigned char *rig_state_weights(const rig_model *model, const rig_state *state, uint32_t part);
void rig_result_close(rig_result *result);

/* The whole life of most tests: opens a choice, evaluates, trains in two stretches with an evaluation between,
 * evaluates and reads everything. */
void rig_run_choice(const rig_model *model, const rig_place *place, const flap_choice *choice, rig_ending ending,
                    rig_result *result_out);

/* ---- comparing ------------------------------------------------------------------------------------------- */

/* "" if every bit agrees, else what differs first; static storage. */
const char *rig_difference(const rig_model *model, const rig_result *a, const rig_result *b);
/* Turns one bit of a part's state over. `section`: 0 weights, 1 low halves (bf16) or masters (fp16), then the moments,
 * then what codes are relative to. At rest only. */
void rig_flip_bit(engine_rig *rig, uint32_t part, uint32_t section, uint64_t bit);
/* Bytes of the open files in the rig's folders. */
uint64_t rig_disk_file_bytes(const engine_rig *rig);

/* Runs the suite; the exit status. */
int rig_main(Suite *suite);

#endif
