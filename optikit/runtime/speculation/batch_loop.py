"""The decoding loop for several texts at once: each as if it were alone, all of them in one forward.

    decoder = runtime.load(directory)
    for number, step in write(decoder, prompts, [Request(max_new_tokens=64) for _ in prompts], batch=8):
        texts[number] += step.tokens

Texts share nothing but the forward: each has its own length, draft, seed, end and cache, and is what `generate` writes
with its prompt and request, whatever else is in the batch. A text that ends makes room for the next prompt at once.
Weights are read once for all windows of a step; that, and nothing else, is what a batch saves.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple, Protocol, cast

from optikit.errors import UsageError
from optikit.runtime.decoder import BatchDecoder, Decoder, Tokens, Window
from optikit.runtime.speculation.acceptors import Acceptor, Greedy
from optikit.runtime.speculation.decoding_loop import Request, Row, Statistics, Step, check, generate
from optikit.runtime.speculation.drafters import Drafter, Features, Hidden
from optikit.runtime.speculation.speculator import SpeculatingDecoder, Speculator


class HiddenBatchDecoder(BatchDecoder, Protocol):
    """A batch decoder that can show what its output head reads."""

    def hidden(self, window: int, row: int) -> Hidden:
        """Return the state (hidden,) that a row of a window's logits in the last `forward` was read from."""
        ...

    def features(self, window: int) -> Features:
        """Return what shown blocks were given for the tokens of a window; see `decoding_loop.FeatureDecoder`."""
        ...


class _Running(NamedTuple):
    """A text at its place: the number of its prompt, and how far it is."""

    number: int
    row: Row


def write(
    decoder: Decoder,
    prompts: Sequence[Tokens],
    requests: Sequence[Request],
    *,
    batch: int = 1,
    acceptor: Acceptor | None = None,
) -> Iterator[tuple[int, Step]]:
    """Write texts with a loaded decoder, and with the speculator that was loaded with it, if one was.

    Args:
        decoder: What `runtime.load` returned.
        prompts: (n,) token ids each, n ≥ 1.
        requests: What to write after each prompt.
        batch: Texts at once; 1 writes them one after the other.
        acceptor: Decides; None is greedy.

    Yields:
        The number of a prompt, and a step of its text.

    Raises:
        UsageError: What `generate_batch` refuses, or several texts at once of a decoder that holds one.
    """
    target, speculator, statistics = decoder, Speculator(method="off"), Statistics()
    if isinstance(decoder, SpeculatingDecoder):
        target, speculator, statistics = decoder.target, decoder.speculator, decoder.statistics
    if speculator.min_window == 2:
        requests = [replace(each, min_window=2) for each in requests]
    acceptor = Greedy() if acceptor is None else acceptor
    if batch == 1:
        steps = _one_by_one(target, speculator.drafter(), acceptor, prompts, requests)
    else:
        drafters = speculator.drafters(max(1, min(batch, len(prompts))))
        steps = generate_batch(_batched(target, len(drafters)), drafters, acceptor, prompts, requests)
    for number, step in steps:
        statistics.add(step)
        yield number, step


def _one_by_one(
    decoder: Decoder, drafter: Drafter, acceptor: Acceptor, prompts: Sequence[Tokens], requests: Sequence[Request]
) -> Iterator[tuple[int, Step]]:
    for number, (prompt, request) in enumerate(zip(prompts, requests, strict=True)):
        for step in generate(decoder, drafter, acceptor, prompt, request):
            yield number, step


def _batched(decoder: Decoder, places: int) -> BatchDecoder:
    if not hasattr(decoder, "batched"):
        message = f"this {decoder.runtime} decoder writes one text at a time"
        raise UsageError(message, fix="use a batch of 1, or the onnxruntime or transformers runtime")
    found: BatchDecoder = decoder.batched(places)
    return found


