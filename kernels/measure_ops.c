#include "kernels/measure_ops.h"

#include "base/assert.h"
#include "base/units.h"

#include <stdlib.h>
#include <string.h>

/* Not a power of two, so that rows of matrices are not all alike. */
#define PATTERN_BYTES (FLAP_MIB - 256)
#define ALIGN 4096u
#define OPERANDS_MAX 8
#define VOCABULARY 256u /* the kernels want to know one; nothing here has logits */

struct flap_ops_meter {
  flap_ops_meter_config config;
  flap_rate_effort effort;
  flap_device *device;
  flap_ops *ops; /* of `dtype`; NULL before the first measurement */
  flap_dtype dtype;
  unsigned char *memory; /* behind the workspace */
  uint64_t bytes;
  unsigned char *pattern;
  /* one measurement */
  unsigned char *operands[OPERANDS_MAX];
  flap_matmul matmul;
  flap_attention attention;
  uint64_t count; /* bytes of a copy, elements of AdamW */
  void (*launch)(flap_ops_meter *meter);
};

/* ---- open ------------------------------------------------------------------------------------------------ */

/* Numbers between a half and two, of either sign, as bf16 and fp32; as fp16 just below two. */
static void make_pattern(unsigned char *pattern) {
  uint32_t state = 1;
  for (uint64_t i = 0; i < PATTERN_BYTES / 2; i++) {
    state = state * 1664525u + 1013904223u;
    const uint16_t bits = (uint16_t)(0x3f00u | (state >> 16 & 0x80ffu));
    memcpy(pattern + 2 * i, &bits, 2);
  }
}

static flap_ops_limits limits_of(const flap_ops_meter_config *config, flap_dtype dtype) {
  const uint32_t hidden = config->heads * config->head_size_max;
  return (flap_ops_limits){.dtype = dtype,
                           .batch_max = 1,
                           .sequence_max = config->tokens_max,
                           .tokens_max = config->tokens_max,
                           .hidden = hidden,
                           .intermediate = hidden,
                           .vocabulary = VOCABULARY,
                           .heads = config->heads,
                           .kv_heads = config->heads,
                           .head_size = config->head_size_max,
                           .threads = config->pool != NULL ? flap_pool_threads(config->pool) : 1};
}

uint64_t flap_ops_meter_vram(const flap_ops_meter_config *config, uint64_t operand_bytes) {
  static const flap_dtype dtypes[] = {FLAP_BF16, FLAP_F16, FLAP_F32};
  uint64_t workspace = 0;
  for (size_t i = 0; i < sizeof dtypes / sizeof dtypes[0]; i++) {
    const flap_ops_limits limits = limits_of(config, dtypes[i]);
    const uint64_t bytes = flap_ops_workspace_bytes(config->kind, &limits);
    workspace = bytes > workspace ? bytes : workspace;
  }
  const uint64_t operands = operand_bytes > PATTERN_BYTES ? operand_bytes : PATTERN_BYTES;
  return flap_units_round_up(workspace, ALIGN) + flap_units_round_up(operands + OPERANDS_MAX * ALIGN, ALIGN);
}

flap_status flap_ops_meter_open(const flap_ops_meter_config *config, const flap_rate_effort *effort,
                                flap_ops_meter **meter_out) {
  *meter_out = NULL;
  flap_ops_meter *meter = calloc(1, sizeof *meter);
  if (meter == NULL || (meter->pattern = malloc(PATTERN_BYTES)) == NULL) {
    free(meter);
    return flap_error_set(FLAP_NO_MEMORY, "measuring kernels: no memory");
  }
  meter->config = *config;
  meter->effort = *effort;
  make_pattern(meter->pattern);
  const flap_device_config device = {
      .kind = config->kind, .vram_bytes = config->vram_bytes, .events_max = 1, .pool = config->pool};
  const flap_status status = flap_device_open(&device, &meter->device);
  if (status != FLAP_OK)
    flap_ops_meter_close(meter);
  else
    *meter_out = meter;
  return status;
}

