/* The backward on Hopper (sm_90a) in one kernel: scores are computed once, and dq is summed over the blocks of keys.
 *
 * A block of work is 128 keys of one unit: a key-value head of a sequence, or a part of its heads. It walks the tiles
 * of queries that see the keys, from the sequence's end to the diagonal, and within a tile the unit's heads; dk and dv
 * stay in registers. Every step also gives this block's part of dq for the tile. It is added to an fp32 sum in the
 * scratch, in the order of the keys, each block waiting for its turn: the first stores, those between add, and the last,
 * whose keys reach the diagonal, adds, rounds and writes dq. The orders of all sums are thus functions of the shape.
 * Blocks that begin together have the same tile at the same time, whichever keys they have, so a turn comes when it is
 * waited for: from the diagonal on, each would be 128 queries ahead of the one before it, and wait for that.
 *
 * Nobody waits for ever. Work is handed out by tickets, and a turn belongs to a lower ticket than those that wait for
 * it: within a section of units all first blocks of keys come first, then all second ones, and so on; a sum's slot goes
 * to a later head only a whole section later. A thread block takes its tickets in rising order, so the lowest ticket
 * that is not finished is being worked on, all that it waits for is finished, and it will be, too.
 *
 * A thread block is two warpgroups that multiply, 64 keys each, and four helping warps: two copy tiles, and one for
 * each of the two waits for turns and passes them on. Thread blocks stay and take tickets, so the next block's tiles
 * are copied while this one's sums are written. */
#include "kernels/cuda/barriers.cuh"
#include "kernels/cuda/attention_launch.cuh"
#include "kernels/cuda/attention_softmax.cuh"
#include "kernels/cuda/attention_wgmma.cuh"

#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)

