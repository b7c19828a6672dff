"""What every weight-only quantizer asks and promises: the grid's options, checks on shapes, facts afterwards."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, Literal

from optikit.models import architectures
from optikit.models.facts import ModelFacts, Trait
from optikit.problems import Problem
from optikit.stage import StageOptions

if TYPE_CHECKING:
    from optikit.algorithms.grid import Grid

GROUP_SIZES = (128, 64, 32)
"""Group sizes that servers have kernels for, largest first."""


class GridOptions(StageOptions):
    """The integer grid of a weight-only quantizer, and where it applies."""

    bits: Literal[4, 8] = 4
    """Bits per weight."""
    group_size: Literal[32, 64, 128, -1] = 64
    """Weights in a row that share a scale; smaller is better quality and a larger file. -1 is the whole row."""
    sym: bool = True
    """Fix the zero point in the middle of the codes. False stores one per group: slightly better, but vLLM's GPU
    kernels don't load it."""
    scales: Literal["free", "nested"] = "free"
    """`nested` makes the scales of a row whole multiples of one another's common scale: then `compile`'s int8 graph,
    which checks several tokens at once, holds the same weights bit for bit."""
    format: Literal["gptq", "pack-quantized"] = "gptq"
    """How it is written: `gptq`, which most engines read, or `pack-quantized` of compressed-tensors, for vLLM and
    SGLang, also with zero points and in 8 bits."""
    ignore: tuple[str, ...] = ()
    """Linears to leave dense: ends of names (`mlp.down_proj`) or patterns (`*.layers.0.*`)."""


def ignored(name: str, patterns: tuple[str, ...]) -> bool:
    """Return whether a linear is left dense: a pattern is the end of its name, or matches all of it.

    >>> ignored("model.layers.0.mlp.up_proj", ("mlp.up_proj",)), ignored("model.layers.0.mlp.up_proj", ("*.1.*",))
    (True, False)
    """
    return any(name == p or name.endswith(f".{p}") or fnmatchcase(name, p) for p in patterns)


def chosen(options: GridOptions, facts: ModelFacts) -> dict[str, tuple[int, int]]:
    """Return the linears that will be quantized: full name → (out_features, in_features)."""
    if not options.ignore:
        return dict(facts.linears)
    return {name: shape for name, shape in facts.linears.items() if not ignored(name, options.ignore)}


def check_grid(options: GridOptions, facts: ModelFacts) -> Iterator[Problem]:
    """Yield what this grid can't do to this model."""
    if facts.architecture is None:
        known = ", ".join(architectures.names())
        message = f"model_type {facts.model_type!r} is not one whose linear layers are known"
        yield Problem(code="unknown-architecture", message=message, fix=f"known: {known}")
        return
    if options.scales == "nested" and options.bits == 8:
        message = "codes of 8 bits leave no room to multiply their scales into"
        fix = "use scales: free; with group_size: -1 the int8 graph is the same weights anyway"
        yield Problem(code="nested-scales", message=message, fix=fix, loc=("scales",))
    linears = chosen(options, facts)
    for pattern in options.ignore:
        if not any(ignored(name, (pattern,)) for name in facts.linears):
            yield _matches_nothing(pattern, options, facts)
    if not linears:
        yield Problem(code="nothing-to-quantize", message="every linear layer is ignored", loc=("ignore",))
        return
    yield from _check_groups(options, linears)
    yield from _check_packing(options, linears)


def grid(options: GridOptions, *, search: bool) -> Grid:
    """Return the grid that the options describe.

    Args:
        options: Of a quantize stage.
        search: Search scales, instead of spanning minimum to maximum.
    """
    from optikit.algorithms.grid import Grid

    return Grid(
        bits=options.bits,
        group_size=options.group_size,
        sym=options.sym,
        search=search,
        nested=options.scales == "nested",
    )