const char *flap_ops_meter_describe(const flap_ops_meter *meter) {
  return flap_device_describe(meter->device);
}

uint64_t flap_ops_meter_overhead(const flap_ops_meter *meter) {
  uint64_t arena_bytes = 0;
  (void)flap_device_arena(meter->device, &arena_bytes);
  return meter->config.vram_bytes - arena_bytes;
}

void flap_ops_meter_close(flap_ops_meter *meter) {
  if (meter == NULL)
    return;
  flap_ops_close(meter->ops);
  flap_device_close(meter->device);
  free(meter->pattern);
  free(meter);
}

/* The kernels for a dtype; what was open for another one is closed. */
static flap_status choose(flap_ops_meter *meter, flap_dtype dtype) {
  if (meter->ops != NULL && meter->dtype == dtype)
    return FLAP_OK;
  flap_ops_close(meter->ops);
  meter->ops = NULL;
  const flap_ops_limits limits = limits_of(&meter->config, dtype);
  uint64_t arena_bytes = 0;
  unsigned char *arena = flap_device_arena(meter->device, &arena_bytes);
  const uint64_t workspace = flap_units_round_up(flap_ops_workspace_bytes(meter->config.kind, &limits), ALIGN);
  if (arena_bytes < workspace + PATTERN_BYTES) {
    char wanted[FLAP_UNITS_TEXT_MAX], there[FLAP_UNITS_TEXT_MAX];
    return flap_error_set(FLAP_NO_MEMORY,
                          "vram: the kernels' workspace and operands take %s, and %s are there; raise vram",
                          flap_units_format_bytes(workspace + PATTERN_BYTES, wanted, sizeof wanted),
                          flap_units_format_bytes(arena_bytes, there, sizeof there));
  }
  meter->memory = arena + workspace;
  meter->bytes = arena_bytes - workspace;
  meter->dtype = dtype;
  return flap_ops_open(meter->device, &limits, arena, &meter->ops);
}

/* ---- operands -------------------------------------------------------------------------------------------- */

/* Memory for operands of these sizes, full of numbers; *fits_out tells whether there is room. */
static flap_status take(flap_ops_meter *meter, const uint64_t *sizes, uint32_t count, bool *fits_out) {
  uint64_t used = 0;
  flap_assert(count <= OPERANDS_MAX);
  for (uint32_t i = 0; i < count; i++) {
    meter->operands[i] = meter->memory + used;
    used += flap_units_round_up(sizes[i], ALIGN);
  }
  *fits_out = used <= meter->bytes;
  if (!*fits_out)
    return FLAP_OK;
  uint64_t filled = used < PATTERN_BYTES ? used : PATTERN_BYTES;
  FLAP_TRY(flap_device_upload(meter->device, meter->memory, meter->pattern, filled));
  while (filled < used) {
    const uint64_t more = used - filled < filled ? used - filled : filled;
    flap_ops_copy(meter->ops, meter->memory + filled, meter->memory, more);
    filled += more;
  }
  return flap_device_synchronize(meter->device);
}

static flap_status run_launches(void *context, uint64_t units) {
  flap_ops_meter *meter = context;
  for (uint64_t i = 0; i < units; i++)
    meter->launch(meter);
  return flap_device_synchronize(meter->device);
}

static flap_status measure(flap_ops_meter *meter, void (*launch)(flap_ops_meter *meter), double amount,
                           flap_rate *rate_out) {
  meter->launch = launch;
  return flap_rate_measure(&meter->effort, run_launches, meter, amount, rate_out);
}

/* ---- products -------------------------------------------------------------------------------------------- */

static void launch_matmul(flap_ops_meter *meter) {
  flap_ops_matmul(meter->ops, &meter->matmul);
}

