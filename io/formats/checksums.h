/* Checksums of the files of a folder: XXH3 (64 bits) over each whole file, kept in `checksums.json` beside them.
 *
 * Of a file that has checksums of its pages elsewhere only the size is kept: in place of its sum stands "pages".
 *
 * The sums are taken of what is given to be written, while it is written, and compared with what is read, while it is
 * read: no byte travels a second time. Whoever writes a folder writes this file last, so a folder that has it was
 * complete once. It finds what disks, cables and copies change; it is no protection against people.
 *
 * Threading: a list and a sum have one user. Memory: a sum takes it when it is opened.
 */
#ifndef FLAP_FORMATS_CHECKSUMS_H
#define FLAP_FORMATS_CHECKSUMS_H

#include "base/status.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define FLAP_CHECKSUMS_FILE "checksums.json"
#define FLAP_CHECKSUMS_NAME_MAX 256u

/* ---- one sum ------------------------------------------------------------------------------------------- */

typedef struct flap_checksum flap_checksum; /* of bytes that come in order, in any pieces */

FLAP_CHECKED flap_status flap_checksum_open(flap_checksum **sum_out);
void flap_checksum_add(flap_checksum *sum, const void *data, uint64_t bytes);
uint64_t flap_checksum_bytes(const flap_checksum *sum); /* that were added */
uint64_t flap_checksum_value(const flap_checksum *sum); /* of all that was added so far */
void flap_checksum_close(flap_checksum *sum);           /* NULL is fine */

/* ---- a folder's ---------------------------------------------------------------------------------------- */

typedef struct flap_checksums_entry {
  char name[FLAP_CHECKSUMS_NAME_MAX]; /* of the file, without a folder */
  uint64_t bytes, value;
  bool pages; /* it is checked page by page by whoever reads it, and has no value here */
} flap_checksums_entry;

typedef struct flap_checksums {
  flap_checksums_entry *entries;
  size_t count, capacity;
} flap_checksums;

/* `path`: the file's; its name is kept. A name that is there already takes the new sum. */
FLAP_CHECKED flap_status flap_checksums_add(flap_checksums *list, const char *path, const flap_checksum *sum);
/* The same for a file that is checked page by page. */
FLAP_CHECKED flap_status flap_checksums_add_pages(flap_checksums *list, const char *path, uint64_t bytes);
/* Reads every regular file in the folder that the list does not have. */
FLAP_CHECKED flap_status flap_checksums_add_rest(flap_checksums *list, const char *folder);
FLAP_CHECKED flap_status flap_checksums_write(const flap_checksums *list, const char *folder);
/* FLAP_NOT_FOUND: the folder has none. FLAP_CORRUPT: the file is not what was written. */
FLAP_CHECKED flap_status flap_checksums_read(const char *folder, flap_checksums *list_out);
/* NULL when it is not listed. */
const flap_checksums_entry *flap_checksums_find(const flap_checksums *list, const char *name);
void flap_checksums_close(flap_checksums *list); /* {0} is fine */

/* FLAP_OK if what was read is what was written, else FLAP_CORRUPT, which names the file. The entry has a sum. */
FLAP_CHECKED flap_status flap_checksums_compare(const flap_checksums_entry *entry, const char *path,
                                                const flap_checksum *sum);
/* Every listed file is there, and as long as it was: quick, for nothing of them is read. */
FLAP_CHECKED flap_status flap_checksums_check_sizes(const flap_checksums *list, const char *folder);
/* Reads one of them whole, and compares; of one that is checked page by page, its size alone. */
FLAP_CHECKED flap_status flap_checksums_check_file(const flap_checksums_entry *entry, const char *folder);

#ifdef __cplusplus
}
#endif
#endif
