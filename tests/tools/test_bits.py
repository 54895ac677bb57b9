"""Budgets and the planner's choices change no bit of the numbers: the whole program with its real engine, on one model
trained in many ways. Usage: test_bits.py <flap>

Every case trains the same tiny model on the same text. What metrics.jsonl says of losses and norms and every byte of
model.safetensors must be those of the run that keeps everything in vram. Of each run the table at the end must also show that
what moved and what was used is what had been planned, and `flap plan` must have said the same before.

FLAP_TEST_ROW=<text> runs only the cases whose name holds it (and the run they are compared with)."""
import concurrent.futures
import json
import os
import random
import re
import shutil
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
ONLY = os.environ.get("FLAP_TEST_ROW", "")
SEED = 20240229
LANES = ["h2d", "d2h", "disk_read", "disk_write"]
TIERS = ["vram", "ram", "disk"]
STEPS, LAYERS, PARAMETERS = 6, 4, 189056

RUN = """model:
  model_type: llama
  hidden_size: 64
  intermediate_size: 160
  num_hidden_layers: 4
  num_attention_heads: 4
  num_key_value_heads: 2
  max_position_embeddings: 64
  tie_word_embeddings: true
tokenizer: bytes
dataset: text.txt
val_size: 6
cutoff_len: 64
per_device_train_batch_size: 2
gradient_accumulation_steps: 4
max_steps: 6
warmup_steps: 2
learning_rate: 1e-2
weight_decay: 0.1
max_grad_norm: 2.5
logging_steps: 1
save_strategy: no
vram: 64MiB
ram: 64MiB
device: cpu
expert: {threads: 1}
"""

# Name: overrides; the budgets of a case are those of its first word.
BUDGETS = {"roomy": [], "device": ["vram=min"], "host": ["ram=min"], "both": ["vram=min", "ram=min"],
           "half": ["vram=3MiB", "ram=1MiB"]}
