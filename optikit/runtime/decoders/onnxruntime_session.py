"""A directory of the onnxruntime-genai builder: its layout, its graph, changed in memory, and a session on that.

The files stay as they are. `onnx_decoder` and `onnx_batch` say which changes they want, and run what comes of them.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from google.protobuf.message import DecodeError
from numpy.typing import NDArray
from onnxruntime.capi import onnxruntime_pybind11_state as native

from optikit.errors import InputMissingError, IntegrityError
from optikit.models.onnx_files import VERIFY
from optikit.runtime.decoder import Tokens

CONFIG = "genai_config.json"
HEAD = "/lm_head/MatMul"
FIRST_ROW = "optikit_first_row"
"""Input that the slice before the head reads: index of the first token whose logits are wanted."""
LAST, LENGTH = "optikit_last_position", "optikit_length"
"""Inputs that attention reads: index of the newest token, and number of tokens with it."""
STATES = "optikit_states"
"""Output of that slice: what the head reads, one row per row of logits."""
FAILURES = tuple(each for each in vars(native).values() if isinstance(each, type) and issubclass(each, Exception))
"""What onnxruntime raises: classes without a common base of their own."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What genai_config.json says of a decoder graph: names of its inputs and outputs, shape of its cache.

    Attributes:
        window: Attention window in tokens, 0 without one: the least places that its kernel takes of a cache.
        verify: A graph of the same model for several tokens at once; None where there is none.
    """

    graph: Path
    layers: int
    kv_heads: int
    head_dim: int
    vocab: int
    hidden: int
    context: int
    inputs: Mapping[str, str]
    outputs: Mapping[str, str]
    window: int = 0
    verify: Path | None = None

    @property
    def cache_names(self) -> Iterator[tuple[str, str]]:
        """Yield (past, present) of every key and value tensor."""
        for layer in range(self.layers):
            for kind in ("key", "value"):
                yield self.inputs[f"past_{kind}_names"] % layer, self.outputs[f"present_{kind}_names"] % layer


def read_layout(directory: Path) -> Layout:
    """Read genai_config.json.

    Raises:
        InputMissingError: There is none, or the graph that it names isn't there.
        IntegrityError: It isn't what onnxruntime-genai writes.
    """
    path = directory / CONFIG
    if not path.is_file():
        raise InputMissingError(f"{directory} has no {CONFIG}", fix="give a directory that `compile` wrote")
    try:
        model = json.loads(path.read_text(encoding="utf-8"))["model"]
        decoder = model["decoder"]
        layout = Layout(
            graph=directory / Path(decoder["filename"]).name,
            layers=int(decoder["num_hidden_layers"]),
            kv_heads=int(decoder["num_key_value_heads"]),
            head_dim=int(decoder["head_size"]),
            vocab=int(model["vocab_size"]),
            hidden=int(decoder["hidden_size"]),
            context=int(model["context_length"]),
            inputs=decoder["inputs"],
            outputs=decoder["outputs"],
            window=int(decoder.get("sliding_window", {}).get("window_size", 0)),
            verify=directory / VERIFY if (directory / VERIFY).is_file() else None,
        )
    except (ValueError, KeyError, TypeError) as error:
        message = f"{path} isn't a decoder's configuration: {type(error).__name__}: {error}"
        raise IntegrityError(message, fix="compile the model again") from error
    if not layout.graph.is_file():
        raise InputMissingError(f"{directory} has no {layout.graph.name}", fix="compile the model again")
    return layout


def read_graph(path: Path) -> onnx.ModelProto:
    """Return a graph without its weights.

    Raises:
        IntegrityError: The file is damaged.
    """
    try:
        return onnx.load(str(path), load_external_data=False)
    except DecodeError as error:
        raise IntegrityError(f"{path} is not an ONNX file: {error}", fix="compile the model again") from error


def stored_dtype(graph: onnx.GraphProto) -> str:
    """Return how most products of a graph store their weights: `int4`, `int8` or `float32`."""
    bits = Counter(
        next(attribute.i for attribute in node.attribute if attribute.name == "bits")
        for node in graph.node
        if node.op_type == "MatMulNBits"
    )
    return f"int{bits.most_common(1)[0][0]}" if bits else "float32"


def keep_activations(graph: onnx.GraphProto) -> None:
    """Let quantized products take their inputs as float32, where they would round them to int8."""
    for node in graph.node:
        for attribute in node.attribute:
            if node.op_type == "MatMulNBits" and attribute.name == "accuracy_level":
                attribute.i = 1


def find_head(graph: onnx.GraphProto, where: Path) -> int:
    """Return the index of the output head's node.

    Raises:
        IntegrityError: There is none.
    """
    position = next((i for i, node in enumerate(graph.node) if node.name.startswith(HEAD)), None)
    if position is None:
        raise IntegrityError(f"{where} has no node {HEAD}", fix="compile the model with onnxruntime-genai's builder")
    return position


def slice_before_head(graph: onnx.GraphProto, where: Path) -> None:
    """Let the head see only the rows from input FIRST_ROW on, and show them as output STATES."""
    position = find_head(graph, where)
    head = graph.node[position]
    ends = onnx.helper.make_tensor(f"{FIRST_ROW}_end", onnx.TensorProto.INT64, [1], [np.iinfo(np.int64).max])
    axis = onnx.helper.make_tensor(f"{FIRST_ROW}_axis", onnx.TensorProto.INT64, [1], [1])
    graph.initializer.extend([ends, axis])
    graph.input.append(onnx.helper.make_tensor_value_info(FIRST_ROW, onnx.TensorProto.INT64, [1]))
    rows = onnx.helper.make_node(
        "Slice", [head.input[0], FIRST_ROW, ends.name, axis.name], [STATES], name=f"{FIRST_ROW}_slice"
    )
    head.input[0] = rows.output[0]
    graph.node.insert(position, rows)
    show_states(graph)


def show_states(graph: onnx.GraphProto) -> None:
    """Make what the head reads an output, and say that there are as many rows of logits."""
    graph.output.append(onnx.helper.make_tensor_value_info(STATES, onnx.TensorProto.FLOAT, ["texts", "rows", None]))
    for output in graph.output:
        if output.name == "logits":
            output.type.tensor_type.shape.dim[1].dim_param = "rows"


def pass_lengths(graph: onnx.GraphProto, mask: str) -> None:
    """Let attention read inputs LAST and LENGTH; take out the mask and what counts it, unless others read it, too."""
    for node in graph.node:
        if node.op_type == "GroupQueryAttention":
            node.input[5], node.input[6] = LAST, LENGTH
    for name, shape in ((LAST, ["texts"]), (LENGTH, [1])):
        graph.input.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.INT32, shape))
    drop_unread(graph, mask)


def show_inputs(graph: onnx.GraphProto, blocks: Sequence[int], where: Path) -> tuple[str, ...]:
    """Make what some blocks are given, (1, m, width) each, outputs of the graph; return their names.

    Raises:
        IntegrityError: A block has no such tensor.
    """
    found = []
    for block in blocks:
        start = f"/model/layers.{block}/input_layernorm/"
        norm = next((node for node in graph.node if node.name.startswith(start)), None)
        if norm is None or not (norm.op_type.startswith("Skip") or norm.op_type == "SimplifiedLayerNormalization"):
            message = f"{where} doesn't show what block {block} is given"
            raise IntegrityError(message, fix="speculate by lookup or a draft model, which don't read it")
        # A skip's sum is its fourth output; the first block's norm has no skip before it.
        found.append(norm.output[3] if norm.op_type.startswith("Skip") else norm.input[0])
    for name in found:
        graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, "tokens", None]))
    return tuple(found)


def drop_unread(graph: onnx.GraphProto, mask: str) -> None:
    """Take out nodes that nobody reads, and the mask if they were the only ones to read it."""
    needed = {each.name for each in graph.output}
    live = []
    for node in reversed(graph.node):
        if needed.intersection(node.output):
            needed.update(_reads(node))
            live.append(node)
    wanted = [each for each in graph.input if each.name in needed or each.name != mask]
    del graph.node[:], graph.input[:]
    graph.node.extend(reversed(live))
    graph.input.extend(wanted)


def _reads(node: onnx.NodeProto) -> Iterator[str]:
    """Yield the names that a node reads, those inside its branches included."""
    yield from node.input
    for attribute in node.attribute:
        for inner in attribute.g.node:
            yield from _reads(inner)


def open_session(
    model: onnx.ModelProto, layout: Layout, threads: int, *, spinning: bool
) -> onnxruntime.InferenceSession:
    """Load a graph, changed in memory, with the weights that lie beside it.

    Raises:
        IntegrityError: onnxruntime can't.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    if not spinning:
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if layout.verify is not None:  # two sessions take turns: threads of the one may not spin while the other runs
        options.add_session_config_entry("session.force_spinning_stop", "1")
    options.log_severity_level = 3  # errors come as exceptions; warnings are not the user's to act on
    folder = str(layout.graph.parent.resolve())
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", folder)
    try:
        return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except FAILURES as error:
        message = f"onnxruntime can't load {layout.graph}: {error}"
        raise IntegrityError(message, fix="compile the model again") from error


