#include "tools/machine_file.h"

#include "base/nearest.h"
#include "base/units.h"
#include "tools/text.h"
#include "tools/yaml_tree.h"

#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define RATE_MAX 1e24
#define NS_MAX ((int64_t)1 << 40)
#define SIZE_MAX_BYTES ((uint64_t)1 << 53) /* 8 PiB: room for what is written in a life */
#define RAM_MAX_GIB 65536u
#define PRESETS_MAX 64u

/* ---- values ---------------------------------------------------------------------------------------------- */

typedef enum field_kind {
  FIELD_RATE,
  FIELD_SIZE,
  FIELD_NS,
  FIELD_COUNT,
  FIELD_BOOL,
  FIELD_NAME,
  FIELD_DEVICE
} field_kind;

typedef struct field {
  const char *key;
  field_kind kind;
  size_t offset;
  bool required;
  double least; /* of a rate; one that may be missing may be 0 as well */
} field;

#define OF_MACHINE(member) (offsetof(flap_machine_profile, machine) + offsetof(flap_machine, member))

static const field machine_fields[] = {
    {"name", FIELD_NAME, OF_MACHINE(name), true, 0},
    {"device", FIELD_DEVICE, offsetof(flap_machine_profile, device), true, 0},
    {"vram_bytes", FIELD_SIZE, offsetof(flap_machine_profile, vram_bytes), false, 0},
    {"ram_bytes", FIELD_SIZE, offsetof(flap_machine_profile, ram_bytes), true, 0},
    {"threads", FIELD_COUNT, offsetof(flap_machine_profile, threads), false, 0},
    {"flops_bf16", FIELD_RATE, OF_MACHINE(flops_bf16), true, FLAP_MACHINE_FLOPS_MIN},
    {"flops_f32", FIELD_RATE, OF_MACHINE(flops_f32), true, FLAP_MACHINE_FLOPS_MIN},
    {"device_bytes", FIELD_RATE, OF_MACHINE(device_bytes), true, FLAP_MACHINE_MEMORY_MIN},
    {"h2d_bytes", FIELD_RATE, OF_MACHINE(h2d_bytes), true, FLAP_MACHINE_MEMORY_MIN},
    {"d2h_bytes", FIELD_RATE, OF_MACHINE(d2h_bytes), true, FLAP_MACHINE_MEMORY_MIN},
    {"h2d_both_bytes", FIELD_RATE, OF_MACHINE(h2d_both_bytes), false, FLAP_MACHINE_MEMORY_MIN},
    {"d2h_both_bytes", FIELD_RATE, OF_MACHINE(d2h_both_bytes), false, FLAP_MACHINE_MEMORY_MIN},
    {"host_bytes", FIELD_RATE, OF_MACHINE(host_bytes), true, FLAP_MACHINE_MEMORY_MIN},
    {"encode_bytes", FIELD_RATE, OF_MACHINE(encode_bytes), false, FLAP_MACHINE_MEMORY_MIN},
    {"decode_bytes", FIELD_RATE, OF_MACHINE(decode_bytes), false, FLAP_MACHINE_MEMORY_MIN},
    {"launch_ns", FIELD_NS, OF_MACHINE(launch_ns), false, 0},
    {"copy_ns", FIELD_NS, OF_MACHINE(copy_ns), false, 0},
    {"disk_ns", FIELD_NS, OF_MACHINE(disk_ns), false, 0},
    {"synchronous", FIELD_BOOL, OF_MACHINE(synchronous), false, 0},
    {"shared_cores", FIELD_COUNT, OF_MACHINE(shared_cores), false, 0},
    {"overhead_bytes", FIELD_SIZE, OF_MACHINE(overhead_bytes), false, 0},
    {"process_bytes", FIELD_SIZE, OF_MACHINE(process_bytes), false, 0},
};
static const field disk_fields[] = {
    {"size_bytes", FIELD_SIZE, offsetof(flap_profile_disk, bytes), true, 0},
    {"read_bytes", FIELD_RATE, offsetof(flap_profile_disk, read_bytes), true, FLAP_MACHINE_DISK_MIN},
    {"write_bytes", FIELD_RATE, offsetof(flap_profile_disk, write_bytes), true, FLAP_MACHINE_DISK_MIN},
    {"both_bytes", FIELD_RATE, offsetof(flap_profile_disk, both_bytes), false, FLAP_MACHINE_DISK_MIN},
    {"tbw_bytes", FIELD_SIZE, offsetof(flap_profile_disk, tbw_bytes), false, 0},
};
#define MACHINE_FIELDS (sizeof machine_fields / sizeof machine_fields[0])
#define DISK_FIELDS (sizeof disk_fields / sizeof disk_fields[0])

