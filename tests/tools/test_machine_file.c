/* Machine profiles: presets, how their names are made, files, and what each refusal says. */
#include "base/units.h"
#include "tools/config_yaml.h"
#include "tools/machine_file.h"

#include <check.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

static flap_machine_profile profile;

#define FILE_TEXT                                                                                     \
  "name: mine\ndevice: cuda\nvram_bytes: 8GiB\nram_bytes: 16GiB\nflops_bf16: 2e13\nflops_f32: 1e13\n" \
  "device_bytes: 2e11\nh2d_bytes: 1e10\nd2h_bytes: 1e10\nhost_bytes: 4e10\n"

static void refuse(const char *name, flap_status status, const char *message) {
  flap_error_clear();
  ck_assert_msg(flap_machine_file_load(name, &profile) == status, "%s: %s", name, flap_error_message());
  ck_assert_msg(strstr(flap_error_message(), message) != NULL, "said \"%s\", wanted \"%s\"", flap_error_message(),
                message);
}

static void refuse_text(const char *text, const char *message) {
  flap_error_clear();
  ck_assert_msg(flap_machine_file_parse("m.yaml", text, strlen(text), &profile) == FLAP_INVALID, "accepted: %s", text);
  ck_assert_msg(strstr(flap_error_message(), message) != NULL, "said \"%s\", wanted \"%s\"", flap_error_message(),
                message);
}

START_TEST(presets_are_whole_and_plausible) {
  size_t count = 0;
  for (const flap_machine_preset *p = flap_machine_presets; p->name; p++, count++) {
    ck_assert_msg(flap_machine_file_load(p->name, &profile) == FLAP_OK, "%s", flap_error_message());
    const flap_machine *m = &profile.machine;
    ck_assert_int_eq(profile.device, FLAP_RUN_DEVICE_CUDA);
    ck_assert_uint_ge(profile.vram_bytes, 7 * FLAP_GIB);
    ck_assert_uint_ge(profile.ram_bytes, 32 * FLAP_GIB);
    ck_assert_uint_gt(m->overhead_bytes, 0);
    ck_assert_double_gt(m->flops_bf16, m->flops_f32);
    ck_assert(m->h2d_both_bytes > 0 && m->h2d_both_bytes <= m->h2d_bytes);
    ck_assert(m->d2h_both_bytes > 0 && m->d2h_both_bytes <= m->d2h_bytes);
    ck_assert_uint_eq(profile.disk_count, 1);
    const flap_profile_disk *disk = &profile.disks[0];
    ck_assert_double_gt(disk->both_bytes, fmax(disk->read_bytes, disk->write_bytes) / 2);
    ck_assert_double_le(disk->both_bytes, disk->read_bytes + disk->write_bytes);
    /* A rate is written as text in the file, so it is a comment short of its source if nothing stands above it. */
    ck_assert_ptr_nonnull(strstr(p->text, "# "));
    ck_assert_msg(strstr(p->text, "easured") != NULL, "%s does not say what was measured", p->name);
  }
  ck_assert_uint_eq(count, 7);
}
END_TEST

START_TEST(names_say_memory_and_disks) {
  ck_assert_int_eq(flap_machine_file_load("rtx4090-128g-2nvme", &profile), FLAP_OK);
  ck_assert_uint_eq(profile.ram_bytes, 128 * FLAP_GIB);
  ck_assert_uint_eq(profile.disk_count, 2);
  ck_assert_mem_eq(&profile.disks[0], &profile.disks[1], sizeof profile.disks[0]);
  ck_assert_str_eq(profile.machine.name, "RTX 4090 24 GB, 128 GiB RAM, 2 NVMe");
  flap_machine rates;
  flap_machine_profile_rates(&profile, 2, &rates);
  ck_assert_double_eq(rates.disk_read_bytes, 2 * profile.disks[0].read_bytes);
  ck_assert_double_eq(rates.disk_write_bytes, 2 * profile.disks[0].write_bytes);
  ck_assert_double_eq(rates.disk_both_bytes, 2 * profile.disks[0].both_bytes);
  flap_machine_profile_rates(&profile, 0, &rates);
  ck_assert_double_eq(rates.disk_read_bytes, 0);

  /* A name whose own end looks like memory, and one that is the beginning of another. */
  ck_assert_int_eq(flap_machine_file_load("h100-80g", &profile), FLAP_OK);
  ck_assert_uint_eq(profile.ram_bytes, 128 * FLAP_GIB);
  ck_assert_int_eq(flap_machine_file_load("h100-80g-64g-0nvme", &profile), FLAP_OK);
  ck_assert_uint_eq(profile.ram_bytes, 64 * FLAP_GIB);
  ck_assert_uint_eq(profile.disk_count, 0);
  ck_assert_int_eq(flap_machine_file_load("rtx4090-thunderbolt4-32g", &profile), FLAP_OK);
  ck_assert_double_eq(profile.machine.h2d_bytes, 2.8e9);
  ck_assert_uint_eq(profile.ram_bytes, 32 * FLAP_GIB);
  ck_assert_int_eq(flap_machine_file_load("rtx4090-1nvme.yaml", &profile), FLAP_OK); /* there is no such file */
}
END_TEST

