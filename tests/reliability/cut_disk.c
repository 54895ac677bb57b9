#include "tests/reliability/cut_disk.h"

#include "base/philox.h"
#include "base/system.h"
#include "io/block/checksum.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define NODES_MAX 512u
#define ENTRIES_MAX 16384u
#define NAMES_MAX 64u /* in a folder */
#define NAME_BYTES 64u
#define DESCRIPTORS_MAX 1024
#define FILE_BYTES_MAX ((uint64_t)1 << 20)
#define NONE UINT32_MAX
#define RUBBISH 0xa5

typedef enum entry_kind {
  ENTRY_WRITE,
  ENTRY_SIZE,
  ENTRY_SYNC,
  ENTRY_LINK,
  ENTRY_UNLINK,
  ENTRY_RENAME,
  ENTRY_EXCHANGE,
  ENTRY_MARK
} entry_kind;

typedef struct entry {
  entry_kind kind;
  uint32_t node; /* the file or folder that is written, synced, linked or moved */
  uint32_t folder, folder_to;
  uint32_t other; /* ENTRY_EXCHANGE: what stood at the other name */
  char name[NAME_BYTES], name_to[NAME_BYTES];
  uint64_t offset, bytes; /* ENTRY_SIZE: bytes is the size; ENTRY_MARK: the number */
  unsigned char *data;    /* owned */
} entry;

typedef struct name_of {
  char name[NAME_BYTES];
  uint32_t node;
} name_of;

typedef struct node {
  bool folder;
  name_of *names; /* of a folder: NAMES_MAX */
  uint32_t name_count;
  unsigned char *bytes; /* of a file that ever had a name, once recording has ended: size_max */
  uint64_t size, size_max;
  bool named;                    /* ever */
  bool made_unnamed;             /* it came into being without one */
  uint64_t whole_size, kept_end; /* while replaying: with every write; the end of the last sector that is there */
  bool uncertain;
} node;

/* The present state while recording, and the state after a cut while replaying; node 0 is the root. */
static node nodes[NODES_MAX];
static uint32_t node_count;
static entry *entries;
static uint32_t entry_count;
static char root_path[512];
static cut_mistake made;
static uint32_t held_back[NODES_MAX]; /* CUT_RENAME_BEFORE_SYNC: nodes whose sync waits for the next rename */
static uint32_t held_count;
static uint32_t node_of_fd[DESCRIPTORS_MAX];
static uint32_t made_in[DESCRIPTORS_MAX]; /* CUT_ONE_FILE: the folder of a file without a name, or NONE */
static int written_to[DESCRIPTORS_MAX];   /* CUT_ONE_FILE: what is written instead, or -1 */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static const flap_system *real;

static void must(bool fine, const char *what) {
  if (fine)
    return;
  fprintf(stderr, "cut_disk: %s\n", what);
  _exit(98);
}

/* ---- names --------------------------------------------------------------------------------------------------- */

static uint32_t find_name(uint32_t folder, const char *name) {
  const node *f = &nodes[folder];
  for (uint32_t i = 0; i < f->name_count; i++)
    if (strcmp(f->names[i].name, name) == 0)
      return i;
  return NONE;
}

static uint32_t node_at(uint32_t folder, const char *name) {
  const uint32_t at = find_name(folder, name);
  return at == NONE ? NONE : nodes[folder].names[at].node;
}

static void set_name(uint32_t folder, const char *name, uint32_t value) {
  node *f = &nodes[folder];
  uint32_t at = find_name(folder, name);
  if (at == NONE) {
    must(f->name_count < NAMES_MAX, "too many names in a folder");
    at = f->name_count++;
    (void)snprintf(f->names[at].name, NAME_BYTES, "%s", name);
  }
  f->names[at].node = value;
  nodes[value].named = true;
}

