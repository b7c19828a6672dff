"""Packings that work a strip of outputs at a time: what a linear becomes in files, whichever algorithm rounded it.

A linear can be larger than the memory for a float copy of it. Each of these knows where the outputs of a packed tensor
lie, so that a writer packs strip after strip, and whoever checks the file unpacks it the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from optikit.algorithms.fp4 import LEVELS
from optikit.algorithms.fp8 import BLOCK, E4M3
from optikit.algorithms.grid import Grid
from optikit.errors import IntegrityError
from optikit.formats import awq, compressed_tensors, fp4, fp8, gptq, llm_int8, nf4
from optikit.formats.gptq import pack_words, unpack_words
from optikit.models.quantization import NF4_STATE

Tensors = Mapping[str, Tensor]
SHAPE = "weight_shape"
"""Suffix of the tensor that holds (out, in) and belongs to no output."""
STRIP_ROWS = 128
"""Outputs of a strip are a multiple of this: no packed element has parts of two strips."""


@dataclass(frozen=True, kw_only=True)
class Packing:
    """How a linear is packed.

    Attributes:
        dtypes: Its tensors by suffix.
        outputs: Axis along which the outputs run, and how many share an element, by suffix; what has none of it
            belongs to all outputs alike.
        dequantize: Tensors of some outputs → their weight (out, in) float32.
        bound: Weight (out, in) and the tensors that stand for it → how far each weight may be off; None where rounding
            has no such bound.
        wrong: Tensors of some outputs, and the weight (out, in) they should stand for → what they can't be, "" if
            nothing.
    """

    dtypes: Mapping[str, torch.dtype]
    outputs: Mapping[str, tuple[int, int]]
    dequantize: Callable[[Tensors], Tensor]
    bound: Callable[[Tensor, Tensors], Tensor] | None = None
    wrong: Callable[[Tensors, Tensor], str] | None = None

    def strip(self, tensors: Tensors, start: int, stop: int) -> dict[str, Tensor]:
        """Return the tensors of outputs `start` to `stop`, of a whole linear's."""
        found = dict(tensors)
        for suffix, (axis, shared) in self.outputs.items():
            length = -(-stop // shared) - start // shared
            found[suffix] = tensors[suffix].narrow(axis, start // shared, length)
        if SHAPE in found:
            found[SHAPE] = torch.tensor([stop - start, int(tensors[SHAPE][1])])
        return found

    def joined(self, strips: Iterable[Tensors], rows: int) -> dict[str, Tensor]:
        """Return the tensors of a linear of so many outputs from those of its strips, in order."""
        whole: dict[str, Tensor] = {}
        done: dict[str, int] = {}
        for strip in strips:
            for suffix, tensor in strip.items():
                if suffix not in self.outputs:
                    whole.setdefault(suffix, tensor)
                    continue
                axis, shared = self.outputs[suffix]
                if suffix not in whole:
                    shape = list(tensor.shape)
                    shape[axis] = -(-rows // shared)
                    whole[suffix], done[suffix] = tensor.new_empty(shape), 0
                length = tensor.shape[axis]
                whole[suffix].narrow(axis, done[suffix], length).copy_(tensor)
                done[suffix] += length
        if SHAPE in whole:
            whole[SHAPE] = torch.tensor([rows, int(whole[SHAPE][1])])
        return whole


@dataclass(frozen=True, kw_only=True)
class DensePacking(Packing):
    """A weight as the source has it, of strips in float32.

    Attributes:
        dtype: Of its elements.
        transposed: It is stored (in, out).
    """

    dtype: torch.dtype
    transposed: bool

    def joined(self, strips: Iterable[Tensors], rows: int) -> dict[str, Tensor]:
        """Return the weight of a linear from its strips, (rows, in) each."""
        return super().joined(({"weight": self._stored(strip["weight"])} for strip in strips), rows)

    def _stored(self, weight: Tensor) -> Tensor:
        return (weight.T if self.transposed else weight).to(self.dtype)


def dense(dtype: torch.dtype, *, transposed: bool) -> DensePacking:
    """Return how a linear that isn't packed lies in a checkpoint."""
    return DensePacking(
        dtypes={"weight": dtype},
        outputs={"weight": (int(transposed), 1)},
        dequantize=lambda tensors: (tensors["weight"].T if transposed else tensors["weight"]).float(),
        dtype=dtype,
        transposed=transposed,
    )


@dataclass(frozen=True, kw_only=True)
class Nf4Packing(Packing):
    """NF4 of bitsandbytes, whose blocks run over the weights of all outputs; of strips with constants in float32.

    Attributes:
        double_quant: Constants of a whole linear are rounded to 8 bits.
    """

    double_quant: bool

    def strip(self, tensors: Tensors, start: int, stop: int) -> dict[str, Tensor]:
        """Return the tensors of outputs `start` to `stop`, a multiple of 64 or the last, of a whole linear's."""
        return nf4.outputs(tensors, start, stop)

    def joined(self, strips: Iterable[Tensors], rows: int) -> dict[str, Tensor]:
        """Return the tensors of a linear of so many outputs from those of its strips, in order."""
        return nf4.joined(list(strips), rows, double_quant=self.double_quant)


def nf4_blocks(*, double_quant: bool) -> Nf4Packing:
    """Return `bitsandbytes` with NF4; constants in 8 bits, or in float32."""
    constants = torch.uint8 if double_quant else torch.float32
    nested = dict.fromkeys(("weight.nested_absmax", "weight.nested_quant_map") if double_quant else (), torch.float32)
    dtypes = {"weight": torch.uint8, "weight.absmax": constants, "weight.quant_map": torch.float32}
    return Nf4Packing(
        dtypes={**dtypes, **nested, NF4_STATE: torch.uint8},
        outputs={},
        dequantize=nf4.dequantize,
        bound=nf4.bound,
        double_quant=double_quant,
    )


def _int8_off(weight: Tensor, tensors: Tensors) -> Tensor:
    """Return half the distance of the codes around each weight, and a little for arithmetic in float32."""
    return (tensors["SCB"] * (0.50005 / llm_int8.LEVELS) + 1e-30)[:, None].expand_as(weight)


LLM_INT8 = Packing(
    dtypes={"weight": torch.int8, "SCB": torch.float32, "weight_format": torch.uint8},
    outputs={"weight": (0, 1), "SCB": (0, 1)},
    dequantize=llm_int8.dequantize,
    bound=_int8_off,
)
"""LLM.int8() of bitsandbytes: a scale per output."""


@dataclass(frozen=True, kw_only=True)
class IntegerPacking(Packing):
    """A packing of integer codes.

    Attributes:
        pack: Codes (out, in) uint8, scales (out, groups) float16, zero points (out, groups) uint8 → tensors by suffix.
        unpack: The way back.
        scales: Suffix of the scales, whose outputs a fold divides.
    """

    pack: Callable[[Tensor, Tensor, Tensor], dict[str, Tensor]]
    unpack: Callable[[Tensors], tuple[Tensor, Tensor, Tensor]]
    scales: str = "scales"


def off_grid(packing: IntegerPacking, grid: Grid, tensors: Tensors, dense: Tensor) -> str:
    """Return what of a packed linear isn't on the grid, in words; "" where all of it is."""
    codes, scales, zeros = packing.unpack(tensors)
    rows, columns = dense.shape
    groups = (rows, columns // grid.width(columns))
    if codes.shape != dense.shape or scales.shape != groups or zeros.shape != groups:
        return f"has codes {tuple(codes.shape)} and scales {tuple(scales.shape)} for a weight {rows}x{columns}"
    if scales.dtype != torch.float16 or bool((scales == 0).any()):
        return "has scales that are zero or not float16"
    middle = 1 << (grid.bits - 1)
    wrong = zeros != middle if grid.sym else zeros == 0
    return "has zero points that its grid doesn't allow" if bool(wrong.any()) else ""


def _off(weight: Tensor, scales: Tensor) -> Tensor:
    """Return half the distance of the codes around each weight, and a little for arithmetic in float32."""
    step = scales.float().abs()
    _, exponent = torch.frexp(weight.abs() / step)
    return torch.exp2(exponent.sub(1).clamp_(min=-6).sub_(4).float()).mul_(step).mul_(1.0001)


def _channel(tensors: Tensors) -> Tensor:
    return fp8.dequantize(tensors["weight"], tensors["weight_scale"])


def _block(tensors: Tensors) -> Tensor:
    return fp8.dequantize(tensors["weight"], tensors["weight_scale_inv"], (BLOCK, BLOCK))


def _block_off(weight: Tensor, tensors: Tensors) -> Tensor:
    rows, columns = weight.shape
    scales = tensors["weight_scale_inv"].repeat_interleave(BLOCK, 0)[:rows]
    return _off(weight, scales.repeat_interleave(BLOCK, 1)[:, :columns])


def float_quantized(dtype: torch.dtype) -> Packing:
    """Return `float-quantized` of compressed-tensors, a scale per output in a dtype."""
    return Packing(
        dtypes={"weight": E4M3, "weight_scale": dtype},
        outputs={"weight": (0, 1), "weight_scale": (0, 1)},
        dequantize=_channel,
        bound=lambda weight, tensors: _off(weight, tensors["weight_scale"]),
    )


MODELOPT_FP8 = Packing(
    dtypes={"weight": E4M3, "weight_scale": torch.float32, "input_scale": torch.float32},
    outputs={"weight": (0, 1)},
    dequantize=_channel,
    bound=lambda weight, tensors: _off(weight, tensors["weight_scale"]),
)
"""FP8 as ModelOpt exports it: one scale for a linear, one for its inputs."""
FP8_BLOCK = Packing(
    dtypes={"weight": E4M3, "weight_scale_inv": torch.float32},
    outputs={"weight": (0, 1), "weight_scale_inv": (0, BLOCK)},
    dequantize=_block,
    bound=_block_off,
)
"""FP8 as DeepSeek stores it: a scale per block."""


def _nvfp4_steps(tensors: Tensors) -> Tensor:
    return tensors["weight_scale"].float() / tensors["weight_global_scale"]


def _mxfp4_steps(tensors: Tensors) -> Tensor:
    return fp8.as_floats(tensors["weight_scale"])


def _fp4(steps: Callable[[Tensors], Tensor], tensors: Tensors) -> Tensor:
    return fp4.dequantize(tensors["weight_packed"], steps(tensors))


def _fp4_off(steps: Callable[[Tensors], Tensor], weight: Tensor, tensors: Tensors) -> Tensor:
    """Return half the distance of the codes around each weight, or what is beyond the last, and a little more."""
    groups = weight.abs().view(*tensors["weight_scale"].shape, -1)
    step = steps(tensors).unsqueeze(-1)
    scaled = groups / step
    half = torch.where(scaled < 2, 0.25, torch.where(scaled < 4, 0.5, (scaled - LEVELS[-1]).clamp_min(1.0)))
    return half.mul_(step).mul_(1.0001).flatten(-2)


NVFP4 = Packing(
    dtypes={"weight_packed": torch.uint8, "weight_scale": E4M3, "weight_global_scale": torch.float32},
    outputs={"weight_packed": (0, 1), "weight_scale": (0, 1)},
    dequantize=partial(_fp4, _nvfp4_steps),
    bound=partial(_fp4_off, _nvfp4_steps),
)
"""`nvfp4-pack-quantized` of compressed-tensors: the global scale divides."""
MXFP4 = Packing(
    dtypes={"weight_packed": torch.uint8, "weight_scale": torch.uint8},
    outputs={"weight_packed": (0, 1), "weight_scale": (0, 1)},
    dequantize=partial(_fp4, _mxfp4_steps),
    bound=partial(_fp4_off, _mxfp4_steps),
)
"""`mxfp4-pack-quantized` of compressed-tensors: scales are exponents of two."""


def gptq_words(bits: int) -> IntegerPacking:
    """Return the `gptq` packing."""
    return IntegerPacking(
        dtypes={"qweight": torch.int32, "qzeros": torch.int32, "scales": torch.float16, "g_idx": torch.int32},
        outputs={"qweight": (1, 1), "qzeros": (1, 32 // bits), "scales": (1, 1)},
        dequantize=lambda tensors: gptq.dequantize(*gptq.unpack(tensors, bits), tensors["g_idx"]),
        pack=partial(gptq.pack, bits=bits),
        unpack=partial(gptq.unpack, bits=bits),
    )


AWQ_GEMM = IntegerPacking(
    dtypes={"qweight": torch.int32, "qzeros": torch.int32, "scales": torch.float16},
    outputs={"qweight": (1, 8), "qzeros": (1, 8), "scales": (1, 1)},
    dequantize=lambda tensors: gptq.dequantize(*awq.unpack(tensors)),
    pack=awq.pack,
    unpack=awq.unpack,
)
"""The `awq` packing, `gemm` version."""


def pack_quantized(bits: int, *, sym: bool) -> IntegerPacking:
    """Return `pack-quantized` of compressed-tensors."""
    zeros = {} if sym else {"weight_zero_point": torch.int32}
    return IntegerPacking(
        dtypes={"weight_packed": torch.int32, "weight_scale": torch.float16, SHAPE: torch.int64, **zeros},
        outputs={"weight_packed": (0, 1), "weight_scale": (0, 1)} | dict.fromkeys(zeros, (0, 32 // bits)),
        dequantize=partial(compressed_tensors.dequantize_packed, bits=bits),
        pack=partial(_pack_quantized, bits=bits, sym=sym),
        unpack=partial(_unpack_quantized, bits=bits),
        scales="weight_scale",
    )


def _pack_quantized(codes: Tensor, scales: Tensor, zeros: Tensor, *, bits: int, sym: bool) -> dict[str, Tensor]:
    if sym and bool((zeros != 1 << (bits - 1)).any()):
        raise IntegrityError("zero points of a symmetric grid aren't in its middle", fix="report this")
    tensors = {
        "weight_packed": pack_words(codes.T.contiguous(), bits).T.contiguous(),
        "weight_scale": scales.to(torch.float16).contiguous(),
        SHAPE: torch.tensor(codes.shape),
    }
    return tensors if sym else tensors | {"weight_zero_point": pack_words(zeros, bits)}


def _unpack_quantized(tensors: Tensors, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    codes = unpack_words(tensors["weight_packed"].T.contiguous(), bits).T
    scales = tensors["weight_scale"]
    zeros = torch.full_like(scales, 1 << (bits - 1), dtype=torch.uint8)
    if "weight_zero_point" in tensors:
        zeros = unpack_words(tensors["weight_zero_point"], bits)
    return codes, scales, zeros


def integers(form: str, bits: int, *, sym: bool) -> IntegerPacking:
    """Return the packing of integer codes that a `format` names.

    Raises:
        KeyError: There is none of that name.
    """
    known: Mapping[str, Callable[[], IntegerPacking]] = {
        "gptq": lambda: gptq_words(bits),
        "awq": lambda: AWQ_GEMM,
        "pack-quantized": lambda: pack_quantized(bits, sym=sym),
    }
    return known[form]()
