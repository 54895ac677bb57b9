/* Matrix products by cuBLASLt, which is looked for when the first ops are opened: half a gigabyte of library that a
 * machine without a GPU need not have.
 *
 * 1. The algorithm of a shape is the heuristic's first answer for a fixed workspace, with fp32 sums, or what a recorded
 *    table says (kernels/matmul_table.h). K may be cut only where the parts are added in fp32, out of place, in a fixed
 *    order; that holds for the table too. So a shape's bits never change on one GPU model and library version with one
 *    table, which are in the numerics key.
 * 2. Operands are promised to be aligned to 16 bytes, or to what they are where that is less; addresses decide nothing
 *    else. What cuBLASLt refuses is computed by cuda_matmul_plain.
 * 3. A bias is added in fp32, before the only rounding. cuBLASLt does so where everything is whole vectors; for odd
 *    strides and sizes some of its kernels round the product first (seen with 13.1 on an H100), so those with a bias
 * are computed by cuda_matmul_plain too.
 *    A residual is the C of D = A B + C: it is added in fp32 as well.
 * 4. What was found is kept per shape in plans taken at open. When they are full they are emptied.
 * 5. Tuning is the one thing here that waits for the device: it times every algorithm that the heuristic offers under
 *    the settings of 1, with the caller's operands.
 * 6. cuBLASLt is column-major. A row-major matrix is its transpose there, so c = op(a) op(b) is asked for as
 *    cᵀ = op(b)ᵀ op(a)ᵀ: their first operand is our b.
 */
#include "kernels/cuda/cuda_internal.h"

#include "base/assert.h"
#include "base/log.h"
#include "kernels/matmul_table.h"

#include <cublasLt.h>
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define PLANS 1024u /* a power of two */
#define PLANS_FULL (PLANS / 4 * 3)

#define TEXT_OF(x) #x
#define TEXT(x) TEXT_OF(x)
#define LIBRARY "libcublasLt.so." TEXT(CUBLAS_VER_MAJOR)

#define CANDIDATES 24
#define TUNE_ROUNDS 5
#define TUNE_PRODUCTS_MIN 1e9 /* multiply-adds: less is over before anything else is launched */
#define TUNE_MS 0.2f          /* of a measurement: short products are repeated */
#define TUNE_REPEATS_MAX 32
#define TUNE_GAIN 0.98f /* of the first answer's time, which another must come under */

_Static_assert(sizeof(cublasLtMatmulAlgo_t) == FLAP_MATMUL_ALGORITHM_BYTES, "tables hold algorithms as bytes");

typedef struct plan {
  flap_matmul_key key;
  bool used, plain; /* plain: cuBLASLt has nothing for it */
  bool untuned;     /* the table is to have an entry for it */
  cublasLtMatmulDescOpaque_t description;
  cublasLtMatrixLayoutOpaque_t first, second, result;
  cublasLtMatmulAlgo_t algorithm;
} plan;

struct cuda_blas {
  void *library;
  cublasLtHandle_t handle;
  void *workspace;
  char version[32];
  plan *plans;
  uint32_t plan_count;
  flap_matmul_table *table; /* the caller's; NULL: first answers */
  bool tunes;
  cudaEvent_t started, ended; /* with tunes */

