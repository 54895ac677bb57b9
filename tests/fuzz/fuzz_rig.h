/* What the harnesses share: files that hold an input, and what every refusal must be like.
 *
 * A harness is one function, LLVMFuzzerTestOneInput: it gives the bytes to a reader, and aborts where the reader breaks
 * its contract. libFuzzer calls it, or replay_corpus.c with each file of the corpus. One thread.
 */
#ifndef FLAP_TESTS_FUZZ_RIG_H
#define FLAP_TESTS_FUZZ_RIG_H

#include "base/status.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes);

/* "<a folder of this process>/<name>", in one of a few static buffers; "" is the folder. It is made below $TMPDIR at
 * the first call, and removed when the process exits. */
const char *fuzz_path(const char *name);
/* The file `name` of that folder has these bytes now. */
void fuzz_write(const char *name, const void *data, size_t bytes);
void fuzz_text(const char *name, const char *text);
void fuzz_folder(const char *name);
/* A safetensors file whose header is the input up to its first NUL byte and whose data is what follows; its length is
 * made to fit, so that inputs get past the first check. */
void fuzz_write_safetensors(const char *name, const uint8_t *data, size_t bytes);

/* Aborts with the text and the error record unless `holds`. */
void fuzz_must(bool holds, const char *what);
/* A refusal is one printable line that names the file: aborts otherwise. */
void fuzz_refused(flap_status status, const char *file_name);

#endif
