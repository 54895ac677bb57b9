#include "engine/machine/host_memory.h"

#include <ctype.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <unistd.h>

#define PATH_BYTES 4096
#define LINE_BYTES 4096
#define SYS "/sys"
#define ADDRESSES_OF_THREAD ((uint64_t)144 << 20)

const flap_host_roots FLAP_HOST_ROOTS = {.proc = "/proc", .sys = SYS};

static uint64_t smaller(uint64_t a, uint64_t b) {
  return a < b ? a : b;
}

/* ---- files of /proc ---------------------------------------------------------------------------------------- */

static FILE *open_proc(const flap_host_roots *roots, const char *file) {
  char path[PATH_BYTES];
  const int length = snprintf(path, sizeof path, "%s/%s", roots->proc, file);
  return length > 0 && (size_t)length < sizeof path ? fopen(path, "re") : NULL;
}

static bool find_kib(const flap_host_roots *roots, const char *name, const char *key, uint64_t *bytes_out) {
  FILE *file = open_proc(roots, name);
  char line[LINE_BYTES];
  unsigned long long kib = 0;
  bool found = false;
  const size_t length = strlen(key);
  if (file == NULL)
    return false;
  while (!found && fgets(line, sizeof line, file) != NULL)
    found = strncmp(line, key, length) == 0 && sscanf(line + length, " %llu", &kib) == 1;
  (void)fclose(file);
  if (found)
    *bytes_out = kib * 1024;
  return found;
}

uint64_t flap_host_memory_kib(const flap_host_roots *roots, const char *name, const char *key) {
  uint64_t bytes = 0;
  (void)find_kib(roots, name, key, &bytes);
  return bytes;
}

/* Emulated kernels do without MemAvailable. */
static uint64_t available(const flap_host_roots *roots) {
  uint64_t bytes = 0, cached = 0;
  if (find_kib(roots, "meminfo", "MemAvailable:", &bytes))
    return bytes;
  if (!find_kib(roots, "meminfo", "MemFree:", &bytes))
    return FLAP_HOST_UNLIMITED;
  (void)find_kib(roots, "meminfo", "Cached:", &cached);
  return bytes + cached;
}

/* WSL's kernel names its maker; it lets half of the memory be pinned. */
static bool is_wsl(const flap_host_roots *roots) {
  FILE *file = open_proc(roots, "sys/kernel/osrelease");
  char line[LINE_BYTES] = "";
  if (file == NULL)
    return false;
  if (fgets(line, sizeof line, file) == NULL)
    line[0] = '\0';
  (void)fclose(file);
  for (char *at = line; *at; at++)
    *at = (char)tolower((unsigned char)*at);
  return strstr(line, "microsoft") != NULL;
}

/* Less what threads take of addresses alone: OpenBLAS 128 MiB for each that calls it (and asks for them forever when it
 * does not get them), a stack 8, malloc the rest. */
static uint64_t address_left(const flap_host_roots *roots) {
  struct rlimit limit;
  const long cores = sysconf(_SC_NPROCESSORS_ONLN);
  const uint64_t threads = (uint64_t)(cores > 0 ? cores : 1) * ADDRESSES_OF_THREAD;
  const uint64_t used = flap_host_memory_kib(roots, "self/status", "VmSize:") + threads;
  if (getrlimit(RLIMIT_AS, &limit) != 0 || limit.rlim_cur == RLIM_INFINITY)
    return FLAP_HOST_UNLIMITED;
  return (uint64_t)limit.rlim_cur > used ? (uint64_t)limit.rlim_cur - used : 0;
}

/* ---- control groups ---------------------------------------------------------------------------------------- */

/* Version 1 or 2: where its files are, and which of them. */
typedef struct hierarchy {
  bool unified;           /* version 2 */
  char mount[PATH_BYTES]; /* where it is mounted */
  char root[PATH_BYTES];  /* which group that is */
  char group[PATH_BYTES]; /* ours */
} hierarchy;

/* "unlimited" is a word in version 2 and a number near 2^63 in version 1. */
static bool read_number(const char *folder, const char *name, uint64_t *value_out) {
  char path[PATH_BYTES], line[64] = "", *end = NULL;
  const int length = snprintf(path, sizeof path, "%s/%s", folder, name);
  FILE *file = length > 0 && (size_t)length < sizeof path ? fopen(path, "re") : NULL;
  if (file == NULL)
    return false;
  const bool got = fgets(line, sizeof line, file) != NULL;
  (void)fclose(file);
  errno = 0;
  const unsigned long long value = strtoull(line, &end, 10);
  if (!got || line[0] < '0' || line[0] > '9' || (*end != '\n' && *end != '\0') || errno != 0 || value >> 62 != 0)
    return false;
  *value_out = value;
  return true;
}

