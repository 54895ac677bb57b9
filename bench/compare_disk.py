"""io/block beside a bare io_uring loop on the same disk: alternates both, prints medians and the ratio.

  python3 bench/compare_disk.py [--build build] [--folder .] [--mib 1024] [--kib 1024] [--depth 16] [--rounds 9]
                                [--ours "<command>"] [--least 0.95]

`--ours` names another command that prints "read <n> GB/s" and "write <n> GB/s", for example
"build/tools/flap bench disk --path /mnt/nvme --bytes 1GiB --request 1MiB --depth 16". The order of the two changes every
round, so that a drive that warms up or fills its cache favours neither. The ratio is the median of the rounds' ratios: a
disk that others use drifts, and the two of a round see the same of it. Exit status 1 if it is below --least.
"""
import argparse
import os
import re
import shlex
import statistics
import subprocess
import sys


def filesystem(folder):
    for command in (["findmnt", "-n", "-o", "FSTYPE", "-T", folder], ["stat", "-f", "-c", "%T", folder]):
        try:
            done = subprocess.run(command, capture_output=True, text=True)
        except FileNotFoundError:
            continue
        if done.returncode == 0 and done.stdout.strip():
            return done.stdout.strip()
    return "unknown file system"


def measure(command):
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    rates = {name: float(rate) for name, rate in re.findall(r"^(read|write)\s+([\d.]+) GB/s$", done.stdout, re.M)}
    if done.returncode != 0 or len(rates) != 2:
        sys.exit(f"compare_disk: {shlex.join(command)} failed: {done.stderr.strip() or done.stdout.strip()}")
    return rates


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--build", default="build", help="the build folder that holds both programs")
    parser.add_argument("--folder", default=".", help="a folder on the disk")
    parser.add_argument("--mib", type=int, default=1024, help="size of the file")
    parser.add_argument("--kib", type=int, default=1024, help="size of a request")
    parser.add_argument("--depth", type=int, default=16, help="requests in flight")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--ours", help="the command to compare instead of bench_disk")
    parser.add_argument("--least", type=float, default=0.95, help="the least ratio that passes")
    options = parser.parse_args()
    if options.rounds < 1:
        parser.error("--rounds must be at least 1")

    shape = [options.folder, str(options.mib), str(options.kib), str(options.depth)]
    commands = {"io/block": shlex.split(options.ours or "") or [os.path.join(options.build, "bench/bench_disk"), *shape],
                "plain": [os.path.join(options.build, "bench/plain_uring"), *shape]}
    print(f"{filesystem(options.folder)}, file of {options.mib} MiB, requests of {options.kib} KiB, depth {options.depth}, "
          f"{options.rounds} rounds; GB/s")
    rounds = {name: [] for name in commands}
    for number in range(options.rounds):
        for name in sorted(commands, reverse=number % 2 == 1):
            rounds[name].append(measure(commands[name]))
    least = float("inf")
    for kind in ("read", "write"):
        for name in commands:
            rates = [rates[kind] for rates in rounds[name]]
            print(f"{kind:5}  {name:8}  median {statistics.median(rates):6.3f}  least {min(rates):6.3f}  most {max(rates):6.3f}")
        ratios = sorted(ours[kind] / plain[kind] for ours, plain in zip(rounds["io/block"], rounds["plain"]))
        least = min(least, statistics.median(ratios))
        print(f"{kind:5}  ratio     median {statistics.median(ratios):6.3f}  quarter below {ratios[len(ratios) // 4]:.3f}, "
              f"quarter above {ratios[-1 - len(ratios) // 4]:.3f}")
    return 0 if least >= options.least else 1


if __name__ == "__main__":
    sys.exit(main())
