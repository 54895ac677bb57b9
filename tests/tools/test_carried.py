"""What checkpoints and trained models hold beside weights: the tokenizer, and what tells others how to use the model.
Usage: test_carried.py <flap>"""
import json
import os
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
                    self.assertEqual((self.config(folder)["eos_token_id"], self.config(folder)["bos_token_id"]), (None, None))
                self.accept(*saving, *of, f"output_dir={name}", "max_steps=9", "resume_from_checkpoint=true")
                self.accept("eval", name, "dataset=a.bin")
                self.refuse("tokenizer", "sample", name)


if __name__ == "__main__":
    unittest.main()
