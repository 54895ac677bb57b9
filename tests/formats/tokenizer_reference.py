#!/usr/bin/env python3
"""Reference answers for test_tokenizer_library.c, on random text.

Usage: tokenizer_reference.py nfc|variants|pieces <seed> <data folder> <out folder>
       tokenizer_reference.py load <out folder>

nfc       cases.txt: "hex of text, hex of its NFC" per line, from unicodedata
variants  <n>.json and <n>.txt: the tokenizers of the data folder with other options, and "flags, hex of text,
          ids" per line, from the `tokenizers` library
pieces    the same of tokenizers in the style of SentencePiece, trained anew, with <n>.decoded beside: "ids, hex of text",
          where special tokens are hidden if the ids begin with "s"
load      ids.txt: for each line of texts.txt (hex), the ids that transformers' AutoTokenizer gives with the
          tokenizer saved in the folder; and its end token's id first

Exit status 77: a package that it needs is not there.
"""
import json
import pathlib
import random
import sys
import unicodedata

# Characters that every Unicode version in use knows, so that versions of libraries make no difference.
KNOWN = [chr(c) for c in range(1, 0x110000) if unicodedata.ucd_3_2_0.category(chr(c)) not in ("Cn", "Cs", "Co")]
NEWER = [chr(c) for a, b in ((0x1F300, 0x1F5FF), (0x1F600, 0x1F64F), (0x1F900, 0x1F9AF), (0x2B740, 0x2B81D)) for c in range(a, b)]
ALL = KNOWN + NEWER
MARKS = [c for c in KNOWN if unicodedata.combining(c)]
DECOMPOSED = [c for c in KNOWN if unicodedata.normalize("NFD", c) != c]
SPACES = list(" \t\n\r\x0b\x0c\x85\xa0\u1680\u180e\u2003\u2028\u2029\u202f\u205f\u3000\u200b\u200d\ufeff\x1c\x1f")
WORDS = ["the", "The", " the", "'s", "'LL", "'\u017f", "don't", "lighthouse", "  ", "    ", "\r\n", "\n\n", "\n", "0", "12", "2024",
         "printf(\"", "été", "ночью", "雪が", "👩\u200d🚀", "e\u0301", "한", "\u1112\u1161\u11ab", "!!", "...", "<|endoftext|>",
         "<|im_end|>", "<|eot_id|>", "<|", "|>", "[TOK]", " [TOK] ", "[é]", "[e\u0301]", "<t>", "<tt>", "two words", "\x00"]


def random_text(rng, nul=True):
    parts = []
    for _ in range(rng.choice([1, 3, 10, 60])):
        kind = rng.randrange(9)
        if kind < 3:
            part = rng.choice(WORDS)
        elif kind == 3:
            part = "".join(rng.choice(SPACES) for _ in range(rng.randrange(1, 6)))
        elif kind == 4:
            part = rng.choice(ALL) * rng.choice([1, 1, 2, 30])
        elif kind == 5:
            part = rng.choice(DECOMPOSED) + "".join(rng.choice(MARKS) for _ in range(rng.randrange(4)))
        elif kind == 6:
            part = "".join(chr(rng.randrange(0x20, 0x7F)) for _ in range(rng.randrange(1, 12)))
        elif kind == 7:
            part = unicodedata.normalize("NFD", rng.choice(DECOMPOSED))
        else:
            part = "".join(chr(rng.randrange(0xAC00, 0xD7A4)) if rng.random() < 0.5 else chr(rng.randrange(0x1100, 0x1200))
                           for _ in range(3))
        parts.append(part)
    text = "".join(parts)
    return text if nul else text.replace("\0", "")


def hexed(text):
    return text.encode("utf-8").hex() or "-"


def write_nfc(rng, out):
    texts = [random_text(rng) for _ in range(3000)]
    texts += [a + b for a in DECOMPOSED[:: rng.randrange(3, 9)] for b in rng.sample(MARKS, 3)]
    texts += [c + "\u0301" for c in KNOWN[:: rng.randrange(30, 60)]] + DECOMPOSED
    texts += ["a" + "".join(rng.choice(MARKS) for _ in range(n)) for n in (40, 3000)]
    with open(out / "cases.txt", "w") as file:
        for text in texts:
            file.write(f"{hexed(text)} {hexed(unicodedata.normalize('NFC', text))}\n")


