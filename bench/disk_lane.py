"""Training's disk lanes while they are the bottleneck, beside what `flap bench disk` gives for the same requests.

  python3 bench/disk_lane.py CONFIG --folder FOLDER [--flap build/tools/flap] [--steps 12] [--rounds 5] [--mib 128]
                             [--least 0.9] [key=value ...]

FOLDER is where the configuration's disk is. Each round measures reading and writing together with requests of the
plan's size and as many in flight as it has buffers, and trains, in an order that alternates. Of training counts what the
disks moved in a median step (`disk_bytes` in metrics.jsonl), over its time; the first two steps fill the pipeline, and the
last one ends with an update of its own. Prints both rates and the median of the rounds' ratios; exit status 1 below --least,
or where the plan says that the disks are not what a step waits for.
"""
import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile


def run(command):
    done = subprocess.run(command, capture_output=True, text=True, timeout=3600)
    if done.returncode != 0:
        sys.exit(f"disk_lane: {shlex.join(command)} failed: {done.stderr.strip()}")
    return done.stdout


def bench_rate(flap, folder, mib, plan):
    request = plan["transfer_bytes"]
    text = run([flap, "bench", "disk", folder, "--json", "--bytes", f"{mib}MiB", "--request", str(request), "--depth",
                str(plan["read_buffers"])])
    return json.loads(text)["both_bytes_per_second"]


def train_rate(flap, config, output, overrides):
    run([flap, "train", config, *overrides, f"output_dir={output}", "overwrite_output_dir=true", "val_size=0", "export=none",
         "save_strategy=no", "logging_steps=1"])
    with open(os.path.join(output, "metrics.jsonl")) as lines:
        steps = [entry for entry in map(json.loads, lines) if "step_seconds" in entry][2:-1]
    moved = statistics.median(sum(step["disk_bytes"].values()) for step in steps)
    return moved / statistics.median(step["step_seconds"] for step in steps)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config")
    parser.add_argument("--folder", required=True)
    parser.add_argument("--flap", default="build/tools/flap")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--mib", type=int, default=128)
    parser.add_argument("--least", type=float, default=0.9)
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_intermixed_args()
    overrides = [*options.overrides, f"max_steps={options.steps}"]
    plan = json.loads(run([options.flap, "plan", "--json", options.config, *overrides]))
    share = max(plan["lane_seconds"]["disk_read"], plan["lane_seconds"]["disk_write"]) / plan["step_seconds"]
    print(f"plan: {plan['step_seconds']:.3f} s a step, disks busy for {share:.0%} of it, requests of "
          f"{plan['transfer_bytes'] >> 10} KiB, {plan['read_buffers']} in flight each way")
    ratios, rates = [], {"bench": [], "train": []}
    with tempfile.TemporaryDirectory(dir=".") as folder:
        measures = {"bench": lambda: bench_rate(options.flap, options.folder, options.mib, plan),
                    "train": lambda: train_rate(options.flap, options.config, os.path.join(folder, "run"), overrides)}
        for number in range(options.rounds):
            for name in list(measures)[::1 if number % 2 == 0 else -1]:
                rates[name].append(measures[name]())
            ratios.append(rates["train"][-1] / rates["bench"][-1])
            print(f"round {number + 1}: bench {rates['bench'][-1] / 1e9:.3f} GB/s, train {rates['train'][-1] / 1e9:.3f} GB/s, "
                  f"ratio {ratios[-1]:.3f}", flush=True)
    ratio = statistics.median(ratios)
    print(f"bench {statistics.median(rates['bench']) / 1e9:.3f} GB/s, train {statistics.median(rates['train']) / 1e9:.3f} GB/s, "
          f"median of ratios {ratio:.3f} ({min(ratios):.3f} to {max(ratios):.3f})")
    sys.exit(0 if ratio >= options.least and share > 0.5 else 1)


if __name__ == "__main__":
    main()
