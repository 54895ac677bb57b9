/* The math: every kernel that a model family or the optimizer needs, behind one table of functions.
 *
 * Role: computes on pointers into device memory. It knows no pages, layers or files, and never allocates: scratch is
 * the `workspace` of the ops object, of a size that flap_ops_workspace_bytes tells beforehand.
 *
 * Numbers: `dtype` is the storage type (FLAP_BF16, FLAP_F16 or FLAP_F32). Arithmetic is fp32; results are
 * rounded once, to nearest even, when stored. All matrices are row-major and contiguous unless strides are given.
 * Results are a function of shapes, dtype and values only: never of threads, addresses or history. Reductions have a
 * fixed order. "+=" outputs are fp32 sums that the kernel adds to.
 *
 * T tokens = B sequences of S tokens; V vocabulary; D hidden; F intermediate; HQ, HKV heads; HD head size.
 *
 * Launches are asynchronous on the compute stream where the device is; errors are sticky in the device.
 * On the sim device every function only charges time.
 */
#ifndef FLAP_KERNELS_OPS_H
#define FLAP_KERNELS_OPS_H

#include "base/dtype.h"
#include "base/status.h"
#include "kernels/device/device.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Tensors in regions start at multiples of this many elements, and norms are summed per block of them. */
#define FLAP_OPS_BLOCK 4096u

/* Sizes of heads that the cuda device has attention for: multiples of the first, up to the second. */
#define FLAP_OPS_CUDA_HEAD_STEP 8u
#define FLAP_OPS_CUDA_HEAD_MAX 256u

typedef struct flap_ops flap_ops;

/* Upper bounds of the shapes that will be used; decides the workspace. */
typedef struct flap_ops_limits {
  flap_dtype dtype;
  uint32_t batch_max, sequence_max; /* B and S of one call; decode counts as B = 1 */
  uint32_t tokens_max;              /* T of one call */
  uint32_t hidden, intermediate, vocabulary, heads, kv_heads, head_size;
  uint32_t cache_tokens_max; /* longest KV cache; 0 if none */
  uint32_t threads;          /* of the pool */
} flap_ops_limits;

/* Bytes of device memory that the kernels need as scratch for these limits; of every kind, whatever this build has. */
uint64_t flap_ops_workspace_bytes(flap_device_kind kind, const flap_ops_limits *limits);

/* `workspace` is device memory of that size, aligned to 256, and belongs to the ops until close. */
FLAP_CHECKED flap_status flap_ops_open(flap_device *device, const flap_ops_limits *limits, void *workspace,
                                       flap_ops **ops_out);
void flap_ops_close(flap_ops *ops);
flap_device *flap_ops_device(const flap_ops *ops);
/* What decides the bits, for the numerics key: "cpu avx512 openblas-0.3.21-SkylakeX". Static storage or the ops's. */
const char *flap_ops_numerics(const flap_ops *ops);

/* ---- matmul -------------------------------------------------------------------------------------------- */

typedef enum flap_transpose { FLAP_NN, FLAP_NT, FLAP_TN } flap_transpose;

/* c (M, N) = op(a) · op(b) (+ bias), with K summed in fp32:
 *   FLAP_NT: a (M, K), b (N, K)   the forward, y = x Wᵀ, W in the Hugging Face layout (out, in)
 *   FLAP_NN: a (M, K), b (K, N)   the input gradient, dx = dy W
 *   FLAP_TN: a (K, M), b (K, N)   the weight gradient, dW = dyᵀ x
 * a and b are of `dtype`; c is of `c_dtype`, which is the same or fp32. With `accumulate`, c is fp32 and is added to.
 * bias (N) of dtype or NULL. residual (M, N) of c_dtype with c's row stride, or NULL: added before the one rounding. It
 * must not be c: products of 16-bit types in its place had other bits on a GPU. lda, ldb, ldc are row strides in
 * elements. */
