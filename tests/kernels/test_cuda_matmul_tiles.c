/* Products with swiglu or rope in their epilogues, on Hopper: against the two in turn, to the bit. Operands are
 * small multiples of a power of two, so sums of products are exact and the order of K cannot show. With other values:
 * the same bits again, however many thread blocks share the work. */
#include "kernels/cuda/cuda_internal.h"
#include "kernels/cuda/matmul_rope.h"
#include "kernels/cuda/matmul_swiglu.h"
#include "tests/kernels/gpu_rig.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

static const flap_dtype dtypes[] = {FLAP_BF16, FLAP_F16};

static void with_rig(int index, void (*body)(gpu_rig *g, rig_random *random)) {
  const flap_ops_limits limits = rig_limits(dtypes[index]);
  gpu_rig g;
  gpu_rig_open(&g, &limits);
  rig_random random = rig_random_named("cuda products by tiles");
  body(&g, &random);
  gpu_rig_close(&g);
}

/* ---- operands ---- */

/* Whole numbers from -2 to 2 times 2^-exponent: exact in both types, bits made by hand. */
static operand exact(gpu_rig *g, rig_random *random, uint64_t count, uint32_t exponent) {
  uint16_t *values = malloc(count * sizeof *values);
  ck_assert_ptr_nonnull(values);
  const uint32_t bias = g->dtype == FLAP_BF16 ? 127 : 15, shift = g->dtype == FLAP_BF16 ? 7 : 10;
  for (uint64_t i = 0; i < count; ++i) {
    const uint32_t drawn = rig_between(random, 0, 4); /* 0, 1, -1, 2, -2 */
    const uint32_t power = bias - exponent + (drawn > 2 ? 1 : 0), sign = drawn % 2 == 0 ? 0x8000 : 0;
    values[i] = (uint16_t)(drawn == 0 ? 0 : sign | power << shift);
  }
  operand o = operand_of(g, g->dtype, values, count);
  free(values);
  return o;
}

typedef struct shape {
  uint32_t tokens, hidden, intermediate, gap; /* elements between rows, of all operands but the packed ones */
} shape;

static shape random_shape(rig_random *random, uint32_t round) {
  static const shape listed[] = {
      {1, 8, 8, 0},        {128, 64, 256, 0}, {257, 72, 264, 8}, {600, 520, 128, 0},
      {64, 2000, 520, 16}, {2700, 40, 520, 8}}; /* the last: 11 pairs of tiles, a band of 8 and one of 3 */
  if (round < sizeof listed / sizeof *listed)
    return listed[round];
  return (shape){.tokens = rig_between(random, 1, 900),
                 .hidden = 8 * rig_between(random, 1, 80),
                 .intermediate = 8 * rig_between(random, 1, 110),
                 .gap = 8 * rig_between(random, 0, 2)};
}

static char *behind(const operand *o, uint64_t elements) {
  return (char *)o->gpu + elements * flap_dtype_bytes(o->dtype);
}

static void check_launch(cudaError_t status) {
  ck_assert_msg(status == cudaSuccess, "%s", cudaGetErrorString(status));
}

static cudaStream_t stream_of(gpu_rig *g) {
  return (cudaStream_t)flap_device_cuda_compute(g->device);
}

static uint32_t some_multiprocessors(uint32_t round) {
  static const uint32_t counts[] = {132, 2, 6, 40};
  return counts[round % 4];
}
static uint32_t few_multiprocessors(uint32_t round) {
  static const uint32_t counts[] = {2, 6, 40};
  return counts[round % 3];
}

/* ---- forward ---- */

/* What one launch reads; gate_up and inner of two ways to compute them. */
typedef struct forward_case {
  operand a, b, gate_up, inner, other_gate_up, other_inner;
  flap_matmul matmul;
  flap_cuda_matmul_swiglu launch;
} forward_case;

