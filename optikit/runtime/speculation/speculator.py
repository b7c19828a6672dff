"""`speculator/`: what a `speculate` stage left, how it was tuned here, and a decoder that uses both.

    speculator.json      written by the stage: the method and its parameters
    heads.safetensors    beside it: Medusa heads
    eagle3/              beside it: an EAGLE-3 drafter in the layout of speculators
    draft/               beside it: a draft model as a Hugging Face directory; draft/onnxruntime is what runs here
    tuning.json          written where the compiled model was measured: what pays on this machine, or that nothing does
    ngrams.safetensors   beside it: a datastore of the model's own texts, where drafting from it pays

A `SpeculatingDecoder` is a `Decoder` like any other: its greedy texts are those of the decoder in it, sooner.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, cast, get_args

from optikit.errors import InputMissingError, IntegrityError, UsageError
from optikit.runtime.decoder import Decoder, Logits, SinglePath, Tokens
from optikit.runtime.speculation import fingerprint, ngram_table
from optikit.runtime.speculation.acceptors import Greedy
from optikit.runtime.speculation.decoding_loop import Request, Statistics, generate
from optikit.runtime.speculation.drafters import (
    CachedDrafter,
    CachedDrafts,
    Drafter,
    DraftModel,
    Eagle,
    FirstOf,
    Medusa,
    NoDraft,
    PromptLookup,
)
from optikit.runtime.speculation.ngram_table import NGramDatastore, NGramDrafter

if TYPE_CHECKING:
    from optikit.runtime.speculation.decoding_loop import FeatureDecoder
    from optikit.runtime.speculation.eagle_session import EagleSession
    from optikit.runtime.speculation.medusa_session import HeadSession

Method = Literal["lookup", "medusa", "eagle3", "draft", "off"]
SPECULATOR = "speculator.json"
TUNING = "tuning.json"
DATASTORE = "ngrams.safetensors"
FORMER = {TUNING: "choice.json", DATASTORE: "recall.safetensors"}
"""What older outputs call the same files."""
DRAFT = "draft"
COMPILED_DRAFT = "draft/onnxruntime"
MOST_DRAFTED = 31
"""Tokens that a lookup drafts at most."""
AHEAD = 8
"""Tokens that a draft model is asked for at most."""


@dataclass(frozen=True, kw_only=True)
class Speculator:
    """How to speculate.

    Attributes:
        method: `lookup`; `medusa`, `eagle3` and `draft` ask heads, a layer or a draft model where nothing could be
            looked up; `off` where nothing pays.
        lengths: Of a lookup: tokens that matched → tokens to draft.
        gate: How sure a chain of the n-gram datastore has to be.
        ahead: Tokens that heads or the draft model draft at most; 0 doesn't ask them.
        ahead_gate: How sure they have to be of a chain.
        min_window: As in `decoding_loop.Request`.
        acceptor: What decides on drafts, as the recipe says: see `acceptors.kept`.
        single: What runs a token alone: see `decoder.SinglePath`.
        datastore: N-grams of the model's own texts to draft from; None for none.
        heads: Medusa heads.
        eagle: EAGLE-3 drafter; nothing else may use its cache.
        draft: Draft model; nothing else may use its cache.
        draft_directory: Where it was read from, tokenizer and all.
    """

    method: Method
    lengths: Mapping[int, int] = field(default_factory=dict)
    gate: float = 0.4
    ahead: int = 0
    ahead_gate: float = 0.4
    min_window: Literal[1, 2] = 1
    acceptor: str = "greedy"
    single: SinglePath = "own"
    datastore: NGramDatastore | None = field(default=None, compare=False, repr=False)
    heads: HeadSession | None = field(default=None, compare=False, repr=False)
    eagle: EagleSession | None = field(default=None, compare=False, repr=False)
    draft: Decoder | None = field(default=None, compare=False, repr=False)
    draft_directory: Path | None = field(default=None, compare=False, repr=False)

    def as_json(self) -> dict[str, Any]:
        """Return what `read` reads, but for the datastore; JSON's keys are text."""
        lengths = {str(n): k for n, k in self.lengths.items()}
        found: dict[str, Any] = {
            "method": self.method,
            "lengths": lengths,
            "gate": self.gate,
            "min_window": self.min_window,
        }
        found |= {"acceptor": self.acceptor, "single": self.single}
        return found | ({"ahead": self.ahead, "ahead_gate": self.ahead_gate} if self.method in MODELS else {})

    def drafting(self, tokens: int) -> Speculator:
        """Return the same speculator, drafting so many tokens at once.

        Raises:
            UsageError: It drafts nothing, or can't draft so many.
        """
        if not self.drafts:
            raise UsageError("there is no speculator that drafts", fix="leave out --draft-tokens")
        if not 1 <= tokens <= MOST_DRAFTED or (self.ahead and tokens > AHEAD):
            most = AHEAD if self.ahead else MOST_DRAFTED
            raise UsageError(f"{tokens} draft tokens can't be had at once", fix=f"use 1 to {most}")
        lengths = dict.fromkeys(self.lengths, tokens)
        return replace(self, lengths=lengths, ahead=tokens if self.ahead else 0)

    def drafter(self, cached: CachedDrafts | None = None) -> Drafter:
        """Return a new drafter: prompt lookup, the n-gram datastore, heads or a draft model, lookup of one token.

        Args:
            cached: Drafts of a known text, used in the place of the model.
        """
        if self.method == "off":
            return NoDraft()
        longer = {n: k for n, k in self.lengths.items() if n > 1}
        single = {n: k for n, k in self.lengths.items() if n == 1}
        between = list(self._between(cached))
        if longer and single and not between:  # one table does the work of two
            return PromptLookup(self.lengths)
        parts = [*_lookups(longer), *between, *_lookups(single)]
        return FirstOf(parts) if len(parts) > 1 else parts[0] if parts else NoDraft()

    def _between(self, cached: CachedDrafts | None) -> Iterator[Drafter]:
        """Yield what is asked after lookup of several tokens, and before lookup of one."""
        if self.datastore is not None:
            yield NGramDrafter(self.datastore, gate=self.gate)
        model = self._model(cached)
        if model is not None:
            yield model

    def drafters(self, count: int) -> list[Drafter]:
        """Return new drafters for texts that are written at once; a draft model gets a cache for each.

        Raises:
            UsageError: The drafter can't be given another cache.
        """
        speculators = [self]
        if self.eagle is not None and count > 1:
            message = "an EAGLE-3 drafter writes ahead of one text at a time"
            raise UsageError(message, fix="write one text at a time")
        if self.draft is not None and count > 1:
            another = getattr(self.draft, "sibling", None)
            if another is None:
                message = f"this {self.draft.runtime} draft model writes ahead of one text at a time"
                raise UsageError(message, fix="write one text at a time, or use an onnxruntime draft")
            speculators += [replace(self, draft=another()) for _ in range(count - 1)]
        return [(speculators[i] if i < len(speculators) else self).drafter() for i in range(count)]

    def _model(self, cached: CachedDrafts | None) -> Drafter | None:
        """Return the drafter that has weights."""
        if self.ahead == 0:
            return None
        if cached is not None:
            return CachedDrafter(cached, name=self.method, length=self.ahead, gate=self.ahead_gate)
        if self.heads is not None:
            return Medusa(self.heads, length=self.ahead, gate=self.ahead_gate)
        if self.eagle is not None:
            return Eagle(self.eagle, length=self.ahead, gate=self.ahead_gate)
        if self.draft is not None:
            return DraftModel(self.draft, vocab=self.draft.vocab, length=self.ahead, gate=self.ahead_gate)
        return None

    @property
    def drafts(self) -> bool:
        """Whether it ever drafts."""
        return self.method != "off" and bool(self.lengths or self.datastore is not None or self.ahead)


