/* Weights and states between regions and files: the same files whatever the placement, the same bits after a resume,
 * and files that do not fit the model refused. */
#include "engine/store/weights.h"

#include "base/philox.h"
#include "base/system.h"
#include "engine/store/weights_internal.h"
#include "io/formats/safetensors.h"
#include "tests/engine/weights_rig.h"
#include "tests/formats/formats_scratch.h"

#include <check.h>
#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#define SHARD_MAX ((uint64_t)1 << 40)
#define FILES_MAX 8u
static const struct {
  flap_dtype dtype;
  flap_optim optim;
} formats[] = {{FLAP_BF16, FLAP_OPTIM_ADAMW},     {FLAP_F32, FLAP_OPTIM_ADAMW},
               {FLAP_F16, FLAP_OPTIM_ADAMW},      {FLAP_BF16, FLAP_OPTIM_ADAMW_8BIT},
               {FLAP_F32, FLAP_OPTIM_ADAMW_8BIT}, {FLAP_F16, FLAP_OPTIM_ADAMW_8BIT}};
#define FORMATS ((int)(sizeof formats / sizeof *formats))

/* The files of a checkpoint, the states' first; returns how many. */
static uint32_t files_of(flap_dtype dtype, flap_optim optim, const char *names[FILES_MAX]) {
  uint32_t count = 0;
  if (dtype != FLAP_F32)
    names[count++] = dtype == FLAP_BF16 ? "optimizer-low.safetensors" : "optimizer-master.safetensors";
  names[count++] = "optimizer-exp_avg.safetensors"; /* with adamw_8bit of the embedding alone */
  names[count++] = "optimizer-exp_avg_sq.safetensors";
  if (optim == FLAP_OPTIM_ADAMW_8BIT) {
    names[count++] = "optimizer-exp_avg-codes.safetensors";
    names[count++] = "optimizer-exp_avg-largest.safetensors";
    names[count++] = "optimizer-exp_avg_sq-codes.safetensors";
    names[count++] = "optimizer-exp_avg_sq-largest.safetensors";
  }
  names[count++] = "model.safetensors";
  return count;
}

static const char *folder_path(const char *name) {
  const char *path = scratch_path(name);
  (void)mkdir(path, 0777);
  return path;
}

static const char *in(const char *folder, const char *file) {
  static char names[4][256];
  static unsigned next;
  char *name = names[next++ % 4];
  (void)snprintf(name, sizeof names[0], "%s/%s", folder, file);
  return name;
}

/* Through the page cache the first times, and then past it, in blocks of one or more of the disk's. */
static void save_all(const weights_rig *rig, const char *folder) {
  static _Alignas(FLAP_WRITE_BEHIND_ALIGN) unsigned char memory[100000];
  static uint64_t saves;
  flap_write_behind behind;
  const flap_file_piece piece = {.behind = &behind};
  RIG_OK(flap_write_behind_open(memory, saves++ * 20000 % (sizeof memory + 1), &behind));
  RIG_OK(flap_weights_save_all(rig->pager, &rig->layout, folder_path(folder), SHARD_MAX, piece, NULL));
  flap_write_behind_close(&behind);
}

static void same_folders(const char *a, const char *b, flap_dtype dtype, flap_optim optim) {
  const char *files[FILES_MAX];
  const uint32_t count = files_of(dtype, optim, files);
  for (uint32_t i = 0; i < count; i++)
    rig_same_files(in(a, files[i]), in(b, files[i]));
  ck_assert((dtype == FLAP_BF16) == scratch_exists(in(b, "optimizer-low.safetensors")));
  ck_assert((dtype == FLAP_F16) == scratch_exists(in(b, "optimizer-master.safetensors")));
  ck_assert((optim == FLAP_OPTIM_ADAMW_8BIT) == scratch_exists(in(b, "optimizer-exp_avg-codes.safetensors")));
}

/* ---- values -------------------------------------------------------------------------------------------------- */

