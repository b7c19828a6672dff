"""Heads that were trained with a model before its last stages: where later heads on the same model may start.

A safetensors file under a name of its own: servers take every `*.safetensors` beside a model for its weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from optikit.formats.checkpoint import locate, read_entry

if TYPE_CHECKING:
    from torch import Tensor

    from optikit.algorithms.medusa import MedusaHeads

HEADS_START = "heads.start"
"""Its name, beside config.json."""


def tensors_of(heads: MedusaHeads) -> dict[str, Tensor]:
    """Return `{head}.{layer}.weight` (hidden, hidden) and `{head}.{layer}.bias` (hidden,) of heads."""
    return {name: each.detach() for name, each in _named(heads).items()}


def start(heads: MedusaHeads, directory: Path) -> str:
    """Give heads the weights that lie in a directory, if they have their shapes.

    Returns:
        Why not; empty if they have got them.
    """
    path = directory / HEADS_START
    if not path.is_file():
        return "there are none"
    entries, wanted = locate(path), _named(heads)
    shapes = {name: entry.shape for name, entry in entries.items()}
    if shapes != {name: tuple(each.shape) for name, each in wanted.items()}:
        return f"they are {_told(shapes)}"
    with torch.no_grad():
        for name, each in wanted.items():
            each.copy_(read_entry(entries[name]))
    return ""


def _named(heads: MedusaHeads) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for head in range(heads.heads):
        for layer, (weight, bias) in enumerate(heads.linears(head)):
            found |= {f"{head}.{layer}.weight": weight, f"{head}.{layer}.bias": bias}
    return found


def _told(shapes: dict[str, tuple[int, ...]]) -> str:
    heads = {name.partition(".")[0] for name in shapes}
    width = max((shape[0] for shape in shapes.values()), default=0)
    layers = len(shapes) // max(1, 2 * len(heads))
    return f"{len(heads)} of {layers} layers and width {width}"


def tensors(heads: MedusaHeads) -> dict[str, Tensor]:
    """Return what heads.safetensors holds; `optikit.runtime.speculation.medusa_session` says what each is."""
    import torch

    found = {"token_ids": torch.arange(heads.vocab) if heads.token_ids is None else heads.token_ids}
    for head in range(heads.heads):
        for layer, (weight, bias) in enumerate(heads.linears(head)):
            found |= {f"{head}.{layer}.weight": weight, f"{head}.{layer}.bias": bias}
    outputs = {"output": heads.outputs[0]} if heads.shared else {f"output.{i}": o for i, o in enumerate(heads.outputs)}
    found |= {name: each.to(torch.float16) for name, each in outputs.items()}
    return found | (_seen(heads) if heads.sequential else {})


def _seen(heads: MedusaHeads) -> dict[str, Tensor]:
    """Return what sequential heads need beside the others' tensors; the embeddings in 8 bits, each with a scale."""
    import torch

    found = {f"input.{head}": each for head, each in enumerate(heads.inputs.parameters())}
    parts = []
    for some in torch.split(torch.arange(heads.vocab), 4096):  # all of it in float32 can be larger than the model
        rows = heads.embedded(some)
        scales = rows.abs().amax(1).clamp(min=1e-12) / 127
        parts.append(((rows / scales[:, None]).round().to(torch.int8), scales))
    codes, every = (torch.cat(each) for each in zip(*parts, strict=True))
    return {**found, "embedding": codes, "embedding.scales": every}