  cublasStatus_t (*create)(cublasLtHandle_t *handle);
  cublasStatus_t (*destroy)(cublasLtHandle_t handle);
  size_t (*get_version)(void);
  const char *(*status_name)(cublasStatus_t status);
  cublasStatus_t (*layout_init)(cublasLtMatrixLayout_t layout, size_t size, cudaDataType type, uint64_t rows,
                                uint64_t columns, int64_t ld);
  cublasStatus_t (*description_init)(cublasLtMatmulDesc_t description, size_t size, cublasComputeType_t compute,
                                     cudaDataType scale);
  cublasStatus_t (*description_set)(cublasLtMatmulDesc_t description, cublasLtMatmulDescAttributes_t attribute,
                                    const void *value, size_t bytes);
  cublasStatus_t (*preference_init)(cublasLtMatmulPreference_t preference, size_t size);
  cublasStatus_t (*preference_set)(cublasLtMatmulPreference_t preference,
                                   cublasLtMatmulPreferenceAttributes_t attribute, const void *value, size_t bytes);
  cublasStatus_t (*heuristic)(cublasLtHandle_t handle, cublasLtMatmulDesc_t description, cublasLtMatrixLayout_t a,
                              cublasLtMatrixLayout_t b, cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t d,
                              cublasLtMatmulPreference_t preference, int wanted,
                              cublasLtMatmulHeuristicResult_t results[], int *found);
  cublasStatus_t (*check)(cublasLtHandle_t handle, cublasLtMatmulDesc_t description, cublasLtMatrixLayout_t a,
                          cublasLtMatrixLayout_t b, cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t d,
                          const cublasLtMatmulAlgo_t *algorithm, cublasLtMatmulHeuristicResult_t *result);
  cublasStatus_t (*algorithm_get)(const cublasLtMatmulAlgo_t *algorithm, cublasLtMatmulAlgoConfigAttributes_t attribute,
                                  void *value, size_t bytes, size_t *written);
  cublasStatus_t (*matmul)(cublasLtHandle_t handle, cublasLtMatmulDesc_t description, const void *alpha, const void *a,
                           cublasLtMatrixLayout_t a_layout, const void *b, cublasLtMatrixLayout_t b_layout,
                           const void *beta, const void *c, cublasLtMatrixLayout_t c_layout, void *d,
                           cublasLtMatrixLayout_t d_layout, const cublasLtMatmulAlgo_t *algorithm, void *workspace,
                           size_t workspace_bytes, cudaStream_t stream);
};

/* ---- finding the library -------------------------------------------------------------------------------- */

/* dlsym gives a data pointer; the standard converts it to a function only through its bytes. */
static bool find(const cuda_blas *blas, const char *name, void *function_out) {
  void *symbol = dlsym(blas->library, name);
  *(void **)function_out = symbol;
  return symbol != NULL;
}

/* Variables by which a user changes what products of fp32 are computed with, behind the numerics key. */
static void ignore_variables(void) {
  static const char *const names[] = {"NVIDIA_TF32_OVERRIDE", "CUBLAS_EMULATE_SINGLE_PRECISION",
                                      "CUBLAS_EMULATION_STRATEGY"};
  for (size_t i = 0; i < sizeof names / sizeof *names; ++i) {
    if (getenv(names[i]) == NULL)
      continue;
    flap_log(FLAP_LOG_WARNING, "%s is ignored: products of fp32 are computed in fp32", names[i]);
    (void)unsetenv(names[i]);
  }
}

static flap_status load(cuda_blas *blas) {
  static const char *const places[] = {LIBRARY, FLAP_CUDA_LIBRARIES "/" LIBRARY, "/usr/local/cuda/lib64/" LIBRARY};
  ignore_variables();
  for (size_t i = 0; i < sizeof places / sizeof *places && blas->library == NULL; ++i)
    blas->library = dlopen(places[i], RTLD_NOW | RTLD_LOCAL);
  if (blas->library == NULL)
    return flap_error_set(FLAP_DEVICE,
                          "cuda: %s is not there; install CUDA's libcublas, or put its folder into LD_LIBRARY_PATH",
                          LIBRARY);
  const bool complete = find(blas, "cublasLtCreate", &blas->create) && find(blas, "cublasLtDestroy", &blas->destroy) &&
                        find(blas, "cublasLtGetVersion", &blas->get_version) &&
                        find(blas, "cublasLtGetStatusString", &blas->status_name) &&
                        find(blas, "cublasLtMatrixLayoutInit_internal", &blas->layout_init) &&
                        find(blas, "cublasLtMatmulDescInit_internal", &blas->description_init) &&
                        find(blas, "cublasLtMatmulDescSetAttribute", &blas->description_set) &&
                        find(blas, "cublasLtMatmulPreferenceInit_internal", &blas->preference_init) &&
                        find(blas, "cublasLtMatmulPreferenceSetAttribute", &blas->preference_set) &&
                        find(blas, "cublasLtMatmulAlgoGetHeuristic", &blas->heuristic) &&
                        find(blas, "cublasLtMatmulAlgoCheck", &blas->check) &&
                        find(blas, "cublasLtMatmulAlgoConfigGetAttribute", &blas->algorithm_get) &&
                        find(blas, "cublasLtMatmul", &blas->matmul);
  if (!complete)
    return flap_error_set(FLAP_DEVICE, "cuda: %s is not the library that this build was made for (%d.%d)", LIBRARY,
                          CUBLAS_VER_MAJOR, CUBLAS_VER_MINOR);
  return FLAP_OK;
}

