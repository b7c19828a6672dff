"""`OpenVinoDecoder`: OpenVINO itself on an IR that optimum-intel exported, cache and all inside the graph.

- The cache is the graph's own state: a step passes tokens and positions and nothing else.
- Rolling back cuts that state, which copies it: cheap for short texts, and nothing while decoding plainly.
- Before the output head a slice is put into the graph in memory (the file stays as it is): a prompt computes logits for
  its last token only.

Where the processor has bf16 arithmetic, OpenVINO uses it, whatever dtype the weights are stored in; with one thread it
is told not to.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from optikit import host
from optikit.errors import InputMissingError, IntegrityError, UnavailableError, UsageError
from optikit.runtime.decoder import Logits, Tokens
from optikit.runtime.decoders.checks import check_call, check_room

if TYPE_CHECKING:
    import openvino

MODEL = "openvino_model.xml"
FIRST_ROW = "optikit_first_row"
"""Input that the slice before the head reads: index of the first token whose logits are wanted."""
CHUNK = 256
"""Tokens per call of a longer sequence: bounds the activations."""
STORED = {"i4": "int4", "u4": "int4", "i8": "int8", "u8": "int8", "f16": "float16", "bf16": "bfloat16"}
"""Element type of constants → dtype as reports name it; anything else is float32."""


def _library() -> Any:
    try:
        import openvino
    except ImportError as error:
        message = f"this directory is served by OpenVINO, which doesn't load: {error}"
        raise UnavailableError(message, fix="pip install 'optikit[openvino]'") from error
    return openvino


def settings(threads: int) -> dict[str, Any]:
    """Return how to compile for a number of threads.

    With one thread, OpenVINO 2026.4 dies of a division by zero (SIGFPE) in attention where it computes in bf16; float32
    arithmetic doesn't.
    """
    chosen: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads}
    return chosen | ({"INFERENCE_PRECISION_HINT": "f32"} if threads == 1 else {})


def stored_dtype(model: openvino.Model) -> str:
    """Return how most of a graph's constants are stored, by number of elements: `int8`, `int4`, `float32`, …."""
    sizes: Counter[str] = Counter()
    for node in model.get_ops():
        if node.get_type_name() == "Constant":
            shape = node.get_output_shape(0)
            sizes[STORED.get(node.get_element_type().get_type_name(), "float32")] += int(np.prod(shape))
    return sizes.most_common(1)[0][0]


def _slice_before_head(model: openvino.Model, where: Path) -> None:
    """Let the head see only the rows from input FIRST_ROW on."""
    from openvino import opset13

    head = model.output("logits").get_node().input_value(0).get_node()
    while head.get_type_name() == "Convert":
        head = head.input_value(0).get_node()
    if head.get_type_name() != "MatMul":
        raise IntegrityError(f"{where} ends in {head.get_type_name()}, not in its output head", fix="compile it again")
    first = opset13.parameter([1], np.int64, name=FIRST_ROW)
    first.output(0).get_tensor().set_names({FIRST_ROW})
    end, step, axis = (np.array([value], np.int64) for value in (np.iinfo(np.int64).max, 1, 1))
    rows = opset13.slice(head.input_value(0), first, end, step, axis)
    head.input(0).replace_source_output(rows.output(0))
    model.add_parameters([first])
    model.validate_nodes_and_infer_types()


def _context(directory: Path) -> int:
    path = directory / "config.json"
    try:
        return int(json.loads(path.read_text(encoding="utf-8"))["max_position_embeddings"])
    except FileNotFoundError as error:
        raise InputMissingError(f"{directory} has no config.json", fix="compile the model again") from error
    except (ValueError, KeyError, TypeError) as error:
        raise IntegrityError(f"{path} names no max_position_embeddings", fix="compile the model again") from error


class OpenVinoDecoder:
    """A compiled model with its cache; see `decoder.Decoder`.

    Args:
        directory: What `compile: {engine: openvino}` wrote, or any decoder with a state that optimum-intel exported.
        dtype: `auto`, or the dtype that the weights must have.
        threads: CPU threads; None is all that this process may use.
        max_tokens: Longest sequence; None is the model's context.

    Raises:
        InputMissingError: A file is missing.
        IntegrityError: A file is damaged, or OpenVINO can't run the graph.
        UnavailableError: OpenVINO isn't installed.
        UsageError: The graph has another dtype, or a shorter context than `max_tokens`.
    """

    runtime = "openvino"

    def __init__(
        self, directory: Path, *, dtype: str = "auto", threads: int | None = None, max_tokens: int | None = None
    ) -> None:
        path = directory / MODEL
        if not path.is_file():
            raise InputMissingError(f"{directory} has no {MODEL}", fix="give a directory that `compile` wrote")
        context = _context(directory)
        if max_tokens is not None and max_tokens > context:
            message = f"max_tokens {max_tokens} is beyond the model's context of {context} tokens"
            raise UsageError(message, fix=f"use {context} or less")
        self.max_tokens = max_tokens or context
        self.threads = threads or host.threads()
        self._library = _library()
        compiled = self._compile(path, dtype)
        self.vocab = int(compiled.output("logits").get_partial_shape()[2].get_length())
        self._named = {name for each in compiled.inputs for name in each.get_names()}
        self._request = compiled.create_infer_request()
        self._filled = 0

    def _compile(self, path: Path, dtype: str) -> openvino.CompiledModel:
        core = self._library.Core()
        try:
            model = core.read_model(path)
            self.dtype = stored_dtype(model)
            if dtype not in ("auto", self.dtype):
                message = f"{path.parent} holds {self.dtype} weights, not {dtype}"
                raise UsageError(message, fix=f"use dtype auto or {self.dtype}")
            _slice_before_head(model, path)
            return core.compile_model(model, "CPU", settings(self.threads))
        except RuntimeError as error:
            raise IntegrityError(f"OpenVINO can't load {path}: {error}", fix="compile the model again") from error

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

    def _cut(self, position: int) -> None:
        """Keep the first `position` tokens of the cache."""
        if position == self._filled:
            return
        if position == 0:
            self._request.reset_state()
        else:
            for each in self._request.query_state():
                kept = np.ascontiguousarray(each.state.data[:, :, :position])
                each.state = self._library.Tensor(kept)
        self._filled = position

    def _run(self, tokens: Tokens, rows: int) -> Logits:
        """Run tokens (m,) after what the cache holds; return the logits of the last rows, (rows, vocab)."""
        end = self._filled + len(tokens)
        inputs = {
            "input_ids": tokens[None],
            "attention_mask": np.ones((1, end), np.int64),
            "position_ids": np.arange(self._filled, end, dtype=np.int64)[None],
            "beam_idx": np.zeros(1, np.int32),
            FIRST_ROW: np.array([len(tokens) - rows], np.int64),
        }
        self._request.infer({name: value for name, value in inputs.items() if name in self._named})
        self._filled = end
        logits: Logits = self._request.get_tensor("logits").data[0]
        return logits
