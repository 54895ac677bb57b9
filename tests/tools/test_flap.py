"""The whole program, with its real engine, on a model of a few thousand parameters. Usage: test_flap.py <flap>

What a person does: train, evaluate, sample, export; and what they do wrong: every
mistake is one line on stderr, exit status 1, within seconds, and leaves nothing behind."""
import json
import os
import re
import struct
import unittest
import unittest.mock

from flap_rig import TEXT, Rig, long_when_sanitized


class Flap(Rig):
    def test_train_eval_sample_export_inspect(self):
        text = self.accept("train", "run.yaml")
        for wanted in ["step 8/8  loss ", "held-out loss ", "unigram entropy", "of the bound reached", "Hugging Face's format: out"]:
            self.assertIn(wanted, text)
        losses = self.losses()
        self.assertEqual(sorted(losses), list(range(1, 9)))
        self.assertLess(losses[8][0], losses[1][0])
        self.assertTrue({"config.json", "model.safetensors", "metrics.jsonl", "trace.json", "tokenizer.json"}
                        <= set(os.listdir(self.path("out"))))
        self.assertEqual(os.listdir(self.path("disk")), [])

        after = float(text.split(" before, ")[1].split(" after")[0])
        evaluated = json.loads(self.accept("eval", "run.yaml", "--json"))
        self.assertAlmostEqual(evaluated["loss"], after, places=2)
        sample = [self.accept("sample", "run.yaml", "--prompt", "The", "-n", "12", "--seed", seed) for seed in "112"]
        self.assertEqual(sample[0], sample[1])
        self.accept("sample", "run.yaml")  # 64 positions are fewer than the 128 tokens of the default
        self.refuse("more than the model's max_position_embeddings of 64", "sample", "run.yaml", "-n", "128")
        self.refuse("--prompt: its 64 tokens leave no room", "sample", "run.yaml", "--prompt", "x" * 64)
        on_text = ["eval", "out", "dataset=text.txt", "--json"]  # all 64 positions, fewer than the default cutoff_len
        by_default, given = (json.loads(self.accept(*on_text, *more)) for more in ([], ["cutoff_len=64"]))
        self.assertEqual((by_default["loss"], by_default["tokens"]), (given["loss"], given["tokens"]))
        self.refuse("cutoff_len: 65 tokens are more", *on_text, "cutoff_len=65")
        self.write("short.txt", "hello")  # and the end of the text: all but the first are predicted
        self.assertEqual(json.loads(self.accept("eval", "out", "dataset=short.txt", "--json"))["tokens"], 5)
        self.accept("export", "out", "exported", "--dtype", "float32")
        self.refuse("exported", "export", "out", "exported")
        for source, given, dtype in (("exported", [], "float32"), ("out", [], "bfloat16"), ("out", ["--dtype", "fp16"], "float16"),
                                     ("out-float16", [], "float16")):
            target = f"{source}-{dtype}"
            self.assertIn(f"exported {source} to {target} ({dtype})", self.accept("export", source, target, *given))
        self.assertEqual(self.weights("exported-float32"), self.weights("exported"))  # nothing is lost unasked
        shown = self.accept("inspect", "exported")
        self.assertIn("model.layers.2.mlp.down_proj.weight", shown)
        self.assertIn("F32", shown)
        self.assertIn("model_type", shown)

    def test_a_step_that_leaves_its_update_to_the_next_is_compared_with_no_bound(self):
        for more, compared in ((["expert.update=fold"], ["2", "3"]), (["expert.update=sweep"], ["1", "2", "3"]),
                               (["max_grad_norm=0", "expert.update=backward"], ["1", "2", "3"])):
            out = self.accept("train", "run.yaml", "overwrite_output_dir=true", "max_steps=3", "vram=min", *more)
            steps = re.findall(r"^step (\d)/3 .*$", out, re.M)
            self.assertEqual(steps, ["1", "2", "3"], out)
            self.assertEqual(re.findall(r"^step (\d)/3 .* of bound  (?:waits .*  )?ETA ", out, re.M), compared, more)

    def test_eval_keeps_tokens_where_there_is_room_for_them(self):
        self.accept("train", "run.yaml")
        on_text = ["eval", "out", "dataset=text.txt"]
        self.accept("tokenize", "bytes", "text.txt", "-o", "a.bin")
        os.mkdir(self.path("scratch"))
        with unittest.mock.patch.dict(os.environ, TMPDIR=self.path("scratch")):
            self.accept(*on_text)
        self.assertEqual(os.listdir(self.path("scratch")), [])
        with unittest.mock.patch.dict(os.environ, TMPDIR=self.path("nowhere")):
            self.assertIn("unless `disk` names a folder", self.refuse("TMPDIR, ", *on_text))
            self.accept("eval", "out", "dataset=a.bin")  # there are none
            self.accept(*on_text, "disk=disk")
        self.refuse("disk: disk (give it more, or another folder): dataset: the tokens of the text need more than the 16384 "
                    "bytes", *on_text, "disk={path: disk, size: 16KiB}")
        with unittest.mock.patch.dict(os.environ, TMPDIR=""):
            self.accept(*on_text)

    def test_a_tokenizer_with_byte_fallback_is_kept_and_its_samples_are_text(self):
        source = os.path.join(os.path.dirname(__file__), "..", "formats", "data", "tokenizer_llama2.json")
        with open(source, "rb") as file:
            content = file.read()
        self.write("tokenizer.json", content)
        # The same document over and over: the model learns it by heart.
        self.write("text.txt", "été à la mer\n" * 200)
        self.accept("train", "run.yaml", "tokenizer=tokenizer.json", "max_steps=60", "dataset=text.txt")
        for name in "tokenizer.json", "out/tokenizer.json":
            with open(self.path(name), "rb") as file:
                self.assertEqual(file.read(), content)
        ids = self.accept("tokenize", "out", "--text", "été").split()
        self.assertEqual(ids, self.accept("tokenize", "tokenizer.json", "--text", "été").split())
        # Spaces between prompt and continuation stay, and é comes whole, be it one token or two bytes.
        self.assertTrue(self.accept("sample", "out", "--prompt", "été à", "-n", "6", "-t", "0").startswith(" la mer"))
        text = self.accept("sample", "out", "-n", "30", "--prompt", "mer\n", "-t", "0")
        self.assertIn("été à la mer\nété", text)
        self.assertNotIn("\ufffd", text)

    def test_documents_begin_with_the_begin_token_however_they_are_read(self):
        source = os.path.join(os.path.dirname(__file__), "..", "formats", "data", "tokenizer_llama3.json")
        with open(source, "rb") as file:
            self.write("tokenizer.json", file.read())
        self.write("text.jsonl", "".join(json.dumps({"text": line}) + "\n" for line in TEXT.splitlines()))
        self.accept("tokenize", "tokenizer.json", "text.jsonl", "-o", "text.bin")
        begin = 1200  # <|begin_of_text|>
        with open(self.path("text.bin"), "rb") as file:
            ids = struct.unpack("<" + "H" * (os.path.getsize(self.path("text.bin")) // 2 - 512), file.read()[1024:])
        self.assertEqual(ids[0], begin)
        self.assertEqual(ids.count(begin), len(TEXT.splitlines()))
        with_tokenizer = ["run.yaml", "tokenizer=tokenizer.json"]
        for kind in "jsonl", "bin":  # training and evaluation see the stream that was written
            self.accept("train", *with_tokenizer, f"dataset=text.{kind}", f"output_dir={kind}")
        self.assertEqual(self.losses("jsonl"), self.losses("bin"))
        evaluated = [json.loads(self.accept("eval", "bin", f"dataset=text.{kind}", "--json")) for kind in ("jsonl", "bin")]
        self.assertEqual(evaluated[0]["tokens"], evaluated[1]["tokens"])
        self.assertEqual(evaluated[0]["loss"], evaluated[1]["loss"])

    def test_tokens_that_only_transformers_would_add_are_named(self):
        source = os.path.join(os.path.dirname(__file__), "..", "formats", "data", "tokenizer_qwen2.json")
        os.mkdir(self.path("tok"))
        with open(source, "rb") as file:
            self.write("tok/tokenizer.json", file.read())
        for config, wanted in (({"additional_special_tokens": ["<|endoftext|>"], "pad_token": {"content": "<|endoftext|>"}}, None),
                               ({"added_tokens_decoder": {"7": {"content": "<|think|>"}, "8": {"content": ""}}},
                                'added_tokens_decoder: the token "<|think|>" is not in tokenizer.json (1 such in all)'),
                               ({"additional_special_tokens": ["<|endoftext|>", "<a>", {"content": "<b>"}], "pad_token": "<pad>"},
                                'additional_special_tokens: the token "<a>" is not in tokenizer.json (3 such in all)')):
            self.write("tok/tokenizer_config.json", json.dumps(config))
            done = self.flap("tokenize", "tok", "--text", "a")
            self.assertEqual(done.returncode, 0, done.stderr)
            if wanted:
                self.assertIn("tok/tokenizer_config.json: " + wanted, done.stderr)
            self.assertEqual(len(done.stderr.splitlines()), 1 if wanted else 0, done.stderr)

    def test_a_model_with_code_of_its_own_is_named_once(self):
        self.accept("train", "run.yaml", "max_steps=1")
        with open(self.path("out/config.json")) as file:
            config = json.load(file)
        for name, warnings in (("AutoConfig", 0), ("AutoModelForCausalLM", 1)):
            self.write("out/config.json", json.dumps({**config, "auto_map": {name: "modeling_own.Own"}}))
            for command in (["sample", "out", "-n", "1"], ["export", "out", "exported-" + name],
                            ["train", "run.yaml", "model=null", "model_name_or_path=out", "output_dir=" + name, "max_steps=1"]):
                done = self.flap(*command)
                self.assertEqual(done.returncode, 0, done.stderr)
                self.assertEqual(done.stderr.count("out/config.json: auto_map: "), warnings, done.stderr)

    def test_a_qwen2_model_with_another_tokenizer_is_told_how_to_load_it(self):
        data = os.path.abspath(os.path.join(os.path.dirname(__file__), "..", "formats", "data"))
        for family, tokenizer, told in (("qwen2", "bytes", 1), ("qwen2", f"{data}/tokenizer_llama3.json", 1),
                                        ("qwen2", f"{data}/tokenizer_qwen2.json", 0), ("llama", "bytes", 0)):
            done = self.flap("train", "run.yaml", f"model.model_type={family}", "model.num_key_value_heads=2", "vram=1GiB",
                             f"tokenizer={tokenizer}", "max_steps=1", "overwrite_output_dir=true")
            self.assertEqual(done.returncode, 0, done.stderr)
            self.assertEqual(done.stderr.count("load it with PreTrainedTokenizerFast.from_pretrained"), told, done.stderr)

    @long_when_sanitized
    def test_budgets_disks_and_io_do_not_change_the_numbers(self):
        self.accept("train", "run.yaml", "output_dir=a", "vram=1GiB", "ram=1GiB")
        os.mkdir(self.path("disk2"))
        for name, overrides in {"b": ["vram=min"], "c": ["vram=min", "ram=min"], "d": ["expert.io=threads", "ram=min"],
                                "e": ["disk=[disk, disk2]", "ram=min", "expert.clip=sweep"],
                                "f": ["expert.segment_layers=2", "activations=recompute"]}.items():
            self.accept("train", "run.yaml", f"output_dir={name}", *overrides)
            self.assertEqual(self.losses(name), self.losses("a"), overrides)
            self.assertEqual(self.weights(name), self.weights("a"), overrides)

    def test_what_has_no_trained_model_names_what_to_take(self):
        for command in "sample", "eval":
            self.refuse("out holds no model (config.json): train it first", command, "run.yaml")
        self.accept("train", "run.yaml", "save_strategy=steps", "save_steps=4", "export=none")
        for command in "sample", "eval":
            self.refuse("out holds no trained model, but checkpoints: add model_name_or_path=out/checkpoint-8", command,
                        "run.yaml")
            self.accept(command, "run.yaml", "model_name_or_path=out/checkpoint-8")
        self.refuse("out is the folder of a run: name a checkpoint in it, such as out/checkpoint-8", "train", "run.yaml",
                    "resume_from_checkpoint=out")

    def test_missing_files_are_named(self):
        self.refuse("nothing.txt", "train", "run.yaml", "dataset=nothing.txt")
        self.refuse("nowhere", "train", "run.yaml", "disk=nowhere", "ram=min")
        self.refuse("nothing", "train", "run.yaml", "model=null", "model_name_or_path=nothing")
        self.refuse("nothing.json", "train", "run.yaml", "tokenizer=nothing.json")
        self.refuse("tokenizer: disk holds no tokenizer.json: name one, or `bytes`", "train", "run.yaml", "tokenizer=disk")
        self.refuse("nothing", "sample", "nothing")
        self.refuse("nothing", "inspect", "nothing")
        self.refuse("nothing", "export", "nothing", "x")
        self.refuse("nothing", "train", "run.yaml", "resume_from_checkpoint=nothing")

    def test_model_keys_that_are_wrong_are_named(self):
        self.refuse("hidden_sise", "plan", "run.yaml", "model.hidden_sise=64")
        self.refuse("num_attention_heads", "plan", "run.yaml", "model.num_attention_heads=5")
        self.refuse("model_type", "plan", "run.yaml", "model.model_type=gpt9")
        self.refuse("hidden_size", "plan", "run.yaml", "model.hidden_size=big")

    def test_broken_inputs_are_refused(self):
        self.write("bad.jsonl", '{"text": "fine"}\n{"text": 5}\n')
        self.refuse("bad.jsonl", "train", "run.yaml", "dataset=bad.jsonl")
        self.write("bad.bin", b"x" * 100)
        self.refuse("bad.bin", "train", "run.yaml", "dataset=bad.bin")
        self.write("short.txt", "short")
        self.refuse("short.txt", "train", "run.yaml", "dataset=short.txt")
        self.write("tokenizer.json", '{"model": {"type": "Unigram"}}')
        self.refuse("tokenizer.json", "train", "run.yaml", "tokenizer=tokenizer.json")
        os.mkdir(self.path("broken"))
        self.write("broken/config.json", json.dumps({"model_type": "llama", "hidden_size": 32, "intermediate_size": 64,
                   "num_hidden_layers": 3, "num_attention_heads": 2, "vocab_size": 257, "rms_norm_eps": 1e-5}))
        self.write("broken/model.safetensors", struct.pack("<Q", 1 << 60) + b"{}")
        self.refuse("broken/model.safetensors", "train", "run.yaml", "model=null", "model_name_or_path=broken")
        self.refuse("broken/model.safetensors", "sample", "broken", "tokenizer=bytes")

    @unittest.skipIf(os.geteuid() == 0, "root may write everywhere")
    def test_a_folder_that_cannot_be_written_is_named(self):
        os.mkdir(self.path("locked"), 0o500)
        self.refuse("locked", "train", "run.yaml", "output_dir=locked/out")

    def test_output_dir_that_is_a_file_is_named(self):
        self.write("file", "")
        self.refuse("file", "train", "run.yaml", "output_dir=file")

    def test_trace_that_cannot_be_written_costs_no_model(self):
        os.makedirs(self.path("out/trace.json"))
        done = self.flap("train", "run.yaml")
        self.assertEqual(done.returncode, 1)
        self.assertIn("flap: error: cannot rename out/trace.json.tmp to out/trace.json: Is a directory", done.stderr)
        self.assertEqual(sorted(os.listdir(self.path("out"))),
                         ["config.json", "finished.json", "metrics.jsonl", "model.safetensors", "tokenizer.json",
                          "tokenizer_config.json", "trace.json"])
        self.accept("eval", "run.yaml")

    def test_metrics_that_are_no_file_are_named_and_broken_lines_numbered(self):
        save = ["train", "run.yaml", "save_strategy=steps", "save_steps=4"]
        self.accept(*save)
        with open(self.path("out/metrics.jsonl"), "a") as file:
            file.write("{}\n\n \t\n")
        self.assertIn("11 lines, loss ", self.accept("inspect", "out/metrics.jsonl"))
        with open(self.path("out/metrics.jsonl"), "a") as file:
            file.write("broken\n")
        self.refuse("out/metrics.jsonl:14: not a line of JSON", "inspect", "out/metrics.jsonl")
        for make in os.mkfifo, lambda path: os.symlink("/dev/zero", path):
            os.remove(self.path("out/metrics.jsonl"))
            make(self.path("out/metrics.jsonl"))
            self.refuse("out/metrics.jsonl is not a regular file", *save, "max_steps=10", "resume_from_checkpoint=true")
            self.refuse("out/metrics.jsonl: neither a folder nor a regular file", "inspect", "out/metrics.jsonl")

    def test_output_dir_that_leads_nowhere_is_named(self):
        self.write("file", "something")
        os.symlink("nowhere", self.path("link"))
        self.refuse("output_dir: file/out cannot be made or looked at: Not a directory", "train", "run.yaml",
                    "output_dir=file/out")
        self.refuse("output_dir: link is a link to what is not there", "train", "run.yaml", "output_dir=link")

    def test_loss_that_is_not_finite_stops_and_says_where(self):
        # Decay then multiplies the weights by -1e12 a step, which no model survives.
        done = self.flap("train", "run.yaml", "learning_rate=1e6", "weight_decay=1e6", "max_grad_norm=0", "max_steps=200")
        self.assertEqual(done.returncode, 1, done.stderr)
        self.assertRegex(done.stderr, r"step \d+: .*not finite.*(layer \d+|embedding|head)")
        self.assertFalse(os.path.exists(self.path("out/model.safetensors")))


if __name__ == "__main__":
    unittest.main()