static void describe_version(cuda_blas *blas) {
  const size_t version = blas->get_version();
  (void)snprintf(blas->version, sizeof blas->version, "cublaslt-%zu.%zu.%zu", version / 10000, version / 100 % 100,
                 version % 100);
}

flap_status cuda_blas_find_version(char *version_out, size_t bytes) {
  cuda_blas blas = {.library = NULL};
  FLAP_TRY(load(&blas));
  describe_version(&blas);
  (void)snprintf(version_out, bytes, "%s", blas.version);
  return FLAP_OK;
}

flap_status cuda_blas_open(flap_ops *ops, void *workspace, cuda_blas **blas_out) {
  (void)ops; /* the handle is for the current device, which is the only one */
  *blas_out = NULL;
  cuda_blas *blas = calloc(1, sizeof *blas);
  plan *plans = calloc(PLANS, sizeof *plans);
  if (blas == NULL || plans == NULL) {
    free(blas), free(plans);
    return flap_error_set(FLAP_NO_MEMORY, "cuda: no memory for the table of matrix products");
  }
  blas->plans = plans;
  blas->workspace = workspace;
  flap_status status = load(blas);
  if (status == FLAP_OK) {
    const cublasStatus_t created = blas->create(&blas->handle);
    if (created != CUBLAS_STATUS_SUCCESS) {
      blas->handle = NULL;
      status = flap_error_set(FLAP_DEVICE, "cuda: cuBLASLt cannot start: %s", blas->status_name(created));
    }
  }
  if (status != FLAP_OK) {
    cuda_blas_close(blas);
    return status;
  }
  describe_version(blas);
  *blas_out = blas;
  return FLAP_OK;
}

void cuda_blas_close(cuda_blas *blas) {
  if (blas == NULL)
    return;
  if (blas->handle != NULL)
    (void)blas->destroy(blas->handle);
  if (blas->started != NULL)
    (void)cudaEventDestroy(blas->started);
  if (blas->ended != NULL)
    (void)cudaEventDestroy(blas->ended);
  /* The library stays loaded: CUDA's runtime still knows its kernels. */
  free(blas->plans);
  free(blas);
}

const char *cuda_blas_version(const cuda_blas *blas) {
  return blas->version;
}

/* ---- plans ---------------------------------------------------------------------------------------------- */

static uint32_t hash_of(const flap_matmul_key *key) { /* FNV-1a */
  const unsigned char *bytes = (const unsigned char *)key;
  uint32_t hash = 2166136261u;
  for (size_t i = 0; i < sizeof *key; ++i)
    hash = (hash ^ bytes[i]) * 16777619u;
  return hash;
}

static cudaDataType type_of(flap_dtype dtype) {
  flap_assert(dtype == FLAP_F32 || dtype == FLAP_BF16 || dtype == FLAP_F16);
  return dtype == FLAP_F32 ? CUDA_R_32F : dtype == FLAP_BF16 ? CUDA_R_16BF : CUDA_R_16F;
}

static cublasStatus_t describe_layouts(const cuda_blas *blas, plan *p) {
  const flap_matmul_key *x = &p->key;
  const cudaDataType in = type_of((flap_dtype)x->dtype), out = type_of((flap_dtype)x->c_dtype);
  const bool b_transposed = x->transpose == FLAP_NT, a_transposed = x->transpose == FLAP_TN;
  cublasStatus_t status =
      blas->layout_init(&p->first, sizeof p->first, in, b_transposed ? x->k : x->n, b_transposed ? x->n : x->k, x->ldb);
  if (status == CUBLAS_STATUS_SUCCESS)
    status = blas->layout_init(&p->second, sizeof p->second, in, a_transposed ? x->m : x->k, a_transposed ? x->k : x->m,
                               x->lda);
  if (status == CUBLAS_STATUS_SUCCESS)
    status = blas->layout_init(&p->result, sizeof p->result, out, x->n, x->m, x->ldc);
  return status;
}

