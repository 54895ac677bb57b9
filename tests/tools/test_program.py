"""The command line of flap, on a program whose engine is made up (fake_engine.c). Usage: test_program.py <program>"""
import json
import os
import pty
import resource
import signal
import struct
import subprocess
import sys
import tempfile
import time
import unittest

PROGRAM = os.path.abspath(sys.argv.pop(1))
RUN = ("model: {model_type: llama}\ntokenizer: bytes\ndataset: none.txt\noutput_dir: out\nmax_steps: 20\n"
       "gradient_accumulation_steps: 8\ndisk: {path: /mnt/a b, size: 100MB}\n")


class Program(unittest.TestCase):
    def setUp(self):
        self.folder = tempfile.TemporaryDirectory()
        self.addCleanup(self.folder.cleanup)
        self.write("run.yaml", RUN)

    def write(self, name, text, mode="w"):
        path = os.path.join(self.folder.name, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, mode) as file:
            file.write(text)

    def flap(self, *arguments, fake="", **more):
        return subprocess.run([PROGRAM, *arguments], cwd=self.folder.name, capture_output=True, timeout=60, text=True,
                              env={**os.environ, "FLAP_FAKE": fake}, **more)

    def refuse(self, message, *arguments, fake=""):
        done = self.flap(*arguments, fake=fake)
        self.assertEqual(done.returncode, 1, done)
        self.assertTrue(done.stderr.startswith("flap: error: "), done.stderr)
        self.assertEqual(done.stderr.count("\n"), 1, done.stderr)
        self.assertIn(message, done.stderr)
        return done

    def accept(self, *arguments, fake=""):
        done = self.flap(*arguments, fake=fake)
        self.assertEqual((done.returncode, done.stderr), (0, ""), done)
        return done.stdout

    # ---- finding the way ----

    def test_a_log_level_that_is_none_is_said_once(self):
        for level, said in [("debgu", "flap: warning: FLAP_LOG is none of debug, info, warning and error: taken as info\n"),
                            ("debug", ""), ("error", ""), ("", "")]:
            done = subprocess.run([PROGRAM, "plan", "run.yaml"], cwd=self.folder.name, capture_output=True, timeout=60,
                                  text=True, env={**os.environ, "FLAP_LOG": level})
            self.assertEqual((done.returncode, done.stderr), (0, said), level)

    def test_help_lists_subcommands_and_each_has_its_own(self):
        text = self.accept("--help")
        for name in ["train", "plan", "sample", "eval", "export", "inspect", "tokenize", "bench"]:
            self.assertIn(f"\n  {name} ", text)
            own = self.accept(name, "--help")
            self.assertTrue(own.startswith(f"usage: flap {name} "), own)
            self.assertIn("--help", own)

    def test_help_of_a_subcommand_is_its_own(self):
        self.assertEqual(self.accept("help", "train"), self.accept("train", "--help"))
        self.assertEqual(self.accept("help"), self.accept("--help"))
        self.refuse("unknown subcommand trian; did you mean flap train?", "help", "trian")

    def test_what_is_written_in_another_way_names_the_next_step(self):
        for written in (["--max_steps", "3"], ["--max-steps=3"]):
            self.refuse("keys are written max_steps=3; see flap train --help", "train", "run.yaml", *written)
        self.refuse("unknown option --vram: keys are written vram=...", "plan", "run.yaml", "--vram")
        self.refuse("unknown option --vram: keys are written vram=...", "plan", "run.yaml", "--vram", "--json")
        self.refuse("max_steps=3: there is no such file: the configuration comes first", "train", "max_steps=3", "run.yaml")
        for text in "data.txt", "a/b.jsonl":
            self.refuse(f"command line: {text}: not an override: write dataset={text}", "eval", "run.yaml", text)
        self.refuse("run.yaml is a file: name a folder: a checkpoint", "export", "run.yaml", "out")

    def test_a_sample_cannot_command_a_terminal(self):
        prompt = "a\x1b[31m\tb\nc\x7f\u009b2Jd\u00e9"
        self.assertIn(prompt, self.accept("sample", "run.yaml", "--prompt", prompt))
        leader, follower = pty.openpty()
        done = subprocess.run([PROGRAM, "sample", "run.yaml", "--prompt", prompt], cwd=self.folder.name, stdout=follower,
                              timeout=60)
        os.close(follower)
        self.assertEqual(done.returncode, 0)
        text = os.read(leader, 65536)
        os.close(leader)
        self.assertIn(b"a?[31m\tb\r\nc?\xc2?2Jd\xc3\xa9", text)

    def test_version(self):
        self.assertRegex(self.accept("--version"), r"^flap \d+\.\d+\.\d+\n$")

    def test_unknown_subcommand_names_the_nearest(self):
        self.refuse("unknown subcommand trian; did you mean flap train?", "trian")
        self.refuse("unknown subcommand zzzzzz; flap --help lists them", "zzzzzz")
        self.refuse("no subcommand")

    def test_unknown_option_names_the_nearest(self):
        self.refuse("unknown option --jsn (did you mean --json?); see flap plan --help", "plan", "run.yaml", "--jsn")
        self.refuse("--prompt needs a value", "sample", "out", "--prompt")
        self.refuse("--json takes no value", "plan", "--json=1")
        self.refuse("--top-k: many is not a whole number", "sample", "out", "--top-k", "many")
        self.refuse("--top-k: 4294967296 is not", "sample", "out", "--top-k=4294967296")
        self.refuse("--temperature: nan is not a number", "sample", "out", "--temperature", "nan")
        self.refuse("--top-p must be above 0", "sample", "out", "--top-p", "0")
        self.refuse("--request", "bench", "disk", "--request", "5000")
        self.refuse("which configuration", "train")

    def test_output_that_cannot_be_written_is_an_error(self):
        with open("/dev/full", "w") as full:
            done = subprocess.run([PROGRAM, "train", "--help-config"], stdout=full, stderr=subprocess.PIPE, text=True)
        self.assertEqual(done.returncode, 1)
        self.assertIn("standard output cannot be written", done.stderr)

    def test_limit_on_file_sizes_is_an_error_and_leaves_nothing(self):
        self.write("a.txt", "hello\n" * 20000)
        done = self.flap("tokenize", "bytes", "a.txt", "-o", "out.bin",
                         preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (16384, 16384)))
        self.assertEqual(done.returncode, 1, done)
        self.assertRegex(done.stderr, r"^flap: error: .*out\.bin.*ulimit -f.*\n$")
        self.assertEqual(sorted(os.listdir(self.folder.name)), ["a.txt", "run.yaml"])

    # ---- configuration ----

    def test_configuration_errors_are_one_line(self):
        self.refuse("missing.yaml: cannot open", "train", "missing.yaml")
        self.refuse("command line: vrma: unknown key; did you mean vram?", "plan", "run.yaml", "vrma=1")
        self.refuse("not an override", "plan", "run.yaml", "extra.yaml")
        self.write("bad.yaml", RUN + "learning_rate: fast\n")
        self.refuse("bad.yaml:8: learning_rate: wanted a number, found fast", "train", "bad.yaml")

    def test_configuration_may_come_from_a_pipe(self):
        done = self.flap("plan", "/dev/stdin", "--json", input=RUN)
        self.assertEqual(json.loads(done.stdout)["micro_batches"], 8)
        os.mkfifo(os.path.join(self.folder.name, "fifo"))
        self.refuse("fifo: model: missing", "plan", "fifo")

    def test_reference_of_keys(self):
        self.assertIn("learning_rate: number (default: 5e-05)", self.accept("train", "--help-config"))

    # ---- plan ----

    def test_plan_table_fits_100_columns_and_names_budgets(self):
        text = self.accept("plan", "run.yaml")
        self.assertLessEqual(max(map(len, text.splitlines())), 100, text)
        for wanted in ["5.00 M parameters", "7.00 MiB", "also works with", "hidden_gradients", "disk_write", "set by compute",
                       "activations of 6 layers offloaded,\n   of which attention, lse; the others are recomputed\n",
                       "/mnt/a b", ": 90% of the bound"]:
            self.assertIn(wanted, text)

    def test_plan_json_has_every_figure(self):
        plan = json.loads(self.accept("plan", "run.yaml", "--json", "cutoff_len=128", "per_device_train_batch_size=2"))
        with open(os.path.join(os.path.dirname(os.path.abspath(__file__)), "../../engine/engine.h")) as file:
            header = file.read()
        struct_text = header[header.index("typedef struct flap_plan {"):header.index("} flap_plan;")]
        fields = [word.split("[")[0] for line in struct_text.splitlines()[1:]
                  for word in line.split("/*")[0].split(";")[0].replace(",", " ").split()[1:] if "*" not in line.split(";")[0]]
        self.assertGreater(len(fields), 40)
        self.assertEqual(sorted(plan), sorted(fields + ["moments"]))  # which follows from optim
        self.assertEqual(plan["tokens_per_step"], 2048)
        self.assertEqual(plan["lane_bytes"], {"h2d": 70000000, "d2h": 70000001, "disk_read": 70000002,
                                              "disk_write": 70000003, "host": 70000004})
        self.assertEqual(plan["classes"]["states"]["bytes"], 1000002)
        self.assertEqual(plan["disk_sizes"], [100000000])
        self.assertEqual((plan["saved_layers"], plan["saved_tensors"], plan["saved_whole"]), (6, "attention, lse", False))
        self.assertEqual((plan["dtype"], plan["device"], plan["sweep"]), ("bfloat16", "cpu", False))
        self.assertEqual(plan["machine"]["flops_bf16"], 50e9)

    def test_plan_shows_wear_and_knee(self):
        text = self.accept("plan", "run.yaml")
        self.assertIn("ssd       66.8 MiB written a step, 34 TB per billion tokens\n", text)
        self.assertNotIn("knee", text)
        text = self.accept("plan", "run.yaml", "ssd_tbw=7TB", "--knee")
        self.assertIn("per billion tokens; 7 TB last 99,999 steps\n", text)
        self.assertIn("knee      compute hides the rest from about 49,152 tokens a step (24 micro-batches), "
                      "5.00k tokens/s\n", text)
        self.assertLessEqual(max(map(len, text.splitlines())), 100)
        self.assertRegex(text, r"\nh2d +66\.8 MiB +14\.00 +20\.0 ms +57\.2 MiB +12\.00 +10\.0 ms\n")
        self.assertRegex(text, r"\ncompute +500 ms +450 ms\n")
        plan = json.loads(self.accept("plan", "run.yaml", "--knee", "--json"))
        self.assertEqual(plan["knee"]["micro_batches"], 24)
        self.assertEqual(plan["lane_seconds"]["disk_read"], 0.06)
        text = self.accept("plan", "run.yaml", "--knee", fake="noknee")
        self.assertIn("knee      compute does not hide the rest, up to 65,536 tokens a step (32 micro-batches)", text)

    def test_plan_that_does_not_fit_is_refused(self):
        self.refuse("vram: 1048576 bytes are too few", "plan", "run.yaml", "vram=1MiB")

    # ---- train ----

    def test_train_prints_plain_lines_and_a_summary(self):
        text = self.accept("train", "run.yaml", "logging_steps=5")
        self.assertEqual(text.count("\nstep "), 4, text)
        self.assertNotIn("\r", text)
        for wanted in ["step 5/20  loss 4.9500  norm 1.25  lr 5e-05  12.3k tok/s  80% of bound  waits disk_read 7%, host 1%  ETA 1m 01s",
                       "vram 7.00 MiB of 7.00 MiB", "io_uring, O_DIRECT", "held-out after step 0: loss 5.5000",
                       "saved out/checkpoint-20", "held-out loss 5.5000 before, 2.2500 after; unigram entropy",
                       "14.00", "12.00", "75% of the bound reached", "Hugging Face's format: out"]:
            self.assertIn(wanted, text)

    def test_train_faster_than_the_bound_says_why(self):
        text = self.accept("train", "run.yaml", fake="fast")
        self.assertIn("150% of the bound reached\nno step can be faster than the bound:", text)
        self.assertIn("`flap bench machine`", text)
        self.assertNotIn("no step can be faster", self.accept("train", "run.yaml"))

    def lines_on_a_terminal(self, columns):
        leader, follower = pty.openpty()
        import fcntl
        import termios
        fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        process = subprocess.Popen([PROGRAM, "train", "run.yaml"], cwd=self.folder.name, stdout=follower,
                                   stderr=subprocess.PIPE)
        os.close(follower)
        text = b""
        try:
            while chunk := os.read(leader, 65536):
                text += chunk
        except OSError:
            pass  # how a terminal says that nobody writes any more
        os.close(leader)
        self.assertEqual(process.wait(timeout=60), 0)
        process.stderr.close()
        self.assertEqual(text.count(b"\rstep "), 20)
        return [line.split(b"\x1b")[0].decode() for line in text.split(b"\r") if line.startswith(b"step ")]

    def test_train_on_a_terminal_rewrites_its_line(self):
        for line in self.lines_on_a_terminal(40):
            self.assertLessEqual(len(line), 39)

    def test_train_on_a_narrow_terminal_leaves_out_what_matters_least(self):
        every = ["loss", "norm", "lr", "tok/s", "of bound", "waits", "ETA"]
        for columns, words in ((150, every), (100, ["loss", "tok/s", "of bound", "waits", "ETA"]),
                               (80, ["loss", "tok/s", "of bound", "ETA"]), (60, ["loss", "tok/s", "ETA"])):
            for line in self.lines_on_a_terminal(columns):
                self.assertLess(len(line), columns)
                for word in words:
                    self.assertIn(f" {word} ", line + " ")
                if columns < 100:
                    self.assertNotIn("waits", line)

    def test_train_error_is_one_line_after_the_progress(self):
        done = self.refuse("step 3: the loss is not finite", "train", "run.yaml", fake="nan")
        self.assertNotIn("Hugging Face", done.stdout)

    def interrupt(self, number, fake, *arguments, times=1, apart=0.3):
        process = subprocess.Popen([PROGRAM, "train", "run.yaml", "max_steps=100000", "logging_steps=1", *arguments],
                                   cwd=self.folder.name, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                                   env={**os.environ, "FLAP_FAKE": fake})
        lines = []
        for line in process.stdout:
            lines.append(line)
            if line.startswith("step 2/"):
                break
        for _ in range(times):
            process.send_signal(number)
            time.sleep(apart)
        out, error = process.communicate(timeout=60)
        return process.returncode, "".join(lines) + out, error

    def test_first_interrupt_finishes_saves_and_says_how_to_resume(self):
        for number in (signal.SIGINT, signal.SIGTERM):
            status, out, error = self.interrupt(number, "slow", "output_dir=a b", "overwrite_output_dir=true")
            self.assertEqual(status, 0)
            self.assertIn("stopping", error)
            self.assertNotIn("flap: error", error)
            self.assertIn("saved a b/checkpoint-", out)
            self.assertIn(f"continue with: {PROGRAM} train run.yaml max_steps=100000 logging_steps=1 'output_dir=a b' "
                          "overwrite_output_dir=false resume_from_checkpoint=true\n", out)

    def test_interrupt_of_a_command_for_every_life_says_that_command(self):
        status, out, _ = self.interrupt(signal.SIGTERM, "slow", "resume_from_checkpoint=auto")
        self.assertEqual(status, 0)
        self.assertIn(f"continue with: {PROGRAM} train run.yaml max_steps=100000 logging_steps=1 "
                      "resume_from_checkpoint=auto\n", out)

    def test_interrupt_without_a_checkpoint_says_so(self):
        status, out, _ = self.interrupt(signal.SIGINT, "slow", "save_only_model=true")
        self.assertEqual(status, 0)
        self.assertIn("holds the weights only", out)
        status, out, error = self.interrupt(signal.SIGINT, "slow", "save_strategy=no")
        self.assertEqual(status, 0)
        self.assertIn("NOTHING WAS SAVED", out)
        self.assertIn("NOTHING IS SAVED", error)  # said at once: there is time to let it run on
        self.assertNotIn("continue with", out)

    def test_second_interrupt_stops_at_once(self):
        status, out, _ = self.interrupt(signal.SIGINT, "stuck", times=2)
        self.assertEqual(status, 130)
        self.assertNotIn("checkpoint", out)

    def test_two_signals_that_come_together_are_one(self):
        # As `timeout` sends them: to the program, then to its group.
        status, out, error = self.interrupt(signal.SIGTERM, "slow", times=2, apart=0.02)
        self.assertEqual(status, 0, error)
        self.assertIn("continue with: ", out)
        self.assertEqual(error.count("stopping"), 1, error)

    def test_a_reader_who_leaves_does_not_stop_training(self):
        for streams in ("out", "both"):  # who reads stderr as well leaves nobody to tell
            process = subprocess.Popen([PROGRAM, "train", "run.yaml", "logging_steps=1", "max_steps=8"],
                                       cwd=self.folder.name,
                                       stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                       env={**os.environ, "FLAP_FAKE": "slow"})
            process.stdout.readline()
            process.stdout.close()
            if streams == "both":
                process.stderr.close()
            self.assertEqual(process.wait(timeout=60), 0)
            if streams == "out":
                self.assertIn(b"standard output could not be written", process.stderr.read())
                process.stderr.close()

    def test_a_full_disk_under_standard_output_does_not_fail_the_run(self):
        with open("/dev/full", "w") as full:
            done = subprocess.run([PROGRAM, "train", "run.yaml"], cwd=self.folder.name, stdout=full,
                                  stderr=subprocess.PIPE, timeout=60, text=True)
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertIn("standard output could not be written", done.stderr)
        with open("/dev/full", "w") as full:  # what only prints has failed
            done = subprocess.run([PROGRAM, "plan", "run.yaml"], cwd=self.folder.name, stdout=full,
                                  stderr=subprocess.PIPE, timeout=60, text=True)
        self.assertEqual(done.returncode, 1)

    def test_a_terminal_that_is_closed_does_not_stop_training(self):
        # The program leads the terminal's session, so closing it sends SIGHUP, and writing is EIO from then on.
        ready, told = os.pipe()
        child, master = pty.fork()
        if child == 0:
            os.chdir(self.folder.name)
            os.environ["FLAP_FAKE"] = "slow"
            os.close(ready)
            os.set_inheritable(told, True)  # closed when the program ends, whoever waits for it
            os.execv(PROGRAM, [PROGRAM, "train", "run.yaml", "logging_steps=1", "max_steps=8"])
        os.close(told)
        seen = b""
        while b"step 2/" not in seen:
            seen += os.read(master, 4096)
        os.close(master)
        self.assertEqual(os.read(ready, 1), b"")
        os.close(ready)
        self.assertEqual(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), 0)
        self.assertNotIn(b"step 8/", seen)

    # ---- the others ----

    def test_sample_and_eval_take_a_folder_or_a_run(self):
        os.mkdir(os.path.join(self.folder.name, "model"))
        self.assertEqual(self.accept("sample", "model", "--prompt", "He", "-n", "5", "--temperature=0"),
                         "[model|He|5|0]\n")
        self.assertEqual(self.accept("sample", "run.yaml", "vram=min"), "[out||128|1]\n")
        self.assertIn("loss 2.2500 nats per token", self.accept("eval", "run.yaml"))
        self.assertEqual(json.loads(self.accept("eval", "run.yaml", "--json"))["loss"], 2.25)
        self.refuse("on which text? add dataset=", "eval", "model")

    def test_export_takes_two_folders_and_a_dtype(self):
        self.refuse("wanted a checkpoint folder and a folder to make", "export", "a")
        self.refuse("--dtype: int8 is none of", "export", "a", "b", "--dtype", "int8")
        self.refuse("b: is there already", "export", "a", "b")

    def test_bench_machine_prints_rates(self):
        self.assertIn("matmul, float32              100.0 GFLOP/s", self.accept("bench", "machine"))
        self.assertEqual(json.loads(self.accept("bench", "machine", "--json"))["shared_cores"], 2)
        self.refuse("this build has no CUDA", "bench", "machine", "--device", "cuda")
        profile = self.accept("bench", "machine", "--json", "--path", ".")
        self.assertEqual(json.loads(profile)["disks"][0]["both_bytes"], 1.5e9)
        with open(os.path.join(self.folder.name, "here.json"), "w") as file:
            file.write(profile)
        self.accept("plan", "run.yaml", "machine=here.json")  # what bench writes, plan reads
        self.refuse("measure what?", "bench", "nothing")

    def test_bench_disk_measures_a_folder(self):
        figures = json.loads(self.accept("bench", "disk", "--bytes", "4MiB", "--request", "64KiB", "--depth", "2",
                                         "--backend", "threads", "--path", ".", "--json"))
        self.assertEqual(figures["bytes"], 4 << 20)
        self.assertGreater(figures["read_bytes_per_second"], 0)
        self.assertEqual(os.listdir(self.folder.name), ["run.yaml"])
        name = b"no \xff text"
        os.mkdir(os.path.join(os.fsencode(self.folder.name), name))
        figures = json.loads(self.accept("bench", "disk", os.fsdecode(name), "--bytes", "4MiB", "--json"))
        self.assertEqual(figures["path"], "no ? text")
        self.refuse("/nonexistent", "bench", "disk", "--path", "/nonexistent")

    def test_tokenize_prints_ids_and_writes_shards(self):
        self.assertEqual(self.accept("tokenize", "bytes", "--text", "Aé"), "65 195 169\n")
        self.write("a.txt", "hello")
        self.write("b.jsonl", '{"text": "you"}\n')
        self.assertIn("10 tokens", self.accept("tokenize", "bytes", "a.txt", "b.jsonl", "-o", "out.bin"))
        with open(os.path.join(self.folder.name, "out.bin"), "rb") as file:
            data = file.read()
        self.assertEqual(struct.unpack("<3i", data[:12]), (20240520, 1, 10))
        self.assertEqual(struct.unpack("<10H", data[1024:]), (104, 101, 108, 108, 111, 256, 121, 111, 117, 256))
        self.refuse("--output: out.bin is there already: remove it, name another, or give --force", "tokenize", "bytes", "b.jsonl",
                    "-o", "out.bin")
        self.assertIn("4 tokens", self.accept("tokenize", "bytes", "b.jsonl", "-o", "out.bin", "--force"))
        self.refuse("either files and -o", "tokenize", "bytes", "a.txt")
        self.refuse("none.json", "tokenize", "none.json", "--text", "a")

    def test_inspect_shows_tensors_and_runs(self):
        header = json.dumps({"a.weight": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]},
                             "b\u0007": {"dtype": "F32", "shape": [1], "data_offsets": [12, 16]}}).encode()
        self.write("m/model.safetensors", struct.pack("<Q", len(header)) + header + bytes(16), "wb")
        self.write("m/config.json", '{"model_type": "llama", "hidden_size": 2}')
        self.write("m/metrics.jsonl", '{"step": 1, "loss": 3.5}\n{"step": 2, "loss": 3.25, "tokens_per_second": 1500}\n{"st')
        self.write("m/checkpoint-10/x", "")
        text = self.accept("inspect", "m")
        for wanted in ["a.weight", "BF16", "(2, 3)", "12 B", "2 tensors, 7 elements, 16 B", '"llama"', "2 lines, loss 3.5000 at first",
                       "3.2500 at step 2, 1.50k tok/s", "m/checkpoint-10: step 10, saved ", "no checksums", "b?"]:
            self.assertIn(wanted, text)
        self.assertNotIn("\u0007", text)
        self.assertIn("2 tensors", self.accept("inspect", "m/model.safetensors"))
        self.refuse("nothing: ", "inspect", "nothing")
        self.refuse("neither a model, a checkpoint", "inspect", "m/checkpoint-10")
        for text, kind in ("[1, 2]", "an array"), ('"text"', "a string"):
            self.write("other.json", text)
            self.refuse(f"other.json: must hold an object, not {kind}", "inspect", "other.json")
        self.write("broken.safetensors", "x")
        self.refuse("broken.safetensors", "inspect", "broken.safetensors")


if __name__ == "__main__":
    unittest.main()
