"""The whole program, with its real engine, on a model of a few thousand parameters. Usage: test_flap.py <flap>

What a person does: plan, train, evaluate, sample, export, inspect, interrupt, resume; and what they do wrong: every
mistake is one line on stderr, exit status 1, within seconds, and leaves nothing behind."""
import json
import os
import pty
import re
import resource
import signal
import struct
import subprocess
import sys
import tempfile
import time
import unittest

FLAP = os.path.abspath(sys.argv.pop(1))
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


class Flap(unittest.TestCase):
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

    # ---- what a person does ----

    def test_plan_needs_no_data_and_agrees_with_training(self):
        os.remove(self.path("text.txt"))
        plan = json.loads(self.accept("plan", "run.yaml", "--json"))
        self.assertEqual(plan["tokens_per_step"], 128)
        self.assertLessEqual(plan["vram_bytes"], 4 << 20)
        self.assertLessEqual(plan["vram_min"], plan["vram_bytes"])
        self.assertLessEqual(max(map(len, self.accept("plan", "run.yaml").splitlines())), 100)
        self.assertEqual(sorted(os.listdir(self.folder)), ["disk", "run.yaml"])

    LARGE = """model: {model_type: llama, vocab_size: 32000, hidden_size: 5120, intermediate_size: 13824, num_hidden_layers: 40,
  num_attention_heads: 40, max_position_embeddings: 4096, tie_word_embeddings: false}
tokenizer: bytes
dataset: text.txt
cutoff_len: 2048
per_device_train_batch_size: 1
gradient_accumulation_steps: 16
activations: recompute
output_dir: out
machine: rtx4090-64g-1nvme
"""

    def test_plan_for_a_machine_that_is_not_here(self):
        self.write("large.yaml", self.LARGE)
        start = time.monotonic()
        plan = json.loads(self.accept("plan", "large.yaml", "--json"))
        self.assertLess(time.monotonic() - start, 60)  # two seconds on an idle machine; sanitizers take longer
        self.assertEqual(plan["device"], "cuda")
        self.assertEqual(plan["device_name"], "RTX 4090 24 GB, 64 GiB RAM, 1 NVMe")
        self.assertGreater(plan["parameters"], 13e9)
        self.assertEqual(plan["vram_budget"], ((24564 << 20) - (24564 << 20) // 20) // 4096 * 4096)
        self.assertEqual(plan["ram_budget"], (64 << 30) - (64 << 30) // 10 - (96 << 20))
        self.assertEqual(plan["disk_budget"], 1900 * 10**9 - 1900 * 10**9 // 20)
        self.assertLessEqual(plan["vram_bytes"], plan["vram_budget"])
        self.assertGreater(plan["vram_scratch_bytes"], 32 << 20)  # the cuda kernels', not the cpu's
        self.assertGreater(plan["disk_bytes"], 0)
        self.assertGreaterEqual(plan["step_seconds"], plan["bound_seconds"])
        self.assertEqual(sorted(os.listdir(self.folder)), ["disk", "large.yaml", "run.yaml", "text.txt"])

    SLOW = """{"name": "slow", "device": "cpu", "ram_bytes": 1073741824, "threads": 1, "flops_bf16": 1e9, "flops_f32": 1e9,
"device_bytes": 1e10, "h2d_bytes": 1e8, "d2h_bytes": 1e8, "host_bytes": 1e10, "synchronous": false, "shared_cores": 0,
"copy_ns": 0, "launch_ns": 0, "disks": [{"size_bytes": 4000000000, "read_bytes": 1e8, "write_bytes": 2e7, "tbw_bytes": "1TB"}]}
"""

    def test_plan_saves_some_tensors_where_all_are_too_many(self):
        self.write("large.yaml", self.LARGE)
        plans = {}
        for saved in ("auto", "attention", "all_but_mlp", "all", "everything"):
            plans[saved] = json.loads(self.accept(
                "plan", "large.yaml", "--json", "activations=auto", "model.hidden_size=1536", "model.intermediate_size=8960",
                "model.num_hidden_layers=12", "model.num_attention_heads=12", "model.max_position_embeddings=32768",
                "cutoff_len=32768", "gradient_accumulation_steps=4", "vram=12GiB", "expert.optimizer=gpu",
                f"expert.saved={saved}"))
        seconds = {saved: plan["step_seconds"] for saved, plan in plans.items()}
        self.assertLessEqual(seconds["auto"], min(seconds.values()) * 1.001)
        self.assertLess(seconds["auto"], 0.97 * seconds["all"])
        self.assertGreater(plans["auto"]["saved_layers"], 0)
        self.assertFalse(plans["auto"]["saved_whole"])
        self.assertEqual((plans["attention"]["saved_tensors"], plans["attention"]["saved_whole"]), ("attention, lse", False))
        self.assertTrue(plans["all"]["saved_whole"])

    def test_plan_counts_disks_by_what_lies_on_them(self):
        """Two disks, one four times as fast: together, by weight, they are both at work all the time; a fast one that is too
        small leaves more to the slow one, and weights that a person gives are what they are."""
        disk = '{"size_bytes": 4000000000, "read_bytes": %s, "write_bytes": %s, "both_bytes": %s}'
        self.write("two.json", self.SLOW[:self.SLOW.index('"disks"')] + '"disks": [%s, %s]}' % (
            disk % ("4e7", "2e7", "4e7"), disk % ("1e7", "5e6", "1e7")))

        def plan(disks, *more):
            return json.loads(self.accept("plan", "run.yaml", "--json", "machine=two.json", "vram=1MiB", "ram=700KiB",
                                          f"disk={disks}", *more))

        both = plan("[/fast, /slow]")
        self.assertAlmostEqual(both["machine"]["disk_write_bytes"], 2.5e7, delta=6e5)
        self.assertAlmostEqual(both["machine"]["disk_read_bytes"], 5e7, delta=1.2e6)
        small = both["disk_bytes"] // 8
        cramped = plan(f"[{{path: /fast, size: {small}}}, /slow]")
        self.assertAlmostEqual(cramped["machine"]["disk_write_bytes"], 5e6 / (7 / 8), delta=3e5)
        self.assertGreater(cramped["step_seconds"], 1.5 * both["step_seconds"])
        even = plan("[{path: /fast, weight: 1}, {path: /slow, weight: 1}]")
        self.assertAlmostEqual(even["machine"]["disk_write_bytes"], 1e7, delta=2e5)
        self.assertGreater(even["step_seconds"], both["step_seconds"])

    def test_plan_finds_the_knee(self):
        self.write("slow.json", self.SLOW)
        slow = ["plan", "run.yaml", "--json", "machine=slow.json", "vram=1MiB", "ram=700KiB", "disk=/no/such/folder"]
        terminal, end = pty.openpty()
        shown = subprocess.run([FLAP, *slow, "--knee"], cwd=self.folder, stdout=subprocess.PIPE, stderr=end, timeout=120)
        os.close(end)
        lines = os.read(terminal, 65536).decode().split("\r")
        os.close(terminal)
        plan = json.loads(shown.stdout)
        knee = plan["knee"]
        tried = [int(line.split("a step of ")[1].split()[0]) for line in lines if "looking for the knee" in line]
        self.assertEqual(tried[0], 1)
        self.assertIn(knee["micro_batches"], tried)
        self.assertLessEqual(len(tried), 5)  # by halves it takes seven
        below = max(n for n in tried if n < knee["micro_batches"])
        self.assertLessEqual(knee["micro_batches"] - below, 1 + knee["micro_batches"] // 8)
        less = json.loads(self.accept(*slow, f"gradient_accumulation_steps={below}"))
        self.assertLess(less["compute_seconds"], 0.9 * less["step_seconds"])
        self.assertEqual(self.flap(*slow, "--knee").stderr, "")  # no terminal
        self.assertGreater(knee["micro_batches"], plan["micro_batches"])
        self.assertLess(plan["compute_seconds"], 0.9 * plan["step_seconds"])
        self.assertEqual(plan["ssd_step_bytes"], plan["lane_bytes"]["disk_write"])
        self.assertEqual(plan["ssd_tbw_bytes"], 10**12)
        self.assertAlmostEqual(plan["ssd_steps"] * plan["ssd_step_bytes"] / 10**12, 1)
        self.assertAlmostEqual(plan["lane_seconds"]["disk_write"], plan["ssd_step_bytes"] / 2e7, delta=1e-3)
        there = json.loads(self.accept(*slow, f"gradient_accumulation_steps={knee['micro_batches']}"))
        self.assertEqual(there["step_seconds"], knee["step_seconds"])
        self.assertGreaterEqual(there["compute_seconds"], 0.9 * there["step_seconds"])
        self.assertNotIn("knee", there)
        worn = json.loads(self.accept(*slow, "ssd_tbw=2TB"))
        self.assertAlmostEqual(worn["ssd_steps"], 2 * plan["ssd_steps"])

    def test_plan_shows_the_step_that_it_expects(self):
        self.write("slow.json", self.SLOW)
        slow = ["plan", "run.yaml", "--json", "machine=slow.json", "vram=1MiB", "ram=700KiB", "disk=/no/such/folder"]
        plan = json.loads(self.accept(*slow, "--trace", "step.json"))
        self.assertEqual(json.loads(self.accept(*slow))["step_seconds"], plan["step_seconds"])
        with open(self.path("step.json")) as file:
            events = json.load(file)["traceEvents"]
        lanes = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
        steps = [event for event in events if event["ph"] == "X"]
        seconds, moved = {}, {}
        for event in steps:
            lane = lanes[event["tid"]].rstrip(" 0123456789").replace(" ", "_")
            seconds[lane] = seconds.get(lane, 0) + event["dur"] / 1e6
            moved[lane] = moved.get(lane, 0) + event.get("args", {}).get("bytes", 0)
        self.assertAlmostEqual(seconds["compute"], plan["compute_seconds"], delta=0.01 * plan["compute_seconds"])
        for lane in ("h2d", "d2h", "disk_write"):  # from step to step copies may fall into this one or the next
            self.assertAlmostEqual(moved[lane], plan["lane_bytes"][lane], delta=0.1 * plan["lane_bytes"][lane])
        self.assertTrue(any(event["name"].startswith("waits for disk") for event in steps))
        span = max(event["ts"] + event["dur"] for event in steps) - min(event["ts"] for event in steps)
        self.assertAlmostEqual(span / 1e6, plan["step_seconds"], delta=0.1 * plan["step_seconds"])
        self.refuse("no/such/folder", *slow, "--trace", "no/such/folder/step.json")
        self.refuse("--trace: text.txt must end in .json", *slow, "--trace", "text.txt")
        self.refuse("--output: text.txt must end in .bin", "tokenize", "bytes", "text.txt", "-o", "text.txt")

    def test_bench_writes_what_plan_reads(self):
        self.write("here.json", self.accept("bench", "machine", "--json", "--path", "disk", "--threads", "1"))
        plan = json.loads(self.accept("plan", "run.yaml", "--json", "machine=here.json", "disk=null"))
        self.assertEqual(plan["device"], "cpu")
        self.assertGreater(plan["machine"]["disk_both_bytes"], 0)

    def test_machine_refusals(self):
        self.write("large.yaml", self.LARGE)
        self.refuse("large.yaml:10: machine: rtx4090-64g-1nvme is a machine to plan for, and only flap plan does",
                    "train", "large.yaml")
        self.refuse("vram: 40.0 GiB is more than the 24.0 GiB of the machine", "plan", "large.yaml", "vram=40GiB")
        self.refuse("ram: 65.0 GiB is more than", "plan", "large.yaml", "ram=65GiB")
        self.refuse("disk: 2.00 TiB is more than", "plan", "large.yaml", "disk={path: /mnt/x, size: 2TiB}")
        self.refuse("disk: 2 folders, but the machine", "plan", "large.yaml", "disk=[/mnt/x, /mnt/y]")
        self.refuse("device: cpu contradicts machine", "plan", "large.yaml", "device=cpu")
        self.refuse("give a disk of at least", "plan", "large.yaml", "disk=[]")
        listed = self.accept("plan", "--list-machines")
        for wanted in ["h100-80g", "rtx4060-laptop", "rtx4090-thunderbolt4", "79.6 GiB"]:
            self.assertIn(wanted, listed)

    def test_train_eval_sample_export_inspect(self):
        text = self.accept("train", "run.yaml")
        for wanted in ["step 8/8  loss ", "held-out loss ", "unigram entropy", "of the bound reached", "Hugging Face's format: out"]:
            self.assertIn(wanted, text)
        losses = self.losses()
        self.assertEqual(sorted(losses), list(range(1, 9)))
        self.assertLess(losses[8][0], losses[1][0])
        self.assertTrue({"config.json", "model.safetensors", "metrics.jsonl", "trace.json", "tokenizer.json"}
                        <= set(os.listdir(self.path("out"))))
        self.assertEqual(os.listdir(self.path("disk")), [])

        after = float(text.split(" before, ")[1].split(" after")[0])
        evaluated = json.loads(self.accept("eval", "run.yaml", "--json"))
        self.assertAlmostEqual(evaluated["loss"], after, places=2)
        sample = [self.accept("sample", "run.yaml", "--prompt", "The", "-n", "12", "--seed", seed) for seed in "112"]
        self.assertEqual(sample[0], sample[1])
        self.accept("sample", "run.yaml")  # 64 positions are fewer than the 128 tokens of the default
        self.refuse("more than the model's max_position_embeddings of 64", "sample", "run.yaml", "-n", "128")
        on_text = ["eval", "out", "dataset=text.txt", "--json"]  # all 64 positions, fewer than the default cutoff_len
        by_default, given = (json.loads(self.accept(*on_text, *more)) for more in ([], ["cutoff_len=64"]))
        self.assertEqual((by_default["loss"], by_default["tokens"]), (given["loss"], given["tokens"]))
        self.refuse("cutoff_len: 65 tokens are more", *on_text, "cutoff_len=65")
        self.accept("export", "out", "exported", "--dtype", "float32")
        self.refuse("exported", "export", "out", "exported")
        shown = self.accept("inspect", "exported")
        self.assertIn("model.layers.2.mlp.down_proj.weight", shown)
        self.assertIn("F32", shown)
        self.assertIn("model_type", shown)

    def test_budgets_disks_and_io_do_not_change_the_numbers(self):
        self.accept("train", "run.yaml", "output_dir=a", "vram=1GiB", "ram=1GiB")
        os.mkdir(self.path("disk2"))
        for name, overrides in {"b": ["vram=min"], "c": ["vram=min", "ram=min"], "d": ["expert.io=threads", "ram=min"],
                                "e": ["disk=[disk, disk2]", "ram=min", "expert.clip=sweep"],
                                "f": ["expert.segment_layers=2", "activations=recompute"]}.items():
            self.accept("train", "run.yaml", f"output_dir={name}", *overrides)
            self.assertEqual(self.losses(name), self.losses("a"), overrides)
            self.assertEqual(self.weights(name), self.weights("a"), overrides)

    def test_interrupt_saves_and_the_printed_command_continues_bit_for_bit(self):
        common = ["max_steps=60", "save_strategy=steps", "save_steps=1000"]
        self.accept("train", "run.yaml", "output_dir=whole", *common)
        process = subprocess.Popen([FLAP, "train", "run.yaml", *common], cwd=self.folder, stdout=subprocess.PIPE,
                                   stderr=subprocess.PIPE, text=True)
        for line in process.stdout:
            if line.startswith("step 3/"):
                process.send_signal(signal.SIGINT)
                break
        out, error = process.communicate(timeout=60)
        self.assertEqual(process.returncode, 0, (out, error))
        if "stopped after step" not in out:
            self.skipTest("the run ended before the signal came")
        command = [line for line in out.splitlines() if line.startswith("continue with: ")]
        self.assertEqual(len(command), 1, out)
        done = subprocess.run(command[0][len("continue with: "):], shell=True, cwd=self.folder, capture_output=True,
                              timeout=120, text=True)
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertIn("continuing after step", done.stdout)
        self.assertEqual(self.losses("out"), self.losses("whole"))
        self.assertEqual(self.weights("out"), self.weights("whole"))

    def test_stop_without_saving_says_so_and_leaves_nothing_to_continue_from(self):
        process = subprocess.Popen([FLAP, "train", "run.yaml", "max_steps=100000"], cwd=self.folder,
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for line in process.stdout:
            if line.startswith("step 3/"):
                process.send_signal(signal.SIGTERM)
                break
        out, error = process.communicate(timeout=60)
        self.assertEqual(process.returncode, 0, (out, error))
        self.assertIn("NOTHING WAS SAVED", out)
        self.assertIn("NOTHING IS SAVED", error)
        self.assertEqual(sorted(os.listdir(self.path("out"))), ["metrics.jsonl", "trace.json"])

    def test_what_has_no_trained_model_names_what_to_take(self):
        for command in "sample", "eval":
            self.refuse("out holds no model (config.json): train it first", command, "run.yaml")
        self.accept("train", "run.yaml", "save_strategy=steps", "save_steps=4", "export=none")
        for command in "sample", "eval":
            self.refuse("out holds no trained model, but checkpoints: add model_name_or_path=out/checkpoint-8", command,
                        "run.yaml")
            self.accept(command, "run.yaml", "model_name_or_path=out/checkpoint-8")
        self.refuse("out is the folder of a run: name a checkpoint in it, such as out/checkpoint-8", "train", "run.yaml",
                    "resume_from_checkpoint=out")

    def test_stop_before_the_first_step_leaves_nothing_and_the_same_command_starts_again(self):
        self.write("long.txt", TEXT * 8000)  # a second or so
        for save in "no", "steps":
            arguments = ["train", "run.yaml", "dataset=long.txt", f"save_strategy={save}", f"output_dir={save}"]
            process = subprocess.Popen([FLAP, *arguments], cwd=self.folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                       text=True)
            while process.poll() is None and not os.path.exists(self.path(save)):
                pass
            process.send_signal(signal.SIGINT)
            out, error = process.communicate(timeout=60)
            self.assertEqual(process.returncode, 0, (out, error))
            self.assertIn("nothing was saved, for no step was done: the same command starts again", out)
            self.assertFalse(os.path.exists(self.path(save)))
            self.accept(*arguments, "dataset=text.txt", "max_steps=1")

    def test_tokenize_that_is_stopped_leaves_no_half(self):
        self.write("long.txt", TEXT * 8000)
        process = subprocess.Popen([FLAP, "tokenize", "bytes", "long.txt", "-o", "out.bin"], cwd=self.folder)
        while process.poll() is None and not os.path.exists(self.path("out.bin.tmp")):
            pass
        process.send_signal(signal.SIGINT)
        self.assertEqual(process.wait(60), 130)
        self.assertEqual(sorted(os.listdir(self.folder)), ["disk", "long.txt", "run.yaml", "text.txt"])

    # A checkpoint of some 20 MB, so that there is time while it is written.
    LARGER = ["model.hidden_size=128", "model.intermediate_size=512", "model.num_hidden_layers=4", "vram=64MiB",
              "ram=64MiB", "disk=null", "max_steps=100000", "save_strategy=steps", "export=none"]

    def test_second_signal_while_saving_leaves_the_older_checkpoint_and_no_half(self):
        for attempt in range(8):
            folder = f"out{attempt}"
            process = subprocess.Popen([FLAP, "train", "run.yaml", *self.LARGER, "save_steps=2", f"output_dir={folder}"],
                                       cwd=self.folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            for line in process.stdout:
                if line.startswith("saved "):
                    break
            process.send_signal(signal.SIGINT)
            unfinished = []
            while process.poll() is None and not unfinished:
                unfinished = [name for name in os.listdir(self.path(folder)) if name.endswith(".tmp")]
            process.send_signal(signal.SIGSTOP)
            time.sleep(0.2)
            process.send_signal(signal.SIGINT)
            process.send_signal(signal.SIGCONT)
            process.communicate(timeout=60)
            if process.returncode == 130 and unfinished and os.path.exists(self.path(f"{folder}/{unfinished[0]}")):
                break
        else:
            self.skipTest("no save was caught half way")
        whole = [name for name in os.listdir(self.path(folder)) if name.startswith("checkpoint-") and "." not in name]
        newest = max(int(name.split("-")[1]) for name in whole)
        out = self.accept("train", "run.yaml", *self.LARGER, f"output_dir={folder}", "save_strategy=no",
                          f"max_steps={newest + 1}", "resume_from_checkpoint=true")
        self.assertIn(f"continuing after step {newest}\n", out)
        self.assertEqual([name for name in os.listdir(self.path(folder)) if ".tmp" in name], [])

    def list(self, name):
        return os.listdir(self.path(name)) if os.path.isdir(self.path(name)) else []

    def test_signal_while_a_checkpoint_is_written_beside_steps_finishes_it_and_saves_once_more(self):
        common = [*self.LARGER, "save_total_limit=0", "lr_scheduler_type=constant"]
        with open(self.path("printed"), "w") as printed:
            process = subprocess.Popen([FLAP, "train", "run.yaml", *common, "save_steps=3"], cwd=self.folder, stdout=printed,
                                       stderr=subprocess.PIPE, text=True)
        while process.poll() is None and not any(re.fullmatch(r"checkpoint-\d+.tmp", name) for name in self.list("out")):
            pass
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=120)
        self.assertEqual(process.returncode, 0, error)
        with open(self.path("printed")) as printed:
            out = printed.read()
        saved = [int(step) for step in re.findall(r"saved out/checkpoint-(\d+) in", out)]
        last = max(map(int, re.findall(r"(?m)^step (\d+)/", out)))
        self.assertEqual(saved, sorted(set(saved)))
        self.assertEqual((saved[0], saved[-1]), (3, last), out)
        self.assertEqual(sorted(os.listdir(self.path("out"))),
                         sorted([f"checkpoint-{step}" for step in saved] + ["metrics.jsonl", "trace.json"]))
        self.assertNotIn("broken", self.accept("inspect", "out"))
        for step in (3, last):  # both are resumed, and end alike
            self.accept("train", "run.yaml", *common, f"output_dir=from-{step}", "save_steps=1000000",
                        f"max_steps={last + 2}", f"resume_from_checkpoint=out/checkpoint-{step}")
        for name in os.listdir(self.path(f"from-3/checkpoint-{last + 2}")):
            self.assertEqual(self.lasting(f"from-3/checkpoint-{last + 2}/{name}"),
                             self.lasting(f"from-{last}/checkpoint-{last + 2}/{name}"), name)

    def lasting(self, name):
        """A file of a checkpoint without what depends on how often its run had saved: what was written to drives."""
        with open(self.path(name), "rb") as file:
            text = file.read()
        if name.endswith("/trainer_state.json"):
            return {key: value for key, value in json.loads(text).items() if key != "written_bytes"}
        if name.endswith("/checksums.json"):
            return [entry for entry in json.loads(text)["files"] if entry["name"] != "trainer_state.json"]
        return text

    # ---- one command for every life ----

    AUTO = ["run.yaml", "save_strategy=steps", "save_steps=4", "resume_from_checkpoint=auto"]

    def train(self, *arguments, until=None, files=None):
        """Its lines and its status; killed when a line begins with `until`; with so many descriptors."""
        limit = None if files is None else lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))
        process = subprocess.Popen([FLAP, "train", *arguments], cwd=self.folder, stdout=subprocess.PIPE,
                                   stderr=subprocess.STDOUT, text=True, preexec_fn=limit)
        lines = []
        for line in process.stdout:
            lines.append(line)
            if until is not None and line.startswith(until):
                process.kill()
                break
        lines.append(process.communicate(timeout=60)[0])
        return "".join(lines), process.returncode

    def contents(self, folder="out"):
        """Of every file, with the time when it was written."""
        found = {}
        for above, _, names in os.walk(self.path(folder)):
            for name in names:
                with open(os.path.join(above, name), "rb") as file:
                    found[os.path.join(above, name)] = (os.stat(file.fileno()).st_mtime_ns, file.read())
        return found

    def test_one_command_for_every_life_ends_with_the_bits_of_a_run_that_nothing_disturbed(self):
        steps = "max_steps=60"  # so that none ends before it is killed
        self.accept("train", *self.AUTO, "output_dir=whole", steps)
        self.assertNotEqual(self.train(*self.AUTO, steps, files=6)[1], 0)
        self.assertEqual(self.train(*self.AUTO, "save_steps=50", steps, until="step 2/")[1], -9)
        self.assertFalse(self.checkpoints())
        os.mkdir(self.path("out/checkpoint-4.tmp"))  # as if it had been saving
        self.write("out/notes.txt", "mine")
        out, status = self.train(*self.AUTO, steps, until="saved ")
        self.assertEqual(status, -9)
        self.assertIn("out holds no checkpoint: training starts anew, and so does metrics.jsonl", out)
        self.assertIn("step 1/60", out)
        last = max(int(name.split("-")[1]) for name in self.checkpoints())
        out = self.accept("train", *self.AUTO, steps)
        self.assertIn(f"continuing after step {last}\n", out)
        self.assertEqual(self.losses(), self.losses("whole"))
        self.assertEqual([line["step"] for line in self.metrics() if "loss" in line], list(range(1, 61)))
        self.assertEqual(self.weights(), self.weights("whole"))
        self.assertEqual(sorted(set(os.listdir(self.path("out"))) ^ set(os.listdir(self.path("whole")))), ["notes.txt"])

    def test_run_that_is_complete_is_left_as_it_is(self):
        self.write("short.txt", TEXT[:2000])
        for name, more in {"steps": [], "epochs": ["max_steps=-1", "num_train_epochs=1", "dataset=short.txt"],
                           "model": ["save_strategy=no"], "lines": ["save_strategy=no", "export=none"],
                           "weights": ["save_only_model=true"]}.items():
            with self.subTest(name):
                command = ["train", *self.AUTO, *more, f"output_dir={name}"]
                self.accept(*command)
                before = self.contents(name)
                out = self.accept(*command)
                self.assertRegex(out, rf"^this run is complete: \d+ steps.* in {name}; nothing was done\n$")
                self.assertEqual(self.contents(name), before)

    def test_run_that_is_complete_goes_on_to_more_steps_from_its_checkpoint_alone(self):
        self.accept("train", *self.AUTO, "output_dir=whole", "max_steps=10", "lr_scheduler_type=constant")
        self.accept("train", *self.AUTO, "lr_scheduler_type=constant")
        out = self.accept("train", *self.AUTO, "max_steps=10", "lr_scheduler_type=constant")
        self.assertIn("continuing after step 8\n", out)
        self.assertEqual(self.weights(), self.weights("whole"))
        self.refuse("is at step 10 already", "train", *self.AUTO)
        self.assertIn("complete: 10 steps", self.accept("train", *self.AUTO, "max_steps=10"))
        # What is exported only now is all that is left to do; and so it is when the model was taken away.
        os.remove(self.path("out/model.safetensors"))
        self.assertIn("continuing after step 10\n", self.accept("train", *self.AUTO, "max_steps=10"))
        self.assertEqual(self.weights(), self.weights("whole"))
        for name in self.checkpoints():
            os.rename(self.path(f"out/{name}"), self.path(f"kept-{name}"))
        for more in ["max_steps=12"], ["max_steps=-1", "num_train_epochs=1"]:
            error = self.refuse("out holds a run that ended after 10 steps, without a checkpoint", "train", *self.AUTO, *more)
            self.assertIn("overwrite_output_dir: true", error)

    def test_one_command_touches_no_results_of_others(self):
        os.mkdir(self.path("out"))
        for name, content in {"config.json": "{}", "model.safetensors": "theirs", "checkpoint-5/notes": "theirs"}.items():
            os.makedirs(os.path.dirname(self.path(f"out/{name}")), exist_ok=True)
            self.write(f"out/{name}", content)
            before = self.contents()
            self.refuse("checkpoints in out hold weights only" if "/" in name else "but no checkpoint to go on from",
                        "train", *self.AUTO)
            self.assertEqual(self.contents(), before)

    def test_what_a_life_without_a_step_left_is_no_obstacle_and_steps_are(self):
        plain = self.AUTO[:3]
        out, status = self.train(*plain, files=6)
        self.assertEqual(status, 1, out)
        self.assertEqual(self.tree_of_out(), ["metrics.jsonl"])
        self.accept("train", *plain, "max_steps=2", "save_strategy=no", "export=none")  # the same again, if shorter
        error = self.refuse("out already holds out/metrics.jsonl", "train", *plain)
        self.assertIn("resume_from_checkpoint: auto", error)
        self.assertIn("resume_from_checkpoint: auto", self.refuse("out holds no checkpoint-<step>", "train", *plain,
                                                                  "resume_from_checkpoint=true"))

    def tree_of_out(self):
        return sorted(os.listdir(self.path("out")))

    # ---- one run per output_dir ----

    def start(self, *arguments):
        """A run that goes on until it is stopped, and has done a step."""
        process = subprocess.Popen([FLAP, "train", "run.yaml", "max_steps=100000", *arguments], cwd=self.folder,
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for line in process.stdout:
            if line.startswith("step 1/"):
                break
        return process

    def test_second_run_in_the_same_folder_is_refused_and_harms_nothing(self):
        process = self.start("save_strategy=steps", "save_steps=100000")
        os.mkdir(self.path("out/checkpoint-7.tmp"))  # as if it were saving
        os.symlink("out", self.path("other"))
        for folder in ("out", "other"):
            for more in ([], ["resume_from_checkpoint=true"], ["overwrite_output_dir=true"],
                         [f"resume_from_checkpoint={folder}/checkpoint-7"]):
                done = self.flap("train", "run.yaml", f"output_dir={folder}", *more)
                self.assertEqual(done.returncode, 1, done.stdout)
                self.assertRegex(done.stderr, f"^flap: error: output_dir: {folder} is in use: process {process.pid} on "
                                              r"\S+ since [-0-9: ]+ UTC writes there")
        done = self.flap("train", "run.yaml", "output_dir=third", "resume_from_checkpoint=out/checkpoint-7")
        self.assertRegex(done.stderr, f"resume_from_checkpoint: out is in use: process {process.pid} ")
        self.assertTrue(os.path.exists(self.path("out/checkpoint-7.tmp")))
        self.assertFalse(os.path.exists(self.path("third")))
        process.send_signal(signal.SIGINT)
        out, error = process.communicate(timeout=60)
        self.assertEqual(process.returncode, 0, error)
        self.assertIn("continue with", out)
        self.assertFalse(os.path.exists(self.path("out/run.lock")))

    def test_nothing_is_printed_into_files_where_the_standard_descriptors_are_closed(self):
        process = subprocess.Popen([FLAP, "train", "run.yaml", "max_steps=100000"], cwd=self.folder,
                                   preexec_fn=lambda: [os.close(descriptor) for descriptor in (0, 1, 2)])
        metrics = self.path("out/metrics.jsonl")
        while process.poll() is None and not (os.path.exists(metrics) and os.path.getsize(metrics) > 0):
            pass
        process.send_signal(signal.SIGTERM)  # with a notice on what would be stderr
        self.assertEqual(process.wait(60), 0)
        self.assertTrue(self.metrics())  # each line is JSON

    def test_lock_of_a_run_that_was_killed_is_no_obstacle(self):
        process = self.start("save_strategy=steps", "save_steps=1")
        process.kill()
        process.communicate(timeout=60)
        self.assertTrue(os.path.exists(self.path("out/run.lock")))
        out = self.accept("train", "run.yaml", "overwrite_output_dir=true")
        self.assertIn("8 steps", out)
        self.assertFalse(os.path.exists(self.path("out/run.lock")))

    def test_what_is_made_is_its_owners_alone(self):
        old = os.umask(0)
        try:
            environment = {name: value for name, value in os.environ.items() if name != "FLAP_MACHINE"}
            environment["XDG_CACHE_HOME"] = self.path("cache")
            done = subprocess.run([FLAP, "train", "run.yaml", "output_dir=runs/a", "save_strategy=steps", "save_steps=4"],
                                  cwd=self.folder, capture_output=True, timeout=120, text=True, env=environment)
        finally:
            os.umask(old)
        self.assertEqual(done.returncode, 0, done.stderr)
        seen = 0
        for top in ("runs", "cache"):
            self.assertEqual(os.stat(self.path(top)).st_mode & 0o777, 0o700)
            for folder, folders, files in os.walk(self.path(top)):
                for name in folders + files:
                    mode = os.stat(os.path.join(folder, name)).st_mode & 0o777
                    self.assertEqual(mode, 0o700 if name in folders else 0o600, name)
                    seen += 1
        self.assertGreater(seen, 20)

    def test_checkpoints_are_kept_to_the_limit(self):
        self.accept("train", "run.yaml", "save_strategy=steps", "save_steps=2", "save_total_limit=2", "max_steps=7")
        kept = sorted(name for name in os.listdir(self.path("out")) if name.startswith("checkpoint-"))
        self.assertEqual(len(kept), 2, kept)
        self.assertIn("step", self.accept("inspect", "out"))

    # ---- checkpoints that are looked at, and gone back to ----

    def checkpoints(self, folder="out"):
        """Names of the finished ones, in order."""
        return sorted((name for name in os.listdir(self.path(folder)) if re.fullmatch(r"checkpoint-\d+", name)),
                      key=lambda name: int(name.split("-")[1]))

    def flip(self, name, at=None):
        """Turns one bit, in the middle of the file if no place is given; the same again turns it back."""
        with open(self.path(name), "r+b") as file:
            at = os.path.getsize(self.path(name)) // 2 if at is None else at
            file.seek(at)
            byte = file.read(1)[0]
            file.seek(at)
            file.write(bytes([byte ^ 0x04]))

    def test_inspect_tells_whole_checkpoints_from_broken_ones(self):
        self.accept("train", "run.yaml", "save_strategy=steps", "save_steps=2", "export=none")
        shown = self.accept("inspect", "out")
        self.assertEqual(re.findall(r"^out/checkpoint-(\d+): step (\d+), saved 2\d\d\d-\d\d-\d\d \d\d:\d\d:\d\d UTC, "
                                    r"[\d.]+ \wi?B, whole, read in", shown, re.M), [(n, n) for n in "2468"])
        self.assertEqual(shown.count("numerics: cpu "), 1)
        self.assertEqual(self.accept("inspect", "--quick", "out").count("complete, not verified"), 4)
        self.assertIn("out/checkpoint-4: step 4", self.accept("inspect", "out/checkpoint-4"))
        os.mkdir(self.path("out/checkpoint-10.tmp"))
        os.remove(self.path("out/checkpoint-2/checksums.json"))
        self.flip("out/checkpoint-6/optimizer-exp_avg.safetensors")
        done = self.flap("inspect", "out")
        self.assertEqual(done.returncode, 1)
        self.assertIn("1 of 5 checkpoints cannot be resumed", done.stderr)
        for wanted in (r"checkpoint-2: .* no checksums", r"checkpoint-4: .* whole", r"checkpoint-6: .* BROKEN",
                       r"  out/checkpoint-6/optimizer-exp_avg.safetensors: is not what was saved", r"checkpoint-8: .* whole",
                       r"checkpoint-10.tmp: step 10, .* unfinished"):
            self.assertRegex(done.stdout, wanted)
        self.assertNotIn("BROKEN", self.accept("inspect", "--quick", "out"))  # of which nothing was read

    def test_a_flipped_bit_in_any_file_is_named_and_never_trained_on(self):
        tried = set()  # by another optimizer: there are more files of adamw_8bit, but most are of the same kind
        for optim in ("adamw", "adamw_8bit"):
            common = ["run.yaml", f"output_dir={optim}", f"optim={optim}", "save_strategy=steps", "save_steps=4",
                      "export=none"]
            self.accept("train", *common)
            files = sorted(set(os.listdir(self.path(f"{optim}/checkpoint-8"))) - tried)
            self.assertGreaterEqual(len(files), 4)
            tried.update(files)
            before = self.metrics(optim)
            for name in files:
                path = f"{optim}/checkpoint-8/{name}"
                places = [None, 9, os.path.getsize(self.path(path)) - 1] if name.startswith("optimizer-exp_avg.") else [None]
                for at in places:
                    self.flip(path, at)
                    error = self.refuse(f"{optim}/checkpoint-8/", "train", *common, "max_steps=9",
                                        "resume_from_checkpoint=latest")
                    self.flip(path, at)
                    with self.subTest(file=path, at=at):
                        if name != "checksums.json":  # a sum that was changed accuses its file
                            self.assertIn(path, error)
                        self.assertIn(f"nothing was trained on it: go back to the checkpoint before with "
                                      f"resume_from_checkpoint={optim}/checkpoint-4", error)
            self.assertEqual(self.metrics(optim), before)
            self.flip(f"{optim}/checkpoint-4/model.safetensors")
            self.assertIn("no earlier checkpoint", self.refuse("checkpoint-4/model.safetensors", "train", *common,
                          "max_steps=9", f"resume_from_checkpoint={optim}/checkpoint-4"))
            self.accept("train", *common, "max_steps=9", "resume_from_checkpoint=true")  # all was turned back

    def test_checkpoint_of_an_earlier_version_resumes_with_a_warning(self):
        self.accept("train", "run.yaml", "save_strategy=steps", "save_steps=4", "export=none")
        os.remove(self.path("out/checkpoint-8/checksums.json"))
        done = self.flap("train", "run.yaml", "max_steps=9", "resume_from_checkpoint=true")
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertIn("cannot be told", done.stderr)

    def test_resume_with_other_numerics_is_refused_field_by_field(self):
        saving = ["save_strategy=steps", "save_steps=4", "export=none"]
        self.accept("train", "run.yaml", *saving)
        changed = ["per_device_train_batch_size=1", "gradient_dtype=fp32", "max_steps=9", "resume_from_checkpoint=true"]
        error = self.refuse("out/checkpoint-8 was saved by a run that computed differently", "train", "run.yaml", *changed)
        self.assertIn("(micro-batch: 2 x 32 then, 1 x 32 now; gradients: bfloat16 then, float32 now)", error)
        self.assertIn("allow_numerics_change: true", error)
        done = self.flap("train", "run.yaml", *changed, "allow_numerics_change=true")
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertIn("micro-batch: 2 x 32 then, 1 x 32 now", done.stderr)

    def test_resume_needs_no_more_than_training_did(self):
        # The least that each tier takes, given as sizes: a resume that needed a byte more would be refused or fail.
        saving = ["save_strategy=steps", "save_steps=3", "disk={path: disk, size: min}"]
        plan = json.loads(self.accept("plan", "run.yaml", "--json", "vram=min", "ram=min", *saving))
        least = [*saving, f"vram={plan['vram_bytes']}", f"ram={plan['ram_bytes']}",
                 f"disk={{path: disk, size: {plan['disk_sizes'][0]}}}"]
        self.accept("train", "run.yaml", "output_dir=whole", *least)
        process = subprocess.Popen([FLAP, "train", "run.yaml", *least], cwd=self.folder, stdout=subprocess.PIPE,
                                   stderr=subprocess.PIPE, text=True)
        for line in process.stdout:
            if line.startswith("saved "):
                process.kill()
                break
        process.communicate(timeout=60)
        self.assertEqual(process.returncode, -9)
        out = self.accept("train", "run.yaml", *least, "resume_from_checkpoint=latest")
        self.assertIn("continuing after step 3", out)
        self.assertEqual(self.losses("out"), self.losses("whole"))
        self.assertEqual(self.weights("out"), self.weights("whole"))
        peaks = re.findall(r"^(vram|ram|disk) {2,}.*? (\S+)$", out, re.M)
        self.assertEqual([tier for tier, _ in peaks], ["vram", "ram", "disk"])
        for tier, share in peaks:  # of the budget, as measured
            self.assertLessEqual(float(share.rstrip("%")), 100, (tier, out))

    def test_limit_on_addresses_is_found_before_the_start(self):
        with open(FLAP, "rb") as program:
            if re.search(rb"__[at]san_init", program.read()):
                self.skipTest("a sanitizer takes terabytes of addresses")

        def limit():
            resource.setrlimit(resource.RLIMIT_AS, (300 << 20, 300 << 20))
        done = subprocess.run([FLAP, "train", "run.yaml"], cwd=self.folder, capture_output=True, timeout=60, text=True,
                              preexec_fn=limit)
        self.assertEqual(done.returncode, 1, done.stdout)
        self.assertRegex(done.stderr, "flap: error: vram and ram: this run takes .* but ulimit -v leaves ")
        self.assertFalse(os.path.exists(self.path("out")))

    def test_what_is_written_is_planned_measured_and_kept_to_a_budget(self):
        common = ["run.yaml", "vram=min", "ram=min", "save_strategy=steps", "save_steps=3"]
        plan = json.loads(self.accept("plan", *common, "--json", "ssd_tbw=1GB"))
        self.assertGreater(plan["ssd_step_bytes"], 0)
        self.assertEqual((plan["run_steps"], plan["run_checkpoints"]), (8, 3))  # after 3, 6 and 8
        at_once = {limit: json.loads(self.accept("plan", *common, "--json", f"save_total_limit={limit}"))["checkpoints_at_once"]
                   for limit in (0, 1, 2, 3)}
        self.assertEqual(at_once, {0: 3, 1: 2, 2: 3, 3: 3})  # what is kept, and one that is written
        self.assertEqual(json.loads(self.accept("plan", "run.yaml", "--json", "save_strategy=no"))["checkpoints_at_once"], 0)
        once = plan["ssd_run_bytes"] - 8 * plan["ssd_step_bytes"] - 3 * plan["checkpoint_bytes"] - plan["export_bytes"]
        self.assertTrue(0 < once <= plan["disk_bytes"], plan)  # states, laid down at the start
        shown = self.accept("plan", *common, "ssd_tbw=1GB", "ssd_budget=50%")
        self.assertRegex(shown, r"run +\S+ MiB written in 8 steps, 3 checkpoints of \S+ KiB, export \S+ KiB\n")
        self.assertRegex(shown, r"\S+% of the 0.001 TB that the drives bear\n +\S+% of ssd_budget, 477 MiB\n")

        # A byte too few is refused, with what would do.
        budget = plan["ssd_run_bytes"]
        error = self.refuse("ssd_budget: this run would write", "train", *common, f"ssd_budget={budget - 1}")
        self.assertIn(f"allow {budget} bytes", error)
        steps = int(re.search(r"(\d+) steps stay within it", error).group(1))
        self.assertEqual(steps, 7)
        done = self.flap("plan", *common, f"ssd_budget={budget - 1}")
        self.assertEqual(done.returncode, 0)
        self.assertIn("flap: warning: ssd_budget: this run would write", done.stderr)
        self.accept("train", *common, "output_dir=less", f"max_steps={steps}", f"ssd_budget={budget - 1}")
        out = self.accept("train", *common, f"ssd_budget={budget}", "ssd_tbw=1GB")
        written, unit, share = re.search(r"^written to drives: (\S+) (\wiB) \(.* a step\), .* to save; .* TB per billion "
                                         r"tokens; (\S+)% of ssd_tbw$", out, re.M).groups()
        measured = float(written) * {"KiB": 1 << 10, "MiB": 1 << 20}[unit]
        self.assertAlmostEqual(measured / budget, 1, delta=0.1)  # the first and the last step write a little less
        self.assertAlmostEqual(float(share), measured / 1e7, delta=0.06 * measured / 1e7)
        self.refuse("give ssd_tbw", "train", *common, "output_dir=new", "ssd_budget=5%")
        for wrong in ("0", "0%", "101%", "x%", "5 %x", "-1"):
            self.refuse("ssd_budget", "plan", *common, f"ssd_budget={wrong}")

    def written_bytes(self, step):
        with open(self.path(f"out/checkpoint-{step}/trainer_state.json")) as file:
            return json.load(file)["written_bytes"]

    def test_what_was_written_before_counts_for_the_budget_of_a_run_that_goes_on(self):
        common = ["run.yaml", "vram=min", "ram=min", "save_strategy=steps", "save_steps=2", "val_size=0"]
        plan = json.loads(self.accept("plan", *common, "max_steps=4", "--json"))
        self.accept("train", *common, "max_steps=4", "export=none")
        written = [self.written_bytes(step) for step in (2, 4)]
        self.assertGreaterEqual(written[1] - written[0], plan["checkpoint_bytes"] + plan["ssd_step_bytes"])
        once = plan["ssd_run_bytes"] - 4 * plan["ssd_step_bytes"] - 2 * plan["checkpoint_bytes"] - plan["export_bytes"]
        self.assertTrue(once < written[0] <= plan["ssd_run_bytes"], (written, plan))
        self.assertLessEqual(written[1], plan["ssd_run_bytes"] - plan["export_bytes"])

        # Four steps more write as much again; a byte less than both together is too little.
        more = [*common, "max_steps=8", "resume_from_checkpoint=true"]
        budget = written[1] + plan["ssd_run_bytes"]
        error = self.refuse("ssd_budget: this run would write", "train", *more, f"ssd_budget={budget - 1}")
        self.assertRegex(error, rf" beside the \S+ MiB until now, .* 3 more steps stay within it, .* allow {budget} bytes")
        self.accept("train", *more, f"ssd_budget={budget}")
        self.assertAlmostEqual(self.written_bytes(8) / written[1], 2, delta=0.1)

    def test_save_minutes_saves_by_the_clock_and_changes_no_number(self):
        common = ["max_steps=9", "save_strategy=steps", "save_steps=1000"]
        self.accept("train", "run.yaml", "output_dir=whole", *common)
        self.accept("train", "run.yaml", *common, "save_minutes=1e-9")  # after every step, and not twice after the last
        self.assertEqual([int(name.split("-")[1]) for name in self.checkpoints()], list(range(1, 10)))
        self.assertEqual(self.losses("out"), self.losses("whole"))
        self.assertEqual(self.weights("out"), self.weights("whole"))
        self.accept("train", "run.yaml", "output_dir=rare", *common, "save_minutes=100")
        self.assertEqual(self.checkpoints("rare"), ["checkpoint-9"])
        self.refuse("save_minutes", "plan", "run.yaml", "save_minutes=5")  # save_strategy is no
        self.refuse("save_minutes", "plan", "run.yaml", "save_minutes=-1", "save_strategy=steps")

    # ---- what a person does wrong ----

    def test_budgets_that_are_too_small_name_the_least_that_works(self):
        for key in ("vram", "ram"):
            error = self.refuse(key, "train", "run.yaml", f"{key}=16KiB")
            self.assertRegex(error, r"\d+ bytes is the least that works")
        plan = json.loads(self.accept("plan", "run.yaml", "--json", "vram=min", "ram=min"))
        self.refuse("disk: ", "train", "run.yaml", f"vram={plan['vram_bytes']}", f"ram={plan['ram_bytes']}",
                    "disk={path: disk, size: 64KiB}")

    def test_missing_files_are_named(self):
        self.refuse("nothing.txt", "train", "run.yaml", "dataset=nothing.txt")
        self.refuse("nowhere", "train", "run.yaml", "disk=nowhere", "ram=min")
        self.refuse("nothing", "train", "run.yaml", "model=null", "model_name_or_path=nothing")
        self.refuse("nothing.json", "train", "run.yaml", "tokenizer=nothing.json")
        self.refuse("tokenizer: disk holds no tokenizer.json: name one, or `bytes`", "train", "run.yaml", "tokenizer=disk")
        self.refuse("nothing", "sample", "nothing")
        self.refuse("nothing", "inspect", "nothing")
        self.refuse("nothing", "export", "nothing", "x")
        self.refuse("nothing", "train", "run.yaml", "resume_from_checkpoint=nothing")

    def test_model_keys_that_are_wrong_are_named(self):
        self.refuse("hidden_sise", "plan", "run.yaml", "model.hidden_sise=64")
        self.refuse("num_attention_heads", "plan", "run.yaml", "model.num_attention_heads=5")
        self.refuse("model_type", "plan", "run.yaml", "model.model_type=gpt9")
        self.refuse("hidden_size", "plan", "run.yaml", "model.hidden_size=big")

    def test_least_budgets_beside_a_small_one_work(self):
        common = ["run.yaml", "model.model_type=qwen2", "model.hidden_size=96", "model.intermediate_size=256",
                  "model.num_hidden_layers=4", "model.num_attention_heads=6", "model.num_key_value_heads=2",
                  "model.max_position_embeddings=128", "cutoff_len=64", "disk={path: disk, size: 64MiB}",
                  "per_device_train_batch_size=4", "max_grad_norm=0"]
        for ram in (65000, 87000, 110000):
            plan = json.loads(self.accept("plan", *common, "--json", "vram=min", f"ram={ram}"))
            self.assertEqual(plan["vram_min"], plan["vram_budget"])
            self.accept("plan", *common, f"vram={plan['vram_min']}", f"ram={ram}")
            self.accept("plan", *common, f"vram={plan['vram_min']}", f"ram={plan['ram_min']}")

    def test_broken_inputs_are_refused(self):
        self.write("bad.jsonl", '{"text": "fine"}\n{"text": 5}\n')
        self.refuse("bad.jsonl", "train", "run.yaml", "dataset=bad.jsonl")
        self.write("bad.bin", b"x" * 100)
        self.refuse("bad.bin", "train", "run.yaml", "dataset=bad.bin")
        self.write("short.txt", "short")
        self.refuse("short.txt", "train", "run.yaml", "dataset=short.txt")
        self.write("tokenizer.json", '{"model": {"type": "Unigram"}}')
        self.refuse("tokenizer.json", "train", "run.yaml", "tokenizer=tokenizer.json")
        os.mkdir(self.path("broken"))
        self.write("broken/config.json", json.dumps({"model_type": "llama", "hidden_size": 32, "intermediate_size": 64,
                   "num_hidden_layers": 3, "num_attention_heads": 2, "vocab_size": 257, "rms_norm_eps": 1e-5}))
        self.write("broken/model.safetensors", struct.pack("<Q", 1 << 60) + b"{}")
        self.refuse("broken/model.safetensors", "train", "run.yaml", "model=null", "model_name_or_path=broken")
        self.refuse("broken/model.safetensors", "sample", "broken", "tokenizer=bytes")

    @unittest.skipIf(os.geteuid() == 0, "root may write everywhere")
    def test_a_folder_that_cannot_be_written_is_named(self):
        os.mkdir(self.path("locked"), 0o500)
        self.refuse("locked", "train", "run.yaml", "output_dir=locked/out")

    def test_output_dir_that_is_a_file_is_named(self):
        self.write("file", "")
        self.refuse("file", "train", "run.yaml", "output_dir=file")

    def test_trace_that_cannot_be_written_costs_no_model(self):
        os.makedirs(self.path("out/trace.json"))
        done = self.flap("train", "run.yaml")
        self.assertEqual(done.returncode, 1)
        self.assertIn("flap: error: cannot rename out/trace.json.tmp to out/trace.json: Is a directory", done.stderr)
        self.assertEqual(sorted(os.listdir(self.path("out"))),
                         ["config.json", "finished.json", "metrics.jsonl", "model.safetensors", "tokenizer.json",
                          "tokenizer_config.json", "trace.json"])
        self.accept("eval", "run.yaml")

    def test_metrics_that_are_no_file_are_named_and_broken_lines_numbered(self):
        save = ["train", "run.yaml", "save_strategy=steps", "save_steps=4"]
        self.accept(*save)
        with open(self.path("out/metrics.jsonl"), "a") as file:
            file.write("{}\nbroken\n")
        self.refuse("out/metrics.jsonl:12: not a line of JSON", "inspect", "out/metrics.jsonl")
        for make in os.mkfifo, lambda path: os.symlink("/dev/zero", path):
            os.remove(self.path("out/metrics.jsonl"))
            make(self.path("out/metrics.jsonl"))
            self.refuse("out/metrics.jsonl is not a regular file", *save, "max_steps=10", "resume_from_checkpoint=true")
            self.refuse("out/metrics.jsonl: neither a folder nor a regular file", "inspect", "out/metrics.jsonl")

    def test_output_dir_that_leads_nowhere_is_named(self):
        self.write("file", "something")
        os.symlink("nowhere", self.path("link"))
        self.refuse("output_dir: file/out cannot be made or looked at: Not a directory", "train", "run.yaml",
                    "output_dir=file/out")
        self.refuse("output_dir: link is a link to what is not there", "train", "run.yaml", "output_dir=link")

    def test_loss_that_is_not_finite_stops_and_says_where(self):
        # Decay then multiplies the weights by -1e12 a step, which no model survives.
        done = self.flap("train", "run.yaml", "learning_rate=1e6", "weight_decay=1e6", "max_grad_norm=0", "max_steps=200")
        self.assertEqual(done.returncode, 1, done.stderr)
        self.assertRegex(done.stderr, r"step \d+: .*not finite.*(layer \d+|embedding|head)")
        self.assertFalse(os.path.exists(self.path("out/model.safetensors")))

    def test_nothing_is_saved_after_a_step_that_is_not_finite(self):
        """Updates in the backward may have begun by then: what stands is the checkpoint of an earlier step."""
        steps = {}
        for update in ("fold", "backward"):
            done = self.flap("train", "run.yaml", "learning_rate=1e6", "weight_decay=1e6", "max_grad_norm=0", "max_steps=200",
                             "save_strategy=steps", "save_steps=1", f"expert.update={update}", f"output_dir={update}")
            self.assertEqual(done.returncode, 1, done.stderr)
            steps[update] = int(re.search(r"step (\d+): ", done.stderr).group(1))
            saved = sorted(each for each in os.listdir(self.path(update)) if each.startswith("checkpoint"))
            self.assertFalse(os.path.exists(self.path(f"{update}/model.safetensors")))
            self.assertEqual(len(saved), steps[update] - 1, (saved, done.stderr))
            shown = self.flap("inspect", update)
            self.assertEqual((shown.returncode, shown.stderr), (0, ""))
            with open(self.path(f"{update}/{saved[-1]}/model.safetensors"), "rb") as file:
                steps[update] = (steps[update], file.read())
        self.assertEqual(steps["fold"], steps["backward"])


if __name__ == "__main__":
    unittest.main()
