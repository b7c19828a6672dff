"""Linears in every packing that is read, made code by code, and the weights that they stand for, one by one.

Nothing here shares a line with what is tested: words are integers of Python, filled bit by bit.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

GROUP = 32
Matrix = list[list[float]]
Tensors = dict[str, torch.Tensor]
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def words(codes: list[int], bits: int) -> list[int]:
    """Codes in one stream of bits, the first lowest, as signed words of 32."""
    stream = sum(code << (bits * place) for place, code in enumerate(codes))
    count = -(-len(codes) * bits // 32)
    found = [(stream >> (32 * index)) & 0xFFFFFFFF for index in range(count)]
    return [word - 2**32 if word >= 2**31 else word for word in found]


def columns_packed(codes: list[list[int]], bits: int) -> torch.Tensor:
    """(n, m) codes → (n · bits / 32, m) words: each column is a stream."""
    return torch.tensor([words(list(column), bits) for column in zip(*codes, strict=True)], dtype=torch.int32).T


def rows_packed(codes: list[list[int]], bits: int) -> torch.Tensor:
    return torch.tensor([words(row, bits) for row in codes], dtype=torch.int32)


def grid(rows: int, columns: int, most: int, draw: random.Random) -> list[list[int]]:
    return [[draw.randrange(most) for _ in range(columns)] for _ in range(rows)]


def steps(rows: int, columns: int, draw: random.Random, dtype: torch.dtype) -> torch.Tensor:
    return torch.tensor([[draw.uniform(0.001, 0.01) for _ in range(columns)] for _ in range(rows)]).to(dtype)


def gptq(rows: int, columns: int, draw: random.Random, *, bits: int, v2: bool = False, order: bool = False) -> Any:
    groups = columns // GROUP
    codes, scales = grid(rows, columns, 2**bits, draw), steps(rows, groups, draw, torch.float16)
    zeros = [[draw.randrange(1, 2**bits) for _ in range(groups)] for _ in range(rows)]
    index = [i // GROUP for i in range(columns)]
    if order:
        draw.shuffle(index)
    weight = [
        [(codes[o][i] - zeros[o][index[i]]) * scales[o, index[i]].item() for i in range(columns)] for o in range(rows)
    ]
    told = [[zeros[o][g] - (not v2) for o in range(rows)] for g in range(groups)]
    tensors = {
        "qweight": columns_packed([[codes[o][i] for o in range(rows)] for i in range(columns)], bits),
        "qzeros": rows_packed(told, bits),
        "scales": scales.T,
        "g_idx": torch.tensor(index, dtype=torch.int32),
    }
    return tensors, weight


def awq(rows: int, columns: int, draw: random.Random, *, gemv: bool = False) -> Any:
    groups = columns // GROUP
    codes, zeros = grid(rows, columns, 16, draw), grid(rows, groups, 16, draw)
    scales = steps(rows, groups, draw, torch.float16)
    weight = [
        [(codes[o][i] - zeros[o][i // GROUP]) * scales[o, i // GROUP].item() for i in range(columns)]
        for o in range(rows)
    ]
    if gemv:  # groups are filled up to a multiple of 4 words of 8
        wide = -(-groups // 32) * 32
        padded = [row + [0] * (wide - groups) for row in zeros]
        filled = torch.nn.functional.pad(scales, (0, wide - groups))
        return {"qweight": rows_packed(codes, 4), "qzeros": rows_packed(padded, 4), "scales": filled}, weight
    order = (0, 2, 4, 6, 1, 3, 5, 7)

    def interleaved(row: list[int]) -> list[int]:
        return [row[start + place] for start in range(0, len(row), 8) for place in order]

    across = [interleaved([codes[o][i] for o in range(rows)]) for i in range(columns)]
    down = [interleaved([zeros[o][g] for o in range(rows)]) for g in range(groups)]
    return {"qweight": rows_packed(across, 4), "qzeros": rows_packed(down, 4), "scales": scales.T}, weight


def pack_quantized(
    rows: int, columns: int, draw: random.Random, *, bits: int, zeros: bool = False, channel: bool = False
) -> Any:
    groups = 1 if channel else columns // GROUP
    size = columns // groups
    codes, scales = grid(rows, columns, 2**bits, draw), steps(rows, groups, draw, torch.bfloat16)
    points = grid(rows, groups, 2**bits, draw) if zeros else [[2 ** (bits - 1)] * groups] * rows
    weight = [
        [(codes[o][i] - points[o][i // size]) * scales[o, i // size].item() for i in range(columns)]
        for o in range(rows)
    ]
    tensors = {"weight_packed": rows_packed(codes, bits), "weight_scale": scales}
    tensors["weight_shape"] = torch.tensor([rows, columns])
    if zeros:
        tensors["weight_zero_point"] = columns_packed(points, bits)
    return tensors, weight


def int8(rows: int, columns: int, draw: random.Random) -> Any:
    codes, scales = grid(rows, columns, 255, draw), steps(rows, 1, draw, torch.bfloat16)
    weight = [[(code - 127) * scales[o, 0].item() for code in codes[o]] for o in range(rows)]
    signed = torch.tensor([[code - 127 for code in row] for row in codes], dtype=torch.int8)
    return {"weight": signed, "weight_scale": scales, "input_scale": torch.tensor([0.5])}, weight


def fp8(rows: int, columns: int, draw: random.Random, *, scale: str, name: str = "weight_scale", block: int = 0) -> Any:
    held = torch.tensor([[draw.gauss(0, 30) for _ in range(columns)] for _ in range(rows)]).to(torch.float8_e4m3fn)
    shape = {"tensor": (1, 1), "row": (rows, 1), "block": (-(-rows // (block or 1)), -(-columns // (block or 1)))}
    dtype = torch.bfloat16 if scale == "row" else torch.float32
    factors = steps(*shape[scale], draw, dtype)
    high, wide = -(-rows // factors.shape[0]), -(-columns // factors.shape[1])
    high, wide = (block, block) if scale == "block" else (high, wide)
    weight = [
        [held[o, i].float().item() * factors[o // high, i // wide].float().item() for i in range(columns)]
        for o in range(rows)
    ]
    told = factors.reshape(()) if scale == "tensor" else factors
    found = {"weight": held, name: told}
    return (found if scale == "block" else found | {"input_scale": torch.tensor(0.25)}), weight


def halves(codes: list[list[int]]) -> torch.Tensor:
    return torch.tensor([[row[i] | row[i + 1] << 4 for i in range(0, len(row), 2)] for row in codes], dtype=torch.uint8)


def level(code: int) -> float:
    return E2M1[code % 8] * (-1 if code > 7 else 1)


def nvfp4(rows: int, columns: int, draw: random.Random, *, divides: bool) -> Any:
    codes = grid(rows, columns, 16, draw)
    scales = torch.tensor([[draw.uniform(1, 400) for _ in range(columns // 16)] for _ in range(rows)])
    scales = scales.to(torch.float8_e4m3fn)
    over_all = torch.tensor(3000.0 if divides else 1 / 3000)
    factors = scales.float() / over_all if divides else scales.float() * over_all
    weight = [[level(codes[o][i]) * factors[o, i // 16].item() for i in range(columns)] for o in range(rows)]
    if divides:
        tensors = {"weight_packed": halves(codes), "weight_scale": scales, "weight_global_scale": over_all.view(1)}
        return tensors | {"input_global_scale": torch.tensor([7.0])}, weight
    tensors = {"weight": halves(codes), "weight_scale": scales, "weight_scale_2": over_all}
    return tensors | {"input_scale": torch.tensor(0.1)}, weight


def mxfp4(rows: int, columns: int, draw: random.Random) -> Any:
    codes, exponents = grid(rows, columns, 16, draw), grid(rows, columns // 32, 12, draw)
    weight = [[level(codes[o][i]) * 2.0 ** (exponents[o][i // 32] - 12) for i in range(columns)] for o in range(rows)]
    scales = torch.tensor([[value + 115 for value in row] for row in exponents], dtype=torch.uint8)
    return {"weight_packed": halves(codes), "weight_scale": scales}, weight


def blocks(rows: int, columns: int, draw: random.Random, *, kind: str, double: bool = False) -> Any:
    """By bitsandbytes itself, which is installed wherever optikit is."""
    from bitsandbytes import functional

    dense = torch.tensor([[draw.gauss(0, 0.05) for _ in range(columns)] for _ in range(rows)]).bfloat16()
    data, state = functional.quantize_4bit(dense, blocksize=64, compress_statistics=double, quant_type=kind)
    tensors = {"weight": data} | {f"weight.{key}": value for key, value in state.as_dict(packed=True).items()}
    return tensors, functional.dequantize_4bit(data, state)


def llm_int8(rows: int, columns: int, draw: random.Random) -> Any:
    from bitsandbytes import functional

    dense = torch.tensor([[draw.gauss(0, 0.05) for _ in range(columns)] for _ in range(rows)]).half()
    data, largest, _ = functional.int8_vectorwise_quant(dense)
    tensors = {"weight": data, "SCB": largest, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    return tensors, functional.int8_vectorwise_dequant(data, largest)


def _groups(**weights: Any) -> dict[str, Any]:
    return {"config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}}}


@dataclass(frozen=True)
class Packing:
    """A packing: its settings, the file they lie in, and what makes a linear of it."""

    make: Callable[..., Any]
    settings: dict[str, Any]
    how: dict[str, Any] = field(default_factory=dict)
    file: str = "config.json"
    dtype: str = "bfloat16"


GPTQ = {"quant_method": "gptq", "group_size": GROUP}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "modules_to_not_convert": None}
CT = {"quant_method": "compressed-tensors", "ignore": ["lm_head"]}
INT = {"type": "int", "symmetric": True}
FLOAT = {"type": "float", "symmetric": True}
W4 = INT | {"num_bits": 4, "strategy": "group", "group_size": GROUP}
W8 = INT | {"num_bits": 8, "strategy": "channel"}
PACKED = CT | {"format": "pack-quantized"}
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "modules_to_not_convert": ["lm_head"]}
MODELOPT = {"quant_method": "modelopt", "producer": {"name": "modelopt"}, "ignore": ["lm_head"]}
PACKINGS: dict[str, Packing] = {
    "gptq 2 bits": Packing(gptq, {**GPTQ, "bits": 2, "sym": False}, {"bits": 2}, dtype="float16"),
    "gptq 3 bits": Packing(gptq, {**GPTQ, "bits": 3}, {"bits": 3}),
    "gptq 4 bits": Packing(gptq, {**GPTQ, "bits": 4}, {"bits": 4}, dtype="float16"),
    "gptq 4 bits, desc_act": Packing(gptq, {**GPTQ, "bits": 4, "desc_act": True}, {"bits": 4, "order": True}),
    "gptq 8 bits": Packing(gptq, {**GPTQ, "bits": 8}, {"bits": 8}),
    "gptq_v2": Packing(gptq, {**GPTQ, "bits": 4, "checkpoint_format": "gptq_v2"}, {"bits": 4, "v2": True}),
    "gptq_v2, 3 bits, desc_act": Packing(
        gptq, {**GPTQ, "bits": 3, "format": "gptq_v2", "desc_act": True}, {"bits": 3, "v2": True, "order": True}
    ),
    "gptq, old": Packing(
        gptq, {"bits": 4, "group_size": GROUP, "desc_act": False}, {"bits": 4}, file="quantize_config.json"
    ),
    "awq gemm": Packing(awq, {**AWQ, "version": "gemm"}, dtype="float16"),
    "awq gemv": Packing(awq, {**AWQ, "version": "gemv"}, {"gemv": True}),
    "awq, old": Packing(
        awq, {"zero_point": True, "q_group_size": GROUP, "w_bit": 4, "version": "GEMM"}, file="quant_config.json"
    ),
    "awq gemv, old": Packing(
        awq, {"q_group_size": GROUP, "w_bit": 4, "version": "GEMV"}, {"gemv": True}, file="quant_config.json"
    ),
    "W4A16": Packing(pack_quantized, PACKED | _groups(**W4), {"bits": 4}),
    "W4A16, zero points": Packing(
        pack_quantized, PACKED | _groups(**W4 | {"symmetric": False}), {"bits": 4, "zeros": True}
    ),
    "W3A16": Packing(pack_quantized, PACKED | _groups(**W4 | {"num_bits": 3}), {"bits": 3}),
    "W8A16": Packing(pack_quantized, PACKED | _groups(**W8), {"bits": 8, "channel": True}),
    "W8A8, static": Packing(int8, CT | {"format": "int-quantized"} | _groups(**W8)),
    "float-quantized": Packing(
        fp8,
        CT | {"format": "float-quantized"} | _groups(**FLOAT, num_bits=8, strategy="channel"),
        {"scale": "row"},
    ),
    "float-quantized, static": Packing(
        fp8,
        CT | {"format": "float-quantized"} | _groups(**FLOAT, num_bits=8, strategy="tensor"),
        {"scale": "tensor"},
    ),
    "FP8 in blocks": Packing(
        fp8,
        FP8 | {"weight_block_size": [48, 48]},
        {"scale": "block", "block": 48, "name": "weight_scale_inv"},
    ),
    "FP8 static": Packing(fp8, FP8 | {"activation_scheme": "static"}, {"scale": "tensor"}),
    "FP8 static, inverse": Packing(
        fp8, FP8 | {"activation_scheme": "static"}, {"scale": "tensor", "name": "weight_scale_inv"}
    ),
    "FP8 of FBGEMM": Packing(fp8, {"quant_method": "fbgemm_fp8", "modules_to_not_convert": []}, {"scale": "row"}),
    "ModelOpt FP8": Packing(fp8, MODELOPT | {"quant_algo": "FP8"}, {"scale": "tensor"}),
    "ModelOpt NVFP4": Packing(
        nvfp4,
        MODELOPT | {"quant_algo": "NVFP4"} | _groups(**FLOAT, num_bits=4, group_size=16),
        {"divides": False},
    ),
    "ModelOpt NVFP4, old": Packing(
        nvfp4,
        {"producer": {}, "quantization": {"quant_algo": "NVFP4", "group_size": 16, "exclude_modules": ["lm_head"]}},
        {"divides": False},
        file="hf_quant_config.json",
    ),
    "NVFP4": Packing(
        nvfp4,
        CT | {"format": "nvfp4-pack-quantized"} | _groups(**FLOAT, num_bits=4, strategy="tensor_group", group_size=16),
        {"divides": True},
    ),
    "MXFP4": Packing(
        mxfp4, CT | {"format": "mxfp4-pack-quantized"} | _groups(**FLOAT, num_bits=4, strategy="group", group_size=32)
    ),
    "bitsandbytes FP4": Packing(
        blocks,
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
        {"kind": "fp4", "double": True},
    ),
    "bitsandbytes NF4": Packing(
        blocks,
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
        {"kind": "nf4", "double": True},
    ),
    "bitsandbytes int8": Packing(llm_int8, {"quant_method": "bitsandbytes", "load_in_8bit": True}, dtype="float16"),
}
TRAITS = {
    *("gptq 4 bits", "gptq 4 bits, desc_act", "gptq 8 bits", "awq gemm", "bitsandbytes NF4", "bitsandbytes int8"),
    *("W4A16", "W4A16, zero points", "W8A16", "ModelOpt FP8", "NVFP4", "MXFP4"),
}
"""Those that stages read as they are."""


@cache
def _made(name: str, rows: int, columns: int) -> Any:
    """Return a linear in a packing; one of a shape is enough, for they are made bit by bit."""
    packing = PACKINGS[name]
    return packing.make(rows, columns, random.Random(f"{name} {rows} {columns}"), **packing.how)


def _is_projection(linear: str) -> bool:
    return "_proj" in linear


def write(
    source: Path, dest: Path, name: str, packs: Callable[[str], bool] = _is_projection
) -> dict[str, torch.Tensor]:
    """Write a model directory with every linear of its blocks in a packing.

    Args:
        source: A dense directory.
        dest: Where to.
        name: Of the packing.
        packs: Whether a linear is packed, by its name in the files.

    Returns:
        The dense state dict that it stands for, in the dtype that its config.json names.
    """
    packing = PACKINGS[name]
    dest.mkdir(exist_ok=True)
    dtype = getattr(torch, packing.dtype)
    stored, meant = {}, {}
    for tensor_name, tensor in load_file(source / "model.safetensors").items():
        linear = tensor_name.removesuffix(".weight")
        if not packs(linear):
            stored[tensor_name] = meant[tensor_name] = tensor
            continue
        tensors, weight = _made(name, *tensor.shape)
        stored |= {f"{linear}.{suffix}": each.contiguous().clone() for suffix, each in tensors.items()}
        meant[tensor_name] = torch.as_tensor(weight).float().to(dtype)
    save_file(stored, dest / "model.safetensors", {"format": "pt"})
    config = json.loads((source / "config.json").read_text()) | {"dtype": packing.dtype}
    if packing.file == "config.json":
        config["quantization_config"] = packing.settings
    else:
        (dest / packing.file).write_text(json.dumps(packing.settings))
    (dest / "config.json").write_text(json.dumps(config))
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (dest / file).write_bytes((source / file).read_bytes())
    return meant
