"""`ModelFacts` of a Hugging Face directory, from its configuration and headers: no weight is read."""

from __future__ import annotations

import reprlib
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from optikit.errors import IntegrityError, RecipeError
from optikit.models import (
    architectures,
    arithmetic,
    config,
    expected,
    generic,
    headers,
    language_part,
    packed,
    quantization,
    stacked_experts,
    tokenizer,
    traits,
)
from optikit.models.architectures import USUAL_KEYS, Architecture
from optikit.models.facts import DTYPE_BYTES, ModelFacts, TensorFacts
from optikit.models.language_part import LanguagePart
from optikit.models.traits import Storage
from optikit.problems import did_you_mean

INCOMPLETE = "the checkpoint is incomplete or isn't what config.json describes: get it again"


def read(directory: Path, *, promised: bool = False) -> ModelFacts:
    """Read the facts of a Hugging Face model directory from config.json and the safetensors headers.

    `dtype` is the dtype of most of its floating-point bytes: packed integers don't count. A directory in a packing that
    is only read has no traits, like a gguf file, and the `dtype` that its weights get.

    Args:
        directory: The directory.
        promised: Where there are no weights, or only their headers, return what config.json promises: enough to plan.

    Raises:
        InputMissingError: config.json or the weights are missing.
        IntegrityError: A file is damaged, or the weights aren't what config.json says.
        RefusedError: config.json or a neighbour would make a loader run code.
        RecipeError: An architecture, quantization or figure that can't be worked with.
    """
    told = config.load(directory)
    settings, where = language_part.settings_of(told), directory / "config.json"
    architecture = architecture_of(directory, told)
    _check_required(architecture, settings, where)
    expected.check_settings(architecture, settings, where)
    meant = architecture.meant(settings)
    meant["tie_word_embeddings"] = bool(meant.get("tie_word_embeddings", False))
    sizes = figures_of(architecture, meant, where) | expert_figures_of(architecture, meant, where)
    arithmetic.check(settings, where, layers=sizes["layers"], width=sizes["head_dim"])
    if promised and not headers.are_there(directory):
        return _promised(architecture, sizes, meant, told, directory)
    hollow = promised and (directory / headers.HOLLOW).is_file()
    return _held(architecture, sizes, meant, told, directory, hollow=hollow)


def _held(
    architecture: Architecture,
    sizes: Mapping[str, int],
    meant: Mapping[str, Any],
    told: Mapping[str, Any],
    directory: Path,
    *,
    hollow: bool,
) -> ModelFacts:
    """Return the facts of a model whose weights are there; with `hollow` their headers only."""
    tensors = headers.read_directory(directory)
    scheme = quantization.scheme(language_part.settings_of(told), directory / "config.json", tensors)
    part = _language(architecture, told, tensors, sizes["layers"], directory)
    named = {name: tensors[stored] for name, stored in part.stored.items()}
    dtype = config.dtype(told)
    told_packing, floats = scheme, stacked_experts.unpacked(architecture, scheme, named, dtype, directory)
    if floats is not None:
        named, scheme = floats, traits.rows()[traits.DENSE]
    named = stacked_experts.apart(architecture, sizes, named, directory)
    names = tuple(expected.linears(architecture, sizes, meant))
    quantization.require_agreement(scheme, names, named, directory)
    wanted = {} if architecture.generic else _wanted(architecture, sizes, meant)
    packed.check(scheme, wanted, named, directory)
    linears = wanted
    if scheme.trait or architecture.generic:
        stated = _stated(scheme, wanted, tensors, directory, hollow=hollow)
        linears = linears_of(architecture, scheme, named, names, directory, stated)
    left_dense = _left_dense(scheme, linears, named)
    facts = facts_of(
        architecture,
        sizes,
        linears,
        **_described(architecture, told_packing, sizes, meant, told, directory),
        dtype=_main_dtype(tensors) if told_packing.trait else dtype,
        weight_bytes=sum(tensor.bytes for tensor in tensors.values()),
        left_dense=left_dense,
        carried=language_part.kinds(part.carried),
    )
    check_tensors(architecture, scheme, facts, named, directory)
    return replace(
        facts,
        linears={part.told(name): shape for name, shape in linears.items()},
        left_dense=frozenset(part.told(name) for name in left_dense),
        routers=tuple(part.told(name) for name in routers_of(architecture, facts)),
    )