def _matches_nothing(pattern: str, options: GridOptions, facts: ModelFacts) -> Problem:
    """Return what is wrong with a pattern of `ignore`; other tools' patterns come with ours."""
    message = f"ignore {pattern!r} matches no linear layer"
    fix = f"names look like {next(iter(facts.linears), 'model.layers.0.mlp.up_proj')}"
    ours: list[str] | None = None
    if pattern == "lm_head":
        fix, ours = "leave it out: the output head stays dense anyway", []
    elif glob := as_glob(pattern):
        fix, ours = f"write {glob!r}: patterns here are shells', not regular expressions", [glob]
    rest = [own for own in options.ignore for own in ([own] if own != pattern else ours or [])]
    repair = {} if ours is None else {"quantize": {"ignore": rest}}
    return Problem(code="ignore-matches-nothing", message=message, fix=fix, loc=("ignore",), repair=repair)


def as_glob(pattern: str) -> str:
    r"""Return llm-compressor's `re:` pattern, which need not match to the end of a name, as ours; "" where none is.

    >>> as_glob("re:.*down_proj"), as_glob(r"re:model\.layers\.0\..*$"), as_glob("re:.*(q|k)_proj")
    ('*down_proj*', 'model.layers.0.*', '')
    """
    if not pattern.startswith("re:"):
        return ""
    words = pattern.removeprefix("re:").removeprefix("^")
    words, to_the_end = words.removesuffix("$"), words.endswith("$")
    glob = words.replace(".*", "*").replace("\\.", ".")
    plain = re.fullmatch(r"(?:[A-Za-z0-9_-]|\\\.|\.\*)+", words)
    return (glob if to_the_end or glob.endswith("*") else f"{glob}*") if plain else ""


def _starred(name: str) -> str:
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def _named(names: list[str]) -> str:
    kinds = list(dict.fromkeys(_starred(name) for name in names))
    return kinds[0] if len(kinds) == 1 else f"{kinds[0]} (and {len(kinds) - 1} more)"


def _check_groups(options: GridOptions, linears: Mapping[str, tuple[int, int]]) -> Iterator[Problem]:
    size = options.group_size
    refused = [name for name, (_, width) in linears.items() if size > 0 and width % size]
    if not refused:
        return
    fitting = [str(g) for g in GROUP_SIZES if g != size and all(width % g == 0 for _, width in linears.values())]
    width = linears[refused[0]][1]
    message = f"group_size {size} does not divide the input width {width} of {_named(refused)}"
    fix = f"use {' or '.join(fitting)}" if fitting else "use -1, one group per row"
    yield Problem(code="group-divides-width", message=message, fix=fix, loc=("group_size",))


def _check_packing(options: GridOptions, linears: Mapping[str, tuple[int, int]]) -> Iterator[Problem]:
    per_word = 32 // options.bits
    refused = [name for name, shape in linears.items() if any(size % per_word for size in shape)]
    if refused:
        rows, columns = linears[refused[0]]
        message = (
            f"{options.bits}-bit codes are packed {per_word} to an int32, which does not divide "
            f"{rows}x{columns} of {_named(refused)}"
        )
        fix = f"ignore {_starred(refused[0]).removeprefix('*.')!r}"
        yield Problem(code="packing-divides-shape", message=message, fix=fix, loc=("ignore",))


def packed_bytes(options: GridOptions, shape: tuple[int, int]) -> int:
    """Return the bytes of one packed linear (out_features, in_features): codes, scales, and what its format adds.

    That is zero points and a group index in `gptq`, zero points in `awq`, and in `pack-quantized` the shape, and zero
    points where the grid isn't symmetric.
    """
    rows, columns = shape
    groups = 1 if options.group_size < 0 else columns // options.group_size
    zeros = rows * groups * options.bits // 8
    more = {"gptq": zeros + columns * 4, "awq": zeros, "pack-quantized": 16 + (0 if options.sym else zeros)}
    return rows * columns * options.bits // 8 + rows * groups * 2 + more[options.format]


