/* What the attention kernels on the tensor cores share: arguments, tiles in shared memory, and products of tiles.
 *
 * A tile is rows of HD elements of 16 bits. A row is cut into chunks of 16 bytes, and chunk c of row r lies at place
 * c ^ (r % 8), so that the eight rows that one ldmatrix reads, and the rows that a warp copies, fall on distinct banks.
 * Products are mma.m16n8k16 with fp32 sums; a warp owns MT * 16 rows of the result.
 *
 * The sums of one product, packed to 16 bits, are the left operand of the next with no movement (fragments:
 * tensor_cores.cuh). */
#ifndef FLAP_KERNELS_CUDA_ATTENTION_TILES_CUH
#define FLAP_KERNELS_CUDA_ATTENTION_TILES_CUH

#include "kernels/cuda/tensor_cores.cuh"

/* Operands of one launch. Of the outputs, those that a kernel does not write are NULL. */
struct attention_args {
  const void *q, *k, *v, *out_in, *dout;
  const float *lse_in;
  const float2 *statistics; /* (B, HQ, queries): lse in powers of two, and the row sum of dout * out */
  void *out, *dq, *dk, *dv;
  float *lse_out;
  float *partial;                  /* of dk and dv, or of a decode; NULL when there is one part */
  uint32_t parts;                  /* that the heads of a group (backward) or the keys (decode) are split into */
  uint32_t stages;                 /* tiles in flight in the loops of the backward: 1 or 2 */
  uint32_t shared_max, shared_all; /* bytes of shared memory that a block may have, and those of a multiprocessor */
  uint32_t
      *turns;   /* of a chain (attention_chain.cu): tickets taken, and how many have added to each sum; zeros before */
  float4 *sums; /* of dq, in slots of a head each */
  uint32_t slots, section_units;
  uint32_t batch, queries, keys, first_position, heads, kv_heads, head_size;
  uint64_t q_stride, kv_stride;
  float scale, scale_log2; /* 1 / sqrt(HD), and that times log2(e) */
};

constexpr float ATTENTION_LOG2_E = 1.4426950408889634f;
constexpr float ATTENTION_LN_2 = 0.6931471805599453f;

__device__ __forceinline__ float attention_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(y) : "f"(x));
  return y;
}

template <int HD> constexpr uint32_t attention_row_bytes = HD * 2;

/* Starts the copy of ROWS rows, `stride` elements apart, into a tile. Rows from `valid` on and columns from `head_size`
 * on become zeros: they then add nothing to any product. */
template <int HD, int ROWS, int THREADS>
__device__ __forceinline__ void attention_load_tile(uint32_t tile, const uint16_t *from, uint32_t valid,
                                                    uint64_t stride, uint32_t head_size) {
  constexpr int CHUNKS = HD / 8, STEP = THREADS / CHUNKS;
  static_assert(STEP % 8 == 0 && ROWS % STEP == 0, "the place of a thread's chunk must not depend on the round");
  const uint32_t row = threadIdx.x / CHUNKS, chunk = threadIdx.x % CHUNKS;
  const bool column_valid = chunk * 8 < head_size;
  const uint16_t *source = from + row * stride + chunk * 8;
  uint32_t to = tile + row * attention_row_bytes<HD> + ((chunk ^ (row & 7)) << 4);
#pragma unroll
  for (int i = 0; i < ROWS / STEP; ++i) {
    const bool copied = column_valid && row + i * STEP < valid;
    copy16(to, copied ? source : from, copied ? 16 : 0);
    source += STEP * stride;
    to += STEP * attention_row_bytes<HD>;
  }
}

/* ---- what a block works on ---- */

/* `rows` queries of one head, from `query` on, and where they lie: in q, in out or dout (rows `packed_stride` apart),
 * in lse or the statistics; and where the sequence's keys and values lie. */
struct attention_query_block {
  uint32_t query, rows;
  uint64_t q, packed, packed_stride, statistic, kv;
};

/* Blocks come in sections of a few units, within which those with the longest rows start first. A unit is what one set
 * of keys and values serves, or in the pass for dk and dv one set of queries: with at most so many units at a time
 * several of a unit's tiles run together and share what they read through the L2 cache. Over all units at once every
 * block reads from memory, where units are many: keys and values of 4 sequences of 2048 tokens with 32 heads of 128 are
 * 134 MB. Fewer units would leave too few blocks to even out their lengths. */
constexpr uint32_t ATTENTION_SECTION_UNITS = 32;

struct attention_place {
  uint32_t item, rank; /* rank 0: the tile that starts first */
};

/* Of block `number`, where there are `items` in sections of `section_items`, and `tiles` for each. */
__device__ __forceinline__ attention_place attention_place_at(uint32_t number, uint32_t tiles, uint32_t items,
                                                              uint32_t section_items) {
  const uint32_t section = number / (section_items * tiles), first = section * section_items;
  const uint32_t count = min(section_items, items - first), index = number - first * tiles;
  return {first + index % count, index / count};
}

