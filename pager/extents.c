/* Extents that checkpoints share: files that a checkpoint names, and what is written afterwards goes to another one.
 *
 * Extents of shared regions are at the same places in every file, so a page is found by the number of its file. At any
 * time its next writing has one file to go to, that of its region; a keep turns the region to the next one. So of what
 * was kept nothing is written over, and no list of free extents is needed: a step writes all states, and one step after
 * a checkpoint its files hold nothing that the run reads.
 *
 *   file:    closed ──flap_pager_next_file──► next ──flap_pager_keep, of all regions──► written to
 *               ▲                                                                          │ flap_pager_keep, of all
 *               └────────── flap_pager_next_file, once no page stands there ◄── left ◄─────┘
 *
 * A page that is on its way to the disk no longer needs what stands where it was.
 *
 * What was kept is what a drive said it has. Whether that is so is known once a page has been read again, which a step
 * does with all of them, before it writes them anew: so pages that were kept are counted until then. Where files are
 * not read past the system's cache, what a step reads tells nothing of the drive, and all of them stay counted.
 */
#include "pager/pager_internal.h"

#include "base/assert.h"

#include <time.h>

#define REOPENS 24 /* for more than a second */
#define REOPEN_NS 50000000
#define EXTENTS_AT_ONCE 64u /* that are told without the lock */

static flap_status tell(flap_pager *pager, const flap_pager_extent *extents, uint32_t count,
                        flap_pager_extent_fn extent, void *context) {
  flap_status status = FLAP_OK;
  pager_leave(pager);
  for (uint32_t i = 0; i < count && status == FLAP_OK; i++)
    status = extent(context, &extents[i]);
  pager_enter(pager);
  return status;
}

static void note_kept(flap_pager *pager, pager_page *page) {
  if (page->compared || page->kept_unread)
    return;
  page->kept_unread = true;
  pager->kept_unread++;
}

void pager_extents_compared(flap_pager *pager, const pager_buffer *buffer) {
  const pager_region *region = &pager->regions[buffer->region];
  pager_page *page = pager_pages_of(pager, region) + buffer->first_page;
  if (!region->shared || !pager->files_direct)
    return;
  for (uint32_t i = 0; i < buffer->page_count; i++) {
    pager->kept_unread -= page[i].kept_unread;
    page[i].kept_unread = false;
    page[i].compared = true;
  }
}

bool flap_pager_kept_is_read(flap_pager *pager) {
  pager_enter(pager);
  const bool read = pager->kept_unread == 0;
  pager_leave(pager);
  return read;
}

flap_status pager_extents_tell(flap_pager *pager, uint32_t index, flap_pager_extent_fn extent, void *context) {
  const pager_region *region = &pager->regions[index];
  pager_page *page = pager_pages_of(pager, region);
  flap_pager_extent extents[EXTENTS_AT_ONCE];
  uint32_t count = 0;
  for (uint32_t i = region->ram_pages; i < region->page_count; i++) {
    flap_assert(page[i].state == PAGE_IDLE && page[i].file > 0);
    note_kept(pager, &page[i]);
    extents[count++] = (flap_pager_extent){.offset = i * pager->page_bytes,
                                           .bytes = (uint32_t)pager_chunk_bytes(pager, region, i, 1),
                                           .stored_bytes = page[i].stored_bytes,
                                           .place = pager_disk_offset(&page[i]),
                                           .checksum = page[i].checksum,
                                           .epoch = page[i].epoch,
                                           .file = page[i].file};
    if (count < EXTENTS_AT_ONCE && i + 1 < region->page_count)
      continue;
    FLAP_TRY(tell(pager, extents, count, extent, context));
    count = 0;
  }
  return FLAP_OK;
}

void pager_extents_turn(flap_pager *pager, pager_region *region) {
  if (!region->shared || pager->next_file == 0 || region->file == pager->next_file)
    pager_mistake(pager, "region %u is kept, but is not shared, or there is no file to go on in",
                  (uint32_t)(region - pager->regions));
  region->file = (uint8_t)pager->next_file;
}

