/* States of a checkpoint, page by page: those that live on disk stay where they are, and the checkpoint shares them.
 *
 * Folder-private, but for tests. In a run whose disk is on the file system of output_dir the states' extents are files
 * that can get a name (pager.h, flap_pager_keep). Then a checkpoint has, in place of optimizer-*.safetensors:
 *
 *   optimizer-pages.table    of which slices, and of each of their pages where it stands, and its checksum
 *   optimizer-pages-0.bin    pages that were in RAM or VRAM, copied one behind the other; not there if there are none
 *   optimizer-pages-<n>.bin  n from 1 to 4: extents, as the run wrote them; a name of the run's own file, no copy
 *
 * They are files like any others: they may be copied or moved with their folder. What a checkpoint holds does not
 * depend on any of this: it resumes with other slices, pages and homes. See CHECKPOINTS.md.
 *
 * The table, all numbers little-endian: a header with the sizes of these files, a row for each slice, in the order of
 * the model, a row for each page in the order of slices, and the XXH3 (64 bits) of all that precedes it. Of a page:
 * checksum (seeded as in io/block/checksum.h, with the region that its slice was), place in its file, stored bytes,
 * epoch, file. state_pages_table.h has the rows. As each page has its checksum here, checksums.json has the table's,
 * and of the files of pages their sizes.
 */
#ifndef FLAP_ENGINE_STORE_STATE_PAGES_H
#define FLAP_ENGINE_STORE_STATE_PAGES_H

#include "engine/step/layout.h"
#include "io/formats/checksums.h"
#include "io/formats/large_file.h"

#ifdef __cplusplus
extern "C" {
#endif

#define FLAP_STATE_PAGES_TABLE "optimizer-pages.table"
#define FLAP_STATE_PAGES_FILE "optimizer-pages-%u.bin"
#define FLAP_STATE_PAGES_FILES (1 + FLAP_BLOCK_FILES_MAX)

/* ---- saving ---------------------------------------------------------------------------------------------- */

/* Keeps (flap_pager_keep) the states of all slices, in their order, and writes what `folder` needs to have them; the
 * pager can keep. Then names the files of extents there; the next file (flap_pager_next_file) is the caller's to make.
 * `checksums` takes the sum of the table, and of files of pages their size; NULL: none. Memory: the table. After a
 * failure files may stay, as after flap_weights_save. */
FLAP_CHECKED flap_status flap_state_pages_save(flap_pager *pager, const flap_layout *layout, const char *folder,
                                               flap_file_piece piece, flap_checksums *checksums);
/* At most so many bytes have the files of a checkpoint, with extents as long as they are in regions. */
uint64_t flap_state_pages_bytes(const flap_layout *layout, uint64_t page_bytes);

/* ---- reading --------------------------------------------------------------------------------------------- */

typedef struct flap_state_pages flap_state_pages;

/* Opens and checks table and sizes of files. FLAP_NOT_FOUND: the folder has no table. FLAP_CORRUPT names the file.
 * Memory: the table, and a page for each section of states. One user. */
FLAP_CHECKED flap_status flap_state_pages_open(const char *folder, flap_state_pages **pages_out);
void flap_state_pages_close(flap_state_pages *pages);             /* NULL is fine */
flap_dtype flap_state_pages_dtype(const flap_state_pages *pages); /* of the weights */
flap_optim flap_state_pages_optim(const flap_state_pages *pages);
uint32_t flap_state_pages_parts(const flap_state_pages *pages); /* embedding, layers in order, head */
/* FLAP_INVALID, with the file and what differs, where it is not of a model of these parts, this type and optimizer. */
FLAP_CHECKED flap_status flap_state_pages_check(const flap_state_pages *pages, const flap_model_config *config,
                                                flap_dtype weight_dtype, flap_optim optim);
/* `count` values of a part's section from value `first`, as they are in a states region. Whatever is used of a page was
 * compared with its checksum, and read once more if it did not agree; then FLAP_CORRUPT names file, place and part.
 * Quick in the order of values: the last page of each section stays in memory, decoded. The values are there: see
 * check, and flap_layout_state_format. */
FLAP_CHECKED flap_status flap_state_pages_read(flap_state_pages *pages, uint32_t part, flap_state_section section,
                                               uint64_t first, uint64_t count, void *to);
const char *flap_state_pages_path(const flap_state_pages *pages); /* of the table */
/* Reads every page and compares it; with `shared` those in extents alone, past what the page cache has of them.
 * FLAP_NOT_FOUND: the folder has no table. */
FLAP_CHECKED flap_status flap_state_pages_verify(const char *folder, bool shared);

#ifdef __cplusplus
}
#endif
#endif