static forward_case make_forward(gpu_rig *g, const shape *s, operand a, operand b) {
  const uint64_t rows = (uint64_t)s->tokens * (2 * s->intermediate + s->gap);
  const uint64_t packed = (uint64_t)s->tokens * s->intermediate;
  forward_case c = {.a = a, .b = b};
  c.gate_up = operand_empty(g, g->dtype, rows, 0), c.other_gate_up = operand_empty(g, g->dtype, rows, 0);
  c.inner = operand_empty(g, g->dtype, packed, 0), c.other_inner = operand_empty(g, g->dtype, packed, 0);
  c.matmul = (flap_matmul){.transpose = FLAP_NT,
                           .m = s->tokens,
                           .n = 2 * s->intermediate,
                           .k = s->hidden,
                           .a = a.gpu,
                           .b = b.gpu,
                           .c = c.other_gate_up.gpu,
                           .lda = s->hidden + s->gap,
                           .ldb = s->hidden + s->gap,
                           .ldc = 2 * s->intermediate + s->gap,
                           .dtype = g->dtype,
                           .c_dtype = g->dtype};
  c.launch = (flap_cuda_matmul_swiglu){.dtype = g->dtype,
                                       .tokens = s->tokens,
                                       .hidden = s->hidden,
                                       .intermediate = s->intermediate,
                                       .a = a.gpu,
                                       .b = b.gpu,
                                       .gate = c.gate_up.gpu,
                                       .up = behind(&c.gate_up, s->intermediate),
                                       .inner = c.inner.gpu,
                                       .lda = c.matmul.lda,
                                       .ldb = c.matmul.ldb,
                                       .ld_out = c.matmul.ldc};
  return c;
}

static void free_forward(forward_case *c) {
  operand_free(&c->a), operand_free(&c->b), operand_free(&c->gate_up), operand_free(&c->inner);
  operand_free(&c->other_gate_up), operand_free(&c->other_inner);
}

static void compare_forward(const forward_case *c) {
  operands_equal("gate and up", &c->gate_up, &c->other_gate_up);
  operands_equal("silu(gate) * up", &c->inner, &c->other_inner);
}

static void forward_apart(gpu_rig *g, const forward_case *c, const shape *s) {
  flap_ops_matmul(g->ops, &c->matmul);
  flap_ops_swiglu(g->ops, g->dtype, c->other_inner.gpu, c->other_gate_up.gpu,
                  behind(&c->other_gate_up, s->intermediate), s->tokens, s->intermediate, c->matmul.ldc);
}

static void forward(gpu_rig *g, rig_random *random) {
  for (uint32_t round = 0; round < 40; ++round) {
    gpu_rig_clear(g);
    const shape s = random_shape(random, round);
    forward_case c = make_forward(g, &s, exact(g, random, (uint64_t)s.tokens * (s.hidden + s.gap), 1),
                                  exact(g, random, 2ull * s.intermediate * (s.hidden + s.gap), 3));
    check_launch(flap_cuda_matmul_swiglu_forward(&c.launch, some_multiprocessors(round), stream_of(g)));
    forward_apart(g, &c, &s);
    compare_forward(&c);
    free_forward(&c);
  }
}

START_TEST(forward_has_the_bits_of_the_product_and_swiglu) {
  with_rig(_i, forward);
}
END_TEST

static void forward_again(gpu_rig *g, rig_random *random) {
  for (uint32_t round = 0; round < 8; ++round) {
    gpu_rig_clear(g);
    const shape s = random_shape(random, round + 1);
    forward_case c =
        make_forward(g, &s, operand_normal(g, random, g->dtype, (uint64_t)s.tokens * (s.hidden + s.gap), 1, 0),
                     operand_normal(g, random, g->dtype, 2ull * s.intermediate * (s.hidden + s.gap), 0.1, 0));
    check_launch(flap_cuda_matmul_swiglu_forward(&c.launch, 132, stream_of(g)));
    c.launch.gate = c.other_gate_up.gpu, c.launch.up = behind(&c.other_gate_up, s.intermediate);
    c.launch.inner = c.other_inner.gpu;
    check_launch(flap_cuda_matmul_swiglu_forward(&c.launch, few_multiprocessors(round), stream_of(g)));
    compare_forward(&c);
    operand alone = operand_empty(g, g->dtype, c.gate_up.count, 0); /* as a recompute has it */
    c.launch.gate = alone.gpu, c.launch.up = behind(&alone, s.intermediate), c.launch.inner = NULL;
    check_launch(flap_cuda_matmul_swiglu_forward(&c.launch, few_multiprocessors(round + 1), stream_of(g)));
    operands_equal("gate and up alone", &c.gate_up, &alone);
    operand_free(&alone);
    free_forward(&c);
  }
}

START_TEST(forward_has_the_same_bits_on_any_number_of_blocks) {
  with_rig(_i, forward_again);
}
END_TEST

