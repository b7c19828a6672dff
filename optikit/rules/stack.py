"""`Stack`: everything a compatibility rule may look at, and the flat words in which rules speak of it.

The planner fills a `Stack` from a recipe; `common`, `stages` and `pairs` lay it out as nested plain values, so that a
row of compat.toml can name `target.device` or `final.heads` and nothing else (vocabulary.py lists every word). What
isn't known is None, and a rule never fires on it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import gcd
from typing import TYPE_CHECKING, Any

from optikit.models import traits
from optikit.problems import Loc
from optikit.targets import neuron, parallel

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
        serve: How the artifact will be served, for what the compile stage's options don't say; vocabulary.py
            lists the words: `engine`, `version`, `tensor_parallel`, `batch_size`, `sequence_length`, ...
        packages: Versions of the main environment's packages: {"transformers": "5.23.0"}; None where nobody looked.
        host: `optikit.host.describe()` of the machine that runs the recipe, plus `cuda` (a GPU is present).
        gates: Names of the recipe's gates.
        server: Path in the recipe of what names the server; () where a compile stage does.
        loads_compiled: What serves the artifact loads what the compile stage writes, and not the directory before it.
    """

    stages: tuple[Placed, ...]
    target: Target
    model: ModelFacts | None = None
    draft: ModelFacts | None = None
    serve: Mapping[str, Any] = field(default_factory=dict)
    packages: Mapping[str, str] | None = None
    host: Mapping[str, Any] = field(default_factory=dict)
    gates: Iterable[str] = ()
    server: Loc = ()
    loads_compiled: bool = True

    @cached_property
    def views(self) -> tuple[Scope, ...]:
        """Every stage as rules see it."""
        return tuple(_stage(placed) for placed in self.stages)

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
    serve = _serve(stack)
    return {
        "target": _target(stack.target),
        "model": _facts(stack.model),
        "final": _facts(stack.final),
        "draft": _facts(stack.draft),
        "weights": _weights(stack),
        "serve": serve,
        "fit": _fit(stack, serve),
        "stack": {
            "methods": frozenset(stage.method for stage in stack.stages),
            "gates": frozenset(stack.gates),
            "packages": stack.packages is not None,
        },
        "package": stack.packages or {},
        "host": _host(stack.host),
    }


def stages(stack: Stack) -> Iterator[tuple[Scope, Loc]]:
    """Yield each stage as rules see it, with its path in the recipe."""
    for index, view in enumerate(stack.views):
        yield {"stage": view}, ("stages", index, stack.stages[index].verb)


def pairs(stack: Stack) -> Iterator[tuple[Scope, Loc]]:
    """Yield each pair of stages, `first` before `second` in the recipe, with the path of `second`."""
    for later, second in enumerate(stack.views):
        for first in stack.views[:later]:
            yield {"first": first, "second": second}, ("stages", later, stack.stages[later].verb)


def _stage(placed: Placed) -> dict[str, Any]:
    return {
        "verb": placed.verb,
        "method": placed.method,
        "backend": placed.backend,
        "options": placed.options,
        "before": _facts(placed.before),
        "after": _facts(placed.after),
        **_heads(placed),
    }


def _heads(placed: Placed) -> dict[str, Any]:
    """Return the weights of one Medusa head, and all heads' share of the model.

    A head is residual blocks of hidden² + hidden weights, and its own output layer unless that is shared (Cai et al.,
    arXiv:2401.10774, eq. 1): 150 M for a 7 B Mistral with vocabulary 32,000. Sequential heads differ in how many tokens
    they see, each of which takes another 2 · hidden²; their mean is meant.
    """
    facts, options = placed.before, placed.options
    if placed.method != "medusa" or facts is None or not isinstance(options.get("heads"), int):
        return {}
    blocks = options.get("layers", 1) * (facts.hidden**2 + facts.hidden)
    seen = (options["heads"] + 1) * facts.hidden**2 if options.get("sequential") else 0
    one = blocks + seen + (0 if options.get("share_lm_head") else facts.vocab * facts.hidden)
    return {"head_parameters": one, "heads_percent": round(100 * options["heads"] * one / facts.parameters)}


def _facts(facts: ModelFacts | None) -> dict[str, Any]:
    if facts is None:
        return {}
    input_width, output_width = facts.widths
    return {
        "model_type": facts.model_type,
        "hidden": facts.hidden,
        "intermediate": facts.intermediate,
        "layers": facts.layers,
        "experts": facts.experts,
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
        "bos": facts.config.get("bos_token_id"),
        "eos": _listed(facts.config.get("eos_token_id")),
        "input_width": input_width or None,
        "output_width": output_width or None,
    }


def _listed(value: Any) -> list[Any] | None:
    return None if value is None else sorted(value) if isinstance(value, list) else [value]


