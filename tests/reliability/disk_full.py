#!/usr/bin/env python3
"""A disk that fills up in the middle of a run. Usage: disk_full.py <flap>

Somebody else takes all the space of the file system of output_dir (a small tmpfs, where this may be mounted), or the limit
on the size of files is lowered under the running program. What can be foreseen, from how many checkpoints are there at once, is refused
before the start. The run must end with one line that names the folder and what is
wrong, exit status 1, and all that was saved must be whole; with room again, the same command with
resume_from_checkpoint=true must end with the bits of a run that nothing disturbed."""
import hashlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import unittest

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from kill_program import MACHINE, RUN, TEXT, digests  # noqa: E402

FLAP = os.path.abspath(sys.argv.pop(1))
INSIDE = "FLAP_DISK_FULL_INSIDE"  # set in the namespace that may mount
STEPS = 60
LATER = [f"max_steps={STEPS}", "save_steps=10"]
TMPFS_BYTES = 2 << 20


class DiskFull(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory(prefix="flap-full-")
        self.addCleanup(folder.cleanup)
        self.folder = folder.name
        self.environment = dict(os.environ, FLAP_MACHINE=self.path("machine.json"))
        os.mkdir(self.path("disk"))
        os.mkdir(self.path("small"))
        for name, content in (("run.yaml", RUN), ("text.txt", TEXT), ("machine.json", json.dumps(MACHINE))):
            with open(self.path(name), "w") as file:
                file.write(content)

    def path(self, *names):
        return os.path.join(self.folder, *names)

    def start(self, *overrides):
        process = subprocess.Popen([FLAP, "train", "run.yaml", *LATER, *overrides], cwd=self.folder, env=self.environment,
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        self.addCleanup(process.stdout.close)
        self.addCleanup(process.stderr.close)
        return process

    def wait_for(self, process, text):
        for line in process.stdout:
            if text in line:
                return
        self.fail(f"no \"{text}\": {process.stderr.read()}")

    def must_end_well(self, *overrides):
        _, errors = (process := self.start(*overrides)).communicate(timeout=120)
        self.assertEqual(process.returncode, 0, errors)

    def result(self, out):
        with open(self.path(out, "metrics.jsonl")) as file:
            lines = [json.loads(line) for line in file]
        with open(self.path(out, "model.safetensors"), "rb") as file:
            model = hashlib.sha256(file.read()).hexdigest()
        steps = [(line["step"], line["loss"], line["grad_norm"]) for line in lines if "grad_norm" in line]
        return steps, model, digests(self.path(out, f"checkpoint-{STEPS}"))

    def newest(self, out):
        steps = [int(name.split("-")[1]) for name in os.listdir(self.path(out)) if name.startswith("checkpoint-")]
        return max(steps)

    def story(self, out, squeeze, release, wanted, *overrides):
        """`squeeze` takes the room of a running process away, `release` gives it back."""
        self.must_end_well("output_dir=undisturbed", "save_total_limit=0", *overrides)
        process = self.start(f"output_dir={out}", *overrides)
        self.wait_for(process, "checkpoint-10 in")
        held = squeeze(process)
        _, errors = process.communicate(timeout=120)
        self.assertEqual(process.returncode, 1, errors)
        lines = [line for line in errors.splitlines() if line.startswith("flap: error: ")]
        self.assertEqual(len(lines), 1, errors)
        self.assertIn(out, lines[0])
        self.assertRegex(lines[0], wanted)
        saved = self.newest(out)
        self.assertGreaterEqual(saved, 10)
        self.assertLess(saved, STEPS)
        self.assertEqual(digests(self.path(out, f"checkpoint-{saved}")),
                         digests(self.path("undisturbed", f"checkpoint-{saved}")))
        # As long as there is no room, it says so again, and loses nothing.
        if held is not None:
            _, errors = (again := self.start(f"output_dir={out}", "resume_from_checkpoint=true", *overrides)).communicate(
                timeout=120)
            self.assertEqual(again.returncode, 1, errors)
            self.assertEqual(self.newest(out), saved)
        release(held)
        self.must_end_well(f"output_dir={out}", "resume_from_checkpoint=true", *overrides)
        self.assertEqual(self.result(out), self.result("undisturbed"))

    def test_another_process_takes_the_space(self):
        if INSIDE not in os.environ:
            self.skipTest("no right to mount a small file system here")
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={TMPFS_BYTES}", "none", self.path("small")], check=True)
        self.addCleanup(subprocess.run, ["umount", self.path("small")], check=True)

        def squeeze(process):
            taken = open(self.path("small", "of-somebody-else"), "wb", buffering=0)
            try:
                while True:
                    taken.write(bytes(4096))
            except OSError:
                return taken

        def release(taken):
            taken.close()
            os.remove(taken.name)

        self.story("small/out", squeeze, release, "[Nn]o space|bytes free")

    def test_what_would_not_fit_is_refused_at_the_start(self):
        if INSIDE not in os.environ:
            self.skipTest("no right to mount a small file system here")
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={TMPFS_BYTES}", "none", self.path("small")], check=True)
        self.addCleanup(subprocess.run, ["umount", self.path("small")], check=True)
        plan = json.loads(subprocess.run([FLAP, "plan", "run.yaml", "--json", *LATER], cwd=self.folder, env=self.environment,
                                         capture_output=True, text=True, check=True).stdout)
        fit = (TMPFS_BYTES - plan["export_bytes"]) // plan["checkpoint_bytes"]
        self.assertEqual(plan["checkpoints_at_once"], 3)  # save_total_limit: 2, and one that is written
        out = ["output_dir=small/out", "save_steps=1"]
        _, errors = (process := self.start(*out, f"save_total_limit={fit}")).communicate(timeout=120)
        self.assertEqual(process.returncode, 1, errors)
        self.assertRegex(errors, f"output_dir: small/out has [0-9]+ bytes free, but the trained model and {fit + 1} checkpoints")
        self.assertEqual(os.listdir(self.path("small")), [])
        _, errors = (process := self.start(*out, "save_total_limit=0", "max_steps=1")).communicate(timeout=120)
        self.assertEqual(process.returncode, 0, errors)
        # What is there counts, and has its room already.
        resumed = [*out, "resume_from_checkpoint=true", f"save_total_limit={fit - 2}", "max_steps=4"]
        _, errors = (process := self.start(*resumed)).communicate(timeout=120)
        self.assertEqual(process.returncode, 0, errors)

    def test_the_limit_on_files_is_lowered(self):
        def squeeze(process):
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (30000, resource.RLIM_INFINITY))

        # Without a disk: its extent file was made when there was no limit, and is larger.
        self.story("out", squeeze, lambda held: None, "ulimit -f", "disk=[]", "ram=16MiB")


def may_mount():
    command = ["unshare", "--map-root-user", "--mount", "mount", "-t", "tmpfs", "-o", "size=1m", "none", "/mnt"]
    try:
        return subprocess.run(command, capture_output=True).returncode == 0
    except OSError:
        return False


if __name__ == "__main__":
    if INSIDE not in os.environ and may_mount():
        command = ["unshare", "--map-root-user", "--mount", sys.executable, os.path.abspath(__file__), FLAP, *sys.argv[1:]]
        sys.exit(subprocess.run(command, env=dict(os.environ, **{INSIDE: "1"})).returncode)
    unittest.main()
