/* The numerics key: everything that decides which bits a run computes, as a text of named fields.
 *
 * "cpu avx2 openblas-...; micro-batch 2 x 64; weights bf16; ...": fields are divided by "; ", and within the first,
 * which is what the kernels say of themselves, by ", " too. A field's name is its first word; the first one's is
 * "kernels".
 */
#ifndef FLAP_ENGINE_STORE_NUMERICS_KEY_H
#define FLAP_ENGINE_STORE_NUMERICS_KEY_H

#include <stddef.h>

#ifdef __cplusplus
extern "C" {
#endif

#define FLAP_NUMERICS_MAX 512

/* Writes "weights: bf16 then, fp32 now; products: 0x12 then, none now" for the fields that differ: "" for equal keys. A
 * text that does not fit is cut. Returns how many differ. */
unsigned flap_numerics_key_differences(const char *saved, const char *now, char *text_out, size_t text_bytes);

#ifdef __cplusplus
}
#endif
#endif