TRAITS: Mapping[tuple[str, int], Trait] = {
    ("gptq", 4): "int4_gptq",
    ("gptq", 8): "int8_gptq",
    ("awq", 4): "int4_awq",
    ("pack-quantized", 4): "int4_packed",
    ("pack-quantized", 8): "int8_packed",
}
"""What a directory becomes, by format and bits."""


def after_grid(options: GridOptions, facts: ModelFacts) -> ModelFacts:
    """Return the facts of the quantized model: same shapes, fewer bytes, no longer dense.

    Sparsity survives: weights that a mask holds at zero are coded as exactly zero.
    """
    linears = chosen(options, facts)
    element_bytes = 4 if facts.dtype == "F32" else 2
    dense = sum(rows * columns for rows, columns in linears.values()) * element_bytes
    packed = sum(packed_bytes(options, shape) for shape in linears.values())
    written = replace(
        facts,
        weight_bytes=facts.weight_bytes - dense + packed,
        config={**facts.config, "quantization_config": quantization_config(options, facts)},
    )
    return written.having(TRAITS[options.format, options.bits], without=frozenset({"dense"}))


def quantization_config(options: GridOptions, facts: ModelFacts, **more: Any) -> dict[str, Any]:
    """Return config.json's `quantization_config`, as GPTQModel, AutoAWQ, vLLM and others read it.

    Args:
        options: The grid, and the format.
        facts: The model.
        more: Further keys, where the format is `gptq`.
    """
    return _CONFIGS[options.format](options, facts) | (more if options.format == "gptq" else {})


def _skipped(options: GridOptions, facts: ModelFacts) -> list[str]:
    return [name for name in facts.linears if ignored(name, options.ignore)] if options.ignore else []


def _awq_config(options: GridOptions, facts: ModelFacts) -> dict[str, Any]:
    return {
        "quant_method": "awq",
        "bits": options.bits,
        "group_size": options.group_size,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": [*_skipped(options, facts), *facts.kept] or None,
    }


def compressed_ignore(facts: ModelFacts, patterns: tuple[str, ...]) -> list[str]:
    """Return what compressed-tensors leaves dense: names of linears, and patterns of the parts that are carried.

    Args:
        facts: The model.
        patterns: Linears that a recipe leaves dense; see `ignored`.
    """
    head = [facts.architecture.head] if facts.architecture else []
    towers = [rf"re:.*{part.rpartition('.')[2]}\..*" for part in facts.carried]
    return [*head, *(name for name in facts.linears if ignored(name, patterns)), *facts.routers, *towers]


def _compressed_config(options: GridOptions, facts: ModelFacts) -> dict[str, Any]:
    grouped = options.group_size > 0
    weights = {
        "num_bits": options.bits,
        "type": "int",
        "symmetric": options.sym,
        "strategy": "group" if grouped else "channel",
        "group_size": options.group_size if grouped else None,
        "dynamic": False,
    }
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": compressed_ignore(facts, options.ignore),
        "kv_cache_scheme": None,
    }


def _gptq_config(options: GridOptions, facts: ModelFacts) -> dict[str, Any]:
    dense: dict[str, Any] = {"-:^" + name.replace(".", r"\.") + "$": {} for name in _skipped(options, facts)}
    dense |= {"-:^" + name.replace(".", r"\.") + r"(\.|$)": {} for name in facts.kept}
    return {
        "quant_method": "gptq",
        "bits": options.bits,
        "group_size": options.group_size,
        "sym": options.sym,
        "desc_act": False,
        "lm_head": False,
        "checkpoint_format": "gptq",
        "dynamic": dense,
    }


_CONFIGS: Mapping[str, Callable[[GridOptions, ModelFacts], dict[str, Any]]] = {
    "gptq": _gptq_config,
    "awq": _awq_config,
    "pack-quantized": _compressed_config,
}