static cublasStatus_t describe_product(const cuda_blas *blas, plan *p, const void *bias) {
  const cublasOperation_t first = p->key.transpose == FLAP_NT ? CUBLAS_OP_T : CUBLAS_OP_N;
  const cublasOperation_t second = p->key.transpose == FLAP_TN ? CUBLAS_OP_T : CUBLAS_OP_N;
  cublasStatus_t status =
      blas->description_init(&p->description, sizeof p->description, CUBLAS_COMPUTE_32F, CUDA_R_32F);
  if (status == CUBLAS_STATUS_SUCCESS)
    status = blas->description_set(&p->description, CUBLASLT_MATMUL_DESC_TRANSA, &first, sizeof first);
  if (status == CUBLAS_STATUS_SUCCESS)
    status = blas->description_set(&p->description, CUBLASLT_MATMUL_DESC_TRANSB, &second, sizeof second);
  if (bias == NULL || status != CUBLAS_STATUS_SUCCESS)
    return status;
  const cublasLtEpilogue_t epilogue = CUBLASLT_EPILOGUE_BIAS;
  const int32_t bias_type = (int32_t)type_of((flap_dtype)p->key.dtype);
  status = blas->description_set(&p->description, CUBLASLT_MATMUL_DESC_EPILOGUE, &epilogue, sizeof epilogue);
  if (status == CUBLAS_STATUS_SUCCESS)
    status = blas->description_set(&p->description, CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, &bias_type, sizeof bias_type);
  if (status == CUBLAS_STATUS_SUCCESS)
    status = blas->description_set(&p->description, CUBLASLT_MATMUL_DESC_BIAS_POINTER, &bias, sizeof bias);
  return status;
}

/* A plan of this key, but for its algorithm. */
static cublasStatus_t describe(const cuda_blas *blas, plan *p, const flap_matmul_key *key, const void *bias) {
  p->key = *key;
  const cublasStatus_t status = describe_layouts(blas, p);
  return status == CUBLAS_STATUS_SUCCESS ? describe_product(blas, p, bias) : status;
}

/* Up to `wanted` algorithms, the one that is thought fastest first. */
static cublasStatus_t ask_heuristic(const cuda_blas *blas, plan *p, int wanted,
                                    cublasLtMatmulHeuristicResult_t *results, int *found_out) {
  cublasLtMatmulPreferenceOpaque_t preference;
  const uint64_t workspace = CUDA_BLAS_WORKSPACE_BYTES;
  const uint32_t reductions = CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE;
  const uint32_t a = p->key.align_b, b = p->key.align_a, c = p->key.align_c; /* their first is our b */
  cublasStatus_t status = blas->preference_init(&preference, sizeof preference);
  const struct {
    cublasLtMatmulPreferenceAttributes_t attribute;
    const void *value;
    size_t bytes;
  } settings[] = {{CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &workspace, sizeof workspace},
                  {CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, &reductions, sizeof reductions},
                  {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, &a, sizeof a},
                  {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, &b, sizeof b},
                  {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, &c, sizeof c},
                  {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, &c, sizeof c}};
  for (size_t i = 0; i < sizeof settings / sizeof *settings && status == CUBLAS_STATUS_SUCCESS; ++i)
    status = blas->preference_set(&preference, settings[i].attribute, settings[i].value, settings[i].bytes);
  if (status != CUBLAS_STATUS_SUCCESS)
    return status;
  *found_out = 0;
  memset(results, 0, (size_t)wanted * sizeof *results);
  return blas->heuristic(blas->handle, &p->description, &p->first, &p->second, &p->result, &p->result, &preference,
                         wanted, results, found_out);
}

static cublasStatus_t choose_algorithm(const cuda_blas *blas, plan *p) {
  const flap_matmul_entry *entry = blas->table != NULL ? flap_matmul_table_find(blas->table, &p->key) : NULL;
  const bool missing =
      blas->table != NULL && entry == NULL && (double)p->key.m * p->key.n * p->key.k >= TUNE_PRODUCTS_MIN;
  p->untuned = missing && blas->tunes;
  if (missing && !blas->tunes && blas->table->count > 0) {
    char text[FLAP_MATMUL_TEXT_MAX];
    flap_log(FLAP_LOG_DEBUG, "product %s: not in the table", flap_matmul_key_text(&p->key, text));
  }
  if (entry != NULL) {
    memcpy(&p->algorithm, entry->algorithm, sizeof p->algorithm);
    return CUBLAS_STATUS_SUCCESS;
  }
  cublasLtMatmulHeuristicResult_t result;
  int found = 0;
  cublasStatus_t status = ask_heuristic(blas, p, 1, &result, &found);
  if (status == CUBLAS_STATUS_SUCCESS && (found == 0 || result.state != CUBLAS_STATUS_SUCCESS))
    status = CUBLAS_STATUS_NOT_SUPPORTED;
  p->algorithm = result.algo;
  return status;
}