/* ---- backward ---- */

typedef struct backward_case {
  operand a, b, gate_up, gradients, inner, other_gradients, other_inner;
  flap_matmul matmul;
  flap_cuda_matmul_swiglu launch;
} backward_case;

/* In place: the gradients begin as a copy of gate and up. */
static backward_case make_backward(gpu_rig *g, rig_random *random, const shape *s, operand a, operand b,
                                   bool in_place) {
  const uint32_t ld = 2 * s->intermediate + s->gap;
  const uint64_t packed = (uint64_t)s->tokens * s->intermediate;
  backward_case c = {.a = a, .b = b};
  c.gate_up = operand_normal(g, random, g->dtype, (uint64_t)s->tokens * ld, 2, 0);
  c.gradients = operand_copy(&c.gate_up, 0), c.other_gradients = operand_copy(&c.gate_up, 0);
  c.inner = operand_empty(g, g->dtype, packed, 0), c.other_inner = operand_empty(g, g->dtype, packed, 0);
  const operand *read = in_place ? &c.gradients : &c.gate_up;
  c.matmul = (flap_matmul){.transpose = FLAP_NN,
                           .m = s->tokens,
                           .n = s->intermediate,
                           .k = s->hidden,
                           .a = a.gpu,
                           .b = b.gpu,
                           .c = c.other_inner.gpu,
                           .lda = s->hidden + s->gap,
                           .ldb = s->intermediate + s->gap,
                           .ldc = s->intermediate,
                           .dtype = g->dtype,
                           .c_dtype = g->dtype};
  c.launch = (flap_cuda_matmul_swiglu){.dtype = g->dtype,
                                       .tokens = s->tokens,
                                       .hidden = s->hidden,
                                       .intermediate = s->intermediate,
                                       .a = a.gpu,
                                       .b = b.gpu,
                                       .gate_in = read->gpu,
                                       .up_in = behind(read, s->intermediate),
                                       .gate = c.gradients.gpu,
                                       .up = behind(&c.gradients, s->intermediate),
                                       .inner = c.inner.gpu,
                                       .lda = c.matmul.lda,
                                       .ldb = c.matmul.ldb,
                                       .ld = ld,
                                       .ld_out = ld};
  return c;
}

static void free_backward(backward_case *c) {
  operand_free(&c->a), operand_free(&c->b), operand_free(&c->gate_up), operand_free(&c->gradients);
  operand_free(&c->inner), operand_free(&c->other_gradients), operand_free(&c->other_inner);
}

static void backward_apart(gpu_rig *g, const backward_case *c, const shape *s, bool again) {
  flap_ops_matmul(g->ops, &c->matmul);
  flap_ops_swiglu_backward(g->ops, g->dtype, c->other_gradients.gpu, behind(&c->other_gradients, s->intermediate),
                           (uint32_t)c->launch.ld_out, again ? c->other_inner.gpu : NULL, c->other_inner.gpu,
                           c->gate_up.gpu, behind(&c->gate_up, s->intermediate), (uint32_t)c->launch.ld, s->tokens,
                           s->intermediate);
}

static void backward(gpu_rig *g, rig_random *random) {
  for (uint32_t round = 0; round < 40; ++round) {
    gpu_rig_clear(g);
    const shape s = random_shape(random, round);
    const bool again = round % 3 != 0;
    backward_case c = make_backward(g, random, &s, exact(g, random, (uint64_t)s.tokens * (s.hidden + s.gap), 1),
                                    exact(g, random, (uint64_t)s.hidden * (s.intermediate + s.gap), 3), round % 2 == 0);
    if (!again)
      c.launch.inner = NULL;
    check_launch(flap_cuda_matmul_swiglu_backward(&c.launch, some_multiprocessors(round), stream_of(g)));
    backward_apart(g, &c, &s, again);
    operands_equal("gradients of gate and up", &c.gradients, &c.other_gradients);
    if (again)
      operands_equal("silu(gate) * up", &c.inner, &c.other_inner);
    free_backward(&c);
  }
}

START_TEST(backward_has_the_bits_of_the_product_and_swiglu) {
  with_rig(_i, backward);
}
END_TEST

