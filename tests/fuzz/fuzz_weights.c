/* A model's weights through the loader, and the optimizer's states as they are resumed: the first byte says which file
 * of a checkpoint the rest is (a header and data, see fuzz_rig.h); the other files are good ones. */
#include "engine/store/weights.h"
#include "tests/engine/weights_rig.h"
#include "tests/fuzz/fuzz_rig.h"

#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

static const char *const names[] = {"model",
                                    "model", /* once as weights alone, once to be resumed */
                                    "optimizer-low",
                                    "optimizer-exp_avg",
                                    "optimizer-exp_avg_sq",
                                    "optimizer-exp_avg-codes",
                                    "optimizer-exp_avg_sq-codes",
                                    "optimizer-exp_avg-largest",
                                    "optimizer-exp_avg_sq-largest"};
#define NAMES (sizeof names / sizeof *names)

static const char *file_in(const char *folder, const char *name) {
  char path[128];
  (void)snprintf(path, sizeof path, "%s/%s.safetensors", folder, name);
  return fuzz_path(path);
}

/* As small as a model can be, so that inputs are. */
static void start(weights_rig *rig) {
  flap_model_config config = {.family = flap_model_find_family("llama"),
                              .vocab_size = 3,
                              .hidden_size = 2,
                              .intermediate_size = 2,
                              .num_hidden_layers = 1,
                              .num_attention_heads = 1,
                              .num_key_value_heads = 1,
                              .max_position_embeddings = 4,
                              .rms_norm_eps = 1e-5,
                              .initializer_range = 0.02,
                              .rope = {.theta = 10000}};
  fuzz_must(flap_model_finish_config(&config) == FLAP_OK, "there is such a model");
  fuzz_folder("good");
  fuzz_folder("in");
  rig_open_optim(rig, &config, FLAP_BF16, FLAP_OPTIM_ADAMW_8BIT, FLAP_MODE_TRAIN, &rig_placements[0], fuzz_path(""));
  fuzz_must(flap_weights_init(rig->pager, &rig->layout, 1) == FLAP_OK, "weights can be made");
  fuzz_must(flap_weights_save_all(rig->pager, &rig->layout, fuzz_path("good"), UINT64_MAX, (flap_file_piece){0},
                                  NULL) == FLAP_OK,
            "they are saved");
  for (size_t i = 1; i < NAMES; i++)
    fuzz_must(link(file_in("good", names[i]), file_in("in", names[i])) == 0, "a file can have two names");
  fuzz_must(flap_weights_resume(rig->pager, &rig->layout, fuzz_path("in"), NULL) == FLAP_OK, "the good files are good");
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes) {
  static weights_rig *rig; /* stays open: its threads end with the process */
  if (!rig) {
    rig = malloc(sizeof *rig);
    start(rig);
  }
  if (bytes == 0)
    return 0;
  const size_t which = data[0] % NAMES;
  char name[128];
  (void)snprintf(name, sizeof name, "in/%s.safetensors", names[which]);
  fuzz_must(unlink(fuzz_path(name)) == 0, "a name can be taken away");
  fuzz_write_safetensors(name, data + 1, bytes - 1);
  flap_status status = which == 0 ? flap_weights_load(rig->pager, &rig->layout, fuzz_path("in"))
                                  : flap_weights_resume(rig->pager, &rig->layout, fuzz_path("in"), NULL);
  if (status != FLAP_OK)
    fuzz_refused(status, fuzz_path("in"));
  fuzz_must(unlink(fuzz_path(name)) == 0 && link(file_in("good", names[which]), fuzz_path(name)) == 0,
            "the good file can be put back");
  return 0;
}
