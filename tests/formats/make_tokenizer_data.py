#!/usr/bin/env python3
"""Trains small BPE tokenizers and records what the `tokenizers` library makes of a corpus.

Usage: make_tokenizer_data.py <folder>     (tests/formats/data; needs the `tokenizers` package)

Writes tokenizer_gpt2.json, tokenizer_llama3.json and tokenizer_qwen2.json, which are byte-level, and
tokenizer_llama2.json, tokenizer_mistral.json and tokenizer_gemma.json, in the style of SentencePiece, with the stages that
the published tokenizers of these families have, and tokenizer_cases.json: texts, and the ids of each tokenizer for them;
for the second three also lists of ids, and their texts.
"""
import json
import pathlib
import random
import sys

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")

PROSE = [
    "The lighthouse keeper counted the steps every evening, and every evening there was one step more than there had "
    "been in the morning. He didn't mind. A stair that grows is company of a kind, and the lamp wasn't any heavier.",
    "When the ship came in, nobody on the quay recognised her flag. It was grey, with a grey stripe, and it hung as if "
    "it had been washed too often. \"We've been away for a while,\" the captain said. \"Who's king now?\"",
    "They'll say that it's impossible, that I'd have known, that you're making it up; but we'd seen it, and she's "
    "written it down, and there it stands: 1,024 crates, 37.5 tons, on 12/11/1897 at 06:45.",
    "WE'LL SAY IT LOUD: I'M SURE YOU'RE RIGHT, THEY'VE GONE, HE'D NEVER, IT'S DONE, DON'T ASK. We'Ll sAy iT'S FiNe.",
    "Après l'été, où l'on avait rêvé d'îles, le garçon naïf reçut une lettre : « Tu n'as rien oublié, même pas Noël. »",
    "Über die Straße lief ein Füchslein, größer als üblich; die Bäcker schlossen früh, weil es Öl regnete.",
    "El niño soñó con pingüinos. ¿Qué más podía hacer? ¡Corrió! Mañana habrá señales, según la güera.",
    "Žluťoučký kůň úpěl ďábelské ódy. Zażółć gęślą jaźń. Árvíztűrő tükörfúrógép. Þórður sá æðina við ströndina.",
    "Ночью выпал снег, и к утру деревня стала тихой, как письмо, которое никто не открыл.",
    "Η θάλασσα ήταν ήσυχη, αλλά οι ψαράδες δεν βγήκαν· κάποιος είχε δει φώτα κάτω από το νερό.",
    "夜明け前に雪が降り、村は静かになった。カタカナも、ひらがなも、漢字も混ざっている。ｶﾅ　全角スペース。",
    "灯塔看守人每天晚上都数台阶，每天晚上都比早上多一级。他并不介意。一九九七年七月一日。",
    "등대지기는 매일 저녁 계단을 세었다. 아침보다 언제나 한 계단이 더 많았다.",
    "كان البحر هادئاً، لكن الصيادين لم يخرجوا. ١٢٣٤٥ قارباً. שלום עולם, הספינה הגיעה בלילה.",
    "समुद्र शांत था, लेकिन मछुआरे बाहर नहीं गए। १२३ नावें। ทะเลสงบ แต่ชาวประมงไม่ออกไป ๑๒๓",
]
CODE = [
    "int main(int argc, char **argv) {\n  for (int i = 0; i < argc; i++) {\n    printf(\"%s\\n\", argv[i]);\n  }\n"
    "  return 0; /* 0x7fff_ffff != -1e-3 */\n}\n",
    "def fold(xs, acc=None):\n\tif not xs:\n\t\treturn acc\n\treturn fold(xs[1:], (acc or 0) + xs[0])  # O(n²)\n\n\n"
    "if __name__ == '__main__':\n    print(fold([1, 22, 333, 4444, 55555, 666666]))\n",
    "<p class=\"a&amp;b\">Tom &lt;3 &#x1F600;</p>\r\n<br/>\r\n\r\n{\"key\": [null, true, -0.5e+10, \"\\u00e9\"]}\r\n",
    "SELECT * FROM t WHERE a>=10 AND b<>'it''s' -- done;;;\n\n\n\n#include <x.h>\n//==========================//\n",
]
ODD = [
    "👩‍👩‍👧‍👦 👍🏽 🏳️‍🌈 🇳🇴🇯🇵 ❤️‍🔥 🧑🏿‍🚀 keycap 1️⃣ and text ☺︎ vs ☺️",
    "   leading, trailing   ",
    " " * 1 + "a" + " " * 2 + "b" + " " * 3 + "c" + " " * 17 + "d" + " " * 300,
    "\t\ttabs\t and  \t mixed \u00a0\u2003\u3000 spaces\u2028line\u2029para\u0085next\u180evowel\u200bzero\ufeffbom",
    "unix\nwindows\r\nmac\rboth\n\r\n\r\n\n\r\r\n end\n",
    "a\n b\n  c\n\n d \n\n\n e  \n   \n   f\r\n  \r\n g",
    "control \x01\x02\x07\x08\x0b\x0c\x1b[31mred\x1b[0m\x1c\x1d\x1e\x1f\x7f\x80\x9f end",
    "e\u0301 a\u0308\u0323 o\u0323\u0302 \u0301alone q\u0307\u0323 A\u030a \u212b \u1100\u1161\u11a8 \uac00\u11a8 \u0344 \u0958 \u2126 \ufb1d",
    "Z\u0351\u036b\u0343a\u0363\u0308\u0348l\u0348\u031eg\u0330o\u0321 \u0f71\u0f72\u0f74 \u09c7\u09be \u0b47\u0b56 \u1e9b\u0323",
    "1 12 123 1234 12345 123456 1234567 ½ ² Ⅷ ⑳ ١٢ 十二 １２３ 1.5 1,000,000 0b1010",
    "'s 't 're 've 'm 'll 'd 'S 'T 'RE 'Ve 'M 'lL 'D '\u017f 's's ''s it's's o'clock 'twas",
    "!?!?... --- ___ +++ *** /// @#$%^&*() ~`| \\ [[]] {{}} <<>> «» “” ‘’ — – …",
    "!\n\n?\r\n\r\n. \n;\n\t(\n)",
    "\U0001d54f\U0001d7d8 \U00010348 \U0002070e\U000207ff \U000e0041 \ufffd \ufffe \uffff \U0010ffff \ue000",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "x" * 1000 + "\n" * 100 + "ab" * 500,
    "<|endoftext|>start<|endoftext|><|endoftext|> end <|endoftext|",
    "<|begin_of_text|>a<|end_of_text|> b<|im_start|>user\nhi<|im_end|>\n<|eot_id|>",
    "",
    " ",
    "\n",
    "  \n",
]
TEXTS = PROSE + CODE + ODD


