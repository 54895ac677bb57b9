/* What the optimizer takes on the host's cores: measured, alone and beside copies.
 *
 * Folder-private, but for tests. While the host updates what lives in RAM, the device's copies read and write the same
 * memory, and each slows the other down; so a plan for this machine knows both times, and how much longer copies take.
 */
#ifndef FLAP_ENGINE_MACHINE_HOST_TIMES_H
#define FLAP_ENGINE_MACHINE_HOST_TIMES_H

#include "engine/machine/op_times.h"

#ifdef __cplusplus
extern "C" {
#endif

#define FLAP_HOST_TIMES_VRAM_BYTES (32 * FLAP_MIB)
#define FLAP_HOST_TIMES_EVENTS 4

/* Of what is pinned: more than caches hold, through which copies would go. A multiple of 32 MiB. */
uint64_t flap_host_times_pinned_bytes(void);
/* Of host memory, that measuring takes, what is pinned included. */
uint64_t flap_host_times_bytes(const flap_op_times_spec *spec);
/* Fills in times->host, host_embedding and copies_beside_host. Copies go both ways between `vram`, memory of the device
 * that nobody else uses, FLAP_HOST_TIMES_VRAM_BYTES, and `pinned`, memory of the host that was pinned with it,
 * flap_host_times_pinned_bytes(). The device has its first FLAP_HOST_TIMES_EVENTS events to spare. Takes a second.
 * FLAP_NO_MEMORY, or what the device says. */
FLAP_CHECKED flap_status flap_host_times_measure(const flap_op_times_spec *spec, flap_device *device, void *vram,
                                                 void *pinned, flap_op_times *times);
/* The same from the rate at which the host reads and writes memory; nothing is known of copies beside it. */
void flap_host_times_from_rate(const flap_op_times_spec *spec, double bytes_per_second, flap_op_times *times);
/* The rate that a time of a layer's update stands for. */
double flap_host_times_rate(const flap_op_times_spec *spec, double ns_an_element);

#ifdef __cplusplus
}
#endif
#endif
