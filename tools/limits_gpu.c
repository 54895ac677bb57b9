/* The kernels of a device, and the copies to and from a card. */
#include "tools/limits.h"

#include "base/units.h"
#include "kernels/device/measure_memory.h"
#include "kernels/measure_ops.h"
#include "tools/text.h"

#include <unistd.h>

#define ROUND_NS (15u * 1000 * 1000) /* a card is steadier than a host: more is not needed */
#define VRAM_CUDA (3840 * FLAP_MIB)
#define VRAM_CPU (256 * FLAP_MIB)
#define COPIES_VRAM (2 * FLAP_GIB)
#define COPIES_BYTES (256 * FLAP_MIB)
#define COPIES_BYTES_QUICK (32 * FLAP_MIB)
#define PIN_BYTES (4 * FLAP_GIB) /* as many pieces as a run's threads pin at once, where there is memory for it */
#define PIN_BYTES_LEAST (512 * FLAP_MIB)
#define PIN_SHARE 16u /* of the memory that is free: three areas are pinned */

/* What is asked of a device: a card gets the shapes that it is bought for, a CPU smaller ones. */
typedef struct gpu_shapes {
  uint32_t square_least, square_most;
  uint32_t tokens; /* of the layers */
  uint32_t attention_least, attention_most, heads;
  uint64_t copy_bytes, elements;
  const struct layer_shape {
    const char *name;
    uint32_t out, in;
  } * layers;
  uint32_t layer_count;
} gpu_shapes;

static const struct layer_shape cuda_layers[] = {{"1B q, o", 2048, 2048},      {"1B gate, up", 8192, 2048},
                                                 {"1B down", 2048, 8192},      {"7B q, k, v, o", 4096, 4096},
                                                 {"7B gate, up", 11008, 4096}, {"7B down", 4096, 11008}};
static const struct layer_shape cpu_layers[] = {
    {"small q, k, v, o", 512, 512}, {"small gate, up", 1408, 512}, {"small down", 512, 1408}};
#define COUNT(array) ((uint32_t)(sizeof(array) / sizeof(array)[0]))

static gpu_shapes shapes_of(flap_device_kind kind, bool quick) {
  if (kind == FLAP_DEVICE_CUDA)
    return (gpu_shapes){.square_least = 1024,
                        .square_most = quick ? 4096 : 8192,
                        .tokens = quick ? 2048 : 4096,
                        .attention_least = 1024,
                        .attention_most = quick ? 2048 : 8192,
                        .heads = 32,
                        .copy_bytes = 256 * FLAP_MIB,
                        .elements = (uint64_t)32 << 20,
                        .layers = cuda_layers,
                        .layer_count = COUNT(cuda_layers)};
  return (gpu_shapes){.square_least = 256,
                      .square_most = quick ? 512 : 1024,
                      .tokens = quick ? 128 : 256,
                      .attention_least = 128,
                      .attention_most = quick ? 256 : 1024,
                      .heads = 8,
                      .copy_bytes = 32 * FLAP_MIB,
                      .elements = (uint64_t)4 << 20,
                      .layers = cpu_layers,
                      .layer_count = COUNT(cpu_layers)};
}

typedef struct gpu_job {
  flap_limits *limits;
  flap_ops_meter *meter;
  flap_device_kind kind;
  gpu_shapes shapes;
} gpu_job;

static const flap_dtype dtypes[] = {FLAP_BF16, FLAP_F16, FLAP_F32};
static const char *const dtype_words[] = {"bf16", "fp16", "fp32"};

/* ---- products -------------------------------------------------------------------------------------------- */

