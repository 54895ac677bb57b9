"""PyTorch and transformers training in core on one GPU: the fastest setting that fits.

  python3 bench/peers/torch_in_core.py 1b [--batch 8] [--sequence 2048] [--micro-batches 1] [--steps 10]
          [--compile whole|layers|no] [--no-compile] [--mode MODE] [--checkpointing] [--clip 1.0] [--json FILE] [--device cpu]

What differs from FLAP, all in the peer's favour: weights, gradients and both moments are bf16 with no fp32 master (8 bytes per
parameter where FLAP holds 12 and a gradient), gradients are summed in bf16, and they are not clipped unless --clip asks for it.
The model is torch.compile'd as a whole; `layers` compiles one layer and uses it for all, which starts sooner. A run that does not
fit is tried again with every layer checkpointed; the record says which one it was. The step is forward and backward of every
micro-batch and a fused AdamW; three steps warm up, each timed step ends with a synchronisation.
"""
import argparse
import gc
import sys
import time

import torch_model  # first: it sets the environment of transformers
import torch

WARMUP_STEPS = 3


def make(options, checkpointing):
    """(loss function, parameters, optimizer), all on the device in bf16."""
    torch.manual_seed(1)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(options.device):
        model = torch_model.build(torch_model.shapes.shape_of(options.shape))
    torch.set_default_dtype(torch.float32)
    if options.compile == "layers":
        for layer in model.model.layers:  # inside of the checkpoint, so that all of them are one piece of code
            layer.forward = torch.compile(layer.forward, mode=options.mode)
    if checkpointing:
        torch_model.checkpoint_layers(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, fused=True)
    loss_of = lambda tokens, targets: torch_model.loss_of(model, tokens, targets)
    if options.compile == "whole":
        loss_of = torch.compile(loss_of, mode=options.mode)
    return loss_of, list(model.parameters()), optimizer


def step(options, loss_of, parameters, optimizer, tokens, targets):
    total = 0.0
    for micro_batch in range(options.micro_batches):
        loss = loss_of(tokens[micro_batch], targets[micro_batch]) / options.micro_batches
        loss.backward()
        total = total + loss.detach()
    if options.clip > 0:
        torch.nn.utils.clip_grad_norm_(parameters, options.clip, foreach=True)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return total


def measure(options, checkpointing):
    """(seconds of each timed step, its losses, seconds of making and warming up)."""
    began = time.perf_counter()
    loss_of, parameters, optimizer = make(options, checkpointing)
    tokens, targets = torch_model.random_windows(torch_model.shapes.shape_of(options.shape), options.micro_batches,
                                                 options.batch, options.sequence, options.device)
    seconds, losses = [], []
    for number in range(WARMUP_STEPS + options.steps):
        torch_model.synchronize(options.device)
        start = time.perf_counter()
        loss = step(options, loss_of, parameters, optimizer, tokens, targets)
        torch_model.synchronize(options.device)
        if number >= WARMUP_STEPS:
            seconds.append(time.perf_counter() - start)
        elif number == WARMUP_STEPS - 1:
            warm = time.perf_counter() - began
        losses.append(loss.item())
    return seconds, losses, warm


def fits(options, checkpointing):
    """What measure returns, or None when the GPU is too small for it."""
    try:
        return measure(options, checkpointing)
    except torch.OutOfMemoryError as error:
        print(f"checkpointing {checkpointing}: does not fit: {str(error).splitlines()[0]}", flush=True)
        return None


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    torch_model.add_shape_arguments(parser, batch=8, sequence=2048, micro_batches=1, steps=10)
    parser.add_argument("--compile", choices=("whole", "layers", "no"), default="whole")
    parser.add_argument("--no-compile", dest="compile", action="store_const", const="no")
    parser.add_argument("--mode", default="default", help="of torch.compile, for example max-autotune-no-cudagraphs")
    parser.add_argument("--checkpointing", action="store_true", help="at once, instead of only where it does not fit")
    parser.add_argument("--clip", type=float, default=0.0, help="the global norm that gradients are clipped to; 0: not")
    options = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = True
    for checkpointing in [True] if options.checkpointing else [False, True]:
        result = fits(options, checkpointing)
        if result is not None:
            break
        gc.collect()
        if options.device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        torch.compiler.reset()
    else:
        sys.exit("torch_in_core: it does not fit, checkpointed either: take a smaller batch")
    seconds, losses, warm = result
    torch_model.report(options, "PyTorch in core", seconds, losses, compile=options.compile, mode=options.mode,
                       checkpointing=checkpointing, clip=options.clip, warm_seconds=warm)
    print(f"compile {options.compile}, checkpointing {'yes' if checkpointing else 'no'}, clip {options.clip:g}; "
          f"{warm:.0f} s to build, compile and warm up")


if __name__ == "__main__":
    main()
