"""Training at the limit on one H100 whose memory is capped: every run that has a bar, row by row, and one table.

  python3 bench/gpu/limit_bars.py --out OUT [--flap build-cuda/tools/flap] [--only 7b-24,3b-24] [--again] [--minutes 9]
                                  [--disk FOLDER] [--seconds 240] [--list] [--table]

A row is one run of bench/gpu/run_flap.py, ended after --seconds: then it counts with the steps that it made. OUT/state.json keeps
what was measured, as in cuda_bars.py, whose options these are.

Bars (exit status 1 if one that was measured is missed):
  rate   tokens per second of a row, at least so many
  share  tokens per second of a row over those of another one, at least so much
  plan   the step time that `flap plan` predicted is within 2% of the measured one
  bits   3.5 billion parameters at 24, 12 and 8 GiB: losses and norms equal those at 72 GiB to the last bit
"""
import argparse
import os
import shlex
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import cuda_bars  # noqa: E402

SEVEN_B = "qwen2.5-7b --batch 4 --sequence 2048 --steps 6 --ram 112GiB"
EIGHT_B = "llama3-8b --sequence 2048 --steps 6 --ram 112GiB"
THREE_B = "3b --batch 4 --sequence 2048 --micro-batches 16 --steps 6 --ram 112GiB"
ROWS = {
    "3b-72": f"{THREE_B} --vram 72GiB",
    "3b-72-recompute": f"{THREE_B} --vram 72GiB activations=recompute",
    "3b-24": f"{THREE_B} --vram 24GiB",
    "3b-12": f"{THREE_B} --vram 12GiB",
    "3b-8": f"{THREE_B} --vram 8GiB",
    "3b-24-32k": "3b --batch 4 --sequence 2048 --micro-batches 4 --steps 8 --ram 100GiB --vram 24GiB",
    "3b-24-disk": "3b --batch 4 --sequence 2048 --micro-batches 4 --steps 5 --ram 16GiB --vram 24GiB --disk DISK --disk-size 56GB",
    "3b-24-disk-noclip": "3b --batch 4 --sequence 2048 --micro-batches 4 --steps 5 --ram 16GiB --vram 24GiB --disk DISK --disk-size 56GB "
                         "max_grad_norm=0",
    "3b-24-disk-48": "3b --batch 4 --sequence 2048 --micro-batches 4 --steps 5 --ram 48GiB --vram 24GiB --disk DISK --disk-size 56GB "
                     "max_grad_norm=0",
    "7b-24": f"{SEVEN_B} --vram 24GiB --micro-batches 32",
    "7b-24-8bit": f"{SEVEN_B} --vram 24GiB --micro-batches 32 optim=adamw_8bit",
    "7b-24-65k": f"{SEVEN_B} --vram 24GiB --micro-batches 8",
    "7b-24-65k-8bit": f"{SEVEN_B} --vram 24GiB --micro-batches 8 optim=adamw_8bit",
    "7b-76": f"{SEVEN_B} --vram 76GiB --micro-batches 16",
    "8b-24": f"{EIGHT_B} --vram 24GiB --batch 4 --micro-batches 16",
    "8b-24-8bit": f"{EIGHT_B} --vram 24GiB --batch 4 --micro-batches 16 optim=adamw_8bit",
    "8b-24-8192": "llama3-8b --batch 1 --sequence 8192 --micro-batches 16 --steps 5 --ram 112GiB --vram 24GiB",
    "8b-24-8192-8bit": "llama3-8b --batch 1 --sequence 8192 --micro-batches 16 --steps 5 --ram 112GiB --vram 24GiB "
                       "optim=adamw_8bit",
    "8b-24-16k": f"{EIGHT_B} --vram 24GiB --batch 4 --micro-batches 2",
    "8b-24-32k": f"{EIGHT_B} --vram 24GiB --batch 4 --micro-batches 4",
    "3b-24-noclip": f"{THREE_B} --vram 24GiB max_grad_norm=0",
    "3b-24-32k-noclip": "3b --batch 4 --sequence 2048 --micro-batches 4 --steps 8 --ram 100GiB --vram 24GiB max_grad_norm=0",
    "3b-12-noclip": f"{THREE_B} --vram 12GiB max_grad_norm=0",
    "3b-8-noclip": f"{THREE_B} --vram 8GiB max_grad_norm=0",
    "8b-24-noclip": f"{EIGHT_B} --vram 24GiB --batch 4 --micro-batches 16 max_grad_norm=0",
    "8b-24-16k-noclip": f"{EIGHT_B} --vram 24GiB --batch 4 --micro-batches 2 max_grad_norm=0",
    "8b-24-8k-noclip": f"{EIGHT_B} --vram 24GiB --batch 4 --micro-batches 1 max_grad_norm=0",
    "8b-24-65k-noclip": f"{EIGHT_B} --vram 24GiB --batch 4 --micro-batches 8 max_grad_norm=0",
    "8b-24-32k-noclip": f"{EIGHT_B} --vram 24GiB --batch 4 --micro-batches 4 max_grad_norm=0",
    "8b-24-16k-8bit-noclip": f"{EIGHT_B} --vram 24GiB --batch 4 --micro-batches 2 max_grad_norm=0 optim=adamw_8bit",
    "8b-24-32k-8bit-noclip": f"{EIGHT_B} --vram 24GiB --batch 4 --micro-batches 4 max_grad_norm=0 optim=adamw_8bit",
    "13b-24-8bit": "llama2-13b --batch 4 --sequence 2048 --micro-batches 16 --steps 5 --vram 24GiB --ram 112GiB optim=adamw_8bit",
    "13b-24-disk": "llama2-13b --batch 4 --sequence 2048 --micro-batches 4 --steps 4 --vram 24GiB --ram 112GiB --disk DISK "
                   "--disk-size 56GB",
    "13b-24-disk-noclip": "llama2-13b --batch 4 --sequence 2048 --micro-batches 16 --steps 4 --vram 24GiB --ram 112GiB "
                          "--disk DISK --disk-size 56GB max_grad_norm=0",
}
RATES = {  # tokens per second
    "7b-24": 10000, "7b-24-8bit": 10790, "7b-24-65k": 9620, "7b-24-65k-8bit": 9620, "7b-76": 12000, "8b-24": 10764, "8b-24-8bit": 10764,
    "8b-24-noclip": 10764, "13b-24-8bit": 5550, "3b-24-disk-noclip": 3195,
}
SHARES = [  # row, row to compare with, at least
    ("3b-24", "3b-72-recompute", 0.97), ("3b-12", "3b-72-recompute", 0.95), ("3b-8", "3b-72-recompute", 0.90),
    ("3b-24", "3b-72", 0.85), ("3b-12", "3b-72", 0.80), ("3b-8", "3b-72", 0.75),
]
PLAN_WITHIN = 0.02
BITS = ("3b-24", "3b-12", "3b-8")


