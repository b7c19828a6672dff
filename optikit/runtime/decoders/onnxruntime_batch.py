"""`OnnxBatch`: several texts through onnxruntime at once, each at its own length.

One token of each text is the common step, and attention takes that as it is: tokens are stacked, the graph is the one
for a text alone, and the first places' caches are one buffer. A text run by itself goes as `OnnxDecoder` runs it.

Drafts that are checked are several tokens of each text. GroupQueryAttention runs several tokens behind a cache for one
text only: its description says that "`sequence_length > 1` requires `batch_size == 1`", and it refuses anything else.
So windows aren't stacked but laid end to end: all nodes but attention see one row of tokens, none of them padding. Each
attention node is put into the graph in memory once per text, on that text's part of the row and on its own key-value
buffers, which it writes in place as `OnnxDecoder` does. That graph is opened when the first such windows come.

An attention node that has no text in a forward is given the first token and a cache of one position: it refuses to run
on nothing.

Products are computed as for one text with as many tokens, so texts that are never run alone nor in odd numbers
(`min_window` 2) are those of `OnnxDecoder` with the same setting, token by token; other texts may differ where two
tokens are as likely but for rounding.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto, helper

from optikit.errors import UsageError
from optikit.runtime.decoder import Logits, Tokens, Window
from optikit.runtime.decoders.checks import check_call
from optikit.runtime.decoders.onnxruntime_session import (
    CHUNK,
    LAST,
    LENGTH,
    STATES,
    Call,
    Layout,
    drop_unread,
    find_head,
    open_session,
    read_graph,
    show_states,
)

ATTENTION = "GroupQueryAttention"
WANTED = "optikit_wanted"
"""Input that the head's rows are gathered by: indices of the tokens whose logits are wanted."""
TOTAL = "optikit_total"
"""Input: number of tokens of all texts; what attention nodes without a text give comes behind them."""
START, END = "optikit_start", "optikit_end"
"""Inputs per text: which part of the row of tokens is its own."""
ZERO, AXIS = "optikit_zero", "optikit_axis"
NOBODY = -1
"""Whose buffers an attention node without a text uses."""


class OneText(Protocol):
    """A decoder of one text whose cache others may write, too: `OnnxDecoder`."""

    max_tokens: int
    threads: int
    filled: int

    @property
    def cache(self) -> Sequence[NDArray[np.float32]]:
        """Key and value buffers."""
        ...

    @property
    def states(self) -> NDArray[np.float32]:
        """What the output head read in the last `forward`."""
        ...

    def forward(self, tokens: Tokens, position: int, rows: int | None = None) -> Logits:
        """Run tokens; see `decoder.Decoder.forward`."""
        ...

    def step(self, token: int, position: int) -> Logits:
        """Run a token; return its logits (1, vocab), which the next run overwrites."""
        ...


def _of(name: str, text: int) -> str:
    return f"{name}/text_{text}"


def attend_apart(graph: onnx.GraphProto, layout: Layout, texts: int) -> None:
    """Give each of several texts, laid end to end, attention and key-value buffers of its own.

    Raises:
        UsageError: The graph attends in a way that can't be had once per text.
    """
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        nodes.extend(_once_per_text(node, texts) if node.op_type == ATTENTION else [node])
    del graph.node[:]
    graph.node.extend(nodes)
    pasts = {past for past, _ in layout.cache_names}
    _copy_per_text(graph.input, pasts, texts)
    _copy_per_text(graph.output, {present for _, present in layout.cache_names}, texts)
    _add_inputs(graph, texts)
    mask = layout.inputs["attention_mask"]
    drop_unread(graph, mask)
    read = {name for node in graph.node for name in node.input}
    if mask in read or read & pasts:
        name = mask if mask in read else min(read & pasts)
        message = f"other nodes than {ATTENTION} read {name}: the texts of a batch can't be told apart there"
        raise UsageError(message, fix="write one text at a time")


def _copy_per_text(values: Any, shared: Collection[str], texts: int) -> None:
    """Put a copy per text in the place of those of a graph's inputs or outputs that are named."""
    kept = [each for each in values if each.name not in shared]
    copies = [_renamed(each, text) for each in values if each.name in shared for text in range(texts)]
    del values[:]
    values.extend([*kept, *copies])


