"""Text in, text out: prompts through a chat template, tokens back to text as they come, end of text."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers.decoders import DecodeStream
from transformers import AutoTokenizer

from optikit.errors import InputMissingError, UsageError
from optikit.runtime.decoder import Decoder, Tokens
from optikit.runtime.decoders.checks import check_room
from optikit.runtime.speculation.batch_loop import write
from optikit.runtime.speculation.decoding_loop import Finish, Request


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


class TextGenerator:
    """A decoder with its tokenizer.

    Args:
        decoder: The model.
        directory: Where its tokenizer and configuration lie.

    Attributes:
        ends: Tokens that end a text.

    Raises:
        InputMissingError: There is no tokenizer.json.
    """

    def __init__(self, decoder: Decoder, directory: Path) -> None:
        if not (directory / "tokenizer.json").is_file():
            raise InputMissingError(f"{directory} has no tokenizer.json", fix="copy it there from the original model")
        self._decoder = decoder
        self._tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        self.ends = _end_tokens(directory, self._tokenizer)

    def encode(self, prompt: str, *, chat: bool) -> Tokens:
        """Return the tokens of a prompt, as the user's turn of a chat where the model has a template for one.

        Raises:
            UsageError: The prompt has no tokens.
        """
        if chat and self._tokenizer.chat_template:
            turn = [{"role": "user", "content": prompt}]
            text = self._tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
            tokens = self._tokenizer(text, add_special_tokens=False).input_ids
        else:
            tokens = self._tokenizer(prompt).input_ids
        if not tokens:
            raise UsageError("the prompt is empty", fix="give some text")
        return np.array(tokens, np.int64)

    def answer(self, tokens: Tokens, max_tokens: int) -> Iterator[Chunk]:
        """Yield the greedy continuation, one chunk per token, up to the end of text or `max_tokens`.

        Raises:
            UsageError: The prompt leaves no room.
        """
        check_room(len(tokens) + 1, self._decoder.max_tokens)
        room = min(max_tokens, self._decoder.max_tokens - len(tokens))
        decoded = DecodeStream(skip_special_tokens=True)
        for token in self._decoder.greedy(tokens, room):
            at = time.perf_counter_ns()
            if token in self.ends:
                return
            yield Chunk(text=decoded.step(self._tokenizer.backend_tokenizer, token) or "", at_ns=at)

    def answers(self, prompts: Sequence[Tokens], max_tokens: int, *, batch: int = 1) -> Iterator[Answer]:
        """Yield the greedy continuations of prompts, in their order, each as soon as it and those before it are whole.

        Args:
            prompts: (n,) token ids each.
            max_tokens: Most tokens of an answer; fewer where the cache ends.
            batch: Answers written at once.

        Raises:
            UsageError: A prompt leaves no room, or the decoder writes one answer at a time.
        """
        room = self._decoder.max_tokens
        for tokens in prompts:
            check_room(len(tokens) + 1, room)
        requests = [Request(max_new_tokens=min(max_tokens, room - len(each)), eos=self.ends) for each in prompts]
        written: list[list[int]] = [[] for _ in prompts]
        ended: dict[int, Finish] = {}
        yielded = 0
        for number, step in write(self._decoder, prompts, requests, batch=batch):
            written[number] += step.tokens
            if step.finish:
                ended[number] = step.finish
            while yielded in ended:
                yield self._answer(written[yielded], ended[yielded])
                yielded += 1

    def _answer(self, tokens: list[int], finish: Finish) -> Answer:
        kept = tokens[:-1] if finish == "eos" else tokens
        text = self._tokenizer.backend_tokenizer.decode(kept, skip_special_tokens=True)
        return Answer(text=text, tokens=len(kept), finish=finish)


def end_tokens(directory: Path) -> frozenset[int]:
    """Return every token that ends a text of the model in a directory."""
    tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    return _end_tokens(directory, tokenizer)


def _end_tokens(directory: Path, tokenizer: Any) -> frozenset[int]:
    """Return every token that ends a text, by the configurations of a directory and its tokenizer."""
    found = {tokenizer.eos_token_id}
    for name in ("generation_config.json", "config.json", "genai_config.json"):
        path = directory / name
        if path.is_file():
            settings = json.loads(path.read_text(encoding="utf-8"))
            ends = settings.get("model", settings).get("eos_token_id")
            found |= set(ends) if isinstance(ends, list) else {ends}
    return frozenset(end for end in found if isinstance(end, int))
