/* Measures the memory rates of this host, for the machine profile of the cpu device. */
#ifndef FLAP_KERNELS_DEVICE_MEASURE_MACHINE_H
#define FLAP_KERNELS_DEVICE_MEASURE_MACHINE_H

#include "base/pool.h"
#include "base/status.h"
#include "kernels/device/device.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Fills h2d_bytes and d2h_bytes (memcpy by one thread, bytes copied), host_bytes and device_bytes (memcpy by all
 * threads of the pool, bytes read and written), launch_ns (an empty pool_run), shared_cores and synchronous; leaves
 * every other field alone, the matmul and disk rates among them. Takes 64 MiB for at most 300 ms or so and gives
 * them back. Rates are medians of a few passes. FLAP_NO_MEMORY. */
FLAP_CHECKED flap_status flap_device_measure_host(flap_pool *pool, flap_machine *machine_out);

#ifdef __cplusplus
}
#endif
#endif
