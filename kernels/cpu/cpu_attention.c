/* Causal grouped-query attention by tiles (Dao 2023): scores exist for FLAP_CPU_QUERIES x FLAP_CPU_KEYS pairs at a
 * time.
 *
 * Forward, an item is a tile of queries of one head: it walks the keys up to its last query with a running maximum and
 * sum. Backward recomputes the scores of a tile from lse, twice: once per tile of queries for dq, once per tile of keys
 * for dk and dv, where the heads of a group and their query tiles are summed in order. So no two items add to the same
 * number and the order is fixed. */
#include "kernels/cpu/cpu_internal.h"

#include "base/assert.h"

#include <math.h>

typedef struct attention_job {
  const flap_cpu_ops *cpu;
  flap_dtype dtype;
  uint32_t queries, keys, first_position; /* per sequence; query t is at first_position + t */
  uint32_t heads, kv_heads, head_size, q_stride, kv_stride, tiles;
  float scale;
  const void *q, *k, *v, *dout, *out_in;
  void *out, *dq, *dk, *dv;
  float *lse;   /* written forward, read backward; NULL: not wanted */
  float *delta; /* (B, HQ, S): the row sums of dout * out */
} attention_job;

typedef struct tile {
  const float *values;
  uint32_t stride;
} tile;

/* Rows of a tensor whose tokens are `stride` apart, of one head. */
static tile load(const attention_job *job, float *buffer, const void *base, uint64_t token, uint32_t rows,
                 uint32_t head, uint64_t stride) {
  tile loaded;
  loaded.values =
      flap_cpu_load_tile(job->cpu, job->dtype, buffer, base, token * stride + (uint64_t)head * job->head_size, stride,
                         rows, job->head_size, &loaded.stride);
  return loaded;
}

static void store(const attention_job *job, void *base, uint64_t token, uint32_t rows, uint32_t head, uint64_t stride,
                  const float *values) {
  flap_cpu_store_tile(job->cpu, job->dtype, base, token * stride + (uint64_t)head * job->head_size, stride, values,
                      rows, job->head_size);
}

/* out (rows, columns) = a (rows, HD) · b (columns, HD)ᵀ */
static void multiply_nt(const attention_job *job, float *out, tile a, uint32_t rows, tile b, uint32_t columns) {
  job->cpu->sgemm(CblasRowMajor, CblasNoTrans, CblasTrans, (blasint)rows, (blasint)columns, (blasint)job->head_size,
                  1.0f, a.values, (blasint)a.stride, b.values, (blasint)b.stride, 0.0f, out, FLAP_CPU_KEYS);
}

/* out (rows, HD) += scores (rows, columns) · b (columns, HD) */
static void add_nn(const attention_job *job, float *out, const float *scores, uint32_t rows, uint32_t columns, tile b,
                   bool first) {
  job->cpu->sgemm(CblasRowMajor, CblasNoTrans, CblasNoTrans, (blasint)rows, (blasint)job->head_size, (blasint)columns,
                  1.0f, scores, FLAP_CPU_KEYS, b.values, (blasint)b.stride, first ? 0.0f : 1.0f, out,
                  (blasint)job->head_size);
}

/* out (columns, HD) += scores (rows, columns)ᵀ · b (rows, HD) */
static void add_tn(const attention_job *job, float *out, const float *scores, uint32_t rows, uint32_t columns, tile b) {
  job->cpu->sgemm(CblasRowMajor, CblasTrans, CblasNoTrans, (blasint)columns, (blasint)job->head_size, (blasint)rows,
                  1.0f, scores, FLAP_CPU_KEYS, b.values, (blasint)b.stride, 1.0f, out, (blasint)job->head_size);
}

/* How many of the `columns` keys from `key` on a query may see. */
static uint32_t visible(const attention_job *job, uint32_t query, uint32_t key, uint32_t columns) {
  const uint32_t position = job->first_position + query;
  return position < key ? 0 : flap_cpu_min(columns, position - key + 1);
}

/* Scratch of a worker, in the order of use; see flap_cpu_attention_worker_bytes. */
typedef struct scratch {
  float *q, *dout, *k, *v, *scores, *dp, *sum_a, *sum_b;
} scratch;

