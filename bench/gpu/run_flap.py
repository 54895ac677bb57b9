"""One `flap train` of a named shape on random tokens, watched from outside; prints a record as JSON.

  python3 bench/gpu/run_flap.py 1b --out OUT [--flap build/tools/flap] [--vram 72GiB] [--ram 60GiB] [--disk FOLDER]
                                [--disk-size 200GiB] [--batch 8] [--sequence 2048] [--micro-batches 1] [--steps 12]
                                [--device cuda] [--seconds 170] [--poll 0.5] [--name NAME] [key=value ...]

OUT/NAME/ gets run.yaml, plan.json, flap.log, record.json, and run/ with metrics.jsonl and trace.json; the shard of tokens
is in OUT and shared by all runs that have its vocabulary. The record holds what `flap plan` predicted (step_seconds_planned,
lane_bytes_planned), what came (step_seconds: the median of the steady steps, lane_bytes, tokens_per_second, mfu as shapes.py
defines it, bound_share), every step's loss and gradient norm with all digits, so that runs can be compared to the bit, and
the peaks: nvidia_smi_mib is the most that nvidia-smi showed while it ran, rss_bytes the most that was resident on the host.

nvidia-smi is asked for the process; where it lists none (in some virtual machines and containers) for the whole GPU instead, and
nvidia_smi_source says which. Steps count as steady from the second to the last but one, because the first fills the pipeline
and the last waits for the update; but for the third and fourth, which the trace slows on a GPU, where others are left. A run that is still going --seconds after its plan was asked for is ended: its
record says "cut": true and holds the steps that were logged. Exit status 1 if flap failed or logged no step.
"""
import argparse
import json
import os
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import shapes  # noqa: E402

TOKENS = 1 << 21  # of a shard, whatever the run: its number of sequences is what their order follows from
PLAN_SECONDS = 120
TRACED = (2, 3)  # engine/train_loop.c: of the steps of a process, counted from 0
LANES = ("h2d", "d2h", "disk_read", "disk_write", "host")


# ---- what nvidia-smi says ----