typedef struct flap_matmul {
  flap_transpose transpose;
  uint32_t m, n, k;
  const void *a, *b;
  void *c;
  uint32_t lda, ldb, ldc;
  const void *bias, *residual;
  flap_dtype dtype, c_dtype;
  bool accumulate;
} flap_matmul;
void flap_ops_matmul(flap_ops *ops, const flap_matmul *matmul);

/* Where a library offers several algorithms for a product, its first answer is taken, or what a recorded table says
 * (kernels/matmul_table.h). USE: what is not in the table gets the first answer. TUNE: a large product that is not in
 * the table is computed many times when it is first met, with its own operands and on the calling thread, and the
 * fastest algorithm goes into the table. So tuning is for measuring, where data do not matter: an output that is added
 * to is added to each time. All other outputs are right. */
struct flap_matmul_table;
typedef enum flap_matmul_mode { FLAP_MATMUL_USE, FLAP_MATMUL_TUNE } flap_matmul_mode;

/* What a table must be for on this kind of device here: "sm_90 NVIDIA H100 80GB HBM3, 132 multiprocessors,
 * cublaslt-13.1.0", or "" where tables are of no use: cpu and sim. FLAP_UNSUPPORTED without CUDA in the build,
 * FLAP_NOT_FOUND without a GPU, FLAP_DEVICE. */
FLAP_CHECKED flap_status flap_ops_matmul_target(flap_device_kind kind, char *target_out, size_t bytes);
/* Whose code computes on the cpu here: "avx512 openblas-0.3.21-SkylakeX". Loads the library. FLAP_NOT_FOUND: it is not
 * installed. */
FLAP_CHECKED flap_status flap_ops_cpu_kernels(char *name_out, size_t bytes);
/* Once, after open; the table must outlive the ops. Without a call, or on a device that has no use of a table, products
 * are as ever. An algorithm that is not possible here for its product is FLAP_INVALID, and nothing has changed; with
 * TUNE it leaves the table. */
FLAP_CHECKED flap_status flap_ops_set_matmuls(flap_ops *ops, struct flap_matmul_table *table, flap_matmul_mode mode);

/* dbias (N) fp32 += column sums of dy (T, N) with row stride ld. */
void flap_ops_bias_backward(flap_ops *ops, flap_dtype dtype, float *dbias, const void *dy, uint32_t tokens, uint32_t n,
                            uint32_t ld);

/* ---- element-wise and row-wise -------------------------------------------------------------------------- */

void flap_ops_zero(flap_ops *ops, void *memory, uint64_t bytes);
void flap_ops_copy(flap_ops *ops, void *to, const void *from, uint64_t bytes); /* within device memory */

/* out (T, D) = table (V, D)[tokens (T)]. Tokens are in [0, V): the data reader guarantees it. */
void flap_ops_embedding(flap_ops *ops, flap_dtype dtype, void *out, const int32_t *tokens, const void *table,
                        uint32_t token_count, uint32_t hidden);

/* dtable (V, D) fp32: for each token id present, adds the rows dx (T, D)[position] in the order of `order` (T), which
 * lists positions sorted by token, then position; tokens (T). One row of dtable is added to sequentially, so several
 * calls in micro-batch order give the same bits as one call over all. */
void flap_ops_embedding_backward(flap_ops *ops, flap_dtype dtype, float *dtable, const int32_t *tokens,
                                 const int32_t *order, const void *dx, uint32_t token_count, uint32_t hidden);

/* RMSNorm (Zhang and Sennrich 2019, as Llama: statistics in fp32, x * rstd rounded to dtype, times weight).
 * With residual: sum_out = x + residual, rounded, is what gets normalised; else x is (sum_out NULL).
 * out (T, D), rstd (T) fp32, weight (D). */
void flap_ops_rmsnorm(flap_ops *ops, flap_dtype dtype, void *out, float *rstd, void *sum_out, const void *x,
                      const void *residual, const void *weight, uint32_t token_count, uint32_t hidden, float epsilon);

/* dx_out = gradient through the norm of x (what was normalised) + dresidual (T, D; NULL for none), rounded once; dx_out
 * may be dresidual or dy. dweight (D) fp32 +=. normalized_out (T, D; NULL if nobody wants it): the forward's result
 * once more, to the bit; it may be dy. */
