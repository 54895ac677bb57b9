/* A static context of Zstandard lives in memory that it is given, and takes no other. Which parameters make it an
 * entropy coder: the fastest strategy, with steps between its looks for a match so long that there are none in a plane,
 * and literals that are coded however fast it shall be. Memory for both is part of the library's static interface, but
 * exported by the shared library too. */
#define ZSTD_STATIC_LINKING_ONLY
#include "io/block/entropy.h"

#include "base/assert.h"
#include "base/units.h"

#include <zstd.h>
#include <zstd_errors.h>

#define WINDOW_LOG 15
#define TABLE_LOG 6      /* the least: it is not looked into */
#define LITERALS_CODED 1 /* ZSTD_ps_enable; ZSTD_lcm_huffman before 1.5.1 */

_Static_assert(FLAP_ENTROPY_PLANE_BYTES == 1u << WINDOW_LOG, "a plane is one block of a frame");

static const ZSTD_compressionParameters parameters = {.windowLog = WINDOW_LOG,
                                                      .chainLog = TABLE_LOG,
                                                      .hashLog = TABLE_LOG,
                                                      .searchLog = 1,
                                                      .minMatch = 7,
                                                      .targetLength = ZSTD_TARGETLENGTH_MAX,
                                                      .strategy = ZSTD_fast};

uint64_t flap_entropy_state_bytes(void) {
  const size_t coder = ZSTD_estimateCCtxSize_usingCParams(parameters), decoder = ZSTD_estimateDCtxSize();
  return flap_units_round_up(coder > decoder ? coder : decoder, 64);
}

static void set(ZSTD_CCtx *context, ZSTD_cParameter parameter, unsigned value) {
  const size_t answer = ZSTD_CCtx_setParameter(context, parameter, (int)value);
  flap_assert(!ZSTD_isError(answer));
}

flap_entropy_coder *flap_entropy_coder_in(void *state) {
  ZSTD_CCtx *context = ZSTD_initStaticCCtx(state, flap_entropy_state_bytes());
  flap_assert(context != NULL);
  set(context, ZSTD_c_windowLog, parameters.windowLog);
  set(context, ZSTD_c_chainLog, parameters.chainLog);
  set(context, ZSTD_c_hashLog, parameters.hashLog);
  set(context, ZSTD_c_searchLog, parameters.searchLog);
  set(context, ZSTD_c_minMatch, parameters.minMatch);
  set(context, ZSTD_c_targetLength, parameters.targetLength);
  set(context, ZSTD_c_strategy, parameters.strategy);
  set(context, ZSTD_c_literalCompressionMode, LITERALS_CODED);
  set(context, ZSTD_c_contentSizeFlag, 0);
  set(context, ZSTD_c_format, ZSTD_f_zstd1_magicless);
  return (flap_entropy_coder *)context;
}

flap_entropy_decoder *flap_entropy_decoder_in(void *state) {
  ZSTD_DCtx *context = ZSTD_initStaticDCtx(state, flap_entropy_state_bytes());
  flap_assert(context != NULL);
  const size_t answer = ZSTD_DCtx_setParameter(context, ZSTD_d_format, ZSTD_f_zstd1_magicless);
  flap_assert(!ZSTD_isError(answer));
  return (flap_entropy_decoder *)context;
}

uint32_t flap_entropy_encode(flap_entropy_coder *coder, const void *plane, uint32_t bytes, void *to, uint32_t room) {
  const size_t made = ZSTD_compress2((ZSTD_CCtx *)coder, to, room, plane, bytes);
  flap_assert(!ZSTD_isError(made) || ZSTD_getErrorCode(made) == ZSTD_error_dstSize_tooSmall);
  return ZSTD_isError(made) || made >= room ? 0 : (uint32_t)made;
}

bool flap_entropy_decode(flap_entropy_decoder *decoder, const void *coded, uint32_t coded_bytes, void *plane,
                         uint32_t bytes) {
  return ZSTD_decompressDCtx((ZSTD_DCtx *)decoder, plane, bytes, coded, coded_bytes) == bytes;
}
