/* What the host's cores do with the page codec: how fast numbers like a model's states are encoded and decoded.
 *
 * Folder-private, but for planning. It takes some 50 ms.
 */
#ifndef FLAP_ENGINE_MACHINE_CODEC_RATES_H
#define FLAP_ENGINE_MACHINE_CODEC_RATES_H

#include "engine/engine.h"
#include "pager/pager.h"

#define FLAP_CODEC_WORKERS_MAX 8u /* without a pool */

#ifdef __cplusplus
extern "C" {
#endif

/* Sets encode_bytes and decode_bytes, of so many threads at once; 0, not known, where there is no memory to measure
 * with: 48 MiB for each thread. */
void flap_codec_measure(uint32_t threads, flap_machine *machine);

/* How many threads fill a pool where the host has so many cores: two are left for those who launch and copy. */
static inline uint32_t flap_codec_threads(uint32_t cores) {
  return cores > 3 ? cores - 2 : 1;
}

/* How many check and compress what disks read and write, where budgets have room for them: half of the cores, for the
 * others compute or launch and copy; with a pool, which wants all that moves encoded and decoded, nearly all. */
static inline uint32_t flap_codec_workers(uint32_t cores, bool pool) {
  const uint32_t half = cores / 2 < FLAP_CODEC_WORKERS_MAX ? cores / 2 : FLAP_CODEC_WORKERS_MAX;
  const uint32_t workers = pool && half < flap_codec_threads(cores) ? flap_codec_threads(cores) : half;
  return workers > 0 ? workers : 1;
}

/* What pages on disk are expected to come to in such a pager, as a share of what they are; 1 where that is not known
 * (of other states than those of exact AdamW, or with another codec), or where `auto` would find that encoding them
 * does not pay. */
double flap_codec_disk_share(const flap_machine *machine, const flap_pager_config *pager, uint32_t cores,
                             flap_optim optim);

/* Share of the measured rates that so many workers reach while copies run; 0.9 at most. */
static inline double flap_codec_share(uint32_t workers, uint32_t cores) {
  const double share = 0.9 * workers / flap_codec_threads(cores);
  return share < 0.9 ? share : 0.9;
}

#ifdef __cplusplus
}
#endif
#endif