def _add_inputs(graph: onnx.GraphProto, texts: int) -> None:
    """Add the inputs that say where each text lies."""
    numbers = {START: TensorProto.INT64, END: TensorProto.INT64, LAST: TensorProto.INT32, LENGTH: TensorProto.INT32}
    for text in range(texts):
        graph.input.extend(helper.make_tensor_value_info(_of(name, text), kind, [1]) for name, kind in numbers.items())
    graph.input.append(helper.make_tensor_value_info(TOTAL, TensorProto.INT64, [1]))
    graph.initializer.extend(
        helper.make_tensor(name, TensorProto.INT64, [1], [i]) for i, name in enumerate((ZERO, AXIS))
    )


def _once_per_text(node: onnx.NodeProto, texts: int) -> Iterator[onnx.NodeProto]:
    """Yield the nodes that stand for an attention node: slices, itself per text, and its outputs joined again."""
    if any(node.input[9:11]) or len(node.output) > 3:
        message = f"{node.name} takes positions or a bias of its own: the texts of a batch can't be told apart there"
        raise UsageError(message, fix="write one text at a time")
    out, *presents = node.output
    for text in range(texts):
        inputs = list(node.input)
        for i in range(3):  # query, key and value, or all of them packed in the first
            if inputs[i]:
                part = _of(f"{node.name}/input_{i}", text)
                yield helper.make_node("Slice", [inputs[i], _of(START, text), _of(END, text), AXIS], [part], name=part)
                inputs[i] = part
        inputs[3:7] = (_of(node.input[3], text), _of(node.input[4], text), _of(LAST, text), _of(LENGTH, text))
        own = onnx.NodeProto()
        own.CopyFrom(node)
        own.name = _of(node.name, text)
        del own.input[:], own.output[:]
        own.input.extend(inputs)
        own.output.extend([_of(out, text), *(_of(present, text) for present in presents)])
        yield own
    joined = f"{out}/joined"
    yield helper.make_node("Concat", [_of(out, text) for text in range(texts)], [joined], name=joined, axis=1)
    yield helper.make_node("Slice", [joined, ZERO, TOTAL, AXIS], [out], name=f"{joined}/texts")


def _renamed(value: onnx.ValueInfoProto, text: int) -> onnx.ValueInfoProto:
    """Return an input or output of one text; buffers of different texts may differ in length."""
    own = onnx.ValueInfoProto()
    own.CopyFrom(value)
    own.name = _of(value.name, text)
    own.type.tensor_type.shape.dim[2].dim_param = _of("positions", text)
    return own


def _gather_before_head(graph: onnx.GraphProto, position: int) -> None:
    """Let the head see only the tokens that input WANTED names, and show what it reads."""
    head = graph.node[position]
    graph.input.append(helper.make_tensor_value_info(WANTED, TensorProto.INT64, ["rows"]))
    rows = helper.make_node("Gather", [head.input[0], WANTED], [STATES], name=f"{WANTED}_gather", axis=1)
    head.input[0] = STATES
    graph.node.insert(position, rows)
    show_states(graph)


