"""`speculator/`: what a `speculate` stage left, what was chosen of it here, and a decoder that uses both.

    speculator.json      written by the stage: the method and its parameters
    choice.json          written where the compiled model was measured: what pays on this machine, or that nothing does
    recall.safetensors   beside it: n-grams of the model's own texts, where recalling them pays

A `SpeculatingDecoder` is a `Decoder` like any other: its greedy texts are those of the decoder in it, sooner.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from optikit.errors import InputMissingError, IntegrityError, UsageError
from optikit.runtime import recall
from optikit.runtime.acceptors import Greedy
from optikit.runtime.drafters import Drafter, FirstOf, PromptLookup, Silent
from optikit.runtime.protocol import Decoder, Logits, Tokens
from optikit.runtime.recall import NGrams, Recall
from optikit.runtime.speculate import Request, Statistics, generate

SPECULATOR = "speculator.json"
CHOICE = "choice.json"
RECALL = "recall.safetensors"


@dataclass(frozen=True, kw_only=True)
class Speculator:
    """How to speculate.

    Attributes:
        method: `lookup`; `off` where nothing pays.
        lengths: Of a lookup: tokens that matched → tokens to draft.
        gate: Of recalling: how sure a chain of guesses has to be.
        min_window: As in `speculate.Request`.
        table: N-grams to recall; None for none.
    """

    method: Literal["lookup", "off"]
    lengths: Mapping[int, int] = field(default_factory=dict)
    gate: float = 0.4
    min_window: Literal[1, 2] = 1
    table: NGrams | None = field(default=None, compare=False, repr=False)

    def as_json(self) -> dict[str, Any]:
        """Return what `read` reads, but for the table; JSON's keys are text."""
        lengths = {str(n): k for n, k in self.lengths.items()}
        return {"method": self.method, "lengths": lengths, "gate": self.gate, "min_window": self.min_window}

    def drafter(self) -> Drafter:
        """Return a new drafter: the text's own repetitions first, then habits, then single tokens that came before."""
        if self.method == "off" or not (self.lengths or self.table):
            return Silent()
        if self.table is None:
            return PromptLookup(self.lengths)
        longer = {n: k for n, k in self.lengths.items() if n > 1}
        single = {n: k for n, k in self.lengths.items() if n == 1}
        lookups = [PromptLookup(lengths) for lengths in (longer, single) if lengths]
        return FirstOf([*lookups[: bool(longer)], Recall(self.table, gate=self.gate), *lookups[bool(longer) :]])


def from_json(value: Mapping[str, Any], where: Path) -> Speculator:
    """Return a speculator from its JSON; keys that say other things are left alone.

    Raises:
        IntegrityError: It isn't one.
    """
    try:
        lengths = {int(n): int(k) for n, k in value["lengths"].items()}
        found = Speculator(
            method=value["method"], lengths=lengths, gate=float(value["gate"]), min_window=value["min_window"]
        )
        _require_known(found)
    except (KeyError, ValueError, TypeError, AttributeError, UsageError) as error:
        message = f"{where} isn't a speculator: {type(error).__name__}: {error}"
        raise IntegrityError(message, fix="run the recipe again") from error
    return found


def _require_known(speculator: Speculator) -> None:
    if speculator.method not in ("lookup", "off"):
        raise ValueError(f"method {speculator.method!r}")
    if speculator.lengths:
        PromptLookup(speculator.lengths)
    if not 0 < speculator.gate <= 1:
        raise ValueError(f"gate {speculator.gate!r}")
    if speculator.min_window not in (1, 2):
        raise ValueError(f"min_window {speculator.min_window!r}")


def read(directory: Path) -> Speculator:
    """Read a speculator directory: what was chosen where the model was measured, else what the stage wrote.

    Raises:
        InputMissingError: There is neither.
        IntegrityError: A file is damaged.
    """
    for name in (CHOICE, SPECULATOR):
        path = directory / name
        if path.is_file():
            try:
                value = json.loads(path.read_text(encoding="utf-8"))
            except ValueError as error:
                raise IntegrityError(f"{path} is not JSON: {error}", fix="run the recipe again") from error
            table = recall.load(directory / RECALL) if (directory / RECALL).is_file() else None
            return replace(from_json(value, path), table=table)
    raise InputMissingError(f"{directory} has no {SPECULATOR}", fix="give the speculator directory of a run")


def write_choice(speculator: Speculator, directory: Path, about: Mapping[str, Any]) -> tuple[str, ...]:
    """Write what was chosen, with what else there is to say of it; return the names of the files."""
    (directory / CHOICE).write_text(json.dumps(speculator.as_json() | dict(about), indent=1), encoding="utf-8")
    if speculator.table is None or speculator.method == "off":
        return (CHOICE,)
    recall.save(speculator.table, directory / RECALL)
    return (CHOICE, RECALL)


class SpeculatingDecoder:
    """A decoder whose `greedy` speculates; see `protocol.Decoder`.

    Attributes:
        statistics: Of all texts so far.
    """

    def __init__(self, decoder: Decoder, speculator: Speculator) -> None:
        self._decoder = decoder
        self._drafter = speculator.drafter()
        self._min_window = speculator.min_window
        self.statistics = Statistics()
        self.runtime = decoder.runtime
        self.dtype = decoder.dtype
        self.threads = decoder.threads
        self.vocab = decoder.vocab
        self.max_tokens = decoder.max_tokens

    def forward(self, tokens: Tokens, position: int, rows: int | None = None) -> Logits:
        """Run `tokens` (m,) at `position`; see `protocol.Decoder.forward`."""
        return self._decoder.forward(tokens, position, rows)

    def greedy(self, prompt: Tokens, new_tokens: int) -> Iterator[int]:
        """Yield `new_tokens` greedy tokens after `prompt`; see `protocol.Decoder.greedy`."""
        request = Request(max_new_tokens=new_tokens, min_window=self._min_window)
        for step in generate(self._decoder, self._drafter, Greedy(), prompt, request):
            self.statistics.add(step)
            yield from step.tokens


def speculating(decoder: Decoder, speculator: Speculator) -> Decoder:
    """Return the decoder as it should be used: plain where speculation is off."""
    return decoder if speculator.method == "off" else SpeculatingDecoder(decoder, speculator)
