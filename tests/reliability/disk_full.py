#!/usr/bin/env python3
"""A disk that fills up in the middle of a run. Usage: disk_full.py <flap>

Somebody else takes all the space of the file system of output_dir (a small tmpfs, where this may be mounted): a run that has
begun ends well all the same, because it kept the room that it needs; one that is killed leaves none, and the next is
refused. Or the limit on the size of files is lowered under the running program: then it ends with one line that names the
folder and what is wrong, exit status 1. What can be foreseen, from how many checkpoints are there at once, is refused before
the start. All that was saved is whole; with room again, the same command with resume_from_checkpoint=true ends with the bits
of a run that nothing disturbed."""
import hashlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
import unittest

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from kill_program import MACHINE, RUN, TEXT, digests  # noqa: E402

FLAP = os.path.abspath(sys.argv.pop(1))
INSIDE = "FLAP_DISK_FULL_INSIDE"  # set in the namespace that may mount
STEPS = 60
LATER = [f"max_steps={STEPS}", "save_steps=10", "expert.checkpoint_states=copied"]
# The disk is on the small file system as well, and checkpoints share the states there.
SHARED = ["disk={path: small/disk, size: 3MiB}", "expert.checkpoint_states=auto"]
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

    def mount(self, size=TMPFS_BYTES):
        if INSIDE not in os.environ:
            self.skipTest("no right to mount a small file system here")
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", self.path("small")], check=True)
        self.addCleanup(subprocess.run, ["umount", self.path("small")], check=True)

    def take_all(self):
        """As somebody else: whatever is free on the small file system."""
        taken = open(self.path("small", "of-somebody-else"), "ab", buffering=0)
        self.addCleanup(taken.close)
        try:
            while True:
                taken.write(bytes(4096))
        except OSError:
            self.assertEqual(os.statvfs(self.path("small")).f_bfree, 0)
            return taken

    def hidden_bytes(self):
        """Of the small file system, in files without a name."""
        about, seen = os.statvfs(self.path("small")), 0
        for folder, _, names in os.walk(self.path("small")):
            for name in names:
                try:
                    seen += os.stat(os.path.join(folder, name)).st_blocks * 512
                except FileNotFoundError:
                    pass  # renamed or pruned meanwhile
        return (about.f_blocks - about.f_bfree) * about.f_frsize - seen

    def wait_for_nothing_hidden(self):
        """The kernel takes a ring of io_uring apart a moment after its process, and the files in it."""
        for _ in range(100):
            if self.hidden_bytes() == 0:
                return
            time.sleep(0.05)
        self.fail(f"{self.hidden_bytes()} bytes are taken by files without a name")

    def plan(self):
        return json.loads(subprocess.run([FLAP, "plan", "run.yaml", "--json", *LATER], cwd=self.folder, env=self.environment,
                                         capture_output=True, text=True, check=True).stdout)

    def check_saved(self, out):
        saved = self.newest(out)
        self.assertGreaterEqual(saved, 10)
        self.assertLess(saved, STEPS)
        self.assertEqual(digests(self.path(out, f"checkpoint-{saved}")),
                         digests(self.path("undisturbed", f"checkpoint-{saved}")))
        return saved

    def must_be_refused(self, wanted, *overrides):
        _, errors = (process := self.start(*overrides)).communicate(timeout=120)
        self.assertEqual(process.returncode, 1, errors)
        self.assertRegex(errors, wanted)

    def test_another_process_takes_the_space_of_a_run(self):
        self.mount()
        self.must_end_well("output_dir=undisturbed", "save_total_limit=0")
        process = self.start("output_dir=small/out")
        self.wait_for(process, "checkpoint-10 in")
        taken = self.take_all()
        _, errors = process.communicate(timeout=120)
        self.assertEqual(process.returncode, 0, errors)
        self.assertNotIn("no room", errors)
        self.assertEqual(self.result("small/out"), self.result("undisturbed"))
        # All is given back at the end, and what is free again is taken: the next run is refused at once.
        self.take_all()
        self.must_be_refused("other has [0-9]+ bytes free", "output_dir=small/other")
        taken.close()

    def test_a_killed_run_leaves_no_room_behind(self):
        self.mount()
        self.must_end_well("output_dir=undisturbed", "save_total_limit=0")
        process = self.start("output_dir=small/out")
        self.wait_for(process, "checkpoint-10 in")
        process.kill()
        process.communicate(timeout=120)
        self.assertEqual(self.hidden_bytes(), 0)
        names = [name for name in os.listdir(self.path("small/out")) if not name.startswith("checkpoint-")]
        self.assertLessEqual(set(names), {"metrics.jsonl", "run.lock"})
        # As long as there is no room, it says so again, and loses nothing.
        saved = self.check_saved("small/out")
        taken = self.take_all()
        resumed = ["output_dir=small/out", "resume_from_checkpoint=true"]
        self.must_be_refused("[Nn]o space|bytes free", *resumed)
        self.assertEqual(self.newest("small/out"), saved)
        os.remove(taken.name)
        taken.close()
        self.must_end_well(*resumed)
        self.assertEqual(self.result("small/out"), self.result("undisturbed"))

    def check_no_second_copy(self, out):
        """Each checkpoint's extents are a file that only it has a name for; the last one's the run had no use for any more."""
        for name in os.listdir(self.path(out)):
            if name.startswith("checkpoint-"):
                pages = [page for page in os.listdir(self.path(out, name)) if page.startswith("optimizer-pages-")]
                self.assertTrue(pages, name)
                self.assertEqual({os.stat(self.path(out, name, page)).st_nlink for page in pages}, {1})

    def test_another_process_takes_the_space_of_a_run_that_shares_its_states(self):
        self.mount(3 * TMPFS_BYTES)
        os.mkdir(self.path("small", "disk"))
        self.must_end_well("output_dir=undisturbed", "save_total_limit=0", "expert.checkpoint_states=auto")
        process = self.start("output_dir=small/out", *SHARED)
        self.wait_for(process, "checkpoint-10 in")
        taken = self.take_all()
        _, errors = process.communicate(timeout=120)
        self.assertEqual(process.returncode, 0, errors)
        self.assertNotIn("no room", errors)
        self.assertNotIn("will not share", errors)
        self.assertEqual(self.result("small/out"), self.result("undisturbed"))
        self.check_no_second_copy("small/out")
        taken.close()

    def test_a_killed_run_that_shares_its_states_leaves_only_checkpoints(self):
        self.mount(3 * TMPFS_BYTES)
        os.mkdir(self.path("small", "disk"))
        self.must_end_well("output_dir=undisturbed", "save_total_limit=0", "expert.checkpoint_states=auto")
        process = self.start("output_dir=small/out", *SHARED)
        self.wait_for(process, "checkpoint-10 in")
        process.kill()
        process.communicate(timeout=120)
        self.wait_for_nothing_hidden()
        self.assertEqual(os.listdir(self.path("small/disk")), [])
        saved = self.check_saved("small/out")
        taken = self.take_all()
        resumed = ["output_dir=small/out", "resume_from_checkpoint=true", *SHARED]
        self.must_be_refused("[Nn]o space|bytes free|free;", *resumed)
        self.assertEqual(self.newest("small/out"), saved)
        os.remove(taken.name)
        taken.close()
        self.must_end_well(*resumed)
        self.assertEqual(self.result("small/out"), self.result("undisturbed"))

    def test_a_run_keeps_room_only_for_what_it_writes(self):
        self.mount()
        plan = self.plan()
        checkpoint, export = plan["checkpoint_bytes"], plan["export_bytes"]
        long = ["output_dir=small/out", "max_steps=1000000", "overwrite_output_dir=true"]
        for strategy, least, most in (("save_strategy=no", 0, checkpoint - 1), ("save_total_limit=1", export + checkpoint, TMPFS_BYTES)):
            process = self.start(*long, strategy)
            self.wait_for(process, "step 15/" if strategy == "save_strategy=no" else "checkpoint-10 in")
            hidden = self.hidden_bytes()
            process.kill()
            process.communicate(timeout=120)
            self.assertGreaterEqual(hidden, least, strategy)
            self.assertLessEqual(hidden, most, strategy)

    def test_what_would_not_fit_is_refused_at_the_start(self):
        self.mount()
        plan = self.plan()
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
        """Without a disk: its extent file was made when there was no limit, and is larger."""
        without = ["disk=[]", "ram=16MiB"]
        self.must_end_well("output_dir=undisturbed", "save_total_limit=0", *without)
        process = self.start("output_dir=out", *without)
        self.wait_for(process, "checkpoint-10 in")
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (30000, resource.RLIM_INFINITY))
        _, errors = process.communicate(timeout=120)
        self.assertEqual(process.returncode, 1, errors)
        lines = [line for line in errors.splitlines() if line.startswith("flap: error: ")]
        self.assertEqual(len(lines), 1, errors)
        self.assertIn("out", lines[0])
        self.assertRegex(lines[0], "ulimit -f")
        self.check_saved("out")
        self.must_end_well("output_dir=out", "resume_from_checkpoint=true", *without)
        self.assertEqual(self.result("out"), self.result("undisturbed"))


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
