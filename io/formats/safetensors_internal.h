/* Shared by the reader and the writer of safetensors. */
#ifndef FLAP_FORMATS_SAFETENSORS_INTERNAL_H
#define FLAP_FORMATS_SAFETENSORS_INTERNAL_H

#include "io/formats/safetensors.h"

#define FLAP_SAFETENSORS_METADATA "__metadata__"
#define FLAP_SAFETENSORS_LENGTH_BYTES 8u
#define FLAP_SAFETENSORS_SHOWN_BYTES 100u

/* A name for a message: in one line, and cut if it is long. Returns `buffer`. */
const char *flap_safetensors_shown(const char *name, char buffer[FLAP_SAFETENSORS_SHOWN_BYTES]);

/* Elements and bytes of a shape; false when they do not fit 63 bits. */
bool flap_safetensors_size(flap_safetensors_dtype dtype, uint32_t rank, const uint64_t *shape, uint64_t *elements_out,
                           uint64_t *bytes_out);

#endif
