"""`LlamaCppDecoder`: llama.cpp itself on a gguf file, through llama-cpp-python's bindings of its C interface.

The cache is llama.cpp's own, float16. Rolling back removes what lies behind a position.
"""

from __future__ import annotations

import ctypes
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from optikit import host
from optikit.errors import InputMissingError, IntegrityError, UnavailableError, UsageError
from optikit.models.gguf_header import read_header
from optikit.runtime.decoder import Logits, Tokens
from optikit.runtime.decoders.checks import check_call, check_room

MODEL = "model.gguf"
CHUNK = 256
"""Tokens per call of a longer sequence: bounds the activations."""
ERROR = 4
"""Level of messages, ggml.h's GGML_LOG_LEVEL_ERROR."""
DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def _library() -> Any:
    try:
        import llama_cpp
    except ImportError as error:
        message = f"this directory is served by llama.cpp, whose bindings don't load: {error}"
        raise UnavailableError(message, fix="pip install 'optikit[llama-cpp]'") from error
    return llama_cpp


def _cause(said: list[str]) -> str:
    """Return the first of llama.cpp's complaints, which tells the cause."""
    return next((line.strip() for line in said if line.strip()), "it says nothing")


def stored_dtype(path: Path) -> str:
    """Return how most weights of the blocks are stored: `int4`, `int5`, `int8`, `float16`, ….

    Raises:
        IntegrityError: It is no gguf file.
    """
    sizes: Counter[str] = Counter()
    for name, tensor in read_header(path).tensors.items():
        if name.startswith("blk."):
            sizes[tensor.type] += tensor.bytes
    kind = sizes.most_common(1)[0][0] if sizes else "F32"
    return DTYPES.get(kind) or f"int{kind.lstrip('IQT')[:1]}"


