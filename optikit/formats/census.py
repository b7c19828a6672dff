"""What became of every tensor of a model in a stage that wrote another one: none is lost, and none appears unasked.

A stage holds its result to what it promises; this holds all of them to what no stage may do, by files alone. A missing
bias, norm, embedding, output head or draft layer would be filled with random numbers by the next loader, or ignored.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from optikit.errors import IntegrityError
from optikit.formats import stacked
from optikit.formats.checkpoint import Checkpoint, Entry, same_bytes
from optikit.models import language_part, quantization
from optikit.models.architectures import Architecture
from optikit.models.facts import ModelFacts
from optikit.models.reader import read
from optikit.models.traits import Storage
from optikit.stage import Changes

FIX = "this is a defect of the stage: report it with the step's log"
_STACK = re.compile(r"(.+\.experts)\.(?:\d+\.)?.+")


@dataclass(frozen=True, kw_only=True)
class Census:
    """Counts of a model's tensors.

    Attributes:
        same: As they were, bit by bit.
        changed: Other numbers under the same name, as the stage promises.
        replaced: Linears that are packed now, or experts that are stored apart.
        dropped: Reason → how many are gone for it.
    """

    same: int
    changed: int
    replaced: int
    dropped: Mapping[str, int] = field(default_factory=dict)

    def facts(self) -> dict[str, Any]:
        """Return the counts as a report has them."""
        return {"same": self.same, "changed": self.changed, "replaced": self.replaced, "dropped": dict(self.dropped)}


def take(source: Path, dest: Path, changes: Changes, found: Mapping[str, Any]) -> Census:
    """Account for every tensor of a model, and for every one of what a stage made of it.

    Args:
        source: The directory that the stage read.
        dest: The one that it wrote.
        changes: What it may change.
        found: What it found out: the blocks that it kept, where it left some out.

    Raises:
        IntegrityError: A tensor is missing, is there unasked, or differs although nothing may change it.
    """
    pair = _pair(source, dest, changes, found)
    counts, reasons = Counter[str](), Counter[str]()
    for name in pair.old:
        kind, reason = pair.became(name)
        counts[kind] += 1
        reasons.update([reason] if reason else [])
    stacks = {stack[1] for name in pair.old.keys() - pair.new.keys() if (stack := _STACK.fullmatch(name))}
    for name in sorted(pair.new.keys() - pair.old.keys() - pair.packed):
        stack = _STACK.fullmatch(name)
        if stack is None or stack[1] not in stacks:
            raise IntegrityError(f"{dest}: {name} is there, and the model has no such tensor", fix=FIX)
    return Census(same=counts["same"], changed=counts["changed"], replaced=counts["replaced"], dropped=dict(reasons))


@dataclass(frozen=True, kw_only=True)
class _Pair:
    """Tensors of two directories under the names of the first one's model, and what may have become of them."""

    row: Architecture
    changes: Changes
    old: Mapping[str, Entry]
    new: Mapping[str, Entry]
    packed: frozenset[str]
    codes: str
    may_change: frozenset[str]
    tied: bool

    def became(self, name: str) -> tuple[str, str]:
        """Return `same`, `changed`, `replaced`, or `dropped` with the reason."""
        if name not in self.new:
            return self._gone(name)
        if same_bytes(self.old[name], self.new[name]):
            return "same", ""
        if self.changes != "all" and name not in self.may_change:
            raise IntegrityError(f"{name} differs from the model's own, and nothing may change it", fix=FIX)
        return "changed", ""

    def _gone(self, name: str) -> tuple[str, str]:
        layer = name.removesuffix(".weight")
        stack = _STACK.fullmatch(name)
        apart = stack is not None and any(other.startswith(f"{stack[1]}.") for other in self.new)
        if apart or f"{layer}.{self.codes}" in self.packed:
            return "replaced", ""
        if self.changes == "blocks" and name.startswith(f"{self.row.blocks}."):
            return "dropped", "its block was left out"
        if name == f"{self.row.head}.weight" and self.tied:
            return "dropped", "the output head is the embedding"
        if any(name.endswith(pattern.removeprefix("*")) for pattern in self.row.leftovers):
            return "dropped", "no model reads it"
        raise IntegrityError(f"{name} was lost", fix=FIX)


