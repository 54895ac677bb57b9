/* Matrix products by cuBLASLt, which is looked for when the first ops are opened: half a gigabyte of library that a
 * machine without a GPU need not have.
 *
 * 1. The algorithm of a shape is the heuristic's first answer for a fixed workspace, with fp32 sums. K may be cut only
 *    where the parts are added in fp32, out of place, in a fixed order. So a shape's bits never change on one GPU model
 * and library version, which are in the numerics key.
 * 2. Operands are promised to be aligned to 16 bytes, or to what they are where that is less; addresses decide nothing
 *    else. What cuBLASLt refuses is computed by cuda_matmul_plain.
 * 3. A bias is added in fp32, before the only rounding. cuBLASLt does so where everything is whole vectors; for odd
 *    strides and sizes some of its kernels round the product first (seen with 13.1 on an H100), so those with a bias
 * are computed by cuda_matmul_plain too.
 *    A residual is the C of D = A B + C: it is added in fp32 as well.
 * 4. What was found is kept per shape in a table taken at open. When the table is full it is emptied.
 * 5. cuBLASLt is column-major. A row-major matrix is its transpose there, so c = op(a) op(b) is asked for as
 *    cᵀ = op(b)ᵀ op(a)ᵀ: their first operand is our b.
 */
#include "kernels/cuda/cuda_internal.h"

#include "base/assert.h"

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

typedef struct plan_key {
  uint32_t m, n, k, lda, ldb, ldc;
  uint8_t transpose, dtype, c_dtype, accumulate;
  uint8_t bias, align_a, align_b, align_c; /* bias: its alignment, 0 for none */
} plan_key;

