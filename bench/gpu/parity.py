"""Training in FLAP beside training in PyTorch and transformers: the same weights, data, order and optimizer, loss by loss.

  python3 bench/gpu/parity.py [--flap build/tools/flap] [--out FOLDER] [--device cuda|cpu] [--models llama,qwen2]
                              [--dtypes fp32,bf16,fp16] [--steps 20] [--sizes cuda|cpu] [--seed 1]
                              [--vram 6GiB] [--ram 8GiB]

For each model type a model is made by transformers and saved in fp32, tokens are written as an llm.c shard, and `flap train`
trains on them with AdamW, warm-up, weight decay, clipping and two micro-batches. PyTorch trains from the same weights and
data, on the sequences in FLAP's order, which is computed here from the seed as io/formats/dataset.c does.

fp32 (TF32 off): the loss of every step must be within 1e-4 of PyTorch's, relatively. A canary, PyTorch on other sequences,
must not be.

bf16, and fp16 where this flap has it: rounding makes curves part, so FLAP's is measured by how far PyTorch's own are apart.
They are runs with weights of that dtype and an fp32 master (what FLAP does), with several attention back ends, ways of summing
gradients and reductions, and one with autocast over fp32 weights. The distance of two curves is the root of the mean square of
their differences. FLAP's from the mean of PyTorch's must be at most the largest between two of PyTorch's; a canary, the same
training with a learning rate that is 20% higher, must be further. fp16 scales losses by 2^16, and halves that and skips the
update when a gradient overflows.

--device cpu compares FLAP's cpu device with PyTorch on the CPU, at sizes that take seconds. Exit status 1 when something is
out of its limit, 77 when torch, transformers or flap are missing. A model type or dtype that this flap does not know is a
row "not there".
"""
import argparse
import contextlib
import importlib.util
import json
import math
import os
import pathlib
import random
import subprocess
import sys
import tempfile

sys.dont_write_bytecode = True
ROOT = pathlib.Path(__file__).resolve().parents[2]
if any(importlib.util.find_spec(name) is None for name in ("torch", "transformers")):
    interpreter = pathlib.Path(os.environ.get("FLAP_VENV") or ROOT / ".venv") / "bin" / "python"
    if interpreter.exists() and "FLAP_REFERENCE_RETRIED" not in os.environ:
        os.execve(interpreter, [str(interpreter), *sys.argv], {**os.environ, "FLAP_REFERENCE_RETRIED": "1"})
    print("skipped: torch and transformers are not there (tools/check.sh --with-torch puts them into .venv)")
    sys.exit(77)
sys.path[:0] = [str(ROOT / "bench" / "peers"), str(ROOT / "bench" / "gpu")]
import torch_model  # noqa: E402
import shapes  # noqa: E402
import torch  # noqa: E402
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402

SIZES = {  # hidden, layers, intermediate, heads, kv heads, vocabulary; sequence, batch, learning rate
    "cuda": ((512, 4, 1376, 8, 4, 2048), 256, 4, 5e-4),
    "cpu": ((64, 3, 160, 4, 2, 384), 48, 4, 2e-3),
}
MICRO_BATCHES = 2
WARMUP, DECAY, CLIP = 4, 0.1, 0.5
BETAS, EPSILON = (0.9, 0.95), 1e-8
FP32_LIMIT = 1e-4
TORCH_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


# ---- FLAP's order of sequences (base/philox.c, io/formats/dataset.c) ----

M32, M64 = (1 << 32) - 1, (1 << 64) - 1


def philox_block(key, counter):
    c = [counter & M32, counter >> 32 & M32, 0, 0]
    k0, k1 = key
    for _ in range(10):
        product0, product1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [product1 >> 32 ^ c[1] ^ k0, product1 & M32, product0 >> 32 ^ c[3] ^ k1, product0 & M32]
        k0, k1 = (k0 + 0x9E3779B9) & M32, (k1 + 0xBB67AE85) & M32
    return c