START_TEST(values_halves_join_to_the_same_bits) {
  const flap_philox stream = flap_philox_stream(1, "bits");
  for (uint64_t i = 0; i < 200000; i++) {
    const float value = flap_f32_from_bits((uint32_t)flap_philox_below(&stream, i, (uint64_t)1 << 32));
    uint16_t high = 0;
    int16_t low = 0;
    float again = 0;
    const bool fits = isfinite(value) && fabsf(value) < 0x1.ffp127f;
    ck_assert_uint_eq(flap_values_to_high(&value, 1, &high), fits);
    ck_assert_uint_eq(flap_values_to_low(&value, 1, &low), fits);
    if (!fits)
      continue;
    ck_assert_uint_eq(flap_values_join(&high, &low, 1, &again), 1);
    ck_assert_uint_eq(flap_f32_bits(again), flap_f32_bits(value));
    ck_assert_float_le(fabsf(flap_bf16_to_f32(high) - value), fabsf(value) * 0x1p-8f + 0x1p-133f);
  }
}
END_TEST

START_TEST(values_the_largest_masters_are_refused) {
  const struct {
    uint32_t bits;
    bool fits;
  } cases[] = {{0x7f7f7fff, true},  {0x7f7f8000, false}, {0xff7f7fff, true},  {0xff7f8000, false},
               {0x7f800000, false}, {0x7fc00000, false}, {0xffffffff, false}, {0x80000000, true}};
  for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
    const float value = flap_f32_from_bits(cases[i].bits);
    uint16_t high;
    ck_assert_uint_eq(flap_values_to_high(&value, 1, &high), cases[i].fits);
  }
}
END_TEST

START_TEST(values_half_precision_rounds_to_nearest_even) {
  for (uint32_t bits = 0; bits < 0x10000; bits++) {
    const uint16_t half = (uint16_t)bits;
    float value = 0;
    uint16_t again = 0;
    const bool finite = (bits & 0x7c00) != 0x7c00;
    ck_assert_uint_eq(flap_values_from_f16(&half, 1, &value), finite);
    if (!finite)
      continue;
    ck_assert_uint_eq(flap_f32_bits(value), flap_f32_bits(rig_from_f16(half)));
    ck_assert_uint_eq(flap_values_to_f16(&value, 1, &again), 1);
    ck_assert_uint_eq(again, half);
    /* Its neighbours, at the ties and beside them. */
    for (int32_t d = -1; d <= 1; d++)
      for (uint32_t tie = 0; tie < 2; tie++) {
        const float near = flap_f32_from_bits(flap_f32_bits(value) + (tie ? 0x1000u : 0) + (uint32_t)d);
        if (isnan(near))
          continue; /* below zero's bits */
        const uint64_t done = flap_values_to_f16(&near, 1, &again);
        ck_assert_uint_eq(again, rig_to_f16(near));
        ck_assert_uint_eq(done, (again & 0x7c00u) != 0x7c00u);
      }
  }
  const flap_philox stream = flap_philox_stream(2, "small");
  for (uint64_t i = 0; i < 100000; i++) { /* around the subnormals */
    const float value = flap_f32_from_bits(0x32000000u + (uint32_t)flap_philox_below(&stream, i, 0x07000000u));
    uint16_t ours = 0;
    ck_assert_uint_eq(flap_values_to_f16(&value, 1, &ours), 1);
    ck_assert_uint_eq(ours, rig_to_f16(value));
  }
}
END_TEST

/* ---- from scratch -------------------------------------------------------------------------------------------- */

static void check_init(const weights_rig *rig, const char *name, uint64_t seed) {
  uint32_t part;
  const flap_model_tensor tensor = rig_tensor(rig, name, &part);
  float *master = malloc(tensor.elements * sizeof(float)), *moments = malloc(2 * tensor.elements * sizeof(float));
  rig_read(rig, name, master, moments, moments + tensor.elements);
  const flap_philox stream = flap_philox_stream(seed, name);
  for (uint64_t i = 0; i < tensor.elements; i++) {
    const float wanted = tensor.init == FLAP_INIT_ONES    ? 1.0f
                         : tensor.init == FLAP_INIT_ZEROS ? 0.0f
                                                          : (float)(0.02 * (double)flap_philox_normal(&stream, i));
    if (flap_f32_bits(master[i]) != flap_f32_bits(wanted))
      ck_abort_msg("%s: element %llu is %g instead of %g", name, (unsigned long long)i, (double)master[i],
                   (double)wanted);
    ck_assert_uint_eq(flap_f32_bits(moments[i]) | flap_f32_bits(moments[tensor.elements + i]), 0);
  }
  free(master);
  free(moments);
}

