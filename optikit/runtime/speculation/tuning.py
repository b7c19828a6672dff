"""Tuning of a speculator: which drafter, how many tokens, or none, by measured costs and by replayed acceptance.

Speculation pays where (tokens per step) × T(1) exceeds T(m) plus the time to draft, T(m) being the time of a forward of
m tokens. T is measured: kernels jump where one expects them flat. Acceptance is replayed on texts that the model wrote
itself: greedy speculation writes the same text whatever is drafted, so the steps that a drafter would have taken follow
from the text alone, without running the model again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, cast

import numpy as np
from numpy.typing import NDArray

from optikit.runtime.decoder import Decoder, Tokens
from optikit.runtime.speculation import ngram_table
from optikit.runtime.speculation.cost_model import FREE, DraftCosts, WindowCosts
from optikit.runtime.speculation.decoding_loop import FeatureDecoder, HiddenDecoder, Statistics, Step
from optikit.runtime.speculation.drafters import EMPTY, CachedDrafts, Drafter, Hidden, confidence
from optikit.runtime.speculation.speculator import AHEAD, Speculator

if TYPE_CHECKING:
    from optikit.runtime.speculation.eagle_session import EagleSession

WORTHWHILE = 1.03
"""Predicted speed-up below which speculation stays off: what is gained has to exceed what measuring can tell."""


@dataclass(frozen=True)
class Written:
    """A text that the target wrote greedily.

    Attributes:
        prompt: (n,).
        text: (m,), m ≥ 1: what it wrote.
        hidden: (m, hidden): the states that predicted each token; None where no drafter needs them.
        cached_drafts: What heads or a draft model guess at every place of it; None where there are none.
    """

    prompt: Tokens
    text: Tokens
    hidden: Hidden | None = None
    cached_drafts: CachedDrafts | None = None


def cache_drafts(speculator: Speculator, decoder: Decoder, written: Written) -> Written:
    """Return a text with what the speculator's heads, layer or draft model guess at every place of it.

    Args:
        speculator: With the weights that it asks, or without any.
        decoder: The target, whose states heads and layers read.
        written: The text.
    """
    if speculator.heads is not None:
        states = _states(decoder, written)
        guesses = [speculator.heads(*each) for each in zip(states, written.text.tolist(), strict=True)]
    elif speculator.eagle is not None:
        guesses = list(_ahead(speculator.eagle, decoder, written, AHEAD))
    elif speculator.draft is not None:
        guesses = list(_continued(speculator.draft, written, AHEAD))
    else:
        return written
    tokens, sure = (np.stack(each) for each in zip(*guesses, strict=True))
    return replace(written, cached_drafts=CachedDrafts(tokens, sure))


def _states(decoder: Decoder, written: Written) -> Hidden:
    """Return the states (m, hidden) that predicted each token of a text."""
    whole = np.concatenate([written.prompt, written.text])[:-1]
    decoder.forward(whole, 0, len(written.text))
    shown = cast("HiddenDecoder", decoder)
    return np.stack([shown.hidden(row) for row in range(len(written.text))])


def _ahead(
    eagle: EagleSession, decoder: Decoder, written: Written, length: int
) -> Iterator[tuple[Tokens, NDArray[np.float32]]]:
    """Yield, behind each token of a text, what an EAGLE-3 drafter goes on with, and how sure it is of each token."""
    whole = np.concatenate([written.prompt, written.text])
    decoder.forward(whole[:-1], 0, 1)
    features, known = cast("FeatureDecoder", decoder).features(), 0
    eagle.begin()
    for i in range(len(written.text)):
        tokens, sure = np.zeros(length, np.int64), np.zeros(length, np.float32)
        rows = slice(known, len(written.prompt) + i)
        if rows.stop + length <= eagle.max_tokens:
            tokens[0], sure[0] = eagle.read(whole[1:][rows], features[rows])
            for step in range(1, length):
                tokens[step], sure[step] = eagle.ahead(int(tokens[step - 1]))
            known = rows.stop
        yield tokens, sure


def _continued(draft: Decoder, written: Written, length: int) -> Iterator[tuple[Tokens, Hidden]]:
    """Yield, behind each token of a text, what a draft model goes on with, and how sure it is of each token."""
    text, known = written.text, written.prompt
    cached = 0
    for i in range(len(text)):
        known = np.append(known, text[i])
        tokens, sure = np.zeros(length, np.int64), np.zeros(length, np.float32)
        if len(known) + length <= draft.max_tokens:
            row = draft.forward(known[cached:], cached, 1)[-1]
            for step in range(length):
                tokens[step], sure[step] = int(row.argmax()), confidence(row)
                if step < length - 1:
                    row = draft.forward(tokens[step : step + 1], len(known) + step, 1)[-1]
            cached = len(known)
        yield tokens, sure


def replay(drafter: Drafter, written: Written) -> list[Step]:
    """Return the steps that greedy speculation takes to write a known text; its prompt's run isn't among them."""
    text, rng = written.text, np.random.default_rng(0)
    drafter.start(written.prompt)
    steps, known, new = [], 0, 1
    while known + new < len(text):
        known += new
        hidden = None if written.hidden is None else written.hidden[known - 1]
        drafter.extend(text[known - new : known], hidden)
        left = len(text) - known
        draft = drafter.draft(left - 1, rng) if left > 1 else EMPTY
        wrong = np.flatnonzero(draft.tokens != text[known : known + len(draft.tokens)])
        accepted = int(wrong[0]) if len(wrong) else len(draft.tokens)
        new = accepted + 1
        tokens = tuple(text[known : known + new].tolist())
        steps.append(
            Step(tokens, len(draft.tokens), accepted, draft.by, "length" if known + new == len(text) else None)
        )
    return steps


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What a drafter is expected to bring on given texts.

    Attributes:
        ms_per_token: With it.
        plain_ms_per_token: Without.
        statistics: Its steps.
    """

    ms_per_token: float
    plain_ms_per_token: float
    statistics: Statistics

    @property
    def speedup(self) -> float:
        """Plain time over speculated time; 1 where there was nothing to speculate on."""
        return self.plain_ms_per_token / self.ms_per_token if self.ms_per_token else 1.0