static scratch scratch_of(const attention_job *job, uint32_t worker) {
  const size_t q = (size_t)FLAP_CPU_QUERIES * job->head_size, k = (size_t)FLAP_CPU_KEYS * job->head_size;
  const size_t pairs = (size_t)FLAP_CPU_QUERIES * FLAP_CPU_KEYS, larger = q > k ? q : k;
  scratch s;
  s.q = flap_cpu_scratch(job->cpu, worker);
  s.dout = s.q + q;
  s.k = s.dout + q;
  s.v = s.k + k;
  s.scores = s.v + k;
  s.dp = s.scores + pairs;
  s.sum_a = s.dp + pairs;
  s.sum_b = s.sum_a + larger;
  return s;
}

uint64_t flap_cpu_attention_worker_bytes(const flap_ops_limits *limits) {
  const uint64_t q = (uint64_t)FLAP_CPU_QUERIES * limits->head_size, k = (uint64_t)FLAP_CPU_KEYS * limits->head_size;
  return (2 * q + 2 * k + 2 * (uint64_t)FLAP_CPU_QUERIES * FLAP_CPU_KEYS + 2 * (q > k ? q : k)) * sizeof(float);
}

uint64_t flap_cpu_attention_shared_bytes(const flap_ops_limits *limits) {
  return (uint64_t)limits->tokens_max * limits->heads * sizeof(float);
}

/* ---- forward ---- */

/* item = (sequence, head, tile of queries), the tile running fastest and the longest first. */
static void forward_item(void *context, uint64_t item, uint32_t worker) {
  const attention_job *job = context;
  const flap_cpu_vector *vector = job->cpu->vector;
  const scratch s = scratch_of(job, worker);
  const uint32_t query = (job->tiles - 1 - (uint32_t)(item % job->tiles)) * FLAP_CPU_QUERIES;
  const uint32_t head = (uint32_t)(item / job->tiles % job->heads);
  const uint64_t sequence = item / job->tiles / job->heads;
  const uint32_t kv_head = head / (job->heads / job->kv_heads);
  const uint32_t rows = flap_cpu_min(FLAP_CPU_QUERIES, job->queries - query);
  float maximum[FLAP_CPU_QUERIES], sum[FLAP_CPU_QUERIES];
  for (uint32_t i = 0; i < rows; ++i) {
    maximum[i] = -INFINITY;
    sum[i] = 0.0f;
  }
  const tile q = load(job, s.q, job->q, sequence * job->queries + query, rows, head, job->q_stride);
  const uint32_t end = job->first_position + query + rows;
  for (uint32_t key = 0; key < end; key += FLAP_CPU_KEYS) {
    const uint32_t columns = flap_cpu_min(FLAP_CPU_KEYS, end - key);
    const tile k = load(job, s.k, job->k, sequence * job->keys + key, columns, kv_head, job->kv_stride);
    const tile v = load(job, s.v, job->v, sequence * job->keys + key, columns, kv_head, job->kv_stride);
    multiply_nt(job, s.scores, q, rows, k, columns);
    for (uint32_t i = 0; i < rows; ++i) {
      const float factor =
          vector->softmax_row(s.scores + (size_t)i * FLAP_CPU_KEYS, visible(job, query + i, key, columns), columns,
                              job->scale, &maximum[i], &sum[i]);
      if (key > 0 && factor != 1.0f)
        vector->scale(s.sum_a + (size_t)i * job->head_size, factor, job->head_size);
    }
    add_nn(job, s.sum_a, s.scores, rows, columns, v, key == 0);
  }
  for (uint32_t i = 0; i < rows; ++i)
    vector->scale(s.sum_a + (size_t)i * job->head_size, 1.0f / sum[i], job->head_size);
  store(job, job->out, sequence * job->queries + query, rows, head, (uint64_t)job->heads * job->head_size, s.sum_a);
  if (job->lse != NULL)
    for (uint32_t i = 0; i < rows; ++i)
      job->lse[(sequence * job->heads + head) * job->queries + query + i] = maximum[i] + (float)log((double)sum[i]);
}

