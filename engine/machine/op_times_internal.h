/* How operations are timed on a device, whichever it is. Folder-private. */
#ifndef FLAP_ENGINE_MACHINE_OP_TIMES_INTERNAL_H
#define FLAP_ENGINE_MACHINE_OP_TIMES_INTERNAL_H

#include "engine/machine/op_times.h"

/* What of the run is on the device. Times are of layer and head at once; without a slice, what takes so long per
 * element is not timed, and stays 0. */
typedef enum op_times_parts { PART_LAYER = 1, PART_HEAD = 2, PART_SLICE = 4, PARTS_ALL = 7 } op_times_parts;

/* Of memory of the device; `kind`: whose workspaces are taken. */
uint64_t op_times_bytes(const flap_op_times_spec *spec, op_times_parts parts, flap_device_kind kind);
/* Opens the device of `config`, times everything (times_out NULL: only runs the products of some parts), and closes.
 * FLAP_BUDGET: its memory is too little. */
FLAP_CHECKED flap_status op_times_run_on(const flap_op_times_spec *spec, op_times_parts parts,
                                         const flap_device_config *config, flap_device_kind kind,
                                         flap_op_times *times_out);

#endif