void flap_ops_rmsnorm_backward(flap_ops *ops, flap_dtype dtype, void *dx_out, float *dweight, void *normalized_out,
                               const void *dy, const void *x, const void *weight, const float *rstd,
                               const void *dresidual, uint32_t token_count, uint32_t hidden);

/* out (T, D) = a + b. out may be a or b. */
void flap_ops_add(flap_ops *ops, flap_dtype dtype, void *out, const void *a, const void *b, uint64_t elements);

/* Rotary position embedding, the Llama "rotate half" form. cos_sin (positions, HD): cosines of HD/2 frequencies, then
 * sines, fp32, made on the host by flap_ops_rope_table and uploaded. Rotates `heads` heads of x, rows of stride `ld`,
 * in place; token t has position first_position + t % sequence. `inverse` is the backward. */
void flap_ops_rope(flap_ops *ops, flap_dtype dtype, void *x, const float *cos_sin, uint32_t token_count,
                   uint32_t sequence, uint32_t first_position, uint32_t heads, uint32_t head_size, uint32_t ld,
                   bool inverse);

typedef enum flap_rope_kind { FLAP_ROPE_DEFAULT, FLAP_ROPE_LLAMA3, FLAP_ROPE_LINEAR } flap_rope_kind;
typedef struct flap_rope {
  flap_rope_kind kind;
  double theta;
  double factor, low_freq_factor, high_freq_factor; /* llama3: as in HF's rope_scaling; linear: factor */
  uint32_t original_max_position;
} flap_rope;
/* Host function: fills table (positions, head_size) as above, in the arithmetic of transformers (fp32 frequencies). */
void flap_ops_rope_table(const flap_rope *rope, uint32_t positions, uint32_t head_size, float *table_out);

/* out (T, F) = silu(gate) * up; gate and up (T, F), rows of stride ld. silu's result is rounded to dtype before the
 * product, as PyTorch does. */
void flap_ops_swiglu(flap_ops *ops, flap_dtype dtype, void *out, const void *gate, const void *up, uint32_t token_count,
                     uint32_t intermediate, uint32_t ld);
/* dgate, dup (T, F) with row stride ld_d from dout (T, F), gate and up (stride ld). dgate may be gate, dup may be up.
 * out (T, F; NULL if nobody wants it): the forward's result once more, to the bit; it may be dout. */
void flap_ops_swiglu_backward(flap_ops *ops, flap_dtype dtype, void *dgate, void *dup, uint32_t ld_d, void *out,
                              const void *dout, const void *gate, const void *up, uint32_t ld, uint32_t token_count,
                              uint32_t intermediate);

/* ---- products and what follows them --------------------------------------------------------------------- */

/* One operation each, where the device has a kernel for both, so that nothing is read back in between; elsewhere the
 * two are called in turn. Roundings are those of the two; where another kernel than flap_ops_matmul's sums K, that may
 * be in another order, and no table of algorithms holds for it. They take products without residual and sums, with
 * c_dtype = dtype. What they write overlaps neither a, b and bias nor anything else that they read or write, but for
 * gradients in the place of what they are gradients of. Pointers and rows that are not aligned to 16 bytes may have
 * other bits. */

/* c (M, 2 F): gate's columns and then up's (NT, n = 2 F, no bias), and out (M, F) = silu(gate) * up, or NULL: c alone,
 * by the same kernel, so with the same bits. */
void flap_ops_matmul_swiglu(flap_ops *ops, const flap_matmul *matmul, void *out);
/* With dout (M, F) = a b (NN, n = F, no bias), dgate and dup as flap_ops_swiglu_backward gives them; in the place of
 * gate and up with ld_d = ld alone. c (M, F), contiguous, has silu(gate) * up once more if `again`, else nothing in
 * particular. */
void flap_ops_matmul_swiglu_backward(flap_ops *ops, const flap_matmul *matmul, void *dgate, void *dup, uint32_t ld_d,
                                     bool again, const void *gate, const void *up, uint32_t ld);