flap_status flap_ops_measure_matmul(flap_ops_meter *meter, flap_dtype dtype, flap_transpose transpose, uint32_t m,
                                    uint32_t n, uint32_t k, bool accumulate, flap_rate *flops_out) {
  bool fits = false;
  const flap_dtype c_dtype = accumulate ? FLAP_F32 : dtype;
  const uint64_t bytes = flap_dtype_bytes(dtype), c_bytes = flap_dtype_bytes(c_dtype);
  const uint64_t sizes[] = {(uint64_t)m * k * bytes, (uint64_t)n * k * bytes, (uint64_t)m * n * c_bytes};
  *flops_out = (flap_rate){0};
  FLAP_TRY(choose(meter, dtype));
  FLAP_TRY(take(meter, sizes, 3, &fits));
  if (!fits)
    return FLAP_OK;
  meter->matmul = (flap_matmul){.transpose = transpose,
                                .m = m,
                                .n = n,
                                .k = k,
                                .a = meter->operands[0],
                                .b = meter->operands[1],
                                .c = meter->operands[2],
                                .lda = transpose == FLAP_TN ? m : k,
                                .ldb = transpose == FLAP_NT ? k : n,
                                .ldc = n,
                                .dtype = dtype,
                                .c_dtype = c_dtype,
                                .accumulate = accumulate};
  return measure(meter, launch_matmul, 2.0 * m * n * k, flops_out);
}

/* ---- attention ------------------------------------------------------------------------------------------- */

static void launch_attention(flap_ops_meter *meter) {
  flap_ops_attention(meter->ops, &meter->attention);
}

static void launch_attention_backward(flap_ops_meter *meter) {
  /* dq may not be q; dk and dv have operands of their own too. */
  flap_ops_attention_backward(meter->ops, &meter->attention, meter->operands[4], meter->operands[5], meter->operands[6],
                              meter->operands[7]);
}

flap_status flap_ops_measure_attention(flap_ops_meter *meter, flap_dtype dtype, uint32_t tokens, uint32_t head_size,
                                       flap_rate *forward_out, flap_rate *backward_out) {
  bool fits = false;
  const uint32_t heads = meter->config.heads, stride = heads * head_size;
  const uint64_t rows = (uint64_t)tokens * stride * flap_dtype_bytes(dtype);
  const uint64_t lse = (uint64_t)tokens * heads * sizeof(float);
  /* q, k, v, out with lse behind it, dq, dk, dv, dout */
  const uint64_t sizes[] = {rows, rows, rows, flap_units_round_up(rows, ALIGN) + lse, rows, rows, rows, rows};
  *forward_out = *backward_out = (flap_rate){0};
  flap_assert(tokens <= meter->config.tokens_max && head_size <= meter->config.head_size_max);
  FLAP_TRY(choose(meter, dtype));
  FLAP_TRY(take(meter, sizes, OPERANDS_MAX, &fits));
  if (!fits)
    return FLAP_OK;
  meter->attention = (flap_attention){.batch = 1,
                                      .sequence = tokens,
                                      .heads = heads,
                                      .kv_heads = heads,
                                      .head_size = head_size,
                                      .q_stride = stride,
                                      .kv_stride = stride,
                                      .q = meter->operands[0],
                                      .k = meter->operands[1],
                                      .v = meter->operands[2],
                                      .out = meter->operands[3],
                                      .lse = (float *)(void *)(meter->operands[3] + flap_units_round_up(rows, ALIGN)),
                                      .dtype = dtype};
  const double flops = 2.0 * tokens * tokens * head_size * heads;
  FLAP_TRY(measure(meter, launch_attention, flops, forward_out));
  return measure(meter, launch_attention_backward, 2.5 * flops, backward_out);
}

/* ---- what memory bounds ---------------------------------------------------------------------------------- */

static void launch_copy(flap_ops_meter *meter) {
  flap_ops_copy(meter->ops, meter->operands[0], meter->operands[1], meter->count);
}

