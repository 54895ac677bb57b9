"""What a person does wrong, to the whole program with its real engine. Usage: test_bad_input.py <flap>

Every mistake ends within seconds with exit status 1 and exactly one line "flap: error: ..." that names the file, the key or
the budget and says what to do; no output_dir appears or changes, and no *.tmp stays anywhere. Then what is nobody's mistake:
numbers that overflow, Ctrl-C, and disks that fill up, which must not cost more than the steps since the last checkpoint.

Exit status 77 where the program was not built. FLAP_TEST_ROW=<text> runs only the rows of tables whose name holds it."""
import hashlib
import json
import os
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import unittest

FLAP = os.path.abspath(sys.argv.pop(1)) if len(sys.argv) > 1 else ""
if not os.path.isfile(FLAP):
    print("skipped: there is no flap program with a real engine in this build")
    sys.exit(77)
with open(FLAP, "rb") as program:
    SANITIZED = re.search(rb"__[at]san_init", program.read()) is not None
SECONDS_MAX = 60 if SANITIZED else 5
long_when_sanitized = unittest.skipIf(SANITIZED, "takes long under a sanitizer; test_planner_least has the rest there")
ONLY = os.environ.get("FLAP_TEST_ROW", "")

HIDDEN, INNER, LAYERS, VOCABULARY = 32, 64, 2, 257
MODEL = {"model_type": "llama", "hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": LAYERS,
         "num_attention_heads": 2, "max_position_embeddings": 64, "tie_word_embeddings": True}
CONFIG = {**MODEL, "vocab_size": VOCABULARY, "num_key_value_heads": 2, "rms_norm_eps": 1e-5,
          "architectures": ["LlamaForCausalLM"], "torch_dtype": "float32"}
RUN = f"""model: {json.dumps(MODEL)}
tokenizer: bytes
dataset: text.txt
cutoff_len: 32
per_device_train_batch_size: 2
gradient_accumulation_steps: 2
max_steps: 4
learning_rate: 1e-2
logging_steps: 1
save_strategy: no
output_dir: out
vram: 4MiB
ram: 16MiB
disk: {{path: disk, size: 16MiB}}
device: cpu
expert: {{threads: 1}}
"""
LINE = RUN.count("\n") + 1  # of what is appended
TEXT = "".join(f"The {n}th line says that {n} and {n + 1} make {2 * n + 1}.\n" for n in range(1300))  # 64 KB

# ---- files ----------------------------------------------------------------------------------------------------


def write(path, content):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "wb" if isinstance(content, bytes) else "w") as file:
        file.write(content)


def shapes():
    yield "model.embed_tokens.weight", [VOCABULARY, HIDDEN]
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        for name in "qkvo":
            yield f"{prefix}self_attn.{name}_proj.weight", [HIDDEN, HIDDEN]
        yield prefix + "mlp.gate_proj.weight", [INNER, HIDDEN]
        yield prefix + "mlp.up_proj.weight", [INNER, HIDDEN]
        yield prefix + "mlp.down_proj.weight", [HIDDEN, INNER]
        yield prefix + "input_layernorm.weight", [HIDDEN]
        yield prefix + "post_attention_layernorm.weight", [HIDDEN]
    yield "model.norm.weight", [HIDDEN]


def tensors():
    """Name to (dtype, shape, bytes); small values that differ."""
    made = {}
    for name, shape in shapes():
        count = shape[0] * (shape[1] if len(shape) > 1 else 1)
        values = [1.0 if "norm" in name else ((i * 2654435761 + len(name)) % 2001 - 1000) * 2e-5 for i in range(count)]
        made[name] = ("F32", shape, struct.pack(f"<{count}f", *values))
    return made


def safetensors(entries, edit=None):
    header, offset = {}, 0
    for name, (dtype, shape, data) in entries.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + len(data)]}
        offset += len(data)
    if edit:
        edit(header)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + b"".join(data for _, _, data in entries.values())


def shard(ids, magic=20240520, version=1, count=None):
    header = struct.pack("<3i", magic, version, len(ids) if count is None else count)
    return header.ljust(1024, b"\0") + struct.pack(f"<{len(ids)}H", *ids)


