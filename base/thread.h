/* What threads ask of the scheduler. */
#ifndef FLAP_BASE_THREAD_H
#define FLAP_BASE_THREAD_H

#ifdef __cplusplus
extern "C" {
#endif

/* For threads that move bytes while others compute on all cores: the calling thread asks for short slices of time, so
 * that it runs soon after it is woken, at no larger share (Linux 6.12 and later: sched_setattr's runtime of ordinary
 * threads; elsewhere nothing happens). Needs no rights. */
void flap_thread_prefer_latency(void);

/* For threads whose work is for later: the calling thread takes what the others leave (10 nicer than the process). */
void flap_thread_stand_back(void);

#ifdef __cplusplus
}
#endif
#endif
