"""Whether transformers can load a finished model directory, found out without reading a weight.

The files are held to what config.json describes by reading the facts again; what config.json describes is held to
transformers' own model of it, on the meta device. A loader would make missing tensors up, drop the others, and say so
in a log that nobody reads.
"""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from optikit.errors import OptikitError, StageFailedError
from optikit.models.reader import read, tensor_shapes

FIX = "this is a defect of the stage: report it with the step's log"


def require(directory: Path) -> None:
    """Hold a model directory that a stage has finished to transformers' model of its config.json.

    Raises:
        StageFailedError: A tensor is missing, has another shape, or belongs nowhere; the message names it.
    """
    try:
        found = tensor_shapes(read(directory))
    except OptikitError as error:
        raise StageFailedError(f"what was written can't be loaded: {error.message}", fix=FIX) from error
    wanted = _wanted(directory)
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            message = f"what was written can't be loaded: transformers wants {name} {wanted.get(name)}"
            raise StageFailedError(f"{message}, and {found.get(name)} is there", fix=FIX)


def _wanted(directory: Path) -> dict[str, tuple[int, ...]]:
    """Return the shapes of transformers' model, without the names that stand for another's tensor."""
    config = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    vars(config).pop("quantization_config", None)  # a packed linear stands for a weight of the dense model's shape
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    tied = model.all_tied_weights_keys
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in tied}