class EndToEnd:
    """Windows of several tokens through one graph, laid end to end; see this module.

    Args:
        layout: Of the compiled directory.
        places: Texts at once.
        threads: CPU threads.

    Raises:
        IntegrityError: A file is damaged, or onnxruntime can't run the graph.
        UsageError: The graph has attention that can't be had once per text.
    """

    def __init__(self, layout: Layout, places: int, threads: int) -> None:
        model = read_graph(layout.verify or layout.graph)  # texts together are several tokens at once
        _gather_before_head(model.graph, find_head(model.graph, layout.graph))
        attend_apart(model.graph, layout, places)
        self._layout, self._places = layout, places
        self._session = open_session(model, layout, threads, spinning=True)
        self._binding = self._session.io_binding()
        self._positioned = "position_ids" in {each.name for each in self._session.get_inputs()}
        shape = (1, layout.kv_heads, 1, layout.head_dim)
        self._nobody = [np.zeros(shape, np.float32) for _ in layout.cache_names]
        self._attends: list[int | None] = [None] * places
        self._total = np.zeros(1, np.int64)
        self._parts = np.zeros((2, places, 1), np.int64)
        self._lengths = np.zeros((2, places, 1), np.int32)
        self._bind(TOTAL, self._total)
        numbers: dict[str, NDArray[Any]]
        numbers = {START: self._parts[0], END: self._parts[1], LAST: self._lengths[0], LENGTH: self._lengths[1]}
        for name, of_texts in numbers.items():
            for text in range(places):
                self._bind(_of(name, text), of_texts[text])

    def _bind(self, name: str, array: NDArray[Any]) -> None:
        self._binding.bind_input(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)

    def _output(self, name: str, array: NDArray[Any]) -> None:
        self._binding.bind_output(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)

    def run(self, windows: Sequence[Window], caches: Sequence[OneText]) -> tuple[Logits, NDArray[np.float32]]:
        """Run windows; return the wanted logits (sum of rows, vocab) of all of them, and what the head read for them.

        Args:
            windows: Of different texts.
            caches: Whose buffers belong to each place.
        """
        ends = np.cumsum([len(each.tokens) for each in windows])
        self._attend(windows, ends, caches)
        tokens = np.concatenate([each.tokens for each in windows])[None]
        self._bind(self._layout.inputs["input_ids"], tokens)
        positions = np.concatenate([each.position + np.arange(len(each.tokens)) for each in windows])[None]
        if self._positioned:
            self._bind("position_ids", positions)
        wanted = np.concatenate([np.arange(end - each.rows, end) for end, each in zip(ends, windows, strict=True)])
        self._bind(WANTED, wanted)
        logits = np.empty((1, len(wanted), self._layout.vocab), np.float32)
        states = np.empty((1, len(wanted), self._layout.hidden), np.float32)
        self._output(self._layout.outputs["logits"], logits)
        self._output(STATES, states)
        self._session.run_with_iobinding(self._binding)
        return logits[0], states[0]

    def _attend(self, windows: Sequence[Window], ends: NDArray[np.int64], caches: Sequence[OneText]) -> None:
        """Tell each attention node whose tokens and whose buffers it works on."""
        self._total[0] = ends[-1]
        self._parts[:, :, 0] = [[0], [1]]
        self._lengths[:, :, 0] = [[0], [1]]
        for text, (each, end) in enumerate(zip(windows, ends, strict=True)):
            length = each.position + len(each.tokens)
            self._parts[:, text, 0] = end - len(each.tokens), end
            self._lengths[:, text, 0] = length - 1, length
        places = [each.place for each in windows] + [NOBODY] * (self._places - len(windows))
        for text, place in enumerate(places):
            if self._attends[text] != place:
                self._attends[text] = place
                buffers = self._nobody if place == NOBODY else caches[place].cache
                for (past, present), buffer in zip(self._layout.cache_names, buffers, strict=True):
                    self._bind(_of(past, text), buffer)
                    self._output(_of(present, text), buffer)


class _Stacked:
    """A call of some texts of one token each, with the arrays that its results are written to every time.

    New arrays of this size are new pages every time, and binding them takes as long as the rest of the call in Python.
    """

    def __init__(self, call: Call, layout: Layout, count: int) -> None:
        self._call = call
        self._logits = np.empty((count, 1, layout.vocab), np.float32)
        self.states = np.empty((count, 1, layout.hidden), np.float32)
        call.results(self._logits, self.states)

    def run(self, tokens: Sequence[int], positions: Sequence[int]) -> Logits:
        """Run a token of each text; return the logits (texts, vocab), which the next run overwrites."""
        self._call.run_stacked(np.array(tokens), np.array(positions))
        logits: Logits = self._logits[:, 0]
        return logits


