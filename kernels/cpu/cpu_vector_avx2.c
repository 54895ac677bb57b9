/* The loops for processors with AVX2, FMA and F16C; compiled with those enabled. */
#define FLAP_VECTOR_TABLE flap_cpu_vector_avx2
#define FLAP_VECTOR_NAME "avx2"
#include "kernels/cpu/cpu_vector_body.inc"
