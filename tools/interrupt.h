/* Ctrl-C and SIGTERM: the first asks for a graceful end, the second ends the program at once (two that come together
 * are one). And what does not end it: a reader who leaves, a terminal that is closed. */
#ifndef FLAP_TOOLS_INTERRUPT_H
#define FLAP_TOOLS_INTERRUPT_H

#include <signal.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Installs the handlers (and ignores SIGPIPE, so that a reader who leaves does not end a training run). `notice` is
 * written to stderr by the first signal; NULL for none. Static storage. */
void flap_interrupt_install(const char *notice);

/* From now on a terminal that is closed (SIGHUP) does not end the program. */
void flap_interrupt_outlive_terminal(void);

/* Turns non-zero with the first signal. */
extern volatile sig_atomic_t flap_interrupt_flag;

#ifdef __cplusplus
}
#endif
#endif