def predict(
    steps: Iterable[Step], costs: WindowCosts, *, drafting: DraftCosts = FREE, min_window: int = 1
) -> Prediction:
    """Price steps: Σ T(window) + drafting, against T(1) for each token.

    Args:
        steps: Of `replay` or `generate`.
        costs: T(m).
        drafting: What asking for drafts costs.
        min_window: Windows are filled up to multiples of it, as in `Request`.
    """
    found = Statistics()
    total = 0.0
    for step in steps:
        found.add(step)
        if step.by != "prompt":
            window = -(-(step.drafted + 1) // min_window) * min_window
            total += costs.at(window) + drafting.of(step)
    tokens = max(1, found.tokens)
    plain = costs.at(1) if found.tokens else 0.0
    return Prediction(ms_per_token=total / tokens, plain_ms_per_token=plain, statistics=found)


MATCHES = (1, 2, 3, 4, 5)
"""Lengths of match that tuning considers."""
DRAFTS = (0, 1, 2, 3, 4, 5, 6, 8, 10, 12, 16)
"""Draft lengths that it tries after a match of a given length; 0 leaves such matches alone."""
GATES = (0.2, 0.3, 0.4, 0.5, 0.6)
AHEAD_LENGTHS = (0, 1, 2, 3, 4, 5, 6, 8)
AHEAD_GATES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)


def price(
    speculator: Speculator, texts: Sequence[Written], costs: WindowCosts, drafting: DraftCosts = FREE
) -> Prediction:
    """Predict what a speculator brings on texts that the model wrote."""
    steps = (step for each in texts for step in replay(speculator.drafter(each.cached_drafts), each))
    asked = drafting if speculator.ahead else FREE
    return predict(steps, costs, drafting=asked, min_window=speculator.min_window)


def tune(
    given: Speculator,
    texts: Sequence[Written],
    costs: WindowCosts,
    *,
    drafting: DraftCosts = FREE,
    matches: Sequence[int] = MATCHES,
    drafts: Sequence[int] = DRAFTS,
) -> Speculator:
    """Return the speculator with the best predicted speed: coordinate descent over its lengths and its gates.

    Args:
        given: Where the descent begins; its datastore, if it has one, stays; the texts may not be part of it.
        texts: What the model wrote for prompts of the kind that it will get.
        costs: T(m).
        drafting: What asking heads or a draft model costs.
        matches: Lengths of match to consider, beside those given.
        drafts: Lengths of draft to try after each.

    Returns:
        A speculator that never drafts where nothing is faster than plain decoding.
    """

    def cost(speculator: Speculator) -> float:
        return price(speculator, texts, costs, drafting).ms_per_token

    moves = _moves(given, texts, sorted({*matches, *given.lengths}, reverse=True), drafts)
    best, least = given, cost(given)
    improved = True
    while improved:
        improved = False
        for move in moves:
            trial = move(best)
            found = least if trial == best else cost(trial)
            if found < least * (1 - 1e-6):
                best, least, improved = trial, found, True
    return best if least < costs.at(1) * (1 - 1e-6) else replace(best, lengths={}, datastore=None, ahead=0)