static void backward_again(gpu_rig *g, rig_random *random) {
  for (uint32_t round = 0; round < 8; ++round) {
    gpu_rig_clear(g);
    const shape s = random_shape(random, round + 1);
    backward_case c = make_backward(
        g, random, &s, operand_normal(g, random, g->dtype, (uint64_t)s.tokens * (s.hidden + s.gap), 1, 0),
        operand_normal(g, random, g->dtype, (uint64_t)s.hidden * (s.intermediate + s.gap), 0.1, 0), false);
    check_launch(flap_cuda_matmul_swiglu_backward(&c.launch, 132, stream_of(g)));
    c.launch.gate = c.other_gradients.gpu, c.launch.up = behind(&c.other_gradients, s.intermediate);
    c.launch.inner = c.other_inner.gpu;
    check_launch(flap_cuda_matmul_swiglu_backward(&c.launch, few_multiprocessors(round), stream_of(g)));
    operands_equal("gradients of gate and up", &c.gradients, &c.other_gradients);
    operands_equal("silu(gate) * up", &c.inner, &c.other_inner);
    free_backward(&c);
  }
}

START_TEST(backward_has_the_same_bits_on_any_number_of_blocks) {
  with_rig(_i, backward_again);
}
END_TEST

/* ---- rope ---- */

typedef struct rope_case {
  operand a, b, bias, table, c, other;
  flap_matmul matmul;
  flap_cuda_matmul_rope launch;
} rope_case;

/* Whole heads, of which some are rotated; b and bias as the caller made them for `heads` * head_size columns. */
static rope_case make_rope(gpu_rig *g, rig_random *random, const shape *s, uint32_t heads, uint32_t head_size,
                           operand a, operand b, operand bias) {
  const uint32_t width = heads * head_size, ld = width + s->gap;
  const uint32_t sequence = rig_between(random, 1, 300), first = rig_between(random, 0, 20);
  rope_case c = {.a = a, .b = b, .bias = bias};
  c.table = operand_normal(g, random, FLAP_F32, (uint64_t)(sequence + first) * head_size, 1, 0);
  c.c = operand_empty(g, g->dtype, (uint64_t)s->tokens * ld, 0);
  c.other = operand_copy(&c.c, 0);
  c.matmul = (flap_matmul){.transpose = FLAP_NT,
                           .m = s->tokens,
                           .n = width,
                           .k = s->hidden,
                           .a = a.gpu,
                           .b = b.gpu,
                           .bias = bias.gpu,
                           .c = c.other.gpu,
                           .lda = s->hidden + s->gap,
                           .ldb = s->hidden + s->gap,
                           .ldc = ld,
                           .dtype = g->dtype,
                           .c_dtype = g->dtype};
  c.launch = (flap_cuda_matmul_rope){.dtype = g->dtype,
                                     .tokens = s->tokens,
                                     .hidden = s->hidden,
                                     .width = width,
                                     .a = a.gpu,
                                     .b = b.gpu,
                                     .bias = bias.gpu,
                                     .c = c.c.gpu,
                                     .lda = c.matmul.lda,
                                     .ldb = c.matmul.ldb,
                                     .ldc = ld,
                                     .cos_sin = c.table.gpu,
                                     .sequence = sequence,
                                     .first_position = first,
                                     .heads = rig_between(random, 1, heads),
                                     .head_size = head_size};
  return c;
}

static void free_rope(rope_case *c) {
  operand_free(&c->a), operand_free(&c->b), operand_free(&c->bias), operand_free(&c->table), operand_free(&c->c);
  operand_free(&c->other);
}

static void rope_apart(gpu_rig *g, const rope_case *c) {
  const flap_cuda_matmul_rope *x = &c->launch;
  flap_ops_matmul(g->ops, &c->matmul);
  flap_ops_rope(g->ops, g->dtype, c->other.gpu, x->cos_sin, x->tokens, x->sequence, x->first_position, x->heads,
                x->head_size, (uint32_t)x->ldc, false);
}

