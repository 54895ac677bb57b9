#include "tests/formats/formats_scratch.h"

#include "base/status.h"

#include <check.h>
#include <dirent.h>
#include <ftw.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

static char folder[512];
static bool limited;

void scratch_setup(void) {
  const char *above = getenv("TMPDIR");
  (void)snprintf(folder, sizeof folder, "%s/flap-formats-XXXXXX", above && *above ? above : "/tmp");
  ck_assert_ptr_nonnull(mkdtemp(folder));
  flap_error_clear();
}

static int remove_entry(const char *path, const struct stat *about, int type, struct FTW *where) {
  (void)about, (void)type, (void)where;
  return remove(path);
}

void scratch_teardown(void) {
  scratch_unlimit();
  ck_assert_int_eq(nftw(folder, remove_entry, 16, FTW_DEPTH | FTW_PHYS), 0);
}

const char *scratch_path(const char *name) {
  static char paths[8][1024];
  static unsigned next;
  char *path = paths[next++ % 8];
  (void)snprintf(path, sizeof paths[0], *name ? "%s/%s" : "%s%s", folder, name);
  return path;
}

void scratch_write(const char *name, const void *data, size_t bytes) {
  FILE *file = fopen(scratch_path(name), "wb");
  ck_assert_ptr_nonnull(file);
  ck_assert_uint_eq(bytes ? fwrite(data, 1, bytes, file) : 0, bytes);
  ck_assert_int_eq(fclose(file), 0);
}

void scratch_text(const char *name, const char *text) {
  scratch_write(name, text, strlen(text));
}

char *scratch_read(const char *name, size_t *bytes_out) {
  FILE *file = fopen(scratch_path(name), "rb");
  ck_assert_msg(file != NULL, "%s is not there", name);
  ck_assert_int_eq(fseek(file, 0, SEEK_END), 0);
  size_t bytes = (size_t)ftell(file);
  rewind(file);
  char *data = malloc(bytes + 1);
  ck_assert_ptr_nonnull(data);
  ck_assert_uint_eq(fread(data, 1, bytes, file), bytes);
  data[bytes] = '\0';
  (void)fclose(file);
  if (bytes_out)
    *bytes_out = bytes;
  return data;
}

bool scratch_exists(const char *name) {
  struct stat about;
  return lstat(scratch_path(name), &about) == 0;
}

unsigned scratch_count(void) {
  unsigned count = 0;
  DIR *list = opendir(folder);
  ck_assert_ptr_nonnull(list);
  while (readdir(list))
    count++;
  (void)closedir(list);
  return count - 2; /* . and .. */
}

static void set_limit(rlim_t bytes) {
  struct rlimit limit;
  bool ok = getrlimit(RLIMIT_FSIZE, &limit) == 0;
  limit.rlim_cur = bytes < limit.rlim_max ? bytes : limit.rlim_max;
  if (!ok || setrlimit(RLIMIT_FSIZE, &limit) != 0)
    abort();
}

void scratch_limit(uint64_t bytes) {
  (void)signal(SIGXFSZ, SIG_IGN);
  set_limit((rlim_t)bytes);
  limited = true;
}

void scratch_unlimit(void) {
  if (limited)
    set_limit(RLIM_INFINITY);
  limited = false;
}

bool scratch_error_has(const char *text) {
  return strstr(flap_error_message(), text) != NULL;
}

void scratch_safetensors(const char *name, const char *header, const void *data, size_t bytes) {
  size_t header_bytes = strlen(header);
  char *file = malloc(8 + header_bytes + bytes);
  ck_assert_ptr_nonnull(file);
  for (unsigned i = 0; i < 8; i++)
    file[i] = (char)((uint64_t)header_bytes >> (8 * i));
  memcpy(file + 8, header, header_bytes);
  if (bytes)
    memcpy(file + 8 + header_bytes, data, bytes);
  scratch_write(name, file, 8 + header_bytes + bytes);
  free(file);
}