def _lookups(lengths: Mapping[int, int]) -> list[Drafter]:
    return [PromptLookup(lengths)] if lengths else []


MODELS = ("medusa", "eagle3", "draft")
"""Methods that bring weights."""


def from_json(value: Mapping[str, Any], where: Path) -> Speculator:
    """Return a speculator from its JSON; keys that say other things are left alone.

    Raises:
        IntegrityError: It isn't one.
    """
    try:
        lengths = {int(n): int(k) for n, k in value["lengths"].items()}
        found = Speculator(
            method=value["method"],
            lengths=lengths,
            gate=float(value["gate"]),
            ahead=int(value.get("ahead", 0)),
            ahead_gate=float(value.get("ahead_gate", 0.4)),
            min_window=value["min_window"],
            acceptor=str(value.get("acceptor", "greedy")),
            single=value.get("single", "own"),
        )
        _require_known(found)
    except (KeyError, ValueError, TypeError, AttributeError, UsageError) as error:
        message = f"{where} isn't a speculator: {type(error).__name__}: {error}"
        raise IntegrityError(message, fix="run the recipe again") from error
    return found


def _require_known(speculator: Speculator) -> None:
    if speculator.method not in get_args(Method):
        raise ValueError(f"method {speculator.method!r}")
    if speculator.lengths:
        PromptLookup(speculator.lengths)
    if not 0 < speculator.gate <= 1:
        raise ValueError(f"gate {speculator.gate!r}")
    if not (0 <= speculator.ahead <= AHEAD and 0 <= speculator.ahead_gate <= 1):
        raise ValueError(f"ahead {speculator.ahead!r}, ahead_gate {speculator.ahead_gate!r}")
    if speculator.min_window not in (1, 2):
        raise ValueError(f"min_window {speculator.min_window!r}")
    if speculator.single not in get_args(SinglePath):
        raise ValueError(f"single {speculator.single!r}")