START_TEST(weights_init_is_the_same_in_all_placements) {
  const flap_dtype dtype = formats[_i % FORMATS].dtype;
  const flap_optim optim = formats[_i % FORMATS].optim;
  const bool tied = _i / FORMATS % 2;
  flap_model_config config;
  rig_model(tied, !tied, &config);
  for (uint32_t p = 0; p < RIG_PLACEMENTS; p++) {
    weights_rig rig;
    char name[16];
    if (p > 0 && !RIG_MEETS(_i, p)) /* the first one is what others are compared with */
      continue;
    (void)snprintf(name, sizeof name, "p%u", p);
    rig_open_optim(&rig, &config, dtype, optim, FLAP_MODE_TRAIN, &rig_placements[p], scratch_path(""));
    RIG_OK(flap_weights_init(rig.pager, &rig.layout, 77));
    check_init(&rig, "model.embed_tokens.weight", 77);
    check_init(&rig, "model.layers.1.mlp.down_proj.weight", 77);
    check_init(&rig, "model.layers.0.post_attention_layernorm.weight", 77);
    if (!tied) {
      check_init(&rig, "lm_head.weight", 77);
      check_init(&rig, "model.layers.1.self_attn.v_proj.bias", 77);
    }
    save_all(&rig, name);
    same_folders("p0", name, dtype, optim);
    rig_close(&rig);
  }
}
END_TEST

START_TEST(weights_forward_layouts_hold_the_same_weights) {
  flap_model_config config;
  weights_rig train, forward;
  rig_model(true, false, &config);
  rig_open(&train, &config, FLAP_BF16, FLAP_MODE_TRAIN, &rig_placements[1], scratch_path(""));
  rig_open(&forward, &config, FLAP_BF16, FLAP_MODE_FORWARD, &rig_placements[3], scratch_path(""));
  RIG_OK(flap_weights_init(train.pager, &train.layout, 5));
  RIG_OK(flap_weights_init(forward.pager, &forward.layout, 5));
  RIG_OK(flap_weights_save(train.pager, &train.layout, folder_path("a"), SHARD_MAX, (flap_file_piece){0}, NULL));
  RIG_OK(flap_weights_save(forward.pager, &forward.layout, folder_path("b"), SHARD_MAX, (flap_file_piece){0}, NULL));
  rig_same_files("a/model.safetensors", "b/model.safetensors");
  /* Another seed gives other weights; loading brings the first ones back. */
  RIG_OK(flap_weights_init(forward.pager, &forward.layout, 6));
  RIG_OK(flap_weights_load(forward.pager, &forward.layout, scratch_path("a")));
  RIG_OK(flap_weights_save(forward.pager, &forward.layout, folder_path("c"), SHARD_MAX, (flap_file_piece){0}, NULL));
  rig_same_files("a/model.safetensors", "c/model.safetensors");
  rig_close(&train);
  rig_close(&forward);
}
END_TEST

/* ---- save and resume ----------------------------------------------------------------------------------------- */