/* Only if it is that node's name: another one may have taken it since. */
static void remove_name(uint32_t folder, const char *name, uint32_t value) {
  node *f = &nodes[folder];
  const uint32_t at = find_name(folder, name);
  if (at != NONE && f->names[at].node == value)
    f->names[at] = f->names[--f->name_count];
}

static uint32_t new_node(bool folder) {
  must(node_count < NODES_MAX, "too many files");
  node *n = &nodes[node_count];
  *n = (node){.folder = folder};
  if (folder)
    n->names = calloc(NAMES_MAX, sizeof *n->names);
  must(!folder || n->names != NULL, "no memory");
  return node_count++;
}

/* The folder and the last name of a path; false for what is not below the root, or whose folder is not in the record.
 */
static bool resolve(int folder_fd, const char *path, uint32_t *folder_out, char name_out[NAME_BYTES]) {
  uint32_t folder = 0;
  if (path[0] == '/') {
    const size_t length = strlen(root_path);
    if (strncmp(path, root_path, length) != 0 || path[length] != '/')
      return false;
    path += length + 1;
  } else {
    if (folder_fd < 0 || folder_fd >= DESCRIPTORS_MAX || node_of_fd[folder_fd] == NONE)
      return false;
    folder = node_of_fd[folder_fd];
  }
  for (const char *slash; (slash = strchr(path, '/')) != NULL; path = slash + 1) {
    (void)snprintf(name_out, NAME_BYTES, "%.*s", (int)(slash - path), path);
    folder = node_at(folder, name_out);
    if (folder == NONE || !nodes[folder].folder)
      return false;
  }
  must(strlen(path) < NAME_BYTES, "a long name");
  (void)snprintf(name_out, NAME_BYTES, "%s", path);
  *folder_out = folder;
  return true;
}

/* ---- the record ---------------------------------------------------------------------------------------------- */

static entry *add(entry_kind kind, uint32_t what) {
  must(entry_count < ENTRIES_MAX, "the record is too long");
  entries[entry_count] = (entry){.kind = kind, .node = what, .folder = NONE, .folder_to = NONE, .other = NONE};
  return &entries[entry_count++];
}

static void add_sync(uint32_t what) {
  if ((made == CUT_NO_FILE_SYNC && !nodes[what].folder) || (made == CUT_NO_FOLDER_SYNC && nodes[what].folder) ||
      (made == CUT_NO_EXTENT_SYNC && nodes[what].made_unnamed))
    return;
  if (made == CUT_RENAME_BEFORE_SYNC && held_count < NODES_MAX)
    held_back[held_count++] = what;
  else
    (void)add(ENTRY_SYNC, what);
}

static void release_held_syncs(void) {
  for (uint32_t i = 0; i < held_count; i++)
    (void)add(ENTRY_SYNC, held_back[i]);
  held_count = 0;
}

static void add_name_entry(entry_kind kind, uint32_t what, uint32_t folder, const char *name) {
  entry *e = add(kind, what);
  e->folder = folder;
  (void)snprintf(e->name, NAME_BYTES, "%s", name);
}

static void apply_rename(const entry *e) {
  remove_name(e->folder, e->name, e->node);
  set_name(e->folder_to, e->name_to, e->node);
  if (e->kind == ENTRY_EXCHANGE)
    set_name(e->folder, e->name, e->other);
}

static void record_rename(uint32_t folder, const char *name, uint32_t folder_to, const char *name_to, bool exchange) {
  const uint32_t what = node_at(folder, name);
  must(what != NONE, "a rename of what is not in the record");
  entry *e = add(exchange ? ENTRY_EXCHANGE : ENTRY_RENAME, what);
  e->folder = folder;
  e->folder_to = folder_to;
  e->other = exchange ? node_at(folder_to, name_to) : NONE;
  (void)snprintf(e->name, NAME_BYTES, "%s", name);
  (void)snprintf(e->name_to, NAME_BYTES, "%s", name_to);
  apply_rename(e);
  release_held_syncs();
}

