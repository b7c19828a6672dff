"""`ModelFacts` of a gguf file, from its headers: no weight is read. Figures are held to what `reader` holds them to."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from optikit.errors import IntegrityError, RecipeError
from optikit.models import (
    architectures,
    expected,
    gguf_header,
    gguf_names,
    gguf_parts,
    gguf_settings,
    gguf_tied,
    reader,
    traits,
)
from optikit.models.architectures import Architecture
from optikit.models.facts import ModelFacts, TensorFacts
from optikit.models.gguf_header import GgufHeader
from optikit.models.reader import INCOMPLETE
from optikit.problems import did_you_mean


def read_gguf(path: Path) -> ModelFacts:
    """Read the facts of a gguf model, in one file or in parts, from its headers.

    `dtype` is what its weights become when they are read, see `dtype_of`; `weight_bytes` are the file's own; it has
    no traits, because no stage reads it before it is a model directory. `config` has the figures under their usual
    names.

    Raises:
        InputMissingError: A part isn't there.
        IntegrityError: The file is damaged, or lacks a tensor.
        RecipeError: An architecture or figure that can't be worked with.
    """
    header = gguf_parts.read(path)
    architecture = architecture_of(header, path)
    figures = _figures(architecture, header, path)
    settings = {
        "model_type": architecture.model_type,
        **_sizes(architecture, figures),
        "tie_word_embeddings": gguf_tied.tied(header),
        **gguf_settings.settings(path, header, architecture, figures),
    }
    figures |= reader.expert_figures_of(architecture, settings, path)
    linears = figures["layers"] * max(1, figures.get("experts", 0))
    if figures["layers"] > len(header.tensors) or linears > gguf_header.MOST_ENTRIES:
        message = f"{path}: {figures['layers']} blocks with {figures.get('experts', 0)} experts, and "
        raise IntegrityError(f"{message}{len(header.tensors)} tensors", fix=INCOMPLETE)
    tensors = _tensors(architecture, header, figures, path)
    if settings["tie_word_embeddings"]:
        tensors.pop(f"{architecture.head}.weight", None)
    settings |= dict.fromkeys(expected.conditions(architecture, tensors), True)
    names = tuple(expected.linears(architecture, figures, settings))
    dense = traits.rows()[traits.DENSE]
    facts = reader.facts_of(
        architecture,
        figures,
        reader.linears_of(architecture, dense, tensors, names, path),
        tied=settings["tie_word_embeddings"],
        dtype=dtype_of(header),
        weight_bytes=sum(tensor.bytes for tensor in header.tensors.values()),
        traits=frozenset(),
        sliding_window=reader.window_of(settings),
        config=settings,
    )
    try:
        reader.check_tensors(architecture, dense, facts, tensors, path)
    except IntegrityError as error:
        fix = (
            "get it again, or start from the model's safetensors directory: the file may hold what isn't computed here"
        )
        raise IntegrityError(error.message, fix=fix) from error
    return replace(facts, routers=tuple(reader.routers_of(architecture, facts)))


def dtype_of(header: GgufHeader) -> str:
    """Return the dtype that the weights of a gguf file become: F32, F16 or BF16, by what most matrices are.

    Blocks of integers are no floats of two bytes exactly: they become BF16, or F16 where the matrices that aren't
    quantized are.
    """
    kinds: Counter[str] = Counter()
    for tensor in header.tensors.values():
        if len(tensor.shape) > 1:
            kinds[tensor.type] += math.prod(tensor.shape)
    most = max(kinds, key=lambda kind: kinds[kind], default="F32")
    if kinds.keys() <= {"F32", "F16", "BF16"}:
        return most
    return "F16" if kinds["F16"] > kinds["BF16"] else "BF16"


def architecture_of(header: GgufHeader, path: Path) -> Architecture:
    """Return the row of a gguf file's family.

    Raises:
        RecipeError: There is none.
    """
    family = header.metadata.get("general.architecture")
    experts = isinstance(family, str) and bool(header.metadata.get(f"{family}.expert_count"))
    architecture = architectures.of_gguf(family, experts=experts) if isinstance(family, str) and family else None
    if architecture is None:
        fix = did_you_mean(str(family), architectures.gguf_names())
        raise RecipeError(f"{path}: gguf architecture {family!r} isn't known here", fix=fix)
    return architecture


def _figures(architecture: Architecture, header: GgufHeader, path: Path) -> dict[str, int]:
    embedding = header.tensors.get(gguf_tied.EMBEDDING)
    if embedding is None or len(embedding.shape) != 2:
        raise IntegrityError(f"{path} has no {gguf_tied.EMBEDDING}", fix=INCOMPLETE)
    keys = {name: f"{architecture.gguf}.{key}" for name, key in gguf_settings.FIGURES.items()}
    known = {**header.metadata, "vocab": embedding.shape[0]}
    return reader.figures_of(replace(architecture, keys={**keys, "vocab": "vocab"}), known, path)


def _sizes(architecture: Architecture, figures: Mapping[str, int]) -> dict[str, int]:
    """Return the figures in words of config.json; shared heads and their width only where the family has such keys."""
    derived = {"kv_heads": figures["heads"], "head_dim": figures["hidden"] // figures["heads"]}
    own = any(word in words for words in architecture.tensors.values() for word in ("keys", "all_heads"))
    return {
        key: figures[name]
        for name, key in architecture.keys.items()
        if name in figures and (own or figures[name] != derived.get(name))
    }


def _tensors(
    architecture: Architecture, header: GgufHeader, figures: Mapping[str, int], path: Path
) -> dict[str, TensorFacts]:
    """Return the tensors of a gguf file under their names in the model directory that it becomes.

    Raises:
        RecipeError: Naming one that is no part of it.
        IntegrityError: A tensor stacks another number of experts.
    """
    experts, dtype = figures.get("experts", 0), dtype_of(header)
    places = gguf_names.places(architecture, header.tensors, experts)
    found: dict[str, TensorFacts] = {}
    for stored, tensor in header.tensors.items():
        names = places.get(stored, ())
        if not names and stored not in gguf_settings.TABLES:
            message = f"{path}: tensor {stored} isn't understood: {architecture.model_type} has no place for it here"
            raise RecipeError(message, fix="start from the model's safetensors directory")
        shape = tensor.shape
        if architecture.experts is not None and names and f".{architecture.experts.name}." in names[0]:
            shape = tensor.shape[1:]
            if tensor.shape[0] != experts:
                message = f"{path}: tensor {stored} stacks {tensor.shape[0]} experts, and there are {experts}"
                raise IntegrityError(message, fix=INCOMPLETE)
        turned = architecture.transposed and _is_turned(architecture, names)
        facts = TensorFacts(dtype=dtype, shape=shape[::-1] if turned else _row(architecture, names, shape))
        found |= dict.fromkeys(names, facts)
    return found


def _is_turned(architecture: Architecture, names: Iterable[str]) -> bool:
    """Return whether a tensor is a linear's weight, which GPT-2 stores across."""
    return any(f".{linear}.weight" in name for name in names for linear in architecture.linears)


def _row(architecture: Architecture, names: tuple[str, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return a vector's shape as the matrix of one row that the family has there."""
    one = any(architecture.tensors.get(f"*.{name.split('.', 3)[-1]}", "").startswith("1 ") for name in names)
    return (1, *shape) if one and len(shape) == 1 else shape