def truncated(content):
    return content[:len(content) * 2 // 3]


def make_models(folder):
    """Folders with one thing wrong each, beside `good`, which has none."""
    good = tensors()
    down = "model.layers.1.mlp.down_proj.weight"

    def model(name, weights=None, config=CONFIG, files=None):
        write(f"{folder}/{name}/config.json", config if isinstance(config, str) else json.dumps(config))
        if weights is not None:
            write(f"{folder}/{name}/model.safetensors", weights)
        for path, content in (files or {}).items():
            write(f"{folder}/{name}/{path}", content)

    def edited(edit):
        return safetensors(good, edit)

    def offsets(begin, end):
        return lambda header: header[down].update(data_offsets=[begin, end])

    model("good", safetensors(good))
    model("w-empty", b"")
    model("w-truncated", truncated(safetensors(good)))
    model("w-no-header", b"\xff" * 4096)
    model("w-huge-header", struct.pack("<Q", 1 << 60) + b"{}")
    model("w-long-header", struct.pack("<Q", 4096) + b"{}")
    model("w-no-json", struct.pack("<Q", 16) + b'{"a": nonsense}}')
    model("w-list", struct.pack("<Q", 2) + b"[]")
    model("w-deep", struct.pack("<Q", 40000) + b'{"a":' * 8000)
    model("w-beyond", edited(offsets(0, 1 << 50)))
    model("w-backwards", edited(offsets(8192, 0)))
    model("w-negative", edited(offsets(-8192, 0)))
    model("w-overlap", edited(offsets(0, HIDDEN * INNER * 4)))
    model("w-overflow", edited(lambda header: header[down].update(shape=[1 << 40, 1 << 40])))
    model("w-dtype", edited(lambda header: header[down].update(dtype="Q4_K")))
    model("w-text-shape", edited(lambda header: header[down].update(shape="32x64")))
    model("w-missing", safetensors({name: entry for name, entry in good.items() if name != down}))
    turned = dict(good)
    turned[down] = ("F32", [INNER, HIDDEN], good[down][2])
    model("w-shape", safetensors(turned))
    values = bytearray(good[down][2])
    values[400:404] = struct.pack("<f", float("nan"))
    model("w-nan", safetensors({**good, down: ("F32", [HIDDEN, INNER], bytes(values))}))
    index = {"metadata": {}, "weight_map": {name: "../good/model.safetensors" for name in good}}
    model("w-outside", files={"model.safetensors.index.json": json.dumps(index)})
    index["weight_map"] = {name: "model-1.safetensors" for name in good}
    model("w-no-shard", files={"model.safetensors.index.json": json.dumps(index)})
    model("w-none")
    model("c-malformed", safetensors(good), '{"model_type": "llama", "hidden_size": ')
    model("c-empty", safetensors(good), "")
    model("c-list", safetensors(good), "[1, 2]")
    model("c-deep", safetensors(good), "[" * 100000)
    model("c-family", safetensors(good), {**CONFIG, "model_type": "gpt9"})
    model("c-text", safetensors(good), {**CONFIG, "hidden_size": "large"})
    model("c-negative", safetensors(good), {**CONFIG, "num_hidden_layers": -1})
    model("c-heads", safetensors(good), {**CONFIG, "num_attention_heads": 5, "num_key_value_heads": 5})
    model("c-huge", safetensors(good), {**CONFIG, "hidden_size": 4294967295, "num_attention_heads": 1})
    model("c-none", safetensors(good))
    os.remove(f"{folder}/c-none/config.json")
    model("c-missing-key", safetensors(good), {key: CONFIG[key] for key in CONFIG if key != "intermediate_size"})
    model("t-malformed", safetensors(good), files={"tokenizer.json": '{"model": {"type": "BPE", "vocab": {"a": 0'})
    model("t-unigram", safetensors(good), files={"tokenizer.json": '{"model": {"type": "Unigram"}}'})
    model("t-list", safetensors(good), files={"tokenizer.json": "[]"})
    model("t-merges", safetensors(good), files={"tokenizer.json": json.dumps(
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
         "decoder": {"type": "ByteLevel"}, "model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": ["x y"]}})})


def make_files(folder):
    os.mkdir(f"{folder}/disk")
    for name, content in {
            "run.yaml": RUN, "text.txt": TEXT, "empty.txt": "", "short.txt": "short",
            "bad.jsonl": '{"text": "fine"}\n{"text": 5}\n', "torn.jsonl": '{"text": "fine"}\n{"text": "cut o',
            "image.png": b"\x89PNG" * 99, "bad.bin": b"x" * 4096, "tiny.bin": b"x" * 100,
            "cut.bin": truncated(shard([7] * 3000)), "count.bin": shard(range(200), count=-5),
            "version.bin": shard(range(200), version=9), "ids.bin": shard([i % 256 for i in range(3000)] + [60000]),
            "tokenizer.json": '{"model": {"type": "Unigram"}}',
            "malformed.yaml": RUN + "vram: [1\n", "tab.yaml": RUN + "seed:\n\t- 1\n", "twice.yaml": RUN + "vram: 1MiB\n",
            "list.yaml": "- a\n- b\n", "empty.yaml": "", "anchor.yaml": RUN + "seed: &a 1\n", "binary.yaml": bytes(range(256)),
            "deep.yaml": "a: " + "[" * 5000, "key.yaml": RUN + "learning_rat: 1\n", "type.yaml": RUN + "seed: [1]\n"}.items():
        write(f"{folder}/{name}", content)
    make_models(folder)


def snapshot(folder):
    """Every name below, with what it holds."""
    found = {}
    for where, folders, files in os.walk(folder):
        for name in folders:
            found[os.path.join(where, name)] = "folder"
        for name in files:
            with open(os.path.join(where, name), "rb") as file:
                found[os.path.join(where, name)] = hashlib.sha256(file.read()).hexdigest()
    return found


def temporaries(folder):
    return [path for path in snapshot(folder) if re.search(r"\.tmp(\.old)?$", path)]


# ---- rows: name, arguments, patterns that the error must match -------------------------------------------------


def folder_row(name, *patterns):
    return (name, ["train", "run.yaml", "model=null", f"model_name_or_path={name}"], patterns)


