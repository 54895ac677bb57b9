/* A folder of its own for each test of formats, and files with exact bytes in it. */
#ifndef FLAP_TESTS_FORMATS_SCRATCH_H
#define FLAP_TESTS_FORMATS_SCRATCH_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* Checked fixture: an empty folder before, its removal after. */
void scratch_setup(void);
void scratch_teardown(void);

/* "<folder>/<name>", in one of a few static buffers; "" is the folder. */
const char *scratch_path(const char *name);
void scratch_write(const char *name, const void *data, size_t bytes);
void scratch_text(const char *name, const char *text);
/* The file's bytes and a NUL; the caller frees. */
char *scratch_read(const char *name, size_t *bytes_out);
bool scratch_exists(const char *name);
/* Entries of the scratch folder itself. */
unsigned scratch_count(void);

/* Files of this process stop at `bytes`, as on a full disk, until scratch_unlimit. Check itself writes a file at each
 * ck_assert, so there must be none in between. */
void scratch_limit(uint64_t bytes);
void scratch_unlimit(void);

/* The thread's error record holds `text`. */
bool scratch_error_has(const char *text);

/* A safetensors file from its parts. */
void scratch_safetensors(const char *name, const char *header, const void *data, size_t bytes);

#endif
