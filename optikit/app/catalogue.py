"""What works for which family: every row of architectures.toml put before the checks of every stage."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from pydantic import ValidationError

from optikit.models import architectures, expected
from optikit.models.architectures import Architecture
from optikit.models.facts import ModelFacts
from optikit.stages import load, registry
from optikit.targets import Target, rows

SIZES: Mapping[str, int] = MappingProxyType(
    {"hidden": 1024, "intermediate": 4096, "layers": 8, "heads": 16, "kv_heads": 8, "head_dim": 64}
    | {"vocab": 32768, "max_positions": 4096}
)
"""Figures of a middling model, which every grid fits."""
OTHER = 128
"""Every other whole number that a row asks config.json for."""
TRIED: Mapping[tuple[str, str], tuple[Mapping[str, Any], ...]] = MappingProxyType(
    {
        ("quantize", "int8"): ({"scheme": "w8a16"}, {"scheme": "w8a8"}, {"scheme": "llm_int8"}),
        ("prune", "width"): ({"heads": 0.0}, {"heads": 0.5, "mlp": 0.0}),
    }
)
"""Options that differ in what they need; all other methods are tried as they are by default."""
VERBS = ("prune", "quantize", "compile")


@dataclass(frozen=True, kw_only=True)
class Family:
    """What works for one row.

    Attributes:
        name: The row: a `model_type`, or a variant of one.
        model_type: transformers' `model_type`.
        when: What config.json of a variant says.
        works: Methods by verb, as the author writes them, with the option that matters.
        refused: By verb, method → why it is refused.
        engines: Engines and libraries that know the family, each proven.
        gguf: `general.architecture` of gguf files that become it, or "".
    """

    name: str
    model_type: str
    when: Mapping[str, Any]
    works: Mapping[str, tuple[str, ...]]
    refused: Mapping[str, Mapping[str, str]]
    engines: tuple[str, ...]
    gguf: str


def families() -> tuple[Family, ...]:
    """Return what works for every row, from the rows and the stages' own checks."""
    return tuple(_family(name, row) for name, row in architectures.rows().items())


def _family(name: str, row: Architecture) -> Family:
    facts = typical(row)
    works: dict[str, list[str]] = {}
    refused: dict[str, dict[str, str]] = {}
    for verb, label, problem in _tried(facts):
        if problem:
            refused.setdefault(verb, {})[label] = problem
        else:
            works.setdefault(verb, []).append(label)
    return Family(
        name=name,
        model_type=row.model_type,
        when=dict(row.when),
        works={verb: tuple(labels) for verb, labels in works.items()},
        refused=refused,
        engines=row.engines,
        gguf=row.gguf,
    )


def typical(row: Architecture) -> ModelFacts:
    """Return the facts of a middling dense model of a row; a mixture's has four experts, two for a token."""
    words = " ".join(row.tensors.values())
    kinds = list(dict.fromkeys(re.findall(r" layer (\w+)", words)))
    sizes: dict[str, Any] = {**SIZES, **row.fixed}
    known = {*sizes, "queries", "keys", "all_heads"}
    numbers = {word: OTHER for word in re.findall(r"[a-z_]\w*", words) if word not in known}
    settings: dict[str, Any] = {**numbers, **row.defaults, **row.requires, **row.when, "model_type": row.model_type}
    settings |= {key: False for key in re.findall(r" if (?:not )?([a-z_]\w*)(?: and|$)", words) if key not in row.when}
    settings["tie_word_embeddings"] = False
    if kinds:
        settings["layer_types"] = [kinds[block % len(kinds)] for block in range(sizes["layers"])]
    more = {"experts": 4, "expert_width": sizes["intermediate"]} if row.experts else {}
    linears = _linears(row, sizes | more, settings)
    return ModelFacts(
        model_type=row.model_type,
        linears=linears,
        tied=False,
        dtype="BF16",
        weight_bytes=2 * sum(rows * columns for rows, columns in linears.values()),
        traits=frozenset({"dense"}),
        config=settings,
        experts=more.get("experts", 0),
        experts_chosen=2 if more else 0,
        **sizes,
    )


def _linears(row: Architecture, sizes: Mapping[str, int], settings: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    shapes = expected.tensors(row, sizes, settings)
    found = {name: shapes[f"{name}.weight"] for name in expected.linears(row, sizes, settings)}
    return {name: (two, one) if row.transposed else (one, two) for name, (one, two) in found.items()}


def _tried(facts: ModelFacts) -> Iterator[tuple[str, str, str]]:
    """Yield (verb, method with what matters, why it is refused or "")."""
    targets = rows(None)
    for verb in VERBS:
        for method in registry()[verb]:
            for options in TRIED.get((verb, method), ({},)):
                told = " ".join(str(value) for value in options.values() if isinstance(value, str))
                extra = " heads" if options.get("heads") else ""
                yield verb, f"{method} {told}".strip() + extra, _refusal(verb, method, options, facts, targets)


def _refusal(
    verb: str, method: str, options: Mapping[str, Any], facts: ModelFacts, targets: Mapping[str, Target]
) -> str:
    """Return why no target takes a method of this family; "" where one does."""
    stage = load(verb, method)
    try:
        chosen = stage.Options(**options)
    except ValidationError as error:
        return f"needs options: {error.errors()[0]['loc'][0]}"
    why = ""
    for target in targets.values():
        found = [p.message for p in stage.check(chosen, facts, target) if p.level == "error"]
        if not found:
            return ""
        why = why or found[0]
    return why
