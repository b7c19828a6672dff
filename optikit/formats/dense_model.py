"""transformers' own model of a directory that is packed, with the dense weights that its packed ones stand for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

from optikit.formats import language_config, load_state, stacked
from optikit.models import architectures, language_part, stacked_experts


def load(directory: Path, dtype: torch.dtype | str, **options: Any) -> tuple[Any, set[str], set[str]]:
    """Return the model, and the names of tensors that are missing and that have no place in it.

    Of a wrapper, that is the language model inside. Names go the way of transformers' loader, which knows what modules
    of its are called in checkpoints, and joins experts.

    Args:
        directory: Packed in a format that `optikit.formats` reads, or dense.
        dtype: Of the weights; `auto` is what config.json says.
        options: What else the loader takes.
    """
    config = language_config.read(directory)
    wanted = (config.dtype or torch.float32) if isinstance(dtype, str) else dtype
    told = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    state = _alone(told, load_state(directory, wanted))
    model, info = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].from_pretrained(
        None, config=config, state_dict=state, dtype=wanted, output_loading_info=True, **options
    )
    return model, set(info["missing_keys"]), set(info["unexpected_keys"])


def _alone(told: Mapping[str, Any], state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the language model's tensors under its own names; experts in one tensor where checkpoints have them so."""
    settings = language_part.settings_of(told)
    row = architectures.find(str(settings.get("model_type")), settings)
    if row is None:
        return state
    settings = row.meant(settings)
    layers = settings[row.keys["layers"]]
    part = language_part.find(row, told, state, layers)
    found = {name: state[stored] for name, stored in part.stored.items()}
    if row.experts is None or not row.experts.stacked:
        return found
    sizes, weave = stacked.sizes_of(row, settings), stacked.weave(row.experts)
    for block in row.experts.sparse(layers, settings):
        for whole in row.experts.stacked:
            name = f"{row.block(block)}.{whole}"
            if name not in found:
                each = stacked.grouped(row, sizes, name)
                found[name] = torch.stack([weave([found.pop(part) for part in names]) for names in each])
            elif stacked_experts.is_turned(row, sizes, name, tuple(found[name].shape)):
                found[name] = found[name].transpose(1, 2).contiguous()
    return found
