"""A PEFT adapter directory: LoRA matrices and the base that they belong to, from JSON and headers.

Of LoRA's many variants those are known that are a sum of the base weight and one product, merged exactly; what would
change the arithmetic otherwise is refused by its name. Source: peft 0.21, tuners/lora (config.py, layer.py).
"""

from __future__ import annotations

import math
import re
import reprlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from optikit.errors import InputMissingError, IntegrityError, RecipeError
from optikit.models import headers, reader
from optikit.models.facts import ModelFacts, TensorFacts
from optikit.models.strict_json import read_object

SETTINGS, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
FILES = (SETTINGS, WEIGHTS)
_PREFIX = "base_model.model."
_WHOLE = re.compile(r"(?P<module>.+?)(\.modules_to_save(\.default)?|\.base_layer)?\.(?P<leaf>weight|bias)")
_PART = re.compile(r"(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<side>[AB])(\.default)?(\.weight)?")
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {"bias": ("none",), "task_type": ("CAUSAL_LM",), "peft_type": ("LORA",)}
"""Settings that have to have one of these values, where they have any."""
_UNKNOWN = (
    *("use_dora", "lora_bias", "layer_replication", "target_parameters", "trainable_token_indices", "use_bdlora"),
    *("alora_invocation_tokens", "use_qalora", "arrow_config", "kasa_config", "velora_config", "monteclora_config"),
    "megatron_config",
)
"""Settings that make more of an adapter than a product that is added."""
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Initializations that take something away from the base, which isn't the one that is named any more."""
_FIX = "merge it with the tool that made it, and name the merged model"


@dataclass(frozen=True, kw_only=True)
class Product:
    """What is added to a weight: `scale` · B · A.

    Attributes:
        a, b: Names of the tensors (rank, in) and (out, rank).
        scale: What the product is multiplied by.
        embedding: They are an embedding's, (rank, rows) and (width, rank): the product is transposed.
    """

    a: str = ""
    b: str = ""
    scale: float = 1.0
    embedding: bool = False


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """What an adapter does to its base, by names of the base's tensors.

    Attributes:
        base: The base as the adapter names it, and revision, or "".
        revision: Of the base, or "".
        rank: Largest rank.
        rank_stabilized: The scale is alpha over the root of the rank.
        ties: What it does to the embedding was meant for the head as well.
        products: Weight → what is added to it.
        replaced: Tensor → the adapter's tensor that takes its place.
        shapes: Headers of the adapter.
    """

    base: str
    revision: str = ""
    rank: int
    rank_stabilized: bool = False
    ties: bool = False
    products: Mapping[str, Product] = field(default_factory=dict)
    replaced: Mapping[str, str] = field(default_factory=dict)
    shapes: Mapping[str, TensorFacts] = field(default_factory=dict)


def names_base(directory: Path) -> tuple[str, str]:
    """Return the base that an adapter names, and its revision or "".

    Raises:
        RecipeError: It names none.
    """
    settings = read_object(directory / SETTINGS)
    base, revision = settings.get("base_model_name_or_path"), settings.get("revision")
    if not isinstance(base, str) or not base:
        message = f"{directory / SETTINGS}: base_model_name_or_path is {reprlib.repr(base)}"
        raise RecipeError(message, fix="write the path of its base there, or hf:ORG/NAME of it without the hf:")
    return base, revision if isinstance(revision, str) else ""


def read(directory: Path) -> Adapter:
    """Read what an adapter does.

    Raises:
        InputMissingError: Its weights aren't there.
        IntegrityError: A file is damaged, or half of a product is missing.
        RecipeError: A kind of adapter that isn't a product that is added.
    """
    settings, where = read_object(directory / SETTINGS), directory / SETTINGS
    _require_plain(settings, where)
    if not (directory / WEIGHTS).is_file():
        raise InputMissingError(f"{directory} has no {WEIGHTS}", fix="save the adapter with safetensors")
    shapes = headers.read_header(directory / WEIGHTS)
    parts: dict[str, dict[str, Any]] = {}
    replaced: dict[str, str] = {}
    for name in sorted(shapes):
        inside = name.removeprefix(_PREFIX)
        part, whole = _PART.fullmatch(inside), _WHOLE.fullmatch(inside)
        if part is not None:
            row = parts.setdefault(f"{part['module']}.weight", {"embedding": bool(part["embedding"])})
            row[part["side"].lower()] = name
        elif whole is not None and "lora_" not in inside:
            replaced[f"{whole['module']}.{whole['leaf']}"] = name
        else:
            raise RecipeError(f"{directory / WEIGHTS}: nothing here knows what {name} does", fix=_FIX)
    products = dict(_products(parts, settings, shapes, where))
    base, revision = names_base(directory)
    return Adapter(
        base=base,
        revision=revision,
        rank=max((shapes[each.a].shape[0] for each in products.values()), default=0),
        rank_stabilized=bool(settings.get("use_rslora")),
        ties=bool(settings.get("ensure_weight_tying")),
        products=products,
        replaced=replaced,
        shapes=shapes,
    )