START_TEST(names_that_say_nothing_are_refused) {
  refuse("rtx409", FLAP_NOT_FOUND, "rtx409 is no machine that is known; did you mean rtx4090");
  refuse("rtx4090-", FLAP_NOT_FOUND, "is no machine");
  refuse("rtx4090-64", FLAP_NOT_FOUND, "is no machine");
  refuse("rtx4090-0g", FLAP_NOT_FOUND, "is no machine");
  refuse("rtx4090-99999999999g", FLAP_NOT_FOUND, "is no machine");
  refuse("rtx4090-2nvme-64g", FLAP_NOT_FOUND, "is no machine");
  refuse("rtx4090-17nvme", FLAP_NOT_FOUND, "is no machine");
  refuse("", FLAP_NOT_FOUND, "is no machine");
  refuse("rtx4090x.yaml", FLAP_NOT_FOUND, "rtx4090x.yaml");
  refuse("./rtx4090", FLAP_NOT_FOUND, "./rtx4090");
}
END_TEST

START_TEST(a_file_fills_every_field) {
  static const char text[] =
      FILE_TEXT "threads: 4\nh2d_both_bytes: 9e9\nd2h_both_bytes: 8e9\nlaunch_ns: 1\ncopy_ns: 2\n"
                "disk_ns: 3\noverhead_bytes: 300MiB\nprocess_bytes: 700MiB\n"
                "disks: [{size_bytes: 1TB, read_bytes: 3e9, write_bytes: 2e9, both_bytes: 4e9, "
                "tbw_bytes: 600TB}, {size_bytes: 2TB, read_bytes: 1e9, write_bytes: 1e9}]\n";
  ck_assert_msg(flap_machine_file_parse("m.yaml", text, sizeof text - 1, &profile) == FLAP_OK, "%s",
                flap_error_message());
  const flap_machine *m = &profile.machine;
  ck_assert_str_eq(m->name, "mine");
  ck_assert(profile.vram_bytes == 8 * FLAP_GIB && profile.ram_bytes == 16 * FLAP_GIB && profile.threads == 4);
  ck_assert(m->flops_bf16 == 2e13 && m->flops_f32 == 1e13 && m->device_bytes == 2e11 && m->host_bytes == 4e10);
  ck_assert(m->h2d_bytes == 1e10 && m->d2h_bytes == 1e10 && m->h2d_both_bytes == 9e9 && m->d2h_both_bytes == 8e9);
  ck_assert(m->launch_ns == 1 && m->copy_ns == 2 && m->disk_ns == 3 && m->overhead_bytes == 300 * FLAP_MIB);
  ck_assert(!m->synchronous && m->shared_cores == 0 && m->process_bytes == 700 * FLAP_MIB);
  ck_assert_uint_eq(profile.disk_count, 2);
  ck_assert_uint_eq(profile.disks[0].tbw_bytes, 600000000000000);
  flap_machine rates; /* a disk of which nobody said how both go gives both at full rate */
  flap_machine_profile_rates(&profile, 2, &rates);
  ck_assert_double_eq(rates.disk_both_bytes, 6e9);

  static const char json[] =
      "{\"name\": \"mine\", \"device\": \"cpu\", \"ram_bytes\": 17179869184, \"flops_bf16\": 1e11,\n"
      " \"flops_f32\": 1e11, \"device_bytes\": 2e10, \"h2d_bytes\": 5e9, \"d2h_bytes\": 5e9,\n"
      " \"host_bytes\": 2e10, \"synchronous\": true, \"shared_cores\": 8, \"disks\": []}";
  ck_assert_msg(flap_machine_file_parse("m.json", json, sizeof json - 1, &profile) == FLAP_OK, "%s",
                flap_error_message());
  ck_assert(profile.device == FLAP_RUN_DEVICE_CPU && profile.machine.synchronous && profile.threads == 8);
}
END_TEST

