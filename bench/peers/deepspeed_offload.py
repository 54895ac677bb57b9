"""DeepSpeed's ways to train what does not fit: ZeRO-Offload and ZeRO-Infinity, one GPU.

  python3 bench/peers/deepspeed_offload.py 3b --stage 2 [--batch 4] [--sequence 2048] [--micro-batches 4] [--steps 3] [--json FILE]
  python3 bench/peers/deepspeed_offload.py 3b --stage 3 [--parameters cpu|gpu]
  python3 bench/peers/deepspeed_offload.py 3b --stage 3 --nvme /mnt/nvme [--parameters nvme]

--stage 2 is ZeRO-Offload: bf16 weights on the GPU, fp32 states and DeepSpeed's CPU Adam on the host. --stage 3 also moves the
weights; with --nvme the states (and with --parameters nvme the weights) live in files of that folder, which is
ZeRO-Infinity. Layers are checkpointed. Needs deepspeed, whose CPU Adam and asynchronous I/O are compiled at the first use, with
nvcc and libaio; where it cannot be imported this program says so and ends with status 77.
"""
import argparse
import os
import sys
import time

try:
    import deepspeed
except ImportError as error:
    print(f"skipped: deepspeed cannot be imported ({error}). It is a package of PyPI, and compiles its CPU Adam with nvcc at the "
          "first use; run this where it is installed")
    sys.exit(77)

import torch_model
import torch

WARMUP_STEPS = 1
BLOCK_BYTES = 1 << 20


def configuration(options):
    """DeepSpeed's JSON. Sizes of buffers are its documented defaults where none is named."""
    where = {"device": "nvme", "nvme_path": options.nvme} if options.nvme else {"device": "cpu"}
    zero = {"stage": options.stage, "overlap_comm": True, "contiguous_gradients": True,
            "offload_optimizer": {**where, "pin_memory": True}}
    if options.stage == 3 and options.parameters != "gpu":
        places = {"cpu": {"device": "cpu"}, "nvme": {"device": "nvme", "nvme_path": options.nvme}}
        zero["offload_param"] = {**places[options.parameters], "pin_memory": True}
    return {"train_micro_batch_size_per_gpu": options.batch, "gradient_accumulation_steps": options.micro_batches,
            "bf16": {"enabled": True}, "zero_optimization": zero, "gradient_clipping": options.clip,
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.0}},
            "aio": {"block_size": BLOCK_BYTES, "queue_depth": 16, "single_submit": False, "overlap_events": True},
            "steps_per_print": 1 << 30}


def make(options):
    settings = configuration(options)
    torch.set_default_dtype(torch.bfloat16)
    if options.stage == 3:  # every weight goes to its place as soon as it is made
        with deepspeed.zero.Init(config_dict_or_path=settings):
            model = build(options)
    else:
        with torch.device("cuda"):
            model = build(options)
    torch.set_default_dtype(torch.float32)
    torch_model.checkpoint_layers(model)
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=settings)
    return engine


def build(options):
    """The model without the check of its parameters' number: under ZeRO 3 they are empty after they were made."""
    return torch_model.build(torch_model.shapes.shape_of(options.shape), counted=options.stage != 3)


def measure(options):
    engine = make(options)
    tokens, targets = torch_model.random_windows(torch_model.shapes.shape_of(options.shape), options.micro_batches,
                                                 options.batch, options.sequence, "cuda")
    seconds, losses = [], []
    for number in range(WARMUP_STEPS + options.steps):
        torch.cuda.synchronize()
        began, total = time.perf_counter(), 0.0
        for micro_batch in range(options.micro_batches):
            loss = torch_model.loss_of(engine, tokens[micro_batch], targets[micro_batch])
            engine.backward(loss)  # divides by the number of micro-batches itself
            engine.step()          # does nothing but after the last one
            total += loss.item() / options.micro_batches
        torch.cuda.synchronize()
        took = time.perf_counter() - began
        print(f"step {number + 1}: loss {total:.4f}, {took:.2f} s", flush=True)
        losses.append(total)
        if number >= WARMUP_STEPS:
            seconds.append(took)
    title = f"DeepSpeed ZeRO-{'Infinity' if options.nvme else 'Offload'}, stage {options.stage}"
    torch_model.report(options, title, seconds, losses, deepspeed=deepspeed.__version__, stage=options.stage,
                       parameters_on=options.parameters, nvme=options.nvme, clip=options.clip)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    torch_model.add_shape_arguments(parser, batch=4, sequence=2048, micro_batches=4, steps=3)
    parser.add_argument("--stage", type=int, choices=(2, 3), default=2)
    parser.add_argument("--parameters", choices=("gpu", "cpu", "nvme"), help="where weights live in stage 3; cpu by default")
    parser.add_argument("--nvme", help="a folder on a fast disk, for the states")
    parser.add_argument("--clip", type=float, default=0.0, help="the global norm that gradients are clipped to; 0: not")
    options = parser.parse_args()
    options.parameters = options.parameters or ("cpu" if options.stage == 3 else "gpu")
    if options.device != "cuda":
        parser.error("--device: this peer needs a GPU")
    if options.stage == 2 and (options.nvme or options.parameters != "gpu"):
        parser.error("--nvme and --parameters need --stage 3")
    if options.parameters == "nvme" and not options.nvme:
        parser.error("--parameters nvme needs --nvme")
    for name, value in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 29517}.items():
        os.environ.setdefault(name, str(value))
    deepspeed.init_distributed()
    measure(options)


if __name__ == "__main__":
    main()
