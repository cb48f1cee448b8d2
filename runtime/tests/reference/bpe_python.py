"""Tokenises texts with plain Python, from a GGUF file's own vocabulary and merges: an oracle for the tokenizer's tests.

    pip install gguf regex
    python bpe_python.py SmolLM2-135M-Instruct.Q4_1.gguf > bpe-smollm2.json

Nothing here is shared with the runtime: the reader is the `gguf` package, the pattern engine is `regex`, and merging
follows the definition (merge the adjacent pair of lowest rank until none is left).
"""

import json
import sys

import gguf
import regex

WORDS = regex.compile(
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
)

TEXTS = [
    "",
    "Hello, world!",
    "The capital of France is Paris.",
    "  leading and trailing  ",
    "tabs\tand\nnewlines\r\n\r\n  indented\n\n\nend",
    "12345 67 8.90 3,14 2026-11-23 x1y22z333",
    "½ Ⅷ ² ٣٤ ১২৩",
    "don't we'll I'm they've you're he'd it's DON'T",
    "naïve café résumé Ångström e\u0301",
    "Привет, мир! Как дела?",
    "日本語のテキストと漢字。",
    "中文没有空格,标点“引号”",
    "한국어 문장입니다.",
    "مرحبا بالعالم",
    "שלום עולם",
    "नमस्ते दुनिया",
    "สวัสดีชาวโลก",
    "😀 👍🏽 👩‍👩‍👧‍👦 🇫🇷 ❤️",
    "a😀b",
    "fn main() { println!(\"{:?}\", x[0] += 1); } // done",
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    "half <|im_sta rt|> and <|endoftext|><|im_end|>x",
    "\u00a0\u2003\u200bspaces\u3000here",
    "\x00\x01\x7f control",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "https://example.com/a_b?c=d&e=%20#f",
    "x" * 300 + " " * 20 + "1" * 20,
]


def byte_alphabet():
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet, extra = {}, 0
    for byte in range(256):
        if byte in printable:
            alphabet[byte] = chr(byte)
        else:
            alphabet[byte] = chr(0x100 + extra)
            extra += 1
    return alphabet


def words_of(text):
    # Every numeric character stands alone, everything between is split by GPT-2's pattern.
    for piece in regex.findall(r"\p{N}|\P{N}+", text):
        yield from WORDS.findall(piece)


def merge(word, ranks):
    parts = list(word)
    while len(parts) > 1:
        best = min(
            range(len(parts) - 1),
            key=lambda i: ranks.get((parts[i], parts[i + 1]), float("inf")),
        )
        pair = (parts[best], parts[best + 1])
        if pair not in ranks:
            break
        merged, i = [], 0
        while i < len(parts):
            if i + 1 < len(parts) and (parts[i], parts[i + 1]) == pair:
                merged.append(parts[i] + parts[i + 1])
                i += 2
            else:
                merged.append(parts[i])
                i += 1
        parts = merged
    return parts


def main():
    fields = gguf.GGUFReader(sys.argv[1]).fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    kinds = fields["tokenizer.ggml.token_type"].contents()
    merges = fields["tokenizer.ggml.merges"].contents()
    ids = {token: i for i, token in enumerate(tokens)}
    ranks = {tuple(m.split(" ")): rank for rank, m in enumerate(merges)}
    alphabet = byte_alphabet()
    special = [token for token, kind in zip(tokens, kinds) if kind in (2, 3, 4)]
    special.sort(key=len, reverse=True)
    splitter = regex.compile("(" + "|".join(map(regex.escape, special)) + ")")
    out = []
    for text in TEXTS:
        encoded = []
        for part in splitter.split(text):
            if part in special:
                encoded.append(ids[part])
                continue
            for word in words_of(part):
                symbols = "".join(alphabet[b] for b in word.encode())
                encoded += [ids[p] for p in merge(symbols, ranks)]
        out.append({"text": text, "tokens": encoded})
    print("[\n" + ",\n".join(map(json.dumps, out)) + "\n]")


main()
