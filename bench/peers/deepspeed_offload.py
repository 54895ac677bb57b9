"""DeepSpeed's ways to train what does not fit: ZeRO-Offload and ZeRO-Infinity, one GPU.

  python3 bench/peers/deepspeed_offload.py 3b --stage 2 [--batch 4] [--sequence 2048] [--micro-batches 4] [--then 16] [--steps 3]
          [--vram 24GiB] [--clip 1.0] [--json FILE]
  python3 bench/peers/deepspeed_offload.py 3b --stage 3 [--parameters cpu|gpu]
  python3 bench/peers/deepspeed_offload.py 3b --stage 3 --nvme /mnt/nvme [--parameters gpu|nvme] [--no-pipeline]

--stage 2 is ZeRO-Offload: bf16 weights on the GPU, fp32 states and DeepSpeed's CPU Adam on the host; gradients of each micro-batch
go to the host and come back to be summed in bf16, as DeepSpeed does it. --stage 3 can also move the weights; with --nvme the
states (and with --parameters nvme the weights) live in files of that folder, which is ZeRO-Infinity. Its tiles have
TILE_PARAMETERS parameters, and reading, updating and writing of tiles overlap unless --no-pipeline. Layers are checkpointed.

Needs deepspeed, whose CPU Adam and asynchronous I/O are compiled at the first use, with libaio; where it cannot be imported this
program says so and ends with status 77. Run it with PYTORCH_ALLOC_CONF=pinned_use_cuda_host_register:True,
pinned_num_register_threads:8 (one word) where memory of the host is slow to get. With --nvme and 3.5 billion parameters the folder
takes 56 GB: 12 bytes of states and 4 of gradients per parameter.
"""
import argparse
import os
import sys
import time

try:
    import deepspeed
except ImportError as error:
    print(f"skipped: deepspeed cannot be imported ({error}). It is a package of PyPI, and compiles its CPU Adam at the first use; "
          "run this where it is installed")
    sys.exit(77)

import torch_model
import torch

BLOCK_BYTES = 1 << 20
TILE_PARAMETERS = 200_000_000
TILE_BUFFERS = 12  # weights, gradients and two moments of a tile that is read, one that is updated and one that is written


def configuration(options):
    """DeepSpeed's JSON. Sizes of buffers are its documented defaults where none is named."""
    where = {"device": "cpu"}
    if options.nvme:
        where = {"device": "nvme", "nvme_path": options.nvme, "buffer_count": TILE_BUFFERS,
                 "pipeline_read": options.pipeline, "pipeline_write": options.pipeline}
    zero = {"stage": options.stage, "overlap_comm": True, "contiguous_gradients": True,
            "offload_optimizer": {**where, "pin_memory": True}}
    if options.nvme:
        zero["sub_group_size"] = TILE_PARAMETERS
    if options.stage == 3 and options.parameters != "gpu":
        places = {"cpu": {"device": "cpu"}, "nvme": {"device": "nvme", "nvme_path": options.nvme}}
        zero["offload_param"] = {**places[options.parameters], "pin_memory": True}
    return {"train_micro_batch_size_per_gpu": options.batch, "gradient_accumulation_steps": options.micro_batches,
            "bf16": {"enabled": True}, "zero_optimization": zero, "gradient_clipping": options.clip,
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.0}},
            "aio": {"block_size": BLOCK_BYTES, "queue_depth": 32, "intra_op_parallelism": 4, "single_submit": False,
                    "overlap_events": True},
            "steps_per_print": 1 << 30}


def make(options):
    settings = configuration(options)
    torch.manual_seed(1)
    torch.set_default_dtype(torch.bfloat16)
    if options.parameters != "gpu":  # every weight goes to its place as soon as it is made
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
    """The model; where weights go away as they are made, their number cannot be checked."""
    return torch_model.build(torch_model.shapes.shape_of(options.shape), counted=options.parameters == "gpu")


def step(options, engine, tokens, targets):
    """(loss, seconds of forward and backward, seconds of the update)."""
    torch.cuda.synchronize()
    began, total = time.perf_counter(), 0.0
    for micro_batch in range(options.micro_batches):
        last = micro_batch == options.micro_batches - 1
        engine.set_gradient_accumulation_boundary(last)
        loss = torch_model.loss_of(engine, tokens[micro_batch], targets[micro_batch])
        engine.backward(loss)  # divides by the number of micro-batches itself
        total += loss.item() / options.micro_batches
        if last:
            torch.cuda.synchronize()
            between = time.perf_counter()
        engine.step()  # does nothing but after the last one
    torch.cuda.synchronize()
    return total, between - began, time.perf_counter() - between


def measure(options):
    engine = make(options)
    print(f"optimizer {type(engine.optimizer).__name__} of {type(engine.optimizer.optimizer).__name__}", flush=True)
    for own in torch_model.series_of(options):
        engine.set_train_batch_size(own.batch * own.micro_batches)
        measure_series(own, engine, own.warmup if own.micro_batches == options.micro_batches else 0)


def measure_series(options, engine, warmup):
    tokens, targets = torch_model.random_windows(torch_model.shapes.shape_of(options.shape), options.micro_batches,
                                                 options.batch, options.sequence, "cuda")
    times, losses = [], []
    for number in range(warmup + options.steps):
        loss, passes, update = step(options, engine, tokens, targets)
        print(f"step {number + 1}: loss {loss:.4f}, forward and backward {passes:.2f} s, update {update:.2f} s", flush=True)
        losses.append(loss)
        times.append((passes, update))
    timed = times[warmup:]
    title = f"DeepSpeed ZeRO-{'Infinity' if options.nvme else 'Offload'}, stage {options.stage}"
    torch_model.report(options, title, [sum(each) for each in timed], losses, deepspeed=deepspeed.__version__,
                       stage=options.stage, parameters_on=options.parameters, nvme=options.nvme, vram=options.vram,
                       pipeline=options.pipeline, clip=options.clip,
                       pass_seconds=[each[0] for each in timed], update_seconds=[each[1] for each in timed])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    torch_model.add_shape_arguments(parser, batch=4, sequence=2048, micro_batches=4, steps=3)
    torch_model.add_offload_arguments(parser)
    parser.add_argument("--stage", type=int, choices=(2, 3), default=2)
    parser.add_argument("--parameters", choices=("gpu", "cpu", "nvme"), help="where weights live in stage 3; cpu by default")
    parser.add_argument("--nvme", help="a folder on a fast disk, for the states")
    parser.add_argument("--no-pipeline", dest="pipeline", action="store_false", help="tiles on disk one after the other")
    parser.add_argument("--clip", type=float, default=0.0, help="the global norm that gradients are clipped to; 0: not")
    options = parser.parse_args()
    if options.device != "cuda":
        parser.error("--device: this peer needs a GPU")
    options.parameters = options.parameters or ("cpu" if options.stage == 3 else "gpu")
    if options.stage == 2 and (options.nvme or options.parameters != "gpu"):
        parser.error("--nvme and --parameters need --stage 3")
    if options.parameters == "nvme" and not options.nvme:
        parser.error("--parameters nvme needs --nvme")
    for name, value in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 29517}.items():
        os.environ.setdefault(name, str(value))
    torch_model.cap_memory(options)
    deepspeed.init_distributed()
    try:
        measure(options)
    except torch.OutOfMemoryError as error:
        sys.exit(f"deepspeed_offload: does not fit: {str(error).splitlines()[0]}")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