/* Files with random bits, read into one placement and written from it, come out as they were. */
START_TEST(weights_resume_gives_back_the_same_bits) {
  const flap_dtype dtype = formats[_i % FORMATS].dtype;
  const flap_optim optim = formats[_i % FORMATS].optim;
  const char *files[FILES_MAX];
  const uint32_t file_count = files_of(dtype, optim, files);
  flap_model_config config;
  weights_rig rig;
  rig_model(_i / FORMATS % 2, true, &config);
  rig_open_optim(&rig, &config, dtype, optim, FLAP_MODE_TRAIN, &rig_placements[0], scratch_path(""));
  RIG_OK(flap_weights_init(rig.pager, &rig.layout, 1));
  save_all(&rig, "from");
  rig_close(&rig);
  for (uint32_t i = 0; i < file_count; i++)
    rig_scribble(in("from", files[i]), i);
  for (uint32_t p = 0; p < RIG_PLACEMENTS; p++) {
    char name[16];
    if (!RIG_MEETS(_i, p))
      continue;
    (void)snprintf(name, sizeof name, "p%u", p);
    rig_open_optim(&rig, &config, dtype, optim, FLAP_MODE_TRAIN, &rig_placements[p], scratch_path(""));
    RIG_OK(flap_weights_resume(rig.pager, &rig.layout, scratch_path("from"), NULL));
    save_all(&rig, name);
    same_folders("from", name, dtype, optim);
    uint32_t part;
    const uint64_t elements = rig_tensor(&rig, "model.norm.weight", &part).elements;
    float *master = malloc(elements * sizeof(float));
    rig_read(&rig, "model.norm.weight", master, NULL, NULL); /* checks the gaps */
    free(master);
    rig_close(&rig);
  }
}
END_TEST

START_TEST(weights_resume_refuses_other_dtypes_and_missing_states) {
  flap_model_config config;
  weights_rig rig, wide;
  rig_model(false, false, &config);
  rig_open(&rig, &config, FLAP_BF16, FLAP_MODE_TRAIN, &rig_placements[1], scratch_path(""));
  rig_open(&wide, &config, FLAP_F32, FLAP_MODE_TRAIN, &rig_placements[1], scratch_path(""));
  RIG_OK(flap_weights_init(rig.pager, &rig.layout, 1));
  save_all(&rig, "a");
  RIG_REFUSED(flap_weights_resume(wide.pager, &wide.layout, scratch_path("a"), NULL), FLAP_INVALID,
              "a/model.safetensors", "is BF16, but this run needs F32");
  ck_assert_int_eq(remove(scratch_path("a/optimizer-exp_avg.safetensors")), 0);
  RIG_REFUSED(flap_weights_resume(rig.pager, &rig.layout, scratch_path("a"), NULL), FLAP_NOT_FOUND,
              "a/optimizer-exp_avg.", "No such file");
  rig_close(&rig);
  rig_close(&wide);
}
END_TEST

START_TEST(weights_resume_refuses_codes_that_do_not_fit) {
  flap_model_config config, other;
  weights_rig rig, plain, smaller;
  rig_model(false, false, &config);
  rig_open_optim(&rig, &config, FLAP_BF16, FLAP_OPTIM_ADAMW_8BIT, FLAP_MODE_TRAIN, &rig_placements[1],
                 scratch_path(""));
  rig_open(&plain, &config, FLAP_BF16, FLAP_MODE_TRAIN, &rig_placements[1], scratch_path(""));
  RIG_OK(flap_weights_init(rig.pager, &rig.layout, 1));
  RIG_OK(flap_weights_init(plain.pager, &plain.layout, 1));
  save_all(&rig, "eight");
  save_all(&plain, "plain");
  RIG_REFUSED(flap_weights_resume(plain.pager, &plain.layout, scratch_path("eight"), NULL), FLAP_INVALID,
              "eight/optimizer-exp_avg.safetensors", "has no tensor model.layers.0.");
  RIG_REFUSED(flap_weights_resume(rig.pager, &rig.layout, scratch_path("plain"), NULL), FLAP_INVALID,
              "plain/optimizer-exp_avg.safetensors", "holds tensor");
  ck_assert_int_eq(rename(scratch_path("plain/optimizer-exp_avg.safetensors"),
                          scratch_path("eight/optimizer-exp_avg-codes.safetensors")),
                   0);
  RIG_REFUSED(flap_weights_resume(rig.pager, &rig.layout, scratch_path("eight"), NULL), FLAP_INVALID,
              "eight/optimizer-exp_avg-codes.safetensors", "is F32, but this run needs I8");
  save_all(&rig, "eight");
  other = config;
  other.intermediate_size = 64;
  rig_open_optim(&smaller, &other, FLAP_BF16, FLAP_OPTIM_ADAMW_8BIT, FLAP_MODE_TRAIN, &rig_placements[1],
                 scratch_path(""));
  RIG_OK(flap_weights_init(smaller.pager, &smaller.layout, 1));
  save_all(&smaller, "smaller");
  ck_assert_int_eq(rename(scratch_path("smaller/optimizer-exp_avg_sq-largest.safetensors"),
                          scratch_path("eight/optimizer-exp_avg_sq-largest.safetensors")),
                   0);
  RIG_REFUSED(flap_weights_resume(rig.pager, &rig.layout, scratch_path("eight"), NULL), FLAP_INVALID,
              "eight/optimizer-exp_avg_sq-largest.safetensors", "has the shape [12], but");
  rig_close(&rig);
  rig_close(&plain);
  rig_close(&smaller);
}
END_TEST

