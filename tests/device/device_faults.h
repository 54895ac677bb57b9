/* A cpu device that fails as a card does: the n-th call of a kind, and from then on everything.
 *
 * Opening and pinning fail once, with a status. A copy or an operation that fails returns nothing, as launches do: it
 * is left undone, the device has failed for good, nothing is copied any more, and whoever synchronizes, uploads or
 * downloads is told FLAP_DEVICE. An operation here is one that the engine reports with flap_device_note_compute. */
#ifndef FLAP_TESTS_DEVICE_FAULTS_H
#define FLAP_TESTS_DEVICE_FAULTS_H

#include <stdint.h>

typedef enum device_call {
  DEVICE_CALL_OPEN, /* the device's memory */
  DEVICE_CALL_PIN,
  DEVICE_CALL_COPY,
  DEVICE_CALL_KERNEL,
  DEVICE_CALL_COUNT
} device_call;

/* From here on devices of kind cpu count their calls, and the `number`-th (from 1) of kind `call` fails; 0: none. */
void device_faults_install(device_call call, uint64_t number);
/* Calls so far. */
uint64_t device_faults_count(device_call call);
/* The table as it was. No such device may be open. */
void device_faults_remove(void);

#endif