class OnnxBatch:
    """Caches for several texts; see `decoder.BatchDecoder`.

    Args:
        layout: Of the compiled directory.
        alone: A decoder of one text for each place, on one session, with the place's part of `cache`.
        cache: Key and value buffers (places, kv_heads, positions, head_dim).
        stacking: Session that runs a token of each of the first texts.

    Raises:
        IntegrityError: A file is damaged, or onnxruntime can't run the graph.
        UsageError: The graph has attention that can't be had once per text, or there is no place.
    """

    runtime = "onnxruntime"

    def __init__(
        self,
        layout: Layout,
        alone: Sequence[OneText],
        cache: Sequence[NDArray[np.float32]],
        stacking: onnxruntime.InferenceSession,
    ) -> None:
        self.places = len(alone)
        if self.places < 1:
            raise UsageError(f"a batch of {self.places} texts holds none", fix="use 1 or more")
        self.max_tokens, self.vocab = alone[0].max_tokens, layout.vocab
        self._layout, self._alone, self._cache, self._stacking = layout, list(alone), cache, stacking
        self._stacked: dict[int, _Stacked] = {}
        self._stacks = layout.inputs["attention_mask"] not in {each.name for each in stacking.get_inputs()}
        self._end_to_end: EndToEnd | None = None
        if not self._stacks:
            self._end_to_end = self._opened()
        self._first_rows = np.zeros(1, np.int64)
        self._states = np.empty((1, layout.hidden), np.float32)

    def _opened(self) -> EndToEnd:
        """Return the session for windows of several tokens, which is opened when the first ones come."""
        return self._end_to_end or EndToEnd(self._layout, self.places, self._alone[0].threads)

    def forward(self, windows: Sequence[Window]) -> list[Logits]:
        """Run windows of different texts; see `decoder.BatchDecoder.forward`."""
        for place, tokens, position, rows in windows:
            filled = self._alone[place].filled
            check_call(tokens, position, rows=rows, filled=filled, vocab=self.vocab, max_tokens=self.max_tokens)
        if len(windows) == 1:
            return [self._run_alone(windows[0])]
        if self._stacks and all(len(each.tokens) == 1 and each.place == i for i, each in enumerate(windows)):
            logits = self._run_stacked(windows)
        else:
            last = [self._run_beginning(each) for each in windows]
            self._end_to_end = self._opened()
            logits, self._states = self._end_to_end.run(last, self._alone)
        for each in windows:
            self._alone[each.place].filled = each.position + len(each.tokens)
        rows_before = np.cumsum([0, *(each.rows for each in windows)])
        self._first_rows = rows_before
        return np.split(logits, rows_before[1:-1])

    def _run_alone(self, window: Window) -> Logits:
        """Run a text without others; return its logits (rows, vocab)."""
        decoder = self._alone[window.place]
        if len(window.tokens) == 1:
            logits = decoder.step(int(window.tokens[0]), window.position)
        else:
            logits = decoder.forward(window.tokens, window.position, window.rows)
        self._states, self._first_rows = decoder.states[0], np.zeros(1, np.int64)
        return logits

    def _run_stacked(self, windows: Sequence[Window]) -> Logits:
        """Run a token of each text: attention takes several texts where each brings one."""
        count = len(windows)
        if count not in self._stacked:
            cache = [part[:count] for part in self._cache]
            self._stacked[count] = _Stacked(Call(self._stacking, self._layout, cache, 1), self._layout, count)
        stacked = self._stacked[count]
        logits = stacked.run([int(each.tokens[0]) for each in windows], [each.position for each in windows])
        self._states = stacked.states[:, 0].copy()
        return logits

    def _run_beginning(self, window: Window) -> Window:
        """Run a long window but for its last chunk, whose logits alone are wanted; return what is left."""
        place, tokens, position, rows = window
        while len(tokens) - CHUNK >= rows:
            self._alone[place].forward(tokens[:CHUNK], position, 1)
            tokens, position = tokens[CHUNK:], position + CHUNK
        return Window(place, tokens, position, rows)

    def hidden(self, window: int, row: int) -> NDArray[np.float32]:
        """Return what the output head read for a row of a window's logits; see `batch_loop.HiddenBatchDecoder`."""
        state: NDArray[np.float32] = self._states[self._first_rows[window] + row]
        return state

    def move(self, source: int, target: int) -> None:
        """Put the cache of `source` in that of `target`; see `decoder.BatchDecoder.move`. What is filled is copied."""
        filled = self._alone[source].filled
        for part in self._cache:
            part[target, :, :filled] = part[source, :, :filled]
        self._alone[target].filled, self._alone[source].filled = filled, 0