/* `at` is where the write ended. */
static void record_write(int fd, const void *data, uint64_t bytes, off_t at) {
  const uint32_t what = node_of_fd[fd];
  node *n = &nodes[what];
  must(at >= (off_t)bytes, "a write that begins before the file");
  entry *e = add(ENTRY_WRITE, what);
  e->offset = (uint64_t)at - bytes;
  e->bytes = bytes;
  e->data = malloc(bytes > 0 ? bytes : 1);
  must(e->data != NULL, "no memory");
  memcpy(e->data, data, bytes);
  n->size = n->size > (uint64_t)at ? n->size : (uint64_t)at;
  n->size_max = n->size_max > n->size ? n->size_max : n->size;
}

static void record_size(uint32_t what, uint64_t size) {
  node *n = &nodes[what];
  add(ENTRY_SIZE, what)->bytes = n->size = size;
  n->size_max = n->size_max > size ? n->size_max : size;
}

/* ---- the calls ----------------------------------------------------------------------------------------------- */

/* A file without a name: it is not in any folder, and need not be below the root before it gets one. */
static void record_unnamed(int folder_fd, const char *path, int flags, int fd) {
  char name[NAME_BYTES];
  uint32_t above, folder = strcmp(path, root_path) == 0 ? 0 : NONE;
  if (folder == NONE && resolve(folder_fd, path, &above, name))
    folder = node_at(above, name);
  made_in[fd] = (flags & O_ACCMODE) == O_RDWR ? folder : NONE;
  node_of_fd[fd] = new_node(false);
  nodes[node_of_fd[fd]].made_unnamed = true;
  for (int other = 0; made == CUT_ONE_FILE && made_in[fd] != NONE && other < DESCRIPTORS_MAX; other++)
    if (other != fd && made_in[other] == made_in[fd]) {
      node_of_fd[fd] = node_of_fd[other];
      written_to[fd] = dup(written_to[other] >= 0 ? written_to[other] : other);
      must(written_to[fd] >= 0, "no descriptor");
      return;
    }
}

/* The descriptor that a call is made with in its place. */
static int in_place_of(int fd) {
  return fd >= 0 && fd < DESCRIPTORS_MAX && written_to[fd] >= 0 ? written_to[fd] : fd;
}

static void record_open(int folder_fd, const char *path, int flags, int fd) {
  uint32_t folder;
  char name[NAME_BYTES];
  node_of_fd[fd] = NONE;
  if ((flags & O_TMPFILE) == O_TMPFILE) {
    record_unnamed(folder_fd, path, flags, fd);
    return;
  }
  if (strcmp(path, root_path) == 0) {
    node_of_fd[fd] = 0;
    return;
  }
  if (!resolve(folder_fd, path, &folder, name))
    return;
  uint32_t what = node_at(folder, name);
  if (what == NONE && (flags & O_CREAT)) {
    what = new_node(false);
    add_name_entry(ENTRY_LINK, what, folder, name);
    set_name(folder, name, what);
  } else if (what != NONE && (flags & O_TRUNC) && nodes[what].size > 0) {
    record_size(what, 0);
  }
  node_of_fd[fd] = what;
}

static int cut_open(int folder, const char *path, int flags, mode_t mode) {
  pthread_mutex_lock(&lock);
  const int fd = real->open(folder, path, flags, mode);
  if (fd >= 0 && fd < DESCRIPTORS_MAX)
    record_open(folder, path, flags, fd);
  pthread_mutex_unlock(&lock);
  return fd;
}

static bool is_recorded(int fd) {
  return fd >= 0 && fd < DESCRIPTORS_MAX && node_of_fd[fd] != NONE;
}

static int cut_close(int fd) {
  pthread_mutex_lock(&lock);
  if (fd >= 0 && fd < DESCRIPTORS_MAX) {
    node_of_fd[fd] = made_in[fd] = NONE;
    if (written_to[fd] >= 0)
      (void)close(written_to[fd]);
    written_to[fd] = -1;
  }
  const int result = real->close(fd);
  pthread_mutex_unlock(&lock);
  return result;
}

