"""Training in core and at budgets on one H100: every measurement that has a bar, row by row, and one table.

  python3 bench/gpu/cuda_bars.py --out OUT [--flap build-cuda/tools/flap] [--only flap-1b,torch-1b] [--again] [--minutes 9]
                                 [--python PYTHON] [--disk FOLDER] [--list] [--table]

A row is one run of FLAP (bench/gpu/run_flap.py) or of a peer (bench/peers/torch_in_core.py), and takes less than three
minutes: one that would take longer is ended, and counts with the steps that it made. OUT/state.json keeps what was measured, so
the same command goes on where the last one stopped; no row is started that might not end within --minutes. --only picks
rows, --again measures rows that are there already, --table only prints. Pages on disk go to --disk, which is emptied afterwards.

Bars (exit status 1 if one that was measured is missed):
  speed   FLAP on 1b at least 1.10 times the faster of PyTorch's rows, on 3b 1.05 times; qwen2.5-1.5b 58,255 tokens/s
  memory  1b at 8, 16, 24 and 72 GiB: the most that nvidia-smi shows is within the budget
  bits    1b at every other budget: the losses and gradient norms of the first steps equal those at 72 GiB to the last bit
"""
import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import time

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, HERE)
import run_flap  # noqa: E402
import shapes  # noqa: E402

ROW_SECONDS = 175  # of flap: of the plan, which on a new machine measures its rates first, and training

ONE_B = "--batch 8 --sequence 2048 --micro-batches 1"
THREE_B = "--batch 4 --sequence 2048 --micro-batches 4"
ROWS = {  # name: arguments of torch_in_core.py or run_flap.py
    "torch-1b": f"1b {ONE_B} --steps 10",
    "torch-1b-layers": f"1b {ONE_B} --steps 10 --compile layers",
    "flap-1b": f"1b {ONE_B} --steps 14 --vram 72GiB --ram 60GiB",
    "torch-3b": f"3b {THREE_B} --steps 6",
    "torch-3b-layers": f"3b {THREE_B} --steps 6 --compile layers",
    "flap-3b": f"3b {THREE_B} --steps 10 --vram 72GiB --ram 90GiB",
    "flap-qwen2.5-1.5b": "qwen2.5-1.5b --batch 16 --sequence 1024 --micro-batches 16 --steps 8 --vram 72GiB --ram 60GiB",
    "flap-llama3-8b": "llama3-8b --batch 4 --sequence 2048 --micro-batches 16 --steps 5 --vram 76GiB --ram 100GiB",
    "flap-1b-24": f"1b {ONE_B} --steps 10 --vram 24GiB --ram 60GiB",
    "flap-1b-18": f"1b {ONE_B} --steps 10 --vram 18GiB --ram 60GiB",
    "flap-1b-16": f"1b {ONE_B} --steps 10 --vram 16GiB --ram 60GiB",
    "flap-1b-8": f"1b {ONE_B} --steps 10 --vram 8GiB --ram 60GiB",
    "flap-1b-min": f"1b {ONE_B} --steps 4 --vram min --ram 60GiB",
    "flap-1b-disk": f"1b {ONE_B} --steps 4 --vram 6GiB --ram 2GiB --disk DISK",  # 16 GB of states, which fit neither
}
SPEED = [  # row, rows of the peer or tokens per second, factor
    ("flap-1b", ("torch-1b", "torch-1b-layers"), 1.10),
    ("flap-3b", ("torch-3b", "torch-3b-layers"), 1.05),
    ("flap-qwen2.5-1.5b", 58255.0, 1.0),
]
MEMORY = {"flap-1b-8": 8, "flap-1b-16": 16, "flap-1b-24": 24, "flap-1b": 72}  # GiB
BITS = ("flap-1b-24", "flap-1b-18", "flap-1b-16", "flap-1b-8", "flap-1b-min", "flap-1b-disk")


# ---- measuring ----