static void rope(gpu_rig *g, rig_random *random) {
  for (uint32_t round = 0; round < 40; ++round) {
    gpu_rig_clear(g);
    const shape s = random_shape(random, round);
    const uint32_t head_size = round % 2 == 0 ? 64 : 128, heads = rig_between(random, 1, 9);
    rope_case c = make_rope(
        g, random, &s, heads, head_size, exact(g, random, (uint64_t)s.tokens * (s.hidden + s.gap), 1),
        exact(g, random, (uint64_t)heads * head_size * (s.hidden + s.gap), 3), exact(g, random, heads * head_size, 2));
    if (round % 3 == 0)
      c.matmul.bias = c.launch.bias = NULL;
    check_launch(flap_cuda_matmul_rope_forward(&c.launch, some_multiprocessors(round), stream_of(g)));
    rope_apart(g, &c);
    operands_equal("heads", &c.c, &c.other);
    free_rope(&c);
  }
}

START_TEST(rope_has_the_bits_of_the_product_and_rope) {
  with_rig(_i, rope);
}
END_TEST

static void rope_again(gpu_rig *g, rig_random *random) {
  for (uint32_t round = 0; round < 8; ++round) {
    gpu_rig_clear(g);
    const shape s = random_shape(random, round + 1);
    rope_case c = make_rope(g, random, &s, 6, 64,
                            operand_normal(g, random, g->dtype, (uint64_t)s.tokens * (s.hidden + s.gap), 1, 0),
                            operand_normal(g, random, g->dtype, 6ull * 64 * (s.hidden + s.gap), 0.1, 0),
                            operand_normal(g, random, g->dtype, 6 * 64, 1, 0));
    check_launch(flap_cuda_matmul_rope_forward(&c.launch, 132, stream_of(g)));
    c.launch.c = c.other.gpu;
    check_launch(flap_cuda_matmul_rope_forward(&c.launch, few_multiprocessors(round), stream_of(g)));
    operands_equal("heads", &c.c, &c.other);
    free_rope(&c);
  }
}

START_TEST(rope_has_the_same_bits_on_any_number_of_blocks) {
  with_rig(_i, rope_again);
}
END_TEST

/* ---- operations ---- */

static void forget(gpu_rig *g, const operand *o) {
  flap_ops_zero(g->ops, o->gpu, operand_size(o));
}

/* Whether the kernels take it is known from the function behind the table; the result is that of the table. */
static void forward_operation(gpu_rig *g, rig_random *random, const shape *s, bool taken) {
  gpu_rig_clear(g);
  forward_case f = make_forward(g, s, exact(g, random, (uint64_t)s->tokens * (s->hidden + s->gap), 1),
                                exact(g, random, 2ull * s->intermediate * (s->hidden + s->gap), 3));
  flap_matmul matmul = f.matmul;
  matmul.c = f.gate_up.gpu;
  ck_assert(cuda_matmul_swiglu(g->ops, &matmul, f.inner.gpu) == taken);
  forget(g, &f.gate_up), forget(g, &f.inner);
  forget(g, &f.other_gate_up), forget(g, &f.other_inner);
  flap_ops_matmul_swiglu(g->ops, &matmul, f.inner.gpu);
  forward_apart(g, &f, s);
  compare_forward(&f);
  free_forward(&f);
}

static void backward_operation(gpu_rig *g, rig_random *random, const shape *s, bool taken) {
  gpu_rig_clear(g);
  backward_case b = make_backward(g, random, s, exact(g, random, (uint64_t)s->tokens * (s->hidden + s->gap), 1),
                                  exact(g, random, (uint64_t)s->hidden * (s->intermediate + s->gap), 3), false);
  const flap_cuda_matmul_swiglu *x = &b.launch;
  const uint32_t ld = (uint32_t)x->ld;
  flap_matmul matmul = b.matmul;
  matmul.c = b.inner.gpu;
  ck_assert(cuda_matmul_swiglu_backward(g->ops, &matmul, x->gate, x->up, ld, true, x->gate_in, x->up_in, ld) == taken);
  forget(g, &b.gradients), forget(g, &b.inner), forget(g, &b.other_gradients), forget(g, &b.other_inner);
  flap_ops_matmul_swiglu_backward(g->ops, &matmul, x->gate, x->up, ld, true, x->gate_in, x->up_in, ld);
  backward_apart(g, &b, s, true);
  operands_equal("gradients of gate and up", &b.gradients, &b.other_gradients);
  operands_equal("silu(gate) * up", &b.inner, &b.other_inner);
  free_backward(&b);
}

