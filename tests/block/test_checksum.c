/* Page checksums: any flipped bit and any wrong identity changes them. */
#include "io/block/checksum.h"

#include <check.h>
#include <stdlib.h>
#include <string.h>

static unsigned char page[16384];

static void fill_page(void) {
  for (size_t i = 0; i < sizeof page; i++)
    page[i] = (unsigned char)(i * 37 >> 3);
}

START_TEST(checksum_every_flipped_bit_is_seen) {
  fill_page();
  uint64_t sum = flap_block_checksum(page, sizeof page, 3, 5, 7);
  ck_assert_uint_eq(flap_block_checksum(page, sizeof page, 3, 5, 7), sum);
  uint32_t unseen = 0;
  for (size_t bit = 0; bit < sizeof page * 8; bit += 13) {
    page[bit / 8] ^= (unsigned char)(1u << bit % 8);
    unseen += flap_block_checksum(page, sizeof page, 3, 5, 7) == sum;
    page[bit / 8] ^= (unsigned char)(1u << bit % 8);
  }
  ck_assert_uint_eq(unseen, 0);
}
END_TEST

START_TEST(checksum_length_matters) {
  memset(page, 0, sizeof page);
  ck_assert_uint_ne(flap_block_checksum(page, 8192, 0, 0, 0), flap_block_checksum(page, 4096, 0, 0, 0));
}
END_TEST

static int compare(const void *a, const void *b) {
  uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
  return x < y ? -1 : x > y;
}

START_TEST(checksum_neighbouring_identities_differ) {
  enum { SIDE = 24 };
  static uint64_t sums[SIDE * SIDE * SIDE];
  fill_page();
  size_t count = 0;
  for (uint32_t region = 0; region < SIDE; region++)
    for (uint32_t number = 0; number < SIDE; number++)
      for (uint64_t epoch = 0; epoch < SIDE; epoch++)
        sums[count++] = flap_block_checksum(page, 256, region, number, epoch);
  qsort(sums, count, sizeof sums[0], compare);
  for (size_t i = 1; i < count; i++)
    ck_assert_uint_ne(sums[i], sums[i - 1]);
  ck_assert_uint_ne(flap_block_checksum(page, 256, 1, 0, 0), flap_block_checksum(page, 256, 0, 0, (uint64_t)1 << 32));
}
END_TEST

START_TEST(checksum_value_is_stable) {
  /* Manifests on disk hold these: a change of the function would make every earlier commit unreadable. */
  fill_page();
  ck_assert_uint_eq(flap_block_checksum(page, 4096, 1, 2, 3), 0xb3e29769796804b7ull);
}
END_TEST

int main(void) {
  Suite *suite = suite_create("block");
  TCase *tests = tcase_create("checksum");
  tcase_add_test(tests, checksum_every_flipped_bit_is_seen);
  tcase_add_test(tests, checksum_length_matters);
  tcase_add_test(tests, checksum_neighbouring_identities_differ);
  tcase_add_test(tests, checksum_value_is_stable);
  suite_add_tcase(suite, tests);
  SRunner *runner = srunner_create(suite);
  srunner_run_all(runner, CK_ENV);
  int failed = srunner_ntests_failed(runner);
  srunner_free(runner);
  return failed == 0 ? 0 : 1;
}