def generate_batch(
    decoder: BatchDecoder,
    drafters: Sequence[Drafter],
    acceptor: Acceptor,
    prompts: Sequence[Tokens],
    requests: Sequence[Request],
) -> Iterator[tuple[int, Step]]:
    """Write texts, as many at once as there are drafters.

    A prompt is run by itself: padded to its length, a step of the other texts would cost as much as it does.

    Args:
        decoder: The target; its caches are used from the beginning.
        drafters: One for each text that is written at once; none may share what it is told with another.
        acceptor: Decides.
        prompts: (n,) token ids each, n ≥ 1.
        requests: What to write after each prompt.

    Yields:
        The number of a prompt, and a step of its text.

    Raises:
        UsageError: What `generate` refuses, of any prompt; another number of requests than prompts; more drafters than
            the decoder has places, or none.
        ValueError: The target's logits aren't numbers.
    """
    if not 1 <= len(drafters) <= decoder.places:
        message = f"{len(drafters)} texts at once don't fit: this decoder holds {decoder.places}"
        raise UsageError(message, fix=f"use 1 to {decoder.places} drafters, or a decoder with more places")
    if len(prompts) != len(requests):
        message = f"there are {len(prompts)} prompts and {len(requests)} requests"
        raise UsageError(message, fix="give one request for each prompt")
    for prompt, request in zip(prompts, requests, strict=True):
        check(decoder, drafters[0], prompt, request)
    waiting = deque(range(len(prompts)))
    texts = Texts(decoder, drafters)
    while waiting or texts.numbers:
        while waiting and texts.free:
            number = waiting.popleft()
            texts.begin(number, acceptor, prompts[number], requests[number])
        yield from texts.step()


class Texts:
    """Texts that are written at once; they come and go one by one.

    Args:
        decoder: The target; its caches are used from the beginning.
        drafters: One for each place, at most as many as the decoder has; none may share what it is told with another.
    """

    def __init__(self, decoder: BatchDecoder, drafters: Sequence[Drafter]) -> None:
        self._decoder = decoder
        self._drafters = list(drafters)
        self._running: list[_Running] = []

    @property
    def numbers(self) -> tuple[int, ...]:
        """Numbers of the texts that are being written."""
        return tuple(each.number for each in self._running)

    @property
    def free(self) -> int:
        """Places without a text."""
        return len(self._drafters)

    def begin(self, number: int, acceptor: Acceptor, prompt: Tokens, request: Request) -> None:
        """Begin a text, which `check` has let pass, at a free place.

        Args:
            number: By which it is known; any that no running text has.
            acceptor: Decides.
            prompt: (n,) token ids, n ≥ 1.
            request: What to write after it.
        """
        self._running.append(_Running(number, Row(self._drafters.pop(), acceptor, prompt, request)))

    def drop(self, number: int) -> None:
        """End a text that nobody wants any more; nothing happens where it is over already."""
        for place, each in enumerate(self._running):
            if each.number == number:
                self._end(place)
                return

    def step(self) -> list[tuple[int, Step]]:
        """Run the first prompt that hasn't been, or else the windows of all texts; return what each took, by number.

        Raises:
            ValueError: The target's logits aren't numbers.
        """
        fresh = next((place for place, each in enumerate(self._running) if each.row.position == 0), None)
        places: Sequence[int] = range(len(self._running)) if fresh is None else (fresh,)
        windows = []
        for place in places:
            row = self._running[place].row
            tokens = row.window()
            windows.append(Window(place, tokens, row.position, row.rows))
        logits = self._decoder.forward(windows)
        taken, ended = [], []
        for i, place in enumerate(places):
            number, row = self._running[place]
            step = row.take(logits[i])
            if step.finish:
                ended.append(place)
            else:
                row.advance(self._shown(i, row.drafter, step))
            taken.append((number, step))
        for place in reversed(ended):
            self._end(place)
        return taken

    def _shown(self, window: int, drafter: Drafter, step: Step) -> Hidden | Features | None:
        """Return what a drafter wants to see of a window; see `decoding_loop.shown`."""
        decoder = cast("HiddenBatchDecoder", self._decoder)
        if drafter.reads_features:
            return decoder.features(window)
        return decoder.hidden(window, step.accepted) if drafter.reads_hidden else None

    def _end(self, place: int) -> None:
        """Take a text out, and give its place to the last one."""
        last = self._running.pop()
        gone = last
        if place < len(self._running):
            self._decoder.move(len(self._running), place)
            gone, self._running[place] = self._running[place], last
        self._drafters.append(gone.row.drafter)
