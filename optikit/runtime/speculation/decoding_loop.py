"""The one decoding loop: draft some tokens, run them all at once, keep what the target agrees with.

    for step in generate(decoder, PromptLookup(), Greedy(), prompt, Request(max_new_tokens=64, eos=frozenset({2}))):
        print(step.tokens, step.accepted, "of", step.drafted)

A step runs the newest token and k draft tokens at the position of the newest, gets k + 1 rows of logits, and keeps
0 … k draft tokens and one token more. The cache then holds rows of rejected tokens; the next step starts before them,
and `Decoder.forward` cuts the cache there. Plain decoding is the same loop with a drafter that has nothing to say.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, cast

import numpy as np

from optikit.errors import StageFailedError, UsageError
from optikit.runtime.decoder import BatchDecoder, Decoder, Logits, Tokens
from optikit.runtime.decoders.checks import check_room
from optikit.runtime.speculation.acceptors import Acceptor
from optikit.runtime.speculation.drafters import EMPTY, Drafter, Features, Hidden
from optikit.runtime.speculation.logits_processors import Processor, Stop

Finish = Literal["eos", "stop", "length"]


class HiddenDecoder(Decoder, Protocol):
    """A decoder that can show what its output head reads."""

    def hidden(self, row: int) -> Hidden:
        """Return the state (hidden,) that a row of the last `forward`'s logits was read from, after the final norm."""
        ...


class FeatureDecoder(Decoder, Protocol):
    """A decoder that can show what some of its blocks are given."""

    def show_features(self, blocks: Sequence[int]) -> None:
        """Show from now on what these blocks are given; the cache is empty afterwards.

        Raises:
            UsageError: There is no such block.
        """
        ...

    def features(self) -> Features:
        """Return (m, blocks · width) of the last `forward`'s m tokens: each block's input, one behind the other."""
        ...


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to write.

    Attributes:
        max_new_tokens: Most tokens to write.
        eos: Tokens that end the text; the one that does is part of it.
        stop: Ends the text where it says so; the token that made it say so is part of the text.
        processors: Applied in order to the logits of every position.
        min_window: 2 never runs a token alone, nor an odd number of them. Some kernels for one token round otherwise
            than those for several, and get the last of an odd number, too; with 2, every text equals the one that this
            loop writes without drafts, token by token.
        seed: Of all draws.
    """

    max_new_tokens: int
    eos: frozenset[int] = frozenset()
    stop: Stop | None = None
    processors: tuple[Processor, ...] = ()
    min_window: Literal[1, 2] = 1
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Step:
    """What one forward of the target brought.

    Attributes:
        tokens: New text, at least one token.
        drafted: Draft tokens that were run.
        accepted: How many of them are part of `tokens`.
        by: The drafter; "prompt" for the run of the prompt, "" where nothing was drafted.
        finish: Why the text ends here, if it does.
    """

    tokens: tuple[int, ...]
    drafted: int
    accepted: int
    by: str
    finish: Finish | None


def generate(
    decoder: Decoder, drafter: Drafter, acceptor: Acceptor, prompt: Tokens, request: Request
) -> Iterator[Step]:
    """Write a text, step by step.

    Args:
        decoder: The target; its cache is used from the beginning.
        drafter: Guesses.
        acceptor: Decides.
        prompt: (n,) token ids, n ≥ 1.
        request: What to write.

    Raises:
        UsageError: No prompt, no tokens wanted, a context that is too short, or a drafter that reads hidden states of a
            decoder that has none to show.
        ValueError: The target's logits aren't numbers.
    """
    check(decoder, drafter, prompt, request)
    row = Row(drafter, acceptor, prompt, request)
    while True:
        window = row.window()
        step = row.take(decoder.forward(window, row.position, row.rows))
        yield step
        if step.finish:
            return
        row.advance(shown(decoder, drafter, step))


def shown(decoder: Decoder, drafter: Drafter, step: Step) -> Hidden | Features | None:
    """Return what a drafter wants to see of the forward that a step took; see `Drafter.extend`."""
    if drafter.reads_features:
        return cast("FeatureDecoder", decoder).features()
    return cast("HiddenDecoder", decoder).hidden(step.accepted) if drafter.reads_hidden else None


class Row:
    """One text while it is written: `window` is to be run at `position`, then `take`, then `advance`, and so on.

    Args:
        drafter: Guesses; it is told of this text alone until the text ends.
        acceptor: Decides.
        prompt: (n,) token ids, n ≥ 1.
        request: What to write.

    Attributes:
        position: Where the window starts; 0 is the prompt's.
        rows: Of how many of its last tokens the logits are wanted.
    """

    __slots__ = (
        "_acceptor",
        "_draft",
        "_length",
        "_prompt",
        "_request",
        "_rng",
        "_text",
        "_written",
        "drafter",
        "position",
        "rows",
    )

    def __init__(self, drafter: Drafter, acceptor: Acceptor, prompt: Tokens, request: Request) -> None:
        self.drafter = drafter
        self._acceptor = acceptor
        self._request = request
        self._rng = np.random.default_rng(request.seed)
        self._prompt = self._length = len(prompt)
        self._text = np.empty(len(prompt) + request.max_new_tokens, np.int64)
        self._text[: len(prompt)] = prompt
        self._written: list[int] = []
        self._draft = EMPTY
        self.position = 0
        self.rows = 1
        drafter.start(prompt)

    def window(self) -> Tokens:
        """Return the tokens (m,) to run at `position`: the newest, or the prompt, and the draft behind it.

        A window is filled up to a multiple of `min_window` with its last token; what that predicts is nobody's
        business. Not only a token alone: kernels that take rows by pairs give the last one of an odd window to the
        kernel for one.
        """
        drafted = len(self._draft.tokens)
        window = self._text[self.position : self._length + drafted]
        missing = -len(window) % self._request.min_window
        self.rows = drafted + 1 + missing
        return np.append(window, np.repeat(window[-1:], missing)) if missing else window

    def take(self, logits: Logits) -> Step:
        """Decide on the draft.

        Args:
            logits: (rows, vocab) of the window.

        Raises:
            StageFailedError: The acceptor keeps more than was drafted, or adds a token that there is none of.
        """
        draft, length = self._draft, self._length
        drafted = self._text[length : length + len(draft.tokens)]
        logits = logits[: len(drafted) + 1]
        if self._request.processors:
            logits = _process(logits, self._text, length, self._request.processors)
        accepted, token = self._acceptor.accept(drafted, draft.probs, logits, self._rng)
        if not (0 <= accepted <= len(drafted) and 0 <= token < logits.shape[1]):
            said = f"kept {accepted} of {len(drafted)} draft tokens and added token {token} of {logits.shape[1]}"
            raise StageFailedError(f"the acceptor {said}", fix="mend it: it keeps a beginning of the draft")
        tokens, finish = _append(self._written, [*drafted[:accepted].tolist(), token], self._request)
        self._length += len(tokens)
        self._text[length : self._length] = tokens
        by = draft.by if length > self._prompt else "prompt"
        return Step(tuple(tokens), len(drafted), min(accepted, len(tokens)), by, finish)

    def advance(self, hidden: Hidden | Features | None) -> None:
        """Tell the drafter of what was taken, and let it draft.

        Args:
            hidden: What it wants to see: the state that predicted the newest token, that of row `accepted` of the
                logits; or what blocks were given for all tokens of the window.
        """
        started = self._prompt if self.position == 0 else self.position + 1
        self.drafter.extend(self._text[started : self._length], hidden)
        self.position = self._length - 1
        left = self._request.max_new_tokens - len(self._written)
        draft = self._draft = self.drafter.draft(left - 1, self._rng) if left > 1 else EMPTY
        self._text[self._length : self._length + len(draft.tokens)] = draft.tokens


def check(decoder: Decoder | BatchDecoder, drafter: Drafter, prompt: Tokens, request: Request) -> None:
    """Refuse what can't be written; see `generate`."""
    if len(prompt) == 0:
        raise UsageError("the prompt is empty", fix="give at least one token")
    if request.max_new_tokens < 1:
        raise UsageError(f"max_new_tokens is {request.max_new_tokens}", fix="ask for at least one token")
    check_room(len(prompt) + request.max_new_tokens, decoder.max_tokens)
    if drafter.reads_hidden and not hasattr(decoder, "hidden"):
        message = f"the drafter reads hidden states, and this {decoder.runtime} decoder doesn't show them"
        raise UsageError(message, fix="use lookup or a draft model, or another runtime")
    if drafter.reads_features and not hasattr(decoder, "features"):
        message = f"the drafter reads what blocks are given, and this {decoder.runtime} decoder doesn't show it"
        raise UsageError(message, fix="write one text at a time with onnxruntime or transformers, or use lookup")


