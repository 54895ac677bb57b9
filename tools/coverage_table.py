#!/usr/bin/env python3
"""A table of what gcov counted: lines and branches of each file.

Usage: tools/coverage_table.py [--lines] <build folder> <file or folder>...

Branches are those that the compiler made, as gcov counts them. Two kinds are left out, since no test is to take them: those
of asserts, and those of the macros that forward a failure (FLAP_TRY, FLAP_TRY_GOTO), which are counted by themselves, as
`forwards`: how many of them were seen to forward one. --lines lists after each file what was not run."""
import collections
import concurrent.futures
import gzip
import json
import os
import re
import subprocess
import sys
import tempfile

ASSERT = re.compile(r"\b(flap_assert|_Static_assert)\b")
FORWARD = re.compile(r"\bFLAP_TRY(_GOTO)?\(")


def read_gcov(path):
    """The files of one object: name, line number, times it ran, times that each branch was taken."""
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(["gcov", "--json-format", "--branch-probabilities", os.path.abspath(path)], cwd=folder,
                              capture_output=True)
        if done.returncode != 0:
            sys.exit(f"coverage_table.py: error: gcov: {path}: {done.stderr.decode()}")
        for name in os.listdir(folder):
            with gzip.open(os.path.join(folder, name)) as file:
                return json.load(file)["files"]
    return []


def gather(build, wanted):
    """{file: {line: [count, [count of a branch, ...]]}}, summed over objects."""
    notes = [os.path.join(folder, name) for folder, _, names in os.walk(build) for name in names if name.endswith(".gcda")]
    found = collections.defaultdict(dict)
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        for files in pool.map(read_gcov, sorted(notes)):
            for file in files:
                name = os.path.relpath(os.path.realpath(file["file"]))
                if not name.endswith(".c") or not any(name == w or name.startswith(w.rstrip("/") + "/") for w in wanted):
                    continue
                for line in file["lines"]:
                    branches = [branch["count"] for branch in line["branches"]]
                    have = found[name].setdefault(line["line_number"], [0, [0] * len(branches)])
                    have[0] += line["count"]
                    if len(have[1]) == len(branches):
                        have[1] = [a + b for a, b in zip(have[1], branches)]
    return found


def statement(source, number):
    """The source from this line on, as far as a macro's name may stand: a statement may go on over lines."""
    return source[number - 1] if number <= len(source) else ""


class Sums:
    def __init__(self):
        self.lines = self.lines_run = self.branches = self.branches_taken = self.forwards = self.forwarded = 0

    def add(self, other):
        for name in vars(self):
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def row(self, name):
        def share(part, whole):
            return f"{100 * part / whole:6.1f}%" if whole else "      -"
        return (f"{name:<34}{self.lines:>7}{share(self.lines_run, self.lines):>9}{self.branches:>9}"
                f"{share(self.branches_taken, self.branches):>9}{self.forwards:>9}{share(self.forwarded, self.forwards):>9}")


def count(name, lines):
    """Sums of a file, and what was not run: texts."""
    with open(name, encoding="utf-8") as file:
        source = file.read().splitlines()
    sums, missed = Sums(), []
    for number, (ran, branches) in sorted(lines.items()):
        text = statement(source, number)
        sums.lines += 1
        sums.lines_run += ran > 0
        if ran == 0:
            missed.append(f"  {number:5} not run        {text.strip()[:100]}")
        if ASSERT.search(text) or not branches:
            continue
        taken = sum(times > 0 for times in branches)
        if FORWARD.search(text):
            sums.forwards += 1
            sums.forwarded += taken == len(branches)
            continue
        sums.branches += len(branches)
        sums.branches_taken += taken
        if ran > 0 and taken < len(branches):
            missed.append(f"  {number:5} {len(branches) - taken} of {len(branches)} not taken {text.strip()[:100]}")
    return sums, missed


def main():
    arguments = [argument for argument in sys.argv[1:] if argument != "--lines"]
    if len(arguments) < 2:
        sys.exit(__doc__.split("\n\n")[1])
    found = gather(arguments[0], [os.path.normpath(name) for name in arguments[1:]])
    if not found:
        sys.exit(f"coverage_table.py: error: {arguments[0]}: nothing was counted there for {' '.join(arguments[1:])}")
    total = Sums()
    print(f"{'file':<34}{'lines':>7}{'run':>9}{'branches':>9}{'taken':>9}{'forwards':>9}{'seen':>9}")
    for name in sorted(found):
        sums, missed = count(name, found[name])
        total.add(sums)
        print(sums.row(name))
        if "--lines" in sys.argv:
            print("\n".join(missed))
    print(total.row("total"))


if __name__ == "__main__":
    main()
