/* A run that is open: memory, device, disks, pager and executor, as a setup says.
 *
 * Folder-private, but for tests. Everything is taken here, before the first step, and sealed: what a setup measured is
 * what is taken. The same code opens the simulation that prices plans.
 */
#ifndef FLAP_ENGINE_RUN_RUNTIME_H
#define FLAP_ENGINE_RUN_RUNTIME_H

#include "engine/machine/matmul_choice.h"
#include "engine/run/executor.h"
#include "io/formats/dataset_reader.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct flap_runtime_config {
  uint64_t vram_bytes;                       /* the budget */
  uint64_t disk_bytes[FLAP_BLOCK_DISKS_MAX]; /* of each disk: what it may hold */
  const char *shared_folder; /* where checkpoints are made that may share the states' extents, if the disk is on its
                                file system; it outlives the run. NULL: none do */
  const flap_run_config *optimizer; /* NULL where nothing is trained */
  flap_matmul_choice *matmuls;      /* NULL: none; must outlive the run */
  const flap_machine *machine;      /* simulation only, like: */
  const flap_op_times *times;
  struct flap_trace *trace; /* where flap_runtime_start_trace has events go; NULL: nowhere */
} flap_runtime_config;

typedef struct flap_runtime {
  flap_setup_spec spec;
  bool simulated;
  flap_clock *clock; /* of a simulation */
  flap_arena ram;    /* all that the run takes on the host */
  flap_arena vram;   /* what is the executor's of the device's memory */
  flap_pool *pool;
  flap_host_optimizer *host_optimizer; /* NULL where the host updates nothing */
  flap_pager *pager;
  flap_ops *ops;
  flap_reader *reader;
  flap_setup_lists lists;
  flap_executor executor;
  int tracing; /* transfers go to the trace: read and written atomically */
  uint64_t vram_pager_bytes, block_bytes, disk_bytes;
} flap_runtime;

/* Opens the run of a setup; its programs move into the run. FLAP_NO_MEMORY, or what device and disks say. */
FLAP_CHECKED flap_status flap_runtime_open(flap_setup *setup, const flap_runtime_config *config,
                                           flap_runtime *runtime_out);
/* The same on the sim device, with a clock and the machine's rates. The setup keeps its programs and must outlive the
 * run; all regions hold something from the start. */
FLAP_CHECKED flap_status flap_runtime_open_simulated(flap_setup *setup, const flap_runtime_config *config,
                                                     flap_runtime *runtime_out);
/* From now on operations and transfers go to the trace, until it is full. */
void flap_runtime_start_trace(flap_runtime *runtime);
/* No more, where looking on costs the device something: between any two operations that are told apart it pauses for
 * some microseconds. Elsewhere the trace goes on. */
void flap_runtime_stop_trace(flap_runtime *runtime);
/* Opens the reader where the setup has one. Of its own, because what is read is known later than what is taken. */
FLAP_CHECKED flap_status flap_runtime_open_reader(flap_runtime *runtime, const flap_dataset *dataset, uint64_t cursor);
void flap_runtime_close(flap_runtime *runtime);

/* Measured: what was taken of each tier. */
void flap_runtime_peaks(const flap_runtime *runtime, flap_peaks *peaks_out);

#ifdef __cplusplus
}
#endif
#endif