/* ---- files --------------------------------------------------------------------------------------------------- */

static flap_status open_file(flap_pager *pager, uint32_t file) {
  FLAP_TRY(flap_block_file_open(pager->block, file, pager->shared_folder, pager->sizes.shared_bytes));
  pager->files_open[file] = true;
  return FLAP_OK;
}

flap_status pager_extents_open(flap_pager *pager, const flap_pager_config *config) {
  if (pager->sizes.shared_bytes == 0)
    return FLAP_OK;
  pager->shared_folder = config->shared_folder;
  FLAP_TRY(open_file(pager, 1));
  pager->files_direct = flap_block_file_is_direct(pager->block, 1); /* as all that follow, in the same folder */
  return FLAP_OK;
}

/* And what was kept up to here is nobody's question any more. */
static void find_needed(flap_pager *pager, bool needed[FLAP_BLOCK_FILES_MAX + 1]) {
  pager_enter(pager);
  pager->kept_unread = 0;
  for (uint32_t i = 0; i < pager->region_count; i++) {
    const pager_region *region = &pager->regions[i];
    needed[region->file] = true;
    for (uint32_t j = region->ram_pages; region->shared && j < region->page_count; j++) {
      pager_page *page = pager_pages_of(pager, region) + j;
      if (page->state != PAGE_IDLE)
        continue;
      needed[page->file] = true;
      page->kept_unread = false;
    }
  }
  pager_leave(pager);
}

bool flap_pager_can_keep(const flap_pager *pager) {
  return pager->next_file > 0;
}

uint64_t flap_pager_shared_bytes(const flap_pager *pager) {
  return pager->sizes.shared_bytes;
}

uint64_t flap_pager_page_bytes(const flap_pager *pager) {
  return pager->page_bytes;
}

uint64_t flap_pager_copied_bytes(const flap_pager *pager, uint32_t index) {
  const pager_region *region = &pager->regions[index];
  return region->ring == FLAP_PAGER_RESIDENT
             ? region->bytes
             : region->bytes - pager_disk_bytes(pager->page_bytes, region->bytes, region->ram_pages);
}

flap_status flap_pager_link(flap_pager *pager, uint32_t file, const char *path) {
  flap_assert(file <= FLAP_BLOCK_FILES_MAX && pager->files_open[file]);
  return flap_block_file_link(pager->block, file, path);
}

/* Some kernels (Linux before 6.4) let go of a file that io_uring knew a second after it was closed. */
static flap_status open_in_place(flap_pager *pager, uint32_t file, bool closed_some) {
  flap_status status = open_file(pager, file);
  for (uint32_t i = 0; i < REOPENS && closed_some && status == FLAP_NO_SPACE; i++) {
    flap_error_clear();
    (void)nanosleep(&(struct timespec){.tv_nsec = REOPEN_NS}, NULL);
    status = open_file(pager, file);
  }
  return status;
}

flap_status flap_pager_next_file(flap_pager *pager) {
  bool closed_some = false;
  bool needed[FLAP_BLOCK_FILES_MAX + 1] = {false};
  if (pager->sizes.shared_bytes == 0)
    return FLAP_OK;
  find_needed(pager, needed);
  if (pager->next_file > 0 && !needed[pager->next_file])
    return FLAP_OK; /* nothing was kept since */
  pager->next_file = 0;
  uint32_t closed = 0;
  for (uint32_t file = FLAP_BLOCK_FILES_MAX; file > 0; file--) {
    if (pager->files_open[file] && !needed[file]) {
      flap_block_file_close(pager->block, file);
      pager->files_open[file] = false;
      closed_some = true;
    }
    if (!pager->files_open[file])
      closed = file;
  }
  if (closed == 0)
    return FLAP_OK;
  FLAP_TRY(open_in_place(pager, closed, closed_some));
  pager->next_file = closed;
  return FLAP_OK;
}
