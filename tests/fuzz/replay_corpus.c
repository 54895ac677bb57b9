/* Gives each file of the folders (or files) that are named to a harness, in byte order, in a build without libFuzzer.
 * What is wrong aborts, after the name of the file. */
#include "tests/fuzz/fuzz_rig.h"

#include <dirent.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

static void replay_file(const char *path) {
  FILE *file = fopen(path, "rb");
  struct stat about;
  if (!file || fstat(fileno(file), &about) != 0) {
    fprintf(stderr, "%s: cannot be read\n", path);
    exit(1);
  }
  /* Exactly as large as the input, so that a sanitizer sees a read past its end. */
  size_t bytes = (size_t)about.st_size;
  uint8_t *data = malloc(bytes > 0 ? bytes : 1);
  if (!data || fread(data, 1, bytes, file) != bytes) {
    fprintf(stderr, "%s: cannot be read\n", path);
    exit(1);
  }
  (void)fclose(file);
  fprintf(stderr, "%s\n", path);
  (void)LLVMFuzzerTestOneInput(data, bytes);
  free(data);
}

static unsigned replay_folder(const char *path) {
  struct dirent **entries;
  int count = scandir(path, &entries, NULL, alphasort);
  unsigned files = 0;
  for (int i = 0; i < count; i++) {
    char name[1024];
    (void)snprintf(name, sizeof name, "%s/%s", path, entries[i]->d_name);
    if (entries[i]->d_name[0] != '.') {
      replay_file(name);
      files++;
    }
    free(entries[i]);
  }
  if (count >= 0)
    free(entries);
  return files;
}

int main(int count, char **paths) {
  unsigned files = 0;
  for (int i = 1; i < count; i++) {
    struct stat about;
    if (stat(paths[i], &about) == 0 && S_ISDIR(about.st_mode)) {
      files += replay_folder(paths[i]);
    } else {
      replay_file(paths[i]);
      files++;
    }
  }
  printf("%u inputs\n", files);
  return files > 0 ? 0 : 1;
}
