/* A pager with the regions of a small model on the cpu device, for the tests of weights and checkpoints: the same model
 * in different slices, pages and homes. */
#ifndef FLAP_TESTS_ENGINE_WEIGHTS_RIG_H
#define FLAP_TESTS_ENGINE_WEIGHTS_RIG_H

#include "engine/step/layout.h"

typedef enum rig_homes { RIG_VRAM, RIG_RAM, RIG_DISK, RIG_MIXED, RIG_HOMES } rig_homes;

/* How the regions are cut and where they live. */
typedef struct rig_placement {
  rig_homes homes;
  uint64_t slice_blocks; /* a slice, in FLAP_OPS_BLOCK elements */
  uint64_t page_bytes, transfer_bytes;
} rig_placement;

/* Placements that differ in everything. */
#define RIG_PLACEMENTS 6u
extern const rig_placement rig_placements[RIG_PLACEMENTS];

/* Sanitizers make everything several times slower: then a test of a loop meets a third of the placements, and all of
 * them together every one. */
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define RIG_MEETS(test, placement) (((uint32_t)(test) + (placement)) % 3 == 0)
#else
#define RIG_MEETS(test, placement) true
#endif

typedef struct weights_rig {
  flap_model_config config;
  flap_layout layout;
  flap_arena tables, ram;
  flap_pager *pager;
} weights_rig;

/* A model whose tensors do not fill their blocks: an odd vocabulary, biases if `attention_bias`. */
void rig_model(bool tied, bool attention_bias, flap_model_config *config_out);

/* `disk` is an existing folder for homes there. The optimizer is adamw, or what is named. */
void rig_open(weights_rig *rig, const flap_model_config *config, flap_dtype dtype, flap_run_mode mode,
              const rig_placement *placement, const char *disk);
void rig_open_optim(weights_rig *rig, const flap_model_config *config, flap_dtype dtype, flap_optim optim,
                    flap_run_mode mode, const rig_placement *placement, const char *disk);
void rig_close(weights_rig *rig);

/* A tensor's master weights (with bf16 both halves joined) and moments, as the regions hold them; each an array of its
 * elements, or NULL. With adamw_8bit moments are their codes, but for the embedding. Gaps of all regions that this
 * touches must be zero. With fp16 and `moment1`, weights must also be their masters, rounded. */
void rig_read(const weights_rig *rig, const char *name, float *master, float *moment1, float *moment2);
/* The tensor in the list of its part; stores the part's index. */
flap_model_tensor rig_tensor(const weights_rig *rig, const char *name, uint32_t *part_out);

/* Half precision by its definition, in fp64: what conversions are compared with. Infinity is 0x7c00. */
float rig_from_f16(uint16_t half);
uint16_t rig_to_f16(float value);

/* Fails the test unless both files of the scratch folder (formats_scratch.h) hold the same bytes. */
void rig_same_files(const char *a, const char *b);
/* Overwrites the data of a safetensors file in the scratch folder with bytes that follow from the seed. */
void rig_scribble(const char *name, uint64_t seed);

#define RIG_OK(call) ck_assert_msg((call) == FLAP_OK, "%s: %s", #call, flap_error_message())
/* The call fails with this status, and the record has both texts. */
#define RIG_REFUSED(call, wanted, text, more)                                                                    \
  do {                                                                                                           \
    flap_error_clear();                                                                                          \
    flap_status rig_status_ = (call);                                                                            \
    ck_assert_msg(rig_status_ == (wanted), "%s: status %d: %s", #call, (int)rig_status_, flap_error_message());  \
    ck_assert_msg(strstr(flap_error_message(), (text)) && strstr(flap_error_message(), (more)), "%s: %s", #call, \
                  flap_error_message());                                                                         \
  } while (0)

#endif
