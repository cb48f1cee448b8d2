#!/usr/bin/env python3
"""Writes the seeds that cannot be typed: small GGUF files and safetensors folders. Deterministic."""
import json
import struct
from pathlib import Path

HERE = Path(__file__).parent
HIDDEN, VOCAB = 32, 8


def noise(count, seed=1):
    """A xorshift stream of bytes."""
    out, x = bytearray(), seed * 2654435761 & 0xFFFFFFFF or 1
    while len(out) < count:
        x ^= x << 13 & 0xFFFFFFFF
        x ^= x >> 17
        x ^= x << 5 & 0xFFFFFFFF
        out += struct.pack("<I", x)
    return bytes(out[:count])


def halves(count, value=0.0625):
    return struct.pack(f"<{count}e", *[value] * count)


def safetensors(tensors):
    header, data = {}, b""
    for name, (kind, shape, raw) in tensors.items():
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data


def hf(matrix, layers=1):
    """A Llama of one layer; `matrix(name, rows, columns)` gives a linear layer's tensors."""
    h = HIDDEN
    tensors = {"model.embed_tokens.weight": ("F16", [VOCAB, h], halves(VOCAB * h))}
    tensors["model.norm.weight"] = ("F16", [h], halves(h, 1.0))
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}.{norm}.weight"] = ("F16", [h], halves(h, 1.0))
        for part in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
                     "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"):
            tensors |= matrix(f"{prefix}.{part}", h, h)
    return safetensors(tensors)


def dense(kind, size):
    return lambda name, n, k: {f"{name}.weight": (kind, [n, k], bytes(n * k * size))}