CASES = {
    "device": [], "host": [], "both": [], "half": [],
    "both io_uring": ["expert.io=io_uring"],
    "both io threads": ["expert.io=threads"],
    "both 3 disks": ["DISKS=3"],
    "both 3 disks, io threads": ["DISKS=3", "expert.io=threads"],
    **{f"both segments of {n}": [f"expert.segment_layers={n}"] for n in (1, 2, 3, 4)},
    **{f"both groups of {n}": [f"expert.group_micro_batches={n}"] for n in (1, 2, 4)},
    "both tail of 3, segments of 1": ["expert.segment_layers=1", "expert.tail_layers=3"],
    "half segments of 3, groups of 2": ["expert.segment_layers=3", "expert.group_micro_batches=2"],
    "both keep": ["activations=keep"],
    "half offload": ["activations=offload"],
    "both offload": ["activations=offload"],
    "both keep attention": ["activations=keep", "expert.saved=attention"],
    "both keep everything": ["activations=keep", "expert.saved=everything"],
    "half offload everything": ["activations=offload", "expert.saved=everything"],
    "half offload all but the mlp": ["activations=offload", "expert.saved=all_but_mlp"],
    "both offload attention, segments of 2": ["activations=offload", "expert.saved=attention", "expert.segment_layers=2"],
    "roomy recompute": ["activations=recompute"],
    "both recompute, segments of 2": ["activations=recompute", "expert.segment_layers=2"],
    "both fold": ["expert.clip=fold"],
    "both sweep": ["expert.clip=sweep"],
    "roomy sweep": ["expert.clip=sweep"],
    "both smallest pages": ["expert.page_bytes=4KiB"],
    "both largest pages": ["expert.page_bytes=4MiB"],
    "half smallest slices": ["expert.slice_bytes=4KiB"],
    "both largest slices": ["expert.slice_bytes=64MiB"],
    "half deep staging": ["expert.page_bytes=4KiB", "expert.staging_bytes=512KiB"],
    "both 3 threads": ["expert.threads=3"],
    "roomy 3 threads": ["expert.threads=3"],
    "both compressed, 3 disks, io threads": ["compression=lz4", "expert.page_bytes=64KiB", "DISKS=3", "expert.io=threads"],
    "both compressed, 3 threads": ["compression=zstd", "expert.page_bytes=16KiB", "expert.threads=3"],
    "half a large pool": ["compression=zstd", "expert.pool_bytes=256KiB", "expert.page_bytes=16KiB"],
    "half a pool, lz4": ["compression=lz4", "expert.pool_bytes=128KiB", "expert.page_bytes=8KiB"],
    "half not compressed": ["compression=off"],
    "half evaluated between": ["eval_strategy=steps", "eval_steps=3"],
    "both a second backward": ["expert.update=backward"],
    "device a second backward, half by the host, evaluated between": ["expert.update=backward", "expert.optimizer=split",
                                                                      "eval_strategy=steps", "eval_steps=3"],
}
BACKWARD = {  # where nothing is clipped
    "roomy": [], "both": [], "half": [], "device": [],
    "both backward": ["expert.update=backward"],
    "half backward": ["expert.update=backward"],
    "roomy backward": ["expert.update=backward"],
    "both backward, groups of 1, segments of 2": ["expert.update=backward", "expert.group_micro_batches=1",
                                                  "expert.segment_layers=2"],
    "device backward, by the host": ["expert.update=backward", "expert.optimizer=cpu"],
    "both backward, half by the host": ["expert.update=backward", "expert.optimizer=split"],
    "half backward, offload, evaluated between": ["expert.update=backward", "activations=offload", "eval_strategy=steps",
                                                  "eval_steps=2"],
    "both backward, smallest slices, 3 disks": ["expert.update=backward", "expert.slice_bytes=4KiB", "DISKS=3"],
    # Offloaded: else all of it fits vram and ram, and disks that are measured as slow at the moment are left out.
    "half backward, deep staging, 3 disks": ["expert.update=backward", "ram=2500KiB", "expert.page_bytes=4KiB",
                                             "expert.staging_bytes=1MiB", "activations=offload", "DISKS=3"],
    "both fold": ["expert.update=fold"],
    "half sweep": ["expert.update=sweep"],
}
FEW = ["both compressed, 3 threads", "both 3 disks", "both segments of 3", "half offload all but the mlp", "both sweep",
       "both a second backward"]
if SANITIZED:  # by hand, for the checks leave it out there: what differs in code, once for each type
    CASES = {name: CASES[name] for name in ("device", "both 3 disks", "half offload all but the mlp")}
    FEW = ["both 3 disks"]
    BACKWARD = {name: BACKWARD[name] for name in ("both backward, half by the host", "half backward, deep staging, 3 disks")}
# Where a plan must show what a case asked for.
SAVED = {"attention": "attention, lse", "all_but_mlp": "qkv, attention, lse, rstd, residual",
         "everything": "qkv, attention, lse, rstd, residual, gate_up, normalized_input, normalized_residual, inner"}
CHOICES = {"expert.segment_layers": "segment_layers", "expert.tail_layers": "tail_layers",
           "expert.group_micro_batches": "group_micro_batches"}


def text():
    """64 KB of lines that can be learnt, and that no two seeds share."""
    words = random.Random(SEED)
    lines, count = [], 0
    while count < 64 << 10:
        a, b = words.randrange(100), words.randrange(100)
        lines.append(f"{a} and {b} make {a + b}; {words.choice(['so', 'thus', 'hence'])} {a + b} less {b} is {a}.\n")
        count += len(lines[-1])
    return "".join(lines)


def size(shown):
    """A size as the table shows it, and how far off the rounding may be."""
    number, unit = shown.split(" ")
    scale = {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}[unit]
    return float(number) * scale, 0.005 * float(number) * scale


