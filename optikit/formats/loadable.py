"""Whether transformers can load a finished model directory, found out without reading a weight.

The files are held to what config.json describes by reading the facts again; what config.json describes is held to
transformers' own model of it, on the meta device. A loader would make missing tensors up, drop the others, and say so
in a log that nobody reads.
"""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from optikit.errors import OptikitError, StageFailedError
from optikit.formats import language_config
from optikit.models import stacked_experts
from optikit.models.facts import ModelFacts
from optikit.models.reader import read, tensor_shapes

FIX = "this is a defect of the stage: report it with the step's log"


def require(directory: Path) -> None:
    """Hold a model directory that a stage has finished to transformers' model of its config.json.

    Raises:
        StageFailedError: A tensor is missing, has another shape, or belongs nowhere; the message names it.
    """
    try:
        found = _as_modules(read(directory))
    except OptikitError as error:
        raise StageFailedError(f"what was written can't be loaded: {error.message}", fix=FIX) from error
    wanted = _wanted(directory)
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            message = f"what was written can't be loaded: transformers wants {name} {wanted.get(name)}"
            raise StageFailedError(f"{message}, and {found.get(name)} is there", fix=FIX)


def _as_modules(facts: ModelFacts) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a model's tensors under the names of transformers' modules, which hold experts stacked."""
    row, shapes = facts.architecture, tensor_shapes(facts)
    if row is None or row.experts is None:
        return shapes
    found, wide, experts = {}, 0, row.experts
    sparse = set()
    for name, shape in shapes.items():
        inside = stacked_experts.inside_block(row, name)
        block = name.removesuffix(inside)
        if inside.startswith(f"{experts.name}."):
            sparse.add(block)
            wide = shape[0] if inside.endswith(f".{experts.linears[0]}.weight") else wide
        else:
            found[block + row.module_name(inside)] = shape
    wholes = stacked_experts.shapes(experts, facts.experts, wide, facts.hidden)
    leaves = ("gate_up_proj", "down_proj", "gate_up_proj_bias", "down_proj_bias")[: len(wholes)]
    for block in sparse:
        found |= {f"{block}{experts.module}.{leaf}": shape for leaf, shape in zip(leaves, wholes, strict=True)}
    return found


def _wanted(directory: Path) -> dict[str, tuple[int, ...]]:
    """Return the shapes of transformers' model, without the names that stand for another's tensor."""
    config = language_config.read(directory)  # what a wrapper has besides is carried along
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    tied = model.all_tied_weights_keys
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in tied}