/* Whether rows, sizes and addresses are whole vectors of 16 bytes. */
static bool is_whole(const flap_matmul_key *x) {
  const uint32_t vector = 16 / (uint32_t)flap_dtype_bytes((flap_dtype)x->dtype);
  return (x->lda | x->ldb | x->ldc | x->n | x->k) % vector == 0 && (x->bias == 0 || x->bias == 16) &&
         x->align_a == 16 && x->align_b == 16 && x->align_c == 16;
}

/* The plan of this shape, made if it is new. */
static plan *plan_for(cuda_blas *blas, const flap_matmul *x, cublasStatus_t *status_out) {
  const flap_matmul_key key = flap_matmul_key_of(x);
  *status_out = CUBLAS_STATUS_SUCCESS;
  if (blas->plan_count >= PLANS_FULL) {
    memset(blas->plans, 0, PLANS * sizeof *blas->plans);
    blas->plan_count = 0;
  }
  uint32_t slot = hash_of(&key) % PLANS;
  while (blas->plans[slot].used && memcmp(&blas->plans[slot].key, &key, sizeof key) != 0)
    slot = (slot + 1) % PLANS;
  plan *p = &blas->plans[slot];
  if (p->used)
    return p;
  cublasStatus_t status = describe(blas, p, &key, x->bias);
  if (status == CUBLAS_STATUS_SUCCESS)
    status = choose_algorithm(blas, p);
  p->plain = status == CUBLAS_STATUS_NOT_SUPPORTED || status == CUBLAS_STATUS_INVALID_VALUE ||
             ((x->bias != NULL || x->residual != NULL) && !is_whole(&key));
  if (status != CUBLAS_STATUS_SUCCESS && !p->plain) {
    *status_out = status;
    return p; /* not kept */
  }
  p->used = true;
  blas->plan_count++;
  return p;
}

static cublasStatus_t launch(const cuda_blas *blas, plan *p, const cublasLtMatmulAlgo_t *algorithm,
                             const flap_matmul *x, cudaStream_t stream) {
  const float alpha = 1, beta = x->accumulate || x->residual != NULL ? 1 : 0;
  const void *added = x->residual != NULL ? x->residual : x->c;
  return blas->matmul(blas->handle, &p->description, &alpha, x->b, &p->first, x->a, &p->second, &beta, added,
                      &p->result, x->c, &p->result, algorithm, blas->workspace, CUDA_BLAS_WORKSPACE_BYTES, stream);
}

/* ---- tuning --------------------------------------------------------------------------------------------- */

/* Whether cuBLASLt takes the algorithm for this product, within our workspace and the rule about cutting K. */
static bool is_possible(const cuda_blas *blas, plan *p, const cublasLtMatmulAlgo_t *algorithm) {
  cublasLtMatmulHeuristicResult_t result;
  int32_t parts = 1;
  uint32_t scheme = CUBLASLT_REDUCTION_SCHEME_NONE;
  size_t written = 0;
  memset(&result, 0, sizeof result);
  if (blas->check(blas->handle, &p->description, &p->first, &p->second, &p->result, &p->result, algorithm, &result) !=
          CUBLAS_STATUS_SUCCESS ||
      result.workspaceSize > CUDA_BLAS_WORKSPACE_BYTES)
    return false;
  if (blas->algorithm_get(algorithm, CUBLASLT_ALGO_CONFIG_SPLITK_NUM, &parts, sizeof parts, &written) !=
          CUBLAS_STATUS_SUCCESS ||
      blas->algorithm_get(algorithm, CUBLASLT_ALGO_CONFIG_REDUCTION_SCHEME, &scheme, sizeof scheme, &written) !=
          CUBLAS_STATUS_SUCCESS)
    return false;
  return parts <= 1 || scheme == CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE;
}

/* What is timed for a product: the first answer, then what else is offered. */
typedef struct candidates {
  uint32_t count;
  cublasLtMatmulAlgo_t algorithm[CANDIDATES + 1];
  float ms[CANDIDATES + 1][TUNE_ROUNDS];
} candidates;

