/* The steps between the products: masks, the running softmax and its derivative, on sums held as fragments (see
 * attention_tiles.cuh). The kernels of all generations share them, so they round alike. */
#ifndef FLAP_KERNELS_CUDA_ATTENTION_SOFTMAX_CUH
#define FLAP_KERNELS_CUDA_ATTENTION_SOFTMAX_CUH

#include "kernels/cuda/attention_tiles.cuh"

/* Of rows g and g + 8 of each m: of raw scores, and of the lane's own columns. */
template <int MT> struct attention_running { float maximum[MT][2], sum[MT][2]; };

template <int MT> __device__ __forceinline__ void attention_running_open(attention_running<MT> &state) {
#pragma unroll
  for (int m = 0; m < MT; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      state.maximum[m][half] = -INFINITY;
      state.sum[m][half] = 0.0f;
    }
}

template <int MT> __device__ __forceinline__ void attention_fill(float (&factor)[MT][2], float value) {
#pragma unroll
  for (int m = 0; m < MT; ++m)
    factor[m][0] = factor[m][1] = value;
}

/* Hides the keys after each query. `distance` is the first query of the warp less the first key of the tile. */
template <int MT, int KEYS>
__device__ __forceinline__ void attention_hide_later_keys(float (&scores)[MT][KEYS / 8][4], int distance) {
  const int lane = static_cast<int>(threadIdx.x & 31);
#pragma unroll
  for (int m = 0; m < MT; ++m)
#pragma unroll
    for (int n = 0; n < KEYS / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = distance + m * 16 + (i >> 1) * 8 + (lane >> 2), column = n * 8 + (lane & 3) * 2 + (i & 1);
        if (column > row)
          scores[m][n][i] = -INFINITY;
      }
}

/* Scores become probabilities relative to the running maximum; factor: what rescales all that was summed before. */
template <int MT, int KEYS>
__device__ __forceinline__ void attention_softmax_tile(float (&scores)[MT][KEYS / 8][4], attention_running<MT> &state,
                                                       float (&factor)[MT][2], float scale_log2) {
#pragma unroll
  for (int m = 0; m < MT; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float top = state.maximum[m][half];
#pragma unroll
      for (int n = 0; n < KEYS / 8; ++n)
        top = fmaxf(top, fmaxf(scores[m][n][2 * half], scores[m][n][2 * half + 1]));
      top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 1));
      top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 2));
      factor[m][half] = attention_exp2((state.maximum[m][half] - top) * scale_log2);
      const float offset = top * scale_log2;
      float sum = state.sum[m][half] * factor[m][half];
#pragma unroll
      for (int n = 0; n < KEYS / 8; ++n) {
        const float a = attention_exp2(fmaf(scores[m][n][2 * half], scale_log2, -offset));
        const float b = attention_exp2(fmaf(scores[m][n][2 * half + 1], scale_log2, -offset));
        scores[m][n][2 * half] = a;
        scores[m][n][2 * half + 1] = b;
        sum += a + b;
      }
      state.maximum[m][half] = top;
      state.sum[m][half] = sum;
    }
}