def _require_plain(settings: Mapping[str, Any], where: Path) -> None:
    odd = [key for key, known in _NEUTRAL.items() if settings.get(key) not in (None, *known)]
    odd += [key for key in _UNKNOWN if settings.get(key)]
    init = settings.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(_CHANGES_BASE):
        odd.append("init_lora_weights")
    if odd:
        message = (
            f"{where}: {odd[0]} is {reprlib.repr(settings[odd[0]])}: more than a product that is added to a weight"
        )
        raise RecipeError(message, fix=_FIX)


def _products(
    parts: Mapping[str, Mapping[str, Any]], settings: Mapping[str, Any], shapes: Mapping[str, TensorFacts], where: Path
) -> Iterator[tuple[str, Product]]:
    for weight, row in parts.items():
        if "a" not in row or "b" not in row:
            there, missing = ("A", "B") if "a" in row else ("B", "A")
            message = f"{where.parent / WEIGHTS} has lora_{there} of {weight} and no lora_{missing}"
            raise IntegrityError(message, fix="get the adapter again")
        module = weight.removesuffix(".weight")
        rank = _number(settings, "r", "rank_pattern", module, where)
        held = shapes[row["a"]].shape[:1]
        if held != (rank,):
            message = f"{where}: the rank of {module} is {rank}, and {row['a']} has {shapes[row['a']].shape}"
            raise IntegrityError(message, fix="get the adapter again, with its own configuration")
        alpha = _number(settings, "lora_alpha", "alpha_pattern", module, where)
        yield weight, Product(scale=alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank), **row)


def _number(settings: Mapping[str, Any], key: str, patterns: str, module: str, where: Path) -> Any:
    """Return a setting of a module, by the first pattern that its name ends with, as peft finds it."""
    told = settings.get(patterns) or {}
    found = next((each for each in told if re.match(rf"(.*\.)?({each})$", module)), None) if _safe(told) else None
    value = told[found] if found is not None else settings.get(key)
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
        message = f"{where}: {key} of {module} is {reprlib.repr(value)}"
        raise RecipeError(message, fix="get the adapter again, with its own configuration")
    return value


def _safe(patterns: Any) -> bool:
    return isinstance(patterns, dict) and all(len(each) < 200 for each in patterns)


def facts(directory: Path, base: Path, *, promised: bool = False) -> ModelFacts:
    """Return the facts of an adapter on its base: those of the base, with no traits, for it isn't a directory yet.

    Raises:
        IntegrityError: The adapter belongs to another base; the message names a tensor.
        RecipeError: It belongs to no model that is known here, or changes a matrix that is used twice.
    """
    adapter, found = read(directory), reader.read(base, promised=promised)
    require_fits(adapter, found, directory)
    scaled = ", rank-stabilized" if adapter.rank_stabilized else ""
    packing = f"LoRA adapter of rank {adapter.rank}{scaled} on {adapter.base}"
    packing += f" ({found.packing or ', '.join(sorted(found.traits))})" if found.traits != {"dense"} else ""
    none: frozenset[Any] = frozenset()
    return replace(found, packing=packing, traits=none, tokenizer_sha256="", tokenizer_tokens=0, left_dense=none)


def require_fits(adapter: Adapter, base: ModelFacts, directory: Path) -> None:
    """Hold every tensor of an adapter to the one of its base that it changes.

    Raises:
        IntegrityError: The base has no such tensor, or one of another shape.
        RecipeError: It changes an embedding that is the head as well.
    """
    shapes = reader.tensor_shapes(base)
    fix = "name the base that it was trained on in base_model_name_or_path of adapter_config.json"
    changed = (*adapter.products, *adapter.replaced)
    if not changed:
        raise IntegrityError(f"{directory / WEIGHTS} changes nothing", fix="get the adapter again")
    gone = next((weight for weight in changed if weight not in shapes), "")
    if gone:
        tied = ", whose head is its embedding," if base.tied else ""
        message = f"{directory} is for another base: {base.model_type} here{tied} has no {gone}"
        raise IntegrityError(message, fix=fix)
    if base.tied and not adapter.ties and any(reader.is_embedding(weight, base) for weight in changed):
        message = f"{directory} changes the embedding, which is the head of its base, too: it would change both"
        raise RecipeError(message, fix="train it with ensure_weight_tying, or on a base whose head is its own")
    for weight, wanted, name in _shapes_made(adapter, base):
        if shapes[weight] != wanted:
            message = f"{directory} is for another base: {name} makes {wanted} of {weight}, which is {shapes[weight]}"
            raise IntegrityError(message, fix=fix)


def is_turned(weight: str, product: Product, base: ModelFacts) -> bool:
    """Return whether a weight is stored as (in, out), so that its product has to be transposed."""
    return product.embedding or (reader.is_transposed(base) and weight.removesuffix(".weight") in base.linears)


def _shapes_made(adapter: Adapter, base: ModelFacts) -> Iterator[tuple[str, tuple[int, ...], str]]:
    """Yield a tensor of the base, the shape that the adapter makes for it, and which of its tensors says so."""
    for weight, product in adapter.products.items():
        a, b = adapter.shapes[product.a].shape, adapter.shapes[product.b].shape
        made = (*b[:1], *a[1:]) if len(a) == len(b) == 2 and a[0] == b[1] else (0, 0)
        yield weight, made[::-1] if is_turned(weight, product, base) else made, product.b
    for weight, name in adapter.replaced.items():
        yield weight, adapter.shapes[name].shape, name
