"""The model shapes that the scripts of bench/gpu and bench/peers share, and the files that `flap train` needs for one.

  python3 bench/gpu/shapes.py                                    lists them
  python3 bench/gpu/shapes.py 1b --yaml run.yaml --shard tokens.bin [--tokens 2097152] [--seed 1] [key=value ...]

A shape is a mapping with the keys of a Hugging Face config.json. run.yaml holds it inline, so that nothing is read but the
shard, whose tokens are random: speed does not depend on what they say, and everybody trains on the same ones.

MFU has two definitions here, which differ by the embedding that is looked up and not multiplied with:
  mfu         (6 N + attention) / seconds / 989e12, with all parameters in N (a tied matrix once): the usual figure
  mfu_matmul  the same without an untied embedding in N: what a GPU really multiplies
Attention is that of a causal mask, half of the square: 6 · layers · sequence · heads · head size per token. Both count what
has to be computed; recomputed activations are not work.
"""
import argparse
import array
import json
import random
import sys

H100_FLOPS = 989e12  # dense bf16, NVIDIA's data sheet of the H100 SXM

SHARD_NARROW = (20240520, 1, "H")  # magic, version, type of a token: llm.c's two kinds, see io/formats/dataset.h
SHARD_WIDE = (20240801, 7, "I")
SHARD_HEADER_WORDS = 256


def llama(hidden, layers, intermediate, heads, kv_heads, vocabulary, **more):
    return {"model_type": "llama", "hidden_size": hidden, "num_hidden_layers": layers, "intermediate_size": intermediate,
            "num_attention_heads": heads, "num_key_value_heads": kv_heads, "vocab_size": vocabulary,
            "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": False,
            "hidden_act": "silu", "initializer_range": 0.02, **more}


def qwen2(hidden, layers, intermediate, heads, kv_heads, vocabulary, **more):
    return {"model_type": "qwen2", "hidden_size": hidden, "num_hidden_layers": layers, "intermediate_size": intermediate,
            "num_attention_heads": heads, "num_key_value_heads": kv_heads, "vocab_size": vocabulary,
            "max_position_embeddings": 131072, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "tie_word_embeddings": False,
            "hidden_act": "silu", "initializer_range": 0.02, "use_sliding_window": False, **more}


SHAPES = {
    "tiny": llama(64, 2, 160, 4, 2, 257, max_position_embeddings=256),  # for trying the scripts on a CPU
    "1b": llama(2048, 24, 5632, 16, 16, 32000),
    "3b": llama(4096, 16, 11008, 32, 32, 32000),
    "qwen2.5-1.5b": qwen2(1536, 28, 8960, 12, 2, 151936, tie_word_embeddings=True),
    "qwen2.5-7b": qwen2(3584, 28, 18944, 28, 4, 152064),
    "llama3-8b": llama(4096, 32, 14336, 32, 8, 128256, max_position_embeddings=8192, rope_theta=500000.0),
    "llama2-13b": llama(5120, 40, 13824, 40, 40, 32000),
}


def head_size(shape):
    return shape.get("head_dim") or shape["hidden_size"] // shape["num_attention_heads"]


def embedding_parameters(shape):
    return shape["vocab_size"] * shape["hidden_size"]


def parameters(shape):
    """All of them; a tied embedding counts once."""
    hidden, size = shape["hidden_size"], head_size(shape)
    query, key_value = shape["num_attention_heads"] * size, shape["num_key_value_heads"] * size
    layer = 2 * hidden * query + 2 * hidden * key_value + 3 * hidden * shape["intermediate_size"] + 2 * hidden
    if shape["model_type"] == "qwen2":
        layer += query + 2 * key_value  # biases of the three projections
    matrices = 1 if shape["tie_word_embeddings"] else 2
    return shape["num_hidden_layers"] * layer + matrices * embedding_parameters(shape) + hidden


def attention_flops(shape, sequence):
    """Forward and backward, per token: two products of S · heads · head size forward, half of each is masked."""
    return 6 * shape["num_hidden_layers"] * sequence * shape["num_attention_heads"] * head_size(shape)


def mfu(shape, sequence, tokens_per_second, flops=H100_FLOPS):
    """(mfu, mfu_matmul), as defined above."""
    everything = parameters(shape)
    multiplied = everything - (0 if shape["tie_word_embeddings"] else embedding_parameters(shape))
    rate = tokens_per_second / flops
    return tuple((6 * count + attention_flops(shape, sequence)) * rate for count in (everything, multiplied))


def shape_of(name):
    """A copy of the named shape; an unknown name ends the program with the known ones."""
    if name not in SHAPES:
        sys.exit(f"there is no shape {name}: it is one of {', '.join(SHAPES)}")
    return dict(SHAPES[name])


def write_shard(path, tokens, vocabulary):
    """Writes tokens (any iterable of ids) as an llm.c shard, little endian as the machines that FLAP runs on."""
    magic, version, kind = SHARD_NARROW if vocabulary <= 65536 else SHARD_WIDE
    body = array.array(kind, tokens)
    header = array.array("i", [magic, version, len(body)] + [0] * (SHARD_HEADER_WORDS - 3))
    with open(path, "wb") as file:
        header.tofile(file)
        body.tofile(file)


def random_tokens(count, vocabulary, seed):
    return random.Random(seed).choices(range(vocabulary), k=count)


def write_random_shard(path, count, vocabulary, seed=1):
    write_shard(path, random_tokens(count, vocabulary, seed), vocabulary)


def write_yaml(path, shape, keys):
    """run.yaml: JSON is YAML's flow style, so each value is written as JSON."""
    with open(path, "w") as file:
        file.write(f"model: {json.dumps(shape)}\n")
        for key, value in keys.items():
            file.write(f"{key}: {json.dumps(value)}\n")


def split_override(text):
    key, equals, value = text.partition("=")
    if not equals or not key:
        sys.exit(f"{text} is not key=value")
    return key, value


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shape", nargs="?", help="one of the table; none: prints the table")
    parser.add_argument("--yaml", help="where to write the configuration")
    parser.add_argument("--shard", help="where to write the tokens, and what the configuration names")
    parser.add_argument("--tokens", type=int, default=1 << 21)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("overrides", nargs="*", help="key=value, further lines of the configuration")
    options = parser.parse_intermixed_args()
    if options.shape is None:
        print(f"{'shape':14} {'parameters':>14} {'hidden':>7} {'layers':>6} {'inner':>6} {'heads':>5} {'kv':>3} {'vocabulary':>10}")
        for name, each in SHAPES.items():
            print(f"{name:14} {parameters(each):14,} {each['hidden_size']:7} {each['num_hidden_layers']:6} "
                  f"{each['intermediate_size']:6} {each['num_attention_heads']:5} {each['num_key_value_heads']:3} "
                  f"{each['vocab_size']:10}{' tied' if each['tie_word_embeddings'] else ''}")
        return
    shape = shape_of(options.shape)
    if options.shard:
        write_random_shard(options.shard, options.tokens, shape["vocab_size"], options.seed)
    if options.yaml:
        if not options.shard:
            parser.error("--yaml needs --shard: a configuration names its data")
        write_yaml(options.yaml, shape, {"dataset": options.shard})
        with open(options.yaml, "a") as file:
            for key, value in {"cutoff_len": 2048, **dict(map(split_override, options.overrides))}.items():
                file.write(f"{key}: {value}\n")


if __name__ == "__main__":
    main()