/* Of an H100's 66 clusters: 8 and 4 rounds; half of one; one that is full, of tiles that are not. */
static void operations(gpu_rig *g, rig_random *random) {
  forward_operation(g, random, &(shape){4096, 64, 4224, 0}, true);
  forward_operation(g, random, &(shape){2048, 64, 4224, 0}, true);
  forward_operation(g, random, &(shape){256, 64, 4224, 0}, false);
  forward_operation(g, random, &(shape){1, 64, 8448, 0}, false);
  backward_operation(g, random, &(shape){2048, 64, 8448, 0}, true);
  backward_operation(g, random, &(shape){256, 64, 8448, 0}, false);
}

static void rope_operation(gpu_rig *g, rig_random *random) {
  gpu_rig_clear(g);
  const shape s = {4096, 64, 0, 8};           /* 16 pairs of tiles high */
  const uint32_t heads = 32, head_size = 128; /* 16 by 16 tiles, 97% of 4 rounds */
  rope_case c = make_rope(g, random, &s, heads, head_size, exact(g, random, (uint64_t)s.tokens * (s.hidden + s.gap), 1),
                          exact(g, random, (uint64_t)heads * head_size * (s.hidden + s.gap), 3),
                          exact(g, random, heads * head_size, 2));
  const flap_cuda_matmul_rope *x = &c.launch;
  flap_matmul matmul = c.matmul;
  matmul.c = c.c.gpu;
  ck_assert(!cuda_matmul_rope(g->ops, &matmul, x->cos_sin, x->sequence, x->first_position, x->heads, 96));
  ck_assert(!cuda_matmul_rope(g->ops, &matmul, x->cos_sin + 1, x->sequence, x->first_position, x->heads, head_size));
  ck_assert(cuda_matmul_rope(g->ops, &matmul, x->cos_sin, x->sequence, x->first_position, x->heads, head_size));
  forget(g, &c.c), forget(g, &c.other);
  flap_ops_matmul_rope(g->ops, &matmul, x->cos_sin, x->sequence, x->first_position, x->heads, head_size);
  rope_apart(g, &c);
  operands_equal("heads", &c.c, &c.other);
  free_rope(&c);
}

START_TEST(operation_with_rope_takes_whole_heads) {
  with_rig(_i, rope_operation);
}
END_TEST

START_TEST(operations_take_products_that_fill_a_gpu) {
  with_rig(_i, operations);
}
END_TEST

/* What the kernels do not take: the operations compute it all the same. */
static void refused(gpu_rig *g, rig_random *random) {
  const shape shapes[] = {{4090, 64, 4224, 4}, {4096, 60, 4224, 0}, {4096, 64, 4220, 0}};
  for (uint32_t i = 0; i < sizeof shapes / sizeof *shapes; ++i)
    forward_operation(g, random, &shapes[i], false);
  backward_operation(g, random, &(shape){2048, 60, 8448, 0}, false);
  backward_operation(g, random, &(shape){2048, 64, 8444, 0}, false);
}

START_TEST(operations_compute_odd_products_in_two_steps) {
  with_rig(_i, refused);
}
END_TEST

int main(void) {
  if (!gpu_rig_there())
    return 77;
  flap_cuda_properties card;
  if (flap_device_cuda_find(&card) != FLAP_OK || card.capability != 90) {
    printf("skipped: these kernels are for compute capability 9.0\n");
    return 77;
  }
  Suite *suite = suite_create("kernels");
  TCase *tests = tcase_create("cuda_matmul_tiles");
  tcase_add_loop_test(tests, forward_has_the_bits_of_the_product_and_swiglu, 0, 2);
  tcase_add_loop_test(tests, forward_has_the_same_bits_on_any_number_of_blocks, 0, 2);
  tcase_add_loop_test(tests, backward_has_the_bits_of_the_product_and_swiglu, 0, 2);
  tcase_add_loop_test(tests, backward_has_the_same_bits_on_any_number_of_blocks, 0, 2);
  tcase_add_loop_test(tests, rope_has_the_bits_of_the_product_and_rope, 0, 2);
  tcase_add_loop_test(tests, rope_has_the_same_bits_on_any_number_of_blocks, 0, 2);
  tcase_add_loop_test(tests, operations_take_products_that_fill_a_gpu, 0, 2);
  tcase_add_loop_test(tests, operation_with_rope_takes_whole_heads, 0, 2);
  tcase_add_loop_test(tests, operations_compute_odd_products_in_two_steps, 0, 2);
  suite_add_tcase(suite, tests);
  return gpu_rig_main(suite);
}
