/* A disk whose power fails: a record of all changes of files below a folder, and what may be left of them at any
 * moment.
 *
 * It goes between FLAP's libraries and the system by base/system.h, lets every call through, and keeps a record: bytes
 * written, sizes, names made, moved and removed, and fsyncs of files and of folders. Files that are made without a name
 * (O_TMPFILE) are in it if they get one. What io_uring writes is not seen here: who is recorded writes by threads. What
 * is left at a cut after the first n entries of the record:
 *
 * 1. What an fsync of a file follows is there: its bytes and its size. What an fsync of a folder follows is there too:
 * the names in it. An fsync of a file makes no name last, and an fsync of a folder no bytes.
 * A write past the page cache is no different: drives have caches too, and its size and place are the file system's.
 * 2. Of everything else any part may be there, in any order: of a write any of its sectors of 512 B or 4 KiB, the
 * others being zeros or rubbish; of sizes the old one, the new one, or up to the last sector that is there; of changes
 * of names any of them without the others, but each whole: a rename has happened or has not (as journals of file
 * systems give).
 *
 * That is less than any file system of today promises, which is the point.
 */
#ifndef FLAP_TESTS_RELIABILITY_CUT_DISK_H
#define FLAP_TESTS_RELIABILITY_CUT_DISK_H

#include <stdbool.h>
#include <stdint.h>

/* Mistakes that a program could make, made for it: the tests must see each. */
typedef enum cut_mistake {
  CUT_NO_MISTAKE,
  CUT_NO_FILE_SYNC,       /* fsync of a file does nothing */
  CUT_NO_FOLDER_SYNC,     /* fsync of a folder does nothing */
  CUT_RENAME_BEFORE_SYNC, /* whatever is to be synced before a rename is synced after it */
  CUT_NO_EXTENT_SYNC,     /* fsync of a file that was made without a name does nothing, before it gets one and after */
  CUT_ONE_FILE,           /* files without a name that are open at once in one folder, for reading and writing, are one:
                             what has got a name is written over */
  CUT_MISTAKE_COUNT
} cut_mistake;

/* Records changes below `root`, an absolute path without links, from here on. */
void cut_disk_start(const char *root, cut_mistake mistake);
/* Puts a number into the record: everything before it was promised to last. */
void cut_disk_mark(uint64_t number);
/* Ends recording; the record stays. The number of its entries. */
uint32_t cut_disk_stop(void);
void cut_disk_free(void);

typedef struct cut {
  uint32_t entry;        /* the power fails before this one, so that many have happened */
  uint32_t sector_bytes; /* 512 or 4096 */
  uint32_t kept_share;   /* of what no fsync made last, so much is there all the same: 0 none to 256 all */
  bool rubbish;          /* in sectors that are not there; else zeros */
  uint64_t seed;
} cut;

/* Works out what is left, and returns a digest of it, so that a state that was looked at before is known. */
uint64_t cut_disk_replay(const cut *at);
/* Puts what the newest cut_disk_replay found into the folder `to`, which exists and is empty. */
void cut_disk_materialise(const char *to);
/* The newest mark before the cut; 0: none. */
uint64_t cut_disk_marked(uint32_t entry);

#endif