static ssize_t cut_write(int fd, const void *data, size_t bytes) {
  pthread_mutex_lock(&lock);
  const ssize_t written = real->write(fd, data, bytes);
  if (written > 0 && is_recorded(fd))
    record_write(fd, data, (uint64_t)written, lseek(fd, 0, SEEK_CUR));
  pthread_mutex_unlock(&lock);
  return written;
}

static ssize_t cut_pwrite(int fd, const void *data, size_t bytes, off_t offset) {
  pthread_mutex_lock(&lock);
  const ssize_t written = real->pwrite(in_place_of(fd), data, bytes, offset);
  if (written > 0 && is_recorded(fd))
    record_write(fd, data, (uint64_t)written, offset + written);
  pthread_mutex_unlock(&lock);
  return written;
}

static ssize_t cut_pread(int fd, void *data, size_t bytes, off_t offset) {
  return real->pread(in_place_of(fd), data, bytes, offset);
}

static int cut_sync(int fd) {
  pthread_mutex_lock(&lock);
  if (is_recorded(fd))
    add_sync(node_of_fd[fd]);
  pthread_mutex_unlock(&lock);
  return 0;
}

static int cut_truncate(int fd, off_t bytes) {
  pthread_mutex_lock(&lock);
  const int result = real->truncate(fd, bytes);
  if (result == 0 && is_recorded(fd))
    record_size(node_of_fd[fd], (uint64_t)bytes);
  pthread_mutex_unlock(&lock);
  return result;
}

/* What it adds reads as zeros or rubbish: nothing of it was written. */
static int cut_allocate(int fd, off_t bytes) {
  pthread_mutex_lock(&lock);
  const int result = real->allocate(fd, bytes), os_error = errno;
  if (result == 0 && is_recorded(fd) && (uint64_t)bytes > nodes[node_of_fd[fd]].size)
    record_size(node_of_fd[fd], (uint64_t)bytes);
  pthread_mutex_unlock(&lock);
  errno = os_error;
  return result;
}

static int cut_rename(const char *from, const char *to, unsigned flags) {
  uint32_t folder, folder_to;
  char name[NAME_BYTES], name_to[NAME_BYTES];
  pthread_mutex_lock(&lock);
  const int result = real->rename(from, to, flags);
  if (result == 0 && resolve(-1, from, &folder, name) && resolve(-1, to, &folder_to, name_to))
    record_rename(folder, name, folder_to, name_to, (flags & RENAME_EXCHANGE) != 0);
  pthread_mutex_unlock(&lock);
  return result;
}

static int cut_link(int fd, const char *path) {
  uint32_t folder;
  char name[NAME_BYTES];
  pthread_mutex_lock(&lock);
  const int result = real->link(in_place_of(fd), path), os_error = errno;
  if (result == 0 && resolve(-1, path, &folder, name)) {
    must(is_recorded(fd), "a name for what is not in the record");
    add_name_entry(ENTRY_LINK, node_of_fd[fd], folder, name);
    set_name(folder, name, node_of_fd[fd]);
  }
  pthread_mutex_unlock(&lock);
  errno = os_error;
  return result;
}

static int cut_remove(int folder_fd, const char *path, int flags) {
  uint32_t folder;
  char name[NAME_BYTES];
  pthread_mutex_lock(&lock);
  const int result = real->remove(folder_fd, path, flags);
  if (result == 0 && resolve(folder_fd, path, &folder, name)) {
    const uint32_t what = node_at(folder, name);
    must(what != NONE, "a removal of what is not in the record");
    add_name_entry(ENTRY_UNLINK, what, folder, name);
    remove_name(folder, name, what);
  }
  pthread_mutex_unlock(&lock);
  return result;
}