def variant(rng, data, name):
    """The tokenizer `name` as it is, or with other options."""
    tokenizer = json.loads((data / f"tokenizer_{name}.json").read_text(encoding="utf-8"))
    if rng.random() < 0.2:
        return tokenizer
    stages = tokenizer["pre_tokenizer"].get("pretokenizers") or [tokenizer["pre_tokenizer"]]
    stages[-1]["add_prefix_space"] = rng.random() < 0.4
    stages[-1]["use_regex"] = rng.random() < 0.5
    if rng.random() < 0.3:
        stages.insert(0, {"type": "Digits", "individual_digits": rng.random() < 0.5})
    for stage in stages[:-1]:
        if stage["type"] == "Split" and rng.random() < 0.3:
            stage["behavior"], stage["invert"] = rng.choice([("Removed", True), ("Isolated", True), ("Removed", False)])
    if rng.random() < 0.3:
        pattern = rng.choice([{"String": "e"}, {"String": ".."}, {"Regex": "x*"}, {"Regex": r"[\s\p{P}]"}, {"Regex": "^ +|$"}])
        stages.insert(0, {"type": "Split", "pattern": pattern, "behavior": rng.choice(["Isolated", "Removed"]), "invert": False})
    tokenizer["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": stages}
    tokenizer["model"]["ignore_merges"] = rng.random() < 0.5
    if rng.random() < 0.5:  # as the published files of Qwen2 say that there is none, and write merges
        tokenizer["model"] |= {"continuing_subword_prefix": "", "end_of_word_suffix": ""}
        tokenizer["model"]["merges"] = [m if isinstance(m, str) else " ".join(m) for m in tokenizer["model"]["merges"]]
    tokenizer["normalizer"] = rng.choice([None, {"type": "NFC"}, {"type": "Sequence", "normalizers": [{"type": "NFC"}]}])
    added = tokenizer["added_tokens"]
    # Of "[é]" and its decomposed form only one: the library picks either at random.
    for content in ("[TOK]", rng.choice(["[é]", "[e\u0301]"]), "<t>", "<tt>", "two words", "\n\n", "'s"):
        if rng.random() < 0.5:
            added.append({"id": max(a["id"] for a in added) + rng.randrange(1, 4), "content": content, "single_word": False,
                          "lstrip": rng.random() < 0.4, "rstrip": rng.random() < 0.4, "normalized": rng.random() < 0.5,
                          "special": rng.random() < 0.5})
    # The library gives new tokens the next ids in order, whatever the file says.
    vocab, next_id = tokenizer["model"]["vocab"], added[0]["id"]
    for token in added:
        token["id"] = vocab.get(token["content"], next_id)
        next_id += token["content"] not in vocab
    return tokenizer


def write_variants(rng, data, out):
    from tokenizers import Tokenizer

    for number in range(24):
        text = json.dumps(variant(rng, data, ("gpt2", "llama3", "qwen2")[number % 3]), ensure_ascii=False)
        (out / f"{number}.json").write_text(text, encoding="utf-8")
        tokenizer = Tokenizer.from_str(text)
        with open(out / f"{number}.txt", "w") as file:
            for case in range(150):
                sample = random_text(rng)
                if case == 0:
                    sample = "".join(random_text(rng) for _ in range(100)) + " " * 5000 + "x" * 5000
                tokenizer.encode_special_tokens = literal = rng.random() < 0.2
                special = rng.random() < 0.3
                try:
                    ids = tokenizer.encode(sample, add_special_tokens=special).ids
                except BaseException as error:  # it panics when a token lies in what another one strips
                    if type(error).__name__ != "PanicException":
                        raise
                    continue
                file.write(f"{3 * special + 4 * literal} {hexed(sample)} {','.join(map(str, ids)) or '-'}\n")


PIECE_WORDS = ["\u2581", "\u2581\u2581", " \u2581", "<s>", "</s>", " <s> ", "<unk>", "[INST]", " [INST]", "[INST] ", "a[INST]b", "<b>",
               "<0x41>", "<0xE2>", "\u2581<t>", "a b", "c", " ", "  ", "\n", "\t", "\n\n", "\u2581a", "zz", "lighthouse"]


def piece_variant(rng, models, make):
    """A tokenizer in the style of SentencePiece: one of the models, with random stages and added tokens."""
    model = json.loads(json.dumps(rng.choice(models)))
    if rng.random() < 0.2:  # no trainer merges byte tokens, but a file may
        for pair in (["<0xE2>", "<0x96>"], [make.MARK, "<0xF0>"], ["<0xCC>", "a"], ["<0xF0>", "<0x9F>"], ["<0x9F>", "<0x98>"]):
            for token in pair + ["".join(pair)]:
                model["vocab"].setdefault(token, len(model["vocab"]))
            model["merges"].insert(rng.randrange(len(model["merges"])), pair)
    if rng.random() < 0.5:
        model["merges"] = [" ".join(merge) for merge in model["merges"]]
    if rng.random() < 0.2:  # ranks that no training gave
        rng.shuffle(model["merges"])
    normalizer = rng.choice([None, make.TO_MARK, make.PREPEND, [make.PREPEND, make.TO_MARK], [make.PREPEND, make.TO_MARK],
                             [make.TO_MARK, make.PREPEND], [make.TO_MARK], []])
    if isinstance(normalizer, list):
        normalizer = {"type": "Sequence", "normalizers": normalizer}
    scheme = rng.choice(["always", "first", "never"])
    metaspace = {"type": "Metaspace", "replacement": make.MARK, "prepend_scheme": scheme, "split": rng.random() < 0.5}
    if rng.random() < 0.2:
        metaspace = {"type": "Metaspace", "replacement": make.MARK, "add_prefix_space": True}
    stages = [None, metaspace, metaspace, {"type": "Sequence", "pretokenizers": [metaspace]}]
    if "Replace" in json.dumps(normalizer):
        split = {"type": "Split", "pattern": {"String": " "}, "behavior": rng.choice(["MergedWithPrevious", "Isolated"]), "invert": False}
        stages += [split, {"type": "Sequence", "pretokenizers": [split, metaspace]}]
    chain = [rng.choice([make.FROM_MARK, make.FROM_MARK, metaspace]), {"type": "ByteFallback"}, {"type": "Fuse"}]
    decoder = rng.choice([metaspace, chain, chain[:2], chain + [make.STRIP], chain + [make.STRIP | {"start": rng.randrange(4)}]])
    if isinstance(decoder, list):
        decoder = {"type": "Sequence", "decoders": decoder}
    more = []
    # Only one of the two ways to write two spaces: of tokens that are the same once normalized the library picks either.
    for content in ("[INST]", "<b>", "<t>", "a b", "c", "\n\n", rng.choice([make.MARK * 2, "  "]), "\u00e9x", "zz " + make.MARK, "<0x4a>"):
        if rng.random() < 0.35:
            more.append({"content": content, "special": rng.random() < 0.5, "normalized": rng.random() < 0.5,
                         "lstrip": rng.random() < 0.3, "rstrip": rng.random() < 0.3})
    tokenizer = make.piece_tokenizer(model, normalizer, rng.choice(stages), decoder, more)
    for token in tokenizer["added_tokens"][:3]:
        token["normalized"] = rng.random() < 0.3
    return tokenizer