START_TEST(a_file_that_is_wrong_is_refused_with_its_line) {
  refuse_text("", "m.yaml:1: name: missing");
  refuse_text("- 1\n", "wanted lines of the form key: value");
  refuse_text(FILE_TEXT "launch: 1\n", "m.yaml:11: launch: unknown key of a machine; did you mean launch_ns");
  refuse_text("name: mine\ndevice: gpu\n", "m.yaml:2: device: wanted cpu or cuda, found gpu");
  refuse_text("name: mine\ndevice: cpu\nram_bytes: 0\n", "m.yaml:3: ram_bytes: wanted a size");
  refuse_text("name: mine\ndevice: cpu\nram_bytes: 9000TiB\n", "m.yaml:3: ram_bytes: wanted a size");
  refuse_text("name: mine\ndevice: cpu\nflops_bf16: 0\n", "m.yaml:3: flops_bf16: wanted a rate");
  refuse_text("name: mine\ndevice: cpu\nflops_bf16: 9e7\n",
              "m.yaml:3: flops_bf16: wanted a rate per second of at least 1e+08");
  refuse_text("name: mine\ndevice: cpu\nhost_bytes: 1\n", "m.yaml:3: host_bytes: wanted a rate");
  refuse_text("name: mine\ndevice: cpu\nh2d_both_bytes: 1\n", "m.yaml:3: h2d_both_bytes: wanted a rate");
  refuse_text("name: mine\ndevice: cpu\nh2d_bytes: .nan\n", "m.yaml:3: h2d_bytes: wanted a rate");
  refuse_text("name: mine\ndevice: cpu\nh2d_bytes: [1]\n", "m.yaml:3: h2d_bytes: wanted a rate");
  refuse_text("name: mine\ndevice: cpu\nlaunch_ns: -1\n", "m.yaml:3: launch_ns: wanted a whole number");
  refuse_text("name: mine\ndevice: cpu\nshared_cores: 1e9\n", "m.yaml:3: shared_cores: wanted a whole number");
  refuse_text("name: mine\ndevice: cpu\nsynchronous: 2\n", "m.yaml:3: synchronous: wanted true or false");
  refuse_text("name: [a]\ndevice: cpu\n", "m.yaml:1: name: wanted a name");
  refuse_text("name: mine\ndevice: cpu\nram_bytes: 1GiB\n", "flops_bf16: missing");
  refuse_text(FILE_TEXT "disks: 3\n", "m.yaml:11: disks: wanted a list");
  refuse_text(FILE_TEXT "disks: [1]\n", "m.yaml:11: machine: wanted lines");
  refuse_text(FILE_TEXT "disks:\n- {size_bytes: 1TB, read_bytes: 1e9}\n", "m.yaml:12: write_bytes: missing");
  refuse_text(FILE_TEXT "disks:\n- {size_bytes: 1TB, read_bytes: 1e9, write_bytes: 1}\n",
              "m.yaml:12: write_bytes: wanted a");
  refuse_text(FILE_TEXT "disks:\n- {size_bytes: 1TB, read_byte: 1e9}\n", "did you mean read_bytes");
}
END_TEST

START_TEST(a_configuration_names_a_machine_to_plan_for) {
  static flap_run_config config;
  static const char text[] = "model: {model_type: llama}\noutput_dir: out\ndataset: a.txt\nmachine: rtx3090-2nvme\n";
  const char *none[] = {"disk=[]"}, *other[] = {"machine=rtx3091"}, *here[] = {"machine=null"};
  ck_assert_msg(flap_config_load_text("run.yaml", text, sizeof text - 1, NULL, 0, FLAP_CONFIG_PLAN, &config) == FLAP_OK,
                "%s", flap_error_message());
  ck_assert_ptr_nonnull(config.profile);
  ck_assert_uint_eq(config.disk_count, 2);
  ck_assert_str_eq(config.disk[1].path, "disk 2 of RTX 3090 24 GB, 64 GiB RAM, 2 NVMe");
  flap_run_config_close(&config);
  ck_assert_int_eq(flap_config_load_text("run.yaml", text, sizeof text - 1, none, 1, FLAP_CONFIG_PLAN, &config),
                   FLAP_OK);
  ck_assert_uint_eq(config.disk_count, 0);
  flap_run_config_close(&config);
  ck_assert_int_eq(flap_config_load_text("run.yaml", text, sizeof text - 1, here, 1, FLAP_CONFIG_TRAIN, &config),
                   FLAP_OK);
  ck_assert_ptr_null(config.profile);
  flap_run_config_close(&config);

  ck_assert_int_eq(flap_config_load_text("run.yaml", text, sizeof text - 1, other, 1, FLAP_CONFIG_PLAN, &config),
                   FLAP_NOT_FOUND);
  ck_assert_ptr_nonnull(strstr(flap_error_message(), "command line: machine: rtx3091 is no machine"));
  const flap_config_purpose others[] = {FLAP_CONFIG_TRAIN, FLAP_CONFIG_USE};
  for (size_t i = 0; i < 2; i++) {
    ck_assert_int_eq(flap_config_load_text("run.yaml", text, sizeof text - 1, NULL, 0, others[i], &config),
                     FLAP_INVALID);
    ck_assert_ptr_nonnull(strstr(flap_error_message(), "run.yaml:4: machine: rtx3090-2nvme is a machine to plan for"));
  }
}
END_TEST

int main(void) {
  Suite *suite = suite_create("tools");
  TCase *cases = tcase_create("machine_file");
  tcase_add_test(cases, presets_are_whole_and_plausible);
  tcase_add_test(cases, names_say_memory_and_disks);
  tcase_add_test(cases, names_that_say_nothing_are_refused);
  tcase_add_test(cases, a_file_fills_every_field);
  tcase_add_test(cases, a_file_that_is_wrong_is_refused_with_its_line);
  tcase_add_test(cases, a_configuration_names_a_machine_to_plan_for);
  suite_add_tcase(suite, cases);
  SRunner *runner = srunner_create(suite);
  srunner_run_all(runner, CK_NORMAL);
  int failed = srunner_ntests_failed(runner);
  srunner_free(runner);
  return failed == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