def _language(
    architecture: Architecture, told: Mapping[str, Any], tensors: Iterable[str], layers: int, directory: Path
) -> LanguagePart:
    part = language_part.find(architecture, told, tensors, layers)
    if not part.stored:
        raise IntegrityError(f"{directory} has no tensors of the language model in its text_config", fix=INCOMPLETE)
    return part


def routers_of(architecture: Architecture, facts: ModelFacts) -> Iterator[str]:
    """Yield the matrices of a mixture's blocks that are no linears of its row."""
    for name, shape in tensor_shapes(facts).items() if facts.experts else ():
        module = name.removesuffix(".weight")
        if len(shape) == 2 and name.startswith(architecture.blocks) and module not in facts.linears:
            yield module


def _tokenizer(directory: Path) -> dict[str, Any]:
    described = tokenizer.describe(directory)
    if described is None:
        return {}
    return {"tokenizer_sha256": described.sha256, "tokenizer_tokens": described.tokens}


def _left_dense(scheme: Storage, linears: Iterable[str], tensors: Container[str]) -> frozenset[str]:
    return frozenset(name for name in linears if scheme.suffixes and not scheme.packs(name, tensors))


def _stated(
    scheme: Storage,
    wanted: Mapping[str, tuple[int, int]],
    tensors: Mapping[str, TensorFacts],
    directory: Path,
    *,
    hollow: bool,
) -> Mapping[str, tuple[int, int]]:
    """Return the shapes that a packing states beside the weights, or config.json where only headers are there."""
    if not scheme.states_shape:
        return {}
    return wanted if hollow else quantization.stated_shapes(directory, tensors)


def _described(
    architecture: Architecture,
    scheme: Storage,
    sizes: Mapping[str, int],
    meant: Mapping[str, Any],
    told: Mapping[str, Any],
    directory: Path,
) -> dict[str, Any]:
    """Return the facts that come from config.json and the tokenizer alone."""
    return {
        "tied": meant["tie_word_embeddings"],
        "traits": frozenset({scheme.trait} if scheme.trait else ()),
        "packing": "" if scheme.trait else packed.described(scheme),
        "sliding_window": window_of(language_part.settings_of(told)),
        "config": told,
        "generic": architecture if architecture.generic else None,
        "cached": expected.figure(architecture.cached, sizes, meant) if architecture.cached else 0,
        **_tokenizer(directory),
    }


def _promised(
    architecture: Architecture,
    sizes: Mapping[str, int],
    meant: Mapping[str, Any],
    told: Mapping[str, Any],
    directory: Path,
) -> ModelFacts:
    """Return the facts of a model whose weights aren't here, from config.json alone.

    Raises:
        RecipeError: Each figure is possible, and together they aren't.
    """
    where = directory / "config.json"
    scheme = quantization.scheme(language_part.settings_of(told), where)
    linears = _wanted(architecture, sizes, meant)
    known = _described(architecture, scheme, sizes, meant, told, directory)
    facts = facts_of(architecture, sizes, linears, **known, dtype=config.dtype(told), weight_bytes=0)
    if facts.parameters > config.MOST_PARAMETERS:
        message = f"{where}: its figures make {facts.parameters:.3g} weights, more than {config.MOST_PARAMETERS:.0e}"
        raise RecipeError(message, fix="the file is damaged, or not a decoder-only language model's")
    if sizes["heads"] % sizes["kv_heads"]:
        message = f"{where}: {sizes['heads']} heads can't share {sizes['kv_heads']} of keys and values"
        raise RecipeError(message, fix="the file is damaged, or not a decoder-only language model's")
    size = DTYPE_BYTES[facts.dtype]
    dense = facts.parameters - facts.linear_elements
    bits = scheme.bits + 16 / scheme.group_size if scheme.group_size else scheme.bits
    return replace(facts, weight_bytes=int(dense * size + facts.linear_elements * (bits / 8 or size)))


