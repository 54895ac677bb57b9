/* The loops for processors with AVX-512 F, BW, DQ and VL, and F16C; compiled with those enabled. */
#define FLAP_VECTOR_TABLE flap_cpu_vector_avx512
#define FLAP_VECTOR_NAME "avx512"
#include "kernels/cpu/cpu_vector_body.inc"