static flap_status squares(gpu_job *job) {
  flap_limits_section *section =
      flap_limits_begin(job->limits, "gpu", "gemm_squares", FLAP_LIMITS_LOG, FLAP_LIMITS_FLOPS, "size");
  flap_limits_text(section->title, sizeof section->title, "Matrix products, squares");
  flap_limits_text(section->note, sizeof section->note, "On %.96s. C = A Bᵀ, all three of the type; sums in fp32.",
                   flap_ops_meter_describe(job->meter));
  for (uint32_t d = 0; d < COUNT(dtypes); d++)
    flap_limits_series(section, dtype_words[d]);
  for (uint32_t side = job->shapes.square_least; side <= job->shapes.square_most; side *= 2)
    (void)flap_limits_row_add(section, side, "%u", side);
  for (uint32_t d = 0; d < COUNT(dtypes); d++) /* the outer loop: a type's kernels are opened once */
    for (uint32_t r = 0; r < section->row_count; r++) {
      const uint32_t side = (uint32_t)section->rows[r].x;
      FLAP_TRY(
          flap_ops_measure_matmul(job->meter, dtypes[d], FLAP_NT, side, side, side, false, &section->rows[r].cells[d]));
    }
  flap_limits_end(job->limits, section);
  return FLAP_OK;
}

static flap_status layers(gpu_job *job, uint32_t d) {
  char key[32];
  const uint32_t t = job->shapes.tokens;
  const flap_dtype dtype = dtypes[d];
  (void)snprintf(key, sizeof key, "gemm_layer_%s", dtype_words[d]);
  flap_limits_section *section =
      flap_limits_begin(job->limits, "gpu", key, FLAP_LIMITS_NAMES, FLAP_LIMITS_FLOPS, "product");
  flap_limits_text(section->title, sizeof section->title, "Matrix products of a Llama layer, %s", dtype_words[d]);
  flap_limits_text(section->note, sizeof section->note,
                   "%u tokens. Forward: y = x Wᵀ; gradient of x: dy W; of W: dyᵀ x, added to a sum in fp32.", t);
  flap_limits_series(section, "forward");
  flap_limits_series(section, "gradient of x");
  flap_limits_series(section, "gradient of W");
  for (uint32_t i = 0; i < job->shapes.layer_count; i++) {
    const struct layer_shape *w = &job->shapes.layers[i];
    flap_limits_row *row = flap_limits_row_add(section, i, "%s: %u x %u", w->name, w->out, w->in);
    FLAP_TRY(flap_ops_measure_matmul(job->meter, dtype, FLAP_NT, t, w->out, w->in, false, &row->cells[0]));
    FLAP_TRY(flap_ops_measure_matmul(job->meter, dtype, FLAP_NN, t, w->in, w->out, false, &row->cells[1]));
    FLAP_TRY(flap_ops_measure_matmul(job->meter, dtype, FLAP_TN, w->out, w->in, t, true, &row->cells[2]));
  }
  flap_limits_end(job->limits, section);
  return FLAP_OK;
}

/* ---- attention and memory -------------------------------------------------------------------------------- */

static flap_status attention(gpu_job *job) {
  flap_limits_section *section =
      flap_limits_begin(job->limits, "gpu", "attention", FLAP_LIMITS_LOG, FLAP_LIMITS_FLOPS, "tokens");
  flap_limits_text(section->title, sizeof section->title, "Causal attention in bf16, by tokens");
  flap_limits_text(section->note, sizeof section->note,
                   "One sequence, %u heads of 64 and of 128. Counted: half of the square; two products forward, five "
                   "backward.",
                   job->shapes.heads);
  flap_limits_series(section, "forward 64");
  flap_limits_series(section, "backward 64");
  flap_limits_series(section, "forward 128");
  flap_limits_series(section, "backward 128");
  for (uint32_t tokens = job->shapes.attention_least; tokens <= job->shapes.attention_most; tokens *= 2) {
    flap_limits_row *row = flap_limits_row_add(section, tokens, "%u", tokens);
    for (uint32_t i = 0; i < 2; i++)
      FLAP_TRY(flap_ops_measure_attention(job->meter, FLAP_BF16, tokens, 64u << i, &row->cells[2 * i],
                                          &row->cells[2 * i + 1]));
  }
  flap_limits_end(job->limits, section);
  return FLAP_OK;
}

