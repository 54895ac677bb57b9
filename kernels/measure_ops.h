/* What the kernels of a device reach: products, attention, copies and AdamW, at sizes that the caller chooses.
 *
 * Role: measures through ops.h, so cpu and cuda alike; `flap bench` prints what comes of it. Operands are ordinary
 * numbers, because zeros and NaN have speeds of their own. Threading: as ops.h; blocks for about as long as the effort
 * says, per rate.
 *
 * Where the operands of a measurement do not fit in the meter's memory its rates are all 0, with no rounds: that is no
 * error.
 */
#ifndef FLAP_KERNELS_MEASURE_OPS_H
#define FLAP_KERNELS_MEASURE_OPS_H

#include "base/rate.h"
#include "kernels/ops.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct flap_ops_meter flap_ops_meter;

typedef struct flap_ops_meter_config {
  flap_device_kind kind;                     /* cpu or cuda */
  flap_pool *pool;                           /* cpu; outlives the meter */
  uint64_t vram_bytes;                       /* the device's budget: all that is taken of it */
  uint32_t tokens_max, heads, head_size_max; /* of attention */
} flap_ops_meter_config;

/* The budget for operands of so many bytes, on the cpu, where a device keeps nothing for itself; vram_bytes is not
 * read. */
uint64_t flap_ops_meter_vram(const flap_ops_meter_config *config, uint64_t operand_bytes);
/* Errors as in flap_device_open; FLAP_NO_MEMORY where vram_bytes does not even hold the workspace. */
FLAP_CHECKED flap_status flap_ops_meter_open(const flap_ops_meter_config *config, const flap_rate_effort *effort,
                                             flap_ops_meter **meter_out);
/* For people; lives as long as the meter. */
const char *flap_ops_meter_describe(const flap_ops_meter *meter);
/* What the device keeps of its budget for itself: context, libraries, rounding. */
uint64_t flap_ops_meter_overhead(const flap_ops_meter *meter);
void flap_ops_meter_close(flap_ops_meter *meter);

/* Floating-point operations per second of c (m, n) = op(a) · op(b), which counts 2 m n k; with `accumulate` c is fp32
 * and is added to, as weight gradients are. Several of one dtype in a row save opening the kernels again. */
FLAP_CHECKED flap_status flap_ops_measure_matmul(flap_ops_meter *meter, flap_dtype dtype, flap_transpose transpose,
                                                 uint32_t m, uint32_t n, uint32_t k, bool accumulate,
                                                 flap_rate *flops_out);

/* Operations per second of causal attention over one sequence, with all heads of the meter: 2 tokens² x head_size a
 * head forward (half of the square, two products), 2.5 times that backward (five). */
FLAP_CHECKED flap_status flap_ops_measure_attention(flap_ops_meter *meter, flap_dtype dtype, uint32_t tokens,
                                                    uint32_t head_size, flap_rate *forward_out,
                                                    flap_rate *backward_out);

/* Bytes per second, read and written, of copies of `bytes` within the device's memory. */
FLAP_CHECKED flap_status flap_ops_measure_copy(flap_ops_meter *meter, uint64_t bytes, flap_rate *bytes_out);

/* Bytes per second, read and written, of AdamW over `elements` (a multiple of FLAP_OPS_BLOCK, at most
 * FLAP_OPS_ADAMW_BLOCKS_MAX of them) with bf16 gradients and split masters: FLAP_OPS_ADAMW_BYTES an element with fp32
 * moments, FLAP_OPS_ADAMW_8BIT_BYTES with 8-bit ones. */
#define FLAP_OPS_ADAMW_BYTES 26.0
#define FLAP_OPS_ADAMW_8BIT_BYTES (14.0 + 16.0 / FLAP_OPS_MOMENT_BLOCK)
FLAP_CHECKED flap_status flap_ops_measure_adamw(flap_ops_meter *meter, uint64_t elements, bool eight_bit,
                                                flap_rate *bytes_out);

#ifdef __cplusplus
}
#endif
#endif