def read(directory: Path) -> Speculator:
    """Read a speculator directory: as tuned where the model was measured, else as the stage wrote it.

    Raises:
        InputMissingError: There is neither.
        IntegrityError: A file is damaged.
    """
    for path in (_present(directory, TUNING), directory / SPECULATOR):
        if path.is_file():
            try:
                value = json.loads(path.read_text(encoding="utf-8"))
            except ValueError as error:
                raise IntegrityError(f"{path} is not JSON: {error}", fix="run the recipe again") from error
            stored = _present(directory, DATASTORE)
            datastore = ngram_table.load(stored) if stored.is_file() else None
            return _with_weights(replace(from_json(value, path), datastore=datastore), directory)
    raise InputMissingError(f"{directory} has no {SPECULATOR}", fix="give the speculator directory of a run")


def _present(directory: Path, name: str) -> Path:
    """Return a file of the directory, under its former name where only that is there."""
    former = directory / FORMER[name]
    return former if former.is_file() and not (directory / name).is_file() else directory / name


def _with_weights(speculator: Speculator, directory: Path) -> Speculator:
    """Return a speculator with the heads or the draft that it asks."""
    if speculator.ahead == 0:
        return speculator
    if speculator.method == "medusa":
        from optikit.runtime.speculation.medusa_session import HEADS, HeadSession

        return replace(speculator, heads=HeadSession(directory / HEADS))
    if speculator.method == "eagle3":
        from optikit.runtime.speculation.eagle_session import DIRECTORY, EagleSession

        return replace(speculator, eagle=EagleSession(directory / DIRECTORY))
    from optikit.runtime.decoders.onnxruntime import OnnxDecoder

    # One thread that sleeps: the model's own threads spin for their next step, and a second pool would fight them.
    draft = OnnxDecoder(directory / COMPILED_DRAFT, threads=1, spinning=False)
    return replace(speculator, draft=draft, draft_directory=directory / DRAFT)


def write_tuning(speculator: Speculator, directory: Path, about: Mapping[str, Any]) -> tuple[str, ...]:
    """Write how it was tuned, and further facts; return the names of the files."""
    (directory / TUNING).write_text(json.dumps(speculator.as_json() | dict(about), indent=1), encoding="utf-8")
    if speculator.datastore is None or speculator.method == "off":
        return (TUNING,)
    ngram_table.save(speculator.datastore, directory / DATASTORE)
    return (TUNING, DATASTORE)