/* c (M, n) (NT), of which flap_ops_rope has rotated the first `heads` heads of each row. */
void flap_ops_matmul_rope(flap_ops *ops, const flap_matmul *matmul, const float *cos_sin, uint32_t sequence,
                          uint32_t first_position, uint32_t heads, uint32_t head_size);

/* ---- attention ------------------------------------------------------------------------------------------ */

/* Causal grouped-query attention (Dao, FlashAttention-2, 2023: tiles, running maximum and sum).
 * q (B, S, HQ, HD), k and v (B, S, HKV, HD), each with its own token stride in elements; out (B, S, HQ, HD) contiguous;
 * lse (B, HQ, S) fp32. Scale 1/sqrt(HD). Never holds S×S for all heads at once. */
typedef struct flap_attention {
  uint32_t batch, sequence, heads, kv_heads, head_size;
  uint32_t q_stride, kv_stride;
  const void *q, *k, *v;
  void *out;
  float *lse;
  flap_dtype dtype;
} flap_attention;
void flap_ops_attention(flap_ops *ops, const flap_attention *attention);

/* dq, dk, dv have the strides of q, k, v. dout (B, S, HQ, HD) contiguous. attention->out and ->lse are inputs here. */
void flap_ops_attention_backward(flap_ops *ops, const flap_attention *attention, void *dq, void *dk, void *dv,
                                 const void *dout);

/* New tokens against a cache: q (T, HQ, HD) with stride q_stride, at positions first_position + t; the cache k, v
 * (positions, HKV, HD), contiguous, already holds the new tokens' rows. out (T, HQ, HD) contiguous. */
void flap_ops_attention_decode(flap_ops *ops, flap_dtype dtype, void *out, const void *q, uint32_t q_stride,
                               const void *k_cache, const void *v_cache, uint32_t token_count, uint32_t first_position,
                               uint32_t heads, uint32_t kv_heads, uint32_t head_size);

/* ---- head ----------------------------------------------------------------------------------------------- */

/* Fused, chunked logits and cross-entropy, forward and backward. x (T, D) is the normalised hidden state, weight (V,
 * D), targets (T) in [0, V) or negative for "not counted". Logits exist for one chunk of tokens at a time; the chunk is
 * a function of shape. losses (T) fp32 out: the token's negative log-likelihood, 0 where not counted. With dx (T, D):
 * dx = d(loss_scale * sum of losses)/dx, and dweight (V, D) fp32 += with `accumulate`, else =. dx NULL: loss only.
 * Logits and their gradients are rounded to dtype, as PyTorch's are. dx may be x. */
void flap_ops_head_loss(flap_ops *ops, flap_dtype dtype, float *losses, void *dx, float *dweight, bool accumulate,
                        const void *x, const void *weight, const int32_t *targets, float loss_scale,
                        uint32_t token_count, uint32_t hidden, uint32_t vocabulary);

/* ---- optimizer ------------------------------------------------------------------------------------------ */

/* Gradient sums to their stored form: grad (elements) of grad_dtype (FLAP_BF16 or FLAP_F32) = sum, rounded once;
 * block_squares (elements / FLAP_OPS_BLOCK) fp32 = the sum of squares of each block of the rounded values. sum is fp32,
 * or of grad_dtype already, and then not rounded again. elements is a multiple of FLAP_OPS_BLOCK. grad NULL: the
 * rounded values are only measured (same bits). block_squares NULL: they are not. */
void flap_ops_gradient_store(flap_ops *ops, flap_dtype grad_dtype, void *grad, float *block_squares,
                             flap_dtype sum_dtype, const void *sum, uint64_t elements);

#define FLAP_OPS_ADAMW_BLOCKS_MAX 8192u