def _target(target: Target) -> dict[str, Any]:
    return {
        "name": target.name,
        "device": target.device,
        "accelerator": target.accelerator or None,
        "count": target.count,
        "compute_capability": target.compute_capability,
        "capability": target.capability,
        "cores": target.cores,
        "tensor_parallel": frozenset(target.tensor_parallel) or None,
        "older_tensor_parallel": frozenset(target.older_tensor_parallel),
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
    known = {word: value for row in traits.of(facts.traits) for word, value in row.words.items()}
    options = next((stage.options for stage in reversed(stack.stages) if stage.verb == "quantize"), {})
    method = known.get("quant_method", stored.get("quant_method"))
    return {
        **known,
        **_scheme(stored),
        **stored,
        **{key: value for key, value in options.items() if value is not None},
        "quant_method": method,
        "quantized": method is not None,
    }


def _scheme(stored: Mapping[str, Any]) -> dict[str, Any]:
    """Return what compressed-tensors says of the weights of its first group: num_bits, type, strategy, group_size."""
    groups = stored.get("config_groups")
    first: Any = next(iter(groups.values()), None) if isinstance(groups, Mapping) else None
    weights = first.get("weights") if isinstance(first, Mapping) else None
    if not isinstance(weights, Mapping):
        return {}
    kept = {key: weights.get(key) for key in ("type", "strategy", "group_size")}
    return {"bits": weights.get("num_bits"), "sym": weights.get("symmetric"), **kept}


_SHORT: Mapping[str, str] = {"nxd-inference": "nxdi", "llama-cpp": "llama.cpp"}
"""Backends and engines that rules have another name for."""


def _serve(stack: Stack) -> dict[str, Any]:
    """Merge the compile stage's options with what the recipe says of serving; the latter wins."""
    values: dict[str, Any] = {}
    if stack.compiled is not None and stack.loads_compiled:
        _, stage = stack.compiled
        engine = stage.method if stage.backend == "optikit" else stage.backend
        values = {**stage.options, "engine": _SHORT.get(engine, engine)}
    return values | dict(stack.serve)


def _fit(stack: Stack, serve: Mapping[str, Any]) -> dict[str, Any]:
    """Compare what has to be in memory with what is there; a batch or length not given counts no cache."""
    models = [facts for facts in (stack.final, stack.draft) if facts is not None]
    if not models:
        return {}
    degree = serve.get("tensor_parallel")
    degree = degree if isinstance(degree, int) and degree > 0 else None
    final = models[0]
    sharded = gcd(final.heads * final.head_dim, final.intermediate)
    if stack.target.device == "neuron":
        need, groups = _on_neuron(stack, serve, models, degree), 1
    else:
        need, groups = _need(models, serve, degree), serve.get("pipeline_parallel") or 1
    return {
        **need,
        "pipeline": groups,
        "accelerators": degree * groups if degree else None,
        "memory_gb": _memory(stack.target, degree and degree * groups),
        "shard_width": sharded // degree if degree and sharded % degree == 0 else None,
    }


def _need(models: Sequence[ModelFacts], serve: Mapping[str, Any], degree: int | None) -> dict[str, Any]:
    batch, length = serve.get("batch_size"), serve.get("sequence_length")
    tokens = batch * length if isinstance(batch, int) and isinstance(length, int) else 0
    copies = [parallel.cache_copies(facts, degree or 1) for facts in models]
    caches = sum(many * facts.kv_cache_bytes(tokens) for many, facts in zip(copies, models, strict=True))
    return {
        "need_gb": (sum(facts.weight_bytes for facts in models) + caches) / 1e9,
        "cache_copies": copies[0],
    }


def _on_neuron(
    stack: Stack, serve: Mapping[str, Any], models: Sequence[ModelFacts], degree: int | None
) -> dict[str, Any]:
    """Return what models take on Neuron cores, as they are compiled: in one dtype, heads padded and replicated."""
    shapes = neuron.Shapes(
        dtype=str(serve.get("dtype") or "bfloat16"),
        quantized=serve.get("quantization_dtype") is not None,
        batch=serve.get("batch_size") or 1,
        length=serve.get("sequence_length") or 0,
    )
    placed = neuron.place(degree or 1, models, shapes, medusa_heads=_medusa_heads(stack))
    found = placed.residents[0].sharding
    host = stack.target.host_memory_gib
    return {
        "need_gb": placed.need_bytes / 1e9,
        "host_gb": placed.host_bytes / 1e9,
        "host_memory_gb": None if host is None else host * 2**30 / 1e9,
        "padded_heads": found.heads if degree else None,
        "padded_kv_heads": found.kv_heads if degree else None,
        "cache_gb": sum(each.cache_bytes for each in placed.residents) / 1e9,
        "padding_gb": sum(each.padding_bytes for each in placed.residents) / 1e9,
    }


def _medusa_heads(stack: Stack) -> int:
    """Return how many Medusa heads lie beside the model."""
    found = [placed.options.get("heads") for placed in stack.stages if placed.method == "medusa"]
    return next((heads for heads in found if isinstance(heads, int)), 0)


def _memory(target: Target, degree: int | None) -> float | None:
    """Return the memory of the cores or accelerators that a tensor-parallel degree uses, or of all, in 10⁹ bytes."""
    if target.core_memory_gb is not None and target.cores is not None:
        return target.core_memory_gb * (degree or target.cores)
    if target.memory_gib is None:
        return None
    return target.memory_gib * 2**30 / 1e9 * (degree or target.count)


def _host(host: Mapping[str, Any]) -> dict[str, Any]:
    name = str(host.get("cpu", "")).lower()
    vendor = next((vendor for vendor in ("amd", "intel") if vendor in name), None)
    return {
        "vendor": vendor,
        "isa": frozenset(host["isa"]) if "isa" in host else None,
        "cuda": host.get("cuda"),
    }
