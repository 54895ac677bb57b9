/* What the kernel tests share: ops over an exact workspace with guards, random operands in exact-size allocations (so
 * that AddressSanitizer sees every read outside them), and comparisons that say what differed. */
#ifndef FLAP_TESTS_OPS_RIG_H
#define FLAP_TESTS_OPS_RIG_H

#include "base/philox.h"
#include "kernels/ops.h"

#include <check.h>
#include <stddef.h>

#define RIG_THREADS_MAX 3u

typedef struct rig {
  flap_pool *pool;
  flap_device *device;
  flap_ops *ops;
  unsigned char *memory; /* guard, workspace, guard */
  size_t workspace_bytes;
} rig;

/* The storage types, for loop tests over 0 to RIG_DTYPES: fp32, bf16, fp16. */
#define RIG_DTYPES 3
flap_dtype rig_dtype(int index);

/* Limits that admit the shapes of most tests. */
flap_ops_limits rig_limits(flap_dtype dtype);
void rig_open(rig *r, const flap_ops_limits *limits, uint32_t threads);
/* Fails the test if anything was written outside the workspace. */
void rig_close(rig *r);

/* Runs `body` with ops of 1, 2 and 3 threads. */
void rig_with_threads(const flap_ops_limits *limits, void (*body)(rig rigs[RIG_THREADS_MAX], flap_dtype dtype));
/* Prints the seed, runs the suite; the exit status. */
int rig_main(Suite *suite);

/* The seed of this run: FLAP_TEST_SEED, or the clock; printed once. */
uint64_t rig_seed(void);

typedef struct rig_random {
  flap_philox stream;
  uint64_t drawn;
} rig_random;
rig_random rig_random_named(const char *name);
uint32_t rig_between(rig_random *random, uint32_t low, uint32_t high); /* both included */

/* `count` values of `dtype`, normal times `scale`; free() them. */
void *rig_normal(rig_random *random, flap_dtype dtype, uint64_t count, double scale);
float *rig_normal_f32(rig_random *random, uint64_t count, double scale);
void *rig_bytes(uint64_t bytes); /* filled with 0xa5 */
void *rig_copy(const void *from, uint64_t bytes);
double rig_at(flap_dtype dtype, const void *values, uint64_t index);
double *rig_doubles(flap_dtype dtype, const void *values, uint64_t count);
double rig_round(flap_dtype dtype, double value); /* to fp32, then to dtype */

/* |got - want| <= relative * |want| + absolute, or the test fails, naming `what` and the index. */
void rig_near(const char *what, uint64_t index, double got, double want, double relative, double absolute);
void rig_same(const char *what, const void *a, const void *b, uint64_t bytes);
/* The rounding of one result: 2^-8 for bf16, 2^-11 for fp16, 2^-23 for fp32 (half of the distance of neighbours at
 * worst). */
double rig_ulp(flap_dtype dtype);
/* The same of a result that is nearly 0: 2^-25 for fp16, whose subnormal numbers lie far apart; else 0. */
double rig_floor(flap_dtype dtype);

/* AdamW's scalars of step `step`, 1 on: usual hyperparameters, a clipped gradient. */
flap_adamw rig_adamw(uint32_t step);

/* Central difference of f(context) along *x. */
double rig_slope(double *x, double step, double (*f)(void *context), void *context);

#endif
