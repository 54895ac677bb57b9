"""Out of core beside resident: the same steps with the budgets of a configuration and with all of it in vram.

  python3 bench/overlap.py [--flap build/tools/flap] [--config tools/demo.yaml] [--steps 12] [--rounds 5]
                           [--resident "vram=400MiB ram=64MiB disk=null"] [--most 1.3] [key=value ...]

Each round runs both, in an order that alternates, and takes the median step of each (`median step` of flap train); the
ratio is the median of the rounds' ratios. Then trace.json of the last run out of core is looked at: the share of its time
in which compute, a copy and a disk are busy at once, and compute with any of them. Exit status 1 if the ratio is above
--most, or if the three are never busy together.
"""
import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile

LANES = ("compute", "h2d", "d2h", "disk_read", "disk_write")


def median_step(flap, config, output, arguments):
    command = [flap, "train", config, f"output_dir={output}", "overwrite_output_dir=true", "val_size=0",
               "export=none", "save_strategy=no", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=3600)
    if done.returncode != 0:
        sys.exit(f"overlap: {shlex.join(command)} failed: {done.stderr.strip()}")
    with open(os.path.join(output, "metrics.jsonl")) as lines:
        seconds = [entry["step_seconds"] for entry in map(json.loads, lines) if "step_seconds" in entry]
    return statistics.median(seconds[2:])  # the first steps fill the pipeline


def busy(path):
    """Intervals of each lane, from the rows that a trace spreads it over."""
    with open(path) as file:
        trace = json.load(file)
    events = trace["traceEvents"] if isinstance(trace, dict) else trace
    names = {event["tid"]: event["args"]["name"] for event in events if event.get("name") == "thread_name"}
    lanes = {lane: [] for lane in LANES}
    for event in events:
        if event["ph"] != "X":
            continue
        lane = names[event["tid"]].rstrip(" 0123456789").replace(" ", "_")  # "disk read 3" is a row of disk_read
        if lane in lanes:
            lanes[lane].append((event["ts"], event["ts"] + event["dur"]))
    return lanes


def shares(lanes):
    groups = {"compute": ("compute",), "copy": ("h2d", "d2h"), "disk": ("disk_read", "disk_write")}
    edges = []
    for group, members in groups.items():
        for lane in members:
            edges += [(at, +1, group) for at, _ in lanes[lane]] + [(end, -1, group) for _, end in lanes[lane]]
    edges.sort()
    active = dict.fromkeys(groups, 0)
    total = together = any_two = 0.0
    last = edges[0][0] if edges else 0
    for at, change, group in edges:
        span, last = at - last, at
        total += span
        if active["compute"] > 0 and active["copy"] > 0 and active["disk"] > 0:
            together += span
        if active["compute"] > 0 and (active["copy"] > 0 or active["disk"] > 0):
            any_two += span
        active[group] += change
    return (together / total, any_two / total) if total > 0 else (0.0, 0.0)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--flap", default="build/tools/flap")
    parser.add_argument("--config", default="tools/demo.yaml")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--resident", default="vram=400MiB ram=64MiB disk=null")
    parser.add_argument("--most", type=float, default=1.3)
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_args()
    common = [f"max_steps={options.steps}", "logging_steps=1", *options.overrides]
    times = {"resident": [], "out of core": []}
    with tempfile.TemporaryDirectory(dir=".") as folder:
        outputs = {name: os.path.join(folder, name.replace(" ", "-")) for name in times}
        extra = {"resident": shlex.split(options.resident), "out of core": []}
        for round_number in range(options.rounds):
            order = list(times) if round_number % 2 == 0 else list(times)[::-1]
            for name in order:
                times[name].append(median_step(options.flap, options.config, outputs[name], common + extra[name]))
            print(f"round {round_number + 1}: resident {times['resident'][-1]:.3f} s, "
                  f"out of core {times['out of core'][-1]:.3f} s", flush=True)
        all_three, any_two = shares(busy(os.path.join(outputs["out of core"], "trace.json")))
    ratios = [out / inside for inside, out in zip(times["resident"], times["out of core"])]
    ratio = statistics.median(ratios)
    for name, values in times.items():
        print(f"{name}: median step {statistics.median(values):.3f} s ({min(values):.3f} to {max(values):.3f})")
    print(f"ratio {ratio:.3f} ({min(ratios):.3f} to {max(ratios):.3f})")
    print(f"trace: compute, a copy and a disk at once {all_three:.1%} of the time; compute beside a transfer {any_two:.1%}")
    sys.exit(0 if ratio <= options.most and all_three > 0 else 1)


if __name__ == "__main__":
    main()
