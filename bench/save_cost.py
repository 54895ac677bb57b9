"""What checkpoints cost: the same steps without any, and with one after every n-th.

  python3 bench/save_cost.py [--flap build/tools/flap] [--base <an earlier flap>] [--every 1,2] [--steps 12] [--rounds 5]
                             [--folder /tmp] [--model "hidden layers mlp"] [--tokens 1024] [key=value ...]

Each round runs all of them, in an order that alternates; a run's figure is the time from the line of its second step to that
of its last but one, by the clock, over the steps between: checkpoints in it, start and end not. Ratios are those of a round, and
medians of all rounds are printed with their range. Also how long the saver's thread computed for a checkpoint
(FLAP_LOG=debug), and at what rate one file of its size is written and synced, measured in each round.
"""
import argparse
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

RUN = """model: {model_type: llama, hidden_size: %d, intermediate_size: %d, num_hidden_layers: %d, num_attention_heads: 8,
  max_position_embeddings: 4096}
tokenizer: bytes
dataset: text.txt
cutoff_len: %d
per_device_train_batch_size: 1
gradient_accumulation_steps: %d
learning_rate: 1e-4
logging_steps: 1
save_total_limit: 1
export: none
output_dir: out
device: cpu
"""


def train(flap, folder, steps, saves, overrides):
    """Seconds a step, and what the saver computed for each checkpoint."""
    command = [flap, "train", "run.yaml", "overwrite_output_dir=true", f"max_steps={steps}",
               *(["save_strategy=no"] if saves == 0 else ["save_strategy=steps", f"save_steps={saves}"]), *overrides]
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               env={**os.environ, "FLAP_LOG": "debug"})
    times = {}
    for line in process.stdout:
        found = re.match(r"step (\d+)/", line)
        if found:
            times[int(found.group(1))] = time.monotonic()
    errors = process.stderr.read()
    if process.wait() != 0:
        sys.exit(f"save_cost: {' '.join(command)} failed: {errors.strip()}")
    computed = [float(figure) for figure in re.findall(r"of which the saver computed ([\d.]+) s", errors)]
    return (times[steps - 1] - times[2]) / (steps - 3), computed


def write_rate(folder, size):
    path, piece = os.path.join(folder, "rate"), os.urandom(1 << 22)
    started = time.monotonic()
    with open(path, "wb") as file:
        for _ in range(0, size, len(piece)):
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())
    seconds = time.monotonic() - started
    os.remove(path)
    return size / seconds


def folder_bytes(folder):
    newest = max(os.listdir(os.path.join(folder, "out")), key=lambda name: name.startswith("checkpoint-"))
    path = os.path.join(folder, "out", newest)
    return sum(os.path.getsize(os.path.join(path, name)) for name in os.listdir(path))


def spread(values, form="%.3f"):
    return f"{form % statistics.median(values)} ({form % min(values)} to {form % max(values)})"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--flap", default="build/tools/flap")
    parser.add_argument("--base")
    parser.add_argument("--every", default="1,2")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", default="/tmp")
    parser.add_argument("--model", default="512 8 1536")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--micro-batch", type=int, default=256)
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_args()
    flaps = {"": os.path.abspath(options.flap), **({"base, ": os.path.abspath(options.base)} if options.base else {})}
    every = [int(n) for n in options.every.split(",")]
    hidden, layers, mlp = map(int, options.model.split())
    folder = tempfile.mkdtemp(prefix="flap-save-cost-", dir=options.folder)
    try:
        with open(os.path.join(folder, "run.yaml"), "w") as file:
            file.write(RUN % (hidden, mlp, layers, options.micro_batch, options.tokens // options.micro_batch))
        with open(os.path.join(folder, "text.txt"), "w") as file:
            file.writelines(f"The {n}th line says that {n} and {n + 1} make {2 * n + 1}.\n" for n in range(20000))
        ways = [(name, saves) for name in flaps for saves in [0, *every]]
        seconds, ratios = {way: [] for way in ways}, {way: [] for way in ways}
        computed, rates, size = [], [], 0
        for number in range(options.rounds):
            for name, saves in ways if number % 2 == 0 else reversed(ways):
                took, saver = train(flaps[name], folder, options.steps, saves, options.overrides)
                seconds[name, saves].append(took)
                computed += saver
                if saves:
                    size = folder_bytes(folder)
            rates.append(write_rate(folder, size))
            for name, saves in ways:
                ratios[name, saves].append(seconds[name, saves][-1] / seconds[name, 0][-1])
        print(f"a checkpoint is {size / 1e6:.0f} MB; such a file is written and synced at {spread([r / 1e6 for r in rates], '%.0f')} "
              f"MB/s: {size / statistics.median(rates):.2f} s")
        if computed:
            print(f"the saver computes {spread(computed)} s for one")
        for name, saves in ways:
            print(f"{name}{'no checkpoints' if saves == 0 else f'save_steps: {saves}'}: {spread(seconds[name, saves])} s a step; "
                  f"ratio {spread(ratios[name, saves])}")
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
