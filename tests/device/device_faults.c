#include "tests/device/device_faults.h"

#include "kernels/device/device_internal.h"

#include <stdatomic.h>
#include <stddef.h>

#define FAILURE "device cpu: a fault was made for a test"

static const flap_device_table *real;
static flap_device_table faulty;
static atomic_uint_fast64_t counts[DEVICE_CALL_COUNT];
static device_call failing_call;
static uint64_t failing_number;
static atomic_bool failed;

static bool is_due(device_call call) {
  const uint64_t number = atomic_fetch_add(&counts[call], 1) + 1;
  return call == failing_call && number == failing_number;
}

static flap_status tell(void) {
  return atomic_load(&failed) ? flap_error_set(FLAP_DEVICE, FAILURE) : FLAP_OK;
}

static flap_status faulty_open(flap_device *device) {
  atomic_store(&failed, false);
  if (is_due(DEVICE_CALL_OPEN))
    return flap_error_set(FLAP_NO_MEMORY, "vram: the device does not give its memory; lower vram");
  return real->open(device);
}

static flap_status faulty_pin(flap_device *device, void *memory, uint64_t bytes) {
  if (is_due(DEVICE_CALL_PIN))
    return flap_error_set(FLAP_NO_MEMORY, "ram: cannot pin %llu bytes; lower ram", (unsigned long long)bytes);
  return real->pin_host(device, memory, bytes);
}

static void faulty_copy(flap_device *device, flap_stream stream, void *to, const void *from, uint64_t bytes) {
  if (is_due(DEVICE_CALL_COPY))
    atomic_store(&failed, true);
  if (!atomic_load(&failed))
    real->copy(device, stream, to, from, bytes);
}

static void faulty_note_compute(flap_device *device, uint64_t ns) {
  if (is_due(DEVICE_CALL_KERNEL))
    atomic_store(&failed, true);
  real->note_compute(device, ns);
}

static flap_status faulty_synchronize(flap_device *device) {
  FLAP_TRY(real->synchronize(device));
  return tell();
}

static flap_status faulty_outcome(flap_device *device) {
  (void)device;
  return tell();
}

static flap_status faulty_upload(flap_device *device, void *to, const void *from, uint64_t bytes) {
  FLAP_TRY(tell());
  return real->upload(device, to, from, bytes);
}

static flap_status faulty_download(flap_device *device, void *to, const void *from, uint64_t bytes) {
  FLAP_TRY(tell());
  return real->download(device, to, from, bytes);
}

void device_faults_install(device_call call, uint64_t number) {
  device_faults_remove();
  real = flap_device_replace_table(FLAP_DEVICE_CPU, &faulty);
  faulty = *real;
  faulty.open = faulty_open;
  faulty.pin_host = faulty_pin;
  faulty.copy = faulty_copy;
  faulty.note_compute = faulty_note_compute;
  faulty.synchronize = faulty_synchronize;
  faulty.outcome = faulty_outcome;
  faulty.upload = faulty_upload;
  faulty.download = faulty_download;
  failing_call = call;
  failing_number = number;
  atomic_store(&failed, false);
  for (int i = 0; i < DEVICE_CALL_COUNT; i++)
    atomic_store(&counts[i], 0);
}

uint64_t device_faults_count(device_call call) {
  return atomic_load(&counts[call]);
}

void device_faults_remove(void) {
  if (real != NULL)
    (void)flap_device_replace_table(FLAP_DEVICE_CPU, real);
  real = NULL;
}
