"""What tests of the whole program share: a folder with a run of a model of a few thousand parameters, and flap in it, accepted or
refused. The first argument of the test is the program."""
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import unittest

FLAP = os.path.abspath(sys.argv.pop(1))
with open(FLAP, "rb") as program:
    SANITIZED = re.search(rb"__[at]san_init", program.read()) is not None
# Under sanitizers some tests would take minutes, and only lead through code that others lead through there.
long_when_sanitized = unittest.skipIf(SANITIZED, "takes long under a sanitizer, and has nothing new for it")
RUN = """model:
  model_type: llama
  hidden_size: 32
  intermediate_size: 64
  num_hidden_layers: 3
  num_attention_heads: 2
  max_position_embeddings: 64
  tie_word_embeddings: true
tokenizer: bytes
dataset: text.txt
val_size: 4
cutoff_len: 32
per_device_train_batch_size: 2
gradient_accumulation_steps: 2
max_steps: 8
learning_rate: 1e-2
logging_steps: 1
save_strategy: no
output_dir: out
vram: 4MiB
ram: 16MiB
disk: {path: disk, size: 16MiB}
device: cpu
expert: {threads: 1}
"""
TEXT = "".join(f"The {n}th line says that {n} and {n + 1} make {2 * n + 1}.\n" for n in range(300))


class Rig(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory(prefix="flap-test-")
        self.addCleanup(folder.cleanup)
        self.folder = folder.name
        os.mkdir(self.path("disk"))
        self.write("run.yaml", RUN)
        self.write("text.txt", TEXT)

    def path(self, name):
        return os.path.join(self.folder, name)

    def write(self, name, content):
        with open(self.path(name), "wb" if isinstance(content, bytes) else "w") as file:
            file.write(content)

    def flap(self, *arguments):
        # A sample's bytes need not be UTF-8.
        return subprocess.run([FLAP, *arguments], cwd=self.folder, capture_output=True, timeout=120, text=True,
                              errors="backslashreplace")

    def accept(self, *arguments):
        done = self.flap(*arguments)
        self.assertEqual(done.returncode, 0, (arguments, done.stdout, done.stderr))
        return done.stdout

    def refuse(self, message, *arguments):
        before = self.tree()
        start = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = self.flap(*arguments)
        end = resource.getrusage(resource.RUSAGE_CHILDREN)
        self.assertEqual(done.returncode, 1, (arguments, done.stdout, done.stderr))
        errors = [line for line in done.stderr.splitlines() if line.startswith("flap: error: ")]
        self.assertEqual(len(errors), 1, done.stderr)
        self.assertIn(message, errors[0])
        # Two or three seconds for people; sanitizers take longer. Its own time: what else the machine does is not flap's.
        self.assertLess(end.ru_utime - start.ru_utime + end.ru_stime - start.ru_stime, 20)
        self.assertEqual(self.tree(), before)
        return errors[0]

    def tree(self):
        return sorted(os.path.relpath(os.path.join(folder, name), self.folder)
                      for folder, folders, files in os.walk(self.folder) for name in folders + files)

    def metrics(self, folder="out"):
        with open(self.path(f"{folder}/metrics.jsonl")) as file:
            return [json.loads(line) for line in file]

    def losses(self, folder="out"):
        return {line["step"]: (line["loss"], line["grad_norm"]) for line in self.metrics(folder) if "grad_norm" in line}

    def weights(self, folder="out"):
        with open(self.path(f"{folder}/model.safetensors"), "rb") as file:
            return file.read()
