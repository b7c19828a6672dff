"""`ModelFacts` of a model that exists, a Hugging Face directory or a gguf file, from its headers: no weight is read."""

from __future__ import annotations

import math
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
    gguf_header,
    gguf_names,
    gguf_parts,
    gguf_settings,
    gguf_tied,
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
from optikit.models.gguf_header import GgufHeader
from optikit.models.language_part import LanguagePart
from optikit.models.traits import Storage
from optikit.problems import did_you_mean

_INCOMPLETE = "the checkpoint is incomplete or isn't what config.json describes: get it again"


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
    sizes = _figures(architecture, meant, where) | _expert_figures(architecture, meant, where)
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
        linears = _linears(architecture, scheme, named, names, directory, stated)
    left_dense = _left_dense(scheme, linears, named)
    facts = _facts(
        architecture,
        sizes,
        linears,
        **_described(architecture, told_packing, sizes, meant, told, directory),
        dtype=_main_dtype(tensors) if told_packing.trait else dtype,
        weight_bytes=sum(tensor.bytes for tensor in tensors.values()),
        left_dense=left_dense,
        carried=language_part.kinds(part.carried),
    )
    _check_tensors(architecture, scheme, facts, named, directory)
    return replace(
        facts,
        linears={part.told(name): shape for name, shape in linears.items()},
        left_dense=frozenset(part.told(name) for name in left_dense),
        routers=tuple(part.told(name) for name in _routers(architecture, facts)),
    )


def _language(
    architecture: Architecture, told: Mapping[str, Any], tensors: Iterable[str], layers: int, directory: Path
) -> LanguagePart:
    part = language_part.find(architecture, told, tensors, layers)
    if not part.stored:
        raise IntegrityError(f"{directory} has no tensors of the language model in its text_config", fix=_INCOMPLETE)
    return part


def _routers(architecture: Architecture, facts: ModelFacts) -> Iterator[str]:
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
        "sliding_window": _window(language_part.settings_of(told)),
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
    facts = _facts(architecture, sizes, linears, **known, dtype=config.dtype(told), weight_bytes=0)
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
    sizes |= _expert_figures(architecture, settings, Path("config.json"))
    return expected.tensors(architecture, sizes, settings)


def read_gguf(path: Path) -> ModelFacts:
    """Read the facts of a gguf model, in one file or in parts, from its headers.

    `dtype` is what its weights become when they are read, see `gguf_dtype`; `weight_bytes` are the file's own; it has
    no traits, because no stage reads it before it is a model directory. `config` has the figures under their usual
    names.

    Raises:
        InputMissingError: A part isn't there.
        IntegrityError: The file is damaged, or lacks a tensor.
        RecipeError: An architecture or figure that can't be worked with.
    """
    header = gguf_parts.read(path)
    architecture = gguf_architecture(header, path)
    figures = _gguf_figures(architecture, header, path)
    settings = {
        "model_type": architecture.model_type,
        **_gguf_sizes(architecture, figures),
        "tie_word_embeddings": gguf_tied.tied(header),
        **gguf_settings.settings(path, header, architecture, figures),
    }
    figures |= _expert_figures(architecture, settings, path)
    linears = figures["layers"] * max(1, figures.get("experts", 0))
    if figures["layers"] > len(header.tensors) or linears > gguf_header.MOST_ENTRIES:
        message = f"{path}: {figures['layers']} blocks with {figures.get('experts', 0)} experts, and "
        raise IntegrityError(f"{message}{len(header.tensors)} tensors", fix=_INCOMPLETE)
    tensors = _gguf_tensors(architecture, header, figures, path)
    if settings["tie_word_embeddings"]:
        tensors.pop(f"{architecture.head}.weight", None)
    settings |= dict.fromkeys(expected.conditions(architecture, tensors), True)
    names = tuple(expected.linears(architecture, figures, settings))
    dense = traits.rows()[traits.DENSE]
    facts = _facts(
        architecture,
        figures,
        _linears(architecture, dense, tensors, names, path),
        tied=settings["tie_word_embeddings"],
        dtype=gguf_dtype(header),
        weight_bytes=sum(tensor.bytes for tensor in header.tensors.values()),
        traits=frozenset(),
        sliding_window=_window(settings),
        config=settings,
    )
    try:
        _check_tensors(architecture, dense, facts, tensors, path)
    except IntegrityError as error:
        fix = (
            "get it again, or start from the model's safetensors directory: the file may hold what isn't computed here"
        )
        raise IntegrityError(error.message, fix=fix) from error
    return replace(facts, routers=tuple(_routers(architecture, facts)))


