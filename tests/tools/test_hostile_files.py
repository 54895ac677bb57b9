"""Files that were made to hurt, to the whole program. Usage: test_hostile_files.py <flap>

Gigabytes without content (sparse), millions of values, brackets without end, bytes that are no text, and names that lead out
of a folder, in every file that the program reads. Each is refused within seconds, in memory that does not follow the file's
size, by one line that names the file. Nothing is written anywhere.

Exit status 77 where the program was not built."""
import json
import os
import resource
import struct
import subprocess
import sys
import tempfile
import time
import unittest

FLAP = os.path.abspath(sys.argv.pop(1)) if len(sys.argv) > 1 else ""
if not os.path.isfile(FLAP):
    print("skipped: there is no flap program with a real engine in this build")
    sys.exit(77)
with open(FLAP, "rb") as program:
    SANITIZED = b"__asan_init" in program.read()
SECONDS_MAX = 60 if SANITIZED else 10
# Half a gigabyte of JSON values is what readers allow (io/formats/json_file.h), and 256 MiB for a line of a data set.
MEMORY_MAX = (2048 if SANITIZED else 800) << 20
HUGE = 5 << 30

CONFIG = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
          "num_attention_heads": 2, "vocab_size": 257, "max_position_embeddings": 64}
TOKENIZER = {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
             "decoder": {"type": "ByteLevel"}, "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}
RUN = f"model: {json.dumps(CONFIG)}\ntokenizer: bytes\noutput_dir: out\nvram: 4MiB\nram: 16MiB\ndevice: cpu\n"
STATE = {"format": "flap-trainer-state", "version": 1, "global_step": 1, "max_steps": 2, "sequences_consumed": 4, "seed": "1",
         "dataset_digest": "0x1", "numerics": ""}

TENSOR = {"dtype": "U8", "shape": [8], "data_offsets": [0, 8]}


def tensor_file(header, data=b"01234567"):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(header)) + header + data


# Kind of file: its path, what else must be there, and the command that reads it.
MODEL = {"m/config.json": json.dumps(CONFIG)}
KINDS = {
    "weights": ("m/model.safetensors", MODEL, ["inspect", "m"]),
    "index": ("m/model.safetensors.index.json", MODEL, ["inspect", "m"]),
    "config": ("m/config.json", {}, ["plan", "run.yaml", "model=null", "model_name_or_path=m"]),
    "tokenizer": ("t/tokenizer.json", {}, ["tokenize", "t", "--text", "a"]),
    "tokenizer_config": ("t/tokenizer_config.json", {"t/tokenizer.json": json.dumps(TOKENIZER)}, ["tokenize", "t", "--text", "a"]),
    "special_tokens_map": ("t/special_tokens_map.json", {"t/tokenizer.json": json.dumps(TOKENIZER)}, ["tokenize", "t", "--text", "a"]),
    "run": ("bad.yaml", {}, ["plan", "bad.yaml"]),
    "machine": ("machine.yaml", {}, ["plan", "run.yaml", "machine=machine.yaml"]),
    "lines": ("d.jsonl", {}, ["tokenize", "bytes", "d.jsonl", "-o", "out.bin"]),
    "tokens": ("d.bin", {}, ["train", "run.yaml", "dataset=d.bin", "cutoff_len=32"]),
    "state": ("checkpoint-1/trainer_state.json", {"text.txt": "text " * 4000},
              ["train", "run.yaml", "dataset=text.txt", "resume_from_checkpoint=checkpoint-1"]),
}
JSON_KINDS = ["index", "config", "tokenizer", "tokenizer_config", "special_tokens_map", "lines", "state"]


def start_of(kind):
    """What a reader of this kind must see first to go on."""
    return tensor_file(b'{"a":"')[:14] if kind == "weights" else struct.pack("<3i", 20240520, 1, 2**31 - 1) if kind == "tokens" \
        else b'{"text": "' if kind in JSON_KINDS else b'a: "'


