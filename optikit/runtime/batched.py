"""The decoding loop for several texts at once: each as if it were alone, all of them in one forward.

    decoder = runtime.load(directory, runtime="transformers").batched(4)
    drafters = [PromptLookup() for _ in range(4)]
    for number, step in generate_batch(decoder, drafters, Greedy(), prompts, requests): ...

Texts share nothing but the forward: each has its own length, draft, seed, end and cache, and is what `generate` writes
with its prompt and request, whatever else is in the batch. A text that ends makes room for the next prompt at once.
Weights are read once for all windows of a step; that, and nothing else, is what a batch saves.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, Protocol, cast

from optikit.errors import UsageError
from optikit.runtime.acceptors import Acceptor
from optikit.runtime.drafters import Drafter, Hidden
from optikit.runtime.protocol import BatchDecoder, Tokens, Window
from optikit.runtime.speculate import Request, Row, Step, check


class HiddenBatchDecoder(BatchDecoder, Protocol):
    """A batch decoder that can show what its output head reads."""

    def hidden(self, window: int, row: int) -> Hidden:
        """Return the state (hidden,) that a row of a window's logits in the last `forward` was read from."""
        ...


class _Running(NamedTuple):
    """A text at its place: the number of its prompt, and how far it is."""

    number: int
    row: Row


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

    def begin(drafter: Drafter) -> _Running:
        number = waiting.popleft()
        return _Running(number, Row(drafter, acceptor, prompts[number], requests[number]))

    running = [begin(drafter) for drafter, _ in zip(drafters, prompts, strict=False)]
    while running:
        ended = []
        for place, step in _step(decoder, running):
            yield running[place].number, step
            if step.finish:
                ended.append(place)
        for place in reversed(ended):
            if waiting:
                running[place] = begin(running[place].row.drafter)
            else:
                _close_up(decoder, running, place)


def _step(decoder: BatchDecoder, running: Sequence[_Running]) -> Iterator[tuple[int, Step]]:
    """Run the first prompt that hasn't been, or else the windows of all texts; yield places and what was taken."""
    fresh = next((place for place, each in enumerate(running) if each.row.position == 0), None)
    places: Iterable[int] = range(len(running)) if fresh is None else (fresh,)
    windows = []
    for place in places:
        row = running[place].row
        tokens = row.window()
        windows.append(Window(place, tokens, row.position, row.rows))
    logits = decoder.forward(windows)
    for i, place in enumerate(places):
        row = running[place].row
        step = row.take(logits[i])
        if not step.finish:
            shown = cast("HiddenBatchDecoder", decoder)
            row.advance(shown.hidden(i, step.accepted) if row.drafter.reads_hidden else None)
        yield place, step


def _close_up(decoder: BatchDecoder, running: list[_Running], place: int) -> None:
    """Give the place of a text that is over to the last one."""
    last = running.pop()
    if place < len(running):
        decoder.move(len(running), place)
        running[place] = last