def mix(x):
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & M64
    x = (x ^ x >> 27) * 0x94D049BB133111EB & M64
    return x ^ x >> 31


def philox_stream(seed, name):
    digest = 0xCBF29CE484222325
    for byte in name.encode():
        digest = (digest ^ byte) * 0x100000001B3 & M64
    key = mix(mix((seed + 0x9E3779B97F4A7C15) & M64) ^ digest)
    return key & M32, key >> 32


def permute(seed, epoch, count, index):
    rounds = tuple(philox_block(philox_stream(seed, "dataset order"), epoch)[:2])
    bits = 3
    while 1 << 2 * bits < count:
        bits += 1
    mask = (1 << bits) - 1
    while True:
        left, right = index >> bits, index & mask
        for number in range(6):
            left, right = right, left ^ philox_block(rounds, number << 32 | right)[0] & mask
        index = left << bits | right
        if index < count:
            return index


# ---- model and data ----


def make_tokens(count, vocabulary, seed):
    """Every token follows from the one before it most of the time: something that can be learnt in a few steps."""
    draw = random.Random(seed)
    after = [draw.randrange(vocabulary) for _ in range(vocabulary)]
    tokens = [0]
    while len(tokens) < count:
        tokens.append(after[tokens[-1]] if draw.random() < 0.7 else int(vocabulary * draw.random() ** 2))
    return tokens


