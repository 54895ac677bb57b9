/* Shared by weights*.c and export.c: the list of a model's tensors, conversions of values, files of weights as a source
 * and as a target, pages of states as a source. Nothing here calls the pager. */
#ifndef FLAP_ENGINE_STORE_WEIGHTS_INTERNAL_H
#define FLAP_ENGINE_STORE_WEIGHTS_INTERNAL_H

#include "engine/store/state_pages.h"
#include "io/formats/checksums.h"
#include "io/formats/safetensors.h"
#include "model/model.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Elements that are converted at a time. */
#define FLAP_WEIGHTS_CHUNK ((uint64_t)1 << 16)
/* What marks a file of weights as ours, so that FLAP deletes no others: a pair of its metadata. */
#define FLAP_WEIGHTS_MARK_KEY "producer"
#define FLAP_WEIGHTS_MARK_VALUE "flap"
#define FLAP_WEIGHTS_LOW_FILE "optimizer-low.safetensors"       /* of bf16 weights: I16 */
#define FLAP_WEIGHTS_MASTER_FILE "optimizer-master.safetensors" /* of fp16 weights: F32 */

/* ---- the list ---------------------------------------------------------------------------------------------- */

/* All tensors of a model: embedding, layers in order, head; within a part in the order of offsets. Files hold them in
 * this order, so that each region is read once. */
typedef struct flap_weights_list {
  uint64_t count;
  uint64_t embedding_count, layer_count; /* of the embedding, of one layer */
  flap_model_tensor *tensors;
} flap_weights_list;

FLAP_CHECKED flap_status flap_weights_list_open(const flap_model_config *config, flap_weights_list *list_out);
/* The same tensors as rows of one value for each `block` elements, the last of a tensor for fewer: elements, offsets
 * and shapes are counted in values. `block` divides FLAP_OPS_BLOCK, so no value belongs to two tensors. */
FLAP_CHECKED flap_status flap_weights_list_blocks(const flap_weights_list *list, uint64_t block,
                                                  flap_weights_list *list_out);
void flap_weights_list_close(flap_weights_list *list); /* {0} is fine */

/* One entry per tensor; the caller frees. Names live as long as the list. NULL for lack of memory. */
flap_safetensors_entry *flap_weights_entries(const flap_weights_list *list, flap_safetensors_dtype dtype);

/* ---- values ------------------------------------------------------------------------------------------------ */

/* Conversions of `count` values; each returns the index of the first value that is not finite or does not fit the
 * target, or `count`. Everything before that index is done. */
uint64_t flap_values_to_high(const float *from, uint64_t count, uint16_t *to);   /* high halves of the master */
uint64_t flap_values_to_low(const float *from, uint64_t count, int16_t *to);     /* low halves */
uint64_t flap_values_to_bf16(const float *from, uint64_t count, uint16_t *to);   /* to nearest, ties to even */
uint64_t flap_values_to_f16(const float *from, uint64_t count, uint16_t *to);    /* likewise, subnormals included */
uint64_t flap_values_from_bf16(const uint16_t *from, uint64_t count, float *to); /* exact */
uint64_t flap_values_from_f16(const uint16_t *from, uint64_t count, float *to);  /* exact */
/* The master weights that a pair of halves stands for. */
uint64_t flap_values_join(const uint16_t *high, const int16_t *low, uint64_t count, float *to);
/* The index of the first value that is not finite, or `count`. */
uint64_t flap_values_check(flap_dtype dtype, const void *values, uint64_t count);

/* ---- a source ---------------------------------------------------------------------------------------------- */

/* Files whose tensors have been matched with the list, or a section of states in pages. */
typedef struct flap_weights_source {
  const flap_weights_list *list;
  flap_state_pages *pages; /* whoever opened the source closes them after it; NULL: files */
  flap_state_section section;
  flap_safetensors_dtype pages_dtype;
  flap_safetensors *reader;
  const flap_safetensors_tensor **tensors; /* by index in the list */
  void *raw;                               /* FLAP_WEIGHTS_CHUNK elements of scratch */
  float *values;
  struct flap_weights_verify *verify; /* NULL: what is read is not compared with checksums */
} flap_weights_source;

/* What a source's files must hold. */
typedef enum flap_weights_wanted {
  FLAP_WANTED_ANY_FLOAT, /* bf16, fp16 or fp32; names may lack "model."; a tied model may have its lm_head */
  FLAP_WANTED_EXACTLY    /* these names, this dtype */
} flap_weights_wanted;

/* Opens a folder or file and checks names, shapes and dtypes. `dtype` matters for FLAP_WANTED_EXACTLY. */
FLAP_CHECKED flap_status flap_weights_source_open(const flap_model_config *config, const flap_weights_list *list,
                                                  const char *path, flap_weights_wanted wanted,
                                                  flap_safetensors_dtype dtype, flap_weights_source *source_out);