def write_pieces(rng, out):
    import make_tokenizer_data as make
    from tokenizers import Tokenizer

    models = [make.piece_model(rng.randrange(600, 1500), rng.choice([60, 120, 300]), across) for across in (False, True)]
    models += [make.piece_model(rng.randrange(400, 700), 30, True, [random_text(rng) for _ in range(200)] + make.PROSE)]
    for number in range(24):
        text = json.dumps(piece_variant(rng, models, make), ensure_ascii=False)
        (out / f"{number}.json").write_text(text, encoding="utf-8")
        tokenizer = Tokenizer.from_str(text)
        size = tokenizer.get_vocab_size()
        # The library does not hide a special token whose normalized text differs: it looks for that among the special ones.
        shown = {token["id"] for token in json.loads(text)["added_tokens"] if tokenizer.id_to_token(token["id"]) != token["content"]}
        lists = [[]]
        with open(out / f"{number}.txt", "w") as file:
            for case in range(100):
                sample = "".join(rng.choice(PIECE_WORDS) if rng.random() < 0.6 else random_text(rng)
                                 for _ in range(rng.choice([1, 2, 4, 12])))
                if case == 0:
                    sample = "".join(random_text(rng) for _ in range(50)) + " " * 1000 + "x" * 1000
                tokenizer.encode_special_tokens = literal = rng.random() < 0.2
                special = rng.random() < 0.3
                try:
                    ids = tokenizer.encode(sample, add_special_tokens=special).ids
                except BaseException as error:  # it panics when a token lies in what another one strips
                    if type(error).__name__ != "PanicException":
                        raise
                    continue
                file.write(f"{3 * special + 4 * literal} {hexed(sample)} {','.join(map(str, ids)) or '-'}\n")
                lists += [ids] if case > 0 else []
        for _ in range(100):
            kinds = [lambda: rng.randrange(3, 259), lambda: rng.randrange(size + 2), lambda: tokenizer.token_to_id(make.MARK)]
            ids = [rng.choice(kinds)() for _ in range(rng.randrange(10))]
            at = rng.randrange(len(ids) + 1)
            ids[at:at] = [3 + byte for byte in rng.choice(["\u2581", "\u00e9", "\U0001f600", " ", "\0"]).encode()]
            lists.append(ids)
        with open(out / f"{number}.decoded", "w") as file:
            for ids in lists:
                hide = rng.random() < 0.5 and not shown.intersection(ids)
                text = tokenizer.decode(ids, skip_special_tokens=hide)
                file.write(f"{'s' * hide}{','.join(map(str, ids)) or '-'} {hexed(text)}\n")


def load(out):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(out))
    lines = [str(tokenizer.eos_token_id)]
    for line in (out / "texts.txt").read_text().split():
        text = bytes.fromhex(line).decode("utf-8") if line != "-" else ""
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if tokenizer.decode(ids, clean_up_tokenization_spaces=False) != unicodedata.normalize("NFC", text) and text.isascii():
            raise SystemExit(f"does not decode to what it was: {text!r}")
        lines.append(",".join(map(str, ids)) or "-")
    (out / "ids.txt").write_text("\n".join(lines) + "\n")


def main():
    try:
        if sys.argv[1] == "load":
            load(pathlib.Path(sys.argv[2]))
            return
        rng = random.Random(int(sys.argv[2]))
        data, out = pathlib.Path(sys.argv[3]), pathlib.Path(sys.argv[4])
        if sys.argv[1] == "nfc":
            write_nfc(rng, out)
        elif sys.argv[1] == "pieces":
            write_pieces(rng, out)
        else:
            write_variants(rng, data, out)
    except ImportError as error:
        print(error, file=sys.stderr)
        sys.exit(77)


main()
