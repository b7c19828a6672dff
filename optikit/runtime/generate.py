"""Text in, text out: prompts through a chat template, tokens back to text as they come, end of text."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers.decoders import DecodeStream

from optikit.errors import UsageError
from optikit.models import tokenizer
from optikit.runtime.decoder import Decoder, Tokens
from optikit.runtime.speculation.acceptors import Acceptor, Greedy
from optikit.runtime.speculation.batch_loop import write
from optikit.runtime.speculation.decoding_loop import Finish, Request

WIDEST = 32
"""Characters of a token that a text of them alone can be expected to have."""


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """A piece of an answer: its text (empty while a character isn't complete) and the time it came, ns."""

    text: str
    at_ns: int


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A whole answer: its text, the number of its tokens without an end of text, and why it ends."""

    text: str
    tokens: int
    finish: Finish


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """How tokens are chosen: what decides on drafts and draws, and the seed of all draws."""

    acceptor: Acceptor
    seed: int = 0


GREEDILY = Drawing(acceptor=Greedy())


class TextGenerator:
    """A decoder with its tokenizer.

    Args:
        decoder: The model.
        directory: Where its tokenizer and configuration lie.

    Attributes:
        tokenizer: From text to tokens and back.
        ends: Tokens that end a text.

    Raises:
        InputMissingError: There is no tokenizer.json.
        IntegrityError: It is damaged.
    """

    def __init__(self, decoder: Decoder, directory: Path) -> None:
        self._decoder = decoder
        self.tokenizer = tokenizer.load(directory)
        self._configured = tokenizer.configured(directory)
        self.ends = _end_tokens(directory, self._configured)
        self._opening = tokenizer.opening(self.tokenizer)

    def encode(self, prompt: str, *, chat: bool | str) -> Tokens:
        """Return the tokens of a prompt that the model is to go on from.

        Args:
            prompt: The text.
            chat: Make it the user's turn of a chat where the model has a template for one; a text names the template.

        Raises:
            UsageError: The prompt has no tokens or far too many, there is no template of that name, or it can't be
                filled.
        """
        template = self._template(chat) if chat else ""
        text = self._turn(prompt, template) if template else prompt
        self._require_sensible(text)
        tokens = tokenizer.encode(self.tokenizer, text, opened=False)
        if not template:
            tokens = [*self._opening, *tokens]
        if not tokens:
            raise UsageError("the prompt is empty", fix="give some text")
        return np.array(tokens, np.int64)

    def _require_sensible(self, text: str) -> None:
        """Refuse a text whose beginning alone has more tokens than the decoder holds, before the rest is looked at."""
        most = self._decoder.max_tokens
        beginning = text[: WIDEST * most]
        if beginning != text and len(tokenizer.encode(self.tokenizer, beginning, opened=False)) > 2 * most:
            message = f"a prompt of {len(text)} characters leaves no room for an answer: this model holds {most} tokens"
            raise UsageError(message, fix="shorten the prompt")

    def _template(self, chat: bool | str) -> str:
        """Return the chat template of that name, or the default one; "" where the model has none."""
        found = self._configured.chat_template or {}
        named: dict[str, str] = {tokenizer.DEFAULT_TEMPLATE: found} if isinstance(found, str) else found
        name = chat if isinstance(chat, str) else tokenizer.DEFAULT_TEMPLATE
        if name not in named and (named or isinstance(chat, str)):
            message = f"the model has no chat template {name!r}, but {', '.join(sorted(named)) or 'none at all'}"
            raise UsageError(
                message, fix="name one with --chat-template or `chat_template`, or use none: --no-chat, `chat: false`"
            )
        return named.get(name, "")

    def encode_chat(self, turns: Sequence[Mapping[str, Any]]) -> Tokens:
        """Return the tokens of a chat, and of what opens the next answer.

        Args:
            turns: Messages with `role` and `content`.

        Raises:
            UsageError: The model has no chat template, or it can't be filled with these.
        """
        template = self._template(chat=True)
        if not template:
            raise UsageError("the model has no chat template", fix="complete a text instead")
        tokens = tokenizer.encode(self.tokenizer, self._filled(turns, template), opened=False)
        return np.array(tokens, np.int64)

    def _turn(self, prompt: str, template: str) -> str:
        """Return a prompt as the user's turn of a chat, followed by what opens the answer."""
        return self._filled([{"role": "user", "content": prompt}], template)

    def _filled(self, turns: Sequence[Mapping[str, Any]], template: str) -> str:
        try:
            text: str = self._configured.apply_chat_template(
                list(turns), chat_template=template, add_generation_prompt=True, tokenize=False
            )
        except Exception as error:  # the template is a program, and anybody's: it can fail in any way
            message = f"the model's chat template fails on {_said(turns)}: {error}"
            raise UsageError(message, fix="name another template, or use none: --no-chat, `chat: false`") from error
        return text

    def require_room(self, tokens: Tokens) -> None:
        """Refuse a prompt that leaves no room for an answer.

        Raises:
            UsageError: It fills the decoder's cache.
        """
        room = self._decoder.max_tokens
        if len(tokens) + 1 > room:
            message = f"a prompt of {len(tokens)} tokens leaves no room for an answer: this model holds {room}"
            raise UsageError(message, fix="shorten the prompt")

    def answer(self, tokens: Tokens, max_tokens: int, drawing: Drawing = GREEDILY) -> Iterator[Chunk]:
        """Yield the continuation, one chunk per token, up to the end of text or `max_tokens`.

        Raises:
            UsageError: The prompt leaves no room.
        """
        self.require_room(tokens)
        room = min(max_tokens, self._decoder.max_tokens - len(tokens))
        decoded = DecodeStream(skip_special_tokens=True)
        for token in self._continued(tokens, room, drawing):
            at = time.perf_counter_ns()
            if token in self.ends:
                return
            yield Chunk(text=decoded.step(self.tokenizer, token) or "", at_ns=at)

    def _continued(self, tokens: Tokens, room: int, drawing: Drawing) -> Iterator[int]:
        if isinstance(drawing.acceptor, Greedy):
            yield from self._decoder.greedy(tokens, room)
            return
        request = Request(max_new_tokens=room, seed=drawing.seed)
        for _, step in write(self._decoder, [tokens], [request], acceptor=drawing.acceptor):
            yield from step.tokens

    def answers(
        self, prompts: Sequence[Tokens], max_tokens: int, *, batch: int = 1, drawing: Drawing = GREEDILY
    ) -> Iterator[Answer]:
        """Yield the continuations of prompts, in their order, each as soon as it and those before it are whole.

        Args:
            prompts: (n,) token ids each.
            max_tokens: Most tokens of an answer; fewer where the cache ends.
            batch: Answers written at once.
            drawing: How tokens are chosen; each prompt has a seed of its own, counted from this one.

        Raises:
            UsageError: A prompt leaves no room, or the decoder writes one answer at a time.
        """
        room = self._decoder.max_tokens
        for tokens in prompts:
            self.require_room(tokens)
        requests = [
            Request(max_new_tokens=min(max_tokens, room - len(each)), eos=self.ends, seed=drawing.seed + number)
            for number, each in enumerate(prompts)
        ]
        written: list[list[int]] = [[] for _ in prompts]
        ended: dict[int, Finish] = {}
        yielded = 0
        for number, step in write(self._decoder, prompts, requests, batch=batch, acceptor=drawing.acceptor):
            written[number] += step.tokens
            if step.finish:
                ended[number] = step.finish
            while yielded in ended:
                yield self._answer(written[yielded], ended[yielded])
                yielded += 1

    def _answer(self, tokens: list[int], finish: Finish) -> Answer:
        kept = tokens[:-1] if finish == "eos" else tokens
        text = self.tokenizer.decode(kept, skip_special_tokens=True)
        return Answer(text=text, tokens=len(kept), finish=finish)


def _said(turns: Sequence[Mapping[str, Any]]) -> str:
    return "one turn of the user" if len(turns) == 1 else f"{len(turns)} turns"


def end_tokens(directory: Path) -> frozenset[int]:
    """Return every token that ends a text of the model in a directory."""
    return _end_tokens(directory, tokenizer.configured(directory))


def _end_tokens(directory: Path, configured: Any) -> frozenset[int]:
    """Return every token that ends a text, by the configurations of a directory and its tokenizer."""
    found = {configured.eos_token_id}
    for name in ("generation_config.json", "config.json", "genai_config.json"):
        path = directory / name
        if path.is_file():
            settings = json.loads(path.read_text(encoding="utf-8"))
            ends = settings.get("model", settings).get("eos_token_id")
            found |= set(ends) if isinstance(ends, list) else {ends}
    return frozenset(end for end in found if isinstance(end, int))