def ask(*query):
    try:
        done = subprocess.run(["nvidia-smi", *query, "--format=csv,noheader,nounits"], capture_output=True, text=True,
                              timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [line.strip() for line in done.stdout.splitlines() if line.strip()] if done.returncode == 0 else []


def numbers(lines):
    return [int(line) for line in lines if line.isdigit()]


class Watch:
    """The most that nvidia-smi shows, in MiB: of the processes that compute, else of the first GPU as a whole."""

    def __init__(self):
        self.processes = self.gpu = 0
        before = numbers(ask("--query-gpu=memory.used"))
        self.before = before[0] if before else None

    def look(self):
        if self.before is None:
            return
        self.processes = max(self.processes, sum(numbers(ask("--query-compute-apps=used_memory"))))
        self.gpu = max(self.gpu, *numbers(ask("--query-gpu=memory.used"))[:1], 0)

    def record(self):
        if self.before is None:
            return {"nvidia_smi_mib": None, "nvidia_smi_source": "none"}
        source = "process" if self.processes > 0 else "gpu"
        return {"nvidia_smi_mib": self.processes if self.processes > 0 else self.gpu, "nvidia_smi_source": source,
                "nvidia_smi_gpu_mib": self.gpu, "nvidia_smi_gpu_before_mib": self.before}


# ---- running ----


def configure(options, folder):
    """Writes the shard and run.yaml; returns the path of the latter."""
    shape = shapes.shape_of(options.shape)
    shard = os.path.abspath(os.path.join(options.out, f"tokens-{shape['vocab_size']}.bin"))
    if not os.path.exists(shard):
        shapes.write_random_shard(f"{shard}.part", TOKENS, shape["vocab_size"])
        os.rename(f"{shard}.part", shard)
    keys = {"dataset": shard, "cutoff_len": options.sequence, "per_device_train_batch_size": options.batch,
            "gradient_accumulation_steps": options.micro_batches, "max_steps": options.steps, "learning_rate": 1e-4,
            "lr_scheduler_type": "constant", "logging_steps": 1, "save_strategy": "no", "export": "none", "val_size": 0,
            "seed": 1, "device": options.device, "output_dir": os.path.join(folder, "run"), "overwrite_output_dir": True}
    if options.vram:
        keys["vram"] = options.vram
    if options.ram:
        keys["ram"] = options.ram
    if options.disk:
        os.makedirs(options.disk, exist_ok=True)
        keys["disk"] = [{"path": os.path.abspath(options.disk), **({"size": options.disk_size} if options.disk_size else {})}]
    path = os.path.join(folder, "run.yaml")
    shapes.write_yaml(path, shape, keys)
    return path


def plan(options, configuration, folder):
    command = [options.flap, "plan", configuration, *options.overrides, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PLAN_SECONDS)
    if done.returncode != 0:
        return None, f"{shlex.join(command)}: {done.stderr.strip()}"
    with open(os.path.join(folder, "plan.json"), "w") as file:
        file.write(done.stdout)
    return json.loads(done.stdout), None


def train(options, configuration, folder, end):
    """Returns (exit status, cut short?, resource usage, watch)."""
    watch = Watch()
    with open(os.path.join(folder, "flap.log"), "w") as log:
        child = subprocess.Popen([options.flap, "train", configuration, *options.overrides], stdout=log,
                                 stderr=subprocess.STDOUT)
    cut = False
    while True:
        pid, status, usage = os.wait4(child.pid, os.WNOHANG)
        if pid != 0:
            child.returncode = os.waitstatus_to_exitcode(status)
            return child.returncode, cut, usage, watch
        if time.monotonic() > end and not cut:
            cut = True
            child.send_signal(signal.SIGKILL)
        if not cut:
            watch.look()
        time.sleep(options.poll)


def steps_of(folder):
    try:
        with open(os.path.join(folder, "run", "metrics.jsonl")) as lines:
            text = lines.read()
    except FileNotFoundError:
        return []
    whole = text[:text.rfind("\n") + 1]  # a run that was ended may leave a torn line
    return [entry for entry in map(json.loads, whole.splitlines()) if "step_seconds" in entry]


def steady(entries):
    between = entries[1:-1]
    untraced = [entry for at, entry in enumerate(between, start=1) if at not in TRACED]
    return untraced or between or entries[-1:]


def measured(options, entries):
    seconds = [entry["step_seconds"] for entry in steady(entries)]
    median = statistics.median(seconds)
    rate = options.micro_batches * options.batch * options.sequence / median
    usual, matmul = shapes.mfu(shapes.shape_of(options.shape), options.sequence, rate)
    lanes = {lane: statistics.median(entry["bytes"][lane] for entry in steady(entries)) for lane in LANES}
    return {"step_seconds": median, "step_seconds_least": min(seconds), "step_seconds_most": max(seconds),
            "steps_steady": len(seconds), "tokens_per_second": rate, "mfu": usual, "mfu_matmul": matmul,
            "bound_share": entries[-1]["bound_seconds"] / median, "lane_bytes": lanes,
            "losses": [entry["loss"] for entry in entries], "grad_norms": [entry["grad_norm"] for entry in entries]}


def peaks_of(log):
    """The table of tiers at the end of flap train, as printed; none for a run that was ended."""
    peaks = {}
    for line in log.splitlines():
        words = line.split()
        if words and words[0] in ("vram", "ram", "disk") and words[-1].endswith("%"):
            peaks[words[0]] = " ".join(words[1:])
    return peaks


def run(options):
    """Runs and returns the record; `error` is in it when there is nothing to measure."""
    folder = os.path.abspath(os.path.join(options.out, options.name or options.shape))
    os.makedirs(folder, exist_ok=True)
    configuration = configure(options, folder)
    record = {"shape": options.shape, "vram": options.vram, "ram": options.ram, "disk": options.disk, "device": options.device,
              "batch": options.batch, "sequence": options.sequence, "micro_batches": options.micro_batches,
              "max_steps": options.steps, "overrides": options.overrides, "folder": folder}
    end = time.monotonic() + options.seconds
    foreseen, error = plan(options, configuration, folder)
    counted = shapes.parameters(shapes.shape_of(options.shape))
    if not error and foreseen["parameters"] != counted:
        error = f"flap counts {foreseen['parameters']} parameters, bench/gpu/shapes.py {counted}"
    if error:
        return finish(folder, {**record, "error": error})
    record |= {"device_name": foreseen["device_name"], "parameters": foreseen["parameters"],
               "step_seconds_planned": foreseen["step_seconds"], "bound_seconds": foreseen["bound_seconds"],
               "lane_bytes_planned": foreseen["lane_bytes"], "vram_budget": foreseen["vram_budget"],
               "vram_planned": foreseen["vram_bytes"], "ram_budget": foreseen["ram_budget"],
               "ram_planned": foreseen["ram_bytes"], "disk_planned": foreseen["disk_bytes"]}
    shutil.rmtree(os.path.join(folder, "run"), ignore_errors=True)  # or an earlier run's steps could pass for this one's
    status, cut, usage, watch = train(options, configuration, folder, end)
    entries = steps_of(folder)
    with open(os.path.join(folder, "flap.log"), errors="replace") as file:
        log = file.read()
    record |= {"exit_status": status, "cut": cut, "rss_bytes": usage.ru_maxrss * 1024, **watch.record(),
               "peaks": peaks_of(log), "metrics": os.path.join(folder, "run", "metrics.jsonl"),
               "trace": os.path.join(folder, "run", "trace.json")}
    if status != 0 and not cut:
        record["error"] = f"flap train ended with status {status}: {' '.join(log.strip().splitlines()[-1:])}"
    elif not entries:
        record["error"] = f"no step was logged in {options.seconds} s"
    else:
        record |= measured(options, entries)
    return finish(folder, record)


def finish(folder, record):
    with open(os.path.join(folder, "record.json"), "w") as file:
        json.dump(record, file, indent=1)
    return record


def parser_of():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shape", choices=list(shapes.SHAPES))
    parser.add_argument("--flap", default="build/tools/flap")
    parser.add_argument("--out", required=True, help="a folder for everything that is written")
    parser.add_argument("--name", help="folder of this run in --out; the shape by default")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--vram", help="as in run.yaml: a size, max or min")
    parser.add_argument("--ram")
    parser.add_argument("--disk", help="a folder for pages on disk")
    parser.add_argument("--disk-size")
    parser.add_argument("--batch", type=int, default=8, help="sequences in a micro-batch")
    parser.add_argument("--sequence", type=int, default=2048)
    parser.add_argument("--micro-batches", type=int, default=1)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--seconds", type=float, default=170, help="a run that takes longer is ended")
    parser.add_argument("--poll", type=float, default=0.5, help="seconds between two looks at nvidia-smi")
    parser.add_argument("overrides", nargs="*", help="key=value for flap")
    return parser


def main():
    options = parser_of().parse_intermixed_args()
    os.makedirs(options.out, exist_ok=True)
    record = run(options)
    print(json.dumps(record, indent=1))
    sys.exit(1 if "error" in record else 0)


if __name__ == "__main__":
    main()
