/* The assert handler: the one place outside tools/ that ends the process. */
#include "base/assert.h"

#include <stdio.h>
#include <stdlib.h>

void flap_assert_fail(const char *file, int line, const char *function, const char *condition) {
  fprintf(stderr, "flap: internal error at %s:%d in %s: %s does not hold; please report this line\n", file, line,
          function, condition);
  fflush(NULL);
  abort();
}