def gguf_dtype(header: GgufHeader) -> str:
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


def gguf_architecture(header: GgufHeader, path: Path) -> Architecture:
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


def _gguf_figures(architecture: Architecture, header: GgufHeader, path: Path) -> dict[str, int]:
    embedding = header.tensors.get(gguf_tied.EMBEDDING)
    if embedding is None or len(embedding.shape) != 2:
        raise IntegrityError(f"{path} has no {gguf_tied.EMBEDDING}", fix=_INCOMPLETE)
    keys = {name: f"{architecture.gguf}.{key}" for name, key in gguf_settings.FIGURES.items()}
    known = {**header.metadata, "vocab": embedding.shape[0]}
    return _figures(replace(architecture, keys={**keys, "vocab": "vocab"}), known, path)


def _gguf_sizes(architecture: Architecture, figures: Mapping[str, int]) -> dict[str, int]:
    """Return the figures in words of config.json; shared heads and their width only where the family has such keys."""
    derived = {"kv_heads": figures["heads"], "head_dim": figures["hidden"] // figures["heads"]}
    own = any(word in words for words in architecture.tensors.values() for word in ("keys", "all_heads"))
    return {
        key: figures[name]
        for name, key in architecture.keys.items()
        if name in figures and (own or figures[name] != derived.get(name))
    }


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
    return _architecture(settings, where, headers.read_directory(directory), quantization.scheme(settings, where))


def _architecture(
    settings: Mapping[str, Any],
    where: Path,
    tensors: Mapping[str, TensorFacts] | None = None,
    scheme: Storage | None = None,
) -> Architecture:
    model_type = settings.get("model_type")
    found = architectures.find(model_type, settings) if isinstance(model_type, str) else None
    why = ""
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


def _figures(architecture: Architecture, settings: Mapping[str, Any], where: Path) -> dict[str, int]:
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


def _linears(
    architecture: Architecture,
    scheme: Storage,
    tensors: Mapping[str, TensorFacts],
    names: Iterable[str],
    where: Path,
    stated: Mapping[str, tuple[int, int]] = MappingProxyType({}),
) -> dict[str, tuple[int, int]]:
    found = {}
    prefix = architecture.blocks.partition(".")[0] + "."
    for name in names:
        told = stated.get(name, stated.get(name.removeprefix(prefix)))
        shape = told or scheme.shape(name, tensors, transposed=architecture.transposed)
        if shape is None:
            raise IntegrityError(f"{where} has no weights for {name}", fix=_INCOMPLETE)
        found[name] = shape
    return found


def _expert_figures(architecture: Architecture, settings: Mapping[str, Any], where: Path) -> dict[str, int]:
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


def _check_tensors(
    architecture: Architecture, scheme: Storage, facts: ModelFacts, found: Mapping[str, TensorFacts], where: Path
) -> None:
    """Hold names and shapes of all tensors to what config.json describes."""
    shapes = {name: shape for name, shape in facts.linears.items() if scheme.packs(name, found)}
    if scheme.packs(architecture.head, found):
        shapes[architecture.head] = scheme.shape(architecture.head, found, transposed=False) or (0, 0)
    expected.check(architecture, scheme, tensor_shapes(facts), found, shapes, where)


def _facts(
    architecture: Architecture, figures: Mapping[str, int], linears: Mapping[str, tuple[int, int]], **rest: Any
) -> ModelFacts:
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


def _window(settings: Mapping[str, Any]) -> int | None:
    window = settings.get("sliding_window")
    if type(window) is not int or window < 1 or settings.get("use_sliding_window") is False:
        return None
    return window


def _gguf_tensors(
    architecture: Architecture, header: GgufHeader, figures: Mapping[str, int], path: Path
) -> dict[str, TensorFacts]:
    """Return the tensors of a gguf file under their names in the model directory that it becomes.

    Raises:
        RecipeError: Naming one that is no part of it.
        IntegrityError: A tensor stacks another number of experts.
    """
    experts, dtype = figures.get("experts", 0), gguf_dtype(header)
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
                raise IntegrityError(message, fix=_INCOMPLETE)
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