CHUNK = 256
"""Tokens per call of a longer sequence: bounds the activations, and is large enough for full speed."""


class Call:
    """The inputs and outputs of a run of m tokens, bound by address; of one text, or of several stacked ones.

    Args:
        session: Of a graph that `pass_lengths` and `slice_before_head` have changed.
        layout: Of the directory.
        cache: Key and value buffers (texts, kv_heads, positions, head_dim).
        m: Tokens of each text.
        shown: Further outputs.
    """

    def __init__(
        self,
        session: onnxruntime.InferenceSession,
        layout: Layout,
        cache: Sequence[NDArray[Any]],
        m: int,
        shown: Sequence[str] = (),
    ) -> None:
        self._session = session
        self._layout = layout
        self._binding = session.io_binding()
        texts = len(cache[0])
        self._tokens = np.zeros((texts, m), np.int64)
        self._positions = np.zeros((texts, m), np.int64)
        self._steps = np.arange(m)
        self._first_row = np.zeros(1, np.int64)
        self._last, self._length = np.zeros(texts, np.int32), np.zeros(1, np.int32)
        self._results: tuple[NDArray[Any], NDArray[Any]] | None = None
        wanted = {each.name for each in session.get_inputs()}
        self.masked = layout.inputs["attention_mask"] in wanted
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
        if self.masked:
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

    def run_stacked(self, tokens: Tokens, positions: NDArray[np.int64]) -> None:
        """Run one token of each text (texts,), at its position."""
        self._tokens[:, 0] = tokens
        self._positions[:, 0] = positions
        self._last[:] = positions
        self._length[0] = positions.max() + 1
        self._session.run_with_iobinding(self._binding)
