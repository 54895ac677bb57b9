#!/usr/bin/env python3
"""Our checkpoints in the libraries of others: safetensors reads every file, and transformers loads the model.

Usage: weights_reference.py <write_model program>

Runs itself with the Python of $FLAP_VENV or of .venv in the current folder if this one lacks the library. What needs
transformers is left out, and said, where that is not installed. Exit status 77: the safetensors library is nowhere.
"""
import json
import math
import os
import pathlib
import struct
import subprocess
import sys
import tempfile

try:
    import numpy
    import safetensors
except ImportError:
    interpreter = pathlib.Path(os.environ.get("FLAP_VENV") or ".venv") / "bin" / "python"
    if interpreter.exists() and "FLAP_REFERENCE_RETRIED" not in os.environ:
        os.environ["FLAP_REFERENCE_RETRIED"] = "1"
        os.execv(interpreter, [str(interpreter), *sys.argv])
    print("skipped: the safetensors package is not there (neither here nor in $FLAP_VENV)")
    sys.exit(77)

NUMPY = {"F32": numpy.float32, "I16": numpy.int16, "I8": numpy.int8, "U8": numpy.uint8, "BF16": numpy.uint16, "F16": numpy.float16}


def read(path):
    """{name: (dtype, array)} by the library; bf16 as its bits."""
    tensors = {}
    for name, found in safetensors.deserialize(pathlib.Path(path).read_bytes()):
        tensors[name] = found["dtype"], numpy.frombuffer(found["data"], NUMPY[found["dtype"]]).reshape(found["shape"])
    return tensors


def wanted_shapes(config):
    d, f, v = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    q, kv = (config[heads] * config["head_dim"] for heads in ("num_attention_heads", "num_key_value_heads"))
    shapes = {"model.embed_tokens.weight": (v, d), "model.norm.weight": (d,)}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (v, d)
    for layer in range(config["num_hidden_layers"]):
        parts = {"input_layernorm.weight": (d,), "post_attention_layernorm.weight": (d,),
                 "self_attn.q_proj.weight": (q, d), "self_attn.k_proj.weight": (kv, d),
                 "self_attn.v_proj.weight": (kv, d), "self_attn.o_proj.weight": (d, q),
                 "mlp.gate_proj.weight": (f, d), "mlp.up_proj.weight": (f, d), "mlp.down_proj.weight": (d, f)}
        if config.get("attention_bias") or config["model_type"] == "qwen2":
            parts |= {"self_attn.q_proj.bias": (q,), "self_attn.k_proj.bias": (kv,), "self_attn.v_proj.bias": (kv,)}
        if config.get("attention_bias"):
            parts |= {"self_attn.o_proj.bias": (d,)}
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in parts.items()}
    return shapes


def moment_files(optim):
    """Name to dtype, how many elements share a value, and which tensors are in it."""
    everything = lambda key: True
    if optim == "adamw":
        return {"optimizer-exp_avg": ("F32", 1, everything), "optimizer-exp_avg_sq": ("F32", 1, everything)}
    embedding = lambda key: key == "model.embed_tokens.weight"
    rest = lambda key: not embedding(key)
    return {"optimizer-exp_avg": ("F32", 1, embedding), "optimizer-exp_avg_sq": ("F32", 1, embedding),
            "optimizer-exp_avg-codes": ("I8", 1, rest), "optimizer-exp_avg_sq-codes": ("U8", 1, rest),
            "optimizer-exp_avg-largest": ("F32", 256, rest), "optimizer-exp_avg_sq-largest": ("F32", 256, rest)}


