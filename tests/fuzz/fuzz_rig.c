#include "tests/fuzz/fuzz_rig.h"

#include "base/log.h"

#include <fcntl.h>
#include <ftw.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static char folder[512];

static int remove_entry(const char *path, const struct stat *about, int type, struct FTW *where) {
  (void)about, (void)type, (void)where;
  return remove(path);
}

static void remove_folder(void) {
  (void)nftw(folder, remove_entry, 16, FTW_DEPTH | FTW_PHYS);
}

void fuzz_must(bool holds, const char *what) {
  if (holds)
    return;
  fprintf(stderr, "fuzz: not so: %s; the last error is: %s\n", what, flap_error_message());
  abort();
}

const char *fuzz_path(const char *name) {
  static char paths[8][1024];
  static unsigned next;
  if (!folder[0]) {
    const char *above = getenv("TMPDIR");
    (void)snprintf(folder, sizeof folder, "%s/flap-fuzz-XXXXXX", above && *above ? above : "/tmp");
    flap_log_set_level(FLAP_LOG_ERROR);
    fuzz_must(mkdtemp(folder) != NULL && atexit(remove_folder) == 0, "there is a folder for files");
  }
  char *path = paths[next++ % 8];
  (void)snprintf(path, sizeof paths[0], *name ? "%s/%s" : "%s%s", folder, name);
  return path;
}

void fuzz_write(const char *name, const void *data, size_t bytes) {
  int fd = open(fuzz_path(name), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
  fuzz_must(fd >= 0 && write(fd, data, bytes) == (ssize_t)bytes && close(fd) == 0, "a file can be written");
}

void fuzz_text(const char *name, const char *text) {
  fuzz_write(name, text, strlen(text));
}

void fuzz_folder(const char *name) {
  fuzz_must(mkdir(fuzz_path(name), 0700) == 0, "a folder can be made");
}

void fuzz_write_safetensors(const char *name, const uint8_t *data, size_t bytes) {
  const uint8_t *end = bytes > 0 ? memchr(data, 0, bytes) : NULL;
  const size_t rest = end ? bytes - (size_t)(end - data) - 1 : 0;
  const uint64_t header = end ? (uint64_t)(end - data) : bytes;
  uint8_t *file = malloc(sizeof header + bytes);
  fuzz_must(file != NULL, "there is memory for a file");
  memcpy(file, &header, sizeof header);
  if (header > 0)
    memcpy(file + sizeof header, data, header);
  if (rest > 0)
    memcpy(file + sizeof header + header, end + 1, rest);
  fuzz_write(name, file, sizeof header + header + rest);
  free(file);
}

void fuzz_refused(flap_status status, const char *file_name) {
  const char *message = flap_error_message();
  fuzz_must(status > FLAP_OK && status < FLAP_STATUS_COUNT, "the status is one of those that there are");
  fuzz_must(status != FLAP_NO_MEMORY, "an input of a few kilobytes asks for little memory");
  fuzz_must(strstr(message, file_name) != NULL, "the message names the file");
  for (const char *at = message; *at; at++)
    fuzz_must((unsigned char)*at >= 0x20 && *at != 0x7f, "the message is one line without control characters");
}