static int cut_make_folder(const char *path, mode_t mode) {
  uint32_t folder;
  char name[NAME_BYTES];
  pthread_mutex_lock(&lock);
  const int result = real->make_folder(path, mode), os_error = errno;
  if (result == 0 && resolve(-1, path, &folder, name)) {
    const uint32_t what = new_node(true);
    add_name_entry(ENTRY_LINK, what, folder, name);
    set_name(folder, name, what);
  }
  pthread_mutex_unlock(&lock);
  errno = os_error;
  return result;
}

void cut_disk_start(const char *root, cut_mistake mistake) {
  static flap_system recording;
  real = flap_system_default();
  recording = *real;
  recording.open = cut_open;
  recording.close = cut_close;
  recording.write = cut_write;
  recording.pwrite = cut_pwrite;
  recording.pread = cut_pread;
  recording.sync = cut_sync;
  recording.truncate = cut_truncate;
  recording.allocate = cut_allocate;
  recording.rename = cut_rename;
  recording.link = cut_link;
  recording.remove = cut_remove;
  recording.make_folder = cut_make_folder;
  (void)snprintf(root_path, sizeof root_path, "%s", root);
  entries = calloc(ENTRIES_MAX, sizeof *entries);
  must(entries != NULL, "no memory");
  node_count = entry_count = held_count = 0;
  made = mistake;
  for (int i = 0; i < DESCRIPTORS_MAX; i++)
    node_of_fd[i] = made_in[i] = NONE, written_to[i] = -1;
  (void)new_node(true);
  (void)flap_system_replace(&recording);
}

void cut_disk_mark(uint64_t number) {
  pthread_mutex_lock(&lock);
  add(ENTRY_MARK, NONE)->bytes = number;
  pthread_mutex_unlock(&lock);
}

/* Of a file that never had a name nothing can be left. */
static void drop_unnamed(void) {
  uint32_t kept = 0;
  for (uint32_t i = 0; i < entry_count; i++) {
    const entry *e = &entries[i];
    if (e->node == NONE || nodes[e->node].folder || nodes[e->node].named)
      entries[kept++] = *e;
    else
      free(e->data);
  }
  entry_count = kept;
}

uint32_t cut_disk_stop(void) {
  (void)flap_system_replace(NULL);
  drop_unnamed();
  for (uint32_t i = 0; i < node_count; i++)
    if (!nodes[i].folder && nodes[i].named) {
      must(nodes[i].size_max <= FILE_BYTES_MAX, "a large file");
      nodes[i].bytes = malloc(nodes[i].size_max + 1);
      must(nodes[i].bytes != NULL, "no memory");
    }
  return entry_count;
}

void cut_disk_free(void) {
  for (uint32_t i = 0; i < node_count; i++) {
    free(nodes[i].names);
    free(nodes[i].bytes);
  }
  for (uint32_t i = 0; i < entry_count; i++)
    free(entries[i].data);
  free(entries);
  entries = NULL;
  node_count = entry_count = 0;
}

/* ---- after the cut ------------------------------------------------------------------------------------------- */

static uint32_t last_sync[NODES_MAX]; /* the entry after it; 0: never */
static flap_philox dice;
static uint64_t throws;

static bool happens(const cut *at) {
  return flap_philox_below(&dice, throws++, 256) < at->kept_share;
}

static void find_syncs(uint32_t end) {
  memset(last_sync, 0, sizeof last_sync);
  for (uint32_t i = 0; i < end; i++)
    if (entries[i].kind == ENTRY_SYNC)
      last_sync[entries[i].node] = i + 1;
}

static void forget(const cut *at) {
  for (uint32_t i = 0; i < node_count; i++) {
    node *n = &nodes[i];
    n->name_count = 0;
    n->size = n->whole_size = n->kept_end = 0;
    n->uncertain = false;
    if (n->bytes != NULL)
      memset(n->bytes, at->rubbish ? RUBBISH : 0, n->size_max);
  }
}

