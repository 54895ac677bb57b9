/* A setup: one choice of the planner's, worked out to the last byte.
 *
 * Folder-private. A choice says how the step is cut and what lives where; from it follow the layout, the programs, the
 * configuration of the pager and the exact sizes of everything that the run will take. Planning builds many setups and
 * keeps one; the run is opened from it (engine/run/runtime.h) by the same functions that measured it, so predicted and
 * taken sizes are one. A setup lives on the heap: it is gone before the first step, but for the paths in `spec`.
 */
#ifndef FLAP_ENGINE_STEP_SETUP_H
#define FLAP_ENGINE_STEP_SETUP_H

#include "engine/step/program.h"

#ifdef __cplusplus
extern "C" {
#endif

/* The programs that a run may execute. */
typedef enum flap_setup_program {
  /* Of what is not updated in the backward of its own step. Where all is, single is the only step. */
  FLAP_SETUP_FIRST,   /* a step that begins and ends with its update pending: nothing pending before */
  FLAP_SETUP_STEADY,  /* the update before is folded in, this one stays pending */
  FLAP_SETUP_LAST,    /* the update before is folded in, this one happens at the end: before an evaluation or a save */
  FLAP_SETUP_SINGLE,  /* nothing pending, before or after */
  FLAP_SETUP_SWEEP,   /* only the pending update: after an interruption */
  FLAP_SETUP_FORWARD, /* an evaluation */
  FLAP_SETUP_DECODE,  /* new tokens, when sampling */
  FLAP_SETUP_PROGRAM_COUNT
} flap_setup_program;

/* What is given: the same for every choice. */
typedef struct flap_setup_spec {
  const flap_model_config *model;
  flap_model_shape shape;
  flap_run_mode mode;
  flap_dtype gradient_dtype;
  flap_optim optim;
  uint32_t micro_batches;
  uint32_t cache_positions;         /* sample mode */
  uint32_t threads;                 /* that compute */
  uint64_t vram_overhead_bytes;     /* of the budget that the device keeps for itself */
  flap_device_kind device;          /* of the run; planning simulates it */
  bool saves_weights, saves_states; /* checkpoints are written while programs run */
  uint32_t reader_depth;            /* batches in memory, of a step each; 0: no reader */
  flap_block_backend io;
  flap_compression compression; /* of pages on disk, and what decides about it: */
  flap_duplex disk_rates;       /* of all disks together */
  bool shared_cores;            /* compute wants all cores */
  bool needs_no_norm;           /* nothing is clipped or scaled: a part may be updated before all gradients are there */
  uint32_t disk_count;
  const char *disk_paths[FLAP_BLOCK_DISKS_MAX];
  uint64_t disk_weights[FLAP_BLOCK_DISKS_MAX]; /* for striping; 0: by size */
} flap_setup_spec;

typedef struct flap_choice {
  uint32_t segment_layers, group_micro_batches, saved_layers;
  uint32_t saved_mask;  /* which tensors these save */
  uint32_t tail_layers; /* of the last segment; 0: as few as there can be */
  bool layerwise;       /* see flap_layout_spec */
  /* What share in all parts is updated in the backward, of the parts that the device updates and of those that the host
   * does (only where the device does any). Where a norm is needed first, that is a second backward. The others: */
  uint32_t backward_parts, host_backward_parts;
  bool sweep;  /* at the step's end, or else in the next forward */
  bool spread; /* the update of a segment is spread over what comes before it, the forward of the segment before or the
                  backward of the one behind */
  uint32_t host_parts;    /* the optimizer of so many parts runs on the host's cores */
  bool host_spares_first; /* the parts that a forward begins with only where nearly all do */
  uint64_t slice_elements, page_bytes, transfer_bytes;
  uint64_t staging_bytes;               /* of buffers that are wanted, where budgets allow it; 0: a few */
  uint64_t pool_bytes;                  /* of RAM for encoded chunks, whole blocks; 0 where nothing is compressed */
  uint32_t read_buffers, write_buffers; /* 0 where nothing is on disk */
  uint32_t workers;                     /* that check what the disk holds; likewise */
  uint32_t trace_events;
  uint32_t extra_slots[FLAP_CLASS_COUNT]; /* of rings, beyond what the programs need at once */
  uint64_t
      resident_bytes[FLAP_CLASS_COUNT]; /* at most so many bytes of a class stay in VRAM, its regions spread evenly */
  bool keeps_embedding;                 /* of the states that stay the embedding's come first */
  uint64_t ram_bytes;                   /* at most so many bytes of pages live in RAM, by class in order of traffic */
} flap_choice;

typedef struct flap_setup {
  flap_setup_spec spec;
  flap_choice choice;
  uint64_t disk_sizes[FLAP_BLOCK_DISKS_MAX]; /* what each disk may hold; 0 until it is known */
  flap_layout layout;
  void *layout_memory;
  bool *resident; /* per region: in VRAM for good, or a copy is */
  flap_pager_region *regions;
  struct setup_places *places; /* what placing keeps account of */
  flap_pager_ring *rings;      /* one per class that streams, and one per copy that stays */
  flap_pager_config pager;     /* without device, disk and trace */
  flap_program programs[FLAP_SETUP_PROGRAM_COUNT];
  bool has_program[FLAP_SETUP_PROGRAM_COUNT];
  flap_setup_program steady; /* the program whose costs are those of the run */
  double
      traffic[FLAP_CLASS_COUNT]; /* bytes that a steady program moves, over those of the class that it moves at all */
  flap_class_plan classes[FLAP_CLASS_COUNT];
  /* Of each class: the regions that may stay in VRAM, how many bytes they are, and the largest of them; those that may
   * not, and pass through a ring in any case. */
  uint64_t region_counts[FLAP_CLASS_COUNT], staying_bytes[FLAP_CLASS_COUNT], largest_bytes[FLAP_CLASS_COUNT];
  uint64_t passing_bytes[FLAP_CLASS_COUNT];

  flap_pager_sizes sizes;
  uint64_t vram_scratch_bytes, vram_bytes;
  uint64_t ram_other_bytes, ram_bytes; /* beside the pager; all */
  uint64_t ram_arena_bytes;            /* ram_bytes less what the block files take themselves */
  uint64_t disk_bytes;                 /* rounded up to whole stripes */
} flap_setup;

/* FLAP_INVALID for a model whose weights and states alone are more than can be planned with. Uses model, shape, mode
 * and optim. */
FLAP_CHECKED flap_status flap_setup_check_model(const flap_setup_spec *spec);
/* FLAP_NO_MEMORY, or FLAP_BUDGET for more bytes than any budget could hold. After a failure there is nothing to close.
 */
FLAP_CHECKED flap_status flap_setup_build(const flap_setup_spec *spec, const flap_choice *choice,
                                          flap_setup *setup_out);
/* The same, but only the steady program has its lists: what placing and estimating need, in less than half of the time.
 */
FLAP_CHECKED flap_status flap_setup_sketch(const flap_setup_spec *spec, const flap_choice *choice,
                                           flap_setup *setup_out);
/* The lists that a sketch lacks: of one program, of all. */
FLAP_CHECKED flap_status flap_setup_list_program(flap_setup *setup, flap_setup_program program);
FLAP_CHECKED flap_status flap_setup_list_programs(flap_setup *setup);
/* Decides homes and sizes anew for another choice that differs only in placement: transfers, buffers, trace, extra
 * slots, residents and RAM. */
FLAP_CHECKED flap_status flap_setup_place(flap_setup *setup, const flap_choice *choice);
void flap_setup_close(flap_setup *setup);
/* Whether steps leave updates for the next one. */
static inline bool flap_setup_folds(const flap_setup *setup) {
  return setup->has_program[FLAP_SETUP_STEADY];
}

/* Takes from `ram` in the order of the run, behind the pager's memory, what the run keeps there: used for measuring and
 * for opening. */
struct flap_trace;
typedef struct flap_setup_lists {
  flap_layout layout;
  flap_program programs[FLAP_SETUP_PROGRAM_COUNT];
  struct flap_trace *trace;
  void *save_memory; /* for blocks through which checkpoints are written; NULL where none are */
  uint64_t save_bytes;
} flap_setup_lists;
void flap_setup_take_lists(flap_setup *setup, flap_arena *ram, flap_setup_lists *lists_out);

/* Tells what each disk may hold, and measures anew. */
void flap_setup_set_disks(flap_setup *setup, const uint64_t disk_bytes[FLAP_BLOCK_DISKS_MAX]);
/* The disks as the run opens them; sizes of what is asked of them are the pager's to fill. */
void flap_setup_block_config(const flap_setup *setup, flap_block_config *config_out);

#ifdef __cplusplus
}
#endif
#endif
