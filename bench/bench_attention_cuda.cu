/* Measures the attention kernels for CUDA over a table of shapes, and how far reading a cache is from memory's speed.
 *
 *   bench_attention_cuda [row [portable | two | little]]   all rows, or one (for a profiler: a single run of each
 * kernel)
 *
 * Rates are medians, in TFLOP/s of causal attention that computes nothing twice: 2 products forward, 5 backward, half
 * of the square. Operands are random: zeros run faster. */
#include "kernels/cuda/attention.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <vector>

namespace {

struct row {
  uint32_t batch, sequence, heads, kv_heads, head_size;
  flap_dtype dtype;
};

const row ROWS[] = {
    {8, 2048, 32, 32, 64, FLAP_BF16},  {2, 8192, 32, 32, 64, FLAP_BF16},  {8, 2048, 32, 8, 64, FLAP_BF16},
    {2, 8192, 32, 8, 64, FLAP_BF16},   {4, 2048, 32, 32, 128, FLAP_BF16}, {1, 8192, 32, 32, 128, FLAP_BF16},
    {4, 2048, 32, 8, 128, FLAP_BF16},  {1, 8192, 32, 8, 128, FLAP_BF16},  {1, 8192, 32, 8, 128, FLAP_F16},
    {8, 2048, 16, 16, 128, FLAP_BF16}, {1, 2048, 32, 8, 128, FLAP_BF16},  {1, 1024, 16, 8, 128, FLAP_BF16},
    {4, 2048, 32, 8, 96, FLAP_BF16},   {1, 1024, 8, 8, 256, FLAP_BF16},   {1, 1024, 8, 8, 128, FLAP_F32},
    {1, 1000, 8, 2, 64, FLAP_BF16},
};

void ok(cudaError_t status, const char *what) {
  if (status == cudaSuccess)
    return;
  fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(status));
  exit(EXIT_FAILURE);
}

/* Uniform in [-2, 2) from a counter. */
__global__ void fill(void *values, uint64_t count, flap_dtype dtype, uint32_t seed) {
  const uint64_t i = blockIdx.x * static_cast<uint64_t>(blockDim.x) + threadIdx.x;
  if (i >= count)
    return;
  uint32_t bits = static_cast<uint32_t>(i) * 2654435761u + seed;
  bits = (bits ^ (bits >> 15)) * 2246822519u;
  bits = (bits ^ (bits >> 13)) * 3266489917u;
  const float value = static_cast<float>(bits >> 8) * 0x1p-22f - 2.0f;
  if (dtype == FLAP_F32)
    static_cast<float *>(values)[i] = value;
  else /* bf16 by cutting; for fp16, eleven bits between 1 and 2 or their negatives */
    static_cast<uint16_t *>(values)[i] =
        static_cast<uint16_t>(dtype == FLAP_BF16 ? __float_as_uint(value) >> 16 : (bits & 0x83ffu) | 0x3c00u);
}

struct buffers {
  std::vector<void *> all;
  void *take(uint64_t bytes) {
    void *memory = nullptr;
    ok(cudaMalloc(&memory, bytes > 0 ? bytes : 256), "cudaMalloc");
    all.push_back(memory);
    return memory;
  }
  void *take_random(uint64_t count, flap_dtype dtype) {
    void *memory = take(count * flap_dtype_bytes(dtype));
    fill<<<static_cast<uint32_t>((count + 255) / 256), 256>>>(memory, count, dtype,
                                                              static_cast<uint32_t>(all.size()) * 77777u);
    return memory;
  }
  ~buffers() {
    for (void *memory : all)
      cudaFree(memory);
  }
};

/* Median time of a call; with `once`, of one run. */
template <typename F> double milliseconds(F call, bool once) {
  cudaEvent_t begin, end;
  ok(cudaEventCreate(&begin), "event");
  ok(cudaEventCreate(&end), "event");
  std::vector<float> times;
  float total = 0;
  for (int i = 0; i < (once ? 1 : 50) && (i < 5 || total < 150); ++i) {
    ok(cudaEventRecord(begin), "record");
    ok(call(), "attention");
    ok(cudaEventRecord(end), "record");
    ok(cudaEventSynchronize(end), "attention");
    float ms = 0;
    ok(cudaEventElapsedTime(&ms, begin, end), "elapsed");
    if (i > 0 || once) /* the first loads the module */
      times.push_back(ms);
    total += ms;
  }
  cudaEventDestroy(begin);
  cudaEventDestroy(end);
  std::nth_element(times.begin(), times.begin() + times.size() / 2, times.end());
  return times[times.size() / 2];
}

enum kernels { CHOSEN, TWO_PASSES, PORTABLE, LITTLE_SHARED };

