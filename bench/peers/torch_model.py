"""What the PyTorch peers share: the model of a shape out of transformers, its loss, random tokens, and the report.

Models come from a configuration, so nothing is downloaded. Their attention is scaled_dot_product_attention with is_causal and no
mask, whatever the version of transformers would build under torch.compile: a mask keeps PyTorch from its fast kernels.
"""
import argparse
import functools
import json
import os
import re
import resource
import statistics
import sys

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), os.pardir, "gpu"))
import shapes  # noqa: E402
import torch  # noqa: E402
import torch.utils.checkpoint  # noqa: E402
import transformers  # noqa: E402

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

UNITS = {"GiB": 1 << 30, "MiB": 1 << 20, "GB": 10**9, "MB": 10**6}


def causal_attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
    """(B, H, S, HD) in, (B, S, H, HD) out, as transformers wants it of an attention function."""
    out = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling,
                                                           enable_gqa=query.shape[1] != key.shape[1])
    return out.transpose(1, 2), None


def no_mask(*arguments, **keywords):
    return None


def register():
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface
    AttentionInterface.register("causal", causal_attention)
    AttentionMaskInterface.register("causal", no_mask)


register()


def build(shape, attention="causal", counted=True):
    """The model on the default device in the default dtype, with random weights, ready to train. Its parameters are `counted`
    against the shape's."""
    keys = dict(shape)
    kind, theta = keys.pop("model_type"), keys.pop("rope_theta")
    if int(transformers.__version__.split(".")[0]) >= 5:
        keys["rope_parameters"] = {"rope_type": "default", "rope_theta": theta}
    else:
        keys["rope_theta"] = theta
    config_class, model_class = {"llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
                                 "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM)}[kind]
    config = config_class(**keys, use_cache=False)
    config._attn_implementation = attention
    model = model_class(config)
    model.train()
    count = sum(each.numel() for each in model.parameters())
    if counted and count != shapes.parameters(shape):
        sys.exit(f"the model has {count} parameters, its shape {shapes.parameters(shape)}")
    return model


def loss_of(model, tokens, targets):
    """Mean over all positions, as FLAP's: tokens and targets (B, S) are windows that are one token apart."""
    logits = model(input_ids=tokens, use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def checkpoint_layers(model):
    """Of each layer only its input is kept for the backward."""
    for layer in model.model.layers:
        layer.forward = functools.partial(torch.utils.checkpoint.checkpoint, layer.forward, use_reentrant=False,
                                          preserve_rng_state=False)


def random_windows(shape, micro_batches, batch, sequence, device, seed=1):
    """One optimizer step's tokens and targets, (M, B, S) each: every step trains on the same ones."""
    generator = torch.Generator().manual_seed(seed)
    windows = torch.randint(shape["vocab_size"], (micro_batches, batch, sequence + 1), generator=generator).to(device)
    return windows[:, :, :-1].contiguous(), windows[:, :, 1:].contiguous()


def synchronize(device):
    if device == "cuda":
        torch.cuda.synchronize()


def device_name(device):
    return torch.cuda.get_device_name() if device == "cuda" else "cpu"


def add_shape_arguments(parser, batch, sequence, micro_batches, steps):
    parser.add_argument("shape", choices=list(shapes.SHAPES))
    parser.add_argument("--batch", type=int, default=batch, help="sequences in a micro-batch")
    parser.add_argument("--sequence", type=int, default=sequence)
    parser.add_argument("--micro-batches", type=int, default=micro_batches, help="per optimizer step")
    parser.add_argument("--steps", type=int, default=steps, help="timed steps")
    parser.add_argument("--device", default="cuda", help="cpu is for trying the script")
    parser.add_argument("--json", help="a file for the record")


def bytes_of(text):
    found = re.fullmatch(r"([\d.]+)\s*(GiB|MiB|GB|MB)", text)
    if not found:
        raise argparse.ArgumentTypeError(f"{text} is no size like 18GiB")
    return float(found[1]) * UNITS[found[2]]


def add_offload_arguments(parser):
    """What the peers that offload share beside the shape."""
    parser.add_argument("--vram", type=bytes_of, help="most that PyTorch's allocator may take of the GPU, for example 18GiB")
    parser.add_argument("--then", type=int, action="append", default=[], metavar="MICRO_BATCHES",
                        help="afterwards time steps of so many micro-batches too; again for more")
    parser.add_argument("--warmup", type=int, default=1, help="steps before those that are timed")


def cap_memory(options):
    """Caps what PyTorch's allocator takes of the GPU. What the driver takes for the context is beside that."""
    if options.vram:
        everything = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, options.vram / everything))


