/* Shared by durable.c and durable_folder.c, and by their test. */
#ifndef FLAP_FORMATS_DURABLE_INTERNAL_H
#define FLAP_FORMATS_DURABLE_INTERNAL_H

#include "io/formats/durable.h"

/* `path` without slashes at its end, and `suffix`. */
FLAP_CHECKED flap_status flap_durable_sibling(char out[FLAP_DURABLE_PATH_MAX], const char *path, const char *suffix);

/* The record for a write, fsync or close of `path` that failed: what fills a disk is FLAP_NO_SPACE. */
flap_status flap_durable_write_error(int os_error, const char *path);

/* Behave as on a file system that cannot exchange two names. For the test of that way. */
void flap_durable_refuse_exchange(bool refuse);

#endif