def measure_torch(options, name, arguments):
    path = os.path.join(options.out, f"{name}.json")
    if os.path.exists(path):
        os.unlink(path)
    command = [options.python, os.path.join(HERE, os.pardir, "peers", "torch_in_core.py"), *arguments, "--device",
               options.device, "--json", path]
    with open(os.path.join(options.out, f"{name}.log"), "w") as log:
        try:
            status = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, timeout=ROW_SECONDS).returncode
        except subprocess.TimeoutExpired:
            return {"error": f"not done after {ROW_SECONDS} s"}
    if status != 0 or not os.path.exists(path):
        return {"error": f"{shlex.join(command)} ended with status {status}: see {name}.log"}
    with open(path) as file:
        return json.load(file)


def measure_flap(options, name, arguments):
    words = [options.disk if word == "DISK" else word for word in arguments]
    own = run_flap.parser_of().parse_intermixed_args(
        [*words, "--flap", options.flap, "--out", options.out, "--name", name, "--device", options.device, "--seconds",
         str(options.row_seconds - 5)])
    try:
        return run_flap.run(own)
    except (subprocess.TimeoutExpired, OSError) as error:
        return {"error": str(error)}
    finally:
        if "DISK" in arguments:
            shutil.rmtree(options.disk, ignore_errors=True)


def load(path):
    try:
        with open(path) as file:
            return json.load(file)
    except FileNotFoundError:
        return {}


def store(path, state):
    with open(f"{path}.part", "w") as file:
        json.dump(state, file, indent=1)
    os.replace(f"{path}.part", path)


def measure_rows(options, names, path, state):
    end = time.monotonic() + 60 * options.minutes
    for name in names:
        if name in state and "error" not in state[name] and not options.again:
            continue
        if time.monotonic() + options.row_seconds + 5 > end:
            print(f"{name} and what follows wait for the next call: --minutes {options.minutes:g} are nearly over")
            return
        began = time.monotonic()
        arguments = shlex.split(options.rows[name])
        state[name] = (measure_torch if name.startswith("torch") else measure_flap)(options, name, arguments)
        store(path, state)
        print(f"{name}: {state[name].get('error') or line_of(state[name])} ({time.monotonic() - began:.0f} s)", flush=True)


# ---- the table ----


def line_of(record):
    return f"{record['tokens_per_second']:,.0f} tokens/s"


def shown_mib(record):
    """What nvidia-smi charged to flap: by process, or as what the GPU held more than before."""
    if record["nvidia_smi_source"] == "gpu":
        return record["nvidia_smi_gpu_mib"] - record["nvidia_smi_gpu_before_mib"]
    return record["nvidia_smi_mib"]


def print_rows(options, state):
    print(f"{'row':18} {'tokens/s':>10} {'step':>9} {'planned':>9} {'MFU':>6} {'of bound':>8} {'GPU MiB':>8} "
          f"{'host GiB':>8}")
    for name in options.rows:
        record = state.get(name)
        if record is None or "error" in record:
            print(f"{name:18} {'not measured' if record is None else record['error']}")
            continue
        planned = f"{record['step_seconds_planned']:8.3f}s" if "step_seconds_planned" in record else ""
        bound = f"{record['bound_share']:.1%}" if "bound_share" in record else ""
        if not name.startswith("torch"):
            shown, host = shown_mib(record), f"{record['rss_bytes'] / 2**30:.1f}"
        else:
            shown, host = record["reserved_bytes"] >> 20, ""
        note = " (ended early)" if record.get("cut") else ""
        if "compile" in record:
            note += f" (compile {record['compile']}{', checkpointed' if record['checkpointing'] else ''})"
        print(f"{name:18} {record['tokens_per_second']:10,.0f} {record['step_seconds']:8.3f}s {planned:>9} "
              f"{record['mfu']:6.1%} {bound:>8} {'-' if shown is None else shown:>8} {host:>8}{note}")


def good(state, name):
    return name in state and "error" not in state[name]


def speed_bars(state):
    for name, peer, factor in SPEED:
        title = f"speed: {name} against {peer[0] if isinstance(peer, tuple) else 'a rate'}"
        if isinstance(peer, tuple):
            rates = [state[each]["tokens_per_second"] for each in peer if good(state, each)]
            yardstick = max(rates, default=None)
        else:
            yardstick = peer
        if not good(state, name) or yardstick is None:
            yield title, "", None
            continue
        ours = state[name]["tokens_per_second"]
        text = f"{ours:,.0f} / {yardstick:,.0f} = {ours / yardstick:.3f}, at least {factor:.2f}"
        yield title, text, ours >= factor * yardstick