class Bits(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.folder = tempfile.mkdtemp(prefix="flap-bits-")
        cls.addClassCleanup(shutil.rmtree, cls.folder)
        # Rates that are measured once, so that two plans can agree.
        cls.environment = {**os.environ, "FLAP_MACHINE": os.path.join(cls.folder, "machine.json")}
        with open(os.path.join(cls.folder, "run.yaml"), "w") as file:
            file.write(RUN)
        with open(os.path.join(cls.folder, "text.txt"), "w") as file:
            file.write(text())
        # The first one alone, so that no two measure at once.
        subprocess.run([FLAP, "plan", "run.yaml", "output_dir=none", "disk={path: ., size: 64MiB}"], cwd=cls.folder,
                       env=cls.environment, capture_output=True, check=True, timeout=120)

    def flap(self, *arguments):
        return subprocess.run([FLAP, *arguments], cwd=self.folder, env=self.environment, capture_output=True, text=True,
                              timeout=300)

    def arguments(self, name, overrides, out):
        """Of plan and train, which take the same."""
        disks = 3 if "DISKS=3" in overrides else 1
        paths = [f"{out}-disk{i}" for i in range(disks)]
        for path in paths:
            os.makedirs(os.path.join(self.folder, path), exist_ok=True)
        entries = ", ".join(f"{{path: {path}, size: 64MiB}}" for path in paths)
        return ["run.yaml", f"output_dir={out}", f"disk=[{entries}]", *BUDGETS.get(name.split(" ")[0], []),
                *[each for each in overrides if each != "DISKS=3"]]

    def read(self, out):
        """Losses, norms and loss scales by step, held-out losses by step, and the bytes of the model."""
        losses, evals = {}, {}
        with open(os.path.join(self.folder, out, "metrics.jsonl")) as file:
            for line in map(json.loads, file):
                if "eval_loss" in line:
                    evals[line["step"]] = line["eval_loss"]
                else:
                    losses[line["step"]] = (line["loss"], line["grad_norm"], line.get("loss_scale"), line.get("skipped"))
        with open(os.path.join(self.folder, out, "model.safetensors"), "rb") as file:
            return losses, evals, file.read()

    def check_table(self, plan, shown):
        """What the program printed at the end, beside what `flap plan` said before."""
        for tier in TIERS:
            row = re.search(rf"^{tier}  +(\S+ \S+)  +(\S+ \S+)  +(\S+ \S+)  +\S+$", shown, re.M)
            self.assertIsNotNone(row, shown)
            budget, planned, peak = row.groups()
            self.assertEqual(planned, peak, tier)
            for figure, key in ((budget, "budget"), (peak, "bytes")):
                value, rounding = size(figure)
                self.assertAlmostEqual(value, plan[f"{tier}_{key}"], delta=rounding, msg=(tier, key))
            self.assertLessEqual(plan[f"{tier}_bytes"], plan[f"{tier}_budget"])
        for lane in LANES:
            row = re.search(rf"^{lane} +(\S+) +(\S+) +(\S+)$", shown, re.M)
            self.assertIsNotNone(row, shown)
            moved, planned, _ = row.groups()
            self.assertEqual((moved, planned), (planned, f"{plan['lane_bytes'][lane] / PARAMETERS:.2f}"), lane)

    def check_compression(self, out, always, never, pool):
        """What the disks moved is what pages came to, and less where they were compressed: moments begin as zeros."""
        with open(os.path.join(self.folder, out, "metrics.jsonl")) as file:
            steps = [line for line in map(json.loads, file) if "loss" in line]
        for step in steps:
            moved, pages = sum(step["disk_bytes"].values()), step["bytes"]["disk_read"] + step["bytes"]["disk_write"]
            pages -= sum(step["pooled_bytes"].values())
            self.assertLessEqual(moved, pages)
            self.assertAlmostEqual(step["compression_ratio"], pages / moved if moved else 1, places=9)
            self.assertTrue(not never or moved == pages)
        self.assertEqual(pool, max(min(step["pooled_bytes"].values()) for step in steps) > 0, out)
        self.assertTrue(not always or max(step["compression_ratio"] for step in steps) > 1.01, out)

    def check_choices(self, plan, overrides):
        for override in overrides:
            key, value = override.split("=", 1)
            if key in CHOICES:
                self.assertEqual(plan[CHOICES[key]], int(value), override)
            elif key in ("expert.clip", "expert.update"):
                self.assertEqual(plan["sweep"], value == "sweep", override)
                self.assertEqual(plan["backward_parts"], plan["part_count"] if value == "backward" else 0, override)
                self.assertEqual(plan["backward_twice"], value == "backward" and "max_grad_norm=0" not in overrides)
            elif override == "activations=keep":
                self.assertEqual((plan["saved_layers"], plan["saved_resident"]), (LAYERS, True))
            elif key == "expert.saved":
                self.assertEqual(plan["saved_tensors"], SAVED[value], override)
            elif override == "activations=recompute":
                self.assertEqual(plan["saved_layers"], 0)
            elif key == "expert.staging_bytes":
                self.assertGreater(plan["read_buffers"], 16, override)
            elif key == "expert.pool_bytes":
                self.assertGreater(plan["ram_pool_bytes"], 0, override)
                self.assertTrue(0 < plan["pooled_share"] <= 1 and 0 < plan["disk_share"] <= 1, override)
            elif key == "compression":
                self.assertEqual(plan["compression"], value)
            elif key == "expert.page_bytes":
                self.assertEqual(plan["page_bytes"], {"4KiB": 4 << 10, "8KiB": 8 << 10, "16KiB": 16 << 10, "64KiB": 64 << 10, "4MiB": 4 << 20}[value])

    def train(self, name, overrides, out):
        """Plans and trains; None where the system has no io_uring."""
        arguments = self.arguments(name, overrides, out)
        planned = self.flap("plan", "--json", *arguments)
        self.assertEqual(planned.returncode, 0, (name, planned.stderr))
        plan = json.loads(planned.stdout)
        self.assertEqual(plan["parameters"], PARAMETERS)
        self.check_choices(plan, overrides)
        done = self.flap("train", *arguments)
        if done.returncode and "expert.io=io_uring" in overrides and "io_uring" in done.stderr:
            return None
        self.assertEqual((done.returncode, done.stderr), (0, ""), (name, done.stdout))
        self.check_table(plan, done.stdout)
        for disk in (path for path in os.listdir(self.folder) if path.startswith(f"{out}-disk")):
            self.assertEqual(os.listdir(os.path.join(self.folder, disk)), [])
        return plan

    def compare(self, name, out, reference, first=1):
        losses, evals, model = self.read(out)
        self.assertEqual(losses, {step: value for step, value in reference[0].items() if step >= first}, name)
        self.assertIn(STEPS, evals, name)
        self.assertEqual({step: evals[step] for step in evals if step in reference[1]},
                         {step: value for step, value in reference[1].items() if step in evals}, name)
        self.assertTrue(model == reference[2], f"{name}: model.safetensors differs")
        return evals

    def reference(self, tag, common, skipped=()):
        skipped = list(skipped)
        plan = self.train("roomy", common, f"{tag}-roomy")
        self.assertEqual(set(plan["lane_bytes"].values()), {0})
        reference = self.read(f"{tag}-roomy")
        self.assertEqual((sorted(reference[0]), sorted(reference[1])), (list(range(1, STEPS + 1)), [0, STEPS]))
        self.assertLess(reference[1][STEPS], reference[1][0] - 1)  # it learns, and the losses are not all alike
        self.assertEqual(len({step[0] for step in reference[0].values()}), STEPS)
        self.assertEqual([number for number, step in reference[0].items() if step[3]], skipped)
        norms = sorted(step[1] for number, step in reference[0].items() if number not in skipped)
        self.assertTrue((norms[0] < 2.5 or skipped) and 2.5 < norms[-1], norms)  # some are clipped, others not
        return reference

    def suite(self, tag, common, names, skipped=(), cases=CASES):
        reference = self.reference(tag, common, skipped)

        def case(number, name):
            out = f"{tag}-{number}"
            plan = self.train(name, common + cases[name], out)
            if plan is None:
                return f"{tag}, {name}: left out, this system has no io_uring"
            if name.startswith("both"):  # it does stream; buffers of the largest pages leave room for homes in RAM
                lanes = LANES[:2] if name == "both largest pages" else LANES
                self.assertGreater(min(plan["lane_bytes"][lane] for lane in lanes), PARAMETERS, name)
            self.compare(name, out, reference)
            self.check_compression(out, any(key in ("compression=lz4", "compression=zstd") for key in cases[name]),
                                   "compression=off" in cases[name],
                                   any(key.startswith("expert.pool_bytes") for key in cases[name]))
            return None

        names = [name for name in names if ONLY in name]
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            waiting = {name: pool.submit(case, number, name) for number, name in enumerate(names)}
        for name, result in waiting.items():
            with self.subTest(case=name, common=common):
                said = result.result()
                if said:
                    print(said)
        return reference

    def check_resume(self, tag, common, reference):
        """A checkpoint in the middle, continued at other budgets and in other ways; then a run that was killed."""
        if SANITIZED and tag not in ("bf16", "skips"):
            return
        saving = common + ["save_strategy=steps", "save_steps=3"]
        self.train("half", saving, f"{tag}-saved")
        self.compare("half, saved between", f"{tag}-saved", reference)
        checkpoint = f"resume_from_checkpoint={tag}-saved/checkpoint-3"
        for name, overrides in {"roomy": [], "both": ["expert.clip=sweep", "DISKS=3", "expert.page_bytes=4KiB"],
                                "device": ["expert.group_micro_batches=1", "expert.threads=3", "expert.slice_bytes=4KiB"]}.items():
            out = f"{tag}-resumed-{name}"
            done = self.flap("train", *self.arguments(name, common + overrides + [checkpoint], out))
            self.assertEqual((done.returncode, done.stderr), (0, ""), (name, done.stdout))
            self.assertIn("continuing after step 3", done.stdout)
            self.compare(f"resumed: {name}", out, reference, first=4)

        out = f"{tag}-killed"
        process = subprocess.Popen([FLAP, "train", *self.arguments("both", saving, out)], cwd=self.folder,
                                   env=self.environment, stdout=subprocess.PIPE, text=True)
        for line in process.stdout:
            if line.startswith("saved ") and "checkpoint-3" in line:
                process.kill()
                break
        process.communicate(timeout=60)
        self.assertEqual(process.returncode, -9)
        done = self.flap("train", *self.arguments("roomy", saving + ["resume_from_checkpoint=true"], out))
        self.assertEqual((done.returncode, done.stderr), (0, ""), done.stdout)
        self.compare("killed and resumed", out, reference)

    # ---- tests ----

    def test_gradients_in_bf16(self):
        common = ["gradient_dtype=bf16"]
        reference = self.suite("bf16", common, CASES)
        self.check_resume("bf16", common, reference)

    @unittest.skipIf(SANITIZED, "takes too long under a sanitizer")
    def test_gradients_in_fp32(self):
        common = ["gradient_dtype=fp32"]
        self.suite("fp32", common, list(CASES)[::5])  # a checkpoint has none; "skips" resumes with fp32 ones

    def test_nothing_is_clipped(self):
        common = ["max_grad_norm=0"]
        reference = self.suite("free", common, BACKWARD, cases=BACKWARD)
        self.check_resume("free", common, reference)
        # Gradients neither pass the bus nor need to.
        plans = [json.loads(self.flap("plan", "--json", *self.arguments("device", each, "free-plan")).stdout)
                 for each in (common + ["expert.update=backward"], common + ["expert.update=fold"], [])]
        self.assertEqual(plans[0]["classes"]["gradients"]["bytes"], 0)
        self.assertGreater(plans[1]["classes"]["gradients"]["bytes"], 0)
        for lane in LANES[:2]:
            self.assertLess(plans[0]["lane_bytes"][lane], plans[1]["lane_bytes"][lane], lane)
            self.assertLess(plans[0]["bound_bytes"][lane], plans[2]["bound_bytes"][lane], lane)
            self.assertEqual(plans[0]["bound_bytes"][lane], plans[1]["bound_bytes"][lane], lane)

    def test_everything_in_fp32(self):
        self.suite("full", ["bf16=false"], FEW)

    def test_everything_in_fp16(self):
        common = ["fp16=true"]
        reference = self.suite("fp16", common, FEW[::2])  # "skips" has the others
        self.assertEqual({step[2:] for step in reference[0].values()}, {(65536, False)})

    def test_moments_in_8_bits(self):
        common = ["optim=adamw_8bit"]
        reference = self.suite("eight", common, FEW)
        self.check_resume("eight", common, reference)
        # 2 bytes of weight, 2 of its low half, two codes, and an fp32 number for each 256 of these: of whole blocks. The
        # embedding (257 x 64, padded to 5 x 4096) has two fp32 moments instead.
        plans = [json.loads(self.flap("plan", "--json", *self.arguments("both", each, "eight-plan")).stdout)
                 for each in ([], common)]
        blocks = plans[0]["state_bytes"] / 12 / 256
        embedding = 5 * 4096 / 256
        self.assertEqual(plans[1]["state_bytes"], (blocks - embedding) * (256 * 6 + 8) + embedding * 256 * 12)
        self.assertEqual([plan["optim"] for plan in plans], ["adamw", "adamw_8bit"])
        self.assertEqual([plan["moments"] for plan in plans],
                         [{"embedding": "fp32", "other": "fp32"}, {"embedding": "fp32", "other": "8-bit"}])
        shown = self.flap("plan", *self.arguments("both", common, "eight-plan")).stdout
        self.assertIn("(8-bit moments, the embedding's in fp32)", shown)
        self.assertNotEqual(plans[0]["compute_seconds"], plans[1]["compute_seconds"])
        for lane in LANES:
            self.assertLess(plans[1]["lane_bytes"][lane], 0.85 * plans[0]["lane_bytes"][lane], lane)
            self.assertLess(plans[1]["bound_bytes"][lane], 0.7 * plans[0]["bound_bytes"][lane], lane)

    @unittest.skipIf(SANITIZED, "takes too long under a sanitizer")
    def test_checkpoints_of_another_optimizer_are_refused(self):
        for saved, wanted in (("adamw", "adamw_8bit"), ("adamw_8bit", "adamw")):
            out, checkpoint = f"optim-{saved}", f"optim-{saved}/checkpoint-3"
            saving = [f"optim={saved}", "save_strategy=steps", "save_steps=3", "max_steps=3"]
            self.assertEqual(self.flap("train", *self.arguments("roomy", saving, out)).returncode, 0)
            for resume, to in ((checkpoint, "optim-new"), ("true", out)):
                done = self.flap("train", *self.arguments(
                    "roomy", [f"optim={wanted}", f"resume_from_checkpoint={resume}"], to))
                self.assertEqual(done.returncode, 1, done.stdout)
                self.assertRegex(done.stderr, f"^flap: error: optim: {checkpoint} was saved with optim: {saved}, and "
                                              f"cannot go on with {wanted}: set optim: {saved}, or [^\n]*\n$")
            self.assertFalse(os.path.exists(os.path.join(self.folder, "optim-new")))
            shown = self.flap("inspect", checkpoint)
            self.assertEqual((shown.returncode, shown.stderr), (0, ""))
            self.assertRegex(shown.stdout, f'(?m)^  optim +"{saved}"$')
            embedding, down = "model.embed_tokens.weight", "model.layers.0.mlp.down_proj.weight"
            for name, dtype, shapes in {
                    "adamw": [("exp_avg", "F32", {embedding: "257, 64", down: "64, 160"}),
                              ("exp_avg_sq", "F32", {embedding: "257, 64", down: "64, 160"})],
                    "adamw_8bit": [("exp_avg", "F32", {embedding: "257, 64"}),
                                   ("exp_avg_sq", "F32", {embedding: "257, 64"}),
                                   ("exp_avg-codes", "I8", {down: "64, 160"}), ("exp_avg-largest", "F32", {down: "40"}),
                                   ("exp_avg_sq-codes", "U8", {down: "64, 160"}),
                                   ("exp_avg_sq-largest", "F32", {down: "40"})]}[saved]:
                shown = self.flap("inspect", f"{checkpoint}/optimizer-{name}.safetensors")
                for tensor in (embedding, down):
                    if tensor in shapes:
                        self.assertRegex(shown.stdout, fr"(?m)^  {re.escape(tensor)} +{dtype} +\({shapes[tensor]}\) ")
                    else:
                        self.assertNotIn(tensor, shown.stdout)
            # Its weights are what they are, whatever their moments were: they start another run, and export to fp32.
            export = self.flap("export", checkpoint, f"{out}-f32", "--dtype", "float32")
            self.assertEqual((export.returncode, export.stderr), (0, ""))
            anew = self.flap("train", *self.arguments("roomy", [
                f"optim={wanted}", "model=null", "tokenizer=null", f"model_name_or_path={checkpoint}"], f"{out}-anew"))
            self.assertEqual((anew.returncode, anew.stderr), (0, ""), anew.stdout)

    def test_fp16_with_skipped_steps(self):
        """Overflow at first, then a scale that fits, that grows after two good steps and is too large again. The checkpoint
        is between the two good steps, and is continued past the next overflow."""
        common = ["fp16=true", "fp16_init_scale=4194304", "fp16_growth_interval=2", "gradient_dtype=fp32"]
        reference = self.suite("skips", common, FEW[-1::-2], skipped=[1, 2, 5])
        million = 1 << 20
        self.assertEqual([reference[0][step][2] for step in range(1, STEPS + 1)],
                         [4 * million, 2 * million, million, million, 2 * million, million])
        self.check_resume("skips", common, reference)
        state = os.path.join(self.folder, "skips-saved", "checkpoint-3", "trainer_state.json")
        with open(state) as file:
            kept = {key: value for key, value in json.load(file).items() if key != "loss_scale"}
        with open(state, "w") as file:
            json.dump(kept, file)
        os.remove(os.path.join(os.path.dirname(state), "checksums.json"))  # which would find it first
        done = self.flap("train", *self.arguments("roomy", common + ["resume_from_checkpoint=skips-saved/checkpoint-3"],
                                                  "skips-changed"))
        self.assertEqual(done.returncode, 1, done.stdout)
        self.assertIn("skips-saved/checkpoint-3 has no loss_scale, but its weights are float16", done.stderr)

    @unittest.skipIf(SANITIZED, "asks whether numbers differ, which a sanitizer does not change")
    def test_what_does_change_the_numbers_is_seen(self):
        """The comparison can fail: another seed, another rounding, another order of the additions."""
        seen = [self.reference(f"other-{number}", overrides) for number, overrides in
                enumerate([[], ["seed=43"], ["gradient_dtype=fp32"], ["bf16=false"], ["fp16=true"],
                           ["optim=adamw_8bit"]])]
        for which in (2, 0):
            self.assertEqual(len({str(each[which]) for each in seen}), 6)
        for other in seen[1:]:
            self.assertNotEqual(other[1][STEPS], seen[0][1][STEPS])
            with self.assertRaises(self.failureException):
                self.compare("other", "other-0-roomy", other)


if __name__ == "__main__":
    unittest.main()
