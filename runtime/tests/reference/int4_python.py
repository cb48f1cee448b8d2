"""Writes int4.json: one small matrix as AWQ (GEMM), GPTQ (v1, v2) and compressed-tensors store it, and its true values.

Written from the formats' definitions, value by value, without any of the runtime's code:

- AWQ: int32 `qweight[K, N/8]` and `qzeros[K/g, N/8]`; nibble i of a word is column 8c + (0, 2, 4, 6, 1, 3, 5, 7)[i].
- GPTQ: int32 `qweight[K/8, N]`, nibble i is input 8r + i; `qzeros[K/g, N/8]` in order, v1 stores zero - 1 (modulo 16).
- compressed-tensors: int32 `weight_packed[N, K/8]` of q + 8 for signed q; `weight_scale[N, K/g]`;
  `weight_zero_point[N/8, K/g]` of zero + 8 for signed zeros, packed along the outputs.

Run: python3 int4_python.py > int4.json
"""
import json

import numpy as np

N, K, GROUP = 24, 96, 32
AWQ = (0, 2, 4, 6, 1, 3, 5, 7)
random = np.random.default_rng(7)
q = random.integers(0, 16, (N, K))
zero = random.integers(0, 16, (N, K // GROUP))
zero[0, 0], zero[1, 0] = 0, 15
scale = random.uniform(0.001, 0.05, (N, K // GROUP)).astype(np.float16)


def pack(values, axis, order=tuple(range(8))):
    values = np.moveaxis(values, axis, -1)
    words = np.zeros((*values.shape[:-1], values.shape[-1] // 8), dtype=np.uint64)
    for word in range(words.shape[-1]):
        for nibble, place in enumerate(order):
            words[..., word] |= values[..., 8 * word + place].astype(np.uint64) << np.uint64(4 * nibble)
    return np.moveaxis(words, -1, axis).astype(np.uint32)


def dequantize(zero):
    zero, wide = np.repeat(zero, GROUP, axis=1), np.repeat(scale.astype(np.float64), GROUP, axis=1)
    exact = (q - zero) * wide
    assert (exact.astype(np.float32) == exact).all()
    return exact.astype(np.float32).tobytes().hex()


def tensor(dtype, values):
    return {"dtype": dtype, "shape": list(values.shape), "data": np.ascontiguousarray(values).tobytes().hex()}


def words(values):
    return tensor("I32", values)


config = {"bits": 4, "group_size": GROUP}
weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": GROUP}
compressed = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
order = np.repeat(np.arange(K // GROUP, dtype=np.int32), GROUP)
gptq = {"qweight": words(pack(q.T, 0)), "scales": tensor("F16", scale.T), "g_idx": words(order)}
signed_q, signed_zero = q - 8, zero - 8
cases = {
    "awq": {
        "config": {"quant_method": "awq", "zero_point": True, "version": "gemm", **config},
        "tensors": {
            "qweight": words(pack(q.T, 1, AWQ)),
            "qzeros": words(pack(zero.T, 1, AWQ)),
            "scales": tensor("F16", scale.T),
        },
        "values": "asymmetric",
    },
    "gptq_v1": {
        "config": {"quant_method": "gptq", "desc_act": False, "sym": False, **config},
        "tensors": {"qzeros": words(pack((zero.T - 1) % 16, 1)), **gptq},
        "values": "asymmetric",
    },
    "gptq_v2": {
        "config": {"quant_method": "gptq", "checkpoint_format": "gptq_v2", "sym": False, **config},
        "tensors": {"qzeros": words(pack(zero.T, 1)), **gptq},
        "values": "asymmetric",
    },
    "gptq_symmetric": {
        "config": {"quant_method": "gptq", "checkpoint_format": "gptq", "sym": True, **config},
        "tensors": {"qzeros": words(np.full((K // GROUP, N // 8), 0x77777777, dtype=np.uint32)), **gptq},
        "values": "symmetric",
    },
    "compressed_asymmetric": {
        "config": {**compressed, "config_groups": {"group_0": {"weights": {"symmetric": False, **weights}}}},
        "tensors": {
            "weight_packed": words(pack(signed_q + 8, 1)),
            "weight_scale": tensor("F16", scale),
            "weight_zero_point": words(pack(signed_zero + 8, 0)),
        },
        "values": "asymmetric",
    },
    "compressed_symmetric": {
        "config": {**compressed, "config_groups": {"group_0": {"weights": {"symmetric": True, **weights}}}},
        "tensors": {"weight_packed": words(pack(signed_q + 8, 1)), "weight_scale": tensor("F16", scale)},
        "values": "symmetric",
    },
}
values = {"asymmetric": dequantize(zero), "symmetric": dequantize(np.full_like(zero, 8))}
print(json.dumps({"rows": N, "columns": K, "values": values, "cases": cases}))
