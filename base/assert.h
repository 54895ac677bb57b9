/* Asserts that stay on in every build. They are for FLAP's own mistakes, never for input, I/O or memory. */
#ifndef FLAP_BASE_ASSERT_H
#define FLAP_BASE_ASSERT_H

#ifdef __cplusplus
extern "C" {
#endif

/* Prints the place and the condition to stderr, then aborts. */
void flap_assert_fail(const char *file, int line, const char *function, const char *condition)
    __attribute__((noreturn, cold));

#define flap_assert(condition)                                    \
  do {                                                            \
    if (__builtin_expect(!(condition), 0))                        \
      flap_assert_fail(__FILE__, __LINE__, __func__, #condition); \
  } while (0)

#ifdef __cplusplus
}
#endif
#endif