static flap_status memory(gpu_job *job) {
  flap_limits_section *section =
      flap_limits_begin(job->limits, "gpu", "gpu_memory", FLAP_LIMITS_NAMES, FLAP_LIMITS_BYTES, "kernel");
  flap_limits_text(section->title, sizeof section->title, "Memory of the device, and AdamW on it");
  flap_limits_text(section->note, sizeof section->note,
                   "Bytes read and written: a copy of %s; AdamW over %s parameters, %.0f bytes each with fp32 moments, "
                   "%.2f with 8-bit ones.",
                   flap_text_bytes(job->shapes.copy_bytes).text, flap_text_count(job->shapes.elements).text,
                   FLAP_OPS_ADAMW_BYTES, FLAP_OPS_ADAMW_8BIT_BYTES);
  flap_limits_series(section, "rate");
  FLAP_TRY(
      flap_ops_measure_copy(job->meter, job->shapes.copy_bytes, &flap_limits_row_add(section, 0, "copy")->cells[0]));
  FLAP_TRY(flap_ops_measure_adamw(job->meter, job->shapes.elements, false,
                                  &flap_limits_row_add(section, 1, "AdamW, fp32 moments")->cells[0]));
  FLAP_TRY(flap_ops_measure_adamw(job->meter, job->shapes.elements, true,
                                  &flap_limits_row_add(section, 2, "AdamW, 8-bit moments")->cells[0]));
  flap_limits_end(job->limits, section);
  return FLAP_OK;
}

static flap_status measure_all(gpu_job *job) {
  FLAP_TRY(squares(job));
  for (uint32_t d = 0; d < COUNT(dtypes); d++)
    FLAP_TRY(layers(job, d));
  FLAP_TRY(attention(job));
  return memory(job);
}

static flap_status measure_with(gpu_job *job, flap_pool *pool, uint64_t vram_bytes) {
  flap_rate_effort effort = job->limits->effort;
  if (effort.round_ns > ROUND_NS)
    effort.round_ns = ROUND_NS;
  const flap_ops_meter_config config = {.kind = job->kind,
                                        .pool = pool,
                                        .vram_bytes = vram_bytes > 0                  ? vram_bytes
                                                      : job->kind == FLAP_DEVICE_CUDA ? VRAM_CUDA
                                                                                      : VRAM_CPU,
                                        .tokens_max = job->shapes.attention_most,
                                        .heads = job->shapes.heads,
                                        .head_size_max = 128};
  FLAP_TRY(flap_ops_meter_open(&config, &effort, &job->meter));
  const flap_status status = measure_all(job);
  flap_ops_meter_close(job->meter);
  return status;
}

flap_status flap_limits_gpu(flap_limits *limits, flap_device_kind kind, uint32_t threads, uint64_t vram_bytes) {
  flap_pool *pool = NULL;
  gpu_job job = {.limits = limits, .kind = kind, .shapes = shapes_of(kind, limits->quick)};
  if (kind == FLAP_DEVICE_CPU)
    FLAP_TRY(flap_pool_open(threads, &pool));
  const flap_status status = measure_with(&job, pool, vram_bytes);
  if (pool != NULL)
    flap_pool_close(pool);
  return status;
}

/* ---- the bus --------------------------------------------------------------------------------------------- */

static flap_status copies(flap_limits *limits, flap_copies_meter *meter, uint64_t bytes_max,
                          const flap_rate_effort *effort) {
  static const char *const series[] = {"pinned H2D",   "pinned D2H",   "pinned both",
                                       "pageable H2D", "pageable D2H", "pageable both"};
  flap_limits_section *section =
      flap_limits_begin(limits, "pcie", "copy_bytes", FLAP_LIMITS_LOG, FLAP_LIMITS_BYTES, "copy");
  flap_limits_text(section->title, sizeof section->title, "Between host and card, by size of copy");
  flap_limits_text(section->note, sizeof section->note,
                   "%.96s. One copy launched after another; of both ways at once, the sum.",
                   flap_copies_meter_describe(meter));
  for (uint32_t i = 0; i < COUNT(series); i++)
    flap_limits_series(section, series[i]);
  for (uint64_t bytes = 4 * FLAP_KIB; bytes <= bytes_max; bytes *= limits->quick ? 16 : 4) {
    flap_limits_row *row = flap_limits_row_bytes(section, bytes);
    for (uint32_t i = 0; i < COUNT(series); i++)
      FLAP_TRY(flap_copies_measure(meter, (flap_copies_way)(i % 3), i < 3, bytes, effort, &row->cells[i]));
  }
  flap_limits_end(limits, section);
  return FLAP_OK;
}