def awq(name, n, k):
    return {f"{name}.qweight": ("I32", [k, n // 8], noise(n * k // 2)),
            f"{name}.qzeros": ("I32", [k // 32, n // 8], noise(n * k // 64)),
            f"{name}.scales": ("F16", [k // 32, n], halves(n * k // 32))}


def gptq(name, n, k):
    return {f"{name}.qweight": ("I32", [k // 8, n], noise(n * k // 2)),
            f"{name}.qzeros": ("I32", [k // 32, n // 8], noise(n * k // 64)),
            f"{name}.scales": ("F16", [k // 32, n], halves(n * k // 32)),
            f"{name}.g_idx": ("I32", [k], struct.pack(f"<{k}i", *[i // 32 for i in range(k)]))}


def packed(symmetric):
    def matrix(name, n, k):
        tensors = {f"{name}.weight_packed": ("I32", [n, k // 8], noise(n * k // 2)),
                   f"{name}.weight_scale": ("BF16", [n, k // 32], b"\x80\x3d" * (n * k // 32)),
                   f"{name}.weight_shape": ("I64", [2], struct.pack("<2q", n, k))}
        if not symmetric:
            tensors[f"{name}.weight_zero_point"] = ("I32", [n // 8, k // 32], noise(n * k // 64))
        return tensors
    return matrix


def fp8(scale, shape):
    """Bytes in e4m3 (never its NaN), and float32 scales of `shape(rows, columns)` in `weight_SCALE`."""
    def matrix(name, n, k):
        size = shape(n, k)
        count = size[0] * size[-1]
        return {f"{name}.weight": ("F8_E4M3", [n, k], bytes(byte & 0xF7 for byte in noise(n * k))),
                f"{name}.weight_{scale}": ("F32", size, struct.pack(f"<{count}f", *[0.0625] * count))}
    return matrix


def compressed(symmetric):
    weights = {"num_bits": 4, "type": "int", "symmetric": symmetric, "strategy": "group", "group_size": 32}
    return {"quant_method": "compressed-tensors", "format": "pack-quantized",
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}, "ignore": ["lm_head"]}


def config(**more):
    base = {"architectures": ["LlamaForCausalLM"], "vocab_size": VOCAB, "hidden_size": HIDDEN,
            "intermediate_size": HIDDEN, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2,
            "rms_norm_eps": 1e-5, "max_position_embeddings": 32, "tie_word_embeddings": True, "eos_token_id": 2}
    return json.dumps(base | more).encode()


def string(text):
    return struct.pack("<Q", len(text.encode())) + text.encode()


def value(item):
    if isinstance(item, bool):
        return 7, struct.pack("<B", item)
    if isinstance(item, int):
        return 4, struct.pack("<I", item)
    if isinstance(item, float):
        return 6, struct.pack("<f", item)
    if isinstance(item, str):
        return 8, string(item)
    kind = value(item[0])[0]
    return 9, struct.pack("<IQ", kind, len(item)) + b"".join(value(part)[1] for part in item)


def gguf(metadata, tensors):
    head = struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), len(metadata))
    for key, item in metadata.items():
        kind, raw = value(item)
        head += string(key) + struct.pack("<I", kind) + raw
    data = b""
    for name, (dims, kind, raw) in tensors.items():
        data += bytes(-len(data) % 32)
        head += string(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, len(data))
        data += raw
    return head + bytes(-len(head) % 32) + data


def small_gguf(kind, row_bytes):
    h = HIDDEN
    tokens = ["<unk>", "<s>", "</s>", "a", "b", "ab", "Ġ", "<|im_end|>"]
    metadata = {
        "general.architecture": "llama", "llama.block_count": 1, "llama.context_length": 32,
        "llama.embedding_length": h, "llama.feed_forward_length": h, "llama.attention.head_count": 2,
        "llama.attention.head_count_kv": 2, "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.freq_base": 10000.0, "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": [1] * 8, "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": "{% for m in messages %}{{ m.content }}{% endfor %}",
    }
    tensors = {"token_embd.weight": ([h, VOCAB], kind, noise(VOCAB * row_bytes)),
               "output_norm.weight": ([h], 0, struct.pack(f"<{h}f", *[1.0] * h))}
    for norm in ("attn_norm", "ffn_norm"):
        tensors[f"blk.0.{norm}.weight"] = ([h], 0, struct.pack(f"<{h}f", *[1.0] * h))
    for part in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
        tensors[f"blk.0.{part}.weight"] = ([h, h], kind, noise(h * row_bytes))
    return gguf(metadata, tensors)


def main():
    folders = {
        "gguf/q4_1": small_gguf(3, 20), "gguf/q8_0": small_gguf(8, 34), "gguf/f16": small_gguf(1, 64),
        "gguf/empty": gguf({}, {}),
        "safetensors/f16": config() + b"\0" + hf(dense("F16", 2)),
        "safetensors/two_layers": config(num_hidden_layers=2, rope_scaling={
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192}) + b"\0" + hf(dense("BF16", 2), 2),
        "safetensors/qwen3": config(architectures=["Qwen3ForCausalLM"], head_dim=16) + b"\0" + hf(dense("F16", 2)),
        "quantization/awq": json.dumps({"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True,
                                        "version": "gemm"}).encode() + b"\0" + hf(awq),
        "quantization/gptq": json.dumps({"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False,
                                         "sym": True}).encode() + b"\0" + hf(gptq),
        "quantization/packed": json.dumps(compressed(True)).encode() + b"\0" + hf(packed(True)),
        "quantization/packed_zeros": json.dumps(compressed(False)).encode() + b"\0" + hf(packed(False)),
        "quantization/fp8_tensor": json.dumps({"quant_method": "fp8", "fmt": "e4m3"}).encode() + b"\0"
        + hf(fp8("scale", lambda n, k: [1])),
        "quantization/fp8_blocks": json.dumps({"quant_method": "fp8", "weight_block_size": [16, 32]}).encode() + b"\0"
        + hf(fp8("scale_inv", lambda n, k: [n // 16, k // 32])),
        "quantization/fp8_rows": json.dumps({
            "quant_method": "compressed-tensors", "format": "float-quantized", "ignore": ["lm_head"],
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": {
                "num_bits": 8, "type": "float", "strategy": "channel"}}}}).encode() + b"\0"
        + hf(fp8("scale", lambda n, k: [n, 1])),
    }
    for name, raw in folders.items():
        path = HERE / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(raw)


if __name__ == "__main__":
    main()
