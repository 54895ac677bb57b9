/* The regions of a run: which runs of bytes the pager keeps, and what they are to the engine.
 *
 * Folder-private, but for tests. Everything here is arithmetic on a model, a shape and a few choices of the planner; no
 * bytes are held. Memory comes from the caller's arena: build with a measuring arena first to learn how much.
 */
#ifndef FLAP_ENGINE_STEP_LAYOUT_H
#define FLAP_ENGINE_STEP_LAYOUT_H

#include "base/arena.h"
#include "engine/engine.h"

#ifdef __cplusplus
extern "C" {
#endif

#define FLAP_REGION_NONE UINT32_MAX

/* What a run does; decides which classes of regions exist. */
typedef enum flap_run_mode { FLAP_MODE_TRAIN, FLAP_MODE_FORWARD, FLAP_MODE_SAMPLE } flap_run_mode;

typedef struct flap_layout_spec {
  const flap_model_config *model;
  flap_model_shape shape; /* of a micro-batch; in sample mode, of one piece of the prompt (B = 1) */
  flap_run_mode mode;
  flap_dtype gradient_dtype;
  flap_optim optim;
  uint32_t micro_batches;       /* per step */
  uint32_t group_micro_batches; /* pass all layers together; what lives within a group only is shared by all groups */
  uint32_t segment_layers;      /* k: consecutive layers of which only the first one's input is kept */
  uint32_t tail_layers;         /* of the last segment, which goes there and back at once; the others have k each */
  bool layerwise; /* of segments that save nothing, each layer is computed again right before its own backward, from an
                     input that another forward leaves: one block of scratch memory instead of one for each layer */
  bool by_layer;  /* nothing is saved or spread, there is one group, and one micro-batch or layerwise: a layer's sums
                     live for its own backward, so they share one place (not the tail's, with several micro-batches) */
  uint32_t saved_layers;   /* save activations; the others recompute. Below the layer count it is a share: see below */
  uint32_t saved_mask;     /* which tensors these save, see flap_model_saved; not 0 where saved_layers is not */
  uint32_t host_parts;     /* so many parts are updated by the host's cores: see flap_layout_is_host */
  bool host_spares_first;  /* embedding and first layer come last among these */
  uint32_t backward_parts; /* of the parts that the device updates this share in all parts is updated in the backward,
                            see flap_layout_in_backward; */
  uint32_t host_backward_parts; /* of those that the host updates */
  bool backward_twice;          /* these wait for a norm, so the backward happens once for it and once for them */
  bool spread; /* and those of a segment while the next one is passed: then all of them are rounded at once */
  uint64_t slice_elements;  /* of layers and head; a multiple of FLAP_OPS_BLOCK, at most FLAP_OPS_ADAMW_BLOCKS_MAX
                               of them. The embedding's slices have about as many bytes. */
  uint32_t cache_positions; /* sample mode */
} flap_layout_spec;

/* Where a region may live. What the host's cores update, and what they need for it, is in RAM as a whole. */
typedef enum flap_layout_place {
  FLAP_PLACE_ANY,
  FLAP_PLACE_HOST,   /* in RAM, and never on the device */
  FLAP_PLACE_HOME,   /* in RAM, and passes through the device */
  FLAP_PLACE_COPIED, /* in RAM, and passes through the device or has a copy that stays there: only the host changes it
                      */
} flap_layout_place;

typedef struct flap_layout_region {
  flap_region_class klass;
  flap_layout_place place;
  uint8_t element_bytes; /* of most of what it holds: how its bytes are shuffled where they are compressed */
  uint8_t side;          /* of the overlay */
  uint16_t overlay;      /* 0, or that of regions with which it may share its place in RAM (pager.h) */
  uint64_t bytes;        /* a multiple of FLAP_BLOCK_ALIGN */
} flap_layout_region;

/* What a states region holds, section after section, in this order. */
typedef enum flap_state_section {
  FLAP_STATE_MASTER,   /* what makes a master weight of the compute weight: the int16 low half with bf16 weights, the
                          fp32 master itself with fp16; not there with fp32 weights, which are their own masters */
  FLAP_STATE_MOMENT1,  /* fp32, or int8 codes */
  FLAP_STATE_MOMENT2,  /* fp32, or uint8 codes, of its square root */
  FLAP_STATE_LARGEST1, /* with codes alone: what they are relative to, fp32, in blocks of FLAP_OPS_MOMENT_BLOCK */
  FLAP_STATE_LARGEST2,
  FLAP_STATE_SECTION_COUNT
} flap_state_section;

/* Everything about the bytes of a part's states follows from this. */
typedef struct flap_state_format {
  struct {
    uint64_t value_bytes;    /* 0: no such section */
    uint64_t value_elements; /* that share a value; divides FLAP_OPS_BLOCK */
  } sections[FLAP_STATE_SECTION_COUNT];
} flap_state_format;

/* Whether a part's moments are codes. With adamw_8bit all are but the embedding's, which stay fp32: those of frequent
 * and of rare tokens differ by orders of magnitude, and where rows of both share a block, whose codes are relative to
 * its largest, little is left of the small ones. A tied output projection is the embedding. */
bool flap_layout_has_codes(flap_optim optim, flap_part part);
flap_state_format flap_layout_state_format(flap_dtype weight_dtype, flap_optim optim, flap_part part);

/* A part of the model: the embedding, a layer, or the head. */
typedef struct flap_layout_part {
  flap_part kind;
  uint32_t layer;
  uint64_t elements;      /* padded, as flap_model_part_elements */
  uint32_t weights, sums; /* regions */
  uint32_t first_slice, slice_count;
  uint64_t first_block; /* of its FLAP_OPS_BLOCK-element blocks in the run's list of blocks */
} flap_layout_part;

/* A piece of a part's optimizer states and of its rounded gradient. */
typedef struct flap_layout_slice {
  uint32_t part;
  uint64_t first_element, elements; /* in the part; multiples of FLAP_OPS_BLOCK */
  uint32_t states, gradient;        /* regions; the gradient's may be one that other slices use after it, or
                                       FLAP_REGION_NONE: it is consumed where its part's sums are */
} flap_layout_slice;

typedef struct flap_layout {
  flap_layout_spec spec;
  uint32_t part_count, slice_count, segment_count, region_count;
  uint64_t block_count;
  /* of a part of each kind: its elements, padded; what its states hold in training, and the elements of its slices
   * then, of which the last may have fewer */
  uint64_t part_elements[FLAP_PART_COUNT];
  flap_state_format state_formats[FLAP_PART_COUNT];
  uint64_t slice_elements[FLAP_PART_COUNT];
  flap_layout_part *parts; /* embedding, layers in order, head */
  flap_layout_slice *slices;
  flap_layout_region *regions;
  uint32_t vocabulary_sums;
  uint32_t rounded_count; /* places for gradients on their way from sums to an update: the first regions */
  uint32_t rounded_next;  /* while it is built */
  /* regions, or FLAP_REGION_NONE */
  uint32_t first_boundary, first_inner, first_hidden_gradient, first_saved, first_cache;
  bool tied;
} flap_layout;

/* What a part's gradient sums are in: fp32. But where a step has one micro-batch nothing is added to a layer's: with
 * bf16 weights and bf16 gradients, products then write them in bf16. (Head and embedding add up chunks of tokens, and
 * rows.) */
flap_dtype flap_layout_sums_dtype(const flap_layout_spec *spec, flap_part kind);
/* Whether sums are stored gradients as they are, and need not be rounded. */
static inline bool flap_layout_sums_are_final(const flap_layout_spec *spec, flap_part kind) {
  return flap_layout_sums_dtype(spec, kind) == spec->gradient_dtype;
}
/* Whether a part that the device updates in the backward is updated while the segment behind it is passed (`spread`);
 * behind the embedding there is none. */
bool flap_layout_updates_later(const flap_layout *layout, uint32_t part);

/* With a measuring arena only counts are valid afterwards. */
void flap_layout_build(const flap_layout_spec *spec, flap_arena *arena, flap_layout *layout_out);

/* Input of segment `segment` for a micro-batch; segment_count: what the head reads, one place for all of them. */
uint32_t flap_layout_boundary(const flap_layout *layout, uint32_t segment, uint32_t micro_batch);
/* Whether a backward passes segments layer by layer, each layer for all of several micro-batches. */
static inline bool flap_layout_goes_by_layer(const flap_layout_spec *spec) {
  return spec->by_layer && spec->micro_batches > 1;
}
/* Then, the input of layer j > 0 of any segment but the last. */
uint32_t flap_layout_inner(const flap_layout *layout, uint32_t j, uint32_t micro_batch);
uint32_t flap_layout_hidden_gradient(const flap_layout *layout, uint32_t micro_batch);
/* FLAP_REGION_NONE when the layer saves nothing. The layer's input follows the kept tensors when it is not the first of
 * its segment. Layers of the last segment, whose backward follows their forward at once, save only where all do, and
 * then in one place for all micro-batches. */
uint32_t flap_layout_saved(const flap_layout *layout, uint32_t layer, uint32_t micro_batch);
static inline bool flap_layout_saves_all(const flap_layout_spec *spec) {
  return spec->saved_layers >= spec->model->num_hidden_layers;
}
/* Layers times micro-batches of a group that save, before the last segment: whole segments do, of each for as many
 * micro-batches as the share of saved_layers in all layers says, spread evenly over both. */
uint64_t flap_layout_saved_count(const flap_layout_spec *spec);
/* The shortest tail that leaves whole segments of k layers. */
uint32_t flap_layout_least_tail(uint32_t layers, uint32_t segment_layers);
/* The first layer of the tail, the last segment. */
uint32_t flap_layout_tail_layer(const flap_layout_spec *spec);
/* Layers of the longest segment. */
uint32_t flap_layout_longest_segment(const flap_layout_spec *spec);
/* The segment that a layer is of. */
uint32_t flap_layout_segment_of(const flap_layout *layout, uint32_t layer);
uint32_t flap_layout_cache(const flap_layout *layout, uint32_t layer);
static inline uint32_t flap_layout_layer_part(uint32_t layer) {
  return layer + 1;
}
/* Whether the optimizer of a part (an index into parts) runs on the host's cores: of all parts host_parts do, at even
 * distances, the head first, for which a step has most time. Where updates happen in the backward, and where it is
 * wanted, embedding and first layer come last: their gradients are complete when the next forward is about to begin
 * with them. */
bool flap_layout_is_host(const flap_layout *layout, uint32_t part);
/* Whether a part is updated in the backward of the step, the last one, once its gradient is complete, and not folded
 * into the next forward or swept: of the parts that the host updates, and of the others, a share at even distances. */
bool flap_layout_in_backward(const flap_layout *layout, uint32_t part);
/* Layers [first, end) of a segment. */
void flap_layout_segment(const flap_layout *layout, uint32_t segment, uint32_t *first_out, uint32_t *end_out);

/* Bytes of the states of so many elements, a multiple of FLAP_OPS_BLOCK: for each of them 10 with bf16 weights, 12 with
 * fp16, 8 with fp32; where moments are codes 4, 6, or 2, and 1/32 more. */
uint64_t flap_layout_state_bytes(const flap_state_format *format, uint64_t elements);
/* Where a section begins in the states region of a slice of so many elements, in bytes. */
uint64_t flap_layout_state_offset(const flap_state_format *format, flap_state_section section, uint64_t elements);

#ifdef __cplusplus
}
#endif
#endif
