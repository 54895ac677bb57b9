/* What the tests of the cuda kernels share: ops of the cpu as the oracle beside ops of the cuda device, and operands
 * that are in both memories.
 */
#ifndef FLAP_TESTS_GPU_RIG_H
#define FLAP_TESTS_GPU_RIG_H

#include "tests/kernels/ops_rig.h"

typedef struct gpu_rig {
  rig cpu;
  flap_device *device;
  flap_ops *ops;
  unsigned char *arena;
  uint64_t arena_bytes, workspace_bytes, used; /* operands follow the workspace */
  flap_dtype dtype;
} gpu_rig;

/* One operand: `cpu` for the oracle, `gpu` between guards. */
typedef struct operand {
  gpu_rig *rig;
  flap_dtype dtype;
  uint64_t count;
  void *cpu, *gpu;
} operand;

/* False where there is no GPU to test on; the caller then exits with 77. A build without cuda has none. */
bool gpu_rig_there(void);
/* Prints the seed and runs the suite in this process, since a context does not survive a fork. */
int gpu_rig_main(Suite *suite);

void gpu_rig_open(gpu_rig *g, const flap_ops_limits *limits);
/* Fails the test if the device failed, or if anything was written outside operands and workspace. */
void gpu_rig_close(gpu_rig *g);

/* Gives all operands' memory back, checking their guards; the operands' cpu sides are freed by operand_free. */
void gpu_rig_clear(gpu_rig *g);

/* Random normal values times scale. `shift` elements after an aligned address on the GPU. */
operand operand_normal(gpu_rig *g, rig_random *random, flap_dtype dtype, uint64_t count, double scale, uint32_t shift);
/* 0xa5 everywhere. */
operand operand_empty(gpu_rig *g, flap_dtype dtype, uint64_t count, uint32_t shift);
/* Takes bytes as they are. */
operand operand_of(gpu_rig *g, flap_dtype dtype, const void *values, uint64_t count);
/* The same values in another place of the GPU; the cpu side is copied too. */
operand operand_copy(const operand *from, uint32_t shift);
void operand_free(operand *o);

/* The GPU's bytes, in memory to free. */
void *operand_bytes(const operand *o);
uint64_t operand_size(const operand *o); /* in bytes, of the GPU's side */
/* Compares every element with the cpu's: |difference| <= relative * |want| + absolute. */
void operand_near(const char *what, const operand *o, double relative, double absolute);
/* The GPU's bits are the cpu's. */
void operand_same(const char *what, const operand *o);
/* Two operands of the GPU have the same bits. */
void operands_equal(const char *what, const operand *a, const operand *b);
/* Rounding of one result of the type. */
double gpu_ulp(flap_dtype dtype);

#endif
