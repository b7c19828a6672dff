"""`Stack`: everything a compatibility rule may look at, and the flat words in which rules speak of it.

The planner fills a `Stack` from a recipe; `scope` lays it out as nested plain values, so that a row of compat.toml can
name `target.device` or `final.heads` and nothing else. What isn't known is None, and a rule never fires on it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from optikit.problems import Loc
from optikit.stages import VERBS

if TYPE_CHECKING:
    from optikit.models.facts import ModelFacts
    from optikit.targets import Target

Scope = Mapping[str, Any]
"""Nested plain values: `scope["target"]["device"]` is what rules call `target.device`."""


@dataclass(frozen=True, kw_only=True)
class Placed:
    """One stage in its place.

    Attributes:
        verb, method: As the author wrote them; for `compile` the method is the engine.
        backend: Who does the work: `optikit`, or a library.
        options: The stage's options with their defaults.
        before, after: Facts of the model that it reads and of the one that it writes; None where unknown.
    """

    verb: str
    method: str
    backend: str = "optikit"
    options: Mapping[str, Any] = field(default_factory=dict)
    before: ModelFacts | None = None
    after: ModelFacts | None = None


@dataclass(frozen=True, kw_only=True)
class Stack:
    """A recipe as the rules see it.

    Attributes:
        stages: In the author's order.
        target: Where the artifact will run.
        model: Facts of the model that the recipe names.
        draft: Facts of the draft model, if the stack has one.
        serve: How the artifact will be served, for what the compile stage's options don't say: `engine`, `version`,
            `tensor_parallel`, `batch_size`, `sequence_length`, and whatever flags of the server rules name.
        environments: Packages by environment: {"main": {"transformers": "5.23.0"}}.
        host: `optikit.host.describe()` of the machine that runs the recipe, plus `cuda` (a GPU is present) and
            `offline`, where the planner knows.
        evaluate: The recipe's `evaluate` section as plain values.
    """

    stages: tuple[Placed, ...]
    target: Target
    model: ModelFacts | None = None
    draft: ModelFacts | None = None
    serve: Mapping[str, Any] = field(default_factory=dict)
    environments: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    host: Mapping[str, Any] = field(default_factory=dict)
    evaluate: Mapping[str, Any] = field(default_factory=dict)

    @property
    def final(self) -> ModelFacts | None:
        """Facts of the weights that are compiled or served: after the last stage that isn't `compile`."""
        facts = [stage.after for stage in self.stages if stage.verb != "compile"]
        return facts[-1] if facts else self.model

    @property
    def compiled(self) -> tuple[int, Placed] | None:
        """The compile stage with its index, or None."""
        found = [(index, stage) for index, stage in enumerate(self.stages) if stage.verb == "compile"]
        return found[-1] if found else None


def common(stack: Stack) -> Scope:
    """Return what is the same for every stage of the stack."""
    final = _facts(stack.final)
    return {
        "target": _target(stack.target),
        "model": _facts(stack.model),
        "final": final,
        "draft": _facts(stack.draft),
        "weights": _weights(stack),
        "serve": _serve(stack),
        "stack": {
            "verbs": frozenset(stage.verb for stage in stack.stages),
            "methods": frozenset(stage.method for stage in stack.stages),
            "backends": frozenset(stage.backend for stage in stack.stages),
            "stages": len(stack.stages),
        },
        "host": _host(stack.host),
        "evaluate": stack.evaluate,
    }


def stages(stack: Stack) -> Iterator[tuple[Scope, Loc]]:
    """Yield each stage as rules see it, with its path in the recipe."""
    for index, placed in enumerate(stack.stages):
        yield {"stage": _stage(placed)}, ("stages", index, placed.verb)


def pairs(stack: Stack) -> Iterator[tuple[Scope, Loc]]:
    """Yield each pair of stages, `first` before `second` in the recipe, with the path of `second`."""
    views = [_stage(placed) for placed in stack.stages]
    for later, second in enumerate(views):
        for first in views[:later]:
            yield {"first": first, "second": second}, ("stages", later, stack.stages[later].verb)


def environments(stack: Stack) -> Iterator[tuple[Scope, Loc]]:
    """Yield each environment: its packages' versions, and its own name under `name`."""
    for name, packages in stack.environments.items():
        yield {"environment": {**packages, "name": name}}, ()


def _stage(placed: Placed) -> dict[str, Any]:
    return {
        "verb": placed.verb,
        "method": placed.method,
        "backend": placed.backend,
        "rank": VERBS.index(placed.verb) if placed.verb in VERBS else None,
        "options": placed.options,
        "before": _facts(placed.before),
        "after": _facts(placed.after),
    }


def _facts(facts: ModelFacts | None) -> dict[str, Any]:
    if facts is None:
        return {}
    return {
        "model_type": facts.model_type,
        "hidden": facts.hidden,
        "intermediate": facts.intermediate,
        "layers": facts.layers,
        "heads": facts.heads,
        "kv_heads": facts.kv_heads,
        "head_dim": facts.head_dim,
        "vocab": facts.vocab,
        "max_positions": facts.max_positions,
        "tied": facts.tied,
        "dtype": facts.dtype,
        "weight_bytes": facts.weight_bytes,
        "parameters": facts.parameters,
        "sliding_window": facts.sliding_window,
        "tokenizer": facts.tokenizer_sha256 or None,
        "traits": facts.traits,
    }


def _target(target: Target) -> dict[str, Any]:
    return {
        "name": target.name,
        "device": target.device,
        "accelerator": target.accelerator or None,
        "count": target.count,
        "memory_gib": target.memory_gib,
        "compute_capability": target.compute_capability,
        "cores": target.cores,
        "tensor_parallel": frozenset(target.tensor_parallel) or None,
        "engines": frozenset(target.engines) or None,
    }


_QUANT_METHOD = {
    "int4_gptq": "gptq",
    "int8_gptq": "gptq",
    "int4_awq": "awq",
    "int8_w8a8": "compressed-tensors",
    "int8_llm": "bitsandbytes",
    "nf4": "bitsandbytes",
}


def _weights(stack: Stack) -> dict[str, Any]:
    """Describe how the final weights are stored: the words of config.json's `quantization_config`.

    What a stage will write isn't in a config.json yet, so the options of the last quantize stage speak first.
    """
    facts = stack.final
    if facts is None:
        return {}
    config = facts.config.get("quantization_config")
    stored = dict(config) if isinstance(config, Mapping) else {}
    methods = [_QUANT_METHOD[trait] for trait in sorted(facts.traits) if trait in _QUANT_METHOD]
    options = next((stage.options for stage in reversed(stack.stages) if stage.verb == "quantize"), {})
    return {
        **stored,
        **{key: value for key, value in options.items() if value is not None},
        "quant_method": methods[-1] if methods else stored.get("quant_method"),
    }


def _serve(stack: Stack) -> dict[str, Any]:
    """Merge the compile stage's options with what the recipe says of serving; the latter wins."""
    values: dict[str, Any] = {}
    if stack.compiled is not None:
        _, stage = stack.compiled
        values = {**stage.options, "engine": stage.method if stage.backend == "optikit" else stage.backend}
    return {**values, **stack.serve}


def _host(host: Mapping[str, Any]) -> dict[str, Any]:
    name = str(host.get("cpu", "")).lower()
    vendor = next((vendor for vendor in ("amd", "intel") if vendor in name), None)
    return {
        "vendor": vendor,
        "isa": frozenset(host["isa"]) if "isa" in host else None,
        "cuda": host.get("cuda"),
        "offline": host.get("offline"),
    }
