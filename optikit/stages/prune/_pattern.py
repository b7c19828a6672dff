"""What every method that writes zeros asks and promises: how many, where, and in which layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from optikit.models import architectures
from optikit.models.facts import ModelFacts, Trait
from optikit.problems import Problem
from optikit.stage import StageOptions
from optikit.stages.quantize._grid import ignored

if TYPE_CHECKING:
    from optikit.algorithms.sparsity import Pattern

GROUPS = {"unstructured": 0, "2:4": 4, "4:8": 8}
"""Consecutive weights of a row that a pattern counts; 0 is the whole row or layer."""
TRAITS: dict[str, Trait] = {"unstructured": "sparse_unstructured", "2:4": "sparse_2_4", "4:8": "sparse_4_8"}


class PatternOptions(StageOptions):
    """How many weights become zero, and where."""

    sparsity: float = Field(default=0.5, gt=0, lt=1)
    """Share of each layer's weights that become zero."""
    pattern: Literal["unstructured", "2:4", "4:8"] = "unstructured"
    """Zeros anywhere, or exactly two in every four weights of a row, or four in every eight."""
    ignore: tuple[str, ...] = ()
    """Linears to leave alone: ends of names (`mlp.down_proj`) or patterns (`*.layers.0.*`)."""


def pattern_of(options: PatternOptions) -> Pattern:
    """Return the pattern as the algorithms take it."""
    from optikit.algorithms.sparsity import Pattern

    return Pattern(options.sparsity, group=GROUPS[options.pattern])


def ignore(options: PatternOptions) -> Callable[[str], bool]:
    """Return whether a linear (full name) is left alone."""
    return partial(ignored, patterns=options.ignore)


def chosen(options: PatternOptions, facts: ModelFacts) -> dict[str, tuple[int, int]]:
    """Return the linears that will get zeros: full name → (out_features, in_features)."""
    return {name: shape for name, shape in facts.linears.items() if not ignored(name, options.ignore)}


def check_pattern(options: PatternOptions, facts: ModelFacts) -> Iterator[Problem]:
    """Yield what this pattern can't do to this model."""
    if facts.architecture is None:
        message = f"model_type {facts.model_type!r} is not one whose linear layers are known"
        yield Problem(code="unknown-architecture", message=message, fix=f"known: {', '.join(architectures.names())}")
        return
    for pattern in options.ignore:
        if not any(ignored(name, (pattern,)) for name in facts.linears):
            message = f"ignore {pattern!r} matches no linear layer"
            fix = f"names look like {next(iter(facts.linears), 'model.layers.0.mlp.up_proj')}"
            yield Problem(code="ignore-matches-nothing", message=message, fix=fix, loc=("ignore",))
    linears = chosen(options, facts)
    if not linears:
        yield Problem(code="nothing-to-prune", message="every linear layer is ignored", loc=("ignore",))
    group = GROUPS[options.pattern]
    if group and options.sparsity != 0.5:
        message = f"{options.pattern} makes exactly half of the weights zero, and sparsity is {options.sparsity}"
        yield Problem(code="pattern-fixes-sparsity", message=message, fix="drop sparsity", loc=("sparsity",))
    refused = next((name for name, (_, width) in linears.items() if group and width % group), None)
    if refused is not None:
        message = f"{options.pattern} does not divide the input width {linears[refused][1]} of {refused}"
        yield Problem(code="pattern-divides-width", message=message, fix="use unstructured", loc=("pattern",))


def after_pattern(options: PatternOptions, facts: ModelFacts) -> ModelFacts:
    """Return the facts of the pruned model: same shapes, same bytes, zeros stored as zeros."""
    return facts.having(TRAITS[options.pattern])
