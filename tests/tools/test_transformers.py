"""Models go to transformers and come back with the same losses. Usage: test_transformers.py <flap>

Tiny models that flap trains are loaded by transformers (weights, config.json, tokenizer), which must find the losses that
flap found on the very same sequences; so must what `flap export` makes of them. Models that transformers makes and shards must
have in flap the losses that they have there. transformers computes in fp32, so bf16 models differ by what flap rounds.

Needs torch and transformers: in this Python, or in that of $FLAP_VENV or of .venv in the root (tools/check.sh --with-torch)."""
import importlib.util
import json
import os
import pathlib
import random
import shutil
import subprocess
import sys
import tempfile
import unittest

if any(importlib.util.find_spec(name) is None for name in ("torch", "transformers")):
    root = pathlib.Path(__file__).resolve().parents[2]
    interpreter = pathlib.Path(os.environ.get("FLAP_VENV") or root / ".venv") / "bin" / "python"
    if interpreter.exists() and "FLAP_REFERENCE_RETRIED" not in os.environ:
        os.execve(interpreter, [str(interpreter), *sys.argv], {**os.environ, "FLAP_REFERENCE_RETRIED": "1"})
    print("skipped: torch and transformers are not there (tools/check.sh --with-torch puts them into .venv)")
    sys.exit(77)

FLAP = os.path.abspath(sys.argv.pop(1)) if len(sys.argv) > 1 else ""
if not os.path.isfile(FLAP):
    print("skipped: there is no flap program with a real engine in this build")
    sys.exit(77)

# Nothing is to be looked for in the network, and no cache is to be written.
os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
import torch  # noqa: E402
import transformers  # noqa: E402

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
torch.set_num_threads(1)

SEED = 77
SEQUENCE, HELDOUT = 48, 20
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}
SMALL = {"model_type": "llama", "hidden_size": 48, "intermediate_size": 112, "num_hidden_layers": 3,
         "num_attention_heads": 6, "max_position_embeddings": 256}
# rope_theta is small, so that some wavelengths lie between llama3's two thresholds.
MODELS = {
    "untied": {**SMALL, "num_key_value_heads": 2, "tie_word_embeddings": False, "rope_theta": 100.0,
               "rope_scaling": LLAMA3, "head_dim": 16, "rms_norm_eps": 1e-5},
    "tied": {**SMALL, "tie_word_embeddings": True},
    # Biases on q, k and v, which are multiplied as one: each matrix is a multiple of 4096 elements.
    "qwen2": {**SMALL, "model_type": "qwen2", "hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 4,
              "head_dim": 16, "tie_word_embeddings": True, "rope_theta": 1000.0},
}
CLASSES = {"llama": transformers.LlamaForCausalLM, "qwen2": transformers.Qwen2ForCausalLM}
RUN = """tokenizer: bytes
dataset: text.txt
cutoff_len: 48
per_device_train_batch_size: 4
gradient_accumulation_steps: 2
max_steps: 40
learning_rate: 1e-2
warmup_steps: 5
weight_decay: 0.1
logging_steps: 20
save_strategy: steps
save_steps: 20
device: cpu
vram: 3MiB
ram: 2MiB
disk: {path: disk, size: 64MiB}
expert: {threads: 1}
"""
RELATIVE = {"fp32": 1e-5, "bf16": 2e-3, "fp16": 2e-3}
TEXTS = ["", "a", "Where is the cat?", "  two  blanks,\ttabs\r\n\nand lines\n", "naïve café — 東京 🙂", "\u0000\u007f<s>",
         "<|endoftext|>", "one<|endoftext|>two", "'s 're I'M 1234567 ..."]


def text():
    words = random.Random(SEED)
    names, verbs = ["Ann", "Bo", "Carla", "Émile", "Duc"], ["sees", "calls", "meets", "leaves"]
    return "".join(f"{words.choice(names)} {words.choice(verbs)} {words.choice(names)} at {words.randrange(24)} o'clock.\n"
                   for _ in range(1000))


