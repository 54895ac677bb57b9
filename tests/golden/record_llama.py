#!/usr/bin/env python3
"""Records what transformers and PyTorch compute, in fp32 on the CPU, for tiny models of the Llama family.

    python tests/golden/record_llama.py [output folder]

Needs torch, transformers and safetensors. Writes one Hugging Face folder per model (config.json, model.safetensors) and,
beside it, what is expected of it: expected.safetensors and expected.json. README.md in this folder describes them.
Everything follows from the seeds below, so a second run with the same versions writes the same bytes.
"""

import json
import platform
import sys
from pathlib import Path

import numpy
import safetensors
import torch
import transformers
from safetensors.torch import save_file
from transformers import (
    LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, get_cosine_schedule_with_warmup,
)

NOT_COUNTED = -100
BATCH = 2
MICRO_BATCHES = 2
STEPS = 10
TRAINING = {
    "optimizer": "torch.optim.AdamW",
    "learning_rate": 1e-2,
    "adam_beta1": 0.9,
    "adam_beta2": 0.95,
    "adam_epsilon": 1e-8,
    "weight_decay": 0.1,
    "decayed": "tensors of two dimensions",
    "max_grad_norm": 1.0,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 3,
    "max_steps": STEPS,
    "gradient_accumulation_steps": MICRO_BATCHES,
    "per_device_train_batch_size": BATCH,
}
# Kept whole after the last step; the others by their checksums.
FINAL_TENSORS = [
    "model.embed_tokens.weight",
    "model.norm.weight",
    "model.layers.0.self_attn.k_proj.weight",
    "model.layers.1.input_layernorm.weight",
    "model.layers.1.self_attn.k_proj.bias",
]

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 100.0,  # so that some wavelengths of 16 lie between the two thresholds
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}

FAMILIES = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen2": (Qwen2Config, Qwen2ForCausalLM)}

# By folder; the family is the first word of its name.
MODELS = {
    # Every matrix is a multiple of 4096 elements: neighbours are multiplied as one.
    "llama_mha": {
        "seed": 11,
        "sequence": 32,
        "config": dict(
            vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
            rms_norm_eps=1e-5, tie_word_embeddings=False,
        ),
    },
    "llama_tied": {
        "seed": 12,
        "sequence": 24,
        "config": dict(
            vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
            rms_norm_eps=1e-6, tie_word_embeddings=True,
            rope_parameters={"rope_type": "default", "rope_theta": 500.0},
        ),
    },
    # 8 query heads share 2 key heads; heads together are wider than the hidden size.
    "llama_gqa": {
        "seed": 13,
        "sequence": 37,
        "config": dict(
            vocab_size=67, hidden_size=40, intermediate_size=56, num_hidden_layers=2, num_attention_heads=8,
            num_key_value_heads=2, head_dim=8, rms_norm_eps=1e-5, tie_word_embeddings=False,
        ),
    },
    # q, k and v together are wider than gate and up together.
    "llama_rope3": {
        "seed": 14,
        "sequence": 40,
        "config": dict(
            vocab_size=64, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=16, rms_norm_eps=1e-5, tie_word_embeddings=False, rope_parameters=LLAMA3,
        ),
    },
    "llama_bias": {
        "seed": 15,
        "sequence": 28,
        "config": dict(
            vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, rms_norm_eps=1e-5, tie_word_embeddings=True, attention_bias=True,
            rope_parameters={"rope_type": "linear", "rope_theta": 1000.0, "factor": 2.0},
        ),
    },
    # 8 query heads share 4 key heads; q, k and v are multiples of 4096 elements, multiplied as one and have biases.
    "qwen2_gqa": {
        "seed": 16,
        "sequence": 30,
        "config": dict(
            vocab_size=59, hidden_size=64, intermediate_size=48, num_hidden_layers=2, num_attention_heads=8,
            num_key_value_heads=4, head_dim=16, rms_norm_eps=1e-6, tie_word_embeddings=True,
            rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
        ),
    },
}