def _moves(
    given: Speculator, texts: Sequence[Written], matches: Sequence[int], drafts: Sequence[int]
) -> list[Callable[[Speculator], Speculator]]:
    """Return what the descent tries in turn: each changes one length or one gate."""
    moves: list[Callable[[Speculator], Speculator]] = [partial(_drafting, n=n, k=k) for n in matches for k in drafts]
    moves += [partial(_gated, gate=gate) for gate in GATES if given.datastore is not None]
    if given.ahead:
        most = max((each.cached_drafts.tokens.shape[1] for each in texts if each.cached_drafts), default=given.ahead)
        moves += [partial(_looking, ahead=k) for k in AHEAD_LENGTHS if k <= most]
        moves += [partial(_sure, gate=gate) for gate in AHEAD_GATES]
    return moves


def _drafting(speculator: Speculator, *, n: int, k: int) -> Speculator:
    """Return the speculator with drafts of k tokens after matches of n."""
    lengths = {**speculator.lengths, n: k}
    return replace(speculator, lengths={match: length for match, length in lengths.items() if length})


def _gated(speculator: Speculator, *, gate: float) -> Speculator:
    """Return the speculator with another gate."""
    return replace(speculator, gate=gate)


def _looking(speculator: Speculator, *, ahead: int) -> Speculator:
    """Return the speculator with drafts of so many tokens from its heads or its draft model."""
    return replace(speculator, ahead=ahead)


def _sure(speculator: Speculator, *, gate: float) -> Speculator:
    """Return the speculator with another gate for its heads or its draft model."""
    return replace(speculator, ahead_gate=gate)


def tune_with_datastore(
    given: Speculator,
    remembered: Sequence[Written],
    texts: Sequence[Written],
    costs: WindowCosts,
    drafting: DraftCosts = FREE,
) -> Speculator:
    """Tune with a datastore of remembered texts and without one, and return the faster; it then holds all texts.

    Args:
        given: Where tuning begins.
        remembered: Texts for the datastore alone; where there are fewer than `texts`, half of those go there, too,
            and the others tune.
        texts: To tune with.
        costs: T(m).
        drafting: What asking heads or a draft model costs.
    """
    few = len(remembered) < len(texts)
    stored, tuning = ([*remembered, *texts[::2]], texts[1::2]) if few else (remembered, texts)
    plain = tune(given, tuning, costs, drafting=drafting)
    datastore = ngram_table.build([(each.prompt, each.text) for each in stored])
    with_datastore = tune(replace(given, datastore=datastore), tuning, costs, drafting=drafting)
    prices = [price(one, tuning, costs, drafting) for one in (plain, with_datastore)]
    if with_datastore.datastore is None or prices[0].ms_per_token <= prices[1].ms_per_token:
        return plain
    everything = [(each.prompt, each.text) for each in (*remembered, *texts)]
    return replace(with_datastore, datastore=ngram_table.build(everything))


def tokens_per_step(acceptance: Sequence[float]) -> float:
    """Return the expected tokens of a speculation step from conditional acceptance by position (Leviathan 2023, eq. 1).

    >>> tokens_per_step([0.5, 0.5])
    1.75
    >>> tokens_per_step([])
    1.0
    """
    expected, path = 1.0, 1.0
    for probability in acceptance:
        path *= probability
        expected += path
    return expected


def speculation_speedup(acceptance: Sequence[float], *, draft_cost: float, verify_cost: float) -> float:
    """Return the speed-up of speculation (Leviathan et al., arXiv:2211.17192, theorem 3.8), verification priced.

    Args:
        acceptance: Probability that the i-th draft token is accepted, given that those before it were.
        draft_cost: Time of drafting one token, over that of one decoding step.
        verify_cost: Time of a forward of len(acceptance) + 1 tokens, over that of one decoding step.

    >>> round(speculation_speedup([0.8] * 4, draft_cost=0.14, verify_cost=1.12), 2)
    2.0
    """
    return tokens_per_step(acceptance) / (len(acceptance) * draft_cost + verify_cost)