def _wanted(
    architecture: Architecture, sizes: Mapping[str, int], meant: Mapping[str, Any]
) -> dict[str, tuple[int, int]]:
    """Return (out_features, in_features) of the linears of all blocks, as config.json describes them."""
    shapes = expected.tensors(architecture, {"intermediate": 4 * sizes["hidden"], **sizes}, meant)
    found = {}
    for name in expected.linears(architecture, sizes, meant):
        if f"{name}.weight" in shapes:  # a hybrid's blocks differ
            rows, columns = shapes[f"{name}.weight"]
            found[name] = (columns, rows) if architecture.transposed else (rows, columns)
    return found


def is_transposed(facts: ModelFacts) -> bool:
    """Return whether a model stores the weights of its linears as (in, out)."""
    return facts.architecture is not None and facts.architecture.transposed


def is_embedding(tensor: str, facts: ModelFacts) -> bool:
    """Return whether a tensor is the token embedding of a model."""
    return facts.architecture is not None and tensor == f"{facts.architecture.embedding}.weight"


def tensor_shapes(facts: ModelFacts) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of a model by name, packed linears as the weight that they stand for.

    Raises:
        RecipeError: Its family isn't known.
    """
    where, settings = Path("config.json"), language_part.settings_of(facts.config)
    architecture = facts.architecture or _architecture({"model_type": facts.model_type}, where)
    settings = {**architecture.meant(settings), "tie_word_embeddings": facts.tied}
    sizes = {name: getattr(facts, name) for name in USUAL_KEYS}
    sizes |= expert_figures_of(architecture, settings, Path("config.json"))
    return expected.tensors(architecture, sizes, settings)


def architecture_of(directory: Path, settings: Mapping[str, Any]) -> Architecture:
    """Return the row of a model directory; where its family has none, what its headers show.

    Raises:
        RecipeError: Neither is there.
    """
    where, told = directory / "config.json", settings
    settings = language_part.settings_of(told)
    found = architectures.find(str(settings.get("model_type")), settings)
    if found is not None:
        return found
    if settings is not told:
        return _architecture(settings, where)
    if architectures.find(str(settings.get("model_type")), settings) is None and not headers.are_there(directory):
        return _architecture(settings, where, why="its weights aren't there")
    return _architecture(settings, where, headers.read_directory(directory), quantization.scheme(settings, where))


def _architecture(
    settings: Mapping[str, Any],
    where: Path,
    tensors: Mapping[str, TensorFacts] | None = None,
    scheme: Storage | None = None,
    why: str = "",
) -> Architecture:
    model_type = settings.get("model_type")
    found = architectures.find(model_type, settings) if isinstance(model_type, str) else None
    if found is None and tensors is not None and scheme is not None:
        found, why = generic.architecture(settings, tensors, scheme)
    if found is None:
        fix = did_you_mean(str(model_type), architectures.names())
        told = f", and can't be walked without a row: {why}" if why else ""
        raise RecipeError(f"{where}: model_type {model_type!r} isn't known here{told}", fix=fix)
    return found


def _check_required(architecture: Architecture, settings: Mapping[str, Any], where: Path) -> None:
    for key, value in architecture.unmet(settings):
        wanted = architecture.requires[key]
        message = f"{where}: {key} is {value!r}; {architecture.model_type} is known here only with {wanted!r}"
        raise RecipeError(message, fix="choose another model of the family")
    kinds, layers = settings.get("layer_types"), settings.get(architecture.keys["layers"])
    if architecture.hybrid and not architecture.generic and (not isinstance(kinds, list) or len(kinds) != layers):
        message = f"{where}: layer_types should name a kind for each of {layers} blocks"
        raise RecipeError(message, fix="get the model's config.json again")


def figures_of(architecture: Architecture, settings: Mapping[str, Any], where: Path) -> dict[str, int]:
    """Return every figure; those that may be left out (kv_heads, head_dim, intermediate) come from others."""
    optional = {"kv_heads", "head_dim", "intermediate"}
    keys = architecture.keys
    figures = dict(architecture.fixed) | {
        name: config.figure(name, key, settings.get(key), where)
        for name, key in keys.items()
        if name not in architecture.fixed and (name not in optional or settings.get(key) is not None)
    }
    figures.setdefault("kv_heads", figures["heads"])
    if "head_dim" not in figures:
        if figures["hidden"] % figures["heads"]:
            message = f"{where}: {keys['heads']} {figures['heads']} doesn't divide {keys['hidden']} {figures['hidden']}"
            raise RecipeError(message, fix="the file is damaged")
        figures["head_dim"] = figures["hidden"] // figures["heads"]
    return figures


def linears_of(
    architecture: Architecture,
    scheme: Storage,
    tensors: Mapping[str, TensorFacts],
    names: Iterable[str],
    where: Path,
    stated: Mapping[str, tuple[int, int]] = MappingProxyType({}),
) -> dict[str, tuple[int, int]]:
    """Return the shape (out, in) of every linear by name, packed or not.

    Raises:
        IntegrityError: One has no weights.
    """
    found = {}
    prefix = architecture.blocks.partition(".")[0] + "."
    for name in names:
        told = stated.get(name, stated.get(name.removeprefix(prefix)))
        shape = told or scheme.shape(name, tensors, transposed=architecture.transposed)
        if shape is None:
            raise IntegrityError(f"{where} has no weights for {name}", fix=INCOMPLETE)
        found[name] = shape
    return found


def expert_figures_of(architecture: Architecture, settings: Mapping[str, Any], where: Path) -> dict[str, int]:
    """Return experts, experts_chosen and expert_width of a family that has experts."""
    experts = architecture.experts
    if experts is None:
        return {}
    keys = {"experts": experts.count, "experts_chosen": experts.chosen, "expert_width": experts.width}
    found = {name: config.figure(name, key, settings.get(key), where) for name, key in keys.items()}
    for rule, key in experts.blocks.items():
        value = settings.get(key)
        each = value if isinstance(value, list) and rule in {"not", "only"} else [value]
        if value is not None and not all(type(one) is int and 0 <= one < 2**13 for one in each):
            message = f"{where}: {key} is {reprlib.repr(value)}; blocks by their numbers are wanted"
            raise RecipeError(message, fix="the file is damaged")
    if found["experts_chosen"] > found["experts"]:
        message = f"{where}: {found['experts_chosen']} experts per token, and there are {found['experts']}"
        raise RecipeError(message, fix="the file is damaged")
    return found


def check_tensors(
    architecture: Architecture, scheme: Storage, facts: ModelFacts, found: Mapping[str, TensorFacts], where: Path
) -> None:
    """Hold names and shapes of all tensors to what config.json describes."""
    shapes = {name: shape for name, shape in facts.linears.items() if scheme.packs(name, found)}
    if scheme.packs(architecture.head, found):
        shapes[architecture.head] = scheme.shape(architecture.head, found, transposed=False) or (0, 0)
    expected.check(architecture, scheme, tensor_shapes(facts), found, shapes, where)


def facts_of(
    architecture: Architecture, figures: Mapping[str, int], linears: Mapping[str, tuple[int, int]], **rest: Any
) -> ModelFacts:
    """Return facts of a family's figures and linears; `rest` are the other fields."""
    last = linears.get(f"{architecture.block(0)}.{architecture.linears[-1]}")
    if last is not None:
        figures = {"intermediate": last[1], **figures}  # the MLP's way back has its width as input
    values: dict[str, Any] = {**figures, **rest}
    values.pop("expert_width", None)
    return ModelFacts(model_type=architecture.model_type, linears=linears, **values)


def _main_dtype(tensors: Mapping[str, TensorFacts]) -> str:
    weights: Counter[str] = Counter()
    for name, tensor in tensors.items():
        if ".weight." not in name:  # what is kept beside a packed weight
            weights[tensor.dtype] += tensor.bytes
    floats = {dtype: size for dtype, size in weights.items() if "F" in dtype and DTYPE_BYTES[dtype] > 1}
    return max(floats or weights, key=lambda dtype: weights[dtype], default="F32")


def window_of(settings: Mapping[str, Any]) -> int | None:
    """Return the attention window, tokens; None where attention sees everything."""
    window = settings.get("sliding_window")
    if type(window) is not int or window < 1 or settings.get("use_sliding_window") is False:
        return None
    return window
