"""An independent Llama in plain numpy: the truth that the runtime's exact mode is compared with.

It shares no code and no method with the runtime: it reads the GGUF with the `gguf` package, dequantises with that
package's own routines, keeps llama.cpp's interleaved rotary pairs instead of un-permuting rows, and attends over
ordinary contiguous arrays.

    python llama_numpy.py MODEL.gguf golden.json golden-hidden.safetensors passage.txt passage.json

needs the PyPI packages numpy, gguf and tokenizers. It reads passage.txt, and writes
- golden.json: for each prompt its text, its token ids, 48 greedy tokens, the gap between the two largest logits
  before each of them, and the eight largest logits after the prompt;
- golden-hidden.safetensors: `hidden` f32 [positions of all prompts, hidden size], the normalised hidden state at
  every prompt position. Logits are the output matrix times these, so the file holds every logit of every position;
- passage.json: the token ids of passage.txt and their mean negative log-likelihood in nats.
"""

import json
import struct
import sys

import numpy as np
from gguf import GGUFReader, dequantize
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

GENERATED = 48
SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"

QUESTIONS = [
    "What is the capital of France?",
    "Name three primary colours.",
    "Write one sentence about the sea.",
    "How many days are there in a week?",
    "Explain gravity to a child.",
]
TEXTS = [
    "The capital of France is",
    "Once upon a time, in a village by the river, there lived",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    "1, 2, 3, 5, 8, 13, 21,",
    "Water boils at 100 degrees Celsius because",
    "Dear Sir or Madam,\n\nI am writing to",
    "La capitale de la France est",
    "Der schnelle braune Fuchs springt",
    "The three laws of motion were described by",
    "import numpy as np\n\nx = np.zeros((3, 4))\nprint(x.",
    "Q: What is 12 times 12?\nA:",
    "In 1969, two astronauts",
    "The recipe needs flour, sugar, eggs and",
    "SELECT name, age FROM users WHERE",
    "A haiku about autumn:\n",
    "The meaning of the word \"ephemeral\" is",
    "{\"name\": \"Ada\", \"born\": 1815, \"field\":",
    "Emoji test 🙂 and accents: café, naïve, Zürich.",
    "x",
    "There are many reasons to read old books. The first is that they show how people thought before us. The second is "
    "that the language itself is a pleasure. The third, which is less often named, is that they were not written for us, "
    "and so they do not flatter us. When we read them, we are guests in a house whose rules we do not know, and",
]


def chat(question):
    return (
        f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
    )


