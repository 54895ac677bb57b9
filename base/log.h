/* Lines for people, on stderr. Threading: any thread; a line is written whole. */
#ifndef FLAP_BASE_LOG_H
#define FLAP_BASE_LOG_H

#include "base/status.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef enum flap_log_level { FLAP_LOG_DEBUG, FLAP_LOG_INFO, FLAP_LOG_WARNING, FLAP_LOG_ERROR } flap_log_level;

/* Lines below the level are dropped. The default is FLAP_LOG_INFO, or what FLAP_LOG=debug|info|warning|error
 * in the environment says. */
void flap_log_set_level(flap_log_level level);
/* Warns where FLAP_LOG is something else, which counts as info: for a program to call once, when it starts. */
void flap_log_check_environment(void);

/* "flap: warning: <text>\n"; plain "<text>\n" for FLAP_LOG_INFO. Never fails, never allocates. */
void flap_log(flap_log_level level, const char *format, ...) FLAP_PRINTF(2, 3);

#ifdef __cplusplus
}
#endif
#endif