template <int MT, int HD>
__device__ __forceinline__ void attention_rescale(float (&out)[MT][HD / 8][4], const float (&factor)[MT][2]) {
#pragma unroll
  for (int m = 0; m < MT; ++m)
#pragma unroll
    for (int n = 0; n < HD / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        out[m][n][i] *= factor[m][i >> 1];
}

/* The end of a row: factor becomes 1 / sum, and lse is stored unless NULL. `lse` is of the warp's first row. */
template <int MT>
__device__ __forceinline__ void attention_running_close(const attention_running<MT> &state, float (&factor)[MT][2],
                                                        float *lse, uint32_t valid, float scale) {
  const uint32_t lane = threadIdx.x & 31;
#pragma unroll
  for (int m = 0; m < MT; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float sum = state.sum[m][half];
      sum += __shfl_xor_sync(0xffffffffu, sum, 1);
      sum += __shfl_xor_sync(0xffffffffu, sum, 2);
      factor[m][half] = 1.0f / sum;
      const uint32_t row = m * 16 + half * 8 + (lane >> 2);
      if (lse != NULL && (lane & 3) == 0 && row < valid)
        lse[row] = fmaf(state.maximum[m][half], scale, logf(sum));
    }
}

/* ---- derivative, keys as rows ---- */

/* Raw scores (keys as rows, queries as columns) become probabilities. `statistics`: of the tile's queries, in pairs.
 * `distance` is the warp's first key less the first query. */
template <int MT, int QUERIES>
__device__ __forceinline__ void attention_probabilities_of_keys(float (&scores)[MT][QUERIES / 8][4],
                                                                const float4 *statistics, int distance,
                                                                float scale_log2) {
  const int lane = static_cast<int>(threadIdx.x & 31);
  if (distance + MT * 16 > 1) /* few tiles have anything to hide, and the others shall not pay for it */
#pragma unroll
    for (int m = 0; m < MT; ++m)
#pragma unroll
      for (int n = 0; n < QUERIES / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          if (distance + m * 16 + (i >> 1) * 8 + (lane >> 2) > n * 8 + (lane & 3) * 2 + (i & 1))
            scores[m][n][i] = -INFINITY;
#pragma unroll
  for (int n = 0; n < QUERIES / 8; ++n) {
    const float4 pair = statistics[n * 4 + (lane & 3)]; /* lse and delta of the lane's two queries */
#pragma unroll
    for (int m = 0; m < MT; ++m)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        scores[m][n][i] = attention_exp2(fmaf(scores[m][n][i], scale_log2, -(i & 1 ? pair.z : pair.x)));
  }
}

/* dp becomes the gradient of the scores, less the scale. */
template <int MT, int QUERIES>
__device__ __forceinline__ void attention_gradient_of_keys(float (&gradient)[MT][QUERIES / 8][4],
                                                           const float (&p)[MT][QUERIES / 8][4],
                                                           const float4 *statistics) {
#pragma unroll
  for (int n = 0; n < QUERIES / 8; ++n) {
    const float4 pair = statistics[n * 4 + (threadIdx.x & 3)];
#pragma unroll
    for (int m = 0; m < MT; ++m)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        gradient[m][n][i] = p[m][n][i] * (gradient[m][n][i] - (i & 1 ? pair.w : pair.y));
  }
}

/* fp32 sums of one part of the heads, (parts, 2, B, keys, HKV, HD). */
template <int HD, int MT>
__device__ __forceinline__ void attention_store_partial(float *to, uint64_t stride, uint32_t valid, uint32_t head_size,
                                                        const float (&c)[MT][HD / 8][4], float factor) {
  const uint32_t lane = threadIdx.x & 31;
#pragma unroll
  for (int m = 0; m < MT; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t row = m * 16 + half * 8 + (lane >> 2);
#pragma unroll
      for (int n = 0; n < HD / 8; ++n)
        if (row < valid && n * 8 < head_size)
          *reinterpret_cast<float2 *>(to + row * stride + n * 8 + (lane & 3) * 2) =
              make_float2(c[m][n][2 * half] * factor, c[m][n][2 * half + 1] * factor);
    }
}

/* The end of a block of keys: stores the warp's rows of dk and dv, from `first` on, rounded or as one part's sums.
 * `shared`: as many rows for dk, and ROWS further as many for dv, which no other warp reads any more. */
template <typename T, int HD, int MT, int ROWS>
__device__ __forceinline__ void attention_store_keys(const attention_args &args, const attention_key_block &block,
                                                     uint32_t first, const float (&dk)[MT][HD / 8][4],
                                                     const float (&dv)[MT][HD / 8][4], unsigned char *shared) {
  constexpr uint32_t ROW = attention_row_bytes<HD>;
  const uint32_t valid = block.rows > first ? block.rows - first : 0;
  if (args.parts > 1) {
    float *to = args.partial + block.partial + first * block.partial_stride;
    attention_store_partial<HD, MT>(to, block.partial_stride, valid, args.head_size, dk, args.scale);
    attention_store_partial<HD, MT>(to + block.partial_count, block.partial_stride, valid, args.head_size, dv, 1.0f);
    return;
  }
  float scale[MT][2], one[MT][2];
  attention_fill<MT>(scale, args.scale);
  attention_fill<MT>(one, 1.0f);
  const uint64_t to = block.kv + first * args.kv_stride;
  attention_store_rows<T, HD, MT>(attention_at(args.dk, to), args.kv_stride, valid, args.head_size, dk, scale,
                                  shared + first * ROW);
  attention_store_rows<T, HD, MT>(attention_at(args.dv, to), args.kv_stride, valid, args.head_size, dv, one,
                                  shared + (ROWS + first) * ROW);
}

/* ---- derivative, queries as rows ---- */

/* As above; row: lse and delta of the lane's rows. `distance` is the warp's first query less the first key. */
template <int MT, int KEYS>
__device__ __forceinline__ void attention_probabilities_of_queries(float (&scores)[MT][KEYS / 8][4],
                                                                   const float2 (&row)[MT][2], int distance,
                                                                   float scale_log2) {
  if (KEYS > distance + 1)
    attention_hide_later_keys<MT, KEYS>(scores, distance);
#pragma unroll
  for (int n = 0; n < KEYS / 8; ++n)
#pragma unroll
    for (int m = 0; m < MT; ++m)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        scores[m][n][i] = attention_exp2(fmaf(scores[m][n][i], scale_log2, -row[m][i >> 1].x));
}

template <int MT, int KEYS>
__device__ __forceinline__ void attention_gradient_of_queries(float (&gradient)[MT][KEYS / 8][4],
                                                              const float (&p)[MT][KEYS / 8][4],
                                                              const float2 (&row)[MT][2]) {
#pragma unroll
  for (int n = 0; n < KEYS / 8; ++n)
#pragma unroll
    for (int m = 0; m < MT; ++m)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        gradient[m][n][i] = p[m][n][i] * (gradient[m][n][i] - row[m][i >> 1].y);
}

/* lse and delta of the lane's rows; zeros, which add nothing, for rows from `valid` on. */
template <int MT>
__device__ __forceinline__ void attention_load_statistics(float2 (&row)[MT][2], const float2 *from, uint32_t first,
                                                          uint32_t valid) {
#pragma unroll
  for (int m = 0; m < MT; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t index = first + m * 16 + half * 8 + ((threadIdx.x & 31) >> 2);
      row[m][half] = index < valid ? from[index] : make_float2(0.0f, 0.0f);
    }
}

#endif