static uint64_t read_stat(const char *folder, const char *key) {
  char path[PATH_BYTES], line[256];
  unsigned long long value = 0;
  const size_t bytes = strlen(key);
  const int length = snprintf(path, sizeof path, "%s/memory.stat", folder);
  FILE *file = length > 0 && (size_t)length < sizeof path ? fopen(path, "re") : NULL;
  if (file == NULL)
    return 0;
  while (fgets(line, sizeof line, file) != NULL)
    if (strncmp(line, key, bytes) == 0 && line[bytes] == ' ' && sscanf(line + bytes, " %llu", &value) == 1)
      break;
  (void)fclose(file);
  return value;
}

/* What one group leaves. memory.high does not kill, but slows down whoever passes it until nothing goes on. */
static uint64_t left_in(const char *folder, bool unified) {
  uint64_t limit = FLAP_HOST_UNLIMITED, other = 0, used = 0;
  if (read_number(folder, unified ? "memory.max" : "memory.limit_in_bytes", &other))
    limit = other;
  if (unified && read_number(folder, "memory.high", &other))
    limit = smaller(limit, other);
  if (limit == FLAP_HOST_UNLIMITED)
    return limit;
  (void)read_number(folder, unified ? "memory.current" : "memory.usage_in_bytes", &used);
  used -= smaller(used, read_stat(folder, unified ? "inactive_file" : "total_inactive_file"));
  return limit > used ? limit - used : 0;
}

/* The group of a line "4:memory:/a/b" or "0::/a/b"; NULL when it is of something else. */
static const char *group_of(char *line, bool unified) {
  char *controllers = strchr(line, ':'), *path = controllers != NULL ? strchr(controllers + 1, ':') : NULL;
  if (path == NULL)
    return NULL;
  *path++ = '\0';
  path[strcspn(path, "\n")] = '\0';
  controllers++;
  if (unified)
    return strncmp(line, "0:", 2) == 0 && controllers[0] == '\0' ? path : NULL;
  for (char *rest = controllers, *one; (one = strsep(&rest, ",")) != NULL;)
    if (strcmp(one, "memory") == 0)
      return path;
  return NULL;
}

static bool find_group(const flap_host_roots *roots, hierarchy *h) {
  FILE *file = open_proc(roots, "self/cgroup");
  char line[LINE_BYTES];
  bool found = false;
  if (file == NULL)
    return false;
  while (!found && fgets(line, sizeof line, file) != NULL) {
    const char *group = group_of(line, h->unified);
    found = group != NULL && strlen(group) < sizeof h->group;
    if (found)
      strcpy(h->group, group);
  }
  (void)fclose(file);
  return found;
}

static bool has_word(const char *list, const char *word) {
  const size_t length = strlen(word);
  for (const char *at = list; (at = strstr(at, word)) != NULL; at += length)
    if ((at == list || at[-1] == ',') && (at[length] == '\0' || at[length] == ',' || at[length] == '\n'))
      return true;
  return false;
}

/* Blanks, line ends and backslashes are three octal digits behind a backslash in mountinfo. */
static void decode(char *path) {
  char *to = path;
  for (const char *from = path; *from != '\0'; to++) {
    const bool is_code = from[0] == '\\' && from[1] >= '0' && from[1] <= '3' && from[2] >= '0' && from[2] <= '7' &&
                         from[3] >= '0' && from[3] <= '7';
    *to = *from;
    if (is_code)
      *to = (char)((from[1] - '0') * 64 + (from[2] - '0') * 8 + (from[3] - '0'));
    from += is_code ? 4 : 1;
  }
  *to = '\0';
}

/* "31 23 0:28 <root> <mount> <options> ... - <type> <source> <options>" */
static bool is_mount_of(char *line, hierarchy *h) {
  char root[LINE_BYTES], mount[LINE_BYTES], type[64], options[LINE_BYTES];
  char *rest = strstr(line, " - ");
  if (rest == NULL || sscanf(line, "%*s %*s %*s %4095s %4095s", root, mount) != 2 ||
      sscanf(rest + 3, "%63s %*s %4095s", type, options) != 2)
    return false;
  if (strcmp(type, h->unified ? "cgroup2" : "cgroup") != 0 || (!h->unified && !has_word(options, "memory")))
    return false;
  decode(root);
  decode(mount);
  strcpy(h->root, root);
  strcpy(h->mount, mount);
  return true;
}

