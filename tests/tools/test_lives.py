"""The lives of a run, with the real engine: interrupted, killed, resumed, saved, inspected, in a folder that others use.
Usage: test_lives.py <flap>"""
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import time
import unittest

from flap_rig import FLAP, SANITIZED, Rig, TEXT, long_when_sanitized


class Lives(Rig):
    def test_interrupt_saves_and_the_printed_command_continues_bit_for_bit(self):
        common = ["max_steps=60", "save_strategy=steps", "save_steps=1000"]
        self.accept("train", "run.yaml", "output_dir=whole", *common)
        process = subprocess.Popen([FLAP, "train", "run.yaml", *common], cwd=self.folder, stdout=subprocess.PIPE,
                                   stderr=subprocess.PIPE, text=True)
        for line in process.stdout:
            if line.startswith("step 3/"):
                process.send_signal(signal.SIGINT)
                break
        out, error = process.communicate(timeout=60)
        self.assertEqual(process.returncode, 0, (out, error))
        if "stopped after step" not in out:
            self.skipTest("the run ended before the signal came")
        command = [line for line in out.splitlines() if line.startswith("continue with: ")]
        self.assertEqual(len(command), 1, out)
        done = subprocess.run(command[0][len("continue with: "):], shell=True, cwd=self.folder, capture_output=True,
                              timeout=120, text=True)
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertIn("continuing after step", done.stdout)
        self.assertEqual(self.losses("out"), self.losses("whole"))
        self.assertEqual(self.weights("out"), self.weights("whole"))

    # A model for which evaluations take long enough to be met.
    LONG = ["model.hidden_size=128", "model.intermediate_size=512", "dataset=long.txt", "vram=64MiB", "ram=64MiB",
            "disk=null", "save_strategy=steps"]

    def stop_at(self, line_start, *arguments, wait=0):
        """What it printed; stopped so many seconds after a line that begins so."""
        process = subprocess.Popen([FLAP, "train", "run.yaml", *arguments], cwd=self.folder, stdout=subprocess.PIPE,
                                   stderr=subprocess.STDOUT, text=True)
        lines = []
        for line in process.stdout:
            lines.append(line)
            if line.startswith(line_start):
                time.sleep(wait)
                process.send_signal(signal.SIGINT)
                break
        lines.append(process.communicate(timeout=120)[0])
        self.assertEqual(process.returncode, 0, lines)
        return "".join(lines)

    def test_stop_during_the_first_evaluation_gives_it_up(self):
        self.write("long.txt", TEXT * 20)
        out = self.stop_at("data: ", *self.LONG, "val_size=4000", wait=0.3)
        self.assertIn("nothing was saved, for no step was done: the same command starts again", out)
        self.assertNotIn("held-out after", out)
        self.assertFalse(os.path.exists(self.path("out")))

    def test_stop_before_a_step_beyond_a_checkpoint_of_another_folder_leaves_nothing_either(self):
        self.write("long.txt", TEXT * 20)
        self.accept("train", "run.yaml", *self.LONG, "dataset=text.txt", "output_dir=first", "max_steps=1", "save_steps=1")
        again = [*self.LONG, "resume_from_checkpoint=first/checkpoint-1"]
        out = self.stop_at("data: ", *again, "val_size=4000", wait=0.3)
        self.assertIn("nothing was saved, for no step was done: the same command starts again", out)
        self.assertNotIn("saved out", out)
        self.assertFalse(os.path.exists(self.path("out")))
        self.accept("train", "run.yaml", *again, "dataset=text.txt", "max_steps=2")

    @long_when_sanitized
    def test_epochs_end_where_they_do_with_other_numbers_of_micro_batches(self):
        self.write("text.txt", TEXT[:32 * 45])  # 44 sequences, 4 of them held out
        common = ["train", "run.yaml", "max_steps=-1", "num_train_epochs=1", "save_strategy=steps", "save_steps=5"]
        self.accept(*common)
        self.assertEqual(self.metrics()[-1]["step"], 10)
        for micro_batches, end in (1, 15), (2, 10), (4, 8), (8, 7):
            folder = f"with-{micro_batches}"
            done = self.flap(*common, f"output_dir={folder}", "resume_from_checkpoint=out/checkpoint-5",
                             f"gradient_accumulation_steps={micro_batches}")
            self.assertEqual(done.returncode, 0, done.stderr)
            said = f"the 5 steps before out/checkpoint-5 took 20 sequences, and those to come take {2 * micro_batches} each"
            self.assertEqual(said in done.stderr, micro_batches != 2, done.stderr)
            last = [line for line in self.metrics(folder) if "grad_norm" in line][-1]
            self.assertEqual(last["step"], end)
            self.assertGreaterEqual(last["epoch"], 1)
            self.assertLess(last["epoch"] - 2 * micro_batches / 40, 1)
        self.assertEqual(self.weights("with-2"), self.weights())

    def test_stop_where_an_evaluation_is_due_saves_without_it(self):
        self.write("long.txt", TEXT * (1 if SANITIZED else 4))  # so that the signal comes while it evaluates
        common = [*self.LONG, f"val_size={100 if SANITIZED else 400}", "eval_steps=2", "max_steps=4", "resume_from_checkpoint=auto"]
        out = self.stop_at("step 2/", *common)
        self.assertIn("saved out/checkpoint-2 in", out)
        self.assertNotIn("held-out after step 2", out)
        self.assertIn("stopped after step 2, as asked", out)
        self.assertEqual([line["step"] for line in self.metrics() if "eval_loss" in line], [0])
        self.accept("train", "run.yaml", *common)
        self.assertEqual([line["step"] for line in self.metrics() if "eval_loss" in line], [0, 2, 4])

    def evaluated(self, folder="out"):
        return {line["step"]: line["eval_loss"] for line in self.metrics(folder) if "eval_loss" in line}

    @long_when_sanitized
    def test_each_step_is_evaluated_once_whatever_lives_begin_with_it(self):
        common = ["train", "run.yaml", "save_strategy=steps", "save_steps=2", "eval_steps=2", "lr_scheduler_type=constant",
                  "max_steps=4"]
        more = [*common, "resume_from_checkpoint=true"]
        self.accept(*common, "output_dir=whole", "max_steps=6")
        before = "%.4f before, " % self.evaluated("whole")[0]
        self.assertIn(before, self.accept(*common))
        for steps in 4, 6, 6:
            self.assertIn(before + "%.4f after" % self.evaluated("whole")[steps], self.accept(*more, f"max_steps={steps}"))
        lines = [line["step"] for line in self.metrics() if "eval_loss" in line]
        self.assertEqual(lines, [0, 2, 4, 6])
        self.assertEqual(self.evaluated(), self.evaluated("whole"))
        self.assertEqual(self.losses(), self.losses("whole"))
        self.assertEqual(self.weights(), self.weights("whole"))
        # On other data it is evaluated again, and what is on record stays.
        out = self.accept(*more, "max_steps=6", "val_size=6")
        self.assertIn("held-out after step 6", out)
        self.assertNotIn(before, out)
        self.assertEqual(self.evaluated(), self.evaluated("whole"))

    def test_stop_without_saving_says_so_and_leaves_nothing_to_continue_from(self):
        process = subprocess.Popen([FLAP, "train", "run.yaml", "max_steps=100000"], cwd=self.folder,
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for line in process.stdout:
            if line.startswith("step 3/"):
                process.send_signal(signal.SIGTERM)
                break
        out, error = process.communicate(timeout=60)
        self.assertEqual(process.returncode, 0, (out, error))
        self.assertIn("NOTHING WAS SAVED", out)
        self.assertIn("NOTHING IS SAVED", error)
        self.assertEqual(sorted(os.listdir(self.path("out"))), ["metrics.jsonl", "trace.json"])

    def test_stop_before_the_first_step_leaves_nothing_and_the_same_command_starts_again(self):
        self.write("long.txt", TEXT * 8000)  # a second or so
        for save in "no", "steps":
            arguments = ["train", "run.yaml", "dataset=long.txt", f"save_strategy={save}", f"output_dir={save}"]
            process = subprocess.Popen([FLAP, *arguments], cwd=self.folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                       text=True)
            while process.poll() is None and not os.path.exists(self.path(save)):
                pass
            process.send_signal(signal.SIGINT)
            out, error = process.communicate(timeout=60)
            self.assertEqual(process.returncode, 0, (out, error))
            self.assertIn("nothing was saved, for no step was done: the same command starts again", out)
            self.assertFalse(os.path.exists(self.path(save)))
            self.accept(*arguments, "dataset=text.txt", "max_steps=1")

    def test_tokenize_that_is_stopped_leaves_no_half(self):
        self.write("long.txt", TEXT * 8000)
        process = subprocess.Popen([FLAP, "tokenize", "bytes", "long.txt", "-o", "out.bin"], cwd=self.folder)
        while process.poll() is None and not os.path.exists(self.path("out.bin.tmp")):
            pass
        process.send_signal(signal.SIGINT)
        self.assertEqual(process.wait(60), 130)
        self.assertEqual(sorted(os.listdir(self.folder)), ["disk", "long.txt", "run.yaml", "text.txt"])

    # A checkpoint of some 20 MB, so that there is time while it is written.
    LARGER = ["model.hidden_size=128", "model.intermediate_size=512", "model.num_hidden_layers=4", "vram=64MiB",
              "ram=64MiB", "disk=null", "max_steps=100000", "save_strategy=steps", "export=none"]

    def test_second_signal_while_saving_leaves_the_older_checkpoint_and_no_half(self):
        for attempt in range(8):
            folder = f"out{attempt}"
            process = subprocess.Popen([FLAP, "train", "run.yaml", *self.LARGER, "save_steps=2", f"output_dir={folder}"],
                                       cwd=self.folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            for line in process.stdout:
                if line.startswith("saved "):
                    break
            process.send_signal(signal.SIGINT)
            unfinished = []
            while process.poll() is None and not unfinished:
                unfinished = [name for name in os.listdir(self.path(folder)) if name.endswith(".tmp")]
            process.send_signal(signal.SIGSTOP)
            time.sleep(0.2)
            process.send_signal(signal.SIGINT)
            process.send_signal(signal.SIGCONT)
            process.communicate(timeout=60)
            if process.returncode == 130 and unfinished and os.path.exists(self.path(f"{folder}/{unfinished[0]}")):
                break
        else:
            self.skipTest("no save was caught half way")
        whole = [name for name in os.listdir(self.path(folder)) if name.startswith("checkpoint-") and "." not in name]
        newest = max(int(name.split("-")[1]) for name in whole)
        out = self.accept("train", "run.yaml", *self.LARGER, f"output_dir={folder}", "save_strategy=no",
                          f"max_steps={newest + 1}", "resume_from_checkpoint=true")
        self.assertIn(f"continuing after step {newest}\n", out)
        self.assertEqual([name for name in os.listdir(self.path(folder)) if ".tmp" in name], [])

    def list(self, name):
        return os.listdir(self.path(name)) if os.path.isdir(self.path(name)) else []

    def test_signal_while_a_checkpoint_is_written_beside_steps_finishes_it_and_saves_once_more(self):
        common = [*self.LARGER, "save_total_limit=0", "lr_scheduler_type=constant"]
        with open(self.path("printed"), "w") as printed:
            process = subprocess.Popen([FLAP, "train", "run.yaml", *common, "save_steps=3"], cwd=self.folder, stdout=printed,
                                       stderr=subprocess.PIPE, text=True)
        while process.poll() is None and not any(re.fullmatch(r"checkpoint-\d+.tmp", name) for name in self.list("out")):
            pass
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=120)
        self.assertEqual(process.returncode, 0, error)
        with open(self.path("printed")) as printed:
            out = printed.read()
        saved = [int(step) for step in re.findall(r"saved out/checkpoint-(\d+) in", out)]
        last = max(map(int, re.findall(r"(?m)^step (\d+)/", out)))
        self.assertEqual(saved, sorted(set(saved)))
        self.assertEqual((saved[0], saved[-1]), (3, last), out)
        self.assertEqual(sorted(os.listdir(self.path("out"))),
                         sorted([f"checkpoint-{step}" for step in saved] + ["metrics.jsonl", "trace.json"]))
        self.assertNotIn("broken", self.accept("inspect", "out"))
        for step in sorted({3, last}):  # both are resumed, and end alike
            self.accept("train", "run.yaml", *common, f"output_dir=from-{step}", "save_steps=1000000",
                        f"max_steps={last + 2}", f"resume_from_checkpoint=out/checkpoint-{step}")
        for name in os.listdir(self.path(f"from-3/checkpoint-{last + 2}")):
            self.assertEqual(self.lasting(f"from-3/checkpoint-{last + 2}/{name}"),
                             self.lasting(f"from-{last}/checkpoint-{last + 2}/{name}"), name)

    def lasting(self, name):
        """A file of a checkpoint without what depends on how often its run had saved: what was written to drives."""
        with open(self.path(name), "rb") as file:
            text = file.read()
        if name.endswith("/trainer_state.json"):
            return {key: value for key, value in json.loads(text).items() if key != "written_bytes"}
        if name.endswith("/checksums.json"):
            return [entry for entry in json.loads(text)["files"] if entry["name"] != "trainer_state.json"]
        return text

    AUTO = ["run.yaml", "save_strategy=steps", "save_steps=4", "resume_from_checkpoint=auto"]

    def train(self, *arguments, until=None, files=None):
        """Its lines and its status; killed when a line begins with `until`; with so many descriptors."""
        limit = None if files is None else lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))
        process = subprocess.Popen([FLAP, "train", *arguments], cwd=self.folder, stdout=subprocess.PIPE,
                                   stderr=subprocess.STDOUT, text=True, preexec_fn=limit)
        lines = []
        for line in process.stdout:
            lines.append(line)
            if until is not None and line.startswith(until):
                process.kill()
                break
        lines.append(process.communicate(timeout=60)[0])
        return "".join(lines), process.returncode

    def contents(self, folder="out"):
        """Of every file, with the time when it was written."""
        found = {}
        for above, _, names in os.walk(self.path(folder)):
            for name in names:
                with open(os.path.join(above, name), "rb") as file:
                    found[os.path.join(above, name)] = (os.stat(file.fileno()).st_mtime_ns, file.read())
        return found

    def test_one_command_for_every_life_ends_with_the_bits_of_a_run_that_nothing_disturbed(self):
        steps = "max_steps=60"  # so that none ends before it is killed
        done = self.flap("train", *self.AUTO, "output_dir=whole", steps)
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertIn(f"auto: there is no {os.path.realpath(self.folder)}/whole yet, so the run begins", done.stderr)
        self.assertNotEqual(self.train(*self.AUTO, steps, files=6)[1], 0)
        self.assertEqual(self.train(*self.AUTO, "save_steps=50", steps, until="step 2/")[1], -9)
        self.assertFalse(self.checkpoints())
        os.mkdir(self.path("out/checkpoint-4.tmp"))  # as if it had been saving
        self.write("out/notes.txt", "mine")
        out, status = self.train(*self.AUTO, steps, until="saved ")
        self.assertEqual(status, -9)
        self.assertIn("out holds no checkpoint: training starts anew, and so does metrics.jsonl", out)
        self.assertIn("step 1/60", out)
        last = max(int(name.split("-")[1]) for name in self.checkpoints())
        out = self.accept("train", *self.AUTO, steps)
        self.assertIn(f"continuing after step {last}\n", out)
        self.assertEqual(self.losses(), self.losses("whole"))
        self.assertEqual([line["step"] for line in self.metrics() if "loss" in line], list(range(1, 61)))
        self.assertEqual(self.weights(), self.weights("whole"))
        self.assertEqual(sorted(set(os.listdir(self.path("out"))) ^ set(os.listdir(self.path("whole")))), ["notes.txt"])

    @long_when_sanitized
    def test_run_that_is_complete_is_left_as_it_is(self):
        self.write("short.txt", TEXT[:2000])
        for name, more in {"steps": [], "epochs": ["max_steps=-1", "num_train_epochs=1", "dataset=short.txt"],
                           "model": ["save_strategy=no"], "lines": ["save_strategy=no", "export=none"],
                           "weights": ["save_only_model=true"]}.items():
            with self.subTest(name):
                command = ["train", *self.AUTO, *more, f"output_dir={name}"]
                self.accept(*command)
                before = self.contents(name)
                out = self.accept(*command)
                self.assertRegex(out, rf"^this run is complete: \d+ steps.* in {name}; nothing was done\n$")
                self.assertEqual(self.contents(name), before)

    @long_when_sanitized
    def test_run_that_is_complete_goes_on_to_more_steps_from_its_checkpoint_alone(self):
        self.accept("train", *self.AUTO, "output_dir=whole", "max_steps=10", "lr_scheduler_type=constant")
        self.accept("train", *self.AUTO, "lr_scheduler_type=constant")
        done = self.flap("train", *self.AUTO, "max_steps=10", "lr_scheduler_type=constant")
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertIn("continuing after step 8\n", done.stdout)
        self.assertNotIn("learning rate", done.stderr)
        self.assertEqual(self.weights(), self.weights("whole"))
        self.refuse("is at step 10 already", "train", *self.AUTO)
        self.assertIn("complete: 10 steps", self.accept("train", *self.AUTO, "max_steps=10"))
        # What is exported only now is all that is left to do; and so it is when the model was taken away.
        os.remove(self.path("out/model.safetensors"))
        self.assertIn("continuing after step 10\n", self.accept("train", *self.AUTO, "max_steps=10"))
        self.assertEqual(self.weights(), self.weights("whole"))
        for name in self.checkpoints():
            os.rename(self.path(f"out/{name}"), self.path(f"kept-{name}"))
        for more in ["max_steps=12"], ["max_steps=-1", "num_train_epochs=1"]:
            error = self.refuse("out holds a run that ended after 10 steps, without a checkpoint", "train", *self.AUTO, *more)
            self.assertIn("overwrite_output_dir: true", error)

    def test_a_schedule_that_goes_on_elsewhere_is_told(self):
        self.accept("train", *self.AUTO, "max_steps=4")
        done = self.flap("train", *self.AUTO, "max_steps=8")
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertIn("out/checkpoint-4 had 4 steps, and this one has 8: its next learning rate is 0.005, where that one's "
                      "would have been 0\n", done.stderr)

    @long_when_sanitized
    def test_one_command_touches_no_results_of_others(self):
        os.mkdir(self.path("out"))
        for name, content in {"config.json": "{}", "model.safetensors": "theirs", "checkpoint-5/notes": "theirs"}.items():
            os.makedirs(os.path.dirname(self.path(f"out/{name}")), exist_ok=True)
            self.write(f"out/{name}", content)
            before = self.contents()
            self.refuse("checkpoints in out hold weights only" if "/" in name else "but no checkpoint to go on from",
                        "train", *self.AUTO)
            self.assertEqual(self.contents(), before)

    def test_what_a_life_without_a_step_left_is_no_obstacle_and_steps_are(self):
        plain = self.AUTO[:3]
        out, status = self.train(*plain, files=6)
        self.assertEqual(status, 1, out)
        self.assertEqual(self.tree_of_out(), ["metrics.jsonl"])
        self.accept("train", *plain, "max_steps=2", "save_strategy=no", "export=none")  # the same again, if shorter
        error = self.refuse("out already holds out/metrics.jsonl", "train", *plain)
        self.assertIn("resume_from_checkpoint: auto", error)
        self.assertIn("resume_from_checkpoint: auto", self.refuse("out holds no checkpoint-<step>", "train", *plain,
                                                                  "resume_from_checkpoint=true"))

    def tree_of_out(self):
        return sorted(os.listdir(self.path("out")))

    def start(self, *arguments):
        """A run that goes on until it is stopped, and has done a step."""
        process = subprocess.Popen([FLAP, "train", "run.yaml", "max_steps=100000", *arguments], cwd=self.folder,
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for line in process.stdout:
            if line.startswith("step 1/"):
                break
        return process

    def test_second_run_in_the_same_folder_is_refused_and_harms_nothing(self):
        process = self.start("save_strategy=steps", "save_steps=100000")
        os.mkdir(self.path("out/checkpoint-7.tmp"))  # as if it were saving
        os.symlink("out", self.path("other"))
        for folder in ("out", "other"):
            for more in ([], ["resume_from_checkpoint=true"], ["overwrite_output_dir=true"],
                         [f"resume_from_checkpoint={folder}/checkpoint-7"]):
                done = self.flap("train", "run.yaml", f"output_dir={folder}", *more)
                self.assertEqual(done.returncode, 1, done.stdout)
                self.assertRegex(done.stderr, f"^flap: error: output_dir: {folder} is in use: process {process.pid} on "
                                              r"\S+ since [-0-9: ]+ UTC writes there")
        done = self.flap("train", "run.yaml", "output_dir=third", "resume_from_checkpoint=out/checkpoint-7")
        self.assertRegex(done.stderr, f"resume_from_checkpoint: out is in use: process {process.pid} ")
        self.assertTrue(os.path.exists(self.path("out/checkpoint-7.tmp")))
        self.assertFalse(os.path.exists(self.path("third")))
        process.send_signal(signal.SIGINT)
        out, error = process.communicate(timeout=60)
        self.assertEqual(process.returncode, 0, error)
        self.assertIn("continue with", out)
        self.assertFalse(os.path.exists(self.path("out/run.lock")))

    def has_step(self):
        """A step is done: before the first one, of which lines may tell too, a run that is stopped leaves nothing."""
        try:
            with open(self.path("out/metrics.jsonl")) as file:
                return "grad_norm" in file.read()
        except FileNotFoundError:
            return False

    def test_nothing_is_printed_into_files_where_the_standard_descriptors_are_closed(self):
        process = subprocess.Popen([FLAP, "train", "run.yaml", "max_steps=100000"], cwd=self.folder,
                                   preexec_fn=lambda: [os.close(descriptor) for descriptor in (0, 1, 2)])
        while process.poll() is None and not self.has_step():
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)  # with a notice on what would be stderr
        self.assertEqual(process.wait(60), 0)
        self.assertTrue(self.metrics())  # each line is JSON

    def test_lock_of_a_run_that_was_killed_is_no_obstacle(self):
        process = self.start("save_strategy=steps", "save_steps=1")
        process.kill()
        process.communicate(timeout=60)
        self.assertTrue(os.path.exists(self.path("out/run.lock")))
        out = self.accept("train", "run.yaml", "overwrite_output_dir=true")
        self.assertIn("8 steps", out)
        self.assertFalse(os.path.exists(self.path("out/run.lock")))

    @long_when_sanitized
    def test_what_is_made_is_its_owners_alone(self):
        old = os.umask(0)
        try:
            environment = {name: value for name, value in os.environ.items() if name != "FLAP_MACHINE"}
            environment["XDG_CACHE_HOME"] = self.path("cache")
            done = subprocess.run([FLAP, "train", "run.yaml", "output_dir=runs/a", "save_strategy=steps", "save_steps=4"],
                                  cwd=self.folder, capture_output=True, timeout=120, text=True, env=environment)
        finally:
            os.umask(old)
        self.assertEqual(done.returncode, 0, done.stderr)
        seen = 0
        for top in ("runs", "cache"):
            self.assertEqual(os.stat(self.path(top)).st_mode & 0o777, 0o700)
            for folder, folders, files in os.walk(self.path(top)):
                for name in folders + files:
                    mode = os.stat(os.path.join(folder, name)).st_mode & 0o777
                    self.assertEqual(mode, 0o700 if name in folders else 0o600, name)
                    seen += 1
        self.assertGreater(seen, 20)

    def test_checkpoints_are_kept_to_the_limit(self):
        self.accept("train", "run.yaml", "save_strategy=steps", "save_steps=2", "save_total_limit=2", "max_steps=7")
        kept = sorted(name for name in os.listdir(self.path("out")) if name.startswith("checkpoint-"))
        self.assertEqual(len(kept), 2, kept)
        self.assertIn("step", self.accept("inspect", "out"))

    def checkpoints(self, folder="out"):
        """Names of the finished ones, in order."""
        return sorted((name for name in os.listdir(self.path(folder)) if re.fullmatch(r"checkpoint-\d+", name)),
                      key=lambda name: int(name.split("-")[1]))

    def flip(self, name, at=None):
        """Turns one bit, in the middle of the file if no place is given; the same again turns it back."""
        with open(self.path(name), "r+b") as file:
            at = os.path.getsize(self.path(name)) // 2 if at is None else at
            file.seek(at)
            byte = file.read(1)[0]
            file.seek(at)
            file.write(bytes([byte ^ 0x04]))

    def test_inspect_tells_whole_checkpoints_from_broken_ones(self):
        self.accept("train", "run.yaml", "save_strategy=steps", "save_steps=2", "export=none")
        shown = self.accept("inspect", "out")
        self.assertEqual(re.findall(r"^out/checkpoint-(\d+): step (\d+), saved 2\d\d\d-\d\d-\d\d \d\d:\d\d:\d\d UTC, "
                                    r"[\d.]+ \wi?B, whole, read in", shown, re.M), [(n, n) for n in "2468"])
        self.assertEqual(shown.count("numerics: cpu "), 1)
        self.assertEqual(self.accept("inspect", "--quick", "out").count("complete, not verified"), 4)
        self.assertIn("out/checkpoint-4: step 4", self.accept("inspect", "out/checkpoint-4"))
        os.mkdir(self.path("out/checkpoint-10.tmp"))
        os.remove(self.path("out/checkpoint-2/checksums.json"))
        self.flip("out/checkpoint-6/optimizer-exp_avg.safetensors")
        done = self.flap("inspect", "out")
        self.assertEqual(done.returncode, 1)
        self.assertIn("1 of 5 checkpoints cannot be resumed", done.stderr)
        for wanted in (r"checkpoint-2: .* no checksums", r"checkpoint-4: .* whole", r"checkpoint-6: .* BROKEN",
                       r"  out/checkpoint-6/optimizer-exp_avg.safetensors: is not what was saved", r"checkpoint-8: .* whole",
                       r"checkpoint-10.tmp: step 10, .* unfinished"):
            self.assertRegex(done.stdout, wanted)
        self.assertNotIn("weights only", done.stdout)  # the broken one has its states, too
        self.assertNotIn("BROKEN", self.accept("inspect", "--quick", "out"))  # of which nothing was read

    @long_when_sanitized
    def test_a_flipped_bit_in_any_file_is_named_and_never_trained_on(self):
        tried = set()  # by another optimizer: there are more files of adamw_8bit, but most are of the same kind
        for optim in ("adamw", "adamw_8bit"):
            common = ["run.yaml", f"output_dir={optim}", f"optim={optim}", "save_strategy=steps", "save_steps=4",
                      "export=none"]
            self.accept("train", *common)
            files = sorted(set(os.listdir(self.path(f"{optim}/checkpoint-8"))) - tried)
            self.assertGreaterEqual(len(files), 4)
            tried.update(files)
            before = self.metrics(optim)
            for name in files:
                path = f"{optim}/checkpoint-8/{name}"
                places = [None, 9, os.path.getsize(self.path(path)) - 1] if name.startswith("optimizer-exp_avg.") else [None]
                for at in places:
                    self.flip(path, at)
                    error = self.refuse(f"{optim}/checkpoint-8/", "train", *common, "max_steps=9",
                                        "resume_from_checkpoint=latest")
                    self.flip(path, at)
                    with self.subTest(file=path, at=at):
                        if name != "checksums.json":  # a sum that was changed accuses its file
                            self.assertIn(path, error)
                        self.assertIn(f"nothing was trained on it: move {optim}/checkpoint-8 away, or delete it, and go "
                                      f"back to the checkpoint before with resume_from_checkpoint={optim}/checkpoint-4", error)
            self.assertEqual(self.metrics(optim), before)
            self.flip(f"{optim}/checkpoint-4/model.safetensors")
            self.assertIn("no earlier checkpoint", self.refuse("checkpoint-4/model.safetensors", "train", *common,
                          "max_steps=9", "output_dir=other", f"resume_from_checkpoint={optim}/checkpoint-4"))
            self.accept("train", *common, "max_steps=9", "resume_from_checkpoint=true")  # all was turned back

    def test_a_flipped_bit_is_not_begun_from_nor_exported_nor_sampled(self):
        self.accept("train", "run.yaml", "save_strategy=steps", "save_steps=8", "export=none", "save_total_limit=1",
                    "expert.checkpoint_states=copied")
        folder = "out/checkpoint-8"
        uses = (["train", "run.yaml", "model=null", f"model_name_or_path={folder}", "output_dir=next", "overwrite_output_dir=true"],
                ["export", folder, "exported"], ["sample", folder, "-n", "4"], ["eval", folder, "dataset=text.txt"])
        self.flip(f"{folder}/model.safetensors")
        for use in uses:
            with self.subTest(use[0]):
                error = self.refuse(f"{folder}/model.safetensors: is not what was saved", *use)
                self.assertIn(f"if it was changed on purpose, remove {folder}/checksums.json", error)
        self.flip(f"{folder}/model.safetensors")
        self.flip(f"{folder}/optimizer-low.safetensors")
        exact = ["export", folder, "exact", "--dtype", "float32"]
        self.refuse(f"{folder}/optimizer-low.safetensors: is not what was saved", *exact)
        self.accept(*uses[1])  # it does without
        os.remove(self.path(f"{folder}/checksums.json"))
        self.accept(*exact)

    @long_when_sanitized
    def test_what_others_left_in_output_dir_is_not_written_over(self):
        self.accept("train", "run.yaml", "output_dir=mine")
        anew = ["train", "run.yaml", "output_dir=mine", "save_strategy=steps", "save_steps=4", "overwrite_output_dir=true"]
        self.accept(*anew)
        os.mkdir(self.path("mine/checkpoint-4/deep"))
        for name, content in (("mine/checkpoint-12/pytorch_model.bin", "somebody's"), ("theirs/model.safetensors", "somebody's"),
                              ("bin/config.json", "{}"), ("bin/pytorch_model.bin", "somebody's")):
            os.makedirs(os.path.dirname(self.path(name)), exist_ok=True)
            self.write(name, content)
        for folder, named in (("mine", "mine/checkpoint-12"), ("theirs", "theirs/model.safetensors"), ("bin", "bin/config.json")):
            error = self.refuse(f"overwrite_output_dir: {named} is not known as FLAP's", *anew, f"output_dir={folder}")
            self.assertIn("move it away, or name another output_dir", error)
        os.rename(self.path("mine/checkpoint-12"), self.path("kept"))
        self.accept(*anew)

    def test_what_cannot_be_removed_stops_nobody_where_later_steps_were_saved(self):
        saving = ["train", "run.yaml", "save_strategy=steps", "save_steps=4", "export=none", "resume_from_checkpoint=auto"]
        self.accept(*saving)
        os.makedirs(self.path("out/checkpoint-4.tmp/a/b"))  # so deep is nothing of FLAP's
        done = self.flap(*saving, "max_steps=9")
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertRegex(done.stderr, "warning: something of an old checkpoint stays: out/checkpoint-4.tmp/a")
        os.rename(self.path("out/checkpoint-4.tmp"), self.path("out/checkpoint-12.tmp"))
        error = self.refuse("out/checkpoint-12.tmp/a", *saving, "max_steps=12")
        self.assertIn("an earlier life left it unfinished; make it writable, or move it away", error)

    def test_a_damaged_line_of_metrics_is_told_before_it_goes(self):
        saving = ["train", "run.yaml", "save_strategy=steps", "save_steps=4", "export=none", "resume_from_checkpoint=auto"]
        self.accept(*saving)
        with open(self.path("out/metrics.jsonl")) as file:
            lines = file.readlines()
        self.write("out/metrics.jsonl", "".join([lines[0], lines[1], "xx\n", *lines[3:], "torn"]))
        done = self.flap(*saving, "max_steps=9")
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertEqual(re.findall(r"metrics.jsonl:(\d+): not a line of JSON", done.stderr), ["3"])

    @long_when_sanitized
    def test_evaluations_of_another_text_are_not_compared(self):
        saving = ["train", "run.yaml", "save_strategy=steps", "save_steps=4", "export=none"]
        def before(*arguments):
            out = self.accept(*saving, *arguments)
            return re.search(r"held-out loss (\S+) before", out).group(1)
        first = before()
        self.write("other.txt", TEXT.upper())
        self.assertEqual(before("max_steps=9", "resume_from_checkpoint=true"), first)
        self.assertNotEqual(before("max_steps=10", "dataset=other.txt", "resume_from_checkpoint=true"), first)
        steps = [line["step"] for line in self.metrics() if "eval_loss" in line]
        self.assertEqual(steps, sorted(set(steps)))  # one line for each

    @long_when_sanitized
    def test_way_back_from_a_damaged_checkpoint_is_the_one_that_its_error_names(self):
        common = ["train", "run.yaml", "save_strategy=steps", "save_steps=4", "export=none"]
        self.accept(*common)
        self.flip("out/checkpoint-8/model.safetensors")
        for how in ("true", "auto"):
            error = self.refuse("out/checkpoint-8/model.safetensors", *common, "max_steps=9", f"resume_from_checkpoint={how}")
            self.assertIn("move out/checkpoint-8 away", error)
        older = re.search(r"resume_from_checkpoint=\S+", error).group(0)
        self.refuse("out holds checkpoint-8", *common, "max_steps=9", older)
        shutil.copytree(self.path("out"), self.path("copy"))
        for folder, how in (("out", older), ("copy", "resume_from_checkpoint=auto")):
            os.rename(self.path(f"{folder}/checkpoint-8"), self.path(f"{folder}/damaged"))
            self.assertIn("continuing after step 4\n", self.accept(*common, "max_steps=9", f"output_dir={folder}", how))
        self.assertEqual(self.lasting("out/checkpoint-8/model.safetensors"), self.lasting("copy/checkpoint-8/model.safetensors"))

    @long_when_sanitized
    def test_going_back_beside_later_checkpoints_is_refused_for_they_would_win(self):
        saving = ["train", "run.yaml", "save_strategy=steps", "save_steps=2", "export=none"]
        back = [*saving, "learning_rate=1e-3"]
        self.accept(*saving)
        os.symlink("checkpoint-2", self.path("out/mine"))
        os.symlink("out/checkpoint-2", self.path("link"))
        for name in ("out/checkpoint-2", "out/checkpoint-2/", self.path("out/checkpoint-2"), "out/mine", "link"):
            error = self.refuse("out holds checkpoint-4, checkpoint-6, checkpoint-8, from which the next life would go on",
                                *back, f"resume_from_checkpoint={name}")
            self.assertIn("move what is later away or delete it, or give another output_dir", error)
            self.assertIn("resume_from_checkpoint: true", error)
        self.accept(*back, "output_dir=other", "resume_from_checkpoint=out/checkpoint-2")
        os.mkdir(self.path("later"))
        for step in (4, 6, 8):
            os.rename(self.path(f"out/checkpoint-{step}"), self.path(f"later/checkpoint-{step}"))
        for how, until in (("out/checkpoint-2", 5), ("auto", 7), ("true", 8)):  # 5 is saved, for it is the last
            self.accept(*back, f"max_steps={until}", "save_total_limit=2", "lr_scheduler_type=constant",
                        f"resume_from_checkpoint={how}")
        self.assertEqual(self.checkpoints(), ["checkpoint-7", "checkpoint-8"])

    @long_when_sanitized
    def test_checkpoint_of_another_folder_needs_a_folder_that_holds_no_other_run(self):
        saving = ["train", "run.yaml", "save_strategy=steps", "save_steps=2", "save_total_limit=1"]
        self.accept(*saving, "output_dir=first", "max_steps=4")
        self.accept(*saving, "output_dir=used", "seed=7", "max_steps=6")
        before = self.contents("used")
        there = [*saving, "output_dir=used", "resume_from_checkpoint=first/checkpoint-4"]
        error = self.refuse("output_dir: used already holds used/checkpoint-6", *there)
        for wanted in ("first/checkpoint-4, which is not in there", "resume_from_checkpoint: true (or auto)",
                       "overwrite_output_dir: true"):
            self.assertIn(wanted, error)
        self.assertEqual(self.contents("used"), before)
        out = self.accept(*there, "overwrite_output_dir=true")
        self.assertIn("continuing after step 4\n", out)
        self.assertEqual(sorted(self.losses("used")), [5, 6, 7, 8])  # nothing of the run that was there
        self.assertEqual(self.checkpoints("used"), ["checkpoint-8"])
        self.accept(*saving, "output_dir=empty", "resume_from_checkpoint=first/checkpoint-4")
        self.assertEqual(self.losses("empty"), self.losses("used"))

    @long_when_sanitized
    def test_what_a_run_reads_is_not_deleted_before_it_is_trained_on(self):
        saving = ["save_strategy=steps", "save_steps=4", "overwrite_output_dir=true"]
        self.accept("train", "run.yaml", *saving)
        self.write("out/checkpoint-4/more.txt", TEXT)
        self.write("out/metrics.jsonl", '{"text": "%s"}\n' % TEXT.replace("\n", " "))
        os.symlink("out/checkpoint-4", self.path("link"))
        before = self.contents()
        for key, path in (("tokenizer", "out"), ("tokenizer", "out/tokenizer.json"), ("tokenizer", "out/checkpoint-8"),
                          ("tokenizer", "link/tokenizer.json"), ("dataset", "out/checkpoint-4/more.txt"),
                          ("dataset", "out/checkpoint-*/*.txt"), ("dataset", "link/more.txt"),
                          ("dataset", "[text.txt, out/metrics.jsonl]"), ("model_name_or_path", "out/checkpoint-4"),
                          ("model_name_or_path", "out")):
            with self.subTest(path):
                more = ["model=null"] if key == "model_name_or_path" else []
                error = self.refuse("overwrite_output_dir: ", "train", "run.yaml", *saving, *more, f"{key}={path}")
                self.assertRegex(error, rf"is in output_dir, and would be deleted: .*\({key}: ")
                self.assertEqual(self.contents(), before)
        # What would stay may be read, and where nothing is cleared anything.
        os.rename(self.path("out/checkpoint-8"), self.path("out/kept"))
        self.write("out/mine.txt", TEXT)
        kept = ["dataset=out/mine.txt", "tokenizer=out/kept/tokenizer.json"]
        self.accept("train", "run.yaml", *saving, *kept)
        self.accept("train", "run.yaml", *saving, *kept, "model=null", "model_name_or_path=out/kept")
        self.accept("train", "run.yaml", *saving, "tokenizer=out", "max_steps=9", "resume_from_checkpoint=true")
        self.assertTrue(os.path.exists(self.path("out/kept/tokenizer.json")))

    @long_when_sanitized
    def test_second_life_of_a_run_from_another_folder_is_told_how_to_go_on(self):
        saving = ["run.yaml", "save_strategy=steps", "save_steps=4"]
        self.accept("train", *saving, "output_dir=first", "max_steps=4")
        again = [*saving, "max_steps=60", "resume_from_checkpoint=first/checkpoint-4"]
        self.accept("train", *again, "output_dir=whole")
        self.assertEqual(self.train(*again, until="step 6/")[1], -9)
        os.remove(self.path("out/run.lock"))
        if not self.checkpoints():
            error = self.refuse("out already holds out/metrics.jsonl", "train", *again)
            self.assertNotIn("auto", error)  # which would start anew
            self.assertIn("overwrite_output_dir: true", error)
        self.assertEqual(self.train(*again, "overwrite_output_dir=true", until="saved ")[1], -9)
        os.remove(self.path("out/run.lock"))
        self.assertIn("set resume_from_checkpoint: true (or auto)", self.refuse("out already holds", "train", *again))
        self.accept("train", *again, "resume_from_checkpoint=auto")
        self.assertEqual(self.losses(), self.losses("whole"))
        self.assertEqual(self.weights(), self.weights("whole"))

    def test_checkpoint_of_an_earlier_version_resumes_with_a_warning(self):
        self.accept("train", "run.yaml", "save_strategy=steps", "save_steps=4", "export=none")
        os.remove(self.path("out/checkpoint-8/checksums.json"))
        done = self.flap("train", "run.yaml", "max_steps=9", "resume_from_checkpoint=true")
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertIn("cannot be told", done.stderr)

    @long_when_sanitized
    def test_resume_with_other_numerics_is_refused_field_by_field(self):
        saving = ["save_strategy=steps", "save_steps=4", "export=none"]
        self.accept("train", "run.yaml", *saving)
        changed = ["per_device_train_batch_size=1", "gradient_dtype=fp32", "max_steps=9", "resume_from_checkpoint=true"]
        error = self.refuse("out/checkpoint-8 was saved by a run that computed differently", "train", "run.yaml", *changed)
        self.assertIn("(micro-batch: 2 x 32 then, 1 x 32 now; gradients: bfloat16 then, float32 now)", error)
        self.assertIn("allow_numerics_change: true", error)
        done = self.flap("train", "run.yaml", *changed, "allow_numerics_change=true")
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertIn("micro-batch: 2 x 32 then, 1 x 32 now", done.stderr)

    def test_resume_with_another_model_of_the_same_shapes_is_refused(self):
        self.accept("train", "run.yaml", "save_strategy=steps", "save_steps=4", "export=none")
        changed = ["max_steps=9", "resume_from_checkpoint=true", "model.rms_norm_eps=0.1",
                   "model.rope_scaling={rope_type: linear, factor: 8}"]
        error = self.refuse("out/checkpoint-8 was saved of another model (", "train", "run.yaml", *changed)
        for wanted in ["rms_norm_eps: 1e-6 then, 0.1 now", 'rope_scaling: null then, {', "allow_numerics_change: true"]:
            self.assertIn(wanted, error)
        done = self.flap("train", "run.yaml", *changed, "allow_numerics_change=true")
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertIn("was saved of another model (rms_norm_eps: ", done.stderr)
        self.accept("train", "run.yaml", "max_steps=10", "resume_from_checkpoint=true", "model.max_position_embeddings=4096",
                    "model.initializer_range=0.5")

    def test_resume_needs_no_more_than_training_did(self):
        # The least that each tier takes, given as sizes: a resume that needed a byte more would be refused or fail.
        saving = ["save_strategy=steps", "save_steps=3", "disk={path: disk, size: min}"]
        plan = json.loads(self.accept("plan", "run.yaml", "--json", "vram=min", "ram=min", *saving))
        least = [*saving, f"vram={plan['vram_bytes']}", f"ram={plan['ram_bytes']}",
                 f"disk={{path: disk, size: {plan['disk_sizes'][0]}}}"]
        self.accept("train", "run.yaml", "output_dir=whole", *least)
        process = subprocess.Popen([FLAP, "train", "run.yaml", *least], cwd=self.folder, stdout=subprocess.PIPE,
                                   stderr=subprocess.PIPE, text=True)
        for line in process.stdout:
            if line.startswith("saved "):
                process.kill()
                break
        process.communicate(timeout=60)
        self.assertEqual(process.returncode, -9)
        out = self.accept("train", "run.yaml", *least, "resume_from_checkpoint=latest")
        self.assertIn("continuing after step 3", out)
        self.assertEqual(self.losses("out"), self.losses("whole"))
        self.assertEqual(self.weights("out"), self.weights("whole"))
        peaks = re.findall(r"^(vram|ram|disk) {2,}.*? (\S+)$", out, re.M)
        self.assertEqual([tier for tier, _ in peaks], ["vram", "ram", "disk"])
        for tier, share in peaks:  # of the budget, as measured
            self.assertLessEqual(float(share.rstrip("%")), 100, (tier, out))

    @long_when_sanitized
    def test_save_minutes_saves_by_the_clock_and_changes_no_number(self):
        common = ["max_steps=9", "save_strategy=steps", "save_steps=1000"]
        self.accept("train", "run.yaml", "output_dir=whole", *common)
        self.accept("train", "run.yaml", *common, "save_minutes=1e-9")  # after every step, and not twice after the last
        self.assertEqual([int(name.split("-")[1]) for name in self.checkpoints()], list(range(1, 10)))
        self.assertEqual(self.losses("out"), self.losses("whole"))
        self.assertEqual(self.weights("out"), self.weights("whole"))
        self.accept("train", "run.yaml", "output_dir=rare", *common, "save_minutes=100")
        self.assertEqual(self.checkpoints("rare"), ["checkpoint-9"])
        self.refuse("save_minutes", "plan", "run.yaml", "save_minutes=5")  # save_strategy is no
        self.refuse("save_minutes", "plan", "run.yaml", "save_minutes=-1", "save_strategy=steps")

    def test_nothing_is_saved_after_a_step_that_is_not_finite(self):
        """Updates in the backward may have begun by then: what stands is the checkpoint of an earlier step."""
        steps = {}
        for update in ("fold", "backward"):
            done = self.flap("train", "run.yaml", "learning_rate=1e6", "weight_decay=1e6", "max_grad_norm=0", "max_steps=200",
                             "save_strategy=steps", "save_steps=1", f"expert.update={update}", f"output_dir={update}")
            self.assertEqual(done.returncode, 1, done.stderr)
            steps[update] = int(re.search(r"step (\d+): ", done.stderr).group(1))
            saved = sorted(each for each in os.listdir(self.path(update)) if each.startswith("checkpoint"))
            self.assertFalse(os.path.exists(self.path(f"{update}/model.safetensors")))
            self.assertEqual(len(saved), steps[update] - 1, (saved, done.stderr))
            shown = self.flap("inspect", update)
            self.assertEqual((shown.returncode, shown.stderr), (0, ""))
            with open(self.path(f"{update}/{saved[-1]}/model.safetensors"), "rb") as file:
                steps[update] = (steps[update], file.read())
        self.assertEqual(steps["fold"], steps["backward"])


if __name__ == "__main__":
    unittest.main()