/* As if the embedding had codes like everything else: no fp32 moments, or none of the second; or codes of it as well.
 */
START_TEST(weights_resume_refuses_an_embedding_with_8_bit_moments) {
  static const char *const fp32_files[] = {"all/optimizer-exp_avg.safetensors", "all/optimizer-exp_avg_sq.safetensors"};
  flap_model_config config, untied;
  weights_rig rig, other;
  rig_model(true, false, &config);
  rig_model(false, false, &untied);
  rig_open_optim(&rig, &config, FLAP_BF16, FLAP_OPTIM_ADAMW_8BIT, FLAP_MODE_TRAIN, &rig_placements[1],
                 scratch_path(""));
  RIG_OK(flap_weights_init(rig.pager, &rig.layout, 1));
  for (size_t i = 0; i < sizeof fp32_files / sizeof *fp32_files; i++) {
    save_all(&rig, "all");
    ck_assert_int_eq(remove(scratch_path(fp32_files[i])), 0);
    RIG_REFUSED(flap_weights_resume(rig.pager, &rig.layout, scratch_path("all"), NULL), FLAP_NOT_FOUND, fp32_files[i],
                "keeps the embedding's moments in fp32");
    RIG_REFUSED(flap_weights_resume(rig.pager, &rig.layout, scratch_path("all"), NULL), FLAP_NOT_FOUND, fp32_files[i],
                "give it as model_name_or_path");
  }
  save_all(&rig, "all");
  RIG_OK(flap_weights_resume(rig.pager, &rig.layout, scratch_path("all"), NULL));
  /* A head's codes are another tensor beside those that a tied model has. */
  rig_open_optim(&other, &untied, FLAP_BF16, FLAP_OPTIM_ADAMW_8BIT, FLAP_MODE_TRAIN, &rig_placements[1],
                 scratch_path(""));
  RIG_OK(flap_weights_init(other.pager, &other.layout, 1));
  save_all(&other, "untied");
  ck_assert_int_eq(rename(scratch_path("untied/optimizer-exp_avg-codes.safetensors"),
                          scratch_path("all/optimizer-exp_avg-codes.safetensors")),
                   0);
  RIG_REFUSED(flap_weights_resume(rig.pager, &rig.layout, scratch_path("all"), NULL), FLAP_INVALID,
              "all/optimizer-exp_avg-codes.safetensors", "holds tensor lm_head.weight");
  rig_close(&rig);
  rig_close(&other);
}
END_TEST

START_TEST(weights_sizes_are_those_of_the_files) {
  const flap_dtype dtype = formats[_i].dtype;
  const flap_optim optim = formats[_i].optim;
  flap_model_config config;
  weights_rig rig;
  uint64_t wanted = 0, actual = 0;
  struct stat about;
  rig_model(false, true, &config);
  rig_open_optim(&rig, &config, dtype, optim, FLAP_MODE_TRAIN, &rig_placements[1], scratch_path(""));
  RIG_OK(flap_weights_init(rig.pager, &rig.layout, 1));
  save_all(&rig, "a");
  RIG_OK(flap_weights_file_bytes(&config, dtype, SHARD_MAX, &wanted));
  ck_assert_int_eq(stat(scratch_path("a/model.safetensors"), &about), 0);
  ck_assert_uint_eq(wanted, (uint64_t)about.st_size);
  RIG_OK(flap_weights_states_bytes(&config, dtype, optim, &wanted));
  const char *files[FILES_MAX];
  const uint32_t count = files_of(dtype, optim, files);
  for (uint32_t i = 0; i + 1 < count; i++) { /* the last is the model's */
    ck_assert_int_eq(stat(scratch_path(in("a", files[i])), &about), 0);
    actual += (uint64_t)about.st_size;
  }
  ck_assert_uint_eq(wanted, actual);
  rig_close(&rig);
}
END_TEST

