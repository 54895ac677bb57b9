"""What checkpoints and trained models hold beside weights: the tokenizer, and what tells others how to use the model.
Usage: test_carried.py <flap>"""
import json
import os
import shutil
import unittest

from flap_rig import Rig


class Carried(Rig):
    def files(self, folder):
        return {name for name in os.listdir(self.path(folder)) if not name.endswith(".safetensors")}

    def config(self, folder):
        with open(self.path(f"{folder}/config.json")) as file:
            return json.load(file)

    def without_tokenizer(self):
        """A token shard, and a model's folder that no tokenizer is in."""
        self.accept("tokenize", "bytes", "text.txt", "-o", "a.bin")
        self.accept("train", "run.yaml", "output_dir=good", "max_steps=1")
        for name in "tokenizer.json", "tokenizer_config.json":
            os.remove(self.path(f"good/{name}"))

    def test_run_on_shards_without_a_tokenizer_saves_and_exports_none(self):
        self.without_tokenizer()
        saving = ["train", "run.yaml", "tokenizer=null", "dataset=a.bin", "save_strategy=steps", "save_steps=4"]
        for name, of in {"keys": ["model.vocab_size=257"],
                         "folder": ["model=null", "model_name_or_path=good"]}.items():
            with self.subTest(name):
                self.accept(*saving, *of, f"output_dir={name}")
                for folder in f"{name}/checkpoint-8", name:
                    self.assertEqual([each for each in self.files(folder) if "token" in each], [])
                    eos = 256 if name == "folder" else None  # of the folder's config.json
                    self.assertEqual((self.config(folder)["eos_token_id"], self.config(folder)["bos_token_id"]), (eos, None))
                self.accept(*saving, *of, f"output_dir={name}", "max_steps=9", "resume_from_checkpoint=true")
                self.accept("eval", name, "dataset=a.bin")
                self.refuse("tokenizer", "sample", name)

    # In folders of Hugging Face's, beside tokenizer.json and tokenizer_config.json; FLAP reads none of them.
    OTHERS = {"special_tokens_map.json": '{"eos_token": "<|endoftext|>"}\n', "chat_template.jinja": "{{ messages }}\n",
              "generation_config.json": '{"eos_token_id": [256, 10], "temperature": 0.6}\n', "added_tokens.json": "{}\n",
              "vocab.json": '{"a": 0}\n', "merges.txt": "#version: 0.2\n", "tokenizer.model": "\0sentences",
              "chat_template.json": '{"chat_template": "{{ messages }}"}\n'}
    IDS = {"eos_token_id": [256, 10], "bos_token_id": 3, "pad_token_id": 7}

    def make_source(self, name, **ids):
        self.accept("train", "run.yaml", f"output_dir={name}", "max_steps=1")
        for other, content in self.OTHERS.items():
            self.write(f"{name}/{other}", content)
        self.write(f"{name}/config.json", json.dumps({**self.config(name), **(ids or self.IDS)}))

    def bytes_of(self, name):
        with open(self.path(name), "rb") as file:
            return file.read()

    def check_carried(self, folder, source, names, ids):
        for name in names:
            self.assertEqual(self.bytes_of(f"{folder}/{name}"), self.bytes_of(f"{source}/{name}"), name)
        self.assertEqual({key: self.config(folder).get(key) for key in self.IDS}, ids)

    ALL = ["tokenizer.json", "tokenizer_config.json", *OTHERS]
    TRAIN = ["train", "run.yaml", "model=null", "save_strategy=steps", "save_steps=4"]

    def test_what_tells_how_to_use_a_model_is_in_all_that_is_trained_from_it(self):
        self.make_source("source")
        common = [*self.TRAIN, "tokenizer=null", "model_name_or_path=source"]
        self.accept(*common, "save_total_limit=1")
        shutil.copytree(self.path("source"), self.path("kept"))
        for name in self.OTHERS:  # now only the checkpoint has them, but for those that the tokenizer is read from
            if name != "special_tokens_map.json":
                os.remove(self.path(f"source/{name}"))
        self.accept(*common, "save_total_limit=1", "max_steps=12", "resume_from_checkpoint=true")
        for folder in "out/checkpoint-12", "out":
            self.check_carried(folder, "kept", self.ALL, self.IDS)
            self.accept("inspect", folder)
        self.accept("export", "out/checkpoint-12", "exported")
        self.check_carried("exported", "kept", self.ALL, self.IDS)
        self.accept(*self.TRAIN, "tokenizer=out/checkpoint-12/tokenizer.json", "model_name_or_path=out/checkpoint-12",
                    "output_dir=next")
        self.check_carried("next", "kept", self.ALL, self.IDS)
        # A run that starts anew in the folder leaves none of them beside another's model.
        self.accept("train", "run.yaml", "overwrite_output_dir=true")
        self.assertEqual(self.files("out"), {"config.json", "tokenizer.json", "tokenizer_config.json", "metrics.jsonl",
                                             "trace.json", "finished.json"})

    def test_another_tokenizer_brings_its_own_files_and_ends_texts_by_its_own_token(self):
        self.make_source("source", eos_token_id=[3, 4], bos_token_id=1, pad_token_id=2)
        self.make_source("other")
        self.write("other/chat_template.jinja", "another\n")
        of_tokenizer = [name for name in self.ALL if name != "generation_config.json"]
        self.accept(*self.TRAIN, "tokenizer=other", "model_name_or_path=source")
        for folder in "out", "out/checkpoint-8":
            self.check_carried(folder, "other", of_tokenizer, {"eos_token_id": 256, "bos_token_id": None, "pad_token_id": None})
            self.assertNotIn("generation_config.json", self.files(folder))
        self.accept(*self.TRAIN, "tokenizer=bytes", "model_name_or_path=source", "output_dir=bytes")
        self.assertNotIn("chat_template.jinja", self.files("bytes"))

    def test_tokenizer_that_cannot_be_read_is_carried_where_nothing_needs_it(self):
        self.accept("tokenize", "bytes", "text.txt", "-o", "a.bin")
        self.make_source("source")
        self.write("source/tokenizer.json", '{"model": {"type": "Unigram"}}')
        common = [*self.TRAIN, "tokenizer=null", "model_name_or_path=source"]
        self.refuse("source/tokenizer.json", *common)  # text needs it
        self.refuse("source/tokenizer.json", *common, "dataset=a.bin", "tokenizer=source")  # somebody wants it
        done = self.flap(*common, "dataset=a.bin")
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertEqual(len(done.stderr.splitlines()), 1, done.stderr)
        self.assertRegex(done.stderr, "the tokenizer is not read, .*source/tokenizer.json")
        for folder in "out", "out/checkpoint-8":
            self.check_carried(folder, "source", self.ALL, self.IDS)
        self.accept("eval", "out", "dataset=a.bin")
        self.refuse("out/tokenizer.json", "sample", "run.yaml", "tokenizer=null", "dataset=a.bin", "--prompt", "The")
        self.write("source/tokenizer.json", "{")  # what is broken is not of a kind
        self.refuse("source/tokenizer.json", *common, "dataset=a.bin", "output_dir=another")

    def test_file_that_cannot_be_carried_is_named_before_anything_is_written(self):
        self.make_source("source")
        os.remove(self.path("source/merges.txt"))
        os.mkfifo(self.path("source/merges.txt"))
        self.refuse("source/merges.txt: it is not a regular file", *self.TRAIN, "tokenizer=null",
                    "model_name_or_path=source")


if __name__ == "__main__":
    unittest.main()
