"""Does the planner choose as well as it could? Each of its choices is forced, one at a time, and the plans are compared.

  python3 bench/planner_ablation.py [--flap build/tools/flap] [--only 7b] [--quick] [--json FILE]

Cases are model shapes (bench/gpu/shapes.py) on machines that flap knows (`flap plan --list-machines`), with budgets; nothing of this
machine is measured. A choice is one key of `expert`, or `activations`. For each case: the step time that the planner expects of its
own plan, and the best that a forced choice comes to, with how much better (a plus) or worse it is. A forced plan that is better is
one that the planner had among its candidates and missed. Exit status 1 if one is better by more than 1%.
"""
import argparse
import json
import os
import subprocess
import sys
import tempfile

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(HERE, "gpu"))
import shapes  # noqa: E402

H100, RTX4090, RTX3090, LAPTOP = "h100-80g-128g-0nvme", "rtx4090-64g-1nvme", "rtx3090-64g-1nvme", "rtx4060-laptop"
CASES = {  # name: shape, machine, sequence, batch, micro-batches, further keys
    "3b-24": ("3b", H100, 2048, 4, 4, {"vram": "24GiB", "ram": "100GiB"}),
    "3b-24-16": ("3b", H100, 2048, 4, 16, {"vram": "24GiB", "ram": "100GiB"}),
    "3b-8": ("3b", H100, 2048, 4, 4, {"vram": "8GiB", "ram": "100GiB"}),
    "7b-24": ("qwen2.5-7b", H100, 2048, 4, 8, {"vram": "24GiB", "ram": "112GiB"}),
    "7b-24-8bit": ("qwen2.5-7b", H100, 2048, 4, 32, {"vram": "24GiB", "ram": "112GiB", "optim": "adamw_8bit"}),
    "8b-24-2": ("llama3-8b", H100, 2048, 4, 2, {"vram": "24GiB", "ram": "112GiB"}),
    "8b-24-2-noclip": ("llama3-8b", H100, 2048, 4, 2, {"vram": "24GiB", "ram": "112GiB", "max_grad_norm": "0"}),
    "8b-24-4-noclip": ("llama3-8b", H100, 2048, 4, 4, {"vram": "24GiB", "ram": "112GiB", "max_grad_norm": "0"}),
    "3b-24-noclip": ("3b", H100, 2048, 4, 4, {"vram": "24GiB", "ram": "100GiB", "max_grad_norm": "0"}),
    "13b-24-8bit": ("llama2-13b", H100, 2048, 4, 16, {"vram": "24GiB", "ram": "112GiB", "optim": "adamw_8bit"}),
    "7b-4090": ("qwen2.5-7b", RTX4090, 2048, 2, 16, {}),
    "3b-3090": ("3b", RTX3090, 2048, 2, 16, {}),
    "1b-laptop": ("1b", LAPTOP, 1024, 1, 16, {}),
}
FORCED = {
    "optimizer": [{"expert": "{optimizer: %s}" % word} for word in ("gpu", "cpu", "split")],
    "update": [{"expert": "{update: %s}" % word} for word in ("fold", "sweep", "backward")],
    "segments": [{"expert": "{segment_layers: %d}" % count} for count in (1, 2, 4, 8)],
    "groups": [{"expert": "{group_micro_batches: %d}" % count} for count in (1, 2, 4, 8)],
    "activations": [{"activations": word} for word in ("keep", "offload", "recompute")],
    "saved": [{"activations": "offload", "expert": "{saved: %s}" % word} for word in ("attention", "all_but_mlp", "all")],
    "slices": [{"expert": "{slice_bytes: %s}" % size} for size in ("4MiB", "16MiB", "64MiB")],
}


def plan(options, case, folder, more):
    """The plan as an object, or None where these keys do not fit together or the budgets."""
    shape, machine, sequence, batch, micro_batches, keys = CASES[case]
    path = os.path.join(folder, f"{case}.yaml")
    if not os.path.exists(path):
        shard = os.path.join(folder, f"{shape}.bin")
        if not os.path.exists(shard):
            shapes.write_shard(shard, [1] * (1 << 20), shapes.shape_of(shape)["vocab_size"])
        shapes.write_yaml(path, shapes.shape_of(shape), {"dataset": shard, "val_size": 0, "save_strategy": "no", "export": "none",
                                                         "output_dir": folder})
    words = {"machine": machine, "cutoff_len": sequence, "per_device_train_batch_size": batch,
             "gradient_accumulation_steps": micro_batches, **keys, **more}
    if int(micro_batches) < int(words.get("expert", "").partition("group_micro_batches: ")[2].rstrip("}") or 0):
        return None
    done = subprocess.run([options.flap, "plan", path, "--json", *(f"{key}={value}" for key, value in words.items())],
                          capture_output=True, text=True)
    return json.loads(done.stdout) if done.returncode == 0 else None


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--flap", default="build/tools/flap")
    parser.add_argument("--only", help="cases whose name begins so")
    parser.add_argument("--quick", action="store_true", help="optimizer, update and activations alone")
    parser.add_argument("--json", help="where to write every step time")
    options = parser.parse_args()
    cases = [case for case in CASES if case.startswith(options.only or "")]
    groups = [name for name in FORCED if not options.quick or name in ("optimizer", "update", "activations")]
    if not cases:
        parser.error(f"--only: no case begins with {options.only}; there are {', '.join(CASES)}")
    results, missed = {}, 0
    print(f"{'case':14} {'expected':>9} " + " ".join(f"{name:>22}" for name in groups))
    with tempfile.TemporaryDirectory() as folder:
        for case in cases:
            own = plan(options, case, folder, {})
            if own is None:
                sys.exit(f"{case}: flap plan refuses it")
            results[case] = {"auto": own["step_seconds"]}
            cells = []
            for group in groups:
                best = None
                for more in FORCED[group]:
                    forced = plan(options, case, folder, more)
                    if forced is None:
                        continue
                    label = more.get("expert", "").strip("{}").partition(": ")[2] or more["activations"]
                    results[case][f"{group} {label}"] = forced["step_seconds"]
                    if best is None or forced["step_seconds"] < best[0]:
                        best = (forced["step_seconds"], label)
                if best is None:
                    cells.append(f"{'-':>22}")
                    continue
                gain = own["step_seconds"] / best[0] - 1
                missed += gain > 0.01
                cells.append(f"{best[1]:>14} {gain:+6.1%}{'!' if gain > 0.01 else ' '}")
            print(f"{case:14} {own['step_seconds']:8.3f}s " + " ".join(cells), flush=True)
    if options.json:
        with open(options.json, "w") as file:
            json.dump(results, file, indent=1)
    print(f"{missed} forced choices are better by more than 1%")
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()
