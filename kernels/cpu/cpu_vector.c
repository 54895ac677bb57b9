/* Which loops this processor can run. */
#include "kernels/cpu/cpu_vector.h"

#if defined(__x86_64__)
#include <cpuid.h>

/* Conversions of fp16 (F16C), which not every compiler's __builtin_cpu_supports knows by name. */
static bool has_f16c(void) {
  unsigned eax, ebx, ecx, edx;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & bit_F16C) != 0;
}
#endif

uint32_t flap_cpu_vector_list(const flap_cpu_vector *tables_out[3]) {
  uint32_t count = 0;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    tables_out[count++] = &flap_cpu_vector_avx512;
  if (avx2)
    tables_out[count++] = &flap_cpu_vector_avx2;
#endif
  tables_out[count++] = &flap_cpu_vector_generic;
  return count;
}
