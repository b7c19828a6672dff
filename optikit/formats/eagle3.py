"""EAGLE-3 drafters on disk: tensors of either layout as torch reads them, and the one layout that is written and run.

What is written is the layout of speculators, which vLLM reads: config.json and model.safetensors, the embeddings with
it, so that nothing else is needed. What the names mean is in `optikit.models.eagle3`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from optikit.errors import IntegrityError
from optikit.models import eagle3
from optikit.models.eagle3 import DRAFTABLE, EMBEDDING, OFFSETS, Drafter

if TYPE_CHECKING:
    from torch import Tensor

    from optikit.models.facts import ModelFacts

WEIGHTS = "model.safetensors"
BASE = "base_sha256"
"""In the file's metadata: `fingerprint.weights_digest` of the target that it was trained for."""
READ_AS: Mapping[str, Any] = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}
"""How numpy, which has no bfloat16, reads a dtype."""
Arrays = dict[str, NDArray[Any]]


def read_arrays(directory: Path) -> tuple[Arrays, str]:
    """Return the tensors of a directory that `write` wrote, mapped from the file, and the digest of its target.

    bfloat16 comes as uint16, the upper halves of float32: see `as_float32`. Maps of tokens aren't among them.

    Raises:
        IntegrityError: The file is damaged, or holds something else than floats.
    """
    path = directory / WEIGHTS
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            rows = json.loads(file.read(length))
        base = str(rows.pop("__metadata__", {}).get(BASE, ""))
        found: Arrays = {
            name: np.memmap(path, READ_AS[row["dtype"]], "r", 8 + length + row["data_offsets"][0], tuple(row["shape"]))
            for name, row in rows.items()
            if name not in (OFFSETS, DRAFTABLE)
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        message = f"{path} doesn't hold a drafter's weights: {type(error).__name__}: {error}"
        raise IntegrityError(message, fix="run the recipe again") from error
    return found, base


def as_float32(values: NDArray[Any]) -> NDArray[np.float32]:
    """Return values of `read_arrays` as float32, in memory of their own.

    >>> as_float32(np.array([0x3FC0], np.uint16)).tolist()
    [1.5]
    """
    if values.dtype == np.uint16:
        wide: NDArray[np.float32] = (np.asarray(values).astype(np.uint32) << 16).view(np.float32)
        return wide
    return np.asarray(values).astype(np.float32)


def read_tensors(directory: Path, drafter: Drafter) -> dict[str, Tensor]:
    """Return the tensors of a directory of either layout, by their names in that of speculators, without the maps.

    Raises:
        IntegrityError: One isn't of floats, or has a value that is no number.
    """
    from optikit.formats.checkpoint import Checkpoint, finite

    checkpoint = Checkpoint(directory)
    found = {}
    for name in drafter.shapes:
        stored = drafter.stored(name)
        if name in (OFFSETS, DRAFTABLE) or stored not in checkpoint:
            continue
        if checkpoint.entries[stored].dtype not in READ_AS:
            message = f"{directory}: {stored} holds {checkpoint.entries[stored].dtype}, where floats are wanted"
            raise IntegrityError(message, fix="use a drafter that isn't quantized")
        found[name] = finite(stored, checkpoint.read(stored), directory)
    return found


def settings(drafter: Drafter, target: ModelFacts, base: str, tokens: int) -> dict[str, Any]:
    """Return the config.json of a drafter in the speculators layout.

    Args:
        drafter: Its sizes.
        target: The model that it drafts for.
        base: Path or name of that model, as a server will see it.
        tokens: Tokens to draft where nobody says otherwise.
    """
    layer = {
        "model_type": "llama",
        "hidden_size": drafter.hidden,
        "intermediate_size": drafter.intermediate,
        "num_hidden_layers": 1,
        "num_attention_heads": drafter.heads,
        "num_key_value_heads": drafter.kv_heads,
        "head_dim": drafter.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": drafter.eps,
        "max_position_embeddings": drafter.context,
        "rope_theta": drafter.rope["rope_theta"],
        "rope_parameters": dict(drafter.rope),
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "vocab_size": drafter.vocab,
    }
    wider = {"target_hidden_size": drafter.target_hidden} if drafter.target_hidden != drafter.hidden else {}
    return {
        "architectures": ["Eagle3Speculator"],
        "speculators_model_type": "eagle3",
        "draft_vocab_size": drafter.drafted,
        "norm_before_residual": drafter.norm_before_residual,
        eagle3.LAYERS: list(drafter.layers),
        **wider,
        "speculators_config": {
            "algorithm": "eagle3",
            "default_proposal_method": "greedy",
            "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": tokens, "verifier_accept_k": 1}],
            "verifier": {"name_or_path": base, "architectures": list(target.config.get("architectures") or [])},
        },
        eagle3.LAYER: layer,
        "torch_dtype": "bfloat16",
    }


def write(
    dest: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], token_ids: Tensor | None, *, base: str
) -> None:
    """Write a drafter in the speculators layout, in bfloat16.

    Args:
        dest: Directory to make.
        config: Of `settings`.
        tensors: By their names there, with the embeddings.
        token_ids: (drafted,) int64, ascending: the token of each row of the output layer; None is every token.
        base: `fingerprint.weights_digest` of the target, "" if it isn't known.
    """
    import torch

    from optikit.formats.checkpoint import save_tensors

    dest.mkdir(parents=True, exist_ok=True)
    found = {name: each.detach().to(torch.bfloat16) for name, each in tensors.items()}
    if token_ids is not None:
        draftable = torch.zeros(len(found[EMBEDDING]), dtype=torch.bool)
        draftable[token_ids] = True
        found |= {OFFSETS: token_ids - torch.arange(len(token_ids)), DRAFTABLE: draftable}
    save_tensors(dest / WEIGHTS, found, {BASE: base} if base else None)
    (dest / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
