"""`OnnxDecoder`: onnxruntime itself on a directory of the onnxruntime-genai builder, with nothing in between.

What makes it fast is what it doesn't do:

- One set of key-value buffers is bound as past and as present: a step writes its row in place and copies nothing.
  Rolling back is passing a shorter length.
- Attention is told that length as a number; the nodes that count it off an attention mask are taken out in memory, and
  with them the one input that grows: all shapes stay what they were, so memory is planned once per number of tokens m.
- Inputs and outputs are bound by address once per m; a step then writes three numbers and makes one call.
- Before the output head a slice is put into the graph in memory (the file stays as it is): a prompt computes logits
  for its last token only, a fifth less work on SmolLM2-135M. What the slice gives is what Medusa heads read: any
  directory of the builder shows its hidden states. What EAGLE-3 drafters read, the inputs of some blocks, is in the
  graph, too: `show_features` makes them outputs.

A graph of accuracy level 4 has one matrix kernel for m = 1 and others for m ≥ 2; their logits differ by up to 1. Rows
don't depend on m beyond that, so a loop that must repeat itself token by token uses m = 1 throughout, or never.

Where `compile` left a second graph of the same model, with int8 products, that one runs every window of several tokens:
a prompt, and drafts to be checked. Both graphs read and write the same cache. `single("verify")` has it run a token
alone, too; its sums are whole numbers, so no row of it depends on m.
"""

from __future__ import annotations

import copy
import math
import mmap
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray

from optikit import host
from optikit.errors import UsageError
from optikit.runtime.decoder import Logits, SinglePath, Tokens
from optikit.runtime.decoders.checks import check_call, check_room, require_blocks
from optikit.runtime.decoders.onnxruntime_session import (
    CHUNK,
    Call,
    keep_activations,
    open_session,
    pass_lengths,
    read_graph,
    read_layout,
    show_inputs,
    slice_before_head,
    stored_dtype,
)

if TYPE_CHECKING:
    from optikit.runtime.decoders.onnxruntime_batch import OnnxBatch

KEPT_CALLS = 16
"""Calls of up to this many tokens stay bound; a longer one is bound anew, which costs a thousandth of its run."""
CACHE_BYTES = 4 << 30
"""Default bound on the address space of the cache; pages are taken only as they are filled."""


def _zeros(shape: tuple[int, ...]) -> NDArray[np.float32]:
    return np.zeros(shape, np.float32)