def series_of(options):
    """The options of each series of steps: those given, then with the micro-batches and a JSON file of each --then."""
    for micro_batches in [options.micro_batches, *options.then]:
        own = argparse.Namespace(**vars(options))
        own.micro_batches = micro_batches
        if options.json and micro_batches != options.micro_batches:
            stem, extension = os.path.splitext(options.json)
            own.json = f"{stem}-{micro_batches}{extension}"
        yield own


def host_bytes():
    """(most that this process had resident, what the whole machine has in use now). Pinned memory that the driver made may be in
    the second one only."""
    with open("/proc/meminfo") as file:
        found = {line.split(":")[0]: int(line.split()[1]) << 10 for line in file}
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10, found["MemTotal"] - found["MemAvailable"]


def report(options, title, seconds, losses, **more):
    """Prints the lines and writes the record of a series of steps."""
    shape = shapes.shape_of(options.shape)
    median = statistics.median(seconds)
    rate = options.micro_batches * options.batch * options.sequence / median
    usual, matmul = shapes.mfu(shape, options.sequence, rate)
    peak = torch.cuda.max_memory_allocated() if options.device == "cuda" else 0
    reserved = torch.cuda.max_memory_reserved() if options.device == "cuda" else 0
    resident, machine = host_bytes()
    free, everything = torch.cuda.mem_get_info() if options.device == "cuda" else (0, 0)
    record = {"peer": title, "shape": options.shape, "device_name": device_name(options.device), "torch": torch.__version__,
              "transformers": transformers.__version__, "parameters": shapes.parameters(shape), "batch": options.batch,
              "sequence": options.sequence, "micro_batches": options.micro_batches, "step_seconds": median,
              "step_seconds_least": min(seconds), "step_seconds_most": max(seconds), "steps": len(seconds),
              "tokens_per_second": rate, "mfu": usual, "mfu_matmul": matmul, "peak_bytes": peak,
              "reserved_bytes": reserved, "gpu_used_bytes": everything - free, "host_resident_bytes": resident,
              "host_used_bytes": machine, "losses": losses, **more}
    print(f"{title}, {options.shape}: {record['parameters']:,} parameters, {options.micro_batches} micro-batches of "
          f"{options.batch} x {options.sequence}, on {record['device_name']}, torch {torch.__version__}")
    print(f"median step {median:.4f} s ({min(seconds):.4f} to {max(seconds):.4f}, {len(seconds)} steps), {rate:,.0f} tokens/s, "
          f"MFU {usual:.1%} (without the looked-up embedding {matmul:.1%})")
    print(f"memory of the GPU: {peak / 2**30:.2f} GiB allocated, {reserved / 2**30:.2f} GiB reserved at most, "
          f"{(everything - free) / 2**30:.2f} GiB in use with the context; of the host: {resident / 2**30:.1f} GiB resident at "
          f"most, {machine / 2**30:.1f} GiB of the machine in use")
    print(f"losses {' '.join(f'{loss:.4f}' for loss in losses)}")
    if options.json:
        with open(options.json, "w") as file:
            json.dump(record, file, indent=1)
    return record