class LlamaCppDecoder:
    """A gguf file with its cache; see `decoder.Decoder`.

    Args:
        directory: What `compile: {engine: llama-cpp}` wrote.
        dtype: `auto`, or the dtype that most weights must have.
        threads: CPU threads; None is all that this process may use.
        max_tokens: Longest sequence; None is the model's context.

    Raises:
        InputMissingError: The file is missing.
        IntegrityError: It is damaged, or llama.cpp doesn't load it.
        UnavailableError: llama-cpp-python isn't installed.
        UsageError: It has another dtype, or a shorter context than `max_tokens`.
    """

    runtime = "llama-cpp"

    def __init__(
        self,
        directory: Path,
        *,
        dtype: str = "auto",
        threads: int | None = None,
        max_tokens: int | None = None,
    ) -> None:
        path = directory / MODEL
        if not path.is_file():
            raise InputMissingError(f"{directory} has no {MODEL}", fix="give a directory that `compile` wrote")
        self.dtype = stored_dtype(path)
        if dtype not in ("auto", self.dtype):
            message = f"{directory} holds {self.dtype} weights, not {dtype}"
            raise UsageError(message, fix=f"use dtype auto or {self.dtype}")
        self.threads = threads or host.threads()
        self._library = library = _library()
        said: list[str] = []
        self._listener = library.llama_log_callback(  # kept alive: C calls it
            lambda level, text, _: said.append(text.decode("utf-8", "replace")) if level == ERROR else None
        )
        library.llama_log_set(self._listener, ctypes.c_void_p(0))
        library.llama_backend_init()
        self._model = library.llama_model_load_from_file(str(path).encode(), library.llama_model_default_params())
        if not self._model:
            raise IntegrityError(f"llama.cpp can't load {path}: {_cause(said)}", fix="compile the model again")
        self._vocabulary = library.llama_model_get_vocab(self._model)
        self.vocab = int(library.llama_vocab_n_tokens(self._vocabulary))
        context = int(library.llama_model_n_ctx_train(self._model))
        if max_tokens is not None and max_tokens > context:
            message = f"max_tokens {max_tokens} is beyond the model's context of {context} tokens"
            raise UsageError(message, fix=f"use {context} or less")
        self.max_tokens = max_tokens or context
        self._context = library.llama_init_from_model(self._model, self._settings())
        if not self._context:
            message = f"llama.cpp can't make a cache of {self.max_tokens} tokens for {path}"
            raise IntegrityError(message, fix="load it with a smaller max_tokens")
        self._memory = library.llama_get_memory(self._context)
        self._batch = library.llama_batch_init(CHUNK, 0, 1)
        self._filled = 0

    def _settings(self) -> Any:
        settings = self._library.llama_context_default_params()
        settings.n_ctx = self.max_tokens
        settings.n_batch = settings.n_ubatch = CHUNK
        settings.n_threads = settings.n_threads_batch = self.threads
        settings.swa_full = True  # a window's cache that is cut can't be rolled back
        settings.no_perf = True
        return settings

    def __del__(self) -> None:
        """Give back what C holds."""
        library = getattr(self, "_library", None)
        for name, free in (("_batch", "llama_batch_free"), ("_context", "llama_free"), ("_model", "llama_model_free")):
            held = self.__dict__.pop(name, None)
            if library is not None and held is not None:
                getattr(library, free)(held)

    def forward(self, tokens: Tokens, position: int, rows: int | None = None) -> Logits:
        """Run `tokens` (m,) at `position`; see `decoder.Decoder.forward`."""
        check_call(tokens, position, rows=rows, filled=self._filled, vocab=self.vocab, max_tokens=self.max_tokens)
        self._cut(position)
        logits = np.empty((rows or len(tokens), self.vocab), np.float32)
        skipped = len(tokens) - len(logits)
        for start in range(0, len(tokens), CHUNK):
            part = tokens[start : start + CHUNK]
            wanted = logits[max(0, start - skipped) : max(0, start + len(part) - skipped)]
            found = self._run(part, max(1, len(wanted)))
            if len(wanted):
                wanted[:] = found
        return logits

    def greedy(self, prompt: Tokens, new_tokens: int) -> Iterator[int]:
        """Yield `new_tokens` greedy tokens after `prompt`; see `decoder.Decoder.greedy`."""
        check_call(prompt, 0, filled=0, vocab=self.vocab, max_tokens=self.max_tokens)
        check_room(len(prompt) + new_tokens, self.max_tokens)
        self._cut(0)
        for start in range(0, len(prompt), CHUNK):
            row = self._run(prompt[start : start + CHUNK], 1)
        for _ in range(new_tokens - 1):
            token = int(row[0].argmax())
            yield token
            row = self._run(np.array([token], np.int64), 1)
        yield int(row[0].argmax())

    def tokenize(self, text: str) -> list[int]:
        """Return the tokens of a text as llama.cpp cuts it, with what it adds, special ones parsed."""
        said = text.encode()
        room = (self._library.llama_token * (len(said) + 8))()
        count = self._library.llama_tokenize(self._vocabulary, said, len(said), room, len(room), True, True)
        return list(room[: max(0, count)])

    def _cut(self, position: int) -> None:
        """Keep the first `position` tokens of the cache."""
        if position != self._filled:
            self._library.llama_memory_seq_rm(self._memory, 0, position, -1)
            self._filled = position

    def _run(self, tokens: Tokens, rows: int) -> Logits:
        """Run tokens (m,) after what the cache holds; return the logits of the last rows, (rows, vocab)."""
        batch, count = self._batch, len(tokens)
        batch.n_tokens = count
        for index, token in enumerate(tokens.tolist()):
            batch.token[index] = token
            batch.pos[index] = self._filled + index
            batch.n_seq_id[index] = 1
            batch.seq_id[index][0] = 0
            batch.logits[index] = index >= count - rows
        code = self._library.llama_decode(self._context, batch)
        if code:
            raise IntegrityError(f"llama.cpp stopped with code {code}", fix="compile the model again")
        self._filled += count
        found: Logits = np.ctypeslib.as_array(self._library.llama_get_logits(self._context), (rows * self.vocab,))
        return found.reshape(rows, self.vocab)