static flap_status wrong(const char *file, const flap_yaml_node *node, const char *key, const char *wanted) {
  flap_yaml_quote quote, value;
  const char *found = node->kind == FLAP_YAML_SEQUENCE  ? "a list"
                      : node->kind == FLAP_YAML_MAPPING ? "a mapping"
                                                        : flap_yaml_quote_text(node->text, &value);
  return flap_error_set(FLAP_INVALID, "%s:%u: %s: wanted %s, found %s", file, node->line,
                        flap_yaml_quote_text(key, &quote), wanted, found);
}

static flap_status read_device(const char *file, const flap_yaml_node *node, flap_run_device *device_out) {
  if (node->kind == FLAP_YAML_SCALAR && strcmp(node->text, "cpu") == 0)
    *device_out = FLAP_RUN_DEVICE_CPU;
  else if (node->kind == FLAP_YAML_SCALAR && strcmp(node->text, "cuda") == 0)
    *device_out = FLAP_RUN_DEVICE_CUDA;
  else
    return wrong(file, node, "device", "cpu or cuda");
  return FLAP_OK;
}

static flap_status read_rate(const char *file, const flap_yaml_node *node, const field *f, double *rate_out) {
  char wanted[96];
  double rate = 0;
  const bool is_number = flap_yaml_is_number(node, &rate);
  if (is_number && ((rate >= f->least && rate <= RATE_MAX) || (rate == 0 && !f->required))) {
    *rate_out = rate;
    return FLAP_OK;
  }
  (void)snprintf(wanted, sizeof wanted, "a rate per second of at least %.0e, such as 165e12", f->least);
  return wrong(file, node, f->key, wanted);
}

static flap_status read_field(const char *file, const flap_yaml_node *node, const field *f, void *base) {
  char *to = (char *)base + f->offset;
  int64_t integer = 0;
  uint64_t bytes = 0;
  switch (f->kind) {
  case FIELD_RATE:
    return read_rate(file, node, f, (double *)(void *)to);
  case FIELD_SIZE:
    if (node->kind != FLAP_YAML_SCALAR || flap_units_parse_bytes(node->text, &bytes) != FLAP_OK ||
        bytes > SIZE_MAX_BYTES || (f->required && bytes == 0))
      return wrong(file, node, f->key, "a size of at most 8192 TiB, such as 24GiB");
    memcpy(to, &bytes, sizeof bytes);
    return FLAP_OK;
  case FIELD_NS:
    if (!flap_yaml_is_integer(node, &integer) || integer < 0 || integer > NS_MAX)
      return wrong(file, node, f->key, "a whole number of nanoseconds");
    memcpy(to, &(uint64_t){(uint64_t)integer}, sizeof(uint64_t));
    return FLAP_OK;
  case FIELD_COUNT:
    if (!flap_yaml_is_integer(node, &integer) || integer < 0 || integer > FLAP_POOL_THREADS_MAX)
      return wrong(file, node, f->key, "a whole number of cores");
    memcpy(to, &(uint32_t){(uint32_t)integer}, sizeof(uint32_t));
    return FLAP_OK;
  case FIELD_BOOL:
    return flap_yaml_is_bool(node, (bool *)to) ? FLAP_OK : wrong(file, node, f->key, "true or false");
  case FIELD_NAME:
    if (node->kind != FLAP_YAML_SCALAR || !node->text[0])
      return wrong(file, node, f->key, "a name");
    (void)snprintf(to, sizeof((flap_machine *)0)->name, "%.63s", node->text);
    return FLAP_OK;
  case FIELD_DEVICE:
    return read_device(file, node, (flap_run_device *)(void *)to);
  }
  return FLAP_OK;
}

static const field *find_field(const field *fields, size_t count, const char *key) {
  for (size_t i = 0; i < count; i++)
    if (strcmp(fields[i].key, key) == 0)
      return &fields[i];
  return NULL;
}

static flap_status unknown(const char *file, const flap_yaml_node *node, const field *fields, size_t count) {
  const char *names[MACHINE_FIELDS + 1];
  flap_yaml_quote quote;
  for (size_t i = 0; i < count; i++)
    names[i] = fields[i].key;
  if (fields == machine_fields)
    names[count++] = "disks";
  const char *nearest = flap_nearest_word(node->key, names, count);
  return flap_error_set(FLAP_INVALID, "%s:%u: %s: unknown key of a machine%s%s", file, node->line,
                        flap_yaml_quote_text(node->key, &quote), nearest ? "; did you mean " : "",
                        nearest ? nearest : "");
}

