"""flap bench, with its real measurements: tables, JSON, the profile that plan reads, the page, and refusals. How fast this
machine is does not matter here. Usage: test_bench.py <flap>"""
import json
import os
import pty
import re
import subprocess
import sys
import tempfile
import time
import unittest
import xml.etree.ElementTree

FLAP = os.path.abspath(sys.argv.pop(1))
with open(FLAP, "rb") as program:
    SANITIZED = re.search(rb"__[at]san_init", program.read()) is not None
# `all` leads through their code, and has figures enough for a sanitizer.
part_of_all = unittest.skipIf(SANITIZED, "takes long under a sanitizer, and is a part of what `all` does")
RUN = """model:
  model_type: llama
  hidden_size: 64
  intermediate_size: 128
  num_hidden_layers: 6
  num_attention_heads: 2
  max_position_embeddings: 64
tokenizer: bytes
dataset: none.txt
cutoff_len: 64
output_dir: out
vram: 2MiB
ram: 2MiB
disk: {path: disk, size: 64MiB}
device: cpu
expert: {threads: 1}
"""
NUMBER = r"[0-9]+(?:\.[0-9]+)?(?: ±[ 0-9]+%)?"


class Bench(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory(prefix="flap-test-")
        self.addCleanup(folder.cleanup)
        self.folder = folder.name
        for name in ["disk", "a&b <c>"]:
            os.mkdir(self.path(name))
        with open(self.path("run.yaml"), "w") as file:
            file.write(RUN)

    def path(self, name):
        return os.path.join(self.folder, name)

    def flap(self, *arguments, timeout=300):
        environment = {**os.environ, "XDG_CACHE_HOME": self.path("cache")}
        return subprocess.run([FLAP, *arguments], cwd=self.folder, capture_output=True, timeout=timeout, text=True,
                              env=environment)

    def accept(self, *arguments):
        done = self.flap(*arguments)
        self.assertEqual((done.returncode, done.stderr), (0, ""), done)
        return done.stdout

    def refuse(self, message, *arguments):
        begun = time.monotonic()
        done = self.flap(*arguments)
        self.assertEqual((done.returncode, done.stderr.count("\n")), (1, 1), done)
        self.assertTrue(done.stderr.startswith("flap: error: "), done.stderr)
        self.assertIn(message, done.stderr)
        self.assertLess(time.monotonic() - begun, 20)
        return done

    def sections(self, *arguments):
        """What the command measured, by key; every figure is looked at."""
        return self.check_sections(json.loads(self.accept("bench", *arguments, "--json")))

    def check_sections(self, result):
        self.assertEqual(result["format"], "flap limits 1")
        found = {}
        for section in result["sections"]:
            self.assertNotIn(section["key"], found)
            found[section["key"]] = section
            for row in section["rows"]:
                self.assertEqual(len(row["values"]), len(section["series"]), row)
                for value in row["values"]:
                    self.assertLessEqual(0, value["least"], row)
                    self.assertLessEqual(value["least"], value["median"])
                    self.assertLessEqual(value["median"], value["most"])
                    self.assertGreaterEqual(value["rounds"], 1)
                    if section["group"] != "plan":
                        self.assertGreater(value["median"], 1e4, row)
                        self.assertLess(value["median"], 1e17, row)
        return found

    def check_table(self, text, title, unit, columns, rows):
        """A title with its unit, a head, and a line for each row with a figure per column."""
        self.assertNotIn("\033", text)
        lines = text.splitlines()
        at = [n for n, line in enumerate(lines) if line == f"{title}, {unit}"]
        self.assertEqual(len(at), 1, text)
        while not lines[at[0]].startswith(columns[0]):
            at[0] += 1
        head = lines[at[0]]
        for column in columns:
            self.assertIn(column, head)
        for row, line in zip(rows, lines[at[0] + 1:]):
            self.assertRegex(line, "^" + re.escape(row) + rf"(?: +{NUMBER}){{{len(columns) - 1}}}$")
        self.assertTrue(all(len(line) <= 108 for line in lines), text)

    # ---- the parts ----

    @part_of_all
    def test_host_by_threads(self):
        text = self.accept("bench", "host", "--quick", "--threads", "2")
        self.check_table(text, "Memory of the host, by threads", "GB/s",
                         ["threads", "read", "write", "read-modify-write", "copy", "AdamW fp32", "AdamW 8-bit"],
                         ["1", "2"])
        host = self.sections("host", "--quick", "--threads", "3")["host_threads"]
        self.assertEqual([row["x"] for row in host["rows"]], [1, 2, 3])
        self.assertEqual(host["unit"], "bytes per second")

    @part_of_all
    def test_disk_by_size_and_depth(self):
        text = self.accept("bench", "disk", "--quick", "disk")
        place = os.path.realpath(self.path("disk"))
        columns = ["read", "write", "half each"]
        self.check_table(text, f"Disk {place}, by size of request", "GB/s", ["request", *columns],
                         ["16 KiB", "256 KiB", "4 MiB"])
        self.check_table(text, f"Disk {place}, by requests in flight", "GB/s", ["in flight", *columns],
                         ["1", "4", "16", "64"])
        self.assertEqual(os.listdir(self.path("disk")), [])

    def test_several_disks_each_and_together(self):
        found = self.sections("disk", "--quick", "--path", "disk", "a&b <c>", "--backend", "threads")
        self.assertEqual(set(found), {f"disk_{what}_{place}" for what in ["request_bytes", "depth"]
                                      for place in ["1", "2", "together"]})
        self.assertIn("a&b <c>", found["disk_depth_2"]["title"])
        self.assertTrue(found["disk_depth_together"]["title"].startswith("Disks, 2 together"))
        self.assertIn("threads", found["disk_request_bytes_1"]["note"])
        self.assertEqual([row["x"] for row in found["disk_request_bytes_together"]["rows"]], [16384, 1 << 18, 1 << 22])

    @part_of_all
    def test_one_measurement_of_a_disk_as_before(self):
        once = json.loads(self.accept("bench", "disk", "--path", "disk", "--bytes", "8MiB", "--json"))
        self.assertEqual((once["bytes"], once["request_bytes"]), (8 << 20, 4 << 20))
        self.assertGreater(once["both_bytes_per_second"], 0)
        self.refuse("takes one folder", "bench", "disk", "disk", "a&b <c>", "--depth", "4")
        self.refuse("--request must be", "bench", "disk", "--request", "0")

    @part_of_all
    def test_kernels_on_the_cpu(self):
        text = self.accept("bench", "gpu", "--quick", "device=cpu", "--threads", "1")
        self.check_table(text, "Matrix products, squares", "GFLOP/s", ["size", "bf16", "fp16", "fp32"], ["256", "512"])
        self.check_table(text, "Causal attention in bf16, by tokens", "GFLOP/s",
                         ["tokens", "forward 64", "backward 64", "forward 128", "backward 128"], ["128", "256"])
        found = self.sections("gpu", "--quick", "--device", "cpu")
        self.assertEqual(list(found), ["gemm_squares", "gemm_layer_bf16", "gemm_layer_fp16", "gemm_layer_fp32",
                                       "attention", "gpu_memory"])
        self.assertEqual([row["label"] for row in found["gpu_memory"]["rows"]],
                         ["copy", "AdamW, fp32 moments", "AdamW, 8-bit moments"])

    def test_kernels_keep_to_vram(self):
        self.refuse("gpu: vram: the kernels' workspace and operands take", "bench", "gpu", "--quick", "device=cpu", "vram=1MiB")
        result = json.loads(self.accept("bench", "gpu", "--quick", "--json", "device=cpu", "vram=32MiB"))
        memory = next(section for section in result["sections"] if section["key"] == "gpu_memory")
        self.assertEqual([row["values"] for row in memory["rows"]], [[None]] * 3)  # 64 MiB and more do not fit
        squares = next(section for section in result["sections"] if section["key"] == "gemm_squares")
        self.assertIsNotNone(squares["rows"][1]["values"][2])

    # ---- a GPU, or none ----

    def test_bus_needs_a_gpu(self):
        self.refuse("pcie: the cpu device has no bus", "bench", "pcie", "device=cpu")
        done = self.flap("bench", "pcie", "--quick", "--json")
        if done.returncode == 0:
            found = self.check_sections(json.loads(done.stdout))
            self.assertEqual(set(found), {"copy_bytes", "pinning"})
            self.assertEqual(len(found["copy_bytes"]["series"]), 6)
        else:
            self.assertRegex(done.stderr, "(?i)^flap: error: pcie: .*cuda.*; flap bench host measures")
            self.refuse("device=cpu measures the same kernels", "bench", "gpu", "--quick")
            self.refuse("cuda", "bench", "all", "--quick", "device=cuda", "disk")
            self.assertFalse(os.path.exists(self.path("profile.json")))

    # ---- all ----

    def read_page(self, name):
        """The page as a tree: it is well-formed XML too, and asks for nothing from elsewhere."""
        with open(self.path(name), encoding="utf-8") as file:
            text = file.read()
        self.assertTrue(text.startswith("<!DOCTYPE html>"))
        for outside in ["http:", "https:", "url(", "@import", "src=", "href=", "<script", "<link", "<iframe", "nan", "inf"]:
            self.assertNotIn(outside, re.sub("infinity|information", "", text))
        self.assertIn("prefers-color-scheme:dark", text)
        self.assertIn('name="viewport"', text)
        return xml.etree.ElementTree.fromstring(text)

    def test_all_writes_profile_page_and_json(self):
        out = self.accept("bench", "all", "--quick", "device=cpu", "disk", "a&b <c>", "--threads", "1", "--json",
                          "--html", "page.html", "--plan", "run.yaml")
        result = json.loads(out)
        found = self.check_sections(result)
        self.assertEqual(result["notes"], [])
        self.assertEqual({section["group"] for section in found.values()}, {"plan", "gpu", "host", "disk"})
        lanes = found["plan_lanes"]["rows"]
        self.assertEqual([row["label"].split(":")[0] for row in lanes],
                         ["compute", "h2d", "d2h", "disk_read", "disk_write", "host"])

        with open(self.path("profile.json")) as file:
            profile = json.load(file)
        self.assertEqual(profile, result["profile"])
        self.assertEqual(len(profile["disks"]), 2)
        plan = json.loads(self.accept("plan", "run.yaml", "--json", "machine=profile.json", "disk={path: x, size: 64MiB}"))
        self.assertAlmostEqual(plan["machine"]["flops_f32"], profile["flops_f32"], delta=1)
        self.assertAlmostEqual(plan["machine"]["disk_read_bytes"], profile["disks"][0]["read_bytes"], delta=1)
        # What was shown is this machine's plan, with operations as they were timed here, which a profile does not hold.
        plan = json.loads(self.accept("plan", "run.yaml", "--json"))
        self.assertGreater(lanes[3]["values"][0]["median"], 0)  # the budgets of the run are so small that disks are used
        self.assertAlmostEqual(float(lanes[3]["label"].split()[1]), plan["lane_bytes"]["disk_read"] / 2**20, places=1)
        # Striped by what each does both ways, they read no faster than both, nor slower than the slower of them.
        rates = [plan["lane_bytes"]["disk_read"] / lanes[3]["values"][1]["median"], *[disk["read_bytes"] for disk in profile["disks"]]]
        self.assertTrue(min(rates[1:]) * 0.999 <= rates[0] <= sum(rates[1:]) * 1.001, rates)

        page = self.read_page("page.html")
        svgs = list(page.iter("svg"))
        self.assertEqual(len(svgs), len(found) + 1)  # and the roofline
        text = "".join(page.itertext())
        self.assertIn("a&b <c>, by size of request", text)
        self.assertIn("disk_read in the plan", text)
        points = sum(len(list(svg.iter("circle"))) for svg in svgs)
        self.assertGreater(points, 50)
        self.assertEqual(sorted(os.listdir(self.folder)),
                         ["a&b <c>", "cache", "disk", "page.html", "profile.json", "run.yaml"])

    @part_of_all
    def test_all_prints_tables_and_what_it_wrote(self):
        text = self.accept("bench", "all", "--quick", "device=cpu", "disk", "--profile", "mine.json")
        for wanted in ["matmul, float32", "Matrix products, squares, ", "Memory of the host, by threads, GB/s",
                       "by requests in flight, GB/s", "mine.json  to plan with: flap plan run.yaml machine=./mine.json"]:
            self.assertIn(wanted, text)
        self.accept("plan", "run.yaml", "machine=./mine.json")

    def test_files_that_are_there_are_kept_unless_forced(self):
        for name in ["profile.json", "page.html"]:
            with open(self.path(name), "w") as file:
                file.write("mine")
        arguments = ["bench", "all", "--quick", "device=cpu", "disk", "--html", "page.html"]
        self.refuse("--profile: profile.json is there already: remove it", *arguments)
        self.refuse("--html: page.html is there already", *arguments, "--profile", "other.json")
        self.refuse("is where the profile goes", *arguments, "--profile", "page.html", "--force")
        for same in ["./page.html", "disk/../page.html", self.path("page.html")]:
            self.refuse("is where the profile goes", *arguments, "--profile", same, "--force")
        self.refuse("--html", *arguments[:-1], "nowhere/page.html", "--profile", "other.json")
        for name in ["profile.json", "page.html"]:
            with open(self.path(name)) as file:
                self.assertEqual(file.read(), "mine")
        self.assertFalse(os.path.exists(self.path("other.json")))
        if not SANITIZED:  # which takes long there
            self.accept(*arguments, "--force")
            self.read_page("page.html")
            self.accept("plan", "run.yaml", "machine=./profile.json")

    # ---- what is refused ----

    def test_folders_that_are_no_disks(self):
        for what in ["disk", "all"]:
            self.refuse("disk nowhere: no such folder", "bench", what, "--quick", "nowhere", "device=cpu")
            self.refuse("disk run.yaml: not a folder", "bench", what, "--quick", "run.yaml", "device=cpu")
        if subprocess.run(["stat", "-f", "-c", "%T", "/dev/shm"], capture_output=True, text=True).stdout == "tmpfs\n":
            for what in ["disk", "all"]:
                self.refuse("/dev/shm: the folder is in memory (tmpfs)", "bench", what, "--quick", "disk", "/dev/shm",
                            "device=cpu")
        self.assertFalse(os.path.exists(self.path("profile.json")))

    def test_plans_that_cannot_be_read(self):
        arguments = ["bench", "all", "--quick", "device=cpu", "disk", "--plan"]
        self.refuse("none.yaml", *arguments, "none.yaml")
        with open(self.path("bad.yaml"), "w") as file:
            file.write(RUN + "learning_rat: 1\n")
        self.refuse("bad.yaml:17: learning_rat: unknown key; did you mean learning_rate?", *arguments, "bad.yaml")
        self.assertFalse(os.path.exists(self.path("profile.json")))

    def test_words_and_options(self):
        self.refuse("measure what?", "bench")
        self.refuse("measure what?", "bench", "cpu")
        self.refuse("bench host takes device= and vram= alone", "bench", "host", "disk")
        self.refuse("--device: tpu is none of", "bench", "gpu", "device=tpu")
        self.refuse("vram: ", "bench", "gpu", "device=cpu", "vram=much")
        self.refuse("are for bench all", "bench", "host", "--html", "page.html")
        self.refuse("are for bench disk", "bench", "all", "--depth", "4")
        self.refuse("more than", "bench", "disk", *["disk"] * 17)

    @part_of_all
    def test_a_terminal_gets_titles_in_bold(self):
        ours, theirs = pty.openpty()
        environment = {**os.environ, "TERM": "xterm"}
        environment.pop("NO_COLOR", None)
        with subprocess.Popen([FLAP, "bench", "host", "--quick", "--threads", "1"], cwd=self.folder, stdout=theirs,
                              env=environment) as running:
            os.close(theirs)
            text = b""
            try:
                while piece := os.read(ours, 65536):
                    text += piece
            except OSError:  # the other end is closed
                pass
            self.assertEqual(running.wait(60), 0)
        os.close(ours)
        self.assertIn(b"\033[1mMemory of the host, by threads\033[0m", text)


if __name__ == "__main__":
    unittest.main()
