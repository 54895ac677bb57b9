/* When a transfer ends on one of two lanes that slow each other down: the two directions of a bus, or reading and
 * writing of a disk.
 *
 * The simulations promise the end of a transfer when they start it. So what the other lane was promised stays, at its
 * full rate, and a transfer that starts beside it gets what both together can do, less that: of any moment in which
 * both lanes are busy, the sum is what both can do, and over many transfers each lane is slowed about alike.
 */
#ifndef FLAP_BASE_DUPLEX_H
#define FLAP_BASE_DUPLEX_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct flap_duplex {
  double alone_bytes;       /* per second, of this lane while the other rests; above 0 */
  double other_alone_bytes; /* of the other */
  double both_bytes;        /* of both together while both are busy; 0: they do not slow each other */
} flap_duplex;

/* The end of `bytes` that start at start_ns, while the other lane is busy from other_start_ns to other_end_ns (and not
 * beyond: what comes later will find this transfer there). Without overlap start + bytes / alone, rounded. */
uint64_t flap_duplex_end_ns(const flap_duplex *lanes, uint64_t start_ns, double bytes, uint64_t other_start_ns,
                            uint64_t other_end_ns);

/* The least time of a step that moves so many bytes each way, one number for both lanes, whatever the order: of a
 * moment in which one lane has its own rate the other has what both leave, and neither is ever above its own. Where
 * both together can do more than either alone, that is all bytes at the rate of both; where they can do less, part of
 * the bytes in turns. 0 where they do not slow each other: then each lane's own time is the least. */
double flap_duplex_least_seconds(double bytes, double other_bytes, const flap_duplex *lanes);

#ifdef __cplusplus
}
#endif
#endif