/* A section of states that were checked (flap_state_pages_check) against the model that the list is of. Each page that
 * is read is compared with its checksum: verify_begin is not for such a source. */
FLAP_CHECKED flap_status flap_weights_source_open_pages(const flap_weights_list *list, flap_state_pages *pages,
                                                        flap_state_section section, flap_safetensors_dtype dtype,
                                                        flap_weights_source *source_out);
bool flap_weights_source_is_open(const flap_weights_source *source);
void flap_weights_source_close(flap_weights_source *source); /* {0} is fine */

/* `count` (at most FLAP_WEIGHTS_CHUNK) elements as fp32, in source->values. FLAP_NUMERIC names file and tensor. */
FLAP_CHECKED flap_status flap_weights_source_values(flap_weights_source *source, uint64_t tensor, uint64_t first,
                                                    uint64_t count);
/* Bytes as they are in the file. */
FLAP_CHECKED flap_status flap_weights_source_read(const flap_weights_source *source, uint64_t tensor, uint64_t first,
                                                  uint64_t count, void *to);
/* From now on what is read is also summed up, file by file; end compares with the checksums of the folder. Whoever
 * reads everything once, in the order of the list, reads no byte twice; files that were read otherwise are read again.
 * FLAP_CORRUPT names the file. A file without a checksum is FLAP_CORRUPT too. */
FLAP_CHECKED flap_status flap_weights_verify_begin(flap_weights_source *source, const flap_checksums *checksums);
FLAP_CHECKED flap_status flap_weights_verify_end(flap_weights_source *source);
/* The same for a folder that somebody gives as a model: begin reads its checksums where it has any, as a checkpoint
 * does, and end says what to do if a file was changed on purpose. `checksums` is {0} before, and closed after the
 * source. */
FLAP_CHECKED flap_status flap_weights_verify_model_begin(flap_weights_source *source, const char *folder,
                                                         flap_checksums *checksums);
FLAP_CHECKED flap_status flap_weights_verify_model_end(flap_weights_source *source, const char *folder);
/* For the source itself: `bytes` at `data` are those of the tensor from `offset`; NULL is fine for close. */
void flap_weights_verify_read(struct flap_weights_verify *verify, const flap_safetensors_tensor *tensor,
                              uint64_t offset, const void *data, uint64_t bytes);
void flap_weights_verify_close(struct flap_weights_verify *verify);
/* The error for element `element` of a tensor: not finite, or not within `dtype`. */
flap_status flap_weights_source_numeric(const flap_weights_source *source, uint64_t tensor, uint64_t element,
                                        flap_dtype dtype);

/* ---- a target ---------------------------------------------------------------------------------------------- */

/* model.safetensors, or its shards and their index, written tensor after tensor in the order of the list. */
typedef struct flap_weights_target {
  const flap_weights_list *list;
  const char *folder;
  flap_dtype dtype;
  uint32_t shards;
  uint32_t *shard_of;
  flap_safetensors_entry *entries;
  uint64_t next;       /* the tensor after the one that is being written */
  uint64_t bytes_left; /* of the one that is */
  uint64_t total_bytes;
  flap_safetensors_writer *writer;
  flap_checksums *checksums; /* of its files, but for the index; NULL after begin: none */
  flap_file_piece piece;     /* that its files are written through; none after begin */
} flap_weights_target;

FLAP_CHECKED flap_status flap_weights_target_begin(const flap_weights_list *list, const char *folder, flap_dtype dtype,
                                                   uint64_t shard_bytes_max, flap_weights_target *target_out);
/* The next bytes; they may not pass the end of a tensor. */
FLAP_CHECKED flap_status flap_weights_target_write(flap_weights_target *target, const void *data, uint64_t bytes);
/* Everything was written: the index follows. Ends the target, whatever it returns. */
FLAP_CHECKED flap_status flap_weights_target_end(flap_weights_target *target);
/* Ends the target; the file in progress is removed. {0} is fine. */
void flap_weights_target_abort(flap_weights_target *target);

/* One file of all tensors: the files of states. */
FLAP_CHECKED flap_status flap_weights_file_begin(const flap_weights_list *list, const char *folder, const char *name,
                                                 flap_safetensors_dtype dtype, flap_file_piece piece,
                                                 flap_safetensors_writer **writer_out);

/* The bytes of the files of a target (the index estimated upwards), and of such a file. */
FLAP_CHECKED flap_status flap_weights_measure_target(const flap_weights_list *list, flap_dtype dtype,
                                                     uint64_t shard_bytes_max, uint64_t *bytes_out);
FLAP_CHECKED flap_status flap_weights_measure_file(const flap_weights_list *list, flap_safetensors_dtype dtype,
                                                   uint64_t *bytes_out);

#ifdef __cplusplus
}
#endif
#endif
