"""Fingerprint of the weights that a speculator was made for, so that it is never used beside others.

Heads read hidden states, so beside other weights of the same shape they load, guess nonsense and only cost time.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from optikit.errors import UsageError
from optikit.fileio import file_sha256
from optikit.models import tokenizer

SEAL = "artifact.json"
WEIGHTS = "*.safetensors"


def weights_digest(directory: Path) -> str:
    """Return one sha256 for the names and contents of a model directory's weights; "" where it has none.

    Sums that a seal records, in the directory or above it, are taken from there: large weights aren't read again.
    """
    names = sorted(path.name for path in directory.glob(WEIGHTS))
    recorded = _recorded(directory)
    lines = [f"{name} {recorded.get(name) or file_sha256(directory / name)}\n" for name in names]
    return hashlib.sha256("".join(lines).encode()).hexdigest() if lines else ""


def tensors_digest(tensors: Mapping[str, NDArray[Any]]) -> str:
    """Return one sha256 for names, dtypes, shapes and values of tensors: two of one shape may not change places."""
    digest = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        digest.update(f"{name} {value.dtype.str} {value.shape}\n".encode())
        digest.update(np.ascontiguousarray(value).data)
    return digest.hexdigest()


def _recorded(directory: Path) -> dict[str, str]:
    """Return the sums of a directory's files by a seal in it, or by one above it, as `optikit run` writes it."""
    for seal, prefix in ((directory / SEAL, ""), (directory.parent / SEAL, f"{directory.name}/")):
        try:
            files = json.loads(seal.read_text(encoding="utf-8"))["files"]
            return {name.removeprefix(prefix): row["sha256"] for name, row in files.items() if name.startswith(prefix)}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue
    return {}


def require_same_weights(made_for: str, model: Path) -> None:
    """Refuse a speculator beside other weights than those that it was made for.

    Args:
        made_for: `weights_digest` of the model that it was made for; "" where nobody noted it.
        model: Directory of the model that it is loaded beside.

    Raises:
        UsageError: They differ.
    """
    found = weights_digest(model)
    if made_for and found and made_for != found:
        message = f"the speculator was trained for weights {made_for[:12]}, and {model} holds {found[:12]}"
        raise UsageError(message, fix="use the speculator of the same run, or train one for this model")


def require_same_tokenizer(draft: Path, model: Path) -> None:
    """Refuse a draft whose tokenizer isn't the model's: its tokens would mean other texts.

    Raises:
        UsageError: Both directories have a tokenizer, and they differ in what they do.
    """
    theirs, ours = tokenizer.describe(draft), tokenizer.describe(model)
    if theirs and ours and theirs.sha256 != ours.sha256:
        message = f"the draft's tokenizer ({theirs.sha256[:12]}) is not that of {model} ({ours.sha256[:12]})"
        raise UsageError(message, fix="use a draft made with the model's own tokenizer")