class SpeculatingDecoder:
    """A decoder whose `greedy` speculates; see `decoder.Decoder`.

    Attributes:
        target: The decoder that it checks drafts with.
        speculator: What drafts.
        statistics: Of all texts so far.
    """

    def __init__(self, decoder: Decoder, speculator: Speculator) -> None:
        run_single(decoder, speculator.single)
        self.target = decoder
        self.speculator = speculator
        self._drafter = speculator.drafter()
        self._min_window = speculator.min_window
        self.statistics = Statistics()
        self.runtime = decoder.runtime
        self.dtype = decoder.dtype
        self.threads = decoder.threads
        self.vocab = decoder.vocab
        self.max_tokens = decoder.max_tokens

    def forward(self, tokens: Tokens, position: int, rows: int | None = None) -> Logits:
        """Run `tokens` (m,) at `position`; see `decoder.Decoder.forward`."""
        return self.target.forward(tokens, position, rows)

    def greedy(self, prompt: Tokens, new_tokens: int) -> Iterator[int]:
        """Yield `new_tokens` greedy tokens after `prompt`; see `decoder.Decoder.greedy`."""
        request = Request(max_new_tokens=new_tokens, min_window=self._min_window)
        for step in generate(self.target, self._drafter, Greedy(), prompt, request):
            self.statistics.add(step)
            yield from step.tokens


def run_single(decoder: Decoder, path: SinglePath) -> None:
    """Choose what runs a token alone, where a decoder has that choice; elsewhere there is one path."""
    if getattr(decoder, "verifies_apart", False):
        cast("ChoosingDecoder", decoder).single(path)


class ChoosingDecoder(Decoder, Protocol):
    """A decoder with a path of its own for several tokens at once."""

    def single(self, path: SinglePath) -> None:
        """Choose what runs a token alone."""
        ...


def require_fit(decoder: Decoder, speculator: Speculator, model: Path | None = None) -> None:
    """Refuse heads or a draft that were made for another model; have the target show what they read.

    Args:
        decoder: The target.
        speculator: With its weights.
        model: Directory of the target's weights and tokenizer, where there is one.

    Raises:
        UsageError: They have another width or vocabulary, were trained for other weights, or tokenize otherwise.
    """
    if speculator.heads is not None:
        width = getattr(decoder, "width", None)
        if width is None:
            message = f"the heads read hidden states, and this {decoder.runtime} decoder doesn't show them"
            raise UsageError(message, fix="use lookup or a draft model, or another runtime")
        speculator.heads.require(width=width, vocab=decoder.vocab)
        if model is not None:
            fingerprint.require_same_weights(speculator.heads.base, model)
    if speculator.eagle is not None:
        _fit_eagle(decoder, speculator.eagle, model)
    if speculator.draft is not None:
        DraftModel(speculator.draft, vocab=decoder.vocab)
        if model is not None and speculator.draft_directory is not None:
            fingerprint.require_same_tokenizer(speculator.draft_directory, model)


def _fit_eagle(decoder: Decoder, eagle: EagleSession, model: Path | None) -> None:
    if not hasattr(decoder, "show_features"):
        message = f"the drafter reads what blocks are given, and this {decoder.runtime} decoder doesn't show it"
        raise UsageError(message, fix="use lookup or a draft model, or another runtime")
    shown = cast("FeatureDecoder", decoder)
    eagle.require(width=getattr(decoder, "width", 0), vocab=decoder.vocab)
    if model is not None:
        fingerprint.require_same_weights(eagle.base, model)
    shown.show_features(eagle.layers)


def speculating(decoder: Decoder, speculator: Speculator, model: Path | None = None) -> Decoder:
    """Return the decoder as it should be used: plain where speculation is off; see `require_fit`.

    Raises:
        UsageError: The speculator was made for another model.
    """
    require_fit(decoder, speculator, model)
    return decoder if speculator.method == "off" else SpeculatingDecoder(decoder, speculator)