/* Every entry of the mapping by the table; `disks` is left to the caller. */
static flap_status read_mapping(const char *file, const flap_yaml_node *mapping, const field *fields, size_t count,
                                void *base) {
  bool given[MACHINE_FIELDS] = {false};
  if (mapping->kind != FLAP_YAML_MAPPING)
    return wrong(file, mapping, "machine", "lines of the form key: value");
  for (const flap_yaml_node *node = mapping->first; node; node = node->next) {
    if (fields == machine_fields && strcmp(node->key, "disks") == 0)
      continue;
    const field *f = find_field(fields, count, node->key);
    if (!f)
      return unknown(file, node, fields, count);
    FLAP_TRY(read_field(file, node, f, base));
    given[f - fields] = true;
  }
  for (size_t i = 0; i < count; i++)
    if (fields[i].required && !given[i])
      return flap_error_set(FLAP_INVALID, "%s:%u: %s: missing", file, mapping->line, fields[i].key);
  return FLAP_OK;
}

static flap_status read_disks(const char *file, const flap_yaml_node *root, flap_machine_profile *profile) {
  for (const flap_yaml_node *node = root->first; node; node = node->next) {
    if (strcmp(node->key, "disks") != 0 || flap_yaml_is_null(node))
      continue;
    if (node->kind != FLAP_YAML_SEQUENCE)
      return wrong(file, node, "disks", "a list");
    for (const flap_yaml_node *entry = node->first; entry; entry = entry->next) {
      if (profile->disk_count == FLAP_RUN_DISKS_MAX)
        return flap_error_set(FLAP_INVALID, "%s:%u: disks: more than %d", file, entry->line, FLAP_RUN_DISKS_MAX);
      FLAP_TRY(read_mapping(file, entry, disk_fields, DISK_FIELDS, &profile->disks[profile->disk_count]));
      profile->disk_count++;
    }
  }
  return FLAP_OK;
}

/* What depends on the device is known by its kind, as for a machine that is measured. */
static flap_status find_device(const char *file, const flap_yaml_node *root, flap_run_device *device_out) {
  *device_out = FLAP_RUN_DEVICE_AUTO;
  for (const flap_yaml_node *node = root->kind == FLAP_YAML_MAPPING ? root->first : NULL; node; node = node->next)
    if (strcmp(node->key, "device") == 0)
      FLAP_TRY(read_device(file, node, device_out));
  return FLAP_OK;
}

static flap_status read_profile(const char *file, const flap_yaml_node *root, flap_machine_profile *profile) {
  flap_run_device device;
  memset(profile, 0, sizeof *profile);
  FLAP_TRY(find_device(file, root, &device));
  flap_machine defaults;
  flap_device_default_machine(device == FLAP_RUN_DEVICE_CUDA ? FLAP_DEVICE_CUDA : FLAP_DEVICE_CPU, &defaults);
  profile->machine.launch_ns = defaults.launch_ns;
  profile->machine.copy_ns = defaults.copy_ns;
  profile->machine.disk_ns = defaults.disk_ns;
  profile->machine.synchronous = defaults.synchronous;
  profile->machine.shared_cores = device == FLAP_RUN_DEVICE_CUDA ? 0 : defaults.shared_cores;
  FLAP_TRY(read_mapping(file, root, machine_fields, MACHINE_FIELDS, profile));
  FLAP_TRY(read_disks(file, root, profile));
  if (device == FLAP_RUN_DEVICE_CUDA && profile->vram_bytes == 0)
    return flap_error_set(FLAP_INVALID, "%s:%u: vram_bytes: missing: a card has memory of its own", file, root->line);
  if (profile->threads == 0)
    profile->threads = profile->machine.shared_cores > 0 ? profile->machine.shared_cores : 1;
  return FLAP_OK;
}

flap_status flap_machine_file_parse(const char *name, const char *text, size_t bytes,
                                    flap_machine_profile *profile_out) {
  flap_yaml_node *root = NULL;
  FLAP_TRY(flap_yaml_parse(name, text, bytes, &root));
  flap_status status = read_profile(name, root, profile_out);
  flap_yaml_free(root);
  return status;
}

/* ---- presets --------------------------------------------------------------------------------------------- */

typedef struct preset_name {
  const flap_machine_preset *preset;
  uint32_t ram_gib, disks;
  bool has_ram, has_disks;
} preset_name;

/* "-<digits><unit>" at *text, which is then behind it. */
static bool read_suffix(const char **text, const char *unit, uint32_t *value_out) {
  const char *at = *text;
  char *end = NULL;
  if (at[0] != '-' || at[1] < '0' || at[1] > '9')
    return false;
  unsigned long value = strtoul(at + 1, &end, 10);
  size_t length = strlen(unit);
  if (strncmp(end, unit, length) != 0 || (end[length] != '\0' && end[length] != '-') || value > UINT32_MAX)
    return false;
  *value_out = (uint32_t)value;
  *text = end + length;
  return true;
}

