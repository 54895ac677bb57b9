/* What stands beside the weights of a Hugging Face folder and tells others how to use the model: files of its
 * tokenizer, chat templates, generation_config.json, and which tokens config.json says begin and end a text. FLAP has
 * no use for most of it, and carries it from the folder that is trained further into every checkpoint and trained
 * model.
 *
 * All is opened when a run starts and stays open, so what is saved is what was there then, whatever becomes of the
 * folder. Threading: one user at a time.
 */
#ifndef FLAP_ENGINE_STORE_COMPANIONS_H
#define FLAP_ENGINE_STORE_COMPANIONS_H

#include "engine/store/hf_config.h"
#include "io/formats/tokenizer.h"

#ifdef __cplusplus
extern "C" {
#endif

/* The first three are those that a tokenizer saves itself where FLAP reads it; the last is of the model, all others are
 * of the tokenizer. */
#define FLAP_COMPANION_COUNT 10u
#define FLAP_COMPANION_TOKENIZER_COUNT 3u
extern const char *const flap_companion_names[FLAP_COMPANION_COUNT];

typedef struct flap_companions_source {
  const char *model;            /* the folder that is trained further; "": none */
  const char *checkpoint;       /* that the run goes on from, for what the model's folder lacks; "": none */
  const char *tokenizer;        /* as run.yaml names it; "": the model's own */
  const flap_tokenizer *opened; /* NULL: nobody reads it, and its files are carried as they are */
} flap_companions_source;

typedef struct flap_companions {
  bool opened;
  int files[FLAP_COMPANION_COUNT]; /* -1: there is none */
  flap_hf_ids ids;
} flap_companions;

/* Files of the tokenizer come from its folder. The model's ids and generation_config.json are carried if the tokenizer
 * is the model's, or one that begins and ends texts with the same tokens. To be closed even after a failure. */
FLAP_CHECKED flap_status flap_companions_open(const flap_companions_source *from, flap_companions *companions_out);
/* Writes the files into an existing folder, each under a temporary name first. */
FLAP_CHECKED flap_status flap_companions_save(const flap_companions *companions, const char *folder);
void flap_companions_close(flap_companions *companions); /* {0} is fine */

#ifdef __cplusplus
}
#endif
#endif