def _pair(source: Path, dest: Path, changes: Changes, found: Mapping[str, Any]) -> _Pair:
    before, after = read(source), read(dest)
    row, written = before.architecture, after.architecture
    if row is None or written is None:
        raise IntegrityError(f"{dest} is of no known family", fix=FIX)
    new = _entries(dest, after)
    storage = quantization.scheme(Checkpoint(dest).config(), dest / "config.json")
    return _Pair(
        row=row,
        changes=changes,
        old=_entries(source, before),
        new=_renumbered(new, row, found["blocks_kept"]) if changes == "blocks" else new,
        packed=frozenset(_packed(new, storage)),
        codes=storage.codes,
        may_change=frozenset(_changing(before, row, changes)) - {f"{name}.weight" for name in after.left_dense},
        tied=after.tied,
    )


def _entries(directory: Path, facts: ModelFacts) -> dict[str, Entry]:
    """Return the tensors of a directory, each of stacked experts on its own, under names that go with the facts'."""
    entries, row = Checkpoint(directory).entries, facts.architecture
    if row is None:
        return entries
    settings, part = (
        language_part.settings_of(facts.config),
        language_part.find(row, facts.config, entries, facts.layers),
    )
    if not part.wrapped:
        return stacked.apart(
            row, settings, {full: entries[name] for name, full in row.full_names(list(entries)).items()}
        )
    own = stacked.apart(row, settings, {name: entries[stored] for name, stored in part.stored.items()})
    language = {part.stored.get(name, part.told(name)): entry for name, entry in own.items()}
    return {name: entries[name] for name in part.carried} | language


def _renumbered(entries: Mapping[str, Entry], row: Architecture, kept: list[int]) -> dict[str, Entry]:
    """Return tensors of a shortened model under the numbers that their blocks had before."""
    prefix = f"{row.blocks}."
    renamed = {}
    for name, entry in entries.items():
        number, _, rest = name.removeprefix(prefix).partition(".")
        inside = name.startswith(prefix) and number.isdigit() and int(number) < len(kept)
        renamed[f"{prefix}{kept[int(number)]}.{rest}" if inside else name] = entry
    return renamed


def _packed(entries: Mapping[str, Entry], storage: Storage) -> set[str]:
    """Return the tensors that packed linears are made of, and scales of inputs and caches."""
    parts = ((name, *storage.split(name)) for name in entries)
    packed = {name for name, layer, kind in parts if kind and storage.packs(layer, entries)}
    zeros = {name for name in entries for kind in storage.zeros if name.endswith(f".{kind}")}
    packed |= {name for name in entries if storage.drops(name)}
    return packed | {name for name in zeros if storage.packs(name.rpartition(".")[0], entries)}


def _changing(facts: ModelFacts, row: Architecture, changes: Changes) -> Iterator[str]:
    """Yield the tensors that may be other numbers afterwards."""
    if changes in ("linears", "folded", "narrowed"):
        yield from (f"{name}.weight" for name in facts.linears)
    if changes == "narrowed":
        yield from (f"{name}.bias" for name in facts.linears)
    if changes == "folded":
        first = next(iter(facts.linears), "")
        blocks = first[: first.find(".0.")] or row.blocks  # a wrapper's have a prefix of its own
        for block in range(facts.layers):
            joint = (row.experts.norm, *row.experts.readers) if row.experts else ()
            for name in filter(None, (*row.previous_ops, *joint)):
                yield from (f"{blocks}.{block}.{name}.{leaf}" for leaf in ("weight", "bias"))