/* The first answer stays the first, whatever a longer list begins with. */
static void list_candidates(const cuda_blas *blas, plan *p, candidates *list) {
  cublasLtMatmulHeuristicResult_t results[CANDIDATES];
  int found = 0;
  list->count = 0;
  if (!is_possible(blas, p, &p->algorithm))
    return;
  list->algorithm[list->count++] = p->algorithm;
  if (ask_heuristic(blas, p, CANDIDATES, results, &found) != CUBLAS_STATUS_SUCCESS)
    return;
  for (int i = 0; i < found && i < CANDIDATES; ++i)
    if (results[i].state == CUBLAS_STATUS_SUCCESS &&
        memcmp(&results[i].algo, &p->algorithm, sizeof p->algorithm) != 0 && is_possible(blas, p, &results[i].algo))
      list->algorithm[list->count++] = results[i].algo;
}

/* Milliseconds of one product; below 0: it was refused, or the device has failed. */
static float time_product(flap_ops *ops, plan *p, const cublasLtMatmulAlgo_t *algorithm, const flap_matmul *x,
                          uint32_t repeats) {
  const cuda_blas *blas = cuda_state(ops)->blas;
  const cudaStream_t stream = cuda_stream(ops);
  float ms = 0;
  cudaError_t error = cudaEventRecord(blas->started, stream);
  for (uint32_t i = 0; i < repeats; ++i)
    if (launch(blas, p, algorithm, x, stream) != CUBLAS_STATUS_SUCCESS)
      return -1;
  if (error == cudaSuccess)
    error = cudaEventRecord(blas->ended, stream);
  if (error == cudaSuccess)
    error = cudaEventSynchronize(blas->ended);
  if (error == cudaSuccess)
    error = cudaEventElapsedTime(&ms, blas->started, blas->ended);
  cuda_check(ops, "timing a matrix product", error);
  return error == cudaSuccess ? ms / (float)repeats : -1;
}

/* Rounds take turns, so that clocks that change meanwhile are the same for all. False: nothing can be said. */
static bool time_candidates(flap_ops *ops, plan *p, candidates *list, const flap_matmul *x) {
  uint32_t kept = 0, repeats = 1;
  for (uint32_t i = 0; i < list->count; ++i) /* the first launch loads code; what is refused in spite of all, goes */
    if (time_product(ops, p, &list->algorithm[i], x, 1) >= 0)
      list->algorithm[kept++] = list->algorithm[i];
    else if (i == 0)
      return false;
  list->count = kept;
  if (kept == 0)
    return false;
  const float ms = time_product(ops, p, &list->algorithm[0], x, 1);
  if (ms > 0 && ms < TUNE_MS)
    repeats = ms * TUNE_REPEATS_MAX > TUNE_MS ? (uint32_t)(TUNE_MS / ms) + 1 : TUNE_REPEATS_MAX;
  for (uint32_t round = 0; round < TUNE_ROUNDS; ++round)
    for (uint32_t i = 0; i < kept; ++i)
      if ((list->ms[i][round] = time_product(ops, p, &list->algorithm[i], x, repeats)) < 0)
        return false;
  return true;
}

static int by_size(const void *a, const void *b) {
  const float left = *(const float *)a, right = *(const float *)b;
  return left < right ? -1 : left > right;
}

/* The first, unless another is clearly faster by their medians, which are left in the middle of the rounds. */
static uint32_t fastest(candidates *list) {
  const uint32_t middle = TUNE_ROUNDS / 2;
  uint32_t best = 0;
  for (uint32_t i = 0; i < list->count; ++i) {
    qsort(list->ms[i], TUNE_ROUNDS, sizeof *list->ms[i], by_size);
    if (list->ms[i][middle] < list->ms[best][middle])
      best = i;
  }
  return list->ms[best][middle] < TUNE_GAIN * list->ms[0][middle] ? best : 0;
}

/* Gives the plan its algorithm for good, and the table an entry. Where nothing can be timed, or the table is full, the
 * first answer stays, as it does with a table that lacks the entry. */
static void tune(flap_ops *ops, plan *p, const flap_matmul *x) {
  cuda_blas *blas = cuda_state(ops)->blas;
  candidates list;
  char text[FLAP_MATMUL_TEXT_MAX];
  p->untuned = false;
  list_candidates(blas, p, &list);
  if (!time_candidates(ops, p, &list, x))
    return;
  const uint32_t best = fastest(&list);
  if (!flap_matmul_table_add(blas->table, &p->key, (const uint8_t *)&list.algorithm[best]))
    return;
  p->algorithm = list.algorithm[best];
  flap_log(FLAP_LOG_DEBUG, "product %s: %u algorithms, the first %.3f ms, the fastest %.3f ms",
           flap_matmul_key_text(&p->key, text), list.count, (double)list.ms[0][TUNE_ROUNDS / 2],
           (double)list.ms[best][TUNE_ROUNDS / 2]);
}