SIZE = r"\d+(\.\d+)? ?([KMG]i?B|B|bytes)"
ROWS = [
    ("disk path missing", ["train", "run.yaml", "disk=nowhere"], ["disk", "nowhere", "no such folder: make it, or name another"]),
    ("disk path is a file", ["train", "run.yaml", "disk=text.txt"], ["disk", r"text\.txt"]),
    ("disk larger than it is", ["train", "run.yaml", "disk={path: disk, size: 100PB}"], ["disk", SIZE]),
    ("output_dir below a file", ["train", "run.yaml", "output_dir=text.txt/out"], [r"text\.txt"]),
    ("output_dir is a file", ["train", "run.yaml", "output_dir=text.txt"], [r"text\.txt"]),
    ("output_dir with an endless name", ["train", "run.yaml", "output_dir=" + "x" * 5000], ["output_dir"]),
    # keys and types
    ("unknown key", ["train", "run.yaml", "learning_rat=1"], ["command line: learning_rat: .*did you mean learning_rate"]),
    ("unknown key in a file", ["train", "key.yaml"], [rf"key\.yaml:{LINE}: learning_rat: .*did you mean learning_rate"]),
    ("unknown model key", ["plan", "run.yaml", "model.hidden_sise=64"], ["hidden_sise", "did you mean hidden_size"]),
    ("unknown expert key", ["train", "run.yaml", "expert.clipp=fold"], ["did you mean expert.clip"]),
    ("text for a number", ["train", "run.yaml", "learning_rate=fast"], ["learning_rate: wanted a number, found fast"]),
    ("number that is none", ["train", "run.yaml", "learning_rate=.nan"], ["learning_rate: wanted a number"]),
    ("fraction for a count", ["train", "run.yaml", "max_steps=1.5"], ["max_steps: wanted a whole number"]),
    ("word for a boolean", ["train", "run.yaml", "bf16=maybe"], ["bf16: wanted true or false"]),
    ("no size", ["train", "run.yaml", "vram=24 bananas"], ["vram: wanted a size"]),
    ("list for a number in a file", ["train", "type.yaml"], [rf"type\.yaml:{LINE}: seed: wanted a whole number, found a list"]),
    ("mapping for a path", ["train", "run.yaml", "dataset={a: b}"], ["dataset: wanted a path"]),
    ("text for a model", ["train", "run.yaml", "model=llama"], ["model: wanted a mapping"]),
    ("text for a model's size", ["plan", "run.yaml", "model.hidden_size=big"], ["hidden_size: must be an integer, not a string"]),
    ("heads that do not divide", ["plan", "run.yaml", "model.num_attention_heads=5"], ["num_attention_heads", "5"]),
    ("vocabulary below the tokenizer's", ["train", "run.yaml", "model.vocab_size=100"], ["vocab_size|vocabulary", "100", "257"]),
    ("sequences beyond the model's positions", ["train", "run.yaml", "cutoff_len=65"],
     ["cutoff_len", "65", "64", "max_position_embeddings"]),
    ("sequences of a default length beyond the model's positions", ["train", "run.yaml", "cutoff_len=null"],
     ["cutoff_len: missing", "default of 2048", "64", "max_position_embeddings"]),
    ("unknown device", ["train", "run.yaml", "device=gpu"], ["device: wanted one of auto, cpu, cuda, found gpu"]),
    ("fp16 beside bf16", ["train", "run.yaml", "fp16=true", "bf16=true"], ["fp16: contradicts bf16"]),
    ("loss scale that is no power of two", ["train", "run.yaml", "fp16=true", "fp16_init_scale=1000"],
     ["fp16_init_scale: 1000 must be a power of two"]),
    ("model twice", ["train", "run.yaml", "model_name_or_path=good"], ["model_name_or_path: contradicts model"]),
    # YAML
    ("no such configuration", ["train", "nothing.yaml"], [r"nothing\.yaml: cannot open"]),
    ("malformed YAML", ["train", "malformed.yaml"], [r"malformed\.yaml:\d+: "]),
    ("tab in YAML", ["train", "tab.yaml"], [rf"tab\.yaml:{LINE + 1}: not YAML"]),
    ("key twice", ["train", "twice.yaml"], [rf"twice\.yaml:{LINE}: vram: given twice \(first on line \d+\)"]),
    ("list for a configuration", ["train", "list.yaml"], [r"list\.yaml: wanted lines of the form key: value"]),
    ("empty configuration", ["train", "empty.yaml"], [r"empty\.yaml: "]),
    ("anchor", ["train", "anchor.yaml"], [rf"anchor\.yaml:{LINE}: anchors"]),
    ("binary configuration", ["train", "binary.yaml"], [r"binary\.yaml: "]),
    ("deep configuration", ["train", "deep.yaml"], [r"deep\.yaml:1: nested more than \d+ deep"]),
    ("folder for a configuration", ["train", "good"], ["good: a folder"]),
    # data
    ("missing dataset", ["train", "run.yaml", "dataset=nothing.txt"], ["dataset: nothing.txt", "No such file|no file"]),
    ("glob without a match", ["train", "run.yaml", "dataset=nothing*.txt"], [r"dataset: nothing\*\.txt matches no file"]),
    ("folder for data", ["train", "run.yaml", "dataset=good"], ["dataset: good is a folder; name files"]),
    ("unknown kind of data", ["train", "run.yaml", "dataset=image.png"], [r"image\.png.*\.txt, \.jsonl or \.bin"]),
    ("empty dataset", ["train", "run.yaml", "dataset=empty.txt"], [r"dataset: empty\.txt: ", "too few", "add text"]),
    ("dataset with too few tokens", ["train", "run.yaml", "dataset=short.txt"],
     [r"dataset: short\.txt: [56] tokens are too few: one sequence takes 33", "add text"]),
    ("too few tokens to hold out", ["train", "run.yaml", "val_size=100000"], ["lower val_size"]),
    ("text that is none in JSON lines", ["train", "run.yaml", "dataset=bad.jsonl"], [r"bad\.jsonl:2"]),
    ("JSON lines that were cut", ["train", "run.yaml", "dataset=torn.jsonl"], [r"torn\.jsonl:2"]),
    ("shard with bad magic", ["train", "run.yaml", "dataset=bad.bin"], [r"bad\.bin: not a token shard"]),
    ("shard below its header", ["train", "run.yaml", "dataset=tiny.bin"], [r"tiny\.bin: 100 bytes are too few"]),
    ("shard that was cut", ["train", "run.yaml", "dataset=cut.bin"], [r"cut\.bin: its header counts 3000 tokens"]),
    ("shard with a negative count", ["train", "run.yaml", "dataset=count.bin"], [r"count\.bin: its header counts -5"]),
    ("shard of another version", ["train", "run.yaml", "dataset=version.bin"], [r"version\.bin: version 9"]),
    ("shard beyond the vocabulary", ["train", "run.yaml", "dataset=ids.bin"],
     [r"ids\.bin: token 3000 has the id 60000, but the vocabulary has only 257"]),
    ("missing tokenizer", ["train", "run.yaml", "tokenizer=nothing.json"], [r"nothing\.json"]),
    ("unsupported tokenizer", ["train", "run.yaml", "tokenizer=tokenizer.json"], [r"tokenizer\.json: .*Unigram.*not supported"]),
    # folders
    ("missing model", ["train", "run.yaml", "model=null", "model_name_or_path=nothing"], ["model_name_or_path: nothing is not a folder here"]),
    folder_row("w-empty", r"w-empty/model\.safetensors: 0 bytes are too few"),
    folder_row("w-truncated", r"w-truncated/model\.safetensors: "),
    folder_row("w-no-header", r"w-no-header/model\.safetensors: a header of"),
    folder_row("w-huge-header", r"w-huge-header/model\.safetensors: a header of"),
    folder_row("w-long-header", r"w-long-header/model\.safetensors: cut short"),
    folder_row("w-no-json", r"w-no-json/model\.safetensors: header, byte \d+"),
    folder_row("w-list", r"w-list/model\.safetensors: the header does not start with \{"),
    folder_row("w-deep", r"w-deep/model\.safetensors: "),
    folder_row("w-beyond", r"w-beyond/model\.safetensors: .*down_proj"),
    folder_row("w-backwards", r"w-backwards/model\.safetensors: .*down_proj"),
    folder_row("w-negative", r"w-negative/model\.safetensors: .*down_proj"),
    folder_row("w-overlap", r"w-overlap/model\.safetensors: "),
    folder_row("w-overflow", r"w-overflow/model\.safetensors: .*down_proj"),
    folder_row("w-dtype", r"w-dtype/model\.safetensors: .*down_proj.*Q4_K"),
    folder_row("w-text-shape", r"w-text-shape/model\.safetensors: .*down_proj"),
    folder_row("w-missing", r"w-missing.*model\.layers\.1\.mlp\.down_proj\.weight"),
    folder_row("w-shape", r"w-shape.*model\.layers\.1\.mlp\.down_proj\.weight", "64.*32", "32.*64"),
    folder_row("w-nan", r"w-nan.*model\.layers\.1\.mlp\.down_proj\.weight", "(?i)nan|finite"),
    folder_row("w-outside", r"w-outside/model\.safetensors\.index\.json: .*\.\./good"),
    folder_row("w-no-shard", r"w-no-shard/model-1\.safetensors"),
    folder_row("w-none", "w-none: holds neither model.safetensors nor"),
    folder_row("c-malformed", r"c-malformed/config\.json:1:"),
    folder_row("c-empty", r"c-empty/config\.json"),
    folder_row("c-list", r"c-list/config\.json: must hold an object"),
    folder_row("c-deep", r"c-deep/config\.json"),
    folder_row("c-family", r"c-family/config\.json", "model_type", "gpt9", "llama"),
    folder_row("c-text", r"c-text/config\.json: .*hidden_size"),
    folder_row("c-negative", r"c-negative/config\.json: .*num_hidden_layers"),
    folder_row("c-heads", "num_attention_heads"),
    folder_row("c-huge", "c-huge|hidden_size"),
    folder_row("c-none", r"c-none/config\.json"),
    folder_row("c-missing-key", r"c-missing-key/config\.json: .*intermediate_size"),
    *[(name, ["train", "run.yaml", "model=null", f"model_name_or_path={name}", "tokenizer=null"],
       [rf"{name}/tokenizer\.json"]) for name in ("t-malformed", "t-unigram", "t-list", "t-merges")],
    ("no tokenizer anywhere", ["train", "run.yaml", "model=null", "model_name_or_path=good", "tokenizer=null"],
     [r"tokenizer"]),
    ("an optimizer that there is not", ["train", "run.yaml", "optim=adamw_4bit"],
     ["optim: wanted adamw or adamw_8bit, found adamw_4bit"]),
    # resuming
    ("resume without a checkpoint", ["train", "run.yaml", "resume_from_checkpoint=true"], ["checkpoint", r"\bout\b"]),
    ("resume from nowhere", ["train", "run.yaml", "resume_from_checkpoint=nothing"], ["nothing"]),
    ("resume from a plain model", ["train", "run.yaml", "resume_from_checkpoint=good"], ["good", "trainer_state|weights only"]),
    # other subcommands
    ("sample from a broken model", ["sample", "w-truncated", "tokenizer=bytes"], [r"w-truncated/model\.safetensors"]),
    ("sample from nothing", ["sample", "nothing"], ["nothing"]),
    ("evaluate a model with the wrong shape", ["eval", "w-shape", "dataset=text.txt", "tokenizer=bytes"], ["down_proj"]),
    ("export of a broken model", ["export", "w-missing", "exported"], ["down_proj"]),
    ("export of nothing", ["export", "nothing", "exported"], ["nothing"]),
    ("inspect a broken model", ["inspect", "w-huge-header"], [r"w-huge-header/model\.safetensors"]),
]