typedef struct plan {
  plan_key key;
  bool used, plain; /* plain: cuBLASLt has nothing for it */
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

static flap_status load(cuda_blas *blas) {
  static const char *const places[] = {LIBRARY, FLAP_CUDA_LIBRARIES "/" LIBRARY, "/usr/local/cuda/lib64/" LIBRARY};
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
                        find(blas, "cublasLtMatmul", &blas->matmul);
  if (!complete)
    return flap_error_set(FLAP_DEVICE, "cuda: %s is not the library that this build was made for (%d.%d)", LIBRARY,
                          CUBLAS_VER_MAJOR, CUBLAS_VER_MINOR);
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
  const size_t version = blas->get_version();
  (void)snprintf(blas->version, sizeof blas->version, "cublaslt-%zu.%zu.%zu", version / 10000, version / 100 % 100,
                 version % 100);
  *blas_out = blas;
  return FLAP_OK;
}

void cuda_blas_close(cuda_blas *blas) {
  if (blas == NULL)
    return;
  if (blas->handle != NULL)
    (void)blas->destroy(blas->handle);
  /* The library stays loaded: CUDA's runtime still knows its kernels. */
  free(blas->plans);
  free(blas);
}

const char *cuda_blas_version(const cuda_blas *blas) {
  return blas->version;
}

/* ---- plans ---------------------------------------------------------------------------------------------- */

static uint8_t alignment(const void *pointer) {
  const uintptr_t lowest = (uintptr_t)pointer & (~(uintptr_t)pointer + 1);
  return lowest == 0 || lowest > 16 ? 16 : (uint8_t)lowest;
}

static plan_key key_of(const flap_matmul *x, const void *bias) {
  plan_key key;
  memset(&key, 0, sizeof key); /* keys are compared as bytes */
  key.m = x->m, key.n = x->n, key.k = x->k;
  key.lda = x->lda, key.ldb = x->ldb, key.ldc = x->ldc;
  key.transpose = (uint8_t)x->transpose;
  key.dtype = (uint8_t)x->dtype;
  key.c_dtype = (uint8_t)x->c_dtype;
  key.accumulate = x->accumulate ? 1 : x->residual != NULL ? 2 : 0;
  key.bias = bias == NULL ? 0 : alignment(bias);
  key.align_a = alignment(x->a);
  key.align_b = alignment(x->b);
  key.align_c = alignment(x->c) < alignment(x->residual) ? alignment(x->c) : alignment(x->residual);
  return key;
}

static uint32_t hash_of(const plan_key *key) { /* FNV-1a */
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

static cublasStatus_t describe_layouts(const cuda_blas *blas, plan *p, const flap_matmul *x) {
  const cudaDataType in = type_of(x->dtype), out = type_of(x->c_dtype);
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

static cublasStatus_t describe_product(const cuda_blas *blas, plan *p, const flap_matmul *x, const void *bias) {
  const cublasOperation_t first = x->transpose == FLAP_NT ? CUBLAS_OP_T : CUBLAS_OP_N;
  const cublasOperation_t second = x->transpose == FLAP_TN ? CUBLAS_OP_T : CUBLAS_OP_N;
  cublasStatus_t status =
      blas->description_init(&p->description, sizeof p->description, CUBLAS_COMPUTE_32F, CUDA_R_32F);
  if (status == CUBLAS_STATUS_SUCCESS)
    status = blas->description_set(&p->description, CUBLASLT_MATMUL_DESC_TRANSA, &first, sizeof first);
  if (status == CUBLAS_STATUS_SUCCESS)
    status = blas->description_set(&p->description, CUBLASLT_MATMUL_DESC_TRANSB, &second, sizeof second);
  if (bias == NULL || status != CUBLAS_STATUS_SUCCESS)
    return status;
  const cublasLtEpilogue_t epilogue = CUBLASLT_EPILOGUE_BIAS;
  const int32_t bias_type = (int32_t)type_of(x->dtype);
  status = blas->description_set(&p->description, CUBLASLT_MATMUL_DESC_EPILOGUE, &epilogue, sizeof epilogue);
  if (status == CUBLAS_STATUS_SUCCESS)
    status = blas->description_set(&p->description, CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, &bias_type, sizeof bias_type);
  if (status == CUBLAS_STATUS_SUCCESS)
    status = blas->description_set(&p->description, CUBLASLT_MATMUL_DESC_BIAS_POINTER, &bias, sizeof bias);
  return status;
}

static cublasStatus_t choose_algorithm(const cuda_blas *blas, plan *p) {
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
  cublasLtMatmulHeuristicResult_t result;
  int found = 0;
  memset(&result, 0, sizeof result);
  status = blas->heuristic(blas->handle, &p->description, &p->first, &p->second, &p->result, &p->result, &preference, 1,
                           &result, &found);
  if (status == CUBLAS_STATUS_SUCCESS && (found == 0 || result.state != CUBLAS_STATUS_SUCCESS))
    status = CUBLAS_STATUS_NOT_SUPPORTED;
  p->algorithm = result.algo;
  return status;
}

/* Whether rows, sizes and addresses are whole vectors of 16 bytes. */
static bool is_whole(const flap_matmul *x, const void *bias) {
  const uint32_t vector = 16 / (uint32_t)flap_dtype_bytes(x->dtype);
  return (x->lda | x->ldb | x->ldc | x->n | x->k) % vector == 0 && alignment(bias) == 16 && alignment(x->a) == 16 &&
         alignment(x->b) == 16 && alignment(x->c) == 16 && alignment(x->residual) == 16;
}

/* The plan of this shape, made if it is new. */
static plan *plan_for(cuda_blas *blas, const flap_matmul *x, const void *bias, cublasStatus_t *status_out) {
  const plan_key key = key_of(x, bias);
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
  p->key = key;
  cublasStatus_t status = describe_layouts(blas, p, x);
  if (status == CUBLAS_STATUS_SUCCESS)
    status = describe_product(blas, p, x, bias);
  if (status == CUBLAS_STATUS_SUCCESS)
    status = choose_algorithm(blas, p);
  p->plain = status == CUBLAS_STATUS_NOT_SUPPORTED || status == CUBLAS_STATUS_INVALID_VALUE ||
             ((bias != NULL || x->residual != NULL) && !is_whole(x, bias));
  if (status != CUBLAS_STATUS_SUCCESS && !p->plain) {
    *status_out = status;
    return p; /* not kept */
  }
  p->used = true;
  blas->plan_count++;
  return p;
}

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
  plan *p = plan_for(blas, &x, x.bias, &status);
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
  const float alpha = 1, beta = x.accumulate || x.residual != NULL ? 1 : 0;
  const void *added = x.residual != NULL ? x.residual : x.c;
  if (status == CUBLAS_STATUS_SUCCESS)
    status =
        blas->matmul(blas->handle, &p->description, &alpha, x.b, &p->first, x.a, &p->second, &beta, added, &p->result,
                     x.c, &p->result, &p->algorithm, blas->workspace, CUDA_BLAS_WORKSPACE_BYTES, stream);
  if (status != CUBLAS_STATUS_SUCCESS)
    fail(ops, status);
}