def train(pre, special, normalizer=None, size=1200, merges=True):
    tokenizer = Tokenizer(models.BPE(ignore_merges=merges))
    if normalizer:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False, min_frequency=2
    )
    tokenizer.train_from_iterator(PROSE * 2 + CODE * 3 + ODD[:10], trainer)
    tokenizer.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in special])
    return tokenizer


def split(pattern):
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


MARK = "\u2581"
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
TO_MARK = {"type": "Replace", "pattern": {"String": " "}, "content": MARK}
FROM_MARK = {"type": "Replace", "pattern": {"String": MARK}, "content": " "}
PREPEND = {"type": "Prepend", "prepend": MARK}
STRIP = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
NAMES = ["<unk>", "<s>", "</s>"]


def piece_model(size, letters=90, across=False, corpus=None):
    """A model with byte fallback; `across`: with merges that go across spaces. Rare characters are left to bytes."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(MARK), normalizers.Replace(" ", MARK)])
    if not across:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=True)
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=NAMES + BYTES, limit_alphabet=letters, show_progress=False, min_frequency=2
    )
    tokenizer.train_from_iterator(corpus or PROSE * 2 + CODE * 3 + ODD[:10], trainer)
    return json.loads(tokenizer.to_str())["model"]


def added_token(content, token_id, special=True, normalized=False, lstrip=False, rstrip=False):
    return {"id": token_id, "content": content, "single_word": False, "lstrip": lstrip, "rstrip": rstrip,
            "normalized": normalized, "special": special}


def piece_tokenizer(model, normalizer, pre_tokenizer, decoder, more=()):
    """The whole file; `more`: options of added tokens beside <unk>, <s> and </s>."""
    added = [added_token(name, model["vocab"][name]) for name in NAMES]
    for options in more:  # the library numbers new ones in this order, whatever the file says
        new_id = len(model["vocab"]) + sum(token["id"] >= len(model["vocab"]) for token in added)
        added.append(added_token(**options, token_id=model["vocab"].get(options["content"], new_id)))
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "decoder": decoder, "model": model,
    }


def piece_tokenizers():
    fall_back = [FROM_MARK, {"type": "ByteFallback"}, {"type": "Fuse"}]
    llama2 = piece_tokenizer(
        piece_model(900), {"type": "Sequence", "normalizers": [PREPEND, TO_MARK]}, None,
        {"type": "Sequence", "decoders": fall_back + [STRIP]},
        [{"content": "[INST]", "special": False, "normalized": True}, {"content": "<pad>", "rstrip": True}],
    )
    llama2["model"]["merges"] = [" ".join(merge) for merge in llama2["model"]["merges"]]
    mistral = piece_tokenizer(
        piece_model(800), None, {"type": "Metaspace", "replacement": MARK, "prepend_scheme": "first", "split": False},
        {"type": "Sequence", "decoders": fall_back + [STRIP]}, [{"content": "[INST]"}, {"content": "[/INST]"}],
    )
    gemma = piece_tokenizer(
        piece_model(1000, letters=200, across=True), TO_MARK,
        {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False},
        {"type": "Sequence", "decoders": fall_back},
        [{"content": content, "special": False} for content in ("\n\n", "\n\n\n", MARK * 2, MARK * 3, "<start_of_turn>")],
    )
    return {"llama2": llama2, "mistral": mistral, "gemma": gemma}


def record_decoding(tokenizer, rng):
    """Lists of ids and their texts: of the corpus, and at random with many byte tokens."""
    lists = [tokenizer.encode(text, add_special_tokens=False).ids for text in TEXTS if len(text) < 60]
    size = tokenizer.get_vocab_size()
    spelt = [[tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in text.encode()] for text in ("▁", "é", "👍", " ", "\n", "雪")]
    for _ in range(100):
        ids = []
        for _ in range(rng.randrange(8)):
            kind = rng.randrange(4)
            ids += (
                [rng.randrange(3, 259)] if kind == 0
                else rng.choice(spelt) if kind == 1
                else [tokenizer.token_to_id(MARK)] if kind == 2
                else [rng.randrange(size)]
            )
        lists.append(ids)
    return [[ids, tokenizer.decode(ids, skip_special_tokens=False)] for ids in lists]


def main():
    folder = pathlib.Path(sys.argv[1])
    gpt2 = train(pre_tokenizers.ByteLevel(add_prefix_space=False), ["<|endoftext|>"], merges=False)
    gpt2.post_processor = processors.ByteLevel(trim_offsets=False)
    llama3 = train(split(LLAMA3), ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"])
    begin = llama3.token_to_id("<|begin_of_text|>")
    llama3.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=True),
            processors.TemplateProcessing(
                single="<|begin_of_text|> $A",
                pair="<|begin_of_text|> $A <|begin_of_text|>:1 $B:1",
                special_tokens=[("<|begin_of_text|>", begin)],
            ),
        ]
    )
    qwen2 = train(split(QWEN2), ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], normalizers.NFC(), merges=False)
    qwen2.post_processor = processors.ByteLevel(trim_offsets=False)
    cases = {"texts": TEXTS}
    for name, tokenizer in (("gpt2", gpt2), ("llama3", llama3), ("qwen2", qwen2)):
        data = json.loads(tokenizer.to_str())
        if name == "gpt2":  # the older way to write merges
            data["model"]["merges"] = [" ".join(m) for m in data["model"]["merges"]]
        text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
        (folder / f"tokenizer_{name}.json").write_text(text + "\n", encoding="utf-8")
        tokenizer = Tokenizer.from_str(text)
        cases[name] = [tokenizer.encode(t, add_special_tokens=False).ids for t in TEXTS]
        cases[name + "_special"] = [tokenizer.encode(t).ids for t in TEXTS]
    rng = random.Random(1)
    for name, data in piece_tokenizers().items():
        text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
        (folder / f"tokenizer_{name}.json").write_text(text + "\n", encoding="utf-8")
        tokenizer = Tokenizer.from_str(text)
        cases[name] = [tokenizer.encode(t, add_special_tokens=False).ids for t in TEXTS]
        cases[name + "_special"] = [tokenizer.encode(t).ids for t in TEXTS]
        cases[name + "_decoded"] = record_decoding(tokenizer, rng)
    # Escapes keep line ends and invisible characters safe from editors.
    lines = ",\n".join(f'"{key}": {json.dumps(value, separators=(",", ":"))}' for key, value in cases.items())
    (folder / "tokenizer_cases.json").write_text("{" + lines + "}\n", encoding="ascii")


if __name__ == "__main__":
    main()