static bool is_above(const hierarchy *h) {
  const size_t root = strcmp(h->root, "/") == 0 ? 0 : strlen(h->root);
  return strncmp(h->group, h->root, root) == 0 && (h->group[root] == '/' || h->group[root] == '\0');
}

/* The group's path below the mount: a container may see its own group mounted as the root of all, under the path that
 * it has outside, or with a namespace under "/". "/.." leads to groups that cannot be seen from here. */
static const char *below_mount(const hierarchy *h) {
  const size_t root = strcmp(h->root, "/") == 0 ? 0 : strlen(h->root);
  return is_above(h) && strstr(h->group, "/..") == NULL ? h->group + root : "";
}

/* From our group up to the mount, the one that leaves least. */
static void look_up_the_path(const flap_host_roots *roots, const hierarchy *h, flap_host_memory *memory) {
  char path[2 * PATH_BYTES];
  const bool in_sys = strncmp(h->mount, SYS "/", strlen(SYS) + 1) == 0;
  const int mount =
      snprintf(path, sizeof path, "%s%s", in_sys ? roots->sys : "", in_sys ? h->mount + strlen(SYS) : h->mount);
  if (mount <= 0 || (size_t)mount + strlen(h->group) >= sizeof path)
    return;
  strcpy(path + mount, below_mount(h));
  for (;;) {
    const uint64_t left = left_in(path, h->unified);
    if (left < memory->group_bytes) {
      memory->group_bytes = left;
      (void)snprintf(memory->group, sizeof memory->group, "%.250s", path[mount] ? path + mount : "/");
    }
    char *slash = strrchr(path + mount, '/');
    if (slash == NULL)
      return;
    *slash = '\0';
  }
}

/* A hierarchy may be mounted in several places, each with another group as its root. */
static bool look_in_mounts(const flap_host_roots *roots, hierarchy *h, bool of_others, flap_host_memory *memory) {
  FILE *file = open_proc(roots, "self/mountinfo");
  char line[LINE_BYTES];
  bool found = false;
  if (file == NULL)
    return false;
  while (fgets(line, sizeof line, file) != NULL) {
    if (!is_mount_of(line, h) || (!is_above(h) && !of_others))
      continue;
    look_up_the_path(roots, h, memory);
    found = true;
  }
  (void)fclose(file);
  return found;
}

static void read_groups(const flap_host_roots *roots, flap_host_memory *memory) {
  static hierarchy h; /* long paths; the engine has one thread */
  for (int unified = 0; unified < 2; unified++) {
    memset(&h, 0, sizeof h);
    h.unified = unified == 1;
    if (find_group(roots, &h) && !look_in_mounts(roots, &h, false, memory))
      (void)look_in_mounts(roots, &h, true, memory); /* ours under a name that is not known here */
  }
}

/* ---- public -------------------------------------------------------------------------------------------------- */

void flap_host_memory_read(const flap_host_roots *roots, flap_host_memory *memory_out) {
  *memory_out = (flap_host_memory){.total_bytes = flap_host_memory_kib(roots, "meminfo", "MemTotal:"),
                                   .available_bytes = available(roots),
                                   .swap_bytes = flap_host_memory_kib(roots, "meminfo", "SwapFree:"),
                                   .group_bytes = FLAP_HOST_UNLIMITED,
                                   .address_bytes = address_left(roots),
                                   .pinned_bytes = FLAP_HOST_UNLIMITED};
  read_groups(roots, memory_out);
  if (memory_out->total_bytes > 0 && is_wsl(roots))
    memory_out->pinned_bytes = memory_out->total_bytes / 2;
}

uint64_t flap_host_memory_left(const flap_host_memory *memory, bool pinned) {
  const uint64_t left = smaller(smaller(memory->available_bytes, memory->group_bytes), memory->address_bytes);
  return pinned ? smaller(left, memory->pinned_bytes) : left;
}

uint64_t flap_host_memory_free(bool pinned) {
  flap_host_memory memory;
  flap_host_memory_read(&FLAP_HOST_ROOTS, &memory);
  return flap_host_memory_left(&memory, pinned);
}

const char *flap_host_memory_limit_name(const flap_host_memory *memory, bool pinned, char *text, uint64_t text_bytes) {
  const uint64_t left = flap_host_memory_left(memory, pinned);
  if (pinned && left == memory->pinned_bytes)
    (void)snprintf(text, text_bytes, "WSL, which lets half of its memory be pinned,");
  else if (left == memory->group_bytes)
    (void)snprintf(text, text_bytes, "the container (control group %s)", memory->group);
  else if (left == memory->address_bytes)
    (void)snprintf(text, text_bytes, "ulimit -v");
  else
    (void)snprintf(text, text_bytes, "this machine");
  return text;
}
