/* From a run configuration to what planning needs: model, tokenizer, machine, budgets; and from there to a setup and
 * its plan.
 *
 * Folder-private. Reads files and asks the system, takes nothing for the run itself, and finds bad input before
 * anything is taken.
 */
#ifndef FLAP_ENGINE_PLANNER_PREPARE_H
#define FLAP_ENGINE_PLANNER_PREPARE_H

#include "engine/machine/disk_rates.h"
#include "engine/planner/planner.h"
#include "io/formats/tokenizer.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct flap_prepared {
  const flap_run_config *config;
  flap_model_config model;
  flap_tokenizer
      *tokenizer;       /* NULL when the data are tokens already and nobody named one, or the model's cannot be read */
  flap_machine machine; /* its disk rates are those of all disks, with as many bytes on each as the setup has */
  flap_disk_set disks;
  const char *resume_folder; /* the checkpoint that the run goes on from, for its products; NULL or "": none */
  flap_matmul_choice matmuls;
  flap_op_times times;
  flap_planner planner;
  flap_budgets budgets;
  flap_setup setup; /* moves into the run */
  bool has_setup;
  bool quiet; /* planned by the dozen: what is not refused is not told either */
  flap_plan_costs costs;
  flap_plan plan;
} flap_prepared;

/* Model and tokenizer. For training from scratch `model` holds the model; otherwise model_name_or_path, whose weights
 * are checked too. */
FLAP_CHECKED flap_status flap_prepare_open(const flap_run_config *config, bool quiet, flap_prepared *prepared_out);
/* Whether all data are tokens already. */
bool flap_prepare_only_shards(const flap_run_config *config);
/* Lists of a step grow with layers times micro-batches, and the time to plan with them. 2^16 take about a minute on one
 * core: 2,048 micro-batches of 32 layers, or 520 of the 126 that the largest open models have. Beyond that a larger
 * micro-batch does the same and is faster. More layers than 1,024 are a slip: no model has a fifth of them. */
#define FLAP_PREPARE_LAYERS_MAX 1024u
#define FLAP_PREPARE_LAYER_PASSES_MAX 65536u
/* Micro-batches of this model that can be planned with, at least 64. */
uint32_t flap_prepare_micro_batches_max(const flap_model_config *model);
/* Budgets, then the best setup and its plan. `cache_positions`: sample mode. */
FLAP_CHECKED flap_status flap_prepare_plan(flap_prepared *prepared, flap_run_mode mode, uint32_t batch,
                                           uint32_t sequence, uint32_t micro_batches, uint32_t cache_positions);
/* How many bytes of the setup lie on each disk of the configuration. */
void flap_prepare_share_of_disks(const flap_prepared *prepared, uint64_t bytes_out[FLAP_RUN_DISKS_MAX]);
/* The setup as people see it. */
FLAP_CHECKED flap_status flap_plan_describe(const flap_prepared *prepared, flap_plan *plan_out);
void flap_prepare_close(flap_prepared *prepared);

#ifdef __cplusplus
}
#endif
#endif
