#!/usr/bin/env python3
"""Our safetensors against the `safetensors` library: each reads what the other wrote, and they agree on bad files.

Usage: safetensors_reference.py <copy_safetensors program>

Runs itself with the Python of $FLAP_VENV or of .venv in the current folder if this one lacks the library.
Exit status 77: the library is nowhere.
"""
import json
import os
import pathlib
import random
import subprocess
import sys
import tempfile

try:
    import safetensors
except ImportError:
    interpreter = pathlib.Path(os.environ.get("FLAP_VENV") or ".venv") / "bin" / "python"
    if interpreter.exists() and "FLAP_REFERENCE_RETRIED" not in os.environ:
        os.environ["FLAP_REFERENCE_RETRIED"] = "1"
        os.execv(interpreter, [str(interpreter), *sys.argv])
    print("skipped: the safetensors package is not there (neither here nor in $FLAP_VENV)")
    sys.exit(77)

# The library's name of each dtype when writing, its name in the file, and its size.
DTYPES = [("bool", "BOOL", 1), ("uint8", "U8", 1), ("int8", "I8", 1), ("int16", "I16", 2), ("uint16", "U16", 2),
          ("float16", "F16", 2), ("bfloat16", "BF16", 2), ("int32", "I32", 4), ("uint32", "U32", 4),
          ("float32", "F32", 4), ("int64", "I64", 8), ("uint64", "U64", 8), ("float64", "F64", 8),
          ("float8_e4m3fn", "F8_E4M3", 1), ("float8_e5m2", "F8_E5M2", 1)]


def serialize(tensors, metadata):
    """tensors: {name: (dtype, shape, bytes)}. The library's low-level interface changed in 0.8."""
    if not hasattr(safetensors, "TensorSpec"):
        plain = {name: {"dtype": t, "shape": list(s), "data": d} for name, (t, s, d) in tensors.items()}
        return safetensors.serialize(plain, metadata)
    import ctypes
    buffers = {name: ctypes.create_string_buffer(d, max(len(d), 1)) for name, (_, _, d) in tensors.items()}
    specs = {name: safetensors.TensorSpec(dtype=t, shape=s, data_ptr=ctypes.addressof(buffers[name]), data_len=len(d))
             for name, (t, s, d) in tensors.items()}
    return bytes(safetensors.serialize(specs, metadata))


def deserialize(data):
    return {name: (t["dtype"], tuple(t["shape"]), bytes(t["data"])) for name, t in safetensors.deserialize(data)}


def random_tensors(rng):
    tensors = {}
    for index in range(rng.randrange(0, 40)):
        dtype, _, size = rng.choice(DTYPES)
        shape = tuple(rng.choice([0, 1, 2, 3, 7, 16]) for _ in range(rng.randrange(0, 5)))
        elements = 1
        for dimension in shape:
            elements *= dimension
        data = bytes(rng.randrange(2) for _ in range(elements)) if dtype == "bool" else rng.randbytes(elements * size)
        tensors[f"model.layers.{index}.{rng.choice(['weight', 'bias', 'é', 'a b', 'q' * 90])}"] = (dtype, shape, data)
    return tensors


def run(program, *arguments):
    result = subprocess.run([program, *map(str, arguments)], capture_output=True, encoding="utf-8", errors="replace")
    if result.returncode != 0:
        sys.exit(f"{program} {arguments}: {result.stderr}")
    return result.stdout


def check_round_trips(rng, program, folder):
    names = {dtype: name for dtype, name, _ in DTYPES}
    for case in range(25):
        tensors = random_tensors(rng)
        expected = {name: (names[t], s, d) for name, (t, s, d) in tensors.items()}
        source, copy, shards = folder / "theirs.safetensors", folder / "ours.safetensors", folder / f"shards-{case}"
        source.write_bytes(serialize(tensors, {"format": "pt", "note": "ü\n"}))
        run(program, "copy", source, copy)
        assert deserialize(copy.read_bytes()) == expected, f"case {case}: the copy differs"
        header = copy.read_bytes()
        length = int.from_bytes(header[:8], "little")
        assert length % 8 == 0
        metadata = json.loads(header[8:8 + length])["__metadata__"]
        assert metadata == {"format": "pt", "note": "ü\n"}, metadata
        shards.mkdir()
        run(program, "shard", source, shards, rng.choice([1, 1000, 5000, 10**9]))
        if tensors:
            index = json.loads((shards / "model.safetensors.index.json").read_text())
            assert index["metadata"]["total_size"] == sum(len(d) for _, _, d in tensors.values())
            found = {}
            for shard in set(index["weight_map"].values()):
                held = deserialize((shards / shard).read_bytes())
                assert all(index["weight_map"][name] == shard for name in held)
                found.update(held)
            assert found == expected, f"case {case}: the shards differ"
            run(program, "copy", shards, copy)
            assert deserialize(copy.read_bytes()) == expected, f"case {case}: the copy of the shards differs"


def mutate(rng, data):
    data = bytearray(data)
    for _ in range(rng.randrange(1, 4)):
        at = rng.randrange(len(data))
        kind = rng.randrange(4)
        if kind == 0:
            data[at] = rng.randrange(256)
        elif kind == 1:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 2:
            del data[at:at + rng.randrange(1, 9)]
        else:
            data[at:at + rng.randrange(4)] = rng.choice([b"-1", b"0", b"18446744073709551615", b"null", b"[]", b"{}",
                                                          b"9", b"1e3", b",", b'"', b"F64", b"\\u0000", b" ", b"\xf0"])
    if len(data) > 60 and rng.randrange(2):
        data[:8] = (len(data) - 48).to_bytes(8, "little")
    return bytes(data)


def check_mutations(rng, program, folder):
    """What we accept, the library accepts. What it accepts and we do not is of the kinds listed."""
    stricter = ("duplicate", "unsupported:", "\\u0000", "is not valid", "weight_map", "NUL")
    base = serialize({"a": ("float32", (2, 3), bytes(range(24))), "b": ("bfloat16", (4,), bytes(8)),
                      "c": ("uint8", (0, 5), b""), "d": ("int64", (), bytes(8))}, {"format": "pt"})
    files, verdicts = [], []
    for case in range(1500):
        data = mutate(rng, base)
        path = folder / f"mutated-{case}"
        path.write_bytes(data)
        files.append(path)
        try:
            safetensors.deserialize(data)
            verdicts.append(True)
        except Exception:  # the library raises SafetensorError, and others for what it never expected
            verdicts.append(False)
    ours = run(program, "check", *files).split("\n")[:-1]
    assert len(ours) == len(files)
    for path, line, accepted in zip(files, ours, verdicts):
        if line == "ok":
            assert accepted, f"{path.read_bytes()!r}: accepted by us alone"
        elif accepted:
            assert any(word in line for word in stricter), f"{path.read_bytes()!r}: refused by us alone: {line}"
    both = sum(line == "ok" for line in ours)
    assert both > 20, "the mutations left too few good files to mean something"
    print(f"mutations: {both} accepted by both, {sum(verdicts) - both} by the library alone, of {len(files)}")


def main():
    program = str(pathlib.Path(sys.argv[1]).resolve())
    with tempfile.TemporaryDirectory() as folder:
        check_round_trips(random.Random(1), program, pathlib.Path(folder))
        check_mutations(random.Random(2), program, pathlib.Path(folder))
    print(f"agrees with safetensors {safetensors.__version__}")


main()