class Case:
    """A model and its data in a folder, and the batches in FLAP's order."""

    def __init__(self, options, kind):
        size, self.sequence, self.batch, self.rate = SIZES[options.sizes]
        self.options, self.kind, self.steps = options, kind, options.steps
        self.shape = getattr(shapes, kind)(*size, max_position_embeddings=2 * self.sequence)
        self.folder = os.path.join(options.out, kind)
        os.makedirs(self.folder, exist_ok=True)
        self.per_step = MICRO_BATCHES * self.batch
        # One epoch and a third: the permutations of two epochs are needed.
        self.sequences = max(self.steps * self.per_step * 3 // 4, 1)
        self.tokens = make_tokens(self.sequences * self.sequence + 1, self.shape["vocab_size"], options.seed)
        self.shard = os.path.join(self.folder, "tokens.bin")
        shapes.write_shard(self.shard, self.tokens, self.shape["vocab_size"])
        torch.manual_seed(options.seed)
        model = torch_model.build(self.shape, "eager")
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:  # norms and biases, that a mistake in them is seen
                    parameter.add_(0.1 * torch.randn(parameter.shape))
        model.save_pretrained(os.path.join(self.folder, "model"))
        self.weights = {name: value.clone() for name, value in model.state_dict().items()}

    def batches(self, shuffled=True):
        """Per step (M, B, S+1), in FLAP's order, or in that of the file."""
        stream = torch.tensor(self.tokens)
        for step in range(self.steps):
            numbers = range(step * self.per_step, (step + 1) * self.per_step)
            order = [permute(self.options.seed, n // self.sequences, self.sequences, n % self.sequences) if shuffled
                     else n % self.sequences for n in numbers]
            windows = torch.stack([stream[n * self.sequence:(n + 1) * self.sequence + 1] for n in order])
            yield windows.view(MICRO_BATCHES, self.batch, self.sequence + 1).to(self.options.device)

    def flap(self, dtype):
        """FLAP's losses and norms, or None when it says that it does not know the model type or the dtype."""
        output = os.path.join(self.folder, f"flap-{dtype}")
        keys = {"model_name_or_path": os.path.join(self.folder, "model"), "dataset": self.shard, "cutoff_len": self.sequence,
                "per_device_train_batch_size": self.batch, "gradient_accumulation_steps": MICRO_BATCHES, "val_size": 0,
                "max_steps": self.steps, "learning_rate": self.rate, "lr_scheduler_type": "constant_with_warmup",
                "warmup_steps": WARMUP, "weight_decay": DECAY, "max_grad_norm": CLIP, "adam_beta1": BETAS[0],
                "adam_beta2": BETAS[1], "adam_epsilon": EPSILON, "bf16": dtype == "bf16", "seed": self.options.seed,
                "logging_steps": 1, "save_strategy": "no", "export": "none", "output_dir": output, "vram": self.options.vram,
                "ram": self.options.ram, "overwrite_output_dir": True, "device": self.options.device}
        if dtype == "fp16":
            keys["fp16"] = True
        if self.options.device == "cpu":
            keys["expert"] = {"threads": 1}  # tiny products, on cores that other tests want as well
        path = os.path.join(self.folder, f"{dtype}.yaml")
        with open(path, "w") as file:
            file.writelines(f"{key}: {json.dumps(value)}\n" for key, value in keys.items())
        done = subprocess.run([self.options.flap, "train", path], capture_output=True, text=True, timeout=500)
        unknown = "model_type" if dtype == "fp32" else "fp16"
        if done.returncode != 0 and unknown in done.stderr and "support" in done.stderr:
            print(f"{self.kind}, {dtype}: {done.stderr.strip()}")
            return None
        if done.returncode != 0:
            sys.exit(f"parity: flap train {path} failed: {done.stderr.strip()}")
        with open(os.path.join(output, "metrics.jsonl")) as lines:
            entries = [entry for entry in map(json.loads, lines) if "loss" in entry]
        if [entry["step"] for entry in entries] != list(range(1, self.steps + 1)):
            sys.exit(f"parity: {output}/metrics.jsonl does not hold {self.steps} steps")
        if any(entry["loss"] is None for entry in entries):
            sys.exit(f"parity: {output}/metrics.jsonl has losses that are not finite")
        return [entry["loss"] for entry in entries], [entry["grad_norm"] for entry in entries]


# ---- training in PyTorch ----


class Variant:
    def __init__(self, name, attention="causal", backend=None, sums="fp32", autocast=False, reduced=True, rate=1.0,
                 shuffled=True):
        self.name, self.attention, self.backend, self.sums = name, attention, backend, sums
        self.autocast, self.reduced, self.rate, self.shuffled = autocast, reduced, rate, shuffled


def variants(device):
    """PyTorch's own ways to the same curve."""
    found = [Variant("default attention"), Variant("eager attention", attention="eager"),
             Variant("math attention", backend=SDPBackend.MATH),
             Variant("gradients summed in the dtype", sums="dtype"),
             Variant("autocast over fp32 weights", autocast=True)]
    if device == "cuda":
        found += [Variant("flash attention", backend=SDPBackend.FLASH_ATTENTION),
                  Variant("cuDNN attention", backend=SDPBackend.CUDNN_ATTENTION),
                  Variant("reductions in fp32 only", reduced=False)]
    return found


class Torch:
    """One training. `parameters` are the fp32 masters; the model's own are them, or their copies in the dtype."""

    def __init__(self, case, dtype, variant):
        self.case, self.variant, self.dtype = case, variant, TORCH_DTYPES[dtype]
        self.device = case.options.device
        self.model = torch_model.build(case.shape, variant.attention)
        self.model.load_state_dict(case.weights)
        self.model.to(self.device)
        self.copied = self.dtype != torch.float32 and not variant.autocast
        if self.copied:
            self.parameters = [each.detach().clone() for each in self.model.parameters()]
            self.model.to(self.dtype)
        else:
            self.parameters = list(self.model.parameters())
        decays = [each for each in self.parameters if each.dim() == 2]
        others = [each for each in self.parameters if each.dim() != 2]
        self.optimizer = torch.optim.AdamW([{"params": decays, "weight_decay": DECAY}, {"params": others, "weight_decay": 0.0}],
                                           lr=case.rate, betas=BETAS, eps=EPSILON, foreach=False)
        self.scale = 65536.0 if self.dtype == torch.float16 else 1.0
        self.norms, self.updates = [], 0

    def contexts(self):
        stack = contextlib.ExitStack()
        if self.variant.backend is not None:
            stack.enter_context(sdpa_kernel(self.variant.backend))
        if self.variant.autocast:
            stack.enter_context(torch.autocast(self.device, dtype=self.dtype))
        return stack

    def backward(self, windows):
        """The mean loss; leaves the gradients of the scaled loss, summed over micro-batches, in the masters."""
        own = list(self.model.parameters())
        sums = [torch.zeros_like(each) for each in self.parameters]
        total = 0.0
        for window in windows:
            with self.contexts():
                loss = torch_model.loss_of(self.model, window[:, :-1].contiguous(), window[:, 1:].contiguous())
            (loss * (self.scale / MICRO_BATCHES)).backward()
            total += loss.item() / MICRO_BATCHES
            if self.variant.sums == "fp32":
                for each, parameter in zip(sums, own):
                    each.add_(parameter.grad.float())
                    parameter.grad = None
        if self.variant.sums != "fp32":
            for each, parameter in zip(sums, own):
                each.copy_(parameter.grad)
                parameter.grad = None
        for each, master in zip(sums, self.parameters):
            master.grad = each.div_(self.scale)
        return total

    def step(self, windows):
        if self.copied:
            with torch.no_grad():
                for copy, master in zip(self.model.parameters(), self.parameters):
                    copy.copy_(master)
        loss = self.backward(windows)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, CLIP).item()
        self.norms.append(norm)
        for group in self.optimizer.param_groups:
            group["lr"] = self.variant.rate * self.case.rate * min(1.0, self.updates / WARMUP)
        if math.isfinite(norm):
            self.optimizer.step()
            self.updates += 1  # what is skipped does not count for the learning rate
        elif self.dtype == torch.float16:
            self.scale /= 2
        else:
            sys.exit(f"parity: PyTorch's gradients in step {len(self.norms)} are not finite")
        self.optimizer.zero_grad(set_to_none=True)
        return loss

    def losses(self):
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = self.variant.reduced
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = self.variant.reduced
        return [self.step(windows) for windows in self.case.batches(self.variant.shuffled)]


# ---- comparing ----


def relative(ours, theirs):
    return max(abs(a - b) / abs(b) for a, b in zip(ours, theirs))


def distance(a, b):
    return math.sqrt(sum((x - y) ** 2 for x, y in zip(a, b)) / len(a))


class Table:
    def __init__(self):
        self.rows, self.failed, self.compared = [], False, 0

    def add(self, what, value, relation, limit):
        good = value <= limit if relation == "<=" else value > limit
        self.failed, self.compared = self.failed or not good, self.compared + 1
        self.rows.append(f"{what:58} {value:10.2e} {relation:>2} {limit:8.2e}  {'ok' if good else 'FAILED'}")

    def absent(self, what):
        self.rows.append(f"{what:58} not there in this flap")


def compare_fp32(case, table):
    """False when the model type is not there."""
    found = case.flap("fp32")
    if found is None:
        table.absent(f"{case.kind}")
        return False
    ours, norms = found
    peer = Torch(case, "fp32", Variant("fp32"))
    theirs = peer.losses()
    print(f"{case.kind}, fp32, {'step':>4} {'FLAP':>11} {'PyTorch':>11} {'relative':>9} {'norm, FLAP':>11} {'PyTorch':>11}")
    for number, (a, b, c, d) in enumerate(zip(ours, theirs, norms, peer.norms)):
        print(f"{'':{len(case.kind) + 7}}{number + 1:4} {a:11.7f} {b:11.7f} {abs(a - b) / b:9.1e} {c:11.6f} {d:11.6f}")
    table.add(f"{case.kind}, fp32: largest relative difference of a loss", relative(ours, theirs), "<=", FP32_LIMIT)
    # Two steps of the same weights, for the learning rate of the first is 0.
    table.add(f"{case.kind}, fp32: of the first two gradient norms", relative(norms[:2], peer.norms[:2]), "<=", FP32_LIMIT)
    other = Torch(case, "fp32", Variant("other order", shuffled=False)).losses()
    table.add(f"{case.kind}, fp32: canary, other sequences", relative(other, theirs), ">", FP32_LIMIT)
    # Neither says anything of clipping or of learning unless both happen.
    table.add(f"{case.kind}, fp32: share of steps that were clipped", sum(n > CLIP for n in norms) / len(norms), ">", 0.2)
    table.add(f"{case.kind}, fp32: fall of the loss, nats", ours[0] - ours[-1], ">", 0.1)
    return True


def compare_rounded(case, dtype, table):
    found = case.flap(dtype)
    if found is None:
        table.absent(f"{case.kind}, {dtype}")
        return
    ours, _ = found
    curves = {}
    for variant in variants(case.options.device):
        try:
            curves[variant.name] = Torch(case, dtype, variant).losses()
        except RuntimeError as error:
            print(f"{case.kind}, {dtype}, {variant.name}: PyTorch cannot: {str(error).splitlines()[0]}")
    if len(curves) < 3:
        sys.exit(f"parity: only {len(curves)} of PyTorch's ways work in {dtype}: nothing to measure a spread with")
    mean = [sum(values) / len(values) for values in zip(*curves.values())]
    spread = max(distance(a, b) for a in curves.values() for b in curves.values())
    for name, curve in {**curves, "FLAP": ours}.items():
        print(f"{case.kind}, {dtype}, {name:32} from the mean {distance(curve, mean):.2e}, at most "
              f"{max(abs(a - b) for a, b in zip(curve, mean)):.2e}; last loss {curve[-1]:.5f}")
    title = f"{case.kind}, {dtype}"
    table.add(f"{title}: FLAP from the mean of {len(curves)} PyTorch curves", distance(ours, mean), "<=", spread)
    other = Torch(case, dtype, Variant("other rate", rate=1.2)).losses()
    table.add(f"{title}: canary, learning rate 20% higher", distance(other, mean), ">", spread)


def run(options):
    table = Table()
    for kind in options.models.split(","):
        case = Case(options, kind)
        dtypes = options.dtypes.split(",")
        if compare_fp32(case, table):
            for dtype in ("bf16", "fp16"):
                if dtype in dtypes:
                    compare_rounded(case, dtype, table)
    print()
    print("\n".join(table.rows))
    return 1 if table.failed or table.compared == 0 else 0


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--flap", default="build/tools/flap")
    parser.add_argument("--out", help="a folder for models, data and runs; none: a temporary one")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--models", default="llama,qwen2")
    parser.add_argument("--dtypes", default="fp32,bf16,fp16", help="fp32 is always compared")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--sizes", choices=tuple(SIZES), help="those of --device by default")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--vram", help="6GiB on a GPU, 256MiB on the CPU by default")
    parser.add_argument("--ram")
    options = parser.parse_args()
    options.flap, options.sizes = os.path.abspath(options.flap), options.sizes or options.device
    options.vram = options.vram or ("6GiB" if options.device == "cuda" else "256MiB")
    options.ram = options.ram or ("8GiB" if options.device == "cuda" else "256MiB")
    if not os.path.isfile(options.flap):
        print(f"skipped: {options.flap} is not there")
        sys.exit(77)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("skipped: PyTorch finds no GPU")
        sys.exit(77)
    torch.set_float32_matmul_precision("highest")
    if options.device == "cpu":
        torch.set_num_threads(1)
    with contextlib.ExitStack() as stack:
        options.out = os.path.abspath(options.out or stack.enter_context(tempfile.TemporaryDirectory(prefix="flap-parity-")))
        os.makedirs(options.out, exist_ok=True)
        sys.exit(run(options))


if __name__ == "__main__":
    main()