static attention_job job_of(flap_ops *ops, const flap_attention *x) {
  attention_job job = {.cpu = flap_cpu_state(ops), .dtype = x->dtype, .queries = x->sequence, .keys = x->sequence};
  job.heads = x->heads;
  job.kv_heads = x->kv_heads;
  job.head_size = x->head_size;
  job.q_stride = x->q_stride;
  job.kv_stride = x->kv_stride;
  job.scale = (float)(1.0 / sqrt((double)x->head_size));
  job.q = x->q;
  job.k = x->k;
  job.v = x->v;
  job.out = x->out;
  job.out_in = x->out;
  job.lse = x->lse;
  flap_assert(x->head_size <= ops->limits.head_size);
  return job;
}

void flap_cpu_attention(flap_ops *ops, const flap_attention *attention) {
  attention_job job = job_of(ops, attention);
  job.tiles = (uint32_t)flap_cpu_ceil(job.queries, FLAP_CPU_QUERIES);
  flap_cpu_run(job.cpu, (uint64_t)attention->batch * job.heads * job.tiles, forward_item, &job);
}

void flap_cpu_attention_decode(flap_ops *ops, flap_dtype dtype, void *out, const void *q, uint32_t q_stride,
                               const void *k_cache, const void *v_cache, uint32_t token_count, uint32_t first_position,
                               uint32_t heads, uint32_t kv_heads, uint32_t head_size) {
  const flap_attention x = {.batch = 1,
                            .sequence = token_count,
                            .heads = heads,
                            .kv_heads = kv_heads,
                            .head_size = head_size,
                            .q_stride = q_stride,
                            .kv_stride = kv_heads * head_size,
                            .q = q,
                            .k = k_cache,
                            .v = v_cache,
                            .out = out,
                            .dtype = dtype};
  attention_job job = job_of(ops, &x);
  job.keys = first_position + token_count;
  job.first_position = first_position;
  job.tiles = (uint32_t)flap_cpu_ceil(job.queries, FLAP_CPU_QUERIES);
  flap_cpu_run(job.cpu, (uint64_t)heads * job.tiles, forward_item, &job);
}

/* ---- backward ---- */

/* Probabilities into s->scores and the gradient of the scaled scores into s->dp, for one tile. */
static void gradient_of_scores(const attention_job *job, const scratch *s, tile q, tile dout, uint32_t query,
                               uint32_t rows, tile k, tile v, uint32_t key, uint32_t columns, const float *lse,
                               const float *delta) {
  multiply_nt(job, s->scores, q, rows, k, columns);
  multiply_nt(job, s->dp, dout, rows, v, columns);
  for (uint32_t i = 0; i < rows; ++i)
    job->cpu->vector->softmax_row_backward(s->scores + (size_t)i * FLAP_CPU_KEYS, s->dp + (size_t)i * FLAP_CPU_KEYS,
                                           visible(job, query + i, key, columns), columns, job->scale, lse[i],
                                           delta[i]);
}

/* dq of one tile of queries, and its delta for the second pass. */
static void backward_queries_item(void *context, uint64_t item, uint32_t worker) {
  const attention_job *job = context;
  const scratch s = scratch_of(job, worker);
  const uint32_t query = (job->tiles - 1 - (uint32_t)(item % job->tiles)) * FLAP_CPU_QUERIES;
  const uint32_t head = (uint32_t)(item / job->tiles % job->heads);
  const uint64_t sequence = item / job->tiles / job->heads;
  const uint32_t kv_head = head / (job->heads / job->kv_heads);
  const uint32_t rows = flap_cpu_min(FLAP_CPU_QUERIES, job->queries - query);
  const uint64_t token = sequence * job->queries + query, row0 = (sequence * job->heads + head) * job->queries + query;
  const uint64_t packed = (uint64_t)job->heads * job->head_size;
  const tile q = load(job, s.q, job->q, token, rows, head, job->q_stride);
  const tile dout = load(job, s.dout, job->dout, token, rows, head, packed);
  const tile out = load(job, s.sum_a, job->out_in, token, rows, head, packed);
  for (uint32_t i = 0; i < rows; ++i) {
    float sums[FLAP_CPU_LANES] = {0};
    job->cpu->vector->dot(sums, out.values + (size_t)i * out.stride, dout.values + (size_t)i * dout.stride,
                          job->head_size);
    job->delta[row0 + i] = flap_cpu_fold(sums);
  }
  for (uint32_t key = 0; key < query + rows; key += FLAP_CPU_KEYS) {
    const uint32_t columns = flap_cpu_min(FLAP_CPU_KEYS, query + rows - key);
    const tile k = load(job, s.k, job->k, sequence * job->keys + key, columns, kv_head, job->kv_stride);
    const tile v = load(job, s.v, job->v, sequence * job->keys + key, columns, kv_head, job->kv_stride);
    gradient_of_scores(job, &s, q, dout, query, rows, k, v, key, columns, job->lse + row0, job->delta + row0);
    add_nn(job, s.sum_a, s.dp, rows, columns, k, key == 0);
  }
  store(job, job->dq, token, rows, head, job->q_stride, s.sum_a);
}

