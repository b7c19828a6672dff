"""Whether packed tensors are what `quantization_config` says, from headers: it is written by hand, copied, and lies.

A loader that believes it reads every weight at the wrong place, or shows noise; here the first linear that contradicts
it is named before anything is read.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from optikit.errors import IntegrityError
from optikit.models.facts import TensorFacts
from optikit.models.traits import Storage

FIX = "correct quantization_config, or get the checkpoint again"
WORDS = "I32"
"""Dtype of what codes are packed into, by safetensors."""
_MODULE_CLASSES = frozenset({"Linear", "Embedding"})


def check(
    storage: Storage,
    wanted: Mapping[str, tuple[int, int]],
    found: Mapping[str, TensorFacts],
    where: Path,
) -> None:
    """Hold the tensors of all linears to the settings that they lie beside.

    Args:
        storage: How they are stored, settled.
        wanted: (out_features, in_features) of the linears by name, from config.json.
        found: Headers.
        where: The directory, for messages.

    Raises:
        IntegrityError: Naming the first linear, what is promised and what is there.
    """
    directory = _Directory(storage, found, where)
    for linear, (rows, columns) in wanted.items():
        if storage.packs(linear, found):
            directory.check_words(linear)
            directory.check_codes(linear, rows, columns)
            directory.check_scales(linear, rows, columns)
        directory.check_kept(linear)


@dataclass(frozen=True)
class _Directory:
    """A packed directory, and what its settings promise."""

    storage: Storage
    found: Mapping[str, TensorFacts]
    where: Path

    @property
    def promised(self) -> str:
        size = self.storage.group_size
        groups = f" in groups of {size}" if size else ""
        return f"{self.storage.told or self.storage.name}, {self.storage.bits} bits{groups},"

    def told(self, what: str, fix: str = FIX) -> IntegrityError:
        return IntegrityError(f"{self.where}: {what}", fix=fix)

    def check_words(self, linear: str) -> None:
        """Hold codes and zero points to the words that they are packed into: bits of other numbers mean nothing."""
        if self.storage.packed not in ("in", "out", "row"):
            return
        for suffix in (self.storage.codes, "qzeros"):
            tensor = self.found.get(self.storage.tensor(linear, suffix))
            if tensor is not None and tensor.dtype != WORDS:
                message = f"{linear}.{suffix} is stored as {tensor.dtype}, and {self.promised} packs it into {WORDS}"
                raise self.told(message, "quantize the model anew: no reader here or elsewhere takes these for codes")

    def check_codes(self, linear: str, rows: int, columns: int) -> None:
        storage, codes = self.storage, self.found.get(self.storage.tensor(linear, self.storage.codes))
        if codes is None:
            return
        if storage.dtype and codes.dtype != storage.dtype:
            raise self.told(f"{linear} is stored as {codes.dtype}, and {self.promised} is {storage.dtype}")
        held = storage.shape(linear, self.found, transposed=False) if storage.packed else None
        if held is not None and not self._fits(held, rows, columns):
            bits = codes.bytes * 8 / (rows * columns)
            raise self.told(f"{linear} of {rows}x{columns} takes {bits:g} bits a weight, not those of {self.promised}")

    def _fits(self, held: tuple[int, int], rows: int, columns: int) -> bool:
        """Return whether codes are those of a linear; a row's last word may have room left."""
        padded = self.storage.packed == "row" and held[0] == rows and 0 <= held[1] - columns < 32
        return padded or held[0] * held[1] == rows * columns

    def check_scales(self, linear: str, rows: int, columns: int) -> None:
        sizes = _sizes(self.storage, rows, columns)
        for suffix, words in self.storage.scales.items():
            tensor = self.found.get(self.storage.tensor(linear, suffix))
            shape = tuple(sizes[word] for word in words.split())
            if tensor is not None and 0 not in shape and tensor.shape != shape:
                raise self.told(f"{linear}.{suffix} has shape {tensor.shape}, and {shape} goes with {self.promised}")

    def check_kept(self, linear: str) -> None:
        """Hold what was left as it was to the list of it, where the settings have a place for one."""
        storage = self.storage
        if not storage.kept:
            return
        listed = storage.settings.get(storage.kept)
        patterns = [str(each) for each in listed] if isinstance(listed, list) else []
        named = any(_names(pattern, linear) for pattern in patterns)
        if storage.packs(linear, self.found):
            if named:
                raise self.told(f"{storage.kept} says that {linear} was left as it was, and it is packed")
            return
        self._check_scaled(linear)
        if not named and not any(_may_mean(pattern, linear) for pattern in patterns):
            raise self.told(f"{linear} isn't packed as {self.promised} and isn't named by {storage.kept}")

    def _check_scaled(self, linear: str) -> None:
        """Refuse a weight that is packed and lacks what makes numbers of it."""
        storage, plain = self.storage, self.found.get(f"{linear}.weight")
        if plain is not None and storage.codes == "weight" and plain.dtype == storage.dtype:
            fix = "get the checkpoint again: without its scale the weight means nothing"
            raise self.told(f"{linear}.weight is {plain.dtype} and has no {storage.suffixes[0]}", fix)


def _sizes(storage: Storage, rows: int, columns: int) -> dict[str, int]:
    """Return what words of `scales` mean for a linear; 0 is whatever is there."""
    groups = -(-columns // storage.group_size) if storage.group_size else 0
    high, wide = storage.settings.get("weight_block_size") or (rows, columns)
    blocks = {"out_blocks": -(-rows // high), "in_blocks": -(-columns // wide)}
    blocks["out_words"] = -(-rows * storage.bits // 32)
    return {"out": rows, "in": columns, "groups": groups, "row_groups": groups or 1, **blocks}


def _names(pattern: str, linear: str) -> bool:
    """Return whether a pattern of what was left names a whole linear, as compressed-tensors and ModelOpt write it."""
    if pattern.startswith("re:"):
        return _matches(pattern.removeprefix("re:"), linear)
    return linear == pattern or ("*" in pattern and fnmatch.fnmatchcase(linear, pattern))


def _may_mean(pattern: str, linear: str) -> bool:
    """Return whether a loader may take a linear for named: transformers looks for parts of names, too."""
    return pattern in _MODULE_CLASSES or pattern in linear or _matches(pattern, linear)


def _matches(pattern: str, linear: str) -> bool:
    if len(pattern) > 200:
        return False
    try:
        return re.match(pattern, linear) is not None
    except re.error:
        return False


def described(storage: Storage) -> str:
    """Return a packing in words, for a plan: format, bits, groups, and what else its reader has to mind."""
    return ", ".join(_words(storage)) if storage.suffixes else "floats"


def _words(storage: Storage) -> Iterator[str]:
    settings = storage.settings
    yield storage.told or storage.name
    yield f"{storage.bits} bits"
    if storage.group_size:
        yield f"groups of {storage.group_size}"
    if settings.get("checkpoint_format") == "gptq_v2":
        yield "gptq_v2"
    if settings.get("desc_act"):
        yield "desc_act"
    if settings.get("weight_block_size"):
        yield "blocks of {}x{}".format(*settings["weight_block_size"])
