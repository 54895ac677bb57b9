/* The host's memory by number of threads, and beside it the optimizer that is bound by it. */
#include "tools/limits.h"

#include "base/units.h"
#include "kernels/device/measure_memory.h"
#include "kernels/measure_ops.h"
#include "tools/text.h"

#define ELEMENTS ((uint64_t)16 << 20) /* of AdamW: 224 MiB with fp32 moments */
#define ELEMENTS_QUICK ((uint64_t)4 << 20)
#define BYTES_QUICK (64 * FLAP_MIB)
#define ADAMW_VRAM_PER_ELEMENT 14u /* weight, its low half, gradient, two moments */

static flap_status measure_adamw(flap_limits *limits, flap_pool *pool, flap_rate *cells) {
  flap_ops_meter *meter;
  const uint64_t elements = limits->quick ? ELEMENTS_QUICK : ELEMENTS;
  flap_ops_meter_config config = {
      .kind = FLAP_DEVICE_CPU, .pool = pool, .tokens_max = 1, .heads = 1, .head_size_max = 64};
  config.vram_bytes = flap_ops_meter_vram(&config, ADAMW_VRAM_PER_ELEMENT * elements);
  FLAP_TRY(flap_ops_meter_open(&config, &limits->effort, &meter));
  flap_status status = flap_ops_measure_adamw(meter, elements, false, &cells[0]);
  if (status == FLAP_OK)
    status = flap_ops_measure_adamw(meter, elements, true, &cells[1]);
  flap_ops_meter_close(meter);
  return status;
}

static flap_status measure_threads(flap_limits *limits, uint32_t threads, uint64_t bytes, flap_rate *cells) {
  flap_pool *pool;
  FLAP_TRY(flap_pool_open(threads, &pool));
  flap_status status = flap_measure_host_memory(pool, bytes, FLAP_MEMORY_ALL, &limits->effort, cells);
  if (status == FLAP_OK)
    status = measure_adamw(limits, pool, cells + FLAP_MEMORY_PATTERNS);
  flap_pool_close(pool);
  return status;
}

static flap_status count_threads(uint32_t wanted, uint32_t *threads_out) {
  flap_pool *pool;
  FLAP_TRY(flap_pool_open(wanted, &pool));
  *threads_out = flap_pool_threads(pool);
  flap_pool_close(pool);
  return FLAP_OK;
}

flap_status flap_limits_host(flap_limits *limits, uint32_t threads) {
  static const char *const series[] = {
      [FLAP_MEMORY_READ] = "read", [FLAP_MEMORY_WRITE] = "write",         [FLAP_MEMORY_MODIFY] = "read-modify-write",
      [FLAP_MEMORY_COPY] = "copy", [FLAP_MEMORY_PATTERNS] = "AdamW fp32", [FLAP_MEMORY_PATTERNS + 1] = "AdamW 8-bit"};
  const uint64_t bytes = limits->quick ? BYTES_QUICK : flap_measure_host_bytes();
  uint32_t all = 0;
  FLAP_TRY(count_threads(threads, &all));
  flap_limits_section *section =
      flap_limits_begin(limits, "host", "host_threads", FLAP_LIMITS_LOG, FLAP_LIMITS_BYTES, "threads");
  for (size_t i = 0; i < sizeof series / sizeof series[0]; i++)
    flap_limits_series(section, series[i]);
  flap_limits_text(section->title, sizeof section->title, "Memory of the host, by threads");
  flap_limits_text(section->note, sizeof section->note,
                   "Bytes read and written over %s. AdamW over %s parameters with bf16 weights, split masters and bf16 "
                   "gradients: %.0f bytes each with fp32 moments, %.2f with 8-bit ones.",
                   flap_text_bytes(bytes).text, flap_text_count(limits->quick ? ELEMENTS_QUICK : ELEMENTS).text,
                   FLAP_OPS_ADAMW_BYTES, FLAP_OPS_ADAMW_8BIT_BYTES);
  for (uint32_t n = 1; n <= all; n = n < all && 2 * n > all ? all : 2 * n)
    FLAP_TRY(measure_threads(limits, n, bytes, flap_limits_row_add(section, n, "%u", n)->cells));
  flap_limits_end(limits, section);
  return FLAP_OK;
}
