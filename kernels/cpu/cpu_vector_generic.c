/* The loops for any processor. */
#define FLAP_VECTOR_TABLE flap_cpu_vector_generic
#define FLAP_VECTOR_NAME "generic"
#include "kernels/cpu/cpu_vector_body.inc"