def paged_zeros(shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Return zeros that take memory as they are written, page by page.

    numpy asks for huge pages: a head's part of a cache of 8192 positions is one, so that the first token of each text
    would take the memory of all that it could ever have: 3 GiB for eight texts of SmolLM2-135M.
    """
    size = math.prod(shape) * np.dtype(np.float32).itemsize
    if not size or not hasattr(mmap, "MADV_NOHUGEPAGE"):
        return _zeros(shape)
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    pages.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(pages, np.float32).reshape(shape)


class OnnxDecoder:
    """A compiled model with its cache; see `decoder.Decoder`.

    Args:
        directory: What `compile: {engine: onnxruntime}` wrote, or any directory of the builder.
        dtype: `auto`, or the dtype that the graph must have.
        threads: CPU threads; None is all that this process may use.
        max_tokens: Longest sequence; None is the model's context, or less where its cache would pass 4 GiB.
        spinning: Threads wait for their next work by spinning: faster, unless another model runs in between.
        exact: Quantized products keep their inputs in float32, whatever the graph says: slow, for comparisons; a graph
            of int8 products isn't used.

    Raises:
        InputMissingError: A file is missing.
        IntegrityError: A file is damaged, or onnxruntime can't run the graph.
        UsageError: The graph has another dtype, or a shorter context than `max_tokens`.
    """

    runtime = "onnxruntime"

    def __init__(
        self,
        directory: Path,
        *,
        dtype: str = "auto",
        threads: int | None = None,
        max_tokens: int | None = None,
        spinning: bool = True,
        exact: bool = False,
    ) -> None:
        layout = read_layout(directory)
        model = read_graph(layout.graph)
        self.dtype = stored_dtype(model.graph)
        if dtype not in ("auto", self.dtype):
            raise UsageError(
                f"{directory} holds {self.dtype} weights, not {dtype}", fix=f"use dtype auto or {self.dtype}"
            )
        if max_tokens is not None and max_tokens > layout.context:
            message = f"max_tokens {max_tokens} is beyond the model's context of {layout.context} tokens"
            raise UsageError(message, fix=f"use {layout.context} or less")
        row_bytes = 2 * layout.layers * layout.kv_heads * layout.head_dim * 4
        self.max_tokens = max_tokens or min(layout.context, CACHE_BYTES // row_bytes)
        self.threads = threads or host.threads()
        self.vocab = layout.vocab
        if exact:
            layout = replace(layout, verify=None)
        self._layout = layout
        self._spinning, self._exact = spinning, exact
        self._mask = np.ones((1, self.max_tokens), np.int64)
        self._open_all(model, ())

    def _open_all(self, model: onnx.ModelProto, blocks: Sequence[int]) -> None:
        """Open the graph, and the one for several tokens if there is one, with an empty cache."""
        layout = self._layout
        self._session = self._open(model, layout.graph, blocks)
        self._verify = self._session
        if layout.verify is not None:
            self._verify = self._open(read_graph(layout.verify), layout.verify, blocks)
        self._single = self._session
        self._begin_cache()

    def _open(self, model: onnx.ModelProto, path: Path, blocks: Sequence[int]) -> onnxruntime.InferenceSession:
        if self._exact:
            keep_activations(model.graph)
        slice_before_head(model.graph, path)
        pass_lengths(model.graph, self._layout.inputs["attention_mask"])
        self._shown = show_inputs(model.graph, blocks, path)
        return open_session(model, self._layout, self.threads, spinning=self._spinning)

    def show_features(self, blocks: Sequence[int]) -> None:
        """Show from now on what some blocks are given; see `decoding_loop.FeatureDecoder`. The cache begins anew."""
        require_blocks(blocks, self._layout.layers)
        single: SinglePath = "verify" if self.verifies_apart and self._single is self._verify else "own"
        self._calls.clear()
        del self._session, self._verify, self._single  # two of each would hold the weights twice
        self._open_all(read_graph(self._layout.graph), blocks)
        self.single(single)

    @property
    def verifies_apart(self) -> bool:
        """Whether a graph of its own runs several tokens at once."""
        return self._layout.verify is not None

    def single(self, path: SinglePath) -> None:
        """Choose the graph that runs a token alone: the first one, `own`, or that for several tokens, `verify`."""
        self._single = self._verify if path == "verify" else self._session
        self._calls.pop(1, None)

    def _buffers(self, texts: int) -> list[NDArray[np.float32]]:
        shape = (texts, self._layout.kv_heads, max(self.max_tokens, self._layout.window), self._layout.head_dim)
        make = paged_zeros if texts > 1 else _zeros
        return [make(shape) for _ in self._layout.cache_names]

    def _begin_cache(self, cache: Sequence[NDArray[np.float32]] | None = None) -> None:
        self._cache = self._buffers(1) if cache is None else list(cache)
        self._calls: dict[int, Call] = {}
        self._last_row = np.empty((1, 1, self.vocab), np.float32)
        self._last_state = np.empty((1, 1, self._layout.hidden), np.float32)
        self._states = self._last_state
        self._features = np.empty((0, 0), np.float32)
        self._filled = 0

    def sibling(self, cache: Sequence[NDArray[np.float32]] | None = None) -> OnnxDecoder:
        """Return a decoder with a cache of its own on the same session: what several texts need.

        Args:
            cache: Its buffers; None makes them.
        """
        own = copy.copy(self)
        own._begin_cache(cache)  # noqa: SLF001 - it is one of these
        return own

    @property
    def cache(self) -> Sequence[NDArray[np.float32]]:
        """Key and value buffers (1, kv_heads, positions, head_dim), by `Layout.cache_names`; written in place."""
        return self._cache

    @property
    def filled(self) -> int:
        """Positions of the cache that hold a text."""
        return self._filled

    @filled.setter
    def filled(self, positions: int) -> None:
        """Say how many do, where somebody else has written into the cache."""
        self._filled = positions

    @property
    def states(self) -> NDArray[np.float32]:
        """What the output head read in the last `forward`, (1, rows, width)."""
        return self._states

    def forward(self, tokens: Tokens, position: int, rows: int | None = None) -> Logits:
        """Run `tokens` (m,) at `position`; see `decoder.Decoder.forward`."""
        check_call(tokens, position, rows=rows, filled=self._filled, vocab=self.vocab, max_tokens=self.max_tokens)
        logits = np.empty((rows or len(tokens), self.vocab), np.float32)
        states = np.empty((1, len(logits), self._layout.hidden), np.float32)
        skipped = len(tokens) - len(logits)
        features = []
        for start in range(0, len(tokens), CHUNK):
            part = tokens[start : start + CHUNK]
            wanted = slice(max(0, start - skipped), max(0, start + len(part) - skipped))
            rows_here = (logits[None, wanted], states[:, wanted])
            rows_here = rows_here if rows_here[0].size else (self._last_row, self._last_state)
            shown = self._run(part, position + start, *rows_here)
            if shown:
                features.append(np.concatenate(shown, axis=2)[0])
        self._states = states
        if features:
            self._features = features[0] if len(features) == 1 else np.concatenate(features)
        return logits

    def step(self, token: int, position: int) -> Logits:
        """Run a token; return its logits (1, vocab), which the next run overwrites.

        `forward` returns arrays of its own and binds them anew, which takes longer than all else in Python here.
        Nothing is checked.
        """
        shown = self._run(token, position, self._last_row, self._last_state)
        self._states = self._last_state.copy()
        if shown:
            self._features = np.concatenate(shown, axis=2)[0]
        row: Logits = self._last_row[0]
        return row

    def hidden(self, row: int) -> NDArray[np.float32]:
        """Return what the output head read for a row of the last `forward`; see `decoding_loop.HiddenDecoder`."""
        state: NDArray[np.float32] = self._states[0, row]
        return state

    def features(self) -> NDArray[np.float32]:
        """Return what the shown blocks were given in the last `forward`; see `decoding_loop.FeatureDecoder`."""
        return self._features

    @property
    def width(self) -> int:
        """Width of the hidden states."""
        return self._layout.hidden

    def batched(self, places: int) -> OnnxBatch:
        """Return caches for several texts at once.

        Texts of one token each are stacked, and one that is run without others goes as it is: both through this
        decoder's sessions. Others need a session of a graph of their own, which reads the weights anew.

        Raises:
            UsageError: The graph has attention that can't be had once per text.
        """
        from optikit.runtime.decoders.onnxruntime_batch import OnnxBatch

        cache = self._buffers(max(0, places))
        alone = [self.sibling([part[place : place + 1] for part in cache]) for place in range(places)]
        return OnnxBatch(self._layout, alone, cache, self._verify)

    def greedy(self, prompt: Tokens, new_tokens: int) -> Iterator[int]:
        """Yield `new_tokens` greedy tokens after `prompt`; see `decoder.Decoder.greedy`."""
        check_call(prompt, 0, filled=0, vocab=self.vocab, max_tokens=self.max_tokens)
        check_room(len(prompt) + new_tokens, self.max_tokens)
        row = self._last_row
        self._states = state = self._last_state
        for start in range(0, len(prompt), CHUNK):
            self._run(prompt[start : start + CHUNK], start, row, state)
        for position in range(len(prompt), len(prompt) + new_tokens - 1):
            token = int(row.argmax())
            yield token
            self._run(token, position, row, state)
        yield int(row.argmax())

    def _run(
        self, tokens: Tokens | int, position: int, logits: NDArray[np.float32], states: NDArray[np.float32]
    ) -> list[NDArray[np.float32]]:
        """Run tokens (m,), or one; write logits (1, r, vocab) and hidden states (1, r, width) of the last r of them.

        Returns:
            What each shown block was given, (1, m, width); the next run of as many tokens writes there, too.
        """
        m = 1 if isinstance(tokens, int) else len(tokens)
        call = self._calls.get(m)
        if call is None:
            call = Call(self._single if m == 1 else self._verify, self._layout, self._cache, m, self._shown)
            if m <= KEPT_CALLS:
                self._calls[m] = call
        end = position + m
        call.mask(self._mask[:, :end])
        call.results(logits, states)
        call.run(tokens, position)
        self._filled = end
        return call.shown