class Llama:
    def __init__(self, path):
        reader = GGUFReader(path)
        self.field = lambda key: reader.fields[key].contents()
        self.weights = {t.name: dequantize(t.data, t.tensor_type).astype(np.float32) for t in reader.tensors}
        self.layers = self.field("llama.block_count")
        self.heads = self.field("llama.attention.head_count")
        self.kv_heads = self.field("llama.attention.head_count_kv")
        self.dim = self.field("llama.rope.dimension_count")
        self.eps = self.field("llama.attention.layer_norm_rms_epsilon")
        base = self.field("llama.rope.freq_base")
        self.frequencies = base ** (-np.arange(0, self.dim, 2, dtype=np.float64) / self.dim)
        self.head = self.weights.get("output.weight", self.weights["token_embd.weight"])

    def norm(self, x, weight):
        x64 = x.astype(np.float64)
        scale = 1.0 / np.sqrt((x64 * x64).mean(-1, keepdims=True) + self.eps)
        return (x64 * scale * weight).astype(np.float32)

    def rotate(self, x, positions):
        """Interleaved pairs (2i, 2i+1), as llama.cpp stores q and k."""
        angle = positions[:, None, None] * self.frequencies[None, None, :]
        even, odd = x[..., 0::2].astype(np.float64), x[..., 1::2].astype(np.float64)
        out = np.empty(x.shape, np.float64)
        out[..., 0::2] = even * np.cos(angle) - odd * np.sin(angle)
        out[..., 1::2] = even * np.sin(angle) + odd * np.cos(angle)
        return out.astype(np.float32)

    def forward(self, tokens, cache):
        """Normalised hidden states [len(tokens), hidden] after appending `tokens` to `cache`."""
        start = cache[0][0].shape[0] if cache[0] is not None else 0
        positions = np.arange(start, start + len(tokens))
        x = self.weights["token_embd.weight"][tokens]
        for layer in range(self.layers):
            w = lambda name: self.weights[f"blk.{layer}.{name}.weight"]
            h = self.norm(x, w("attn_norm"))
            q = self.rotate((h @ w("attn_q").T).reshape(len(tokens), self.heads, self.dim), positions)
            k = self.rotate((h @ w("attn_k").T).reshape(len(tokens), self.kv_heads, self.dim), positions)
            v = (h @ w("attn_v").T).reshape(len(tokens), self.kv_heads, self.dim)
            if cache[layer] is not None:
                k = np.concatenate([cache[layer][0], k])
                v = np.concatenate([cache[layer][1], v])
            cache[layer] = (k, v)
            x = x + self.attend(q, k, v, start) @ w("attn_output").T
            h = self.norm(x, w("ffn_norm"))
            gate = (h @ w("ffn_gate").T).astype(np.float64)
            up = h @ w("ffn_up").T
            x = x + ((gate / (1.0 + np.exp(-gate))).astype(np.float32) * up) @ w("ffn_down").T
        return self.norm(x, self.weights["output_norm.weight"])

    def attend(self, q, k, v, start):
        group = self.heads // self.kv_heads
        out = np.empty(q.shape, np.float32)
        hidden = np.arange(k.shape[0])[None, :] > (start + np.arange(q.shape[0]))[:, None]
        for head in range(self.heads):
            scores = (q[:, head] @ k[:, head // group].T).astype(np.float64) / np.sqrt(self.dim)
            scores[hidden] = -np.inf
            scores = np.exp(scores - scores.max(-1, keepdims=True))
            out[:, head] = ((scores / scores.sum(-1, keepdims=True)) @ v[:, head // group]).astype(np.float32)
        return out.reshape(q.shape[0], -1)


def tokenizer(model):
    """SmolLM2's: single digits, then GPT-2 byte-level BPE; control tokens are matched whole."""
    tokens, merges = model.field("tokenizer.ggml.tokens"), model.field("tokenizer.ggml.merges")
    types = model.field("tokenizer.ggml.token_type")
    result = Tokenizer(
        models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=[tuple(m.split(" ", 1)) for m in merges])
    )
    result.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    result.decoder = decoders.ByteLevel()
    result.add_special_tokens([t for t, kind in zip(tokens, types) if kind == 3])
    return result


def write_safetensors(path, name, array):
    raw = np.ascontiguousarray(array, "<f4").tobytes()
    header = json.dumps({name: {"dtype": "F32", "shape": list(array.shape), "data_offsets": [0, len(raw)]}}).encode()
    header += b" " * (-len(header) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(header)) + header + raw)


def score(model, tokens):
    """Mean negative log-likelihood of each token after the first, given those before it."""
    hidden = model.forward(tokens, [None] * model.layers)
    total = 0.0
    for start in range(0, len(tokens) - 1, 128):
        targets = tokens[start + 1 : start + 129]
        logits = (hidden[start : start + len(targets)] @ model.head.T).astype(np.float64)
        peak = logits.max(-1)
        total += (np.log(np.exp(logits - peak[:, None]).sum(-1)) + peak).sum()
        total -= logits[np.arange(len(targets)), targets].sum()
    return total / (len(tokens) - 1)


def main(model_path, golden_path, hidden_path, text_path, passage_path):
    model = Llama(model_path)
    encode = tokenizer(model)
    with open(text_path, encoding="utf-8") as file:
        tokens = encode.encode(file.read(), add_special_tokens=False).ids
    with open(passage_path, "w", encoding="utf-8") as file:
        json.dump({"mean_nll": score(model, tokens), "tokens": tokens}, file)
        file.write("\n")
    cases, states = [], []
    for text in [chat(question) for question in QUESTIONS] + TEXTS:
        prompt = encode.encode(text, add_special_tokens=False).ids
        cache = [None] * model.layers
        hidden = model.forward(prompt, cache)
        states.append(hidden)
        logits = model.head @ hidden[-1]
        top = np.argsort(-logits)[:8]
        case = {"text": text, "prompt": prompt, "greedy": [], "gaps": [],
                "top_logits": [[int(i), round(float(logits[i]), 4)] for i in top]}
        for _ in range(GENERATED):
            best = np.argsort(-logits)[:2]
            case["greedy"].append(int(best[0]))
            case["gaps"].append(round(float(logits[best[0]] - logits[best[1]]), 5))
            logits = model.head @ model.forward([int(best[0])], cache)[-1]
        print(f"{len(cases) + 1}: {len(prompt)} tokens → {encode.decode(case['greedy'])!r}", file=sys.stderr)
        cases.append(case)
    with open(golden_path, "w", encoding="utf-8") as file:
        file.write("[\n" + ",\n".join(json.dumps(case, ensure_ascii=False) for case in cases) + "\n]\n")
    write_safetensors(hidden_path, "hidden", np.concatenate(states))


if __name__ == "__main__":
    main(*sys.argv[1:])