/* The longest preset that `name` starts with, and what it says behind that. */
static bool split_name(const char *name, preset_name *out) {
  *out = (preset_name){.preset = NULL};
  size_t longest = 0;
  for (const flap_machine_preset *p = flap_machine_presets; p->name; p++) {
    size_t length = strlen(p->name);
    if (strncmp(name, p->name, length) == 0 && length > longest && (name[length] == '\0' || name[length] == '-')) {
      out->preset = p;
      longest = length;
    }
  }
  const char *rest = name + longest;
  if (!out->preset)
    return false;
  out->has_ram = read_suffix(&rest, "g", &out->ram_gib);
  out->has_disks = read_suffix(&rest, "nvme", &out->disks);
  return *rest == '\0' && (!out->has_ram || (out->ram_gib > 0 && out->ram_gib <= RAM_MAX_GIB)) &&
         out->disks <= FLAP_RUN_DISKS_MAX;
}

static flap_status load_preset(const preset_name *name, flap_machine_profile *profile) {
  FLAP_TRY(flap_machine_file_parse(name->preset->name, name->preset->text, strlen(name->preset->text), profile));
  if (name->has_ram)
    profile->ram_bytes = name->ram_gib * FLAP_GIB;
  for (uint32_t i = 1; name->has_disks && i < name->disks; i++)
    profile->disks[i] = profile->disks[0];
  if (name->has_disks)
    profile->disk_count = name->disks;
  char base[sizeof profile->machine.name];
  memcpy(base, profile->machine.name, sizeof base);
  (void)snprintf(profile->machine.name, sizeof profile->machine.name, "%.28s, %u GiB RAM, %u NVMe", base,
                 (uint32_t)((profile->ram_bytes + FLAP_GIB / 2) / FLAP_GIB), profile->disk_count);
  return FLAP_OK;
}

static flap_status unknown_preset(const char *name) {
  const char *names[PRESETS_MAX];
  size_t count = 0;
  for (const flap_machine_preset *p = flap_machine_presets; p->name && count < PRESETS_MAX; p++)
    names[count++] = p->name;
  flap_yaml_quote quote;
  const char *nearest = flap_nearest_word(name, names, count);
  return flap_error_set(
      FLAP_NOT_FOUND,
      "%s is no machine that is known%s%s: flap plan --list-machines lists them; a file is named with "
      "its .yaml or .json",
      flap_yaml_quote_text(name, &quote), nearest ? "; did you mean " : "", nearest ? nearest : "");
}

static bool ends_in(const char *text, const char *end) {
  size_t a = strlen(text), b = strlen(end);
  return a > b && strcmp(text + a - b, end) == 0;
}

flap_status flap_machine_file_load(const char *name, flap_machine_profile *profile_out) {
  static const char *const endings[] = {".yaml", ".yml", ".json"};
  preset_name split;
  bool is_file = strchr(name, '/') != NULL;
  char stem[64] = "";
  for (size_t i = 0; i < sizeof endings / sizeof endings[0]; i++)
    if (ends_in(name, endings[i])) {
      if (!is_file && strlen(name) < sizeof stem)
        (void)snprintf(stem, sizeof stem, "%.*s", (int)(strlen(name) - strlen(endings[i])), name);
      is_file = true;
    }
  if (!is_file)
    return split_name(name, &split) ? load_preset(&split, profile_out) : unknown_preset(name);
  if (stem[0] && access(name, F_OK) != 0 && split_name(stem, &split))
    return load_preset(&split, profile_out);
  flap_yaml_node *root = NULL;
  FLAP_TRY(flap_yaml_load(name, &root));
  flap_status status = read_profile(name, root, profile_out);
  flap_yaml_free(root);
  return status;
}

flap_status flap_machine_file_list(FILE *out) {
  fprintf(out, "%-22s%-30s%12s%12s%8s\n", "machine", "", "vram", "ram", "disks");
  for (const flap_machine_preset *p = flap_machine_presets; p->name; p++) {
    flap_machine_profile profile;
    FLAP_TRY(flap_machine_file_parse(p->name, p->text, strlen(p->text), &profile));
    fprintf(out, "%-22s%-30.29s%12s%12s%8u\n", p->name, profile.machine.name, flap_text_bytes(profile.vram_bytes).text,
            flap_text_bytes(profile.ram_bytes).text, profile.disk_count);
  }
  fputs("\nOther sizes behind the name: machine=rtx4090-128g-2nvme has 128 GiB of RAM and two such disks. A file of "
        "one's\n"
        "own is named with its ending: machine=mine.yaml; `flap bench machine --path <disk> --json` writes one.\n",
        out);
  return FLAP_OK;
}