flap_status flap_ops_measure_copy(flap_ops_meter *meter, uint64_t bytes, flap_rate *bytes_out) {
  bool fits = false;
  const uint64_t sizes[] = {bytes, bytes};
  *bytes_out = (flap_rate){0};
  FLAP_TRY(choose(meter, FLAP_BF16));
  FLAP_TRY(take(meter, sizes, 2, &fits));
  meter->count = bytes;
  return fits ? measure(meter, launch_copy, 2.0 * (double)bytes, bytes_out) : FLAP_OK;
}

/* Steps so small that the weights stay what they are, however often they are taken. */
static const flap_adamw tiny_step = {.learning_rate = 1e-12f,
                                     .beta1 = 0.9f,
                                     .beta2 = 0.95f,
                                     .one_minus_beta1 = 0.1f,
                                     .one_minus_beta2 = 0.05f,
                                     .inverse_bias1 = 1,
                                     .inverse_sqrt_bias2 = 1,
                                     .epsilon = 1e-8f,
                                     .decay = 1,
                                     .gradient_scale = 1};
static const uint8_t no_decay[FLAP_OPS_ADAMW_BLOCKS_MAX / 8];

static void launch_adamw(flap_ops_meter *meter) {
  unsigned char **o = meter->operands;
  flap_ops_adamw(meter->ops, &tiny_step, FLAP_BF16, FLAP_BF16, o[0], o[1], (float *)(void *)o[3], (float *)(void *)o[4],
                 o[2], no_decay, (int32_t *)(void *)o[7], meter->count);
}

static void launch_adamw_8bit(flap_ops_meter *meter) {
  unsigned char **o = meter->operands;
  flap_ops_adamw_8bit(meter->ops, &tiny_step, FLAP_BF16, FLAP_BF16, o[0], o[1], (int8_t *)o[3], o[4],
                      (float *)(void *)o[5], (float *)(void *)o[6], o[2], no_decay, (int32_t *)(void *)o[7],
                      meter->count);
}

flap_status flap_ops_measure_adamw(flap_ops_meter *meter, uint64_t elements, bool eight_bit, flap_rate *bytes_out) {
  bool fits = false;
  const uint64_t moment = elements * (eight_bit ? 1 : sizeof(float));
  const uint64_t largest = eight_bit ? elements / FLAP_OPS_MOMENT_BLOCK * sizeof(float) : 0;
  /* weight, low half, gradient, m, v, the largest of m and v, fault */
  const uint64_t sizes[] = {2 * elements, 2 * elements, 2 * elements, moment, moment, largest, largest, ALIGN};
  *bytes_out = (flap_rate){0};
  flap_assert(elements > 0 && elements % FLAP_OPS_BLOCK == 0 &&
              elements <= (uint64_t)FLAP_OPS_ADAMW_BLOCKS_MAX * FLAP_OPS_BLOCK);
  FLAP_TRY(choose(meter, FLAP_BF16));
  FLAP_TRY(take(meter, sizes, OPERANDS_MAX, &fits));
  if (!fits)
    return FLAP_OK;
  /* Moments start as zeros, and become what the gradients make of them: a negative v has no root. */
  flap_ops_zero(meter->ops, meter->operands[3], (uint64_t)(meter->operands[7] - meter->operands[3]) + ALIGN);
  meter->count = elements;
  FLAP_TRY(measure(meter, eight_bit ? launch_adamw_8bit : launch_adamw,
                   (eight_bit ? FLAP_OPS_ADAMW_8BIT_BYTES : FLAP_OPS_ADAMW_BYTES) * (double)elements, bytes_out));
  int32_t fault = 0;
  FLAP_TRY(flap_device_download(meter->device, &fault, meter->operands[7], sizeof fault));
  if (fault != 0) /* then it was no ordinary step that was measured */
    return flap_error_set(FLAP_DEVICE, "measuring AdamW: a weight or a moment came out that is not finite");
  return FLAP_OK;
}