def build(family, config, seed):
    """A model whose every parameter matters: norms differ from one, biases from zero."""
    make_config, make_model = FAMILIES[family]
    torch.manual_seed(seed)
    model = make_model(
        make_config(
            **config, max_position_embeddings=128, initializer_range=0.1, bos_token_id=None, eos_token_id=None,
            attn_implementation="eager", dtype=torch.float32,
        )
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    return model


def stream(vocabulary, length, seed):
    """Tokens with something to learn in them: a skewed choice, and often the successor of the token before."""
    random = numpy.random.default_rng(seed)
    weights = 1.0 / numpy.arange(1, vocabulary + 1)
    tokens = random.choice(vocabulary, size=length, p=weights / weights.sum())
    for i in range(1, length):
        if random.random() < 0.6:
            tokens[i] = (tokens[i - 1] * 3 + 1) % vocabulary
    return torch.from_numpy(tokens.astype(numpy.int64))


def loss_sum(model, tokens, targets):
    logits = model(input_ids=tokens).logits
    loss = torch.nn.functional.cross_entropy(
        logits.reshape(-1, logits.shape[-1]), targets.reshape(-1), ignore_index=NOT_COUNTED, reduction="sum"
    )
    return logits, loss


def record_gradients(model, vocabulary, sequence, seed, tensors):
    """One forward and backward; the last target of a row and some others are not counted."""
    tokens = stream(vocabulary, BATCH * sequence, seed).reshape(BATCH, sequence)
    targets = torch.roll(tokens, -1, dims=1)
    targets[:, -1] = NOT_COUNTED
    targets[0, 3:6] = NOT_COUNTED
    counted = int((targets != NOT_COUNTED).sum())

    model.zero_grad()
    logits, total = loss_sum(model, tokens, targets)
    loss = total / counted
    loss.backward()
    tensors["tokens"] = tokens.to(torch.int32)
    tensors["targets"] = targets.to(torch.int32)
    tensors["logits"] = logits.detach()
    for name, parameter in model.named_parameters():
        tensors[f"grad.{name}"] = parameter.grad.clone()
    return {"loss": loss.item(), "counted_tokens": counted}


def train(model, vocabulary, sequence, seed, tensors):
    """Ten steps; sample i reads stream[i·S .. i·S+S), and its targets are one further. Every target is counted."""
    samples = STEPS * MICRO_BATCHES * BATCH
    data = stream(vocabulary, samples * sequence + 1, seed)
    shape = (STEPS, MICRO_BATCHES, BATCH, sequence)
    tokens, targets = data[:-1].reshape(shape), data[1:].reshape(shape)
    tensors["train.stream"] = data.to(torch.int32)

    groups = [
        {"params": [p for p in model.parameters() if p.dim() == 2], "weight_decay": TRAINING["weight_decay"]},
        {"params": [p for p in model.parameters() if p.dim() != 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        groups, lr=TRAINING["learning_rate"], betas=(TRAINING["adam_beta1"], TRAINING["adam_beta2"]),
        eps=TRAINING["adam_epsilon"], foreach=False, fused=False,
    )
    schedule = get_cosine_schedule_with_warmup(optimizer, TRAINING["warmup_steps"], STEPS)

    steps = []
    for step in range(STEPS):
        optimizer.zero_grad()
        counted = int((targets[step] != NOT_COUNTED).sum())
        step_loss = 0.0
        for micro in range(MICRO_BATCHES):
            _, total = loss_sum(model, tokens[step, micro], targets[step, micro])
            loss = total / counted
            loss.backward()
            step_loss += loss.item()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), TRAINING["max_grad_norm"]).item()
        learning_rate = schedule.get_last_lr()[0]
        optimizer.step()
        schedule.step()
        steps.append({
            "loss": step_loss, "grad_norm": norm, "learning_rate": learning_rate, "counted_tokens": counted,
            "clipped": norm > TRAINING["max_grad_norm"],
        })
    clipped = sum(step["clipped"] for step in steps)
    assert clipped >= 3, f"{clipped} of {STEPS} steps are clipped: choose other data"

    final = {}
    for name, parameter in model.named_parameters():
        values = parameter.detach().double()
        final[name] = {"sum": values.sum().item(), "sum_of_squares": values.square().sum().item()}
        if name in FINAL_TENSORS:
            tensors[f"final.{name}"] = parameter.detach().clone()
    return {"steps": steps, "final": final}


def record(name, model_spec, folder):
    vocabulary = model_spec["config"]["vocab_size"]
    sequence, seed = model_spec["sequence"], model_spec["seed"]
    family = name.split("_")[0]
    model = build(family, model_spec["config"], seed)
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)

    loaded = FAMILIES[family][1].from_pretrained(folder, dtype=torch.float32)
    for (key, ours), theirs in zip(model.named_parameters(), loaded.parameters(), strict=True):
        assert torch.equal(ours, theirs), f"{name}: {key} did not survive saving"

    tensors = {}
    expected = {
        "versions": {
            "python": platform.python_version(), "torch": torch.__version__, "numpy": numpy.__version__,
            "transformers": transformers.__version__, "safetensors": safetensors.__version__,
        },
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "batch": BATCH,
        "sequence": sequence,
    }
    expected["forward"] = record_gradients(model, vocabulary, sequence, seed + 1000, tensors)
    expected["training"] = TRAINING | train(model, vocabulary, sequence, seed + 2000, tensors)
    save_file({key: value.contiguous() for key, value in tensors.items()}, folder / "expected.safetensors")
    (folder / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")

    clipped = sum(step["clipped"] for step in expected["training"]["steps"])
    losses = [step["loss"] for step in expected["training"]["steps"]]
    print(f"{name}: {expected['parameters']} parameters, loss {losses[0]:.4f} to {losses[-1]:.4f}, {clipped} steps clipped")


def main():
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    output = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent
    for name, model_spec in MODELS.items():
        folder = output / name
        folder.mkdir(parents=True, exist_ok=True)
        record(name, model_spec, folder)


if __name__ == "__main__":
    main()
