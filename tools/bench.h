/* What `flap bench` was asked for. Private to its files. */
#ifndef FLAP_TOOLS_BENCH_H
#define FLAP_TOOLS_BENCH_H

#include "engine/engine.h"
#include "io/block/block.h"
#include "tools/arguments.h"

#ifdef __cplusplus
extern "C" {
#endif

#define FLAP_BENCH_NOT_GIVEN UINT64_MAX
#define FLAP_BENCH_NO_DEPTH UINT32_MAX

typedef struct flap_bench_options {
  const char *paths[FLAP_BLOCK_DISKS_MAX]; /* folders on disks; none: the current one where one is needed */
  uint32_t path_count;
  flap_block_backend backend;
  flap_run_device device;
  uint64_t bytes, request_bytes; /* disk, one measurement; or FLAP_BENCH_NOT_GIVEN */
  uint32_t depth;                /* or FLAP_BENCH_NO_DEPTH */
  uint32_t threads;
  uint64_t vram_bytes; /* 0: the default */
  bool json, quick, force;
  const char *html, *profile, *plan; /* all; NULL: none, and for the profile profile.json */
} flap_bench_options;

/* Everything that this machine has: sections, the profile, and the page. */
FLAP_CHECKED flap_status flap_bench_all(const flap_bench_options *options);
/* On stdout, with every digit; takes the object over. */
FLAP_CHECKED flap_status flap_bench_print_json(struct json_t *object);
/* The rates of a profile, as lines. `disks` false leaves theirs out. */
void flap_bench_print_machine(const flap_machine *machine, bool disks);

#ifdef __cplusplus
}
#endif
#endif
