/* Measuring a card keeps to the budget of the run that wants it: a child measures, and nvidia-smi says meanwhile what
 * the card has in use. Nobody else may use the card.
 */
#include "engine/machine/machine_cuda.h"

#include "kernels/device/device.h"

#include <check.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <unistd.h>

#define MIB ((uint64_t)1 << 20)
#define QUERY "nvidia-smi --query-gpu=memory.used --format=csv,noheader,nounits 2>/dev/null"

/* In MiB, of the first card; -1 where nvidia-smi does not say. */
static long used_mib(void) {
  FILE *shown = popen(QUERY, "r");
  long used = -1;
  if (shown == NULL)
    return -1;
  if (fscanf(shown, "%ld", &used) != 1)
    used = -1;
  (void)pclose(shown);
  return used;
}

static int measure_in_child(uint64_t budget) {
  flap_machine machine;
  if (flap_machine_measure_cuda(1, budget, &machine) != FLAP_OK) {
    fprintf(stderr, "%s\n", flap_error_message());
    return 1;
  }
  printf("within %llu MiB: %.0f TFLOP/s in bf16, %.2f TB/s, %.1f GB/s up, %.1f GB/s down\n",
         (unsigned long long)(budget / MIB), machine.flops_bf16 * 1e-12, machine.device_bytes * 1e-12,
         machine.h2d_bytes * 1e-9, machine.d2h_bytes * 1e-9);
  fflush(stdout);
  return machine.flops_bf16 > 0 && machine.flops_f32 > 0 && machine.device_bytes > 0 && machine.h2d_bytes > 0 &&
                 machine.d2h_bytes > 0
             ? 0
             : 1;
}

START_TEST(card_is_measured_within_the_budget) {
  static const uint64_t budgets[] = {800 * MIB, 1200 * MIB, 4096 * MIB};
  const uint64_t budget = budgets[_i];
  const uint64_t limit = budget < FLAP_MACHINE_CUDA_VRAM ? budget : FLAP_MACHINE_CUDA_VRAM;
  const long before = used_mib();
  long most = before;
  int status = -1;
  fflush(stdout);
  const pid_t child = fork();
  ck_assert_int_ge(child, 0);
  if (child == 0)
    _exit(measure_in_child(budget));
  while (waitpid(child, &status, WNOHANG) == 0) {
    const long now = used_mib();
    most = now > most ? now : most;
  }
  ck_assert_msg(WIFEXITED(status) && WEXITSTATUS(status) == 0, "measuring ended with %d", status);
  printf("budget %llu MiB: at most %ld MiB more than before\n", (unsigned long long)(budget / MIB), most - before);
  ck_assert_int_gt(most, before); /* it was seen */
  ck_assert_int_le(most - before, (long)(limit / MIB));
}
END_TEST

/* In a process of its own, which opens the card: a context does not survive a fork. */
static bool is_there(void) {
  const pid_t child = fork();
  int status = 1;
  if (child == 0) {
    flap_device_config config = {.kind = FLAP_DEVICE_CUDA, .vram_bytes = 800 * MIB, .events_max = 1};
    flap_device *device = NULL;
    const flap_status opened = flap_device_open(&config, &device);
    if (opened != FLAP_OK)
      printf("%s\n", flap_error_message());
    flap_device_close(device);
    fflush(stdout);
    _exit(opened == FLAP_OK ? 0 : 1);
  }
  return child > 0 && waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

int main(void) {
  setvbuf(stdout, NULL, _IOLBF, 0);
  if (!is_there())
    return 77;
  if (used_mib() < 0) {
    printf("nvidia-smi does not say what is in use\n");
    return 77;
  }
  Suite *suite = suite_create("engine");
  TCase *tests = tcase_create("machine_cuda");
  tcase_set_timeout(tests, 120);
  tcase_add_loop_test(tests, card_is_measured_within_the_budget, 0, 3);
  suite_add_tcase(suite, tests);
  SRunner *runner = srunner_create(suite);
  srunner_set_fork_status(runner, CK_NOFORK);
  srunner_run_all(runner, CK_NORMAL);
  const int failed = srunner_ntests_failed(runner);
  srunner_free(runner);
  return failed == 0 ? 0 : 1;
}
