"""Folding: a scale of a group's inputs is divided out of the op before it, so that the model computes the same."""

from __future__ import annotations

import torch
from torch import Tensor

from optikit.algorithms import awq
from optikit.calibration.method import PreviousOp


def fold(previous: PreviousOp, scale: Tensor, *, suffix: str, axis: int) -> tuple[dict[str, Tensor], Tensor]:
    """Divide what the previous op gives by a scale, channel by channel.

    What is stored has a precision of its own: the linears that follow have to be multiplied by the scale that the
    rounded quotient amounts to, so that nothing is lost.

    Args:
        previous: A norm, or a linear that the walk has quantized just before.
        scale: (in,) of the group, the same for channels that are copies of one.
        suffix: Name of a quantized linear's scales.
        axis: Which axis of them counts the linear's outputs.

    Returns:
        The previous op's tensors that change, by full name; and the scale (in,) that its outputs are really divided by.
    """
    per_row = scale if previous.ties is None else _representatives(scale, previous.ties)
    if previous.linear:
        name = f"{previous.name}.{suffix}"
        divided, exact = _divide_rows(previous.tensors[name].to(scale.device).movedim(axis, 0), per_row)
        divided = divided.movedim(0, axis).contiguous()
    else:
        name = f"{previous.name}.weight"
        divided, exact = awq.fold(previous.tensors[name].to(scale.device), per_row, offset=previous.offset)
    changed = {name: divided}
    bias = previous.tensors.get(f"{previous.name}.bias")
    if bias is not None:
        changed[f"{previous.name}.bias"] = (bias.to(scale.device).float() / exact).to(bias.dtype)
    return changed, exact if previous.ties is None else exact[previous.ties]


def _representatives(scale: Tensor, ties: Tensor) -> Tensor:
    """Return the scale of each output channel of the previous op: (in,) → (out of that op,)."""
    per_row = torch.ones(int(ties.max()) + 1, device=scale.device)
    per_row[ties] = scale
    return per_row


def _divide_rows(stored: Tensor, by: Tensor) -> tuple[Tensor, Tensor]:
    """Divide (rows, n) by (rows,) in its own dtype; return the quotient and what it was divided by, least squares."""
    before = stored.float()
    after = (before / by[:, None]).to(stored.dtype).float()
    norm = after.square().sum(dim=1)
    exact = (before * after).sum(dim=1) / norm
    usable = torch.isfinite(exact) & torch.isfinite(after).all(dim=1) & (after != 0).all(dim=1)
    return torch.where(usable[:, None], after, before).to(stored.dtype), torch.where(usable, exact, 1.0)