/* `items` in all, `per_unit` of them in a row to a unit; the grid has the same number of tiles for each item. */
__device__ __forceinline__ attention_place attention_place_of(uint32_t items, uint32_t per_unit) {
  return attention_place_at(blockIdx.x, gridDim.x / items, items, ATTENTION_SECTION_UNITS * per_unit);
}

/* Block `place.rank` of the queries of a head of a sequence, place.item, of which there are `tiles`. */
template <int ROWS>
__device__ __forceinline__ attention_query_block attention_query_block_at(const attention_args &args,
                                                                          attention_place place, uint32_t tiles) {
  const uint32_t pair = place.item, sequence = pair / args.heads, head = pair % args.heads;
  const uint32_t kv_head = head / (args.heads / args.kv_heads);
  attention_query_block block;
  block.query = (tiles - 1 - place.rank) * ROWS;
  block.rows = min(static_cast<uint32_t>(ROWS), args.queries - block.query);
  const uint64_t token = static_cast<uint64_t>(sequence) * args.queries + block.query;
  block.packed_stride = static_cast<uint64_t>(args.heads) * args.head_size;
  block.q = token * args.q_stride + head * args.head_size;
  block.packed = token * block.packed_stride + head * args.head_size;
  block.statistic = static_cast<uint64_t>(pair) * args.queries + block.query;
  block.kv = static_cast<uint64_t>(sequence) * args.keys * args.kv_stride + kv_head * args.head_size;
  return block;
}

/* The thread block's, of a grid that has one for each. */
template <int ROWS>
__device__ __forceinline__ attention_query_block attention_query_block_of(const attention_args &args) {
  const uint32_t pairs = args.batch * args.heads;
  return attention_query_block_at<ROWS>(args, attention_place_of(pairs, args.heads / args.kv_heads), gridDim.x / pairs);
}

/* `rows` keys of one key-value head, from `key` on, at `kv` in k, v, dk and dv, for `heads` heads of its group. Where
 * those begin, at the sequence's first token: in q, in dout and in the statistics. */
struct attention_key_block {
  uint32_t key, rows, heads;
  uint64_t kv, q, packed, statistic;
  uint64_t partial, partial_stride; /* of dk's sums in args.partial, where there are parts; dv's are partial_count on */
  uint64_t partial_count;
};

/* Block `place.rank` of a unit's keys. */
template <int ROWS>
__device__ __forceinline__ attention_key_block attention_key_block_at(const attention_args &args,
                                                                      attention_place place) {
  attention_key_block block;
  block.heads = args.heads / args.kv_heads / args.parts;
  const uint32_t unit = place.item, part = unit % args.parts, kv_head = unit / args.parts % args.kv_heads;
  const uint32_t sequence = unit / args.parts / args.kv_heads;
  block.key = place.rank * ROWS;
  block.rows = min(static_cast<uint32_t>(ROWS), args.keys - block.key);
  const uint32_t head = kv_head * (args.heads / args.kv_heads) + part * block.heads;
  const uint64_t token = static_cast<uint64_t>(sequence) * args.queries;
  const uint64_t key_token = static_cast<uint64_t>(sequence) * args.keys + block.key;
  block.kv = key_token * args.kv_stride + kv_head * args.head_size;
  block.q = token * args.q_stride + head * args.head_size;
  block.packed = (token * args.heads + head) * args.head_size;
  block.statistic = (static_cast<uint64_t>(sequence) * args.heads + head) * args.queries;
  block.partial_stride = static_cast<uint64_t>(args.kv_heads) * args.head_size;
  block.partial_count = static_cast<uint64_t>(args.batch) * args.keys * block.partial_stride;
  block.partial = 2 * part * block.partial_count + key_token * block.partial_stride + kv_head * args.head_size;
  return block;
}

/* The first keys are seen by the most queries, and their blocks start first. */
template <int ROWS> __device__ __forceinline__ attention_key_block attention_key_block_of(const attention_args &args) {
  return attention_key_block_at<ROWS>(args, attention_place_of(args.batch * args.kv_heads * args.parts, 1));
}

__device__ __forceinline__ const uint16_t *attention_at(const void *tensor, uint64_t offset) {
  return static_cast<const uint16_t *>(tensor) + offset;
}

__device__ __forceinline__ uint16_t *attention_at(void *tensor, uint64_t offset) {
  return static_cast<uint16_t *>(tensor) + offset;
}

/* ---- products ---- */

/* c (MT * 16, N) += rows (MT * 16, HD) · tile (N, HD)ᵀ. `rows` and `tile` are addresses of first rows, at multiples
 * of 8. */
