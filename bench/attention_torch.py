"""FLAP's attention kernels beside PyTorch's scaled_dot_product_attention, on one GPU, in one process.

Usage: attention_torch.py LIBRARY [--backends] [--values]

LIBRARY holds the launchers of kernels/cuda/attention.h:
    nvcc -std=c++17 -O3 -fmad=false -D_GNU_SOURCE -I. -gencode=arch=compute_90a,code=sm_90a -Xcompiler -fPIC -shared \
        -o LIBRARY kernels/cuda/attention*.cu kernels/cuda/cuda_sizes.c base/units.c base/assert.c base/log.c base/status.c
Each row is the median of many runs of forward, and of forward and backward, in TFLOP/s of causal attention that
computes nothing twice (2 products forward, 5 backward, half of the square), so the rows compare as times do.
"""
import argparse
import ctypes
import statistics

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

SHAPES = [  # batch, sequence, heads, kv_heads, head_size
    (8, 2048, 32, 32, 64),
    (2, 8192, 32, 32, 64),
    (8, 2048, 32, 8, 64),
    (2, 8192, 32, 8, 64),
    (4, 2048, 32, 32, 128),
    (1, 8192, 32, 32, 128),
    (4, 2048, 32, 8, 128),
    (1, 8192, 32, 8, 128),
    (1, 2048, 32, 8, 128),
]
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class Shape(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint32) for name in
                ("batch", "queries", "keys", "first_position", "heads", "kv_heads", "head_size", "q_stride",
                 "kv_stride")] + [("dtype", ctypes.c_int), ("portable", ctypes.c_bool),
                                      ("two_passes", ctypes.c_bool)]


class Own:
    """The launchers over tensors (B, S, H, HD)."""

    def __init__(self, path, portable):
        self.portable = portable
        self.library = ctypes.CDLL(path)
        self.measures = [self.library.flap_cuda_attention_forward_scratch_bytes,
                         self.library.flap_cuda_attention_backward_scratch_bytes]
        for measure in self.measures:
            measure.restype = ctypes.c_uint64
        self.library.cuda_attention_chain_pays.restype = ctypes.c_bool

    def prepare(self, q, k, v, dout):
        batch, sequence, heads, head_size = q.shape
        kv_heads = k.shape[2]
        self.shape = Shape(batch, sequence, sequence, 0, heads, kv_heads, head_size, q.stride(1), k.stride(1),
                           DTYPES[q.dtype], self.portable, False)
        self.shape.two_passes = not self.library.cuda_attention_chain_pays(ctypes.byref(self.shape))  # as in training
        self.q, self.k, self.v, self.dout = q, k, v, dout
        self.out, self.dq, self.dk, self.dv = (torch.empty_like(x) for x in (q, q, k, v))
        self.lse = torch.empty(batch, heads, sequence, device="cuda")
        scratch = max(measure(ctypes.byref(self.shape)) for measure in self.measures)
        self.scratch = torch.empty(scratch, dtype=torch.uint8, device="cuda")

    def call(self, function, *tensors):
        arguments = [ctypes.c_void_p(x.data_ptr()) for x in tensors]
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        status = function(ctypes.byref(self.shape), *arguments, stream)
        if status != 0:
            raise RuntimeError(f"CUDA error {status}")

    def forward(self):
        self.call(self.library.flap_cuda_attention_forward, self.out, self.lse, self.q, self.k, self.v, self.scratch)

    def backward(self):
        self.call(self.library.flap_cuda_attention_backward, self.dq, self.dk, self.dv, self.dout, self.q, self.k,
                  self.v, self.out, self.lse, self.scratch)


class Peer:
    def prepare(self, q, k, v, dout):
        self.q, self.k, self.v = (x.transpose(1, 2).detach().requires_grad_() for x in (q, k, v))
        self.dout = dout.transpose(1, 2)
        self.grouped = q.shape[2] != k.shape[2]

    def forward(self):
        self.out = scaled_dot_product_attention(self.q, self.k, self.v, is_causal=True, enable_gqa=self.grouped)

    def backward(self):
        self.gradients = torch.autograd.grad(self.out, (self.q, self.k, self.v), self.dout, retain_graph=True)


def milliseconds(function, seconds=0.06):
    function()
    torch.cuda.synchronize()
    times = []
    while len(times) < 5 or (sum(times) < seconds * 1000 and len(times) < 100):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        function()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def operands(batch, sequence, heads, kv_heads, head_size):
    torch.manual_seed(sequence + head_size)
    make = lambda h: torch.randn(batch, sequence, h, head_size, device="cuda", dtype=torch.bfloat16)
    return make(heads), make(kv_heads), make(kv_heads), make(heads)


def measure(kernels, q, k, v, dout, flops):
    kernels.prepare(q, k, v, dout)
    forward = milliseconds(kernels.forward)
    backward = milliseconds(kernels.backward)
    rate = lambda products, ms: products * flops / ms / 1e9
    return rate(2, forward), rate(5, backward), rate(7, forward + backward)


def relative(a, b):
    return ((a.float() - b.float()).norm() / b.float().norm()).item()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("library", nargs="+")
    parser.add_argument("--backends", action="store_true", help="also each of PyTorch's backends by name")
    parser.add_argument("--values", action="store_true", help="also the differences of the results")
    options = parser.parse_args()
    print(torch.cuda.get_device_name(), torch.__version__, "cudnn", torch.backends.cudnn.version())
    print(f"{'shape':24} {'kernels':24} {'forward':>8} {'backward':>8} {'both':>8}  share of the default")
    for shape in SHAPES:
        batch, sequence, heads, kv_heads, head_size = shape
        q, k, v, dout = operands(*shape)
        flops = batch * heads * head_size * sequence * sequence  # of one product, causal: 2 * S^2 / 2
        peer = Peer()
        default = measure(peer, q, k, v, dout, flops)
        rows = [("torch default", default)]
        if options.backends:
            for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
                with sdpa_kernel(backend):
                    try:
                        rows.append((f"torch {backend.name.lower()[:5]}", measure(peer, q, k, v, dout, flops)))
                    except RuntimeError as error:
                        print(backend.name, str(error).splitlines()[0])
        for path in options.library:
            for portable in (True, False):
                own = Own(path, portable)
                name = path.rsplit("/", 1)[-1] + (" portable" if portable else "")
                rows.append((name, measure(own, q, k, v, dout, flops)))
        for name, (forward, backward, both) in rows:
            print(f"{'x'.join(map(str, shape)):24} {name:24} {forward:8.0f} {backward:8.0f} {both:8.0f}  "
                  f"{forward / default[0]:.2f} {backward / default[1]:.2f} {both / default[2]:.2f}", flush=True)
        if options.values:
            peer.prepare(q, k, v, dout)
            peer.forward()
            peer.backward()
            pairs = zip(("out", "dq", "dk", "dv"), (own.out, own.dq, own.dk, own.dv), (peer.out, *peer.gradients))
            print("   differences", " ".join(f"{n} {relative(a, b.transpose(1, 2)):.1e}" for n, a, b in pairs))


if __name__ == "__main__":
    main()