/* dk and dv of one tile of keys: the heads of the group, and the tiles of queries of each, in order. */
static void backward_keys_item(void *context, uint64_t item, uint32_t worker) {
  const attention_job *job = context;
  const scratch s = scratch_of(job, worker);
  const uint32_t key = (uint32_t)(item % job->tiles) * FLAP_CPU_KEYS;
  const uint32_t kv_head = (uint32_t)(item / job->tiles % job->kv_heads);
  const uint64_t sequence = item / job->tiles / job->kv_heads;
  const uint32_t group = job->heads / job->kv_heads;
  const uint32_t columns = flap_cpu_min(FLAP_CPU_KEYS, job->keys - key);
  const uint64_t packed = (uint64_t)job->heads * job->head_size;
  const tile k = load(job, s.k, job->k, sequence * job->keys + key, columns, kv_head, job->kv_stride);
  const tile v = load(job, s.v, job->v, sequence * job->keys + key, columns, kv_head, job->kv_stride);
  memset(s.sum_a, 0, (size_t)columns * job->head_size * sizeof *s.sum_a);
  memset(s.sum_b, 0, (size_t)columns * job->head_size * sizeof *s.sum_b);
  for (uint32_t head = kv_head * group; head < (kv_head + 1) * group; ++head)
    for (uint32_t query = key / FLAP_CPU_QUERIES * FLAP_CPU_QUERIES; query < job->queries; query += FLAP_CPU_QUERIES) {
      const uint32_t rows = flap_cpu_min(FLAP_CPU_QUERIES, job->queries - query);
      const uint32_t seen = flap_cpu_min(columns, query + rows - key); /* by the last of the queries */
      const uint64_t token = sequence * job->queries + query;
      const uint64_t row0 = (sequence * job->heads + head) * job->queries + query;
      const tile q = load(job, s.q, job->q, token, rows, head, job->q_stride);
      const tile dout = load(job, s.dout, job->dout, token, rows, head, packed);
      gradient_of_scores(job, &s, q, dout, query, rows, k, v, key, seen, job->lse + row0, job->delta + row0);
      add_tn(job, s.sum_a, s.dp, rows, seen, q);
      add_tn(job, s.sum_b, s.scores, rows, seen, dout);
    }
  store(job, job->dk, sequence * job->keys + key, columns, kv_head, job->kv_stride, s.sum_a);
  store(job, job->dv, sequence * job->keys + key, columns, kv_head, job->kv_stride, s.sum_b);
}

void flap_cpu_attention_backward(flap_ops *ops, const flap_attention *attention, void *dq, void *dk, void *dv,
                                 const void *dout) {
  attention_job job = job_of(ops, attention);
  job.dq = dq;
  job.dk = dk;
  job.dv = dv;
  job.dout = dout;
  job.delta = (float *)(void *)job.cpu->shared;
  flap_assert((uint64_t)attention->batch * job.queries * job.heads * sizeof(float) <= job.cpu->shared_bytes);
  job.tiles = (uint32_t)flap_cpu_ceil(job.queries, FLAP_CPU_QUERIES);
  flap_cpu_run(job.cpu, (uint64_t)attention->batch * job.heads * job.tiles, backward_queries_item, &job);
  job.tiles = (uint32_t)flap_cpu_ceil(job.keys, FLAP_CPU_KEYS);
  flap_cpu_run(job.cpu, (uint64_t)attention->batch * job.kv_heads * job.tiles, backward_keys_item, &job);
}