template <typename T, int HD, int MT, int N>
__device__ __forceinline__ void attention_multiply(float (&c)[MT][N / 8][4], uint32_t rows, uint32_t tile) {
  constexpr uint32_t ROW = attention_row_bytes<HD>;
  const uint32_t lane = threadIdx.x & 31;
  const uint32_t a = rows + (lane & 15) * ROW, a_place = (lane >> 4) ^ (lane & 7);
  const uint32_t b = tile + ((lane & 7) + ((lane >> 4) << 3)) * ROW, b_place = ((lane >> 3) & 1) ^ (lane & 7);
#pragma unroll
  for (int k = 0; k < HD / 16; ++k) {
    uint32_t left[MT][4];
#pragma unroll
    for (int m = 0; m < MT; ++m)
      ldmatrix(left[m], a + m * 16 * ROW + ((a_place ^ (2 * k)) << 4));
#pragma unroll
    for (int n = 0; n < N / 16; ++n) {
      uint32_t right[4];
      ldmatrix(right, b + n * 16 * ROW + ((b_place ^ (2 * k)) << 4));
#pragma unroll
      for (int m = 0; m < MT; ++m) {
        tensor_element<T>::mma(c[m][2 * n], left[m], right[0], right[1]);
        tensor_element<T>::mma(c[m][2 * n + 1], left[m], right[2], right[3]);
      }
    }
  }
}

/* c (MT * 16, HD) += left (MT * 16, N) · tile (N, HD), the left operand being packed sums. */
template <typename T, int HD, int MT, int N>
__device__ __forceinline__ void attention_accumulate(float (&c)[MT][HD / 8][4], const uint32_t (&left)[MT][N / 16][4],
                                                     uint32_t tile) {
  constexpr uint32_t ROW = attention_row_bytes<HD>;
  const uint32_t lane = threadIdx.x & 31;
  const uint32_t b = tile + (lane & 15) * ROW, b_place = (lane >> 4) ^ (lane & 7);
#pragma unroll
  for (int k = 0; k < N / 16; ++k)
#pragma unroll
    for (int n = 0; n < HD / 16; ++n) {
      uint32_t right[4];
      ldmatrix_transposed(right, b + k * 16 * ROW + ((b_place ^ (2 * n)) << 4));
#pragma unroll
      for (int m = 0; m < MT; ++m) {
        tensor_element<T>::mma(c[m][2 * n], left[m][k], right[0], right[1]);
        tensor_element<T>::mma(c[m][2 * n + 1], left[m][k], right[2], right[3]);
      }
    }
}

/* Sums (MT * 16, N) as the left operand of the next product. */
template <typename T, int MT, int N>
__device__ __forceinline__ void attention_pack(uint32_t (&packed)[MT][N / 16][4], const float (&c)[MT][N / 8][4]) {
#pragma unroll
  for (int m = 0; m < MT; ++m)
#pragma unroll
    for (int k = 0; k < N / 16; ++k) {
      packed[m][k][0] = tensor_element<T>::pack(c[m][2 * k][0], c[m][2 * k][1]);
      packed[m][k][1] = tensor_element<T>::pack(c[m][2 * k][2], c[m][2 * k][3]);
      packed[m][k][2] = tensor_element<T>::pack(c[m][2 * k + 1][0], c[m][2 * k + 1][1]);
      packed[m][k][3] = tensor_element<T>::pack(c[m][2 * k + 1][2], c[m][2 * k + 1][3]);
    }
}

template <int MT, int N> __device__ __forceinline__ void attention_clear(float (&c)[MT][N][4]) {
#pragma unroll
  for (int m = 0; m < MT; ++m)
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        c[m][n][i] = 0.0f;
}

/* ---- results ---- */

/* Rounds a warp's rows and writes them out in whole chunks, by way of its own rows of a tile, which no other warp reads
 * any more. `to` is the first of the warp's rows; rows from `valid` on are not written. factor (MT, 2): of rows g and
 * g + 8 of each m. */
template <typename T, int HD, int MT>
__device__ __forceinline__ void attention_store_rows(uint16_t *to, uint64_t stride, uint32_t valid, uint32_t head_size,
                                                     const float (&c)[MT][HD / 8][4], const float (&factor)[MT][2],
                                                     unsigned char *rows) {
  constexpr uint32_t ROW = attention_row_bytes<HD>, CHUNKS = HD / 8;
  const uint32_t lane = threadIdx.x & 31, group = lane >> 2;
  __syncwarp();
#pragma unroll
  for (int m = 0; m < MT; ++m)
#pragma unroll
    for (int n = 0; n < HD / 8; ++n)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint32_t row = m * 16 + half * 8 + group, offset = row * ROW + ((n ^ group) << 4) + (lane & 3) * 4;
        *reinterpret_cast<uint32_t *>(rows + offset) =
            tensor_element<T>::pack(c[m][n][2 * half] * factor[m][half], c[m][n][2 * half + 1] * factor[m][half]);
      }
  __syncwarp();
#pragma unroll
  for (int i = 0; i < static_cast<int>(MT * 16 * CHUNKS / 32); ++i) {
    const uint32_t index = i * 32 + lane, row = index / CHUNKS, chunk = index % CHUNKS;
    if (row < valid && chunk * 8 < head_size)
      *reinterpret_cast<uint4 *>(to + row * stride + chunk * 8) =
          *reinterpret_cast<const uint4 *>(rows + row * ROW + ((chunk ^ (row & 7)) << 4));
  }
}

#endif
