"""What servers do to the inputs of quantized linears: rounding that no weight shows, so that it can be measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import Tensor

from optikit.algorithms import fp8
from optikit.formats.checkpoint import Checkpoint
from optikit.models import quantization

Rounding = Callable[[Tensor], Tensor]
"""Inputs (…, in) → what is left of them, in the same dtype."""


@dataclass(frozen=True)
class Fixed:
    """FP8 with a scale (), fixed beforehand."""

    scale: Tensor

    def __call__(self, inputs: Tensor) -> Tensor:
        """Round inputs (…, in)."""
        return fp8.round_inputs(inputs, self.scale)


def shared(roundings: Sequence[Rounding]) -> Rounding:
    """Return what is done to the inputs of experts, multiplied together: of fixed scales vLLM takes the largest."""
    fixed = [each for each in roundings if isinstance(each, Fixed)]
    return max(fixed, key=lambda each: float(each.scale)) if fixed else roundings[0]


def of(directory: Path) -> dict[str, Rounding]:
    """Return what is done to the inputs of linears, by full name; nothing where they are multiplied as they are."""
    checkpoint = Checkpoint(directory)
    storage = quantization.scheme(checkpoint.config(), directory / "config.json", checkpoint)
    ends = f".{storage.suffixes[0]}" if storage.suffixes else ""
    names = [name.removesuffix(ends) for name in checkpoint if ends and name.endswith(ends)]
    if storage.trait == "fp8_static":
        return {name: Fixed(checkpoint.read(f"{name}.input_scale")) for name in names}
    return dict.fromkeys(names, ROUNDINGS[storage.name]) if storage.name in ROUNDINGS else {}


def _int8_tokens(inputs: Tensor) -> Tensor:
    step = inputs.float().abs().amax(dim=-1, keepdim=True).clamp(min=1e-12) / 127
    return ((inputs.float() / step).round() * step).to(inputs.dtype)


ROUNDINGS: dict[str, Rounding] = {
    "int8_w8a8": _int8_tokens,
    "fp8_dynamic": fp8.round_tokens,
    "fp8_block": partial(fp8.round_tokens, block=fp8.BLOCK),
}
"""By the row of traits.toml."""
