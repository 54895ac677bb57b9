/* The recorded table of algorithms: keys, order, and a digest that notices every byte of every entry. */
#include "kernels/matmul_table.h"
#include "tests/kernels/ops_rig.h"

#include <string.h>

static flap_matmul product_of(uint32_t m) {
  return (flap_matmul){.transpose = FLAP_NT,
                       .m = m,
                       .n = 48,
                       .k = 32,
                       .a = (const void *)(uintptr_t)4096,
                       .b = (const void *)(uintptr_t)4096,
                       .c = (void *)(uintptr_t)4096,
                       .lda = 32,
                       .ldb = 32,
                       .ldc = 48,
                       .dtype = FLAP_BF16,
                       .c_dtype = FLAP_F32};
}

static flap_matmul_key key_of(uint32_t m) {
  const flap_matmul product = product_of(m);
  return flap_matmul_key_of(&product);
}

static void fill(uint8_t algorithm[FLAP_MATMUL_ALGORITHM_BYTES], uint8_t value) {
  memset(algorithm, value, FLAP_MATMUL_ALGORITHM_BYTES);
}

static void add(flap_matmul_table *table, uint32_t m) {
  const flap_matmul_key key = key_of(m);
  uint8_t algorithm[FLAP_MATMUL_ALGORITHM_BYTES];
  fill(algorithm, (uint8_t)m);
  ck_assert(flap_matmul_table_add(table, &key, algorithm));
}

/* What is different about a product is different about its key, but for addresses that are as well aligned. */
START_TEST(key_of_products_tells_apart_what_decides) {
  flap_matmul x[15];
  const char odd[16] = {0};
  for (size_t i = 0; i < sizeof x / sizeof *x; i++)
    x[i] = product_of(64);
  x[1].m++, x[2].n++, x[3].k++, x[4].lda++, x[5].ldb++, x[6].ldc++;
  x[7].transpose = FLAP_NN, x[8].dtype = FLAP_F16, x[9].c_dtype = FLAP_BF16, x[10].accumulate = true;
  x[11].bias = odd, x[12].a = (const void *)(uintptr_t)4098, x[13].c = (void *)(uintptr_t)4104;
  x[14].residual = (const void *)(uintptr_t)8192;
  for (size_t i = 0; i < sizeof x / sizeof *x; i++)
    for (size_t j = 0; j < sizeof x / sizeof *x; j++) {
      const flap_matmul_key one = flap_matmul_key_of(&x[i]), other = flap_matmul_key_of(&x[j]);
      ck_assert_msg((memcmp(&one, &other, sizeof one) == 0) == (i == j), "products %zu and %zu", i, j);
    }
  flap_matmul moved = x[0];
  moved.a = (const void *)(uintptr_t)65536, moved.b = (const void *)(uintptr_t)8208;
  const flap_matmul_key one = flap_matmul_key_of(&x[0]), other = flap_matmul_key_of(&moved);
  ck_assert_mem_eq(&one, &other, sizeof one);
  ck_assert_uint_eq(flap_matmul_key_of(&x[12]).align_a, 2);
  ck_assert_uint_eq(flap_matmul_key_of(&x[13]).align_c, 8);
  x[14].residual = (const void *)(uintptr_t)8196;
  ck_assert_uint_eq(flap_matmul_key_of(&x[14]).align_c, 4);
}
END_TEST

START_TEST(key_valid_refuses_what_no_product_has) {
  const flap_matmul_key good = key_of(64);
  ck_assert(flap_matmul_key_valid(&good));
  flap_matmul_key bad[19];
  for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
    bad[i] = good;
  bad[0].m = 0, bad[1].n = 0, bad[2].k = 0, bad[3].lda = 31, bad[4].ldb = 31, bad[5].ldc = 47;
  bad[6].transpose = 3, bad[7].dtype = FLAP_I32, bad[8].dtype = 200, bad[9].c_dtype = FLAP_I32, bad[10].added = 3;
  bad[11].bias = 3, bad[12].bias = 32, bad[13].align_a = 0, bad[14].align_b = 32, bad[15].align_c = 12;
  bad[16].transpose = FLAP_TN, bad[16].lda = 63; /* rows of a are M long */
  bad[17].c_dtype = FLAP_BF16, bad[17].added = 1;
  bad[18].dtype = FLAP_F16, bad[18].c_dtype = FLAP_BF16;
  for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
    ck_assert_msg(!flap_matmul_key_valid(&bad[i]), "key %zu", i);
}
END_TEST

