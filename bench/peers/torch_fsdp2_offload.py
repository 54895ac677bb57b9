"""PyTorch's own way to train what does not fit: FSDP2 with states in the host's memory and Adam on the CPU, one GPU.

  python3 bench/peers/torch_fsdp2_offload.py 3b [--batch 4] [--sequence 2048] [--micro-batches 4] [--steps 3]
          [--then 16] [--vram 18GiB] [--keep-weights] [--keep-gradients] [--reduce bf16] [--adam fused|foreach|plain]
          [--no-checkpointing] [--clip 1.0] [--json FILE] [--device cpu]

fully_shard over a mesh of one device, CPUOffloadPolicy with pinned memory, fp32 weights and moments on the host, bf16 for
computing, gradients reduced in fp32, every layer checkpointed. What lies on the host is 16 bytes per parameter (weight, gradient,
two moments). --vram caps what PyTorch's allocator takes of the GPU, as a share of it; what the driver takes for the context is
beside that, so the peer gets more than a FLAP run of that budget. One step warms up. Gradients of each micro-batch go to the host
and are summed there, as FSDP2 does it; --keep-gradients sums them on the GPU until the last one, where there is room for all, in
the type that --reduce says; with --keep-weights the bf16 weights stay on the GPU from the first micro-batch of a step to its last.
All three together move the least: 3.5 billion weights go up once a step and gradients down once, and fit 24 GiB. Memory of the host
is slow to get on a virtual machine, so run it with PYTORCH_ALLOC_CONF=pinned_use_cuda_host_register:True,pinned_num_register_threads:8.
"""
import argparse
import os
import sys
import tempfile
import time

import torch_model  # first: it sets the environment of transformers
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

SUM_TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def start(options, folder):
    """A process group of one, and the cap of the GPU's memory."""
    backend = "cuda:nccl,cpu:gloo" if options.device == "cuda" else "gloo"
    if options.device == "cuda":
        torch.cuda.set_device(0)
        torch_model.cap_memory(options)
    dist.init_process_group(backend, init_method=f"file://{os.path.join(folder, 'store')}", rank=0, world_size=1)
    return init_device_mesh(options.device, (1,))


def shard(model, mesh, options):
    policies = {"mesh": mesh, "offload_policy": CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda"),
                "mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=SUM_TYPES[options.reduce]),
                "reshard_after_forward": not options.keep_weights}
    for layer in model.model.layers:
        fully_shard(layer, **policies)
    fully_shard(model, **policies)


def fill(model, device):
    """Random weights, drawn on the device: drawing billions of them on one core of the host takes minutes."""
    generator = torch.Generator(device=device).manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            values = torch.empty(parameter.shape, device=device)
            if parameter.dim() == 2:
                values.normal_(0.0, 0.02, generator=generator)
            else:
                values.fill_(1.0)
            parameter.to_local().copy_(values)


def make(options, mesh):
    """The sharded model: made without memory, sharded, then filled, so that the host never holds it twice."""
    with torch.device("meta"):
        model = torch_model.build(torch_model.shapes.shape_of(options.shape))
    tied = model.config.tie_word_embeddings
    if options.checkpointing:
        torch_model.checkpoint_layers(model)
    shard(model, mesh, options)
    model.to_empty(device="cpu")
    if tied:
        model.tie_weights()
    fill(model, options.device)
    # Its buffers were emptied too, and FSDP leaves buffers where they are.
    model.model.rotary_emb = type(model.model.rotary_emb)(config=model.config).to(options.device)
    return model


def adam(options, model):
    """(optimizer, which one): Adam on the host's tensors, fused where this PyTorch can."""
    kinds = {"fused": ["fused", "foreach"], "foreach": ["foreach"], "plain": ["plain"]}[options.adam]
    for kind in kinds:
        try:
            return torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0,
                                     **({} if kind == "plain" else {kind: True})), kind
        except (RuntimeError, ValueError) as error:
            print(f"no {kind} AdamW for these tensors: {error}")
    sys.exit("torch_fsdp2_offload: PyTorch has no AdamW for tensors of the host")


def step(options, model, optimizer, tokens, targets):
    """(loss, seconds of forward and backward, seconds of the update)."""
    began = time.perf_counter()
    total = 0.0
    for micro_batch in range(options.micro_batches):
        last = micro_batch == options.micro_batches - 1
        if options.keep_gradients:
            model.set_requires_gradient_sync(last)
        if options.keep_weights:
            model.set_reshard_after_backward(last)
        loss = torch_model.loss_of(model, tokens[micro_batch], targets[micro_batch]) / options.micro_batches
        loss.backward()
        total += loss.item()
    torch_model.synchronize(options.device)
    between = time.perf_counter()
    if options.clip > 0:
        torch.nn.utils.clip_grad_norm_(model.parameters(), options.clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return total, between - began, time.perf_counter() - between


def measure(options, mesh):
    model = make(options, mesh)
    optimizer, kind = adam(options, model)
    for own in torch_model.series_of(options):
        measure_series(own, model, optimizer, kind, options.warmup if own.micro_batches == options.micro_batches else 0)
    print(f"AdamW {kind}, {torch.get_num_threads()} threads; checkpointing {'yes' if options.checkpointing else 'no'}; gradients "
          f"reduced in {options.reduce}; of the GPU's memory {f'{options.vram / 2**30:.2f} GiB' if options.vram else 'all'} allowed")


def measure_series(options, model, optimizer, kind, warmup):
    tokens, targets = torch_model.random_windows(torch_model.shapes.shape_of(options.shape), options.micro_batches,
                                                 options.batch, options.sequence, options.device)
    times, losses = [], []
    for number in range(warmup + options.steps):
        loss, passes, update = step(options, model, optimizer, tokens, targets)
        print(f"step {number + 1}: loss {loss:.4f}, forward and backward {passes:.2f} s, clipping and update {update:.2f} s",
              flush=True)
        losses.append(loss)
        times.append((passes, update))
    timed = times[warmup:]
    torch_model.report(options, "FSDP2 with CPU offload", [sum(each) for each in timed], losses, adam=kind,
                       checkpointing=options.checkpointing, vram=options.vram, clip=options.clip, reduce=options.reduce,
                       keep_gradients=options.keep_gradients, keep_weights=options.keep_weights,
                       pass_seconds=[each[0] for each in timed], update_seconds=[each[1] for each in timed])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    torch_model.add_shape_arguments(parser, batch=4, sequence=2048, micro_batches=4, steps=3)
    torch_model.add_offload_arguments(parser)
    parser.add_argument("--adam", choices=("fused", "foreach", "plain"), default="fused",
                        help="plain: what PyTorch takes if nobody asks")
    parser.add_argument("--no-checkpointing", dest="checkpointing", action="store_false")
    parser.add_argument("--keep-gradients", action="store_true")
    parser.add_argument("--keep-weights", action="store_true")
    parser.add_argument("--reduce", choices=list(SUM_TYPES), default="fp32", help="the type in which gradients are summed")
    parser.add_argument("--clip", type=float, default=0.0, help="the global norm that gradients are clipped to; 0: not")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of Adam on the CPU")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory(prefix="flap-fsdp2-") as folder:
        mesh = start(options, folder)
        try:
            measure(options, mesh)
        except torch.OutOfMemoryError as error:
            sys.exit(f"torch_fsdp2_offload: does not fit: {str(error).splitlines()[0]}")
        finally:
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