namespace {

constexpr int KEYS = CUDA_ATTENTION_KEYS, STAGES = 3;
constexpr int MULTIPLIERS = 256, COPIERS = 2, THREADS = MULTIPLIERS + 128;
constexpr int BLOCKS_MAX = 144; /* multiprocessors of a Hopper GPU, one thread block each; more would find no work */
/* 168 registers of 384 threads are dealt anew: enough for the sums of either head size, and the helpers get the rest.
 */
template <int HD> constexpr int MULTIPLIER_REGISTERS = HD == 64 ? 232 : 224;
template <int HD> constexpr int HELPER_REGISTERS = 3 * 168 - 2 * MULTIPLIER_REGISTERS<HD>;
constexpr int MULTIPLIERS_BARRIER = 1;
/* Records of work: the warps that copy may be two blocks ahead of those that multiply, and those that wait for turns
 * one behind. */
constexpr uint32_t WORKS = 4;
constexpr uint32_t ALIGNMENT = 1024;
/* Queries of a tile: of either head size 32 KiB of sums of dq, 64 rows and columns for each warpgroup. */
template <int HD> constexpr int QUERIES = CUDA_ATTENTION_CHAIN_ELEMENTS / HD;

/* Records in shared memory, which are read again wherever they are needed: registers are short.
 * What all warps know of the block of work. */
struct chain_work {
  attention_key_block block;
  attention_place place;
  bool valid; /* false: there is no more work */
};

/* What the waiting warp tells its warpgroup about one sum. */
struct chain_turn {
  uint64_t sums, dq;      /* where: in args.sums, and of the tile's first row in args.dq */
  uint32_t valid;         /* rows of the tile */
  uint32_t opens, closes; /* whether this block is the first of the keys, the last */
};

/* Shared memory, from a multiple of ALIGNMENT. */
template <int HD> struct chain_layout {
  static constexpr uint32_t TILE = QUERIES<HD> * HD * 2;             /* of q or dout */
  static constexpr uint32_t K = 0, V = K + KEYS * HD * 2;            /* panels of 128 rows */
  static constexpr uint32_t Q = V + KEYS * HD * 2, STAGE = 2 * TILE; /* q and dout, STAGES times */
  static constexpr uint32_t DS = Q + STAGES * STAGE;                 /* two: keys as rows */
  static constexpr uint32_t DS_BYTES = KEYS * QUERIES<HD> * 2;
  static constexpr uint32_t STATISTICS = DS + 2 * DS_BYTES, STATISTICS_BYTES = QUERIES<HD> * 8;
  static constexpr uint32_t TURNS = STATISTICS + STAGES * STATISTICS_BYTES; /* one for each warpgroup */
  static constexpr uint32_t WORK = TURNS + 2 * sizeof(chain_turn), WORK_READY = WORK + WORKS * sizeof(chain_work);
  static constexpr uint32_t KEYS_READY = WORK_READY + WORKS * BARRIER_BYTES;
  static constexpr uint32_t KEYS_FREE = KEYS_READY + BARRIER_BYTES, STAGE_READY = KEYS_FREE + BARRIER_BYTES;
  static constexpr uint32_t STAGE_FREE = STAGE_READY + STAGES * BARRIER_BYTES;
  static constexpr uint32_t TURN_READY = STAGE_FREE + STAGES * BARRIER_BYTES;
  static constexpr uint32_t TURN_DONE = TURN_READY + 2 * BARRIER_BYTES, END = TURN_DONE + 2 * BARRIER_BYTES;
  static constexpr uint32_t BYTES = END + ALIGNMENT;
};

template <int HD> __device__ __forceinline__ void open_barriers(uint32_t shared) {
  using at = chain_layout<HD>;
  for (uint32_t i = 0; i < WORKS; ++i)
    barrier_open(shared + at::WORK_READY + i * BARRIER_BYTES, 1);
  for (uint32_t i = 0; i < 2; ++i) {
    barrier_open(shared + at::TURN_READY + i * BARRIER_BYTES, 1);
    barrier_open(shared + at::TURN_DONE + i * BARRIER_BYTES, MULTIPLIERS / 64 * WARP_ARRIVALS); /* of one warpgroup */
  }
  barrier_open(shared + at::KEYS_READY, COPIERS * WARP_ARRIVALS);
  barrier_open(shared + at::KEYS_FREE, MULTIPLIERS / 32 * WARP_ARRIVALS);
  for (uint32_t i = 0; i < STAGES; ++i) {
    barrier_open(shared + at::STAGE_READY + i * BARRIER_BYTES, WARP_ARRIVALS);
    barrier_open(shared + at::STAGE_FREE + i * BARRIER_BYTES, MULTIPLIERS / 32 * WARP_ARRIVALS);
  }
}

/* A record at an address in shared memory. */
template <typename R> __device__ __forceinline__ volatile R *record_at(uint32_t address) {
  return static_cast<volatile R *>(__cvta_shared_to_generic(address));
}

template <int HD> __device__ __forceinline__ volatile chain_work *work_at(uint32_t shared, uint32_t count) {
  return record_at<chain_work>(shared + chain_layout<HD>::WORK + count % WORKS * sizeof(chain_work));
}

/* Tiles of queries that see the keys from `key` on. */
template <int HD> __device__ __forceinline__ uint32_t tiles_from(const attention_args &args, uint32_t key) {
  return (args.queries - key + QUERIES<HD> - 1) / QUERIES<HD>;
}

/* Waits for the thread block's work number `count`; false where there is no more. */
template <int HD> __device__ __forceinline__ bool work_is_there(uint32_t shared, uint32_t count) {
  using at = chain_layout<HD>;
  barrier_wait(shared + at::WORK_READY + count % WORKS * BARRIER_BYTES, count / WORKS & 1);
  return work_at<HD>(shared, count)->valid;
}

/* The thread's number, asked for anew: what is derived from it would otherwise stay in registers throughout. */
__device__ __forceinline__ uint32_t thread_now() {
  uint32_t thread;
  asm volatile("mov.u32 %0, %%tid.x;\n" : "=r"(thread));
  return thread;
}

/* ---- the warps that copy ---- */

/* As panels_load, by one warp. */
template <int HD, int ROWS>
__device__ __forceinline__ void load_rows(uint32_t tile, const uint16_t *from, uint32_t valid, uint64_t stride,
                                          uint32_t head_size) {
  constexpr uint32_t CHUNKS = HD / 8, STEP = 32 / CHUNKS;
  const uint32_t lane = thread_now() & 31, row = lane / CHUNKS, chunk = lane % CHUNKS;
  const bool column_valid = chunk * 8 < head_size;
  const uint16_t *source = from + row * stride + chunk * 8;
  const uint32_t to = tile + (chunk >> 3) * (ROWS * PANEL_ROW) + row * PANEL_ROW;
#pragma unroll 4
  for (uint32_t i = 0; i < ROWS / STEP; ++i) {
    const bool copied = column_valid && row + i * STEP < valid;
    copy16(to + i * (STEP * PANEL_ROW) + (((chunk ^ (row + i * STEP)) & 7) << 4), copied ? source : from,
                     copied ? 16 : 0);
    source += STEP * stride;
  }
}

__device__ __forceinline__ void loaded(uint32_t barrier) {
  copies_commit();
  panels_arrived();
  barrier_arrive_warp(barrier);
}

template <int HD>
__device__ __forceinline__ void load_queries(const attention_args &args, const volatile chain_work *work, uint32_t head,
                                             uint32_t query, uint32_t shared, uint32_t stage) {
  using at = chain_layout<HD>;
  const uint32_t valid = args.queries - query, tile = shared + at::Q + stage * at::STAGE;
  const uint64_t packed_stride = static_cast<uint64_t>(args.heads) * args.head_size;
  load_rows<HD, QUERIES<HD>>(tile, attention_at(args.q, work->block.q + query * args.q_stride + head * args.head_size),
                             valid, args.q_stride, args.head_size);
  load_rows<HD, QUERIES<HD>>(
      tile + at::TILE, attention_at(args.dout, work->block.packed + query * packed_stride + head * args.head_size),
      valid, packed_stride, args.head_size);
  const float2 *from = args.statistics + work->block.statistic + static_cast<uint64_t>(head) * args.queries + query;
#pragma unroll 1
  for (uint32_t i = thread_now() & 31; i < QUERIES<HD>; i += 32)
    copy8(shared + at::STATISTICS + stage * at::STATISTICS_BYTES + i * 8, from + (i < valid ? i : 0),
                    i < valid ? 8 : 0);
}

/* By one thread. */
__device__ __forceinline__ void take_ticket(const attention_args &args, chain_work *work) {
  const uint32_t tiles = (args.keys + KEYS - 1) / KEYS, units = args.batch * args.kv_heads * args.parts;
  const uint32_t ticket = atomicAdd(args.turns, 1u);
  work->valid = ticket < tiles * units;
  if (!work->valid)
    return;
  work->place = attention_place_at(ticket, tiles, units, args.section_units);
  work->block = attention_key_block_at<KEYS>(args, work->place);
}

/* Warp `copier` copies every other tile of queries, and keys or values; the first takes tickets. A block's first tiles
 * of queries are copied while the block before still needs its keys. */
template <int HD>
__device__ __forceinline__ void copy_tiles(const attention_args &args, uint32_t shared, uint32_t copier) {
  using at = chain_layout<HD>;
  uint32_t steps = 0;
  for (uint32_t count = 0;; ++count) {
    const volatile chain_work *work = work_at<HD>(shared, count);
    if (threadIdx.x == MULTIPLIERS) {
      take_ticket(args, const_cast<chain_work *>(work));
      barrier_arrive(shared + at::WORK_READY + count % WORKS * BARRIER_BYTES);
    }
    if (!work_is_there<HD>(shared, count))
      return;
    bool keys_loaded = false;
    for (uint32_t tile = tiles_from<HD>(args, work->block.key); tile-- > 0;)
      for (uint32_t head = 0; head < work->block.heads; ++head, ++steps) {
        if (steps % COPIERS == copier) {
          const uint32_t query = work->block.key + tile * QUERIES<HD>;
          const uint32_t stage = steps % STAGES;
          barrier_wait(shared + at::STAGE_FREE + stage * BARRIER_BYTES, (steps / STAGES & 1) ^ 1);
          load_queries<HD>(args, work, head, query, shared, stage);
          loaded(shared + at::STAGE_READY + stage * BARRIER_BYTES);
        }
        if (!keys_loaded) {
          barrier_wait(shared + at::KEYS_FREE, (count & 1) ^ 1);
          load_rows<HD, KEYS>(shared + (copier == 0 ? at::K : at::V),
                              attention_at(copier == 0 ? args.k : args.v, work->block.kv), work->block.rows,
                              args.kv_stride, args.head_size);
          loaded(shared + at::KEYS_READY);
          keys_loaded = true;
        }
      }
  }
}

/* ---- the warps that wait for turns ---- */

/* One lane for warpgroup `group`. A sum's flag counts the blocks of keys that have added to it, over all heads that
 * have had its slot. */
template <int HD>
__device__ __forceinline__ void keep_turns(const attention_args &args, uint32_t shared, uint32_t group) {
  using at = chain_layout<HD>;
  volatile chain_turn *turn = record_at<chain_turn>(shared + at::TURNS + group * sizeof(chain_turn));
  uint32_t parity = 0;
  for (uint32_t count = 0; work_is_there<HD>(shared, count); ++count) {
    const volatile chain_work *work = work_at<HD>(shared, count);
    uint32_t head = 0;
    for (uint32_t query = work->block.key + (tiles_from<HD>(args, work->block.key) - 1) * QUERIES<HD>;;) {
      const uint32_t tiles = (args.queries + QUERIES<HD> - 1) / QUERIES<HD>;
      const uint32_t pair = work->place.item * work->block.heads + head, last = query / KEYS;
      const uint32_t sum = (pair % args.slots * tiles + query / QUERIES<HD>)*2 + group;
      const uint32_t before = pair / args.slots * (last + 1) + work->place.rank;
      uint32_t *flag = args.turns + 1 + sum;
      while (flag_read(flag) != before) {
      }
      turn->sums = static_cast<uint64_t>(sum) * (64 * 64 / 4);
      turn->dq = work->block.q + query * args.q_stride + head * args.head_size;
      turn->valid = args.queries - query;
      turn->opens = work->place.rank == 0;
      turn->closes = work->place.rank == last;
      barrier_arrive(shared + at::TURN_READY + group * BARRIER_BYTES);
      barrier_wait(shared + at::TURN_DONE + group * BARRIER_BYTES, parity);
      flag_write(flag, before + 1);
      parity ^= 1;
      if (++head == work->block.heads) {
        head = 0;
        if (query == work->block.key)
          break;
        query -= QUERIES<HD>;
      }
    }
  }
}

/* ---- the warpgroups that multiply ---- */

/* Writes the warpgroup's finished part of dq, of rows from `row` on and columns from `column` on. */
template <typename T>
__device__ __forceinline__ void store_dq(const attention_args &args, const float (&dq)[1][8][4], uint64_t to,
                                         uint32_t row, uint32_t column, uint32_t valid) {
#pragma unroll
  for (int half = 0; half < 2; ++half)
#pragma unroll
    for (int n = 0; n < 8; ++n)
      if (row + half * 8 < valid && column + n * 8 < args.head_size)
        *reinterpret_cast<uint32_t *>(attention_at(args.dq, to + (row + half * 8) * args.q_stride + column + n * 8)) =
            tensor_element<T>::pack(dq[0][n][2 * half] * args.scale, dq[0][n][2 * half + 1] * args.scale);
}

/* Adds this block's part of dq to its sum when the turn has come. Sums lie as the lanes hold them. */
template <typename T, int HD>
__device__ __forceinline__ void deliver(const attention_args &args, float (&dq)[1][8][4], uint32_t shared,
                                        uint32_t parity) {
  using at = chain_layout<HD>;
  const uint32_t thread = thread_now(), group = thread >> 7;
  barrier_wait(shared + at::TURN_READY + group * BARRIER_BYTES, parity);
  const volatile chain_turn *turn = record_at<chain_turn>(shared + at::TURNS + group * sizeof(chain_turn));
  float4 *sums = args.sums + turn->sums + (thread & 127);
  if (turn->closes == 0) {
    if (turn->opens != 0)
#pragma unroll
      for (int n = 0; n < 8; ++n)
        sums[n * 128] = make_float4(dq[0][n][0], dq[0][n][1], dq[0][n][2], dq[0][n][3]);
    else
#pragma unroll
      for (int n = 0; n < 8; ++n)
        add_to_global(sums + n * 128, dq[0][n][0], dq[0][n][1], dq[0][n][2], dq[0][n][3]);
  } else {
    if (turn->opens == 0)
#pragma unroll
      for (int n = 0; n < 8; ++n) {
        const float4 sum = __ldcg(sums + n * 128);
        dq[0][n][0] += sum.x;
        dq[0][n][1] += sum.y;
        dq[0][n][2] += sum.z;
        dq[0][n][3] += sum.w;
      }
    const uint32_t row = (HD == 64 ? thread >> 5 : thread >> 5 & 3) * 16 + (thread >> 2 & 7);
    store_dq<T>(args, dq, turn->dq + (thread & 3) * 2, row, HD == 64 ? 0 : group * 64, turn->valid);
  }
  barrier_arrive_warp(shared + at::TURN_DONE + group * BARRIER_BYTES);
}

/* What one of the warpgroups holds through a block of work, and the halves of the steps that it takes. */
template <typename T, int HD> struct chain_multiplier {
  using at = chain_layout<HD>;
  float dk[1][HD / 8][4], dv[1][HD / 8][4];
  float scores[1][QUERIES<HD> / 8][4], gradient[1][QUERIES<HD> / 8][4];
  uint32_t p[1][QUERIES<HD> / 16][4];
  uint32_t steps = 0; /* over all blocks of work: what stage, which of two tiles of ds, and all parities follow from */

  static __device__ __forceinline__ uint32_t group_rows() { return (thread_now() >> 7) * (64 * PANEL_ROW); }
  static __device__ __forceinline__ uint32_t group_panel() { return (thread_now() >> 7) * (KEYS * PANEL_ROW); }
  __device__ __forceinline__ uint32_t stage() const { return steps % STAGES; }
  __device__ __forceinline__ uint32_t q_tile(uint32_t shared) const { return shared + at::Q + stage() * at::STAGE; }
  __device__ __forceinline__ uint32_t ds_tile(uint32_t shared) const {
    return shared + at::DS + (steps & 1) * at::DS_BYTES;
  }

  __device__ __forceinline__ void start_scores(uint32_t shared) {
    barrier_wait(shared + at::STAGE_READY + stage() * BARRIER_BYTES, steps / STAGES & 1);
    wgmma_begin();
    panels_multiply<T, HD, KEYS, QUERIES<HD>>(scores, shared + at::K + group_rows(), q_tile(shared));
  }

  __device__ __forceinline__ void start_gradient(uint32_t shared) {
    wgmma_begin();
    panels_multiply<T, HD, KEYS, QUERIES<HD>>(gradient, shared + at::V + group_rows(), q_tile(shared) + at::TILE);
  }

  /* From scores and their gradient, which are being computed, to ds in shared memory. On return the product for dv is
   * running. `offset`: of the tile's first query from the block's first key. */
  __device__ __forceinline__ void derive(const attention_args &args, uint32_t shared, uint32_t offset) {
    const float4 *statistics =
        static_cast<const float4 *>(__cvta_shared_to_generic(shared + at::STATISTICS + stage() * at::STATISTICS_BYTES));
    wgmma_wait<1>(); /* all but the gradient */
    wgmma_hold(scores);
    attention_probabilities_of_keys<1, QUERIES<HD>>(
        scores, statistics, static_cast<int>((thread_now() >> 5) * 16) - static_cast<int>(offset), args.scale_log2);
    attention_pack<T, 1, QUERIES<HD>>(p, scores);
    wgmma_hold(p);
    wgmma_hold(dv);
    wgmma_begin();
    panels_accumulate<T, HD, QUERIES<HD>>(dv, p, q_tile(shared) + at::TILE);
    wgmma_wait<1>();
    wgmma_hold(gradient);
    attention_gradient_of_keys<1, QUERIES<HD>>(gradient, scores, statistics);
    uint32_t ds[1][QUERIES<HD> / 16][4];
    attention_pack<T, 1, QUERIES<HD>>(ds, gradient);
    panels_store_fragments<QUERIES<HD>, KEYS>(ds_tile(shared) + (thread_now() >> 5) * (16 * PANEL_ROW), ds);
    shared_writes_to_wgmma();
    named_barrier(MULTIPLIERS_BARRIER, MULTIPLIERS);
  }

  /* Starts the products with ds and, unless LAST, those of the next tile; this tile's part of dq is delivered. */
  template <bool LAST> __device__ __forceinline__ void multiply(const attention_args &args, uint32_t shared) {
    float dq[1][8][4];
    wgmma_hold(dk);
    wgmma_begin();
    panels_multiply_across<T, KEYS>(dq, ds_tile(shared) + (HD == 64 ? group_panel() : 0),
                                    shared + at::K + (HD == 64 ? 0 : group_panel()));
    panels_accumulate<T, HD, KEYS, QUERIES<HD>>(dk, ds_tile(shared) + group_rows(), q_tile(shared));
    wgmma_wait<2>(); /* the product for dv: its operand's registers are needed */
    wgmma_hold(dv);
    wgmma_hold(p);
    ++steps;
    if (!LAST)
      start_scores(shared);
    wgmma_wait<LAST ? 1 : 2>(); /* all before the last product for dk */
    wgmma_hold(dq);
    if (LAST)
      barrier_arrive_warp(shared + at::KEYS_FREE);
    deliver<T, HD>(args, dq, shared, ~steps & 1);
    if (!LAST)
      start_gradient(shared);
    wgmma_wait<LAST ? 0 : 2>();
    wgmma_hold(dk);
    barrier_arrive_warp(shared + at::STAGE_FREE + (steps + STAGES - 1) % STAGES * BARRIER_BYTES);
  }

  __device__ __forceinline__ void work(const attention_args &args, uint32_t shared, uint32_t count) {
    const volatile chain_work *work = work_at<HD>(shared, count);
    attention_clear<1, HD / 8>(dk);
    attention_clear<1, HD / 8>(dv);
    barrier_wait(shared + at::KEYS_READY, count & 1);
    uint32_t head = 0, offset = (tiles_from<HD>(args, work->block.key) - 1) * QUERIES<HD>;
    start_scores(shared);
    start_gradient(shared);
    derive(args, shared, offset);
    for (;;) {
      if (++head == work->block.heads) {
        head = 0;
        if (offset == 0)
          break;
        offset -= QUERIES<HD>;
      }
      multiply<false>(args, shared);
      derive(args, shared, offset);
    }
    multiply<true>(args, shared);
    /* The results pass through what held ds, which both warpgroups have read, and write again only thereafter. */
    named_barrier(MULTIPLIERS_BARRIER, MULTIPLIERS);
    attention_store_keys<T, HD, 1, 0>(args, attention_key_block_at<KEYS>(args, {work->place.item, work->place.rank}),
                                      (thread_now() >> 5) * 16, dk, dv,
                                      static_cast<unsigned char *>(__cvta_shared_to_generic(shared + at::DS)));
    named_barrier(MULTIPLIERS_BARRIER, MULTIPLIERS);
  }
};

template <typename T, int HD>
__global__ void __launch_bounds__(THREADS, 1) attention_chain_kernel(const attention_args args) {
  extern __shared__ unsigned char dynamic[];
  const uint32_t shared = (shared_address(dynamic) + ALIGNMENT - 1) & ~(ALIGNMENT - 1);
  if (threadIdx.x == 0)
    open_barriers<HD>(shared);
  __syncthreads();
  const uint32_t warp = threadIdx.x >> 5;
  if (warp >= MULTIPLIERS / 32) {
    registers_give_up<HELPER_REGISTERS<HD>>();
    const uint32_t helper = warp - MULTIPLIERS / 32;
    if (helper < COPIERS)
      copy_tiles<HD>(args, shared, helper);
    else if ((threadIdx.x & 31) == 0)
      keep_turns<HD>(args, shared, helper - COPIERS);
  } else {
    registers_take<MULTIPLIER_REGISTERS<HD>>();
    chain_multiplier<T, HD> multiplier;
    for (uint32_t count = 0; work_is_there<HD>(shared, count); ++count)
      multiplier.work(args, shared, count);
  }
}

template <typename T, int HD> cudaError_t launch(const attention_args &args, cudaStream_t stream) {
  const uint64_t tickets =
      static_cast<uint64_t>(args.batch) * args.kv_heads * args.parts * ((args.keys + KEYS - 1) / KEYS);
  return attention_launch(attention_chain_kernel<T, HD>, tickets < BLOCKS_MAX ? tickets : BLOCKS_MAX, THREADS,
                          chain_layout<HD>::BYTES, args, stream);
}

} // namespace

cudaError_t attention_backward_chain(const attention_args &args, flap_dtype dtype, cudaStream_t stream) {
  return ATTENTION_FOR_TILES(launch, args, dtype, stream);
}

#endif
