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
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
    FIRST_ROW,
    LAST,
    LENGTH,
    STATES,
    Layout,
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


class _Call:
    """The inputs and outputs of a run of m tokens, bound by address."""

    def __init__(
        self,
        session: onnxruntime.InferenceSession,
        layout: Layout,
        cache: list[NDArray[Any]],
        m: int,
        shown: Sequence[str] = (),
    ) -> None:
        self._session = session
        self._layout = layout
        self._binding = session.io_binding()
        self._tokens = np.zeros((1, m), np.int64)
        self._positions = np.zeros((1, m), np.int64)
        self._steps = np.arange(m)
        self._first_row = np.zeros(1, np.int64)
        self._last, self._length = np.zeros(1, np.int32), np.zeros(1, np.int32)
        self._results: tuple[NDArray[Any], NDArray[Any]] | None = None
        wanted = {each.name for each in session.get_inputs()}
        self._masked = layout.inputs["attention_mask"] in wanted
        for name, array in (
            (layout.inputs["input_ids"], self._tokens),
            ("position_ids", self._positions),
            (FIRST_ROW, self._first_row),
            (LAST, self._last),
            (LENGTH, self._length),
        ):
            if name in wanted:
                self._bind(name, array)
        for (past, present), buffer in zip(layout.cache_names, cache, strict=True):
            self._bind(past, buffer)
            self._output(present, buffer)
        self.shown = [np.empty((1, m, layout.hidden), np.float32) for _ in shown]
        for name, part in zip(shown, self.shown, strict=True):
            self._output(name, part)

    def _bind(self, name: str, array: NDArray[Any]) -> None:
        self._binding.bind_input(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)

    def _output(self, name: str, array: NDArray[Any]) -> None:
        self._binding.bind_output(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)

    def mask(self, ones: NDArray[np.int64]) -> None:
        """Pass a mask (1, n) to a graph that still wants one."""
        if self._masked:
            self._bind(self._layout.inputs["attention_mask"], ones)

    def results(self, logits: NDArray[np.float32], states: NDArray[np.float32]) -> None:
        """Write logits (1, r, vocab) and states (1, r, width) of the last r tokens here from now on."""
        if self._results is None or self._results[0] is not logits or self._results[1] is not states:
            self._output(self._layout.outputs["logits"], logits)
            self._output(STATES, states)
            self._first_row[0] = self._tokens.shape[1] - logits.shape[1]
            self._results = (logits, states)  # kept alive as long as they are bound

    def run(self, tokens: Tokens | int, position: int) -> None:
        """Run tokens (m,), or the only one."""
        self._tokens[0] = tokens
        np.add(self._steps, position, out=self._positions[0])
        end = position + len(self._steps)
        self._last[0] = end - 1
        self._length[0] = end
        self._session.run_with_iobinding(self._binding)


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

    def _begin_cache(self) -> None:
        shape = (1, self._layout.kv_heads, max(self.max_tokens, self._layout.window), self._layout.head_dim)
        self._cache = [np.zeros(shape, np.float32) for _ in self._layout.cache_names]
        self._calls: dict[int, _Call] = {}
        self._last_row = np.empty((1, 1, self.vocab), np.float32)
        self._last_state = np.empty((1, 1, self._layout.hidden), np.float32)
        self._states = self._last_state
        self._features = np.empty((0, 0), np.float32)
        self._filled = 0

    def sibling(self) -> OnnxDecoder:
        """Return a decoder with a cache of its own on the same session: what drafts for several texts need."""
        own = copy.copy(self)
        own._begin_cache()  # noqa: SLF001 - it is one of these
        return own

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
        """Return caches for several texts at once, on a second session of the same graph, which reads the weights anew.

        Raises:
            UsageError: The graph has attention that can't be had once per text.
        """
        from optikit.runtime.decoders.onnxruntime_batch import OnnxBatch

        return OnnxBatch(self._layout, places=places, max_tokens=self.max_tokens, threads=self.threads)

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
            call = _Call(self._single if m == 1 else self._verify, self._layout, self._cache, m, self._shown)
            if m <= KEPT_CALLS:
                self._calls[m] = call
        end = position + m
        call.mask(self._mask[:, :end])
        call.results(logits, states)
        call.run(tokens, position)
        self._filled = end
        return call.shown
