/* Shared by durable.c, durable_folder.c, large_file.c and room.c, and by their tests. */
#ifndef FLAP_FORMATS_DURABLE_INTERNAL_H
#define FLAP_FORMATS_DURABLE_INTERNAL_H

#include "io/formats/durable.h"

/* Linux moves at most 2 GiB less a page in one call; this stays well below, and is a multiple of any block. */
#define FLAP_DURABLE_TRANSFER_BYTES_MAX ((uint64_t)1 << 30)

/* `path` without slashes at its end, and `suffix`. */
FLAP_CHECKED flap_status flap_durable_sibling(char out[FLAP_DURABLE_PATH_MAX], const char *path, const char *suffix);

/* The record for a write, fsync or close of `path` that failed: what fills a disk is FLAP_NO_SPACE. */
flap_status flap_durable_write_error(int os_error, const char *path);

/* Behave as on a file system that cannot exchange two names. For the test of that way. */
void flap_durable_refuse_exchange(bool refuse);

#endif