class Transformers(unittest.TestCase):
    maxDiff = None

    @classmethod
    def setUpClass(cls):
        cls.folder = tempfile.mkdtemp(prefix="flap-transformers-")
        cls.addClassCleanup(shutil.rmtree, cls.folder)
        cls.environment = {**os.environ, "FLAP_MACHINE": os.path.join(cls.folder, "machine.json")}
        os.mkdir(cls.path("disk"))
        with open(cls.path("text.txt"), "w") as file:
            file.write(text())
        # A document of text and the end token are what io/formats/dataset.h makes of the file.
        cls.stream = [*text().encode(), 256]

    @classmethod
    def path(cls, *names):
        return os.path.join(cls.folder, *names)

    def flap(self, *arguments):
        done = subprocess.run([FLAP, *arguments], cwd=self.folder, env=self.environment, capture_output=True, text=True,
                              timeout=300)
        self.assertEqual((done.returncode, done.stderr), (0, ""), (arguments, done.stdout))
        return done.stdout

    def load(self, folder, dtype):
        """By transformers: in the dtype of the files, which must be `dtype`, and then widened to fp32."""
        model, about = transformers.AutoModelForCausalLM.from_pretrained(self.path(folder), dtype="auto",
                                                                         output_loading_info=True)
        wanted = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
        self.assertEqual({each.dtype for each in model.parameters()}, {wanted}, folder)
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            self.assertFalse(about.get(kind), (folder, kind, about))
        return model.to(torch.float32).eval()

    def loss(self, model, stream=None):
        """Mean over the last HELDOUT * SEQUENCE + 1 tokens: sequences of SEQUENCE inputs and their next tokens."""
        stream = torch.tensor((stream or self.stream)[-(HELDOUT * SEQUENCE + 1):])
        inputs, targets = stream[:-1].view(HELDOUT, SEQUENCE), stream[1:].view(HELDOUT, SEQUENCE)
        with torch.no_grad():
            logits = model(input_ids=inputs).logits.to(torch.float64)
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()).item()

    def loss_of_all(self, model):
        """Mean over all tokens but the first: sequences of SEQUENCE inputs, and what is left in a shorter one."""
        stream, nats = torch.tensor(self.stream), 0.0
        with torch.no_grad():
            for first in range(0, len(stream) - 1, SEQUENCE):
                part = stream[first:first + SEQUENCE + 1]
                logits = model(input_ids=part[None, :-1]).logits[0].to(torch.float64)
                nats += torch.nn.functional.cross_entropy(logits, part[1:], reduction="sum").item()
        return nats / (len(stream) - 1)

    def close(self, ours, theirs, dtype, what):
        print(f"{what}: flap {ours:.7f}, transformers {theirs:.7f}, relative {abs(ours - theirs) / theirs:.1e}")
        self.assertLessEqual(abs(ours - theirs), RELATIVE[dtype] * theirs, what)

    def evaluate(self, *arguments):
        return json.loads(self.flap("eval", *arguments, "--json"))

    def train(self, model, dtype):
        out = f"{model}-{dtype}"
        with open(self.path(f"{out}.yaml"), "w") as file:
            file.write(f"model: {json.dumps(MODELS[model])}\noutput_dir: {out}\nbf16: {str(dtype == 'bf16').lower()}\n"
                       f"val_size: {HELDOUT}\n" + RUN)
        if not os.path.exists(self.path(out)):
            self.flap("train", f"{out}.yaml")
        with open(self.path(out, "metrics.jsonl")) as file:
            losses = [line["eval_loss"] for line in map(json.loads, file) if "eval_loss" in line]
        self.assertEqual(len(losses), 2)
        self.assertLess(losses[1], losses[0] - 2)  # far from where every model has the loss of a uniform guess
        return out, losses[1]

    def check_trained(self, name, dtype):
        out, trained = self.train(name, dtype)
        evaluated = self.evaluate(f"{out}.yaml")
        self.assertEqual(evaluated["tokens"], HELDOUT * SEQUENCE)
        model = self.load(out, dtype)
        self.assertIsInstance(model, CLASSES[MODELS[name]["model_type"]])
        theirs = self.loss(model)
        self.close(trained, theirs, dtype, f"{name}, {dtype}, after training")
        self.close(evaluated["loss"], theirs, dtype, f"{name}, {dtype}, eval")
        tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
        self.assertEqual(tied, MODELS[name]["tie_word_embeddings"])
        self.check_canaries(name, model, dtype, theirs)
        self.check_exports(name, out, dtype, theirs)
        self.check_tokenizer(out)

    def check_canaries(self, name, model, dtype, theirs):
        """The comparison can fail: other sequences, other rotary embeddings, and no biases have other losses."""
        if dtype == "fp32":
            shifted = self.loss(model, self.stream[:-SEQUENCE])
            self.assertGreater(abs(shifted - theirs), 10 * RELATIVE[dtype] * theirs)
        if name == "untied":
            self.assertEqual(model.config.rope_parameters["rope_type"], "llama3")
            config = transformers.LlamaConfig.from_dict(model.config.to_dict())
            config.rope_parameters = {"rope_type": "default", "rope_theta": model.config.rope_parameters["rope_theta"]}
            other = transformers.LlamaForCausalLM(config).eval()
            other.load_state_dict(model.state_dict())
            self.assertGreater(abs(self.loss(other) - theirs), 2 * RELATIVE[dtype] * theirs)
        if name == "qwen2" and dtype == "fp32":
            with torch.no_grad():
                biases = [each for key, each in model.named_parameters() if key.endswith(".bias")]
                self.assertEqual(len(biases), 3 * SMALL["num_hidden_layers"])
                given = [each.clone() for each in biases]
                for each in biases:
                    each.zero_()
                self.assertGreater(abs(self.loss(model) - theirs), 2 * RELATIVE[dtype] * theirs)
                for each, values in zip(biases, given):
                    each.copy_(values)

    def check_exports(self, name, out, dtype, theirs):
        for source, each in [(out, "fp32"), (out, "bf16"), (out, "fp16"), (f"{out}/checkpoint-40", "fp32")]:
            target = f"{out}-{os.path.basename(source)}-as-{each}"
            self.flap("export", source, target, "--dtype", each, "--max-shard-size", "64KiB")
            self.assertTrue(os.path.exists(self.path(target, "model.safetensors.index.json")))
            loss = self.loss(self.load(target, each))
            what = f"{name}, {dtype}, {'checkpoint' if source != out else 'model'} exported to {each}"
            evaluated = self.evaluate(target, "dataset=text.txt", f"cutoff_len={SEQUENCE}", f"val_size={HELDOUT}",
                                      f"bf16={str(each == 'bf16').lower()}")
            self.close(evaluated["loss"], loss, each, what)
            exact = source == out and (each == dtype or each == "fp32")
            self.assertLessEqual(abs(loss - theirs), (1e-7 if exact else 2e-3) * theirs, what)

    def check_tokenizer(self, out):
        tokenizer = transformers.AutoTokenizer.from_pretrained(self.path(out))
        self.assertEqual((len(tokenizer), tokenizer.eos_token_id), (257, 256))
        for each in TEXTS:
            # A command line holds no zero byte.
            if "\u0000" not in each and each:
                ours = [int(word) for word in self.flap("tokenize", out, "--text", each).split()]
                self.assertEqual(tokenizer.encode(each), ours, each)
            ids = tokenizer.encode(each)
            if "<|endoftext|>" not in each:
                self.assertEqual(ids, list(each.encode()), each)
            self.assertEqual(tokenizer.decode(ids, clean_up_tokenization_spaces=False), each)
        self.assertEqual(tokenizer.encode("one<|endoftext|>two"), [*b"one", 256, *b"two"])

    # ---- from flap to transformers ----

    def test_trained_in_fp32_untied_llama3(self):
        self.check_trained("untied", "fp32")

    def test_trained_in_fp32_tied(self):
        self.check_trained("tied", "fp32")

    def test_trained_in_bf16_untied_llama3(self):
        self.check_trained("untied", "bf16")

    def test_trained_in_bf16_tied(self):
        self.check_trained("tied", "bf16")

    def test_trained_in_fp32_qwen2(self):
        self.check_trained("qwen2", "fp32")

    def test_trained_in_bf16_qwen2(self):
        self.check_trained("qwen2", "bf16")

    def check_generation(self, name):
        out, _ = self.train(name, "fp32")
        model = self.load(out, "fp32")
        for prompt in ("Ann sees ", "Duc calls Carla at 1", "Where"):
            given = list(prompt.encode())
            with torch.no_grad():
                ids = model.generate(torch.tensor([given]), max_new_tokens=40, do_sample=False, eos_token_id=256,
                                     pad_token_id=256)[0].tolist()[len(given):]
            theirs = bytes(each for each in ids if each < 256).decode()
            ours = self.flap("sample", f"{out}.yaml", "--prompt", prompt, "-n", "40", "--temperature", "0")
            print(f"{name}, after {prompt!r}: {theirs!r}")
            self.assertEqual(ours, theirs + "\n", prompt)

    def test_greedy_generation_is_the_same(self):
        self.check_generation("untied")

    def test_greedy_generation_is_the_same_with_qwen2(self):
        self.check_generation("qwen2")

    # ---- from transformers to flap ----

    def make(self, name, dtype, folder):
        """Random weights with which every parameter matters: wide, and norms that differ from one."""
        torch.manual_seed(SEED)
        keys = dict(MODELS[name])
        theta = keys.pop("rope_theta", 10000.0)
        keys["rope_parameters"] = {"rope_theta": theta, "rope_type": "default", **(keys.pop("rope_scaling", None) or {})}
        make = CLASSES[keys.pop("model_type")]
        model = make(make.config_class(**keys, vocab_size=257, initializer_range=0.15))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(0.2 * torch.randn(parameter.shape))
        model = model.to({"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]).eval()
        model.save_pretrained(self.path(folder), max_shard_size="60KB")
        self.assertGreater(len([each for each in os.listdir(self.path(folder)) if each.endswith(".safetensors")]), 1)

    def test_made_by_transformers(self):
        for name in MODELS:
            for dtype in RELATIVE:
                with self.subTest(name=name, dtype=dtype):
                    folder = f"made-{name}-{dtype}"
                    self.make(name, dtype, folder)
                    theirs = self.loss(self.load(folder, dtype))
                    common = [folder, "tokenizer=bytes", "dataset=text.txt", f"cutoff_len={SEQUENCE}"]
                    bf16 = f"bf16={str(dtype == 'bf16').lower()}"
                    evaluated = self.evaluate(*common, f"val_size={HELDOUT}", bf16)
                    # fp16 files are read exactly, and computed with in fp32.
                    self.close(evaluated["loss"], theirs, "fp32" if dtype == "fp16" else dtype, f"{name}, {dtype}, made")
                    evaluated = self.evaluate(*common, bf16, "vram=min", "ram=min", "disk={path: disk, size: 64MiB}")
                    self.assertEqual(evaluated["tokens"], len(self.stream) - 1)
                    theirs = self.loss_of_all(self.load(folder, dtype))
                    self.close(evaluated["loss"], theirs, "fp32" if dtype == "fp16" else dtype, f"{name}, {dtype}, all")

    def test_made_by_transformers_trained_further_by_flap(self):
        """The model that comes out is the one that went in when the learning rate is 0, and has its config's keys."""
        for model in ("untied", "qwen2"):
            with self.subTest(model=model):
                self.make(model, "fp32", f"given-{model}")
                self.flap("train", self.write_further(f"given-{model}"), f"output_dir=further-{model}")
                theirs = self.load(f"given-{model}", "fp32")
                ours = self.load(f"further-{model}", "fp32")
                self.assertIs(type(theirs), type(ours))
                theirs, ours = theirs.state_dict(), ours.state_dict()
                self.assertEqual(sorted(theirs), sorted(ours))
                for name, tensor in theirs.items():
                    self.assertTrue(torch.equal(tensor, ours[name]), name)

    def test_what_stands_beside_the_weights_is_still_read(self):
        """A chat template, generation_config.json and several end tokens are there after training further."""
        self.train("untied", "fp32")
        given = pathlib.Path(self.path("untied-fp32"))
        (given / "chat_template.jinja").write_text("{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}")
        (given / "generation_config.json").write_text('{"eos_token_id": [256, 10], "pad_token_id": 0, "top_k": 7}')
        config = json.loads((given / "config.json").read_text())
        (given / "config.json").write_text(json.dumps({**config, "eos_token_id": [256, 10], "pad_token_id": 0}))
        self.flap("train", self.write_further(given.name), "output_dir=tuned", "tokenizer=null")
        tuned = self.path("tuned")
        model = transformers.AutoModelForCausalLM.from_pretrained(tuned)
        self.assertEqual(model.config.eos_token_id, [256, 10])
        self.assertEqual(model.config.pad_token_id, 0)
        self.assertEqual((model.generation_config.eos_token_id, model.generation_config.top_k), ([256, 10], 7))
        talk = transformers.AutoTokenizer.from_pretrained(tuned).apply_chat_template(
            [{"role": "user", "content": "hi"}], tokenize=False)
        self.assertEqual(talk, "[user]hi")

    def write_further(self, given):
        with open(self.path("further.yaml"), "w") as file:
            file.write(f"model_name_or_path: {given}\nbf16: false\n" + RUN.replace("learning_rate: 1e-2", "learning_rate: 0")
                       .replace("max_steps: 40", "max_steps: 2").replace("save_strategy: steps", "save_strategy: no"))
        return "further.yaml"


if __name__ == "__main__":
    unittest.main()