/* No space for an index, unless somebody gives some back meanwhile. */
static flap_system full_for_indexes;
static unsigned refused, refuse_most;

static int open_or_refuse(int folder, const char *path, int flags, mode_t mode) {
  if ((flags & O_CREAT) != 0 && strstr(path, FLAP_SAFETENSORS_INDEX) != NULL && refused < refuse_most) {
    refused++;
    errno = ENOSPC;
    return -1;
  }
  return flap_system_default()->open(folder, path, flags, mode);
}

/* As every file of a checkpoint: what was kept for it is there when a disk is full. */
START_TEST(weights_index_of_shards_takes_room_that_was_kept) {
  weights_rig rig;
  flap_model_config config;
  flap_room room = FLAP_ROOM_NONE;
  rig_model(false, true, &config);
  rig_open(&rig, &config, FLAP_BF16, FLAP_MODE_TRAIN, &rig_placements[1], scratch_path(""));
  RIG_OK(flap_weights_init(rig.pager, &rig.layout, 1));
  full_for_indexes = *flap_system_default();
  full_for_indexes.open = open_or_refuse;
  (void)flap_system_replace(&full_for_indexes);
  refuse_most = 2;
  RIG_REFUSED(flap_weights_save(rig.pager, &rig.layout, folder_path("none"), 30000, (flap_file_piece){0}, NULL),
              FLAP_NO_SPACE, FLAP_SAFETENSORS_INDEX, "");
  refused = 0;
  RIG_OK(flap_room_open(scratch_path(""), &room));
  const flap_status kept = flap_room_keep(&room, (uint64_t)1 << 20, 0);
  if (kept == FLAP_OK)
    RIG_OK(
        flap_weights_save(rig.pager, &rig.layout, folder_path("some"), 30000, (flap_file_piece){.room = &room}, NULL));
  ck_assert(kept != FLAP_OK || refused == 2);
  flap_room_close(&room);
  (void)flap_system_replace(NULL);
  rig_close(&rig);
}
END_TEST

START_TEST(weights_shards_hold_the_same_tensors) {
  flap_model_config config;
  weights_rig rig;
  rig_model(false, true, &config);
  rig_open(&rig, &config, FLAP_BF16, FLAP_MODE_TRAIN, &rig_placements[3], scratch_path(""));
  RIG_OK(flap_weights_init(rig.pager, &rig.layout, 3));
  save_all(&rig, "one");
  RIG_OK(flap_weights_save(rig.pager, &rig.layout, folder_path("many"), 30000, (flap_file_piece){0}, NULL));
  ck_assert(!scratch_exists("many/model.safetensors"));
  flap_safetensors *one = NULL, *many = NULL;
  RIG_OK(flap_safetensors_open(scratch_path("one"), &one));
  RIG_OK(flap_safetensors_open(scratch_path("many"), &many));
  ck_assert_uint_eq(flap_safetensors_count(one), flap_safetensors_count(many));
  ck_assert_str_eq(flap_safetensors_metadata(many, "format"), "pt");
  uint64_t actual = 0, wanted = 0;
  struct stat about;
  uint32_t last_file = 0;
  for (uint64_t i = 0; i < flap_safetensors_count(one); i++) {
    const flap_safetensors_tensor *a = flap_safetensors_at(one, i), *b = flap_safetensors_at(many, i);
    ck_assert_str_eq(a->name, b->name);
    ck_assert_uint_eq(a->bytes, b->bytes);
    last_file = b->file > last_file ? b->file : last_file;
    char *left = malloc(a->bytes), *right = malloc(a->bytes);
    RIG_OK(flap_safetensors_read(one, a, 0, a->bytes, left));
    RIG_OK(flap_safetensors_read(many, b, 0, b->bytes, right));
    ck_assert_mem_eq(left, right, a->bytes);
    free(left);
    free(right);
  }
  ck_assert_uint_gt(last_file, 3);
  for (uint32_t i = 0; i <= last_file; i++) {
    char name[FLAP_SAFETENSORS_SHARD_NAME_MAX];
    flap_safetensors_shard_name(i, last_file + 1, name);
    ck_assert_int_eq(stat(scratch_path(in("many", name)), &about), 0);
    actual += (uint64_t)about.st_size;
  }
  ck_assert_int_eq(stat(scratch_path("many/model.safetensors.index.json"), &about), 0);
  RIG_OK(flap_weights_file_bytes(&config, FLAP_BF16, 30000, &wanted));
  ck_assert_uint_ge(wanted, actual + (uint64_t)about.st_size);
  ck_assert_uint_le(wanted, actual + 3 * (uint64_t)about.st_size);
  flap_safetensors_close(one);
  flap_safetensors_close(many);
  rig_close(&rig);
}
END_TEST

