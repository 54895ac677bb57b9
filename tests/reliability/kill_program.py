#!/usr/bin/env python3
"""kill -9 of the real program at random moments. Usage: kill_program.py <flap> [--kills N] [--seed S]

A run is started, killed, and started again, until it gets to its end; then the next life begins. Every other life has one
command, with resume_from_checkpoint=auto, which once more at the end does nothing; the others resume by hand. After each kill every folder that is called checkpoint-<step> must be whole to the bit; at the end weights, moments, losses,
norms and the exported model must be those of a run that nothing disturbed.

The last line says how many kills, where they struck, and the seed. By itself it makes 50 kills; 2,000 take minutes."""
import argparse
import hashlib
import json
import os
import random
import shutil
import struct
import subprocess
import sys
import tempfile
import time

RUN = """model: {model_type: llama, hidden_size: 16, intermediate_size: 32, num_hidden_layers: 1, num_attention_heads: 2,
  max_position_embeddings: 64, tie_word_embeddings: true}
tokenizer: bytes
dataset: text.txt
val_size: 2
cutoff_len: 16
per_device_train_batch_size: 1
gradient_accumulation_steps: 2
max_steps: 8
learning_rate: 1e-2
logging_steps: 1
save_strategy: steps
save_steps: 2
save_total_limit: 2
output_dir: out
vram: min
ram: min
disk: {path: disk, size: 4MiB}
compression: off
device: cpu
expert: {threads: 1}
"""
MACHINE = {"format": "flap machine 1", "machines": [{
    "device": "cpu", "name": "tests", "flops_bf16": 1e11, "flops_f32": 1e11, "device_bytes": 1e10, "h2d_bytes": 1e10,
    "d2h_bytes": 1e10, "host_bytes": 1e10, "launch_ns": 100, "copy_ns": 1000, "disk_ns": 10000, "synchronous": True,
    "shared_cores": 1, "disk_read_bytes": 1e9, "disk_write_bytes": 1e9}]}
TEXT = "".join(f"The {n}th line says that {n} and {n + 1} make {2 * n + 1}.\n" for n in range(40))
PAGES = "optimizer-pages"
MODEL_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
SECONDS_MAX = 120  # of one process; it takes a tenth of a second


def without_written(name, data):
    """A run that is disturbed writes more to drives, and says so; all else that it saves is the same to the byte."""
    if name == "trainer_state.json":
        state = json.loads(data)
        del state["written_bytes"]
        return json.dumps(state).encode()
    if name == "checksums.json":
        sums = json.loads(data)
        sums["files"] = [entry for entry in sums["files"]
                         if entry["name"] != "trainer_state.json" and not entry["name"].startswith(PAGES)]
        return json.dumps(sums).encode()
    return data


