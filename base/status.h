/* Status codes and the error record.
 *
 * Every fallible function of FLAP returns a flap_status. The place where something fails also fills a
 * thread-local record written for a person: what was tried, on what (file, key, budget), what the system
 * said, what to do. Callers forward the status; whoever ends the story prints flap_error_message().
 *
 * Threading: the record is thread-local. A completion that failed on another thread stores its status and
 * its OS error in the request, and the waiter fills its own record from them.
 */
#ifndef FLAP_BASE_STATUS_H
#define FLAP_BASE_STATUS_H

#ifdef __cplusplus
extern "C" {
#endif

typedef enum flap_status {
  FLAP_OK = 0,
  FLAP_INVALID,     /* bad input: an option, a config value, a file's content */
  FLAP_NOT_FOUND,   /* a file or a name that does not exist */
  FLAP_BUDGET,      /* does not fit a vram, ram or disk budget */
  FLAP_NO_MEMORY,   /* the system refused memory */
  FLAP_NO_SPACE,    /* the disk is full */
  FLAP_IO,          /* the system refused a file operation */
  FLAP_CORRUPT,     /* a checksum or a structural check failed */
  FLAP_UNSUPPORTED, /* well-formed, but FLAP does not do it */
  FLAP_DEVICE,      /* the compute device failed */
  FLAP_NUMERIC,     /* NaN or infinity where a finite value is needed */
  FLAP_INTERRUPTED, /* a person asked to stop */
  FLAP_CLOSED,      /* an earlier error made this object unusable */
  FLAP_STATUS_COUNT
} flap_status;

#define FLAP_CHECKED __attribute__((warn_unused_result))
#define FLAP_PRINTF(format_index, first_index) __attribute__((format(printf, format_index, first_index)))

/* A short lower-case name: "invalid", "no space". Static storage. */
const char *flap_status_name(flap_status status);

/* Replaces this thread's record with the formatted text and returns `status`, so that a failing place
 * reads `return flap_error_set(FLAP_INVALID, "%s: ...", path);`. Texts are one line, without a full stop
 * or a newline at the end; control characters, which may be in what a file says, become question marks.
 * `status` must not be FLAP_OK. */
flap_status flap_error_set(flap_status status, const char *format, ...) FLAP_PRINTF(2, 3);

/* The same, with ": " and strerror(os_error) appended. The status follows from os_error: ENOENT gives
 * FLAP_NOT_FOUND, ENOSPC and EDQUOT FLAP_NO_SPACE, ENOMEM FLAP_NO_MEMORY, everything else FLAP_IO. */
flap_status flap_error_set_os(int os_error, const char *format, ...) FLAP_PRINTF(2, 3);

/* Puts "<formatted text>: " before the present record; returns `status`. For callers that know more. */
flap_status flap_error_prefix(flap_status status, const char *format, ...) FLAP_PRINTF(2, 3);

/* This thread's record; "" when nothing failed yet. Valid until the next flap_error_* call here. */
const char *flap_error_message(void);
void flap_error_clear(void);

/* Forwards a failure to the caller. */
#define FLAP_TRY(call)                     \
  do {                                     \
    flap_status flap_try_status_ = (call); \
    if (flap_try_status_ != FLAP_OK)       \
      return flap_try_status_;             \
  } while (0)

/* Stores a failure in `status` and leaves through the function's `fail:` label, which releases. */
#define FLAP_TRY_GOTO(status, call) \
  do {                              \
    (status) = (call);              \
    if ((status) != FLAP_OK)        \
      goto fail;                    \
  } while (0)

#ifdef __cplusplus
}
#endif
#endif