START_TEST(weights_failed_saves_leave_no_file_behind) {
  flap_model_config config;
  weights_rig rig;
  rig_model(false, true, &config);
  rig_open(&rig, &config, FLAP_BF16, FLAP_MODE_TRAIN, &rig_placements[1], scratch_path(""));
  RIG_OK(flap_weights_init(rig.pager, &rig.layout, 3));
  const char *folder = folder_path("a");
  scratch_limit(40000);
  const flap_status weights = flap_weights_save(rig.pager, &rig.layout, folder, SHARD_MAX, (flap_file_piece){0}, NULL);
  const flap_status all = flap_weights_save_all(rig.pager, &rig.layout, folder, SHARD_MAX, (flap_file_piece){0}, NULL);
  scratch_unlimit();
  ck_assert_int_eq(weights, FLAP_NO_SPACE);
  ck_assert_int_eq(all, FLAP_NO_SPACE);
  const char *files[FILES_MAX];
  const uint32_t count = files_of(FLAP_BF16, FLAP_OPTIM_ADAMW, files);
  for (uint32_t i = 0; i < count; i++)
    ck_assert_msg(!scratch_exists(in("a", files[i])), "%s stayed", files[i]);
  save_all(&rig, "a"); /* the pager is as before */
  rig_close(&rig);
}
END_TEST

int main(void) {
  Suite *suite = suite_create("engine");
  TCase *tests = tcase_create("weights");
  tcase_add_checked_fixture(tests, scratch_setup, scratch_teardown);
  tcase_set_timeout(tests, 120);
  tcase_add_test(tests, values_halves_join_to_the_same_bits);
  tcase_add_test(tests, values_the_largest_masters_are_refused);
  tcase_add_test(tests, values_half_precision_rounds_to_nearest_even);
  tcase_add_loop_test(tests, weights_init_is_the_same_in_all_placements, 0, 2 * FORMATS);
  tcase_add_test(tests, weights_forward_layouts_hold_the_same_weights);
  tcase_add_loop_test(tests, weights_resume_gives_back_the_same_bits, 0, 2 * FORMATS);
  tcase_add_test(tests, weights_resume_refuses_other_dtypes_and_missing_states);
  tcase_add_test(tests, weights_resume_refuses_codes_that_do_not_fit);
  tcase_add_test(tests, weights_resume_refuses_an_embedding_with_8_bit_moments);
  tcase_add_loop_test(tests, weights_sizes_are_those_of_the_files, 0, FORMATS);
  tcase_add_test(tests, weights_index_of_shards_takes_room_that_was_kept);
  tcase_add_test(tests, weights_shards_hold_the_same_tensors);
  tcase_add_test(tests, weights_failed_saves_leave_no_file_behind);
  suite_add_tcase(suite, tests);
  SRunner *runner = srunner_create(suite);
  srunner_run_all(runner, CK_ENV);
  const int failed = srunner_ntests_failed(runner);
  srunner_free(runner);
  return failed == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