def _process(logits: Logits, text: Tokens, length: int, processors: Iterable[Processor]) -> Logits:
    """Apply processors to every row, each with the text that it follows if all drafts before it are kept."""
    out = np.empty_like(logits)
    for i, row in enumerate(logits):
        changed: Logits = row
        for process in processors:
            changed = process(changed, text[: length + i])
        out[i] = changed
    return out


def _append(written: list[int], tokens: list[int], request: Request) -> tuple[list[int], Finish | None]:
    """Add tokens to the text up to where it ends; return those that were added and why it ends, if it does."""
    for count, token in enumerate(tokens, 1):
        written.append(token)
        finish = _finish(written, request)
        if finish:
            return tokens[:count], finish
    return tokens, None


def _finish(written: list[int], request: Request) -> Finish | None:
    if written[-1] in request.eos:
        return "eos"
    if request.stop is not None and request.stop(written):
        return "stop"
    return "length" if len(written) == request.max_new_tokens else None


@dataclass
class Statistics:
    """What speculation brought, summed over steps; the run of the prompt is not a step of it.

    Attributes:
        steps: Forwards of the target.
        tokens: Tokens that they wrote.
        drafted: Steps that drafted a token at position i, i from 0.
        accepted: Steps that kept it.
        by: Steps, drafted and accepted tokens of each drafter.
    """

    steps: int = 0
    tokens: int = 0
    drafted: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)
    by: dict[str, tuple[int, int, int]] = field(default_factory=dict)

    def add(self, step: Step) -> None:
        """Count a step."""
        if step.by == "prompt":
            return
        self.steps += 1
        self.tokens += len(step.tokens)
        for counts, upto in ((self.drafted, step.drafted), (self.accepted, step.accepted)):
            counts.extend([0] * (step.drafted - len(counts)))
            for position in range(upto):
                counts[position] += 1
        if step.by:
            steps, drafted, accepted = self.by.get(step.by, (0, 0, 0))
            self.by[step.by] = (steps + 1, drafted + step.drafted, accepted + step.accepted)

    @property
    def acceptance_length(self) -> float:
        """Tokens per forward of the target, 1 + accepted / steps; 1 where there were no steps.

        A text may end inside a window: its last token then is a draft's, and the target's own token isn't written.
        """
        return 1 + sum(self.accepted) / self.steps if self.steps else 1.0

    @property
    def acceptance_by_position(self) -> tuple[float, ...]:
        """Share of all steps that kept the draft token at position i: vLLM's per-position acceptance rate."""
        return tuple(count / self.steps for count in self.accepted)
