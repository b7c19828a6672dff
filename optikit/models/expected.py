"""What a checkpoint of a family has to hold: the name and shape of every tensor, from config.json, without torch.

A loader fills what is missing with random numbers and drops what it doesn't know; shapes that contradict config.json
show only after hours of work. So planning compares all names and shapes with the row of architectures.toml, which
a test holds to transformers' own models.
"""

from __future__ import annotations

import math
import re
import reprlib
from collections.abc import Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from optikit.errors import IntegrityError, RecipeError
from optikit.models.architectures import Architecture
from optikit.models.facts import TensorFacts
from optikit.models.traits import Storage

FIX = "the checkpoint is incomplete or isn't what config.json describes: get it again"
_ARITHMETIC = re.compile(
    r"bias|norm|scal|multiplier|softcap|rotary|rope|window|layer_types|attn|attention|expert|moe|alibi|residual|clip"
    r"|_act$|activation|(?:^|_)eps(?:ilon)?$|theta|logit|proj|swiglu"
)
_NOT_ARITHMETIC = re.compile(r"drop|^_?attn_implementation|^num_attention_heads$|^output_|^_experts_impl")


def tensors(
    architecture: Architecture, sizes: Mapping[str, int], settings: Mapping[str, Any]
) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of the model that config.json describes, by name.

    Args:
        architecture: Its family.
        sizes: Figures of `ModelFacts`, by name.
        settings: config.json, with `tie_word_embeddings` as it is meant.
    """
    known, layers, sparse = _known(sizes, settings), sizes["layers"], _sparse(architecture, sizes, settings)
    found: dict[str, tuple[int, ...]] = {}
    for pattern, words in architecture.tensors.items():
        shape, _, condition = words.partition(" if ")
        blocks = range(layers) if pattern.startswith("*.") else (-1,)
        where = [index for index in blocks if shape and _holds(condition, settings, index, sparse)]
        if where:
            whole = () if shape == "scalar" else tuple(_size(word, known) for word in shape.split())
            found |= dict.fromkeys(_named(pattern, architecture, where, sizes.get("experts", 0)), whole)
    return found


def linears(architecture: Architecture, sizes: Mapping[str, int], settings: Mapping[str, Any]) -> Iterator[str]:
    """Yield the full name of every linear of the model that config.json describes, experts after the others of a block.

    Args:
        architecture: Its family.
        sizes: Layers, and experts where it has some.
        settings: config.json, with `tie_word_embeddings` as it is meant.
    """
    sparse, experts = _sparse(architecture, sizes, settings), architecture.experts
    for index in range(sizes["layers"]):
        for name in architecture.linears:
            full = f"{architecture.block(index)}.{name}.weight"
            words = architecture.tensors.get(full if architecture.generic else f"*.{name}.weight", "")
            shape, _, condition = words.partition(" if ")
            if shape and _holds(condition, settings, index, sparse):
                yield f"{architecture.block(index)}.{name}"
        if experts is not None and index in sparse:
            for expert in range(sizes["experts"]):
                yield from (f"{architecture.block(index)}.{experts.linear(expert, part)}" for part in range(3))


def figure(words: str, sizes: Mapping[str, int], settings: Mapping[str, Any]) -> int:
    """Return what a shape's arithmetic comes to: sums of products of numbers, figures and keys of config.json.

    Raises:
        RecipeError: A key isn't there, or no whole number.
    """
    return _size(words, _known(sizes, settings))


def _known(sizes: Mapping[str, int], settings: Mapping[str, Any]) -> dict[str, Any]:
    heads, width, kv_heads = sizes["heads"], sizes["head_dim"], sizes["kv_heads"]
    shared = {"queries": heads * width, "keys": kv_heads * width, "all_heads": (heads + 2 * kv_heads) * width}
    return {**settings, **sizes, **shared}


def _sparse(architecture: Architecture, sizes: Mapping[str, int], settings: Mapping[str, Any]) -> frozenset[int]:
    experts = architecture.experts
    return experts.sparse(sizes["layers"], settings) if experts else frozenset()


def conditions(architecture: Architecture, found: Container[str]) -> Iterator[str]:
    """Yield the keys of config.json that have to be true for the first block to have all the tensors that it has.

    A key is named where every tensor that hangs on it is there: where one is missing, the others have no place.
    """
    by_key: dict[str, list[bool]] = {}
    for pattern, words in architecture.tensors.items():
        key = words.partition(" if ")[2]
        if key.isidentifier() and pattern.startswith("*."):
            by_key.setdefault(key, []).append(architecture.block(0) + pattern.removeprefix("*") in found)
    yield from (key for key, there in by_key.items() if all(there))


def _holds(conditions: str, settings: Mapping[str, Any], block: int, sparse: frozenset[int]) -> bool:
    """Return whether all conditions of a tensor hold in a block."""
    return all(_is_so(each.split(), settings, block, sparse) for each in conditions.split(" and ") if each)


def _is_so(words: list[str], settings: Mapping[str, Any], block: int, sparse: frozenset[int]) -> bool:
    match words:
        case ["untied"]:
            return not settings["tie_word_embeddings"]
        case ["sparse" | "dense" as kind]:
            return (block in sparse) is (kind == "sparse")
        case ["layer", kind]:
            kinds = settings.get("layer_types")
            return isinstance(kinds, list) and kinds[block : block + 1] == [kind]
        case ["not", key]:
            return not settings.get(key)
        case [key]:
            return bool(settings.get(key))
        case _:
            raise ValueError(f"{' '.join(words)} is no condition")


def _size(words: str, known: Mapping[str, Any]) -> int:
    """Return the value of sums of products, such as `2*intermediate+3`."""
    return sum(math.prod(_factor(word, known) for word in part.split("*")) for part in words.split("+"))


def _factor(word: str, known: Mapping[str, Any]) -> int:
    value = int(word) if word.isdigit() else known.get(word)
    if type(value) is not int or not 0 < value < 2**40:
        message = f"config.json: {word} is {reprlib.repr(value)}; a whole number from 1 up is wanted"
        raise RecipeError(message, fix="the file is damaged, or not one of this family")
    return value


def _named(pattern: str, architecture: Architecture, blocks: Sequence[int], experts: int) -> Iterator[str]:
    if not pattern.startswith("*."):
        yield pattern
        return
    for index in blocks:
        name = architecture.block(index) + pattern.removeprefix("*")
        if "#" not in name:
            yield name
        else:
            yield from (name.replace("#", str(expert)) for expert in range(experts))


def check(
    architecture: Architecture,
    scheme: Storage,
    expected: Mapping[str, tuple[int, ...]],
    found: Mapping[str, TensorFacts],
    packed: Mapping[str, tuple[int, int]],
    where: Path,
) -> None:
    """Compare all tensors of a checkpoint with those that its model has.

    Args:
        architecture: Its family.
        scheme: How its linears are stored.
        expected: Shapes by name, as `tensors` returns them.
        found: Headers, under the names of the whole model.
        packed: (out_features, in_features) of the linears that are packed.
        where: The directory, for messages.

    Raises:
        IntegrityError: One is missing, has another shape, or belongs to no module; the message names it.
    """
    needed = {scheme.tensor(linear, suffix) for linear in packed for suffix in scheme.suffixes}
    needed |= {name for name in expected if name.removesuffix(".weight") not in packed}
    missing = sorted(needed - found.keys())
    if missing:
        raise IntegrityError(f"{where} has no tensor {missing[0]}{_beside(missing)}", fix=FIX)
    _check_shapes(expected, found, packed, where, transposed=architecture.transposed)
    spare = {scheme.tensor(linear, suffix) for linear in packed for suffix in (*scheme.optional, *scheme.zeros)}
    spare |= set(filter(scheme.drops, found))
    odd = sorted(name for name in found.keys() - needed - spare if not _is_left_over(name, architecture))
    if odd:
        message = f"{where}: {architecture.model_type} with these settings has no place for tensor {odd[0]}"
        raise IntegrityError(message + _beside(odd), fix=FIX)


def _check_shapes(
    expected: Mapping[str, tuple[int, ...]],
    found: Mapping[str, TensorFacts],
    packed: Mapping[str, tuple[int, int]],
    where: Path,
    *,
    transposed: bool,
) -> None:
    for name, shape in expected.items():
        linear = name.removesuffix(".weight")
        wanted = shape[::-1] if linear in packed and transposed else shape
        stored = packed.get(linear) or found[name].shape
        if stored != wanted:
            message = f"{where}: {linear if linear in packed else name} has shape {stored}, and {wanted} is promised"
            raise IntegrityError(message, fix=FIX)


def _beside(names: Sequence[str]) -> str:
    return f", and {len(names) - 1} more like it" if len(names) > 1 else ""


def _is_left_over(name: str, architecture: Architecture) -> bool:
    """Return whether no model reads a tensor: what older versions kept, or the head of a model that ties it."""
    if name == f"{architecture.head}.weight":
        return True
    return any(
        name.startswith(architecture.blocks) and name.endswith(pattern.removeprefix("*"))
        for pattern in architecture.leftovers
    )


def check_settings(architecture: Architecture, settings: Mapping[str, Any], where: Path) -> None:
    """Refuse a key of config.json that would change what is computed and that transformers' class doesn't read.

    Raises:
        RecipeError: Naming the key and its value.
    """
    known = {*architecture.settings, *architecture.unread, *architecture.keys.values(), *architecture.aliases}
    known |= {*architecture.requires, *(architecture.experts.keys if architecture.experts else ())}
    for key, value in settings.items():
        if key in known or not looks_arithmetic(key) or _is_neutral(key, value):
            continue
        if key == "hidden_act" and value == settings.get("hidden_activation"):
            continue
        message = f"{where}: {key} is {reprlib.repr(value)}, and {architecture.model_type} has no such setting here"
        raise RecipeError(message, fix=f"remove {key}, if the model works without it; else its family isn't this one")


def looks_arithmetic(key: str) -> bool:
    """Return whether a key of config.json sounds as if it changed what is computed.

    >>> looks_arithmetic("residual_multiplier"), looks_arithmetic("bos_token_id")
    (True, False)
    """
    return bool(_ARITHMETIC.search(key)) and not _NOT_ARITHMETIC.search(key)


def _is_neutral(key: str, value: Any) -> bool:
    """Return whether a value says that nothing is changed."""
    if key == "layer_types":
        return isinstance(value, list) and all(kind == "full_attention" for kind in value)
    if isinstance(value, int | float) and value == 1 and type(value) is not bool:
        return bool(re.search(r"scal|multiplier|factor|pct$", key))
    return not value