START_TEST(table_finds_what_was_added_in_any_order) {
  static flap_matmul_table up, down;
  const uint32_t count = FLAP_MATMUL_ENTRIES_MAX;
  for (uint32_t i = 0; i < count; i++)
    add(&up, i * 7 % count + 1), add(&down, count - i);
  ck_assert_uint_eq(up.count, count);
  ck_assert_mem_eq(up.entries, down.entries, sizeof up.entries);
  ck_assert_uint_eq(flap_matmul_table_digest(&up), flap_matmul_table_digest(&down));
  for (uint32_t m = 1; m <= count; m++) {
    const flap_matmul_key key = key_of(m);
    const flap_matmul_entry *entry = flap_matmul_table_find(&up, &key);
    ck_assert(entry != NULL && entry->algorithm[0] == (uint8_t)m);
  }
  const flap_matmul_key more = key_of(count + 1), there = key_of(5);
  uint8_t algorithm[FLAP_MATMUL_ALGORITHM_BYTES];
  fill(algorithm, 0xff);
  ck_assert(flap_matmul_table_find(&up, &more) == NULL);
  ck_assert(!flap_matmul_table_add(&up, &more, algorithm));
  ck_assert(flap_matmul_table_add(&up, &there, algorithm)); /* and nothing has changed */
  ck_assert_uint_eq(flap_matmul_table_find(&up, &there)->algorithm[0], 5);
  for (uint32_t i = 0; i < up.count; i++)
    if (memcmp(&up.entries[i].key, &there, sizeof there) == 0) {
      flap_matmul_table_remove(&up, i);
      break;
    }
  ck_assert_uint_eq(up.count, count - 1);
  ck_assert(flap_matmul_table_find(&up, &there) == NULL);
  ck_assert(flap_matmul_table_add(&up, &more, algorithm));
}
END_TEST

START_TEST(table_digest_changes_with_every_byte) {
  static flap_matmul_table table, changed;
  memset(&table, 0, sizeof table);
  ck_assert_uint_eq(flap_matmul_table_digest(&table), 0);
  add(&table, 1), add(&table, 2);
  const uint64_t digest = flap_matmul_table_digest(&table);
  ck_assert_uint_ne(digest, 0);
  for (size_t i = 0; i < 2 * sizeof *table.entries; i++) {
    changed = table;
    ((unsigned char *)changed.entries)[i] ^= 1;
    ck_assert_msg(flap_matmul_table_digest(&changed) != digest, "byte %zu", i);
  }
  flap_matmul_table_remove(&table, 0);
  ck_assert_uint_ne(flap_matmul_table_digest(&table), digest);
}
END_TEST

/* Devices without such a library take a table and leave it alone. */
START_TEST(ops_without_a_library_have_no_target_and_ignore_a_table) {
  char target[FLAP_MATMUL_TARGET_MAX] = "x";
  ck_assert_int_eq(flap_ops_matmul_target(FLAP_DEVICE_CPU, target, sizeof target), FLAP_OK);
  ck_assert_str_eq(target, "");
  ck_assert_int_eq(flap_ops_matmul_target(FLAP_DEVICE_SIM, target, sizeof target), FLAP_OK);
  ck_assert_str_eq(target, "");
  static flap_matmul_table table;
  const flap_ops_limits limits = rig_limits(FLAP_F32);
  rig r;
  rig_open(&r, &limits, 1);
  ck_assert_int_eq(flap_ops_set_matmuls(r.ops, &table, FLAP_MATMUL_TUNE), FLAP_OK);
  rig_close(&r);
  ck_assert_uint_eq(table.count, 0);
}
END_TEST

int main(void) {
  Suite *suite = suite_create("kernels");
  TCase *tests = tcase_create("matmul_table");
  tcase_add_test(tests, key_of_products_tells_apart_what_decides);
  tcase_add_test(tests, key_valid_refuses_what_no_product_has);
  tcase_add_test(tests, table_finds_what_was_added_in_any_order);
  tcase_add_test(tests, table_digest_changes_with_every_byte);
  tcase_add_test(tests, ops_without_a_library_have_no_target_and_ignore_a_table);
  suite_add_tcase(suite, tests);
  return rig_main(suite);
}