def memory_bars(state):
    for name, budget in MEMORY.items():
        title = f"memory: {name} within {budget} GiB"
        shown = shown_mib(state[name]) if good(state, name) else None
        if shown is None:
            yield title, "", None
            continue
        source = "its process" if state[name]["nvidia_smi_source"] == "process" else "the GPU, less what it held before"
        yield title, f"{shown:,} of {budget * 1024:,} MiB, {source}", shown <= budget * 1024


def same_bits(one, other):
    """Whether the steps that both have, at least two, gave the same; and how many these are."""
    steps = min(len(one["losses"]), len(other["losses"]))
    return steps >= 2 and all(one[key][:steps] == other[key][:steps] for key in ("losses", "grad_norms")), steps


def bits_bars(state):
    for name in BITS:
        title = f"bits: {name} as flap-1b"
        if not (good(state, name) and good(state, "flap-1b")):
            yield title, "", None
            continue
        same, steps = same_bits(state[name], state["flap-1b"])
        yield title, f"losses and norms of {steps} steps {'equal' if same else 'DIFFER'}", same


def print_table(options, state):
    """Whether no bar that was measured is missed."""
    print()
    print_rows(options, state)
    print()
    missed = 0
    for title, text, passed in [*speed_bars(state), *memory_bars(state), *bits_bars(state)]:
        missed += passed is False
        print(f"{'not yet' if passed is None else 'ok' if passed else 'MISSED':8} {title}{': ' if text else ''}{text}")
    return missed == 0


def tried(rows):
    """The rows at a size for a CPU: for trying this script, whose bars then mean nothing."""
    words = {"1b": "tiny", "3b": "tiny", "qwen2.5-1.5b": "tiny", "llama3-8b": "tiny", "qwen2.5-7b": "tiny", "llama2-13b": "tiny", "1024": "64", "2048": "64",
             "72GiB": "64MiB", "76GiB": "64MiB", "24GiB": "24MiB", "18GiB": "18MiB", "16GiB": "16MiB", "8GiB": "8MiB",
             "6GiB": "5MiB", "60GiB": "64MiB", "90GiB": "64MiB", "100GiB": "64MiB", "112GiB": "64MiB", "104GiB": "64MiB", "12GiB": "12MiB", "56GB": "56MB",
             "2GiB": "2MiB"}
    return {name: " ".join(words.get(word, word) for word in text.split()) for name, text in rows.items()}


def add_options(parser):
    parser.add_argument("--out", required=True)
    parser.add_argument("--flap", default="build-cuda/tools/flap")
    parser.add_argument("--disk", default="/var/tmp/flap-bars-disk", help="a folder of its own: it is removed afterwards")
    parser.add_argument("--only", help="rows, with commas between them")
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--minutes", type=float, default=9)
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--table", action="store_true", help="print what was measured, measure nothing")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: tiny models, to try the script")


def run_rows(parser, options, table):
    """Measures what is asked for and not there yet; what table(options, state) says of it all."""
    names = options.only.split(",") if options.only else list(options.rows)
    unknown = [name for name in names if name not in options.rows]
    if unknown:
        parser.error(f"--only: there is no row {', '.join(unknown)}; --list shows them")
    os.makedirs(options.out, exist_ok=True)
    path = os.path.join(options.out, "state.json")
    state = load(path)
    if not options.table:
        measure_rows(options, names, path, state)
    return table(options, state)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_options(parser)
    parser.add_argument("--python", default=sys.executable, help="a Python with torch and transformers, for the peers")
    options = parser.parse_args()
    options.row_seconds = ROW_SECONDS
    options.rows = ROWS if options.device == "cuda" else tried(ROWS)
    if options.list:
        for name, arguments in options.rows.items():
            print(f"{name:18} {arguments}")
        return
    sys.exit(0 if run_rows(parser, options, print_table) else 1)


if __name__ == "__main__":
    main()