def bars(state):
    """(title, what came, whether it passed), passed None where something was not measured."""
    for name, rate in RATES.items():
        got = state[name]["tokens_per_second"] if cuda_bars.good(state, name) else None
        yield f"rate: {name}", "" if got is None else f"{got:,.0f}, at least {rate:,}", None if got is None else got >= rate
    for name, other, share in SHARES:
        title = f"share: {name} of {other}"
        if not (cuda_bars.good(state, name) and cuda_bars.good(state, other)):
            yield title, "", None
            continue
        got = state[name]["tokens_per_second"] / state[other]["tokens_per_second"]
        yield title, f"{got:.3f}, at least {share:.2f}", got >= share
    for name in ROWS:
        if cuda_bars.good(state, name):
            ratio = state[name]["step_seconds_planned"] / state[name]["step_seconds"]
            yield f"plan: {name}", f"{ratio:.3f} of what was measured", abs(ratio - 1) <= PLAN_WITHIN
    for name in BITS:
        title = f"bits: {name} as 3b-72"
        if not (cuda_bars.good(state, name) and cuda_bars.good(state, "3b-72")):
            yield title, "", None
            continue
        same, steps = cuda_bars.same_bits(state[name], state["3b-72"])
        yield title, f"losses and norms of {steps} steps {'equal' if same else 'DIFFER'}", same


def print_table(options, state):
    print()
    cuda_bars.print_rows(options, state)
    print()
    missed = 0
    for title, text, passed in bars(state):
        missed += passed is False
        print(f"{'not yet' if passed is None else 'ok' if passed else 'MISSED':8} {title}{': ' if text else ''}{text}")
    return missed == 0


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    cuda_bars.add_options(parser)
    parser.add_argument("--seconds", type=float, default=240, help="of a row: the plan, the start and the steps")
    options = parser.parse_args()
    options.row_seconds = options.seconds
    options.python = sys.executable
    options.rows = ROWS if options.device == "cuda" else cuda_bars.tried(ROWS)
    if options.list:
        for name, arguments in options.rows.items():
            print(f"{name:16} {arguments}")
        return
    sys.exit(0 if cuda_bars.run_rows(parser, options, print_table) else 1)


if __name__ == "__main__":
    main()