static void replay_write(const cut *at, const entry *e, bool lasts) {
  node *n = &nodes[e->node];
  const uint64_t end = e->offset + e->bytes;
  n->whole_size = end > n->whole_size ? end : n->whole_size;
  if (lasts) {
    memcpy(n->bytes + e->offset, e->data, e->bytes);
    n->size = end > n->size ? end : n->size;
    return;
  }
  n->uncertain = true;
  for (uint64_t from = e->offset; from < end;) {
    uint64_t to = (from / at->sector_bytes + 1) * at->sector_bytes;
    to = to < end ? to : end;
    if (happens(at)) {
      memcpy(n->bytes + from, e->data + (from - e->offset), to - from);
      n->kept_end = to > n->kept_end ? to : n->kept_end;
    }
    from = to;
  }
}

static void replay_size(const entry *e) {
  node *n = &nodes[e->node];
  n->size = n->whole_size = e->bytes;
  n->kept_end = n->kept_end < e->bytes ? n->kept_end : e->bytes;
}

static void replay_name(const entry *e) {
  if (e->kind == ENTRY_LINK)
    set_name(e->folder, e->name, e->node);
  else if (e->kind == ENTRY_UNLINK)
    remove_name(e->folder, e->name, e->node);
  else
    apply_rename(e);
}

static bool name_lasts(const entry *e, uint32_t index) {
  return index < last_sync[e->folder] || (e->folder_to != NONE && index < last_sync[e->folder_to]);
}

static void choose_sizes(void) {
  for (uint32_t i = 0; i < node_count; i++) {
    node *n = &nodes[i];
    if (!n->uncertain)
      continue;
    const uint64_t way = flap_philox_below(&dice, throws++, 3);
    const uint64_t size = way == 0 ? n->size : way == 1 ? n->kept_end : n->whole_size;
    n->size = size > n->size ? size : n->size;
  }
}

static uint64_t digest_of(uint32_t index, uint64_t digest) {
  const node *n = &nodes[index];
  if (!n->folder)
    return flap_block_checksum(n->bytes, n->size, (uint32_t)n->size, 0, digest);
  uint64_t sum = digest * 31 + n->name_count; /* names in any order */
  for (uint32_t i = 0; i < n->name_count; i++)
    sum += digest_of(n->names[i].node, flap_block_checksum(n->names[i].name, strlen(n->names[i].name), 0, 0, digest));
  return sum;
}

uint64_t cut_disk_replay(const cut *at) {
  dice = flap_philox_stream(at->seed, "power cut");
  throws = 0;
  find_syncs(at->entry);
  forget(at);
  for (uint32_t i = 0; i < at->entry; i++) {
    const entry *e = &entries[i];
    if (e->kind == ENTRY_WRITE)
      replay_write(at, e, i < last_sync[e->node]);
    else if (e->kind == ENTRY_SIZE && (i < last_sync[e->node] || happens(at)))
      replay_size(e);
    else if (e->kind >= ENTRY_LINK && e->kind <= ENTRY_EXCHANGE && (name_lasts(e, i) || happens(at)))
      replay_name(e);
  }
  choose_sizes();
  return digest_of(0, 1);
}

static void materialise(uint32_t index, const char *path) {
  const node *n = &nodes[index];
  for (uint32_t i = 0; i < n->name_count; i++) {
    char below[1024];
    const node *child = &nodes[n->names[i].node];
    (void)snprintf(below, sizeof below, "%s/%s", path, n->names[i].name);
    if (child->folder) {
      must(mkdir(below, 0777) == 0, below);
      materialise(n->names[i].node, below);
      continue;
    }
    const int fd = open(below, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
    must(fd >= 0 && write(fd, child->bytes, child->size) == (ssize_t)child->size && close(fd) == 0, below);
  }
}

void cut_disk_materialise(const char *to) {
  materialise(0, to);
}

uint64_t cut_disk_marked(uint32_t end) {
  uint64_t number = 0;
  for (uint32_t i = 0; i < end; i++)
    if (entries[i].kind == ENTRY_MARK)
      number = entries[i].bytes;
  return number;
}
