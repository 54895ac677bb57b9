#!/usr/bin/env python3
"""A long run in many lives. Usage: soak.py <flap> [--device cpu] [--minutes 60] [--seed 1] [--folder /var/tmp]

A small model is trained out of core, on the CPU device or, a larger one, on a GPU. Every few minutes the run is stopped (SIGINT, or now and then kill -9)
and resumed with other budgets, drawn at random: vram, ram, one or two disks and their sizes, pages, slices, segments, where
the optimizer runs, whether checkpoints share what is on the disk, compression, I/O. When the minutes are over it goes on to its end, and then the same steps are trained
without a stop, with everything in memory: weights, moments, losses, norms and the exported model must be the same to the bit.

Of each life's processes resident memory, threads and descriptors are sampled every half a second, from ten steps behind the
life's first checkpoint on: that touches the memory through which it is written for the first time, about 1 MiB. They are flat if between the first and the last third of the samples the median of resident memory grew by no
more than 1 MiB, and the smallest number of threads and of descriptors (what is there when nothing is being saved) by none. Threads that the system starts for io_uring ("iou-wrk-") are left out.
Lives with fewer than 12 samples are not judged.

Not in ctest: a person runs it. The last line says what was done, and the seed."""
import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
sys.dont_write_bytecode = True
from kill_program import MODEL_FILES, digests  # noqa: E402

RUN = """model: {model_type: llama, %(model)s, tie_word_embeddings: true}
tokenizer: bytes
dataset: text.txt
val_size: 8
cutoff_len: %(sequence)d
per_device_train_batch_size: 2
gradient_accumulation_steps: 2
learning_rate: 1e-3
lr_scheduler_type: constant_with_warmup
warmup_steps: 20
logging_steps: 1
save_strategy: steps
save_steps: %(save_steps)d
save_total_limit: 2
output_dir: out
device: %(device)s
"""
KIB, MIB = 1 << 10, 1 << 20
# Of each device: the model, and what budgets and sizes are drawn from; ranges and sizes with their unit.
SCALES = {
    "cpu": {"model": "hidden_size: 128, intermediate_size: 344, num_hidden_layers: 8, num_attention_heads: 4, "
                     "num_key_value_heads: 2, max_position_embeddings: 64", "sequence": 64,
            "vram": ((2500, 6000, "KiB"), (6, 16, "MiB")), "ram": ((4500, 9000, "KiB"), (9, 40, "MiB")),
            "disks": (("64MiB", "48MiB"), ("16MiB", "48MiB")), "pages": ("4KiB", "16KiB", "64KiB", "128KiB"),
            "slices": ("64KiB", "256KiB"), "staging": ("256KiB", "2MiB")},
    # States of 0.6 GiB; the context alone takes half a GiB of vram.
    "cuda": {"model": "hidden_size: 768, intermediate_size: 2048, num_hidden_layers: 8, num_attention_heads: 12, "
                      "num_key_value_heads: 4, max_position_embeddings: 256", "sequence": 256,
             "vram": ((700, 1000, "MiB"), (1000, 1300, "MiB")), "ram": ((60, 200, "MiB"), (200, 500, "MiB")),
             "disks": (("2GiB", "1536MiB"), ("512MiB", "1GiB")), "pages": ("64KiB", "256KiB", "1MiB", "4MiB"),
             "slices": ("1MiB", "8MiB"), "staging": ("8MiB", "64MiB")}}
STEPS_MAX = 10 ** 6
WARM_STEPS = 10
SAMPLE_SECONDS = 0.5
SAMPLES_LEAST = 12
RESIDENT_GROWTH_MAX = 1 * MIB
START_SECONDS_MAX = 120
STOP_SECONDS_MAX = 120
KILL_SHARE = 0.25


def text(count):
    """Sentences that hardly repeat; the same for everybody."""
    draws = random.Random(0)
    words = [f"{a}{b}{c}" for a in ("ka", "lo", "mi", "ru", "se") for b in ("na", "ti", "vo") for c in ("r", "n", "st")]
    return "".join(f"{number}: {' '.join(draws.choices(words, k=9))}.\n" for number in range(count))


class Failure(Exception):
    pass


