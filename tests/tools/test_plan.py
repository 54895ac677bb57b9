"""flap plan, with the real engine: what it says beforehand, for machines that are not here too, and budgets that are too small.
Usage: test_plan.py <flap>"""
import json
import os
import pty
import re
import resource
import subprocess
import time
import unittest

from flap_rig import FLAP, SANITIZED, TEXT, Rig, long_when_sanitized


class Plan(Rig):
    def test_plan_needs_no_data_and_agrees_with_training(self):
        os.remove(self.path("text.txt"))
        plan = json.loads(self.accept("plan", "run.yaml", "--json"))
        self.assertEqual(plan["tokens_per_step"], 128)
        self.assertLessEqual(plan["vram_bytes"], 4 << 20)
        self.assertLessEqual(plan["vram_min"], plan["vram_bytes"])
        self.assertLessEqual(max(map(len, self.accept("plan", "run.yaml").splitlines())), 100)
        self.assertEqual(sorted(os.listdir(self.folder)), ["disk", "run.yaml"])

    LARGE = """model: {model_type: llama, vocab_size: 32000, hidden_size: 5120, intermediate_size: 13824, num_hidden_layers: 40,
  num_attention_heads: 40, max_position_embeddings: 4096, tie_word_embeddings: false}
tokenizer: bytes
dataset: text.txt
cutoff_len: 2048
per_device_train_batch_size: 1
gradient_accumulation_steps: 16
activations: recompute
output_dir: out
machine: rtx4090-64g-1nvme
"""

    @long_when_sanitized
    def test_plan_for_a_machine_that_is_not_here(self):
        self.write("large.yaml", self.LARGE)
        start = time.monotonic()
        # One way, and a step of four micro-batches: the others are planned elsewhere.
        plan = json.loads(self.accept("plan", "large.yaml", "expert.update=fold", "gradient_accumulation_steps=4", "--json"))
        self.assertLess(time.monotonic() - start, 60)  # a few seconds on an idle machine; sanitizers take longer
        self.assertEqual(plan["device"], "cuda")
        self.assertEqual(plan["device_name"], "RTX 4090 24 GB, 64 GiB RAM, 1 NVMe")
        self.assertGreater(plan["parameters"], 13e9)
        self.assertEqual(plan["vram_budget"], ((24564 << 20) - (24564 << 20) // 20) // 4096 * 4096)
        self.assertEqual(plan["ram_budget"], (64 << 30) - (64 << 30) // 10 - (470 << 20))
        self.assertEqual(plan["process_bytes"], 470 << 20)  # of that machine's driver, not of this process
        self.assertEqual(plan["disk_budget"], 1900 * 10**9 - 1900 * 10**9 // 20)
        self.assertLessEqual(plan["vram_bytes"], plan["vram_budget"])
        self.assertGreater(plan["vram_scratch_bytes"], 32 << 20)  # the cuda kernels', not the cpu's
        self.assertGreater(plan["disk_bytes"], 0)
        self.assertGreaterEqual(plan["step_seconds"], plan["bound_seconds"])
        self.assertEqual(plan["disk_share"], 0.87)
        self.assertEqual(sorted(os.listdir(self.folder)), ["disk", "large.yaml", "run.yaml", "text.txt"])

    SLOW = """{"name": "slow", "device": "cpu", "ram_bytes": 1073741824, "threads": 1, "flops_bf16": 1e9, "flops_f32": 1e9,
"device_bytes": 1e10, "h2d_bytes": 1e8, "d2h_bytes": 1e8, "host_bytes": 1e10, "synchronous": false, "shared_cores": 0,
"copy_ns": 0, "launch_ns": 0, "disks": [{"size_bytes": 4000000000, "read_bytes": 1e8, "write_bytes": 2e7, "tbw_bytes": "1TB"}]}
"""

    @long_when_sanitized
    def test_plan_saves_some_tensors_where_all_are_too_many(self):
        self.write("large.yaml", self.LARGE)
        plans = {}
        for saved in ("auto", "attention", "all_but_mlp", "all", "everything"):
            plans[saved] = json.loads(self.accept(
                "plan", "large.yaml", "--json", "activations=auto", "model.hidden_size=1536", "model.intermediate_size=8960",
                "model.num_hidden_layers=12", "model.num_attention_heads=12", "model.max_position_embeddings=32768",
                "cutoff_len=32768", "gradient_accumulation_steps=4", "vram=12GiB", "expert.optimizer=gpu",
                f"expert.saved={saved}"))
        seconds = {saved: plan["step_seconds"] for saved, plan in plans.items()}
        self.assertLessEqual(seconds["auto"], min(seconds.values()) * 1.001)
        self.assertLess(seconds["auto"], 0.97 * seconds["all"])
        self.assertGreater(plans["auto"]["saved_layers"], 0)
        self.assertFalse(plans["auto"]["saved_whole"])
        self.assertEqual((plans["attention"]["saved_tensors"], plans["attention"]["saved_whole"]), ("attention, lse", False))
        self.assertTrue(plans["all"]["saved_whole"])

    @long_when_sanitized
    def test_plan_counts_disks_by_what_lies_on_them(self):
        """Two disks, one four times as fast: together, by weight, they are both at work all the time; a fast one that is too
        small leaves more to the slow one, and weights that a person gives are what they are."""
        disk = '{"size_bytes": 4000000000, "read_bytes": %s, "write_bytes": %s, "both_bytes": %s}'
        self.write("two.json", self.SLOW[:self.SLOW.index('"disks"')] + '"disks": [%s, %s]}' % (
            disk % ("4e7", "2e7", "4e7"), disk % ("1e7", "5e6", "1e7")))

        def plan(disks, *more):
            return json.loads(self.accept("plan", "run.yaml", "--json", "machine=two.json", "vram=1MiB", "ram=700KiB",
                                          f"disk={disks}", *more))

        both = plan("[/fast, /slow]")
        self.assertAlmostEqual(both["machine"]["disk_write_bytes"], 2.5e7, delta=6e5)
        self.assertAlmostEqual(both["machine"]["disk_read_bytes"], 5e7, delta=1.2e6)
        small = both["disk_bytes"] // 8
        cramped = plan(f"[{{path: /fast, size: {small}}}, /slow]")
        self.assertAlmostEqual(cramped["machine"]["disk_write_bytes"], 5e6 / (7 / 8), delta=3e5)
        self.assertGreater(cramped["step_seconds"], 1.5 * both["step_seconds"])
        even = plan("[{path: /fast, weight: 1}, {path: /slow, weight: 1}]")
        stripes = even["disk_bytes"] // even["page_bytes"]  # in turn, from the first disk on
        self.assertAlmostEqual(even["machine"]["disk_write_bytes"], 5e6 * stripes / (stripes // 2), delta=2e5)
        self.assertGreater(even["step_seconds"], both["step_seconds"])

    @long_when_sanitized
    def test_plan_counts_on_compression_where_it_pays(self):
        """Disks are what this waits for, so a step is about as much shorter as pages are; not with other codecs and states,
        nor where encoding takes longer than the disk."""
        large = ["model.hidden_size=256", "model.intermediate_size=1024", "model.num_hidden_layers=8", "max_grad_norm=0"]
        machine = self.SLOW.replace('"flops_bf16": 1e9, "flops_f32": 1e9', '"flops_bf16": 1e12, "flops_f32": 1e12')

        def plan(codec_bytes, *more):
            codec = f'"encode_bytes": {codec_bytes}, "decode_bytes": {codec_bytes}, "disks"'
            self.write("coding.json", machine.replace('"disks"', codec))
            return json.loads(self.accept("plan", "run.yaml", "--json", "machine=coding.json", *large, "vram=32MiB", "ram=24MiB",
                                          "disk=/no/such/folder", "expert.page_bytes=64KiB", "expert.pool_bytes=1", *more))

        lz4, auto = plan("1e9", "compression=lz4"), plan("1e9")
        self.assertEqual((lz4["disk_share"], auto["disk_share"]), (1, 0.87))
        self.assertEqual(auto["lane_bytes"], lz4["lane_bytes"])
        self.assertGreater(lz4["lane_seconds"]["disk_write"], 0.99 * lz4["step_seconds"])
        for shorter in (auto, plan("1e9", "compression=zstd")):
            self.assertAlmostEqual(shorter["lane_seconds"]["disk_write"] / lz4["lane_seconds"]["disk_write"], 0.87, delta=0.01)
            self.assertAlmostEqual(shorter["step_seconds"] / lz4["step_seconds"], 0.87, delta=0.02)
        for usual in (plan("1e7"), plan("1e9", "optim=adamw_8bit", "ram=12MiB"), plan("1e9", "compression=off")):
            self.assertGreater(usual["disk_bytes"], 0)
            self.assertEqual(usual["disk_share"], 1)
        self.assertEqual(plan("1e7")["step_seconds"], lz4["step_seconds"])

    @long_when_sanitized
    def test_plan_finds_the_knee(self):
        self.write("slow.json", self.SLOW)
        slow = ["plan", "run.yaml", "--json", "machine=slow.json", "vram=1MiB", "ram=700KiB", "disk=/no/such/folder"]
        terminal, end = pty.openpty()
        shown = subprocess.run([FLAP, *slow, "--knee"], cwd=self.folder, stdout=subprocess.PIPE, stderr=end, timeout=120)
        os.close(end)
        lines = os.read(terminal, 65536).decode().split("\r")
        os.close(terminal)
        plan = json.loads(shown.stdout)
        knee = plan["knee"]
        tried = [int(line.split("a step of ")[1].split()[0]) for line in lines if "looking for the knee" in line]
        self.assertEqual(tried[0], 1)
        self.assertIn(knee["micro_batches"], tried)
        self.assertLessEqual(len(tried), 5)  # by halves it takes seven
        below = max(n for n in tried if n < knee["micro_batches"])
        self.assertLessEqual(knee["micro_batches"] - below, 1 + knee["micro_batches"] // 8)
        less = json.loads(self.accept(*slow, f"gradient_accumulation_steps={below}"))
        self.assertLess(less["compute_seconds"], 0.9 * less["step_seconds"])
        self.assertEqual(self.flap(*slow, "--knee").stderr, "")  # no terminal
        self.assertGreater(knee["micro_batches"], plan["micro_batches"])
        self.assertLess(plan["compute_seconds"], 0.9 * plan["step_seconds"])
        self.assertEqual(plan["ssd_step_bytes"], plan["lane_bytes"]["disk_write"])
        self.assertEqual(plan["ssd_tbw_bytes"], 10**12)
        self.assertAlmostEqual(plan["ssd_steps"] * plan["ssd_step_bytes"] / 10**12, 1)
        self.assertAlmostEqual(plan["lane_seconds"]["disk_write"], plan["ssd_step_bytes"] / 2e7, delta=1e-3)
        there = json.loads(self.accept(*slow, f"gradient_accumulation_steps={knee['micro_batches']}"))
        self.assertEqual(there["step_seconds"], knee["step_seconds"])
        self.assertGreaterEqual(there["compute_seconds"], 0.9 * there["step_seconds"])
        self.assertNotIn("knee", there)
        worn = json.loads(self.accept(*slow, "ssd_tbw=2TB"))
        self.assertAlmostEqual(worn["ssd_steps"], 2 * plan["ssd_steps"])

    @long_when_sanitized
    def test_plan_shows_the_step_that_it_expects(self):
        self.write("slow.json", self.SLOW)
        slow = ["plan", "run.yaml", "--json", "machine=slow.json", "vram=1MiB", "ram=700KiB", "disk=/no/such/folder"]
        plan = json.loads(self.accept(*slow, "--trace", "step.json"))
        self.assertEqual(json.loads(self.accept(*slow))["step_seconds"], plan["step_seconds"])
        with open(self.path("step.json")) as file:
            events = json.load(file)["traceEvents"]
        lanes = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
        steps = [event for event in events if event["ph"] == "X"]
        seconds, moved = {}, {}
        for event in steps:
            lane = lanes[event["tid"]].rstrip(" 0123456789").replace(" ", "_")
            seconds[lane] = seconds.get(lane, 0) + event["dur"] / 1e6
            moved[lane] = moved.get(lane, 0) + event.get("args", {}).get("bytes", 0)
        self.assertAlmostEqual(seconds["compute"], plan["compute_seconds"], delta=0.01 * plan["compute_seconds"])
        for lane in ("h2d", "d2h", "disk_write"):  # from step to step copies may fall into this one or the next
            self.assertAlmostEqual(moved[lane], plan["lane_bytes"][lane], delta=0.1 * plan["lane_bytes"][lane])
        self.assertTrue(any(event["name"].startswith("waits for disk") for event in steps))
        span = max(event["ts"] + event["dur"] for event in steps) - min(event["ts"] for event in steps)
        self.assertAlmostEqual(span / 1e6, plan["step_seconds"], delta=0.1 * plan["step_seconds"])
        self.accept(*slow, "--trace", "step.json")  # a newer one of the same kind
        self.refuse("--trace: slow.json is there already: remove it, name another, or give --force", *slow, "--trace", "slow.json")
        self.write("other.json", "{}")
        self.accept(*slow, "--trace", "other.json", "--force")
        self.assertGreater(os.path.getsize(self.path("other.json")), 1000)
        self.refuse("no/such/folder", *slow, "--trace", "no/such/folder/step.json")
        self.refuse("--trace: text.txt must end in .json", *slow, "--trace", "text.txt")
        self.refuse("--output: text.txt must end in .bin", "tokenize", "bytes", "text.txt", "-o", "text.txt")

    def test_memory_that_a_described_machine_does_not_have_is_warned_of(self):
        """Each budget is less than its memory, both and what the process takes are more."""
        def plan(name, mib, *more):
            self.write("box.json", self.SLOW.replace("1073741824", str(mib << 20)).replace('"slow"', f'"{name}"'))
            done = self.flap("plan", "run.yaml", "machine=box.json", "disk=[]", *more)
            self.assertEqual(done.returncode, 0, done.stderr)
            return done.stderr
        budgets = ["vram=3MiB", "ram=3MiB"]
        self.assertNotIn("warning: ", plan("large", 120, *budgets))
        self.assertRegex(plan("small", 97, *budgets),
                         'flap: warning: vram and ram: this run takes .* of the host\'s memory, but the machine "small" leaves')

    @long_when_sanitized
    def test_drive_is_measured_for_the_folder_that_may_hold_most(self):
        environment = {**os.environ, "XDG_CACHE_HOME": self.path("cache")}
        environment.pop("FLAP_MACHINE", None)
        os.mkdir(self.path("disk2"))
        done = subprocess.run([FLAP, "plan", "run.yaml", "disk=[{path: disk, size: 16MiB}, {path: disk2, size: 2GiB}]"],
                              cwd=self.folder, capture_output=True, timeout=120, text=True, env=environment)
        self.assertEqual(done.returncode, 0, done.stderr)
        with open(self.path("cache/flap/machine.json")) as file:
            disks = json.load(file)["machines"][0]["disks"]
        self.assertEqual([disk["span_bytes"] for disk in disks], [(2 << 30) // 8])  # an eighth, of the drive once

    @long_when_sanitized
    def test_sizes_of_disks_beyond_all_numbers_add_up(self):
        folders = ["disk", "disk2", "disk3", "disk4"]
        for folder in folders[1:]:
            os.mkdir(self.path(folder))
        disks = ", ".join(f"{{path: {folder}, size: {1 << 62}}}" for folder in folders)  # 2^64 in all
        plan = json.loads(self.accept("plan", "run.yaml", "--json", "vram=1MiB", "ram=700KiB", f"disk=[{disks}]"))
        self.assertGreater(plan["disk_bytes"], 0)
        self.assertEqual(plan["disk_budget"], 4 << 53)
        done = self.flap("plan", "run.yaml", "--json", "vram=1MiB", "ram=700KiB", "max_steps=1000000000000000", "ssd_budget=1TB")
        self.assertEqual(json.loads(done.stdout)["ssd_run_bytes"], (1 << 63) - 1)
        self.assertIn("flap: warning: ssd_budget: this run would write", done.stderr)

    def test_disks_that_are_not_there_are_warned_of(self):
        """What a run would be refused for, or a machine does not have."""
        common = ["plan", "run.yaml", "vram=1MiB", "ram=700KiB"]
        os.mkdir(self.path("disk2"))
        wanted = json.loads(self.accept(*common, "--json"))["disk_bytes"]

        def plan(*more, limit=None):
            done = subprocess.run([FLAP, *common, *more], cwd=self.folder, capture_output=True, timeout=120, text=True,
                                  preexec_fn=limit)
            self.assertEqual(done.returncode, 0, done.stderr)
            return [line for line in done.stderr.splitlines() if line.startswith("flap: warning: disk ")]
        self.assertEqual(plan(), [])

        def limit():
            resource.setrlimit(resource.RLIMIT_FSIZE, (wanted * 3 // 4, wanted * 3 // 4))
        self.assertRegex(plan(limit=limit)[0], "disk disk: a run would take .*, but files may not be larger than .*ulimit -f")
        two = "disk=[{path: disk, size: 16MiB}, {path: disk2, size: 16MiB}]"
        self.assertEqual(plan(two), [])
        self.assertEqual(plan(two, limit=limit), [])  # a file each

        small = self.SLOW.replace("4000000000", str(wanted // 2))
        self.write("small.json", small)
        self.assertRegex(plan("machine=small.json", "disk=[{path: /x, size: min}]")[0],
                         "disk /x: a run would take .*, but that machine's disk has ")

    def test_bench_writes_what_plan_reads(self):
        self.write("here.json", self.accept("bench", "machine", "--json", "--path", "disk", "--threads", "1"))
        plan = json.loads(self.accept("plan", "run.yaml", "--json", "machine=here.json", "disk=null"))
        self.assertEqual(plan["device"], "cpu")
        self.assertGreater(plan["machine"]["disk_both_bytes"], 0)

    @long_when_sanitized
    def test_machine_refusals(self):
        self.write("large.yaml", self.LARGE)
        self.refuse("large.yaml:10: machine: rtx4090-64g-1nvme is a machine to plan for, and only flap plan does",
                    "train", "large.yaml")
        self.refuse("vram: 40.0 GiB is more than the 24.0 GiB (25757220864 bytes) of the machine", "plan", "large.yaml", "vram=40GiB")
        self.refuse("ram: 65.0 GiB is more than", "plan", "large.yaml", "ram=65GiB")
        self.refuse("disk: 2.00 TiB is more than", "plan", "large.yaml", "disk={path: /mnt/x, size: 2TiB}")
        self.refuse("disk: 2 folders, but the machine", "plan", "large.yaml", "disk=[/mnt/x, /mnt/y]")
        self.refuse("device: cpu contradicts machine", "plan", "large.yaml", "device=cpu")
        self.refuse("give a disk of at least", "plan", "large.yaml", "disk=[]", "gradient_accumulation_steps=1")
        self.refuse("model: head_dim is 100, and the cuda device computes attention for multiples of 8 up to 256", "plan",
                    "large.yaml", "model.head_dim=100")
        listed = self.accept("plan", "--list-machines")
        for wanted in ["h100-80g", "h200-141g", "rtx4060-laptop", "rtx4090-thunderbolt4", "79.6 GiB"]:
            self.assertIn(wanted, listed)

    def test_model_that_is_more_than_can_be_planned_with_is_named(self):
        """The pager numbers 8 TiB; no budget helps."""
        self.write("large.yaml", self.LARGE)
        wide = ["model.hidden_size=16384", "model.intermediate_size=65536", "model.num_attention_heads=128"]
        told = self.refuse("more than the 8 TiB that can be planned with: make it smaller, or set optim: adamw_8bit", "plan",
                           "large.yaml", *wide, "model.num_hidden_layers=200")
        self.assertRegex(told, r"model: [0-9]+ parameters are [0-9.]+ TiB of weights and states")
        self.refuse("more than the 8 TiB that can be planned with", "plan", "large.yaml", "model.hidden_size=1048576",
                    "model.intermediate_size=1048576", "model.num_attention_heads=8192", "model.num_hidden_layers=1000")

    def test_limit_on_addresses_is_found_before_the_start(self):
        if SANITIZED:
            self.skipTest("a sanitizer takes terabytes of addresses")

        def limit():
            resource.setrlimit(resource.RLIMIT_AS, (300 << 20, 300 << 20))
        done = subprocess.run([FLAP, "train", "run.yaml"], cwd=self.folder, capture_output=True, timeout=60, text=True,
                              preexec_fn=limit)
        self.assertEqual(done.returncode, 1, done.stdout)
        self.assertRegex(done.stderr, "flap: error: vram and ram: this run takes .* but ulimit -v leaves ")
        self.assertFalse(os.path.exists(self.path("out")))

    def test_max_under_a_limit_on_addresses_is_what_that_leaves(self):
        if SANITIZED:
            self.skipTest("a sanitizer takes terabytes of addresses")

        def plan(mib):
            def limit():
                resource.setrlimit(resource.RLIMIT_AS, (mib << 20, mib << 20))
            return subprocess.run([FLAP, "plan", "run.yaml", "vram=max", "ram=max", "disk=[]", "expert.threads=1"],
                                  cwd=self.folder, capture_output=True, timeout=60, text=True, preexec_fn=limit)
        done = plan(800)
        self.assertEqual(done.returncode, 0, done.stderr)
        done = plan(260)
        self.assertEqual(done.returncode, 1, done.stdout)
        self.assertRegex(done.stderr, "flap: error: vram: max: ulimit -v leaves .*raise that limit")

    @long_when_sanitized
    def test_what_clipping_holds_back_is_told_where_it_is_much(self):
        self.write("large.yaml", self.LARGE)
        common = ["plan", "large.yaml", "model.num_hidden_layers=4", "vram=6GiB", "ram=6GiB"]
        clipped, free = (json.loads(self.accept(*common, f"max_grad_norm={norm}", "--json")) for norm in (1, 0))
        self.assertEqual(clipped["unclipped_step_seconds"], free["step_seconds"])
        self.assertLess(free["step_seconds"], 0.9 * clipped["step_seconds"])
        self.assertEqual((free["bound_update_seconds"], free["unclipped_step_seconds"]), (0, 0))
        self.assertRegex(self.accept(*common), "clipping  updates wait for the norm of all gradients: with max_grad_norm=0, which trains\n"
                                               " +differently, a step would take %.3g s\n" % free["step_seconds"])
        # Here it would be no other plan.
        self.write("bus.json", self.SLOW.replace('"h2d_bytes": 1e8, "d2h_bytes": 1e8', '"h2d_bytes": 1e6, "d2h_bytes": 1e6'))
        common = ["plan", "run.yaml", "machine=bus.json", "ram=64MiB", "disk=null", "vram=min"]
        shown = self.accept(*common)
        self.assertIn("set by updates behind the norm, then the backward", shown)
        self.assertNotIn("clipping", shown)
        plan = json.loads(self.accept(*common, "--json"))
        self.assertGreaterEqual(plan["unclipped_step_seconds"], plan["step_seconds"] * 0.97)
        self.assertGreaterEqual(plan["bound_seconds"],
                                (plan["bound_update_seconds"] + plan["bound_backward_seconds"]) * (1 - 1e-9))
        self.assertLessEqual(plan["bound_backward_seconds"], plan["bound_compute_seconds"] * 2 / 3 * (1 + 1e-9))
        self.assertGreaterEqual(plan["step_seconds"], plan["bound_seconds"])
        for more in "fp16=true", "expert.update=fold", "max_grad_norm=0":
            self.assertEqual(json.loads(self.accept(*common, more, "--json"))["unclipped_step_seconds"], 0, more)

    @long_when_sanitized
    def test_operations_that_pass_the_rates_raise_them(self):
        """Rates that were measured beside somebody else's work would make a bound that a run passes."""
        environment = {**os.environ, "XDG_CACHE_HOME": self.path("disturbed")}
        environment.pop("FLAP_MACHINE", None)

        def plan():
            done = subprocess.run([FLAP, "plan", "run.yaml", "--json"], cwd=self.folder, capture_output=True, timeout=60,
                                  text=True, env=environment)
            self.assertEqual(done.returncode, 0, done.stderr)
            return json.loads(done.stdout)
        plan()
        path = os.path.join(self.path("disturbed"), "flap", "machine.json")
        with open(path) as file:
            machines = json.load(file)
        for machine in machines["machines"]:
            machine["flops_bf16"] = machine["flops_f32"] = 1e8
        with open(path, "w") as file:
            json.dump(machines, file)
        slow = plan()
        self.assertGreater(slow["step_seconds"], slow["bound_seconds"])
        self.assertGreater(max(slow["machine"]["flops_bf16"], slow["machine"]["flops_f32"]), 1e8)

    def test_limit_on_addresses_that_leaves_none_for_products(self):
        """OpenBLAS would try for ever; nothing is measured yet, so it is asked before there is a plan."""
        if SANITIZED:
            self.skipTest("a sanitizer takes terabytes of addresses")

        def limit():
            resource.setrlimit(resource.RLIMIT_AS, (200 << 20, 200 << 20))
        environment = {**os.environ, "XDG_CACHE_HOME": self.path("no-cache")}
        done = subprocess.run([FLAP, "plan", "run.yaml"], cwd=self.folder, capture_output=True, timeout=60, text=True,
                              preexec_fn=limit, env=environment)
        self.assertEqual(done.returncode, 1, done.stdout)
        self.assertRegex(done.stderr, "flap: error: .*OpenBLAS takes .* of the address space .*ulimit -v [0-9]+")

    @long_when_sanitized
    def test_what_is_written_is_planned_measured_and_kept_to_a_budget(self):
        common = ["run.yaml", "vram=min", "ram=min", "save_strategy=steps", "save_steps=3"]
        plan = json.loads(self.accept("plan", *common, "--json", "ssd_tbw=1GB"))
        self.assertGreater(plan["ssd_step_bytes"], 0)
        self.assertEqual((plan["run_steps"], plan["run_checkpoints"]), (8, 3))  # after 3, 6 and 8
        at_once = {limit: json.loads(self.accept("plan", *common, "--json", f"save_total_limit={limit}"))["checkpoints_at_once"]
                   for limit in (0, 1, 2, 3)}
        self.assertEqual(at_once, {0: 3, 1: 2, 2: 3, 3: 3})  # what is kept, and one that is written
        self.assertEqual(json.loads(self.accept("plan", "run.yaml", "--json", "save_strategy=no"))["checkpoints_at_once"], 0)
        saved = plan["checkpoint_bytes"] - plan["checkpoint_shared_bytes"]
        once = plan["ssd_run_bytes"] - 8 * plan["ssd_step_bytes"] - 3 * saved - plan["export_bytes"]
        self.assertTrue(0 < once <= plan["disk_bytes"], plan)  # states, laid down at the start
        # States on disk, all of them here, are not written again for a checkpoint, unless copies are wanted.
        self.assertEqual(plan["checkpoint_shared_bytes"], plan["classes"]["states"]["disk_bytes"])
        copied = json.loads(self.accept("plan", *common, "--json", "expert.checkpoint_states=copied"))
        self.assertEqual(copied["checkpoint_shared_bytes"], 0)
        self.assertGreater(copied["ssd_run_bytes"], plan["ssd_run_bytes"])
        # Nor are they shared where a pool may hold some of them, which wears the disk less.
        pooled = common[:2] + [f"ram={plan['ram_bytes'] + (1 << 20)}", "expert.pool_bytes=512KiB"] + common[3:]
        with_pool = json.loads(self.accept("plan", *pooled, "--json"))
        self.assertEqual((with_pool["ram_pool_bytes"], with_pool["checkpoint_shared_bytes"]), (512 << 10, 0))
        self.assertLess(with_pool["ssd_step_bytes"], with_pool["lane_bytes"]["disk_write"])
        self.assertRegex(self.accept("plan", *pooled), r"(?m)^files +.* of states on disk and in the pool are copied\)")
        shown = self.accept("plan", *common, "ssd_tbw=1GB", "ssd_budget=50%")
        self.assertRegex(shown, r"(?m)^files +\S+ MiB a checkpoint \(\S+ MiB of it stay where they are\), ")
        os.mkdir(self.path("second"))
        two = self.accept("plan", *common, "disk=[{path: ., size: 64MiB}, {path: second, size: 64MiB}]")
        self.assertRegex(two, r"(?m)^files +\S+ KiB a checkpoint \(\S+ MiB of states on disk are copied: with one disk, ")
        self.assertRegex(shown, r"run +\S+ MiB written in 8 steps, 3 checkpoints of \S+ KiB, export \S+ KiB\n")
        self.assertRegex(shown, r"\S+% of the 0.001 TB that the drives bear\n +\S+% of ssd_budget, 477 MiB\n")

        # A byte too few is refused, with what would do.
        budget = plan["ssd_run_bytes"]
        error = self.refuse("ssd_budget: this run would write", "train", *common, f"ssd_budget={budget - 1}")
        self.assertIn(f"allow {budget} bytes", error)
        steps = int(re.search(r"(\d+) steps stay within it", error).group(1))
        self.assertEqual(steps, 7)
        done = self.flap("plan", *common, f"ssd_budget={budget - 1}")
        self.assertEqual(done.returncode, 0)
        self.assertIn("flap: warning: ssd_budget: this run would write", done.stderr)
        self.accept("train", *common, "output_dir=less", f"max_steps={steps}", f"ssd_budget={budget - 1}")
        out = self.accept("train", *common, f"ssd_budget={budget}", "ssd_tbw=1GB")
        written, unit, share = re.search(r"^written to drives: (\S+) (\wiB) \(.* a step\), .* to save; .* TB per billion "
                                         r"tokens; (\S+)% of ssd_tbw$", out, re.M).groups()
        measured = float(written) * {"KiB": 1 << 10, "MiB": 1 << 20}[unit]
        self.assertAlmostEqual(measured / budget, 1, delta=0.1)  # the first and the last step write a little less
        self.assertAlmostEqual(float(share), measured / 1e7, delta=0.06 * measured / 1e7)
        self.refuse("give ssd_tbw", "train", *common, "output_dir=new", "ssd_budget=5%")
        for wrong in ("0", "0%", "101%", "x%", "5 %x", "-1"):
            self.refuse("ssd_budget", "plan", *common, f"ssd_budget={wrong}")

    def written_bytes(self, step):
        with open(self.path(f"out/checkpoint-{step}/trainer_state.json")) as file:
            return json.load(file)["written_bytes"]

    @long_when_sanitized
    def test_what_was_written_before_counts_for_the_budget_of_a_run_that_goes_on(self):
        common = ["run.yaml", "vram=min", "ram=min", "save_strategy=steps", "save_steps=2", "val_size=0"]
        plan = json.loads(self.accept("plan", *common, "max_steps=4", "--json"))
        self.accept("train", *common, "max_steps=4", "export=none")
        written = [self.written_bytes(step) for step in (2, 4)]
        saved = plan["checkpoint_bytes"] - plan["checkpoint_shared_bytes"]
        self.assertGreaterEqual(written[1] - written[0], saved + plan["ssd_step_bytes"])
        once = plan["ssd_run_bytes"] - 4 * plan["ssd_step_bytes"] - 2 * saved - plan["export_bytes"]
        self.assertTrue(once < written[0] <= plan["ssd_run_bytes"], (written, plan))
        self.assertLessEqual(written[1], plan["ssd_run_bytes"] - plan["export_bytes"])

        # Four steps more write as much again; a byte less than both together is too little.
        more = [*common, "max_steps=8", "resume_from_checkpoint=true"]
        budget = written[1] + plan["ssd_run_bytes"]
        error = self.refuse("ssd_budget: this run would write", "train", *more, f"ssd_budget={budget - 1}")
        self.assertRegex(error, rf" beside the \S+ MiB until now, .* 3 more steps stay within it, .* allow {budget} bytes")
        self.accept("train", *more, f"ssd_budget={budget}")
        self.assertAlmostEqual(self.written_bytes(8) / written[1], 2, delta=0.1)

    @long_when_sanitized
    def test_checkpoints_of_a_run_that_goes_on_are_counted_as_they_are_written(self):
        self.write("short.txt", TEXT[:330])  # ten sequences; a step has four
        common = ["run.yaml", "vram=min", "ram=min", "val_size=0", "dataset=short.txt", "export=none"]
        for name, saving, first, last in (("steps", ["save_strategy=steps", "save_steps=2"], 3, 5),
                                          ("epoch", ["save_strategy=epoch"], 4, 6), ("each", ["save_strategy=epoch",
                                          "gradient_accumulation_steps=8"], 1, 4)):
            with self.subTest(name):
                run = [*common, *saving, f"output_dir={name}"]
                self.assertIn("in 10 sequences", self.accept("train", *run, f"max_steps={first}"))
                before = set(os.listdir(self.path(name)))
                more = [*run, f"max_steps={last}", "resume_from_checkpoint=true"]
                error = self.refuse("ssd_budget: this run would write", "train", *more, "ssd_budget=1")
                self.accept("train", *more)
                written = [each for each in set(os.listdir(self.path(name))) - before if each.startswith("checkpoint-")]
                self.assertRegex(error, rf": {last - first} steps of \S+ \S+, {len(written)} checkpoints of")

    def test_budgets_that_are_too_small_name_the_least_that_works(self):
        for key in ("vram", "ram"):
            error = self.refuse(key, "train", "run.yaml", f"{key}=16KiB")
            self.assertRegex(error, r"\d+ bytes is the least that works")
        plan = json.loads(self.accept("plan", "run.yaml", "--json", "vram=min", "ram=min"))
        self.refuse("disk: ", "train", "run.yaml", f"vram={plan['vram_bytes']}", f"ram={plan['ram_bytes']}",
                    "disk={path: disk, size: 64KiB}")

    @long_when_sanitized
    def test_least_budgets_beside_a_small_one_work(self):
        common = ["run.yaml", "model.model_type=qwen2", "model.hidden_size=96", "model.intermediate_size=256",
                  "model.num_hidden_layers=4", "model.num_attention_heads=6", "model.num_key_value_heads=2",
                  "model.max_position_embeddings=128", "cutoff_len=64", "disk={path: disk, size: 64MiB}",
                  "per_device_train_batch_size=4", "max_grad_norm=0"]
        for ram in (65000, 87000, 110000)[:1 if SANITIZED else 3]:
            plan = json.loads(self.accept("plan", *common, "--json", "vram=min", f"ram={ram}"))
            self.assertEqual(plan["vram_min"], plan["vram_budget"])
            self.accept("plan", *common, f"vram={plan['vram_min']}", f"ram={ram}")
            self.accept("plan", *common, f"vram={plan['vram_min']}", f"ram={plan['ram_min']}")


if __name__ == "__main__":
    unittest.main()