def digest_states(folder):
    """Of states that a checkpoint shares with the disk (engine/store/state_pages.h): where a page stands, and how often it
    was written, differs from life to life; what it holds does not. AdamW with bf16 weights has 10 bytes for each element."""
    with open(os.path.join(folder, PAGES + ".table"), "rb") as file:
        table = file.read()
    magic, _, _, _, page_bytes, _, slices, pages = struct.unpack_from("<8s6IQ", table)
    if magic != b"FLAPPAGE" or len(table) != 80 + 24 * slices + 32 * pages + 8:
        raise SystemExit(f"{folder}: {PAGES}.table is none")
    sum_of, row = hashlib.sha256(), 80 + 24 * slices
    for index in range(slices):
        part, _, first, elements = struct.unpack_from("<IIQQ", table, 80 + 24 * index)
        region, left = b"", -(-10 * elements // 4096) * 4096
        while left > 0:
            _, place, stored, _, number, _ = struct.unpack_from("<QQIIII", table, row)
            if stored != min(left, page_bytes):
                raise SystemExit(f"{folder}: a page has {stored} bytes, though nothing is compressed")
            with open(os.path.join(folder, f"{PAGES}-{number}.bin"), "rb") as file:
                region += os.pread(file.fileno(), stored, place)
            row, left = row + 32, left - stored
        sum_of.update(struct.pack("<IQ", part, first) + region[:10 * elements])
    return sum_of.hexdigest()


def digests(folder, names=None):
    """Of every file in a folder, or of these, by name; of pages of states what they hold."""
    found = {}
    for name in names or sorted(os.listdir(folder)):
        if name == PAGES + ".table":
            found["states"] = digest_states(folder)
        if name.startswith(PAGES):
            continue
        with open(os.path.join(folder, name), "rb") as file:
            found[name] = hashlib.sha256(without_written(name, file.read())).hexdigest()
    return found


class Lives:
    def __init__(self, flap, folder, seed):
        self.flap, self.folder, self.random = flap, folder, random.Random(seed)
        self.environment = dict(os.environ, FLAP_MACHINE=self.path("machine.json"))
        os.mkdir(self.path("disk"))
        for name, content in (("run.yaml", RUN), ("text.txt", TEXT), ("machine.json", json.dumps(MACHINE))):
            with open(self.path(name), "w") as file:
                file.write(content)
        self.struck = {"before the first checkpoint": 0, "between checkpoints": 0, "while one was written": 0,
                       "after the last": 0}

    def path(self, *names):
        return os.path.join(self.folder, *names)

    def start(self, *overrides):
        return subprocess.Popen([self.flap, "train", "run.yaml", *overrides], cwd=self.folder, env=self.environment,
                                stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)

    def finish(self, process):
        """The error line, or None for a run that ended well."""
        _, errors = process.communicate(timeout=SECONDS_MAX)
        return None if process.returncode == 0 else f"exit status {process.returncode}: {errors.strip()}"

    def result(self, out):
        with open(self.path(out, "metrics.jsonl")) as file:
            lines = [json.loads(line) for line in file]
        evaluated = [line["step"] for line in lines if "eval_loss" in line]
        if evaluated != sorted(set(evaluated)):
            raise SystemExit(f"{out}/metrics.jsonl has evaluations of the steps {evaluated}")
        steps = [(line["step"], line["loss"], line["grad_norm"]) for line in lines if "grad_norm" in line]
        return {"steps": steps, "model": digests(self.path(out), MODEL_FILES), "last": digests(self.path(out, "checkpoint-8"))}

    def reference(self):
        """The undisturbed run: what it ends with, each of its checkpoints, and for how long it goes."""
        started = time.monotonic()
        error = self.finish(self.start("output_dir=undisturbed", "save_total_limit=0"))
        if error:
            raise SystemExit(f"the undisturbed run fails: {error}")
        self.seconds = time.monotonic() - started
        self.wanted = self.result("undisturbed")
        self.checkpoints = {name: digests(self.path("undisturbed", name))
                            for name in os.listdir(self.path("undisturbed")) if name.startswith("checkpoint-")}
        if any("states" not in sums for sums in self.checkpoints.values()):
            raise SystemExit("a checkpoint of the undisturbed run does not share its states with the disk")

    def must_do_nothing(self, *how):
        before = self.times()
        error = self.finish(self.start(*how))
        if error or self.times() != before:
            raise SystemExit(f"the command once more, after the end, changes files: {error}")

    def times(self):
        return {name: os.stat(self.path("out", name)).st_mtime_ns for name in self.list_out()}

    def list_out(self):
        return os.listdir(self.path("out")) if os.path.isdir(self.path("out")) else []

    def whole_checkpoints(self):
        """Names of those that are there; each is compared with the undisturbed run's."""
        names = [name for name in self.list_out() if name.startswith("checkpoint-") and "." not in name]
        for name in names:
            if digests(self.path("out", name)) != self.checkpoints[name]:
                raise SystemExit(f"{name} is not whole after a kill")
        return names

    def note(self, names):
        if any(name.startswith("checkpoint-") and ".tmp" in name for name in self.list_out()):
            self.struck["while one was written"] += 1
        elif not names:
            self.struck["before the first checkpoint"] += 1
        else:
            self.struck["after the last" if "checkpoint-8" in names else "between checkpoints"] += 1

    def live(self, kills_max, one_command):
        """One life; the number of kills that it took."""
        shutil.rmtree(self.path("out"), ignore_errors=True)
        names, kills = [], 0
        while True:
            # What a person types: the second command is the one that an interrupted run prints.
            how = ["resume_from_checkpoint=true"] if names else ["overwrite_output_dir=true"]
            if one_command:
                how = ["resume_from_checkpoint=auto"]
            process = self.start(*how)
            if kills < kills_max:
                try:
                    process.wait(timeout=self.random.uniform(0, 1.2 * self.seconds))
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.communicate(timeout=SECONDS_MAX)
                    if process.returncode == -9:
                        kills += 1
                        before, names = names, self.whole_checkpoints()
                        if before and not names:
                            raise SystemExit(f"{before} were there before a kill, and none after it")
                        self.note(names)
                        continue
            error = self.finish(process)
            if error:
                raise SystemExit(f"after {kills} kills the run does not go on: {error}")
            if self.result("out") != self.wanted:
                raise SystemExit(f"after {kills} kills the run ends with other bits")
            if one_command:
                self.must_do_nothing(*how)
            return kills


def main():
    arguments = argparse.ArgumentParser()
    arguments.add_argument("flap")
    arguments.add_argument("--kills", type=int, default=50)
    arguments.add_argument("--seed", type=int, default=int(os.environ.get("FLAP_TEST_SEED", "20240607")))
    given = arguments.parse_args()
    above = "/dev/shm" if os.access("/dev/shm", os.W_OK | os.X_OK) else None
    with tempfile.TemporaryDirectory(prefix="flap-kill-", dir=above) as folder:
        lives = Lives(os.path.abspath(given.flap), folder, given.seed)
        lives.reference()
        kills = count = 0
        started = time.monotonic()
        while kills < given.kills:
            kills += lives.live(given.kills - kills, count % 2 == 0)
            count += 1
        where = ", ".join(f"{number} {place}" for place, number in lives.struck.items())
        print(f"seed {given.seed}: {kills} kills in {count} lives ({where}), {time.monotonic() - started:.0f} s: every "
              "checkpoint whole, every end the same to the bit")


if __name__ == "__main__":
    sys.exit(main())