class Soak:
    def __init__(self, flap, folder, seed, minutes, device):
        self.flap, self.folder, self.random, self.minutes = flap, folder, random.Random(seed), minutes
        self.scale = SCALES[device]
        self.environment = dict(os.environ, FLAP_MACHINE=self.path("machine.json"))
        self.stopped = self.killed = self.refused = self.judged = self.samples = 0
        self.lives, self.resident_growth = 0, 0
        self.drawn = set()
        for name in ("disk0", "disk1"):
            os.mkdir(self.path(name))
        self.write("text.txt", text(4000))
        self.write("run.yaml", RUN % {**self.scale, "device": device, "save_steps": 100 if minutes >= 20 else 40})

    def path(self, *names):
        return os.path.join(self.folder, *names)

    def write(self, name, content):
        with open(self.path(name), "w") as file:
            file.write(content)

    # ---- what is drawn ----------------------------------------------------------------------------------------------

    def draw(self):
        """Overrides of a life. Some do not fit together: the program says so, and others are drawn."""
        chosen, scale = self.random, self.scale

        def budget(tier):
            return chosen.choice(["min", *(f"{chosen.randint(low, high)}{unit}" for low, high, unit in scale[tier])])

        size = chosen.choice(scale["disks"][0])
        disks = [f"{{path: {self.path('disk0')}, size: {size}}}"]
        if chosen.random() < 0.5:
            disks.append(f"{{path: {self.path('disk1')}, size: {chosen.choice(scale['disks'][1])}}}")
        choices = {
            "vram": budget("vram"),
            "ram": budget("ram"),
            "disk": f"[{', '.join(disks)}]",
            "expert.checkpoint_states": chosen.choice((None, None, None, "copied")),
            "compression": chosen.choice(("auto", "off", "lz4", "zstd")),
            "expert.pool_bytes": chosen.choice((None, None, *scale["slices"])),
            "expert.optimizer": chosen.choice(("auto", "gpu", "cpu", "split")),
            "expert.page_bytes": chosen.choice((None, *scale["pages"])),
            "expert.slice_bytes": chosen.choice((None, None, *scale["slices"])),
            "expert.segment_layers": chosen.choice((None, None, "1", "2", "3")),
            "expert.update": chosen.choice(("auto", "auto", "fold", "sweep", "backward")),
            "expert.io": chosen.choice(("auto", "auto", "threads")),
            "expert.threads": chosen.choice(("1", "2")),
            "activations": chosen.choice(("auto", "auto", "offload", "recompute")),
            "expert.staging_bytes": chosen.choice((None, None, *scale["staging"]))}
        return [f"{key}={value}" for key, value in choices.items() if value is not None]

    def fits(self, overrides):
        done = subprocess.run([self.flap, "plan", "run.yaml", "--json", *overrides], cwd=self.folder, text=True,
                              env=self.environment, capture_output=True, timeout=START_SECONDS_MAX)
        if done.returncode != 0:
            self.refused += 1
        return done.returncode == 0 and json.loads(done.stdout)["disk_bytes"] > 0

    def choose(self):
        while True:
            overrides = self.draw()
            if self.fits(overrides):
                self.drawn.update(overrides)
                return overrides

    # ---- a life ----------------------------------------------------------------------------------------------------

    def start(self, log, *overrides):
        with open(log, "w") as file:
            return subprocess.Popen([self.flap, "train", "run.yaml", *overrides], cwd=self.folder,
                                    env=self.environment, stdout=file, stderr=subprocess.STDOUT, text=True)

    def steps(self, out="out"):
        """Of metrics.jsonl, the lines that are whole."""
        found = []
        try:
            with open(self.path(out, "metrics.jsonl")) as file:
                for line in file:
                    if line.endswith("\n") and '"grad_norm"' in line:
                        found.append(line)
        except FileNotFoundError:
            pass
        return found

    def checkpoint(self):
        names = os.listdir(self.path("out")) if os.path.isdir(self.path("out")) else []
        found = [int(name[11:]) for name in names if name.startswith("checkpoint-") and name[11:].isdigit()]
        return max(found, default=0)

    def threads(self, folder):
        """Their names. Those of io_uring's own come and go as the system likes."""
        names = []
        for thread in os.listdir(f"{folder}/task"):
            try:
                with open(f"{folder}/task/{thread}/comm") as file:
                    names.append(file.read().strip())
            except (FileNotFoundError, ProcessLookupError):
                pass  # it has ended
        return sorted(name for name in names if not name.startswith("iou-"))

    def sample(self, process):
        folder = f"/proc/{process.pid}"
        try:
            with open(f"{folder}/status") as file:
                resident = next(int(line.split()[1]) * KIB for line in file if line.startswith("VmRSS:"))
            self.names = self.threads(folder)
            return resident, len(self.names), len(os.listdir(f"{folder}/fd"))
        except (FileNotFoundError, ProcessLookupError, StopIteration):
            return None

    def watch(self, process, log, seconds):
        """Waits so long, or until the process ends; the samples once it is warm."""
        samples, warm = [], False
        ends = time.monotonic() + seconds
        while time.monotonic() < ends and process.poll() is None:
            time.sleep(SAMPLE_SECONDS)
            warm = warm or self.is_warm(log)
            taken = self.sample(process) if warm else None
            if taken:
                samples.append(taken)
        return samples

    def is_warm(self, log):
        """By what this life says: metrics.jsonl may have steps of a life that was killed."""
        saved, steps = False, 0
        with open(log, errors="replace") as file:
            for line in file:
                saved = saved or line.startswith("saved ")
                steps += saved and line.startswith("step ")
        return steps >= WARM_STEPS

    def judge(self, samples, overrides):
        self.samples += len(samples)
        if len(samples) < SAMPLES_LEAST:
            return
        self.judged += 1
        third = len(samples) // 3
        head, tail = list(zip(*samples[:third])), list(zip(*samples[-third:]))
        growth = statistics.median(tail[0]) - statistics.median(head[0])
        self.resident_growth = max(self.resident_growth, growth)
        said = f"life {self.lives} ({' '.join(overrides)})"
        if growth > RESIDENT_GROWTH_MAX:
            raise Failure(f"{said}: resident memory grew by {growth / KIB:.0f} KiB")
        for name, index in (("threads", 1), ("descriptors", 2)):
            if min(tail[index]) > min(head[index]):
                raise Failure(f"{said}: {name} grew from {min(head[index])} to {min(tail[index])}; threads: {self.names}")

    def end(self, process, log):
        """SIGINT, which saves, or kill -9."""
        kill = self.random.random() < KILL_SHARE
        process.send_signal(signal.SIGKILL if kill else signal.SIGINT)
        code = process.wait(timeout=STOP_SECONDS_MAX)
        if code != (-signal.SIGKILL if kill else 0):
            raise Failure(f"life {self.lives} ended with {code}: {self.tail(log)}")
        self.killed += kill
        self.stopped += not kill
        return "killed" if kill else "stopped"

    def tail(self, log):
        with open(log, errors="replace") as file:
            return file.read()[-600:].strip()

    def live(self, seconds):
        self.lives += 1
        log = self.path(f"life-{self.lives}.log")
        overrides = self.choose()
        saved = self.checkpoint()
        how = ["resume_from_checkpoint=true"] if saved else ["overwrite_output_dir=true"]
        process = self.start(log, f"max_steps={STEPS_MAX}", *how, *overrides)
        samples = self.watch(process, log, seconds)
        if process.poll() is not None:
            raise Failure(f"life {self.lives} ({' '.join(overrides)}) ended by itself: {self.tail(log)}")
        how = self.end(process, log)
        if self.checkpoint() < saved:
            raise Failure(f"life {self.lives}: checkpoint-{saved} is gone")
        self.judge(samples, overrides)
        print(f"life {self.lives}: {seconds:.0f} s from step {saved}, {how}, checkpoint-{self.checkpoint()}, "
              f"{len(samples)} samples, resident {samples[-1][0] / MIB if samples else 0:.1f} MiB; {' '.join(overrides)}",
              flush=True)

    # ---- the whole -------------------------------------------------------------------------------------------------

    def finish(self, out, steps, *overrides):
        log = self.path(f"{out}.log")
        process = self.start(log, f"output_dir={out}", f"max_steps={steps}", *overrides)
        if process.wait() != 0:
            raise Failure(f"{out} ends with {process.returncode}: {self.tail(log)}")

    def result(self, out, steps):
        lines = [json.loads(line) for line in self.steps(out)]
        return ([(line["step"], line["loss"], line["grad_norm"]) for line in lines], digests(self.path(out), MODEL_FILES),
                digests(self.path(out, f"checkpoint-{steps}")))

    def run(self):
        started = time.monotonic()
        seconds = 60 * self.minutes
        shortest, longest = max(6, seconds / 60), max(12, seconds / 15)
        while (left := seconds - (time.monotonic() - started)) > shortest / 2:
            self.live(min(self.random.uniform(shortest, longest), left))
        steps = self.checkpoint() + 10
        # States in safetensors, whatever their pages are elsewhere: so they can be compared.
        self.finish("out", steps, "resume_from_checkpoint=true", *self.choose(), "expert.checkpoint_states=copied")
        soaked = time.monotonic() - started
        self.finish("undisturbed", steps, "vram=max", "ram=max", f"save_steps={steps}")
        found, wanted = self.result("out", steps), self.result("undisturbed", steps)
        if [step for step, _, _ in found[0]] != list(range(1, steps + 1)):
            raise Failure("metrics.jsonl has not each step once")
        for what, mine, its in zip(("losses and norms", "the trained model", "the last checkpoint"), found, wanted):
            if mine != its:
                raise Failure(f"{what} are not those of the undisturbed run of {steps} steps")
        return (f"{soaked / 60:.0f} minutes, {steps} steps in {self.lives} lives ({self.stopped} stopped, {self.killed} "
                f"killed), {len(self.drawn)} different choices, {self.refused} draws that do not fit; {self.judged} lives "
                f"judged by {self.samples} samples: threads and descriptors flat, resident memory grew by "
                f"{self.resident_growth / KIB:.0f} KiB at most; every end the same to the bit")


def main():
    arguments = argparse.ArgumentParser()
    arguments.add_argument("flap")
    arguments.add_argument("--device", choices=SCALES, default="cpu")
    arguments.add_argument("--minutes", type=float, default=60)
    arguments.add_argument("--seed", type=int, default=1)
    arguments.add_argument("--folder", default="/var/tmp", help="where the disks and the run are")
    given = arguments.parse_args()
    with tempfile.TemporaryDirectory(prefix="flap-soak-", dir=given.folder) as folder:
        try:
            soak = Soak(os.path.abspath(given.flap), folder, given.seed, given.minutes, given.device)
            print(f"seed {given.seed}: {soak.run()}")
        except Failure as failure:
            print(f"seed {given.seed}: {failure}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
