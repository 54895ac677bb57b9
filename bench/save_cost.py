"""What a checkpoint costs: the two steps behind one that is saved, beside those around them, in the same run.

  python3 bench/save_cost.py [--flap build/tools/flap] [--base <an earlier flap>] [--every 4] [--steps 25] [--rounds 5]
                             [--folder /tmp] [--model "hidden layers mlp"] [--tokens 1024] [--write-rate <bytes a second>]
                             [key=value ...]

A run saves after every n-th step. What counts is the time from one step's line to the next one's, by the clock: behind a step
that is saved it has what the save costs, whether the run rests for it or not; and in the one after that updates wait for what is
not written yet. These two less the steps before and behind them are the cost, in seconds and in steps, so that other work on the
machine falls on both. Medians over all rounds, with their quartiles; of two programs the rounds alternate. Also how long a
checkpoint took until it was safe, what the threads that save computed for it (FLAP_LOG=debug), and at what rate one file of its
size is written and synced, once a round. With --write-rate the program's large writes take turns at that rate.
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


def train(flap, folder, steps, every, slow, overrides):
    """Seconds between the lines of steps n and n + 1, by n; how long each checkpoint took, and what was computed for it."""
    command = [flap, "train", "run.yaml", "overwrite_output_dir=true", f"max_steps={steps}", "save_strategy=steps",
               f"save_steps={every}", *overrides]
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               env={**os.environ, "FLAP_LOG": "debug", **slow})
    times = {}
    for line in process.stdout:
        found = re.match(r"step (\d+)/", line)
        if found:
            times[int(found.group(1))] = time.monotonic()
    errors = process.stderr.read()
    if process.wait() != 0:
        sys.exit(f"save_cost: {' '.join(command)} failed: {errors.strip()}")
    saves = re.findall(r"was saved in ([\d.]+) s, of which the saver computed ([\d.]+) s", errors)
    return {n: times[n + 1] - times[n] for n in range(2, steps - 1)}, [tuple(map(float, save)) for save in saves]


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
    low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else 3 * values
    return f"{form % middle} ({form % low} to {form % high})"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--flap", default="build/tools/flap")
    parser.add_argument("--base")
    parser.add_argument("--every", type=int, default=4)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", default="/tmp")
    parser.add_argument("--model", default="384 6 1024")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--micro-batch", type=int, default=256)
    parser.add_argument("--write-rate", type=float, default=0)
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_args()
    if options.every < 3:
        parser.error("--every: a checkpoint costs time in two steps, and a third must be free of it")
    flaps = {"flap": os.path.abspath(options.flap), **({"base": os.path.abspath(options.base)} if options.base else {})}
    library = os.path.abspath(os.path.join(os.path.dirname(options.flap), "../bench/libslow_disk.so"))
    slow = {"LD_PRELOAD": library, "SLOW_WRITES": str(options.write_rate)} if options.write_rate > 0 else {}
    hidden, layers, mlp = map(int, options.model.split())
    folder = tempfile.mkdtemp(prefix="flap-save-cost-", dir=options.folder)
    try:
        with open(os.path.join(folder, "run.yaml"), "w") as file:
            file.write(RUN % (hidden, mlp, layers, options.micro_batch, options.tokens // options.micro_batch))
        with open(os.path.join(folder, "text.txt"), "w") as file:
            file.writelines(f"The {n}th line says that {n} and {n + 1} make {2 * n + 1}.\n" for n in range(20000))
        costs, seconds, saves = ({name: [] for name in flaps} for _ in range(3))
        rates, size = [], 0
        for number in range(options.rounds):
            for name in list(flaps) if number % 2 == 0 else reversed(flaps):
                spans, saved = train(flaps[name], folder, options.steps, options.every, slow, options.overrides)
                saves[name] += saved
                for step in spans:
                    if step % options.every == 0 and step - 1 in spans and step + 2 in spans:
                        around = (spans[step - 1] + spans[step + 2]) / 2
                        seconds[name].append(around)
                        costs[name].append(spans[step] + spans[step + 1] - 2 * around)
                size = folder_bytes(folder)
            rates.append(write_rate(folder, size) / 1e6)
        print(f"a checkpoint is {size / 1e6:.0f} MB; such a file is written and synced at {spread(rates, '%.0f')} MB/s")
        for name in flaps:
            shares = [cost / step for cost, step in zip(costs[name], seconds[name])]
            print(f"{name}: a step takes {spread(seconds[name])} s; a checkpoint costs {spread(costs[name])} s, "
                  f"{spread(shares)} steps ({len(shares)} of them)")
            if saves[name]: # an earlier flap may not say it
                print(f"{name}: one is safe after {spread([save[0] for save in saves[name]])} s, of which the saver computes "
                      f"{spread([save[1] for save in saves[name]])} s")
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
