"""How weights are stored: rows of traits.toml, which are traits that stages work with, and of packings.toml, frozen.

Whoever asks which trait a directory has, how many bits that is, or which engine reads it, asks the row. A packing
is a way to store weights that is only read: what has one is dequantized before the first stage sees it.
"""

from __future__ import annotations

import tomllib
from collections.abc import Collection, Container, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from importlib import resources
from types import MappingProxyType
from typing import Any, Literal, cast

from optikit.models.facts import TensorFacts, Trait

DENSE: Trait = "dense"
ANY = "*"
"""In a row: whatever is there."""
_WORD = 32


@dataclass(frozen=True, kw_only=True)
class Storage:
    """One way to store weights.

    Attributes:
        name: Name of the row, and of what reads it.
        trait: What that makes of the directory; "" for a packing.
        told: The format in words, for a packing.
        config: Values of `quantization_config` that tell it; none for dense weights. A list is a choice, `*` anything.
        absent: What a key of `config` means where it isn't there.
        caseless: Keys of `config` whose case doesn't matter.
        groups: What every group of `config_groups` says of its weights and of its input activations.
        weights: What every group says of its weights, whatever it says of activations.
        bits: Bits per weight; 0 for floats as they are, and for a packing until `settled` has read them.
        type: `int` or `float`, of a quantized weight.
        strategy: Which weights share a scale, where the format has a word for it.
        packed: How `codes` is packed: into 32-bit words, `in` or `out` along that axis of (in, out), `row` along inputs
            of (out, in); `half`, two codes a byte; None where each weight has an element.
        codes: Tensor that holds the weights.
        suffixes: Tensors of a packed linear; the first one no dense linear has.
        optional: Tensors that some have besides.
        zeros: Tensors that some tools write beside them, all zero.
        joint: What stands between a linear's name and a suffix.
        dropped: Ends of names of tensors that mean nothing to float weights: scales of activations and caches.
        scales: Tensor with scales → its shape, in words of `quantization.check`.
        dtype: Of `codes`, by safetensors; "" where `packed` says it.
        kept: Key of the settings that lists what was left as it was.
        other: Row whose suffixes the same settings may mean.
        settings: The settings that a directory has.
        states_shape: The shape of a linear stands beside its weight.
        integer_products: Activations are rounded, too.
        engines: What reads it.
        refused: What doesn't, with the reason.
    """

    name: str
    trait: Trait | Literal[""] = ""
    told: str = ""
    config: Mapping[str, Any] = field(default_factory=dict)
    absent: Mapping[str, Any] = field(default_factory=dict)
    caseless: tuple[str, ...] = ()
    groups: Mapping[str, Any] = field(default_factory=dict)
    weights: Mapping[str, Any] = field(default_factory=dict)
    bits: int = 0
    type: str = ""
    strategy: str = ""
    packed: Literal["in", "out", "row", "half"] | None = None
    codes: str = "qweight"
    suffixes: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    zeros: tuple[str, ...] = ()
    joint: str = "."
    dropped: tuple[str, ...] = ()
    scales: Mapping[str, str] = field(default_factory=dict)
    dtype: str = ""
    kept: str = ""
    other: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict, repr=False)
    states_shape: bool = False
    integer_products: bool = False
    engines: tuple[str, ...] = ()
    refused: Mapping[str, str] = field(default_factory=dict)

    def fits(self, settings: Mapping[str, Any]) -> bool:
        """Return whether a `quantization_config` tells of this storage."""
        told = {key: settings.get(key, self.absent.get(key)) for key in self.config}
        told |= {key: str(told[key]).lower() for key in self.caseless}
        return all(_is(told[key], wanted) for key, wanted in self.config.items()) and self._fits_groups(settings)

    def _fits_groups(self, settings: Mapping[str, Any]) -> bool:
        if not self.groups and not self.weights:
            return True
        groups = settings.get("config_groups")
        if not isinstance(groups, dict) or not groups:
            return False
        wanted = {"weights": {**self.groups, **self.weights}, "input_activations": self.groups}
        return all(
            isinstance(group, dict) and _holds(group.get(part), values)
            for group in groups.values()
            for part, values in wanted.items()
            if values
        )

    def settled(self, settings: Mapping[str, Any]) -> Storage:
        """Return this row with the settings of a directory, and the bits that they tell."""
        return replace(
            self, settings=settings, bits=self.bits or int(settings.get("bits") or _weights(settings)["num_bits"])
        )

    @property
    def group_size(self) -> int:
        """Inputs that share a scale; 0 for all of them."""
        told = self.settings.get("group_size") or _weights(self.settings).get("group_size")
        return told if type(told) is int and told > 0 else 0

    def tensor(self, linear: str, suffix: str) -> str:
        """Return the name of a tensor of a packed linear."""
        return f"{linear}{self.joint}{suffix}"

    def dense_name(self, linear: str) -> str:
        """Return the name of the tensor that a packed linear stands for."""
        return f"{linear}.weight" if self.joint == "." else linear

    def packs(self, linear: str, tensors: Container[str]) -> bool:
        """Return whether a linear of these tensors is packed; some are left as they were."""
        return bool(self.suffixes) and self.tensor(linear, self.suffixes[0]) in tensors

    def split(self, name: str) -> tuple[str, str]:
        """Return the linear and the suffix that a tensor's name is made of; ("", "") where it has no such suffix."""
        known = (*self.suffixes, *self.optional)
        found = next((each for each in known if name.endswith(self.joint + each)), "")
        return (name.removesuffix(self.joint + found), found) if found else ("", "")

    def drops(self, name: str) -> bool:
        """Return whether a tensor means nothing to float weights."""
        return name.endswith(tuple(f".{each}" for each in self.dropped))

    def shape(self, linear: str, tensors: Mapping[str, TensorFacts], *, transposed: bool) -> tuple[int, int] | None:
        """Return (out_features, in_features) of a linear, or None if it isn't there."""
        packed = tensors.get(self.tensor(linear, self.codes))
        if packed is not None and self.packed and len(packed.shape) == 2 and self.packs(linear, tensors):
            rows, columns = packed.shape
            found = {
                "in": (columns, rows * _WORD // self.bits),
                "out": (columns * _WORD // self.bits, rows),
                "row": (rows, columns * _WORD // self.bits),
                "half": (rows, 2 * columns),
            }
            return found[self.packed]
        plain = tensors.get(f"{linear}.weight")
        if plain is None or len(plain.shape) != 2:
            return None
        rows, columns = plain.shape
        return (columns, rows) if transposed else (rows, columns)

    @property
    def words(self) -> Mapping[str, Any]:
        """What rules say of quantized weights: quant_method, bits, type and, where there is one, strategy."""
        if not self.config:
            return {}
        known = {"quant_method": self.config["quant_method"], "bits": self.bits, "type": self.type}
        return known | ({"strategy": self.strategy} if self.strategy else {})


def _is(value: Any, wanted: Any) -> bool:
    """Return whether a value is what a row wants of it."""
    if wanted == ANY:
        return value is not None
    choice = wanted if isinstance(wanted, list) else [wanted]
    return any(type(value) is type(each) and value == each for each in choice)


def _holds(found: Any, wanted: Mapping[str, Any]) -> bool:
    return isinstance(found, dict) and all(_is(found.get(key), value) for key, value in wanted.items())


def _weights(settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return what the first group of `config_groups` says of its weights."""
    groups = settings.get("config_groups")
    first = next(iter(groups.values()), None) if isinstance(groups, dict) else None
    found = first.get("weights") if isinstance(first, dict) else None
    return found if isinstance(found, dict) else {}


def _read(file: str) -> Iterator[Storage]:
    text = resources.files("optikit.models").joinpath(file).read_text(encoding="utf-8")
    for name, row in tomllib.loads(text).items():
        fields: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in row.items()}
        yield Storage(name=name, **fields)


@cache
def rows() -> Mapping[str, Storage]:
    """Return every way to store weights that is a trait, by trait."""
    return MappingProxyType({row.name: replace(row, trait=cast("Trait", row.name)) for row in _read("traits.toml")})


@cache
def packings() -> Mapping[str, Storage]:
    """Return every way to store weights that is only read, by name."""
    return MappingProxyType({row.name: row for row in _read("packings.toml")})


def of(traits: Collection[str]) -> tuple[Storage, ...]:
    """Return the rows of those traits that say how weights are stored."""
    return tuple(row for trait, row in rows().items() if trait in traits)


def read_by(engine: str) -> frozenset[Trait]:
    """Return the traits that an engine reads."""
    return frozenset(cast("Trait", name) for name, row in rows().items() if engine in row.engines)


def bits(traits: Collection[str]) -> int:
    """Return the bits per weight that traits tell; 0 for floats as they are."""
    return max((row.bits for row in of(traits)), default=0)
