/* What a core does with the page codec: how fast numbers like a model's states are encoded and decoded.
 *
 * Folder-private, but for planning. Measured anew each time: it takes some 20 ms.
 */
#ifndef FLAP_ENGINE_MACHINE_CODEC_RATES_H
#define FLAP_ENGINE_MACHINE_CODEC_RATES_H

#include "engine/engine.h"

#ifdef __cplusplus
extern "C" {
#endif

#define FLAP_CODEC_SHARE 0.85 /* of a core's rates, while all of them are at work */

/* Sets encode_bytes and decode_bytes; 0, not known, where there is no memory to measure with. */
void flap_codec_measure(flap_machine *machine);

#ifdef __cplusplus
}
#endif
#endif