def computed():
    """Seconds of the processor that programs took so far: other work on the machine makes them no more."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


class Case(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.holder = tempfile.TemporaryDirectory(prefix="flap-bad-")
        cls.addClassCleanup(cls.holder.cleanup)
        cls.folder = f"{cls.holder.name}/work"
        # The machine is measured once, outside of what is compared.
        cls.environment = {**os.environ, "FLAP_MACHINE": f"{cls.holder.name}/machine.json", "FLAP_LOG": "error"}
        os.mkdir(cls.folder)
        make_files(cls.folder)
        done = subprocess.run([FLAP, "plan", "run.yaml"], cwd=cls.folder, capture_output=True, text=True, timeout=120,
                              env=cls.environment)
        assert done.returncode == 0, f"the correct run.yaml is refused: {done.stderr}"

    def path(self, name):
        return os.path.join(self.folder, name)

    def flap(self, *arguments, **more):
        return subprocess.run([FLAP, *arguments], cwd=self.folder, capture_output=True, text=True, timeout=180,
                              env=self.environment, **more)

    def accept(self, *arguments):
        done = self.flap(*arguments)
        self.assertEqual(done.returncode, 0, (arguments, done.stdout, done.stderr))
        return done.stdout

    def error_line(self, done):
        """The one line of a failure."""
        self.assertEqual(done.returncode, 1, done)
        self.assertEqual(done.stderr.count("\n"), 1, done.stderr)
        self.assertTrue(done.stderr.startswith("flap: error: "), done.stderr)
        return done.stderr

    def refuse(self, arguments, patterns, **more):
        before, start = snapshot(self.folder), computed()
        done = self.flap(*arguments, **more)
        seconds = computed() - start
        line = self.error_line(done)
        for pattern in patterns:
            self.assertRegex(line, pattern)
        self.assertLess(seconds, SECONDS_MAX)
        after = snapshot(self.folder)
        self.assertEqual({path for path in before.keys() | after.keys() if before.get(path) != after.get(path)}, set())
        return line

    def train_until(self, arguments, step):
        """Starts a run and returns it when it has printed that step, with its output so far."""
        process = subprocess.Popen([FLAP, "train", *arguments], cwd=self.folder, stdout=subprocess.PIPE,
                                   stderr=subprocess.PIPE, text=True, env=self.environment)
        seen = []
        for line in process.stdout:
            seen.append(line)
            if line.startswith(f"step {step}/"):
                break
        return process, "".join(seen)

    def bytes_of(self, name):
        with open(self.path(name), "rb") as file:
            return file.read()

    def checkpoints(self, name):
        found = [int(entry[len("checkpoint-"):]) for entry in os.listdir(self.path(name)) if
                 re.fullmatch(r"checkpoint-\d+", entry)]
        return [f"{name}/checkpoint-{step}" for step in sorted(found)]


class Refusals(Case):
    def test_rows(self):
        rows = [row for row in ROWS if ONLY in row[0]]
        self.assertEqual(len({name for name, _, _ in rows}), len(rows), "names are unique")
        for name, arguments, patterns in rows:
            with self.subTest(name):
                self.refuse(arguments, patterns)

    def test_what_the_rows_break_works_when_whole(self):
        self.accept("train", "run.yaml", "model=null", "model_name_or_path=good", "output_dir=whole", "max_steps=1")
        self.assertEqual(temporaries(self.folder), [])
        shutil.rmtree(self.path("whole"))

    def test_nothing_was_left(self):
        self.assertEqual(temporaries(self.folder), [])


class Budgets(Case):
    # A model whose states do not fit the smallest memory, with layers enough to stream.
    BASE = ["run.yaml", "model.hidden_size=64", "model.intermediate_size=256", "model.num_hidden_layers=6"]

    def plan(self, *overrides):
        return json.loads(self.accept("plan", *self.BASE, "--json", *overrides))

    def smallest(self, line, given_bytes):
        """The largest size that the message names beside the given one, as text and in bytes."""
        units = {"": 1, "B": 1, "bytes": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "KB": 10**3, "MB": 10**6, "GB": 10**9}
        named = {}
        for number, unit in re.findall(r"\b(\d+(?:\.\d+)?) ?(bytes|KiB|MiB|GiB|KB|MB|GB|B)\b", line):
            size = int(float(number) * units[unit])
            if size > given_bytes:
                named[size] = f"{number}{'' if unit == 'bytes' else unit}"
        self.assertTrue(named, f"names no size: {line}")
        return max(named.items())

    def check_memory(self, key, *others):
        line = self.refuse(["train", *self.BASE, f"{key}=16KiB", *others], [rf"\b{key}\b"])
        size, text = self.smallest(line, 16 << 10)
        plan = self.plan(f"{key}={text}", *others)
        self.assertLessEqual(plan[f"{key}_bytes"], size)
        # The planner does not try every candidate for the least, so in KiB a little less of ram may work as well.
        less = size * 9 // 10 if key == "vram" else size // 2
        self.refuse(["plan", *self.BASE, f"{key}={less}", *others], [rf"\b{key}\b"])
        return text

    def test_vram_too_small_names_the_smallest_that_works(self):
        text = self.check_memory("vram")
        self.accept("train", *self.BASE, f"vram={text}", "output_dir=smallest", "max_steps=2")
        shutil.rmtree(self.path("smallest"))

    def test_vram_too_small_is_quoted_as_it_was_given(self):
        for given, quoted in [("1KiB", "1.00 KiB (1024 bytes)"), ("4", "4 B (4 bytes)"), ("5000", "4.88 KiB (5000 bytes)")]:
            self.refuse(["plan", "run.yaml", f"vram={given}"], ["vram: " + re.escape(quoted) + " is too small"])

    def test_ram_too_small_names_the_smallest_that_works(self):
        self.check_memory("ram", "vram=min")

    @long_when_sanitized
    def test_min_of_one_tier_does_not_hide_that_another_is_too_small(self):
        self.check_memory("vram", "ram=min")
        self.check_memory("ram", "vram=min", "disk=null")
        self.refuse(["train", *self.BASE, "vram=64KiB", "ram=64KiB"], [r"\b(vram|ram)\b", SIZE + "|min"])

    @long_when_sanitized
    def test_disk_too_small_or_absent_is_named(self):
        least = self.plan("vram=min", "ram=min")
        self.assertGreater(least["disk_bytes"], 1 << 20)
        memory = [f"vram={least['vram_bytes']}", f"ram={least['ram_bytes']}"]
        self.refuse(["train", *self.BASE, *memory, "disk={path: disk, size: 64KiB}"], [r"\b(disk|ram)\b", SIZE])
        self.refuse(["train", *self.BASE, *memory, "disk=null"], [r"\b(disk|ram)\b", SIZE])
        self.accept("plan", *self.BASE, *memory)

    def test_disks_on_one_file_system_share_what_is_free(self):
        for name in "one", "other":
            os.mkdir(self.path(name))
            self.addCleanup(os.rmdir, self.path(name))
        alone = self.plan("disk=one")["disk_budget"]
        if alone == 0:
            self.skipTest("less than a GiB is free here")
        both = self.plan("disk=[one, other]")
        self.assertEqual(both["disk_sizes"][0], both["disk_sizes"][1])
        self.assertLess(both["disk_budget"], 1.5 * alone)  # others may fill or free some meanwhile
        beside = self.plan(f"disk=[{{path: one, size: {alone // 2}}}, other]")
        self.assertLess(beside["disk_budget"], 1.5 * alone)

    def test_one_folder_of_two_names_is_refused(self):
        os.symlink("disk", self.path("link-to-disk"))
        self.addCleanup(os.remove, self.path("link-to-disk"))
        for other in "link-to-disk", "disk/", "./disk":
            self.refuse(["plan", "run.yaml", f"disk=[disk, {other}]"], [f"disk: disk and {other} are the same folder"])

    @long_when_sanitized
    def test_steps_too_long_to_plan_are_refused_at_once(self):
        layers = 3
        most = 65536 // layers
        for steps in (most + 1, 1000000, 4294967295):
            self.refuse(["plan", "run.yaml", f"model.num_hidden_layers={layers}", "per_device_train_batch_size=1",
                         "cutoff_len=8", f"gradient_accumulation_steps={steps}"],
                        [f"gradient_accumulation_steps: {steps} micro-batches", f"the {most} that", "larger per_device_train_batch_size"])
        for many in 1025, 65536:
            self.refuse(["plan", "run.yaml", f"model.num_hidden_layers={many}"], [f"num_hidden_layers: {many}", "1024"])
        self.accept("plan", "run.yaml", "model.num_hidden_layers=1", "gradient_accumulation_steps=1000", "ram=64MiB")

    def test_vram_beyond_every_machine_is_refused(self):
        for huge in ["vram=100TB"], ["per_device_train_batch_size=67108863", "model.hidden_size=2048"]:
            self.refuse(["train", "run.yaml", *huge], [r"\bvram\b", "more than can be planned with", "lower vram, or the batch"])
        self.refuse(["train", "run.yaml", "per_device_train_batch_size=4294967295"],
                    [r"per_device_train_batch_size: 4294967295 sequences of 32 tokens \(cutoff_len\)"])


class Runs(Case):
    SAVING = ["run.yaml", "save_strategy=steps", "save_steps=1", "save_total_limit=2"]

    def test_output_dir_of_an_earlier_run_is_kept_unless_told(self):
        self.accept("train", *self.SAVING, "output_dir=used")
        self.refuse(["train", *self.SAVING, "output_dir=used"], ["used", "overwrite_output_dir"])
        self.refuse(["train", "run.yaml", "output_dir=used"], ["used", "overwrite_output_dir"])
        write(self.path("used/mine.txt"), "not FLAP's")
        self.accept("train", "run.yaml", "output_dir=used", "overwrite_output_dir=true")
        self.assertTrue(os.path.exists(self.path("used/mine.txt")))
        self.assertEqual(temporaries(self.folder), [])

    def test_resume_from_a_broken_checkpoint_is_refused(self):
        self.refuse_broken_checkpoints("adamw", 4)

    def test_resume_from_a_broken_checkpoint_of_8_bit_moments_is_refused(self):
        self.refuse_broken_checkpoints("adamw_8bit", 8)

    def refuse_broken_checkpoints(self, optim, files):
        self.accept("train", *self.SAVING, f"output_dir={optim}", "max_steps=3", f"optim={optim}")
        newest = self.checkpoints(optim)[-1]
        states = [name for name in os.listdir(self.path(newest)) if name.endswith(".safetensors")]
        self.assertEqual(len(states), files, states)
        resume = ["train", "run.yaml", "output_dir=resumed", f"optim={optim}"]
        for name in [*states, "trainer_state.json"]:
            for number, change in enumerate((truncated, lambda content: b"")):
                copy = f"{optim}-broken-{number}-{name}"
                shutil.copytree(self.path(newest), self.path(copy))
                write(self.path(f"{copy}/{name}"), change(self.bytes_of(f"{newest}/{name}")))
                with self.subTest(copy):
                    self.refuse([*resume, f"resume_from_checkpoint={copy}"], [re.escape(f"{copy}/{name}")])
            copy = f"{optim}-without-{name}"
            shutil.copytree(self.path(newest), self.path(copy))
            os.remove(self.path(f"{copy}/{name}"))
            with self.subTest(copy):
                self.refuse([*resume, f"resume_from_checkpoint={copy}"], [re.escape(copy)])
        self.refuse([*resume, "model.num_hidden_layers=3", f"resume_from_checkpoint={newest}"],
                    [re.escape(newest), "layers|num_hidden_layers"])

    def test_numbers_that_overflow_stop_the_run_and_keep_the_checkpoint(self):
        # Warm-up starts at 0, so the first steps are sound; then decay multiplies the weights by -1e9 a step.
        done = self.flap("train", *self.SAVING, "output_dir=diverged", "learning_rate=1e6", "weight_decay=1e6",
                         "max_grad_norm=0", "bf16=false", "warmup_steps=1", "max_steps=40")
        line = self.error_line(done)
        self.assertRegex(line, r"step \d+")
        self.assertRegex(line, r"layer \d+|embedding|head")
        self.assertRegex(line, r"(?i)finite|nan|infinit")
        self.assertFalse(os.path.exists(self.path("diverged/model.safetensors")))
        self.assertEqual(temporaries(self.folder), [])
        kept = self.checkpoints("diverged")
        self.assertNotEqual(kept, [])
        failed = int(re.search(r"step (\d+)", line).group(1))
        self.assertLess(int(kept[-1].rsplit("-", 1)[1]), failed)
        self.accept("inspect", kept[-1])
        with open(self.path("diverged/metrics.jsonl")) as file:
            for text in file:
                json.loads(text, parse_constant=lambda name: self.fail(f"{name} in metrics.jsonl"))

    def test_interrupt_saves_and_the_printed_command_gives_the_same_model(self):
        steps = 80 if SANITIZED else 400  # so that it is still running when it is told to stop
        common = ["run.yaml", f"max_steps={steps}", "save_strategy=steps", "save_steps=100000"]
        self.accept("train", *common, "output_dir=whole")
        process, seen = self.train_until([*common, "output_dir=stopped"], 3)
        process.send_signal(signal.SIGINT)
        out, error = process.communicate(timeout=120)
        self.assertEqual(process.returncode, 0, (seen, out, error))
        self.assertNotIn("flap: error", error)
        self.assertEqual(len(self.checkpoints("stopped")), 1)
        self.assertFalse(os.path.exists(self.path("stopped/model.safetensors")))
        self.assertEqual(temporaries(self.folder), [])
        commands = re.findall(r"^continue with: (.*)$", out, re.M)
        self.assertEqual(len(commands), 1, out)
        done = subprocess.run(commands[0], shell=True, cwd=self.folder, capture_output=True, text=True, timeout=180,
                              env=self.environment)
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertEqual(self.bytes_of("stopped/model.safetensors"), self.bytes_of("whole/model.safetensors"))
        self.assertEqual(temporaries(self.folder), [])


class FullDisks(Case):
    def test_limit_on_file_sizes_is_an_error_and_not_the_end(self):
        def limit(kib=32):
            resource.setrlimit(resource.RLIMIT_FSIZE, (kib << 10, kib << 10))
        done = self.flap("train", "run.yaml", "disk=null", "output_dir=limited", "save_strategy=steps", "save_steps=1",
                         preexec_fn=limit)
        line = self.error_line(done)
        self.assertRegex(line, "limited")
        self.assertRegex(line, "(?i)ulimit|file size|space|largest")
        self.assertEqual(temporaries(self.folder), [])
        self.assertFalse(os.path.exists(self.path("limited/model.safetensors")))
        shutil.rmtree(self.path("limited"), ignore_errors=True)
        # The same for the pages on a disk: less than the run needs there.
        done = self.flap("train", "run.yaml", "vram=min", "ram=min", "output_dir=limited",
                         preexec_fn=lambda: limit(192))
        line = self.error_line(done)
        self.assertRegex(line, "disk")
        self.assertRegex(line, "(?i)ulimit|file size|space|largest")
        self.assertFalse(os.path.exists(self.path("limited")))

    def mount(self, size):
        where = self.path("small")
        os.makedirs(where, exist_ok=True)
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "flap-test", where], capture_output=True)
        if done.returncode != 0:
            self.skipTest("no tmpfs can be mounted here")
        self.addCleanup(subprocess.run, ["umount", where], check=True)

    @unittest.skipIf(os.geteuid() != 0, "only root mounts file systems")
    def test_output_dir_without_room_for_the_model_is_refused(self):
        self.mount("64k")
        done = self.flap("train", "run.yaml", "output_dir=small/out")
        line = self.error_line(done)
        self.assertRegex(line, "small/out|output_dir")
        self.assertRegex(line, "(?i)space|room|free|full")
        self.assertIn("export: none", line)
        self.assertNotIn("save_strategy", line)  # it is `no` already
        self.assertEqual(temporaries(self.folder), [])

    @unittest.skipIf(os.geteuid() != 0, "only root mounts file systems")
    def test_what_is_overwritten_counts_as_room(self):
        self.mount("2m")
        out = [*Budgets.BASE, "output_dir=small/out", "overwrite_output_dir=true", "max_steps=1"]
        self.accept("train", *out)
        with open(self.path("small/filler"), "wb", buffering=0) as file, self.assertRaises(OSError):
            while file.write(bytes(4096)):
                pass
        os.truncate(self.path("small/filler"), os.path.getsize(self.path("small/filler")) - (128 << 10))  # for small files
        self.assertGreater(os.path.getsize(self.path("small/out/model.safetensors")), 128 << 10)
        self.accept("train", *out)
        self.refuse(["train", *out, "model.num_hidden_layers=10"], ["small/out has [0-9]+ bytes free and [0-9]+ to overwrite"])

    @unittest.skipIf(os.geteuid() != 0, "only root mounts file systems")
    def test_full_disk_is_no_obstacle_unless_it_is_needed(self):
        self.mount("16k")
        with open(self.path("small/filler"), "wb") as file:
            file.write(bytes(16 << 10))
        for size in "max", "min", "1MiB":
            disk = f"disk={{path: small, size: {size}}}"
            self.assertEqual(json.loads(self.accept("plan", "run.yaml", "--json", disk))["disk_bytes"], 0)
            least = json.loads(self.accept("plan", "run.yaml", "--json", "vram=min", "ram=min"))
            self.refuse(["plan", "run.yaml", disk, f"vram={least['vram_bytes']}", f"ram={least['ram_bytes']}"],
                        ["disk small is not used, for only 0 B are free there", SIZE])
        self.accept("train", "run.yaml", "disk=small", "output_dir=beside", "max_steps=1")
        shutil.rmtree(self.path("beside"))
        plan = self.accept("plan", "run.yaml", "disk=[small, disk]", "--json", f"vram={least['vram_bytes']}",
                           f"ram={least['ram_bytes'] + 1024}")
        self.assertGreater(json.loads(plan)["disk_bytes"], 0)

    @unittest.skipIf(os.geteuid() != 0, "only root mounts file systems")
    @unittest.skipIf(SANITIZED, "takes long under a sanitizer; test_room and test_fault_calls fill disks there")
    def test_disk_that_fills_up_costs_no_checkpoint(self):
        self.mount("16m")
        process, _ = self.train_until(["run.yaml", "output_dir=small/out", "max_steps=100000", "save_strategy=steps",
                                       "save_steps=5", "save_total_limit=2"], 7)
        try:
            with open(self.path("small/filler"), "wb", buffering=0) as file:
                while file.write(b"x" * 4096):
                    pass
        except OSError:
            pass  # full
        out, error = process.communicate(timeout=120)
        line = self.error_line(subprocess.CompletedProcess([], process.returncode, out, error))
        self.assertRegex(line, "small/out")
        self.assertRegex(line, "(?i)space|full")
        os.remove(self.path("small/filler"))
        self.assertEqual(temporaries(self.folder), [])
        kept = self.checkpoints("small/out")
        self.assertNotEqual(kept, [])
        step = int(kept[-1].rsplit("-", 1)[1])
        self.accept("train", "run.yaml", "output_dir=small/out", f"max_steps={step + 1}", "resume_from_checkpoint=true")


if __name__ == "__main__":
    unittest.main()