static uint64_t pin_bytes(bool quick) {
  const long pages = sysconf(_SC_AVPHYS_PAGES), page = sysconf(_SC_PAGESIZE);
  const uint64_t share = pages > 0 && page > 0 ? (uint64_t)pages * (uint64_t)page / PIN_SHARE : 0;
  if (quick || share < PIN_BYTES_LEAST)
    return PIN_BYTES_LEAST;
  return share < PIN_BYTES ? share / PIN_BYTES_LEAST * PIN_BYTES_LEAST : PIN_BYTES;
}

flap_status flap_limits_pcie(flap_limits *limits, uint64_t vram_bytes) {
  flap_copies_meter *meter;
  flap_rate pin;
  const uint64_t bytes_max = limits->quick ? COPIES_BYTES_QUICK : COPIES_BYTES, pinned = pin_bytes(limits->quick);
  flap_rate_effort effort = limits->effort;
  if (effort.round_ns > ROUND_NS)
    effort.round_ns = ROUND_NS;
  FLAP_TRY(flap_copies_meter_open(FLAP_DEVICE_CUDA, vram_bytes > 0 ? vram_bytes : COPIES_VRAM, bytes_max, pinned,
                                  &meter, &pin));
  const flap_status status = copies(limits, meter, bytes_max, &effort);
  flap_copies_meter_close(meter);
  FLAP_TRY(status);
  flap_limits_section *section =
      flap_limits_begin(limits, "pcie", "pinning", FLAP_LIMITS_NAMES, FLAP_LIMITS_SECONDS_PER_GIB, "what");
  flap_limits_text(section->title, sizeof section->title, "Pinning memory of the host");
  flap_limits_text(section->note, sizeof section->note,
                   "Areas of %s that nobody had touched: their pages are found and zeroed meanwhile.",
                   flap_text_bytes(pinned).text);
  flap_limits_series(section, "time");
  flap_limits_row_add(section, 0, "pin")->cells[0] = pin;
  flap_limits_end(limits, section);
  return FLAP_OK;
}

/* ---- a plan ---------------------------------------------------------------------------------------------- */

static flap_rate certain(double seconds) {
  return (flap_rate){.median = seconds, .least = seconds, .most = seconds, .rounds = 1};
}

void flap_limits_plan(flap_limits *limits, const flap_plan *plan, const flap_machine *measured) {
  const double rates[FLAP_LANE_COUNT] = {[FLAP_LANE_HOST] = measured->host_bytes,
                                         [FLAP_LANE_H2D] = measured->h2d_bytes,
                                         [FLAP_LANE_D2H] = measured->d2h_bytes,
                                         [FLAP_LANE_DISK_READ] = measured->disk_read_bytes,
                                         [FLAP_LANE_DISK_WRITE] = measured->disk_write_bytes};
  char number[32];
  flap_limits_section *section =
      flap_limits_begin(limits, "plan", "plan_lanes", FLAP_LIMITS_NAMES, FLAP_LIMITS_SECONDS, "lane");
  flap_limits_number(plan->step_seconds, number, sizeof number);
  flap_limits_text(section->title, sizeof section->title, "The plan's lanes in a step of %s s", number);
  flap_limits_text(
      section->note, sizeof section->note,
      "Busy: in the plan. Least: the same bytes at the rate that was measured here, or the products alone.");
  flap_limits_series(section, "busy");
  flap_limits_series(section, "least");
  flap_limits_row *row = flap_limits_row_add(section, 0, "compute");
  row->cells[0] = certain(plan->compute_seconds);
  row->cells[1] = certain(1.5 * plan->bound_backward_seconds); /* each product once */
  for (int lane = 0; lane < FLAP_LANE_COUNT; lane++) {
    row = flap_limits_row_add(section, lane + 1, "%s: %s", flap_pager_lane_name((flap_lane)lane),
                              flap_text_bytes(plan->lane_bytes[lane]).text);
    row->cells[0] = certain(plan->lane_seconds[lane]);
    const bool disk = lane == FLAP_LANE_DISK_READ || lane == FLAP_LANE_DISK_WRITE;
    if (rates[lane] > 0)
      row->cells[1] = certain((double)plan->lane_bytes[lane] * (disk ? plan->disk_share : 1) / rates[lane]);
  }
  flap_limits_end(limits, section);
}