def check_files(folder, dtype, optim):
    checkpoint = folder / "checkpoint-1"
    config = json.loads((checkpoint / "config.json").read_text())
    shapes = wanted_shapes(config)
    moments = moment_files(optim)
    names = ["model", *moments]
    names += {"BF16": ["optimizer-low"], "F16": ["optimizer-master"], "F32": []}[dtype]
    files = {name: read(checkpoint / f"{name}.safetensors") for name in names}
    for name, tensors in files.items():
        found = {key: array.shape for key, (_, array) in tensors.items()}
        _, block, has = moments.get(name, ("", 1, lambda key: True))
        wanted = {key: shape if block == 1 else (-(-math.prod(shape) // block),) for key, shape in shapes.items()
                  if has(key)}
        assert found == wanted, (name, set(found) ^ set(shapes))
    assert len(list(checkpoint.glob("*.safetensors"))) == len(names)
    assert json.loads((checkpoint / "trainer_state.json").read_text())["optim"] == optim
    assert {t for t, _ in files["model"].values()} == {dtype}
    with safetensors.safe_open(checkpoint / "model.safetensors", "np") as opened:
        assert opened.metadata()["format"] == "pt"
    for name, (wanted, _, _) in moments.items():
        assert all(t == wanted and not array.any() for t, array in files[name].values())
    for key, (_, high) in files["model"].items():
        master = high
        if dtype == "BF16":
            low_dtype, low = files["optimizer-low"][key]
            assert low_dtype == "I16"
            bits = (high.astype(numpy.int64) << 16) + low
            master = bits.astype(numpy.uint32).view(numpy.float32)
            away = (bits + 0x8000) >> 16
            assert (away == high).all(), key
        elif dtype == "F16":
            master_dtype, master = files["optimizer-master"][key]
            assert master_dtype == "F32" and (master.astype(numpy.float16) == high).all(), key
        if key.endswith("norm.weight"):
            assert (master == 1).all(), key
        elif key.endswith(".bias"):
            assert (master == 0).all(), key
        elif master.size > 2000:
            assert abs(master.std() / config["initializer_range"] - 1) < 0.1 and abs(master.mean()) < 0.003, key
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    merged = {}
    for shard in set(index["weight_map"].values()):
        tensors = read(folder / shard)
        assert all(index["weight_map"][key] == shard for key in tensors)
        merged |= tensors
    assert set(merged) == set(files["model"]) and len(set(index["weight_map"].values())) > 2
    for key, (t, array) in merged.items():
        assert t == dtype and array.tobytes() == files["model"][key][1].tobytes(), key
    assert index["metadata"]["total_size"] == sum(array.nbytes for _, array in merged.values())
    with open(checkpoint / "model.safetensors", "rb") as opened:
        assert struct.unpack("<Q", opened.read(8))[0] % 8 == 0
    return files["model"]


def check_transformers(folder, tensors, family):
    import torch
    import transformers
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder / "checkpoint-1", dtype="auto", output_loading_info=True)
    assert model.config.model_type == family
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"], report
    state = model.state_dict()
    for key, (dtype, array) in tensors.items():
        assert state[key].dtype == {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}[dtype]
        bits = state[key].view(torch.int32 if dtype == "F32" else torch.int16).numpy()
        assert bits.tobytes() == array.tobytes(), key
    assert model.config.eos_token_id == 256
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "checkpoint-1")
    assert tokenizer("ab").input_ids == [97, 98]


def main():
    program = sys.argv[1]
    try:
        import torch  # noqa: F401
        import transformers  # noqa: F401
        full = True
    except ImportError:
        full = False
    for family in ("llama", "mistral", "qwen2"):
        for dtype in ("bf16", "fp16", "fp32"):
            for tied, optim in (("0", "adamw"), ("1", "adamw"), ("0", "adamw_8bit"), ("1", "adamw_8bit")):
                with tempfile.TemporaryDirectory() as folder:
                    subprocess.run([program, family, dtype, optim, tied, folder], check=True)
                    name = {"bf16": "BF16", "fp16": "F16", "fp32": "F32"}[dtype]
                    tensors = check_files(pathlib.Path(folder), name, optim)
                    if full:
                        check_transformers(pathlib.Path(folder), tensors, family)
    print("ok" if full else "ok; transformers is not installed: what needs it was left out")


main()