void measure(const row &r, kernels which, bool once) {
  flap_cuda_attention_shape s = {};
  s.batch = r.batch;
  s.queries = s.keys = r.sequence;
  s.heads = r.heads;
  s.kv_heads = r.kv_heads;
  s.head_size = r.head_size;
  s.q_stride = r.heads * r.head_size;
  s.kv_stride = r.kv_heads * r.head_size;
  s.dtype = r.dtype;
  s.portable = which == PORTABLE || which == LITTLE_SHARED;
  s.little_shared = which == LITTLE_SHARED;
  s.two_passes = which == TWO_PASSES;
  const uint64_t q_count = static_cast<uint64_t>(r.batch) * r.sequence * s.q_stride;
  const uint64_t kv_count = static_cast<uint64_t>(r.batch) * r.sequence * s.kv_stride;
  const uint64_t bytes = flap_dtype_bytes(r.dtype),
                 forward_scratch_bytes = flap_cuda_attention_forward_scratch_bytes(&s);
  const uint64_t scratch_bytes = std::max(forward_scratch_bytes, flap_cuda_attention_backward_scratch_bytes(&s));
  buffers b;
  void *q = b.take_random(q_count, r.dtype), *k = b.take_random(kv_count, r.dtype);
  void *v = b.take_random(kv_count, r.dtype), *dout = b.take_random(q_count, r.dtype);
  void *out = b.take(q_count * bytes), *dq = b.take(q_count * bytes);
  void *dk = b.take(kv_count * bytes), *dv = b.take(kv_count * bytes), *scratch = b.take(scratch_bytes);
  float *lse = static_cast<float *>(b.take(static_cast<uint64_t>(r.batch) * r.heads * r.sequence * sizeof(float)));
  const double forward =
      milliseconds([&] { return flap_cuda_attention_forward(&s, out, lse, q, k, v, scratch, nullptr); }, once);
  const double backward = milliseconds(
      [&] { return flap_cuda_attention_backward(&s, dq, dk, dv, dout, q, k, v, out, lse, scratch, nullptr); }, once);
  const double product = static_cast<double>(r.batch) * r.heads * r.head_size * r.sequence * r.sequence * 1e-9;
  printf("%4u %6u %4u %4u %4u  %-8s %-7s %9.3f %9.3f %8.1f %8.1f %8.1f %8.1f\n", r.batch, r.sequence, r.heads,
         r.kv_heads, r.head_size, flap_dtype_name(r.dtype),
         which == LITTLE_SHARED ? "little" : flap_cuda_attention_path(&s, true), forward, backward,
         2 * product / forward, 5 * product / backward, 7 * product / (forward + backward),
         static_cast<double>(scratch_bytes) / (1 << 20));
}

void measure_decode(uint32_t tokens, uint32_t keys, uint32_t heads, uint32_t kv_heads) {
  flap_cuda_attention_shape s = {};
  s.batch = 1;
  s.queries = tokens;
  s.keys = keys;
  s.first_position = keys - tokens;
  s.heads = heads;
  s.kv_heads = kv_heads;
  s.head_size = 128;
  s.q_stride = heads * 128;
  s.kv_stride = kv_heads * 128;
  s.dtype = FLAP_BF16;
  buffers b;
  void *q = b.take_random(static_cast<uint64_t>(tokens) * s.q_stride, s.dtype);
  void *k = b.take_random(static_cast<uint64_t>(keys) * s.kv_stride, s.dtype);
  void *v = b.take_random(static_cast<uint64_t>(keys) * s.kv_stride, s.dtype);
  void *out = b.take(static_cast<uint64_t>(tokens) * s.q_stride * 2);
  void *scratch = b.take(flap_cuda_attention_forward_scratch_bytes(&s));
  const double ms =
      milliseconds([&] { return flap_cuda_attention_forward(&s, out, nullptr, q, k, v, scratch, nullptr); }, false);
  printf("decode: %2u queries, %6u keys, %u heads, %u kv heads: %8.3f ms, %7.1f GB/s of keys and values\n", tokens,
         keys, heads, kv_heads, ms, 4.0 * keys * s.kv_stride / ms * 1e-6);
}

} // namespace

int main(int argc, char **argv) {
  cudaDeviceProp properties;
  ok(cudaGetDeviceProperties(&properties, 0), "device");
  printf(
      "%s\n   B      S   HQ  HKV   HD  dtype    path     fwd ms    bwd ms  fwd TF/s bwd TF/s both TF/s scratch MiB\n",
      properties.name);
  const int count = static_cast<int>(sizeof ROWS / sizeof *ROWS);
  if (argc > 1) {
    const int index = atoi(argv[1]);
    if (index < 0 || index >= count) {
      fprintf(stderr, "rows are 0 to %d\n", count - 1);
      return EXIT_FAILURE;
    }
    measure(ROWS[index],
            argc < 3            ? CHOSEN
            : argv[2][0] == 't' ? TWO_PASSES
            : argv[2][0] == 'l' ? LITTLE_SHARED
                                : PORTABLE,
            true);
    return EXIT_SUCCESS;
  }
  for (const row &r : ROWS)
    for (kernels which : {LITTLE_SHARED, PORTABLE, TWO_PASSES, CHOSEN})
      measure(r, which, false);
  for (uint32_t keys : {1024u, 16384u, 131072u})
    measure_decode(1, keys, 32, 8);
  measure_decode(8, 16384, 32, 8);
  return EXIT_SUCCESS;
}
