"""How weights are stored, by trait: rows of traits.toml, frozen.

Whoever asks which trait a directory has, how many bits that is, or which engine reads it, asks the row.
"""

from __future__ import annotations

import tomllib
from collections.abc import Collection, Container, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from types import MappingProxyType
from typing import Any, Literal, cast

from optikit.models.facts import TensorFacts, Trait

DENSE: Trait = "dense"


@dataclass(frozen=True, kw_only=True)
class Storage:
    """One way to store weights.

    Attributes:
        trait: What that makes of the directory.
        config: Values of `quantization_config` that tell it; none for dense weights.
        absent: What a key of `config` means where it isn't there.
        caseless: Keys of `config` whose case doesn't matter.
        groups: What every group of `config_groups` says of its weights and of its input activations.
        bits: Bits per weight; 0 for floats as they are.
        type: `int` or `float`, of a quantized weight.
        strategy: Which weights share a scale, where the format has a word for it.
        packed: Which axis of `qweight` is packed; None where nothing is.
        suffixes: Tensors of a packed linear; the first one no dense linear has.
        optional: Tensors that some have besides.
        zeros: Tensors that some tools write beside them, all zero.
        states_shape: The shape of a linear stands beside its weight.
        integer_products: Activations are rounded, too.
        engines: What reads it.
        refused: What doesn't, with the reason.
    """

    trait: Trait
    config: Mapping[str, Any] = field(default_factory=dict)
    absent: Mapping[str, Any] = field(default_factory=dict)
    caseless: tuple[str, ...] = ()
    groups: Mapping[str, Any] = field(default_factory=dict)
    bits: int = 0
    type: str = ""
    strategy: str = ""
    packed: Literal["in", "out"] | None = None
    suffixes: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    zeros: tuple[str, ...] = ()
    states_shape: bool = False
    integer_products: bool = False
    engines: tuple[str, ...] = ()
    refused: Mapping[str, str] = field(default_factory=dict)

    def fits(self, settings: Mapping[str, Any]) -> bool:
        """Return whether a `quantization_config` tells of this storage."""
        told = {key: settings.get(key, self.absent.get(key)) for key in self.config}
        told |= {key: str(told[key]).lower() for key in self.caseless}
        same = (type(told[key]) is type(wanted) and told[key] == wanted for key, wanted in self.config.items())
        return all(same) and self._fits_groups(settings)

    def _fits_groups(self, settings: Mapping[str, Any]) -> bool:
        if not self.groups:
            return True
        groups = settings.get("config_groups")
        if not isinstance(groups, dict) or not groups:
            return False
        parts = [group.get(part) for group in groups.values() for part in ("weights", "input_activations")]
        return all(isinstance(part, dict) and self.groups.items() <= part.items() for part in parts)

    def packs(self, linear: str, tensors: Container[str]) -> bool:
        """Return whether a linear of these tensors is packed; some are left as they were."""
        return bool(self.suffixes) and f"{linear}.{self.suffixes[0]}" in tensors

    def split(self, name: str) -> tuple[str, str]:
        """Return the linear and the suffix that a tensor's name is made of; ("", "") where it has no such suffix."""
        found = next((each for each in (*self.suffixes, *self.optional) if name.endswith(f".{each}")), "")
        return (name.removesuffix(f".{found}"), found) if found else ("", "")

    def shape(self, linear: str, tensors: Mapping[str, TensorFacts], *, transposed: bool) -> tuple[int, int] | None:
        """Return (out_features, in_features) of a linear, or None if it isn't there."""
        packed = tensors.get(f"{linear}.qweight")
        if packed is not None and self.packed is not None and len(packed.shape) == 2:
            rows, columns = packed.shape
            per_word = 32 // self.bits
            return (columns, rows * per_word) if self.packed == "in" else (columns * per_word, rows)
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


@cache
def rows() -> Mapping[str, Storage]:
    """Return every way to store weights, by trait."""
    text = resources.files("optikit.models").joinpath("traits.toml").read_text(encoding="utf-8")
    read = {}
    for name, row in tomllib.loads(text).items():
        fields: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in row.items()}
        read[name] = Storage(trait=cast("Trait", name), **fields)
    return MappingProxyType(read)


def of(traits: Collection[str]) -> tuple[Storage, ...]:
    """Return the rows of those traits that say how weights are stored."""
    return tuple(row for trait, row in rows().items() if trait in traits)


def read_by(engine: str) -> frozenset[Trait]:
    """Return the traits that an engine reads."""
    return frozenset(row.trait for row in rows().values() if engine in row.engines)


def bits(traits: Collection[str]) -> int:
    """Return the bits per weight that traits tell; 0 for floats as they are."""
    return max((row.bits for row in of(traits)), default=0)
