/* Writes a checkpoint of a small model, for weights_reference.py.
 * Usage: write_model <family> <bf16|fp16|fp32> <adamw|adamw_8bit> <tied: 0|1> <output_dir> */
#include "engine/store/checkpoint.h"
#include "engine/store/hf_config.h"
#include "engine/store/weights.h"
#include "tests/engine/weights_rig.h"

#include <check.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static flap_status write_checkpoint(weights_rig *rig, const flap_model_config *config, const char *output_dir) {
  flap_tokenizer *tokenizer = NULL;
  char folder[FLAP_PATH_MAX];
  FLAP_TRY(flap_tokenizer_open_bytes(&tokenizer));
  const flap_artifacts artifacts = {.model = config, .tokenizer = tokenizer};
  const flap_trainer_state state = {.step = 1, .optim = rig->layout.spec.optim};
  flap_status status = flap_weights_init(rig->pager, &rig->layout, 4);
  if (status == FLAP_OK)
    status = flap_checkpoint_save(output_dir, rig->pager, &rig->layout, &artifacts, &state, false, 0, folder);
  if (status == FLAP_OK)
    status = flap_weights_save(rig->pager, &rig->layout, output_dir, 40000, (flap_file_piece){0},
                               NULL); /* the same in shards */
  flap_tokenizer_close(tokenizer);
  return status;
}

int main(int argc, char **argv) {
  flap_model_config config;
  weights_rig rig;
  if (argc != 6)
    return EXIT_FAILURE;
  const bool mistral = strcmp(argv[1], "mistral") == 0;
  rig_model(strcmp(argv[4], "1") == 0, !mistral, &config);
  config.family = flap_model_find_family(argv[1]);
  if (config.family == NULL || flap_model_finish_config(&config) != FLAP_OK)
    return EXIT_FAILURE;
  const flap_dtype dtype = strcmp(argv[2], "bf16") == 0   ? FLAP_BF16
                           : strcmp(argv[2], "fp16") == 0 ? FLAP_F16
                                                          : FLAP_F32;
  const flap_optim optim = strcmp(argv[3], "adamw_8bit") == 0 ? FLAP_OPTIM_ADAMW_8BIT : FLAP_OPTIM_ADAMW;
  rig_open_optim(&rig, &config, dtype, optim, FLAP_MODE_TRAIN, &rig_placements[1], NULL);
  const flap_status status = write_checkpoint(&rig, &config, argv[5]);
  if (status != FLAP_OK)
    fprintf(stderr, "write_model: %s\n", flap_error_message());
  rig_close(&rig);
  return status == FLAP_OK ? EXIT_SUCCESS : EXIT_FAILURE;
}