class Hostile(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.cache = tempfile.TemporaryDirectory(prefix="flap-cache-")  # where the machine's rates are kept
        cls.addClassCleanup(cls.cache.cleanup)

    def setUp(self):
        holder = tempfile.TemporaryDirectory(prefix="flap-hostile-")
        self.addCleanup(holder.cleanup)
        self.folder = holder.name
        self.write("run.yaml", RUN)

    def write(self, name, content, size=0):
        path = os.path.join(self.folder, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            file.write(content if isinstance(content, bytes) else content.encode())
            if size:
                file.truncate(size)
        return path

    def run_flap(self, arguments):
        start = time.monotonic()
        with tempfile.TemporaryFile() as error:
            process = subprocess.Popen([FLAP, *arguments], cwd=self.folder, stdout=subprocess.DEVNULL, stderr=error,
                                       env={**os.environ, "FLAP_LOG": "error", "XDG_CACHE_HOME": self.cache.name})
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            error.seek(0)
            return process.returncode, error.read(), time.monotonic() - start, usage.ru_maxrss << 10

    def refuse(self, kind, content, size=0, *texts, named=None):
        """The line names the file, or `named`, and has the texts."""
        name, others, arguments = KINDS[kind]
        for path, text in others.items():
            self.write(path, text)
        path = self.write(name, content, size)
        before = sorted(os.listdir(self.folder))
        returncode, error, seconds, memory = self.run_flap(arguments)
        after = sorted(os.listdir(self.folder))
        os.remove(path)
        self.assertEqual(returncode, 1, error)
        self.assertTrue(error.startswith(b"flap: error: ") and error.count(b"\n") == 1, error)
        self.assertFalse(any(byte < 0x20 or byte == 0x7f for byte in error[:-1]), error)
        for text in (named or name, *texts):
            self.assertIn(text.encode(), error)
        self.assertLess(seconds, SECONDS_MAX, error)
        self.assertLess(memory, MEMORY_MAX, error)
        self.assertEqual(after, before)

    def test_holes_of_gigabytes(self):
        for kind in KINDS:
            with self.subTest(kind):
                self.refuse(kind, start_of(kind), HUGE)
                self.refuse(kind, b"", HUGE)

    def test_header_of_the_largest_size_with_a_hole(self):
        self.refuse("weights", struct.pack("<Q", 100_000_000) + b'{"a":"', HUGE, "header, byte")
        self.refuse("weights", struct.pack("<Q", 100_000_001) + b'{"a":"', HUGE, "a header of 100000001 bytes")
        self.refuse("weights", struct.pack("<Q", (1 << 64) - 1) + b'{"a":"', HUGE, "a header of 18446744073709551615 bytes")

    def test_millions_of_values(self):
        for values in (b"{}," * 2_000_000, b"[]," * 3_000_000, b"1," * 9_000_000):
            text = b'{"text": [' + values + b"0]}"
            self.refuse("weights", tensor_file(text), 0, "millions of values")
            for kind in JSON_KINDS:
                with self.subTest(kind + " " + values[:3].decode()):
                    self.refuse(kind, text, 0, "at most" if kind == "state" else "millions of values")

    def test_strings_with_commas_are_not_values(self):
        text = json.dumps({"text": "\\\"," * 1_500_000 + "[{" * 1_500_000})
        self.write("d.jsonl", text)
        returncode, error, _, _ = self.run_flap(KINDS["lines"][2])
        self.assertEqual((returncode, error), (0, b""))

    def test_brackets_without_end(self):
        for bracket in (b"[", b'{"a":', b"- ", b"? ", b"{"):
            self.refuse("weights", tensor_file(b'{"a":' + bracket * 100_000))
            for kind in KINDS:
                if kind not in ("weights", "tokens"):
                    with self.subTest(f"{kind} {bracket}"):
                        self.refuse(kind, bracket * 100_000)

    def test_bytes_that_are_no_text(self):
        for piece in (b"\xff", b"\xc0\x80", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xc3", b"\x1b]0;x\x07\x9b31m"):
            self.refuse("weights", tensor_file(b'{"' + piece + b'":1}'), 0, "header, byte")
            for kind in KINDS:
                if kind not in ("weights", "tokens"):
                    with self.subTest(f"{kind} {piece}"):
                        self.refuse(kind, b'{"text": "' + piece + b'"}')

    def test_names_that_lead_out_of_the_folder(self):
        self.write("secret.safetensors", tensor_file({"a": TENSOR}))
        os.makedirs(self.folder + "/m", exist_ok=True)
        for name in ("../secret.safetensors", f"{self.folder}/secret.safetensors", "./../secret.safetensors", "..", ".", "",
                     "m/../../secret.safetensors", "..\\secret.safetensors"):
            with self.subTest(name):
                self.refuse("index", json.dumps({"weight_map": {"a": name}}), 0, "not a plain name")

    def test_links_are_the_owners_business_and_those_to_nothing_are_named(self):
        """A hub's cache is links out of the folder to blobs, which somebody with rights there made: they are followed."""
        self.write("blobs/1", tensor_file({"a": TENSOR}))
        index = json.dumps({"weight_map": {"a": "1.safetensors"}})
        self.write("m/model.safetensors.index.json", index)
        os.symlink("../blobs/1", self.folder + "/m/1.safetensors")
        returncode, error, _, _ = self.run_flap(["inspect", "m"])
        self.assertEqual((returncode, error), (0, b""))
        for target in ("../blobs/2", "1.safetensors", "../blobs", "/dev/zero", "/proc/self/mem"):
            os.remove(self.folder + "/m/1.safetensors")
            os.symlink(target, self.folder + "/m/1.safetensors")
            with self.subTest(target):
                self.refuse("index", index, named="m/1.safetensors")


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    unittest.main()