/* Scalars of one AdamW update, computed once on the host in fp64 and rounded to fp32. */
typedef struct flap_adamw {
  float learning_rate;
  float beta1, beta2, one_minus_beta1, one_minus_beta2;
  float inverse_bias1;      /* 1 / (1 - beta1^t) */
  float inverse_sqrt_bias2; /* 1 / sqrt(1 - beta2^t) */
  float epsilon;
  float decay;          /* 1 - learning_rate * weight_decay; applied where decay_blocks says */
  float gradient_scale; /* the clip coefficient over the loss scale; 1 when nothing is clipped or scaled */
} flap_adamw;

/* AdamW (Loshchilov and Hutter 2019), in place, per element, in this order and contracted only where an fma is written:
 *   g = grad * gradient_scale
 *   m = fma(one_minus_beta1, g, beta1 * m)
 *   v = fma(one_minus_beta2 * g, g, beta2 * v)
 *   m = 0 where |m| < 2^-100; v = 0 where |v| < 2^-100
 *   denom = fma(sqrt(v), inverse_sqrt_bias2, epsilon)
 *   w = w * decay, where decays
 *   w = fma(-learning_rate, (m * inverse_bias1) / denom, w)
 * The fp32 master weight w is in `weight` and `master`:
 *   weight_dtype FLAP_F32    `weight` is the master, `master` is NULL.
 *   weight_dtype FLAP_BF16   `weight` is the high and `master` (int16) the low half of the master:
 *                            hi = (bits + 0x8000) >> 16, lo = (int16)(bits - (hi << 16)).
 *   weight_dtype FLAP_F16    `master` (fp32) is the master; `weight` is written: the master rounded to nearest even.
 * decay_blocks: a bit per block of FLAP_OPS_BLOCK elements, first block in bit 0 of byte 0, host memory, read before
 * the call returns; elements is a multiple of FLAP_OPS_BLOCK, at most FLAP_OPS_ADAMW_BLOCKS_MAX of them. A weight that
 * is not finite, or would round to infinity in weight_dtype, is left as it was and *fault (a device word, int32) is set
 * to 1. */
void flap_ops_adamw(flap_ops *ops, const flap_adamw *scalars, flap_dtype weight_dtype, flap_dtype grad_dtype,
                    void *weight, void *master, float *m, float *v, const void *grad, const uint8_t *decay_blocks,
                    int32_t *fault, uint64_t elements);

/* Elements that share the largest moment which their codes are relative to. */
#define FLAP_OPS_MOMENT_BLOCK 256u

/* AdamW with moments in 8 bits (Dettmers et al. 2022, "8-bit Optimizers via Block-wise Quantization"): the update
 * above, with its arithmetic, contract and order of operations, between reading codes and writing them.
 *
 * m (elements) are signed codes, v (elements) unsigned ones. m_largest and v_largest are fp32, one per block of
 * FLAP_OPS_MOMENT_BLOCK elements. 2.03125 bytes per element; all bytes zero is the state at the start.
 *
 * Reading: m = ratio(code) * m_largest; root = ratio(code) * v_largest, v = root * root. The ratios are those of
 * dynamic tree quantisation, in kernels/moments.h: codes -127 to 127 with six decades, 0 to 255 with seven.
 *
 * Writing: m_largest is the block's largest |m|, v_largest its largest sqrt(v); inverse = 1 / largest, or 0 for a block
 * of zeros. The code is the nearest one to |m| * inverse (m's sign is kept) or sqrt(v) * inverse; ties go to the even
 * code. v's code is 0 where v is 0 alone, and at least 1 elsewhere.
 *
 * v is kept as its root, and does not become 0, because the update divides by the root: where v was lost beside an m
 * that was not, the weight would move by m / epsilon. See kernels/README.md for what that is worth.
 *
 * A moment that is not finite has no code: it is stored as 0, and *fault is set to 1. */
void flap_ops_adamw_8bit(flap_ops *ops, const flap_adamw *scalars, flap_dtype weight_dtype, flap_dtype grad_dtype,
                         void *weight, void *master, int8_t *m, uint8_t *v, float *m_largest, float *v_largest,
                         const void *grad, const uint8_t *decay_blocks, int32_t *fault, uint64_t elements);

#ifdef __cplusplus
}
#endif
#endif