/* Every entry that is not possible here: an error, or it leaves the table. */
static flap_status check_entries(const cuda_blas *blas, flap_matmul_table *table, flap_matmul_mode mode) {
  for (uint32_t i = table->count; i-- > 0;) {
    const flap_matmul_entry *entry = &table->entries[i];
    char text[FLAP_MATMUL_TEXT_MAX];
    plan p;
    cublasLtMatmulAlgo_t algorithm;
    flap_assert(flap_matmul_key_valid(&entry->key));
    memset(&p, 0, sizeof p);
    memcpy(&algorithm, entry->algorithm, sizeof algorithm);
    /* As a bias, any address of the right alignment. */
    const void *bias = entry->key.bias > 0 ? (const unsigned char *)blas->workspace + entry->key.bias : NULL;
    if (describe(blas, &p, &entry->key, bias) == CUBLAS_STATUS_SUCCESS && is_possible(blas, &p, &algorithm))
      continue;
    (void)flap_matmul_key_text(&entry->key, text);
    if (mode == FLAP_MATMUL_USE)
      return flap_error_set(FLAP_INVALID, "cuda: %s cannot compute the product %s with the algorithm in the table",
                            blas->version, text);
    flap_log(FLAP_LOG_DEBUG, "product %s: the algorithm in the table is not possible", text);
    flap_matmul_table_remove(table, i);
  }
  return FLAP_OK;
}

flap_status cuda_blas_set_table(cuda_blas *blas, flap_matmul_table *table, flap_matmul_mode mode) {
  flap_assert(blas->table == NULL && blas->plan_count == 0);
  FLAP_TRY(check_entries(blas, table, mode));
  if (mode == FLAP_MATMUL_TUNE) {
    cudaError_t error = cudaEventCreate(&blas->started);
    if (error == cudaSuccess)
      error = cudaEventCreate(&blas->ended);
    if (error != cudaSuccess)
      return flap_error_set(FLAP_DEVICE, "cuda: cannot make events to time products: %s", cudaGetErrorString(error));
  }
  blas->table = table;
  blas->tunes = mode == FLAP_MATMUL_TUNE;
  return FLAP_OK;
}

/* ---- products ------------------------------------------------------------------------------------------- */

static void fail(flap_ops *ops, cublasStatus_t status) {
  flap_device_cuda_fail(ops->device, "a matrix product", (int)status, cuda_state(ops)->blas->status_name(status));
}

void cuda_matmul(flap_ops *ops, const flap_matmul *matmul) {
  cuda_blas *blas = cuda_state(ops)->blas;
  const cudaStream_t stream = cuda_stream(ops);
  flap_matmul x = *matmul;
  if (x.bias != NULL && x.residual != NULL && x.c_dtype == FLAP_F32) { /* in c, where the bias is added to it */
    cuda_copy_rows(ops, x.c, x.residual, (uint64_t)x.n * sizeof(float), x.m, (uint64_t)x.ldc * sizeof(float));
    x.residual = NULL;
    x.accumulate = true;
  }
  if (x.bias != NULL && x.c_dtype == FLAP_F32) { /* added in fp32 beforehand, the same with any input type */
    cuda_bias_prepare(ops, x.dtype, x.c, x.bias, x.m, x.n, x.ldc, x.accumulate);
    x.accumulate = true;
    x.bias = NULL;
  }
  cublasStatus_t status;
  plan *p = plan_for(blas, &x, &status);
  if (status != CUBLAS_STATUS_SUCCESS) {
    fail(ops, status);
    return;
  }
  if (p->plain) {
    cuda_matmul_plain(ops, &x);
    return;
  }
  if (x.bias != NULL)
    status = blas->description_set(&p->description, CUBLASLT_MATMUL_DESC_BIAS_POINTER, &x.bias, sizeof x.bias);
  if (status == CUBLAS_STATUS_SUCCESS && p->untuned)
    tune(ops, p, &x);
  if (status == CUBLAS_STATUS_SUCCESS)
    status = launch(blas, p, &p->algorithm, &x, stream);
  if (status != CUBLAS_STATUS_SUCCESS)
    fail(ops, status);
}
