"""Compare the weights in a compiled graph with those it was compiled from.

The source is unpacked by `optikit.formats`, the graph by an unpacker of its own: two pieces of code that share nothing
have to agree on every weight. (`onnx.checker` can't judge these graphs: they use operators that only onnxruntime has.)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from optikit.errors import StageFailedError

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from optikit.formats.onnx_graph import OnnxGraph
    from optikit.models.facts import ModelFacts

GRAPH = "model.onnx"
HEAD = "/lm_head/MatMul"
EMBEDDING = "/model/embed_tokens/"
TABLE = "model.embed_tokens.weight"
PACKED_TOGETHER = ("q_proj", "k_proj", "v_proj")
"""Linears that the builder joins to one product, in this order."""
ROWS = 4096
"""Rows compared at a time: bounds the memory."""
STEPS = 1.001
"""Where the engine rounds by itself, no weight may move further than one step of its grid (and float32's rounding)."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where rows of a source linear lie in the graph: `rows` of them, at `source_row` there and at `graph_row` here."""

    product: str
    rows: int
    source_row: int = 0
    graph_row: int = 0


def compare(source: Path, dest: Path, facts: ModelFacts, *, exact: bool) -> dict[str, Any]:
    """Compare every linear, the head and the embedding of a graph with the directory it was built from.

    Args:
        source: Hugging Face directory, dense or packed.
        dest: Directory with the graph.
        facts: Of the source.
        exact: The linears must be bit-equal at float32; otherwise within one step of the engine's own rounding.

    Returns:
        What was compared, as JSON: linears, and the largest distance in steps of the grid.

    Raises:
        StageFailedError: The graph lacks a linear, or holds another weight; the message names it.
    """
    from optikit.formats.onnx_graph import OnnxGraph

    graph = OnnxGraph(dest / GRAPH)
    held = {f"{name}.weight": tuple(places(name, facts, graph)) for name in facts.linears}
    _check_products(held, graph)
    distances = _distances(source, held, graph, facts, exact=exact)
    missing = next((name for name in (*held, HEAD) if name not in distances), None)
    if missing is not None:
        raise StageFailedError(f"{missing} is in the graph, but not in the source", fix="check the model directory")
    return {
        "linears_compared": len(held),
        "linears_bit_equal": len(held) if exact else 0,
        "linears_largest_steps": round(max(distances[name] for name in held), 4),
        "head": _stored(graph.products[HEAD].bits),
        "head_largest_steps": round(distances[HEAD], 4),
        "embedding": "float32" if TABLE in graph.tensors else "the head's",
    }


def _distances(
    source: Path, held: Mapping[str, Sequence[Place]], graph: OnnxGraph, facts: ModelFacts, *, exact: bool
) -> dict[str, float]:
    """Return how far each linear and the head are from the source's, in steps of the grid; check the embedding."""
    from optikit.formats import dequantized_state

    table, own = outer_names(facts)
    head = table if facts.tied else own
    distances: dict[str, float] = {}
    for name, tensor in dequantized_state(source):
        for place in held.get(name, ()):
            steps = _distance(name, tensor, place, graph, exact=exact)
            distances[name] = max(distances.get(name, 0.0), steps)
        if name == table:
            _check_embedding(name, tensor, graph)
        if name == head:
            product = graph.products[HEAD]
            whole = Place(product=HEAD, rows=product.rows)
            distances[HEAD] = _distance(name, tensor, whole, graph, exact=product.bits == 32)
    return distances


def _stored(bits: int) -> str:
    return "float32" if bits == 32 else f"int{bits}"


def outer_names(facts: ModelFacts) -> tuple[str, str]:
    """Return the model's names of the embedding and of the head; where they are tied, the source has the first only."""
    row = facts.architecture
    if row is None:
        raise StageFailedError(f"model_type {facts.model_type!r} is unknown", fix="add it to architectures.toml")
    return f"{row.embedding}.weight", f"{row.head}.weight"


def places(name: str, facts: ModelFacts, graph: OnnxGraph) -> Iterator[Place]:
    """Yield where a linear of the source lies in the graph."""
    block, part, leaf = name.rsplit(".", 2)
    stem = f"/{block.replace('.layers', '/layers')}/{part.replace('self_attn', 'attn')}"
    rows = facts.linears[name][0]
    if f"{stem}/{leaf}/MatMul" in graph.products:
        yield Place(product=f"{stem}/{leaf}/MatMul", rows=rows)
    elif leaf in PACKED_TOGETHER:
        before = takewhile(lambda other: other != leaf, PACKED_TOGETHER)
        offset = sum(facts.linears[f"{block}.{part}.{other}"][0] for other in before)
        yield Place(product=f"{stem}/qkv_proj/MatMul", rows=rows, graph_row=offset)
    elif leaf == "gate_up_proj":
        half = rows // 2
        yield Place(product=f"{stem}/gate_proj/MatMul", rows=half)
        yield Place(product=f"{stem}/up_proj/MatMul", rows=half, source_row=half)
    else:
        raise StageFailedError(f"{name} isn't in the graph", fix="report it with the builder's log")


def _check_products(places: Mapping[str, tuple[Place, ...]], graph: OnnxGraph) -> None:
    """Refuse a graph with products that no linear of the source explains, or with rows that none fills."""
    filled = dict.fromkeys(graph.products, 0)
    for name, each in places.items():
        for place in each:
            if place.product not in filled:
                raise StageFailedError(f"{name} isn't in the graph", fix="report it with the builder's log")
            filled[place.product] += place.rows
    for name, rows in filled.items():
        wanted = graph.products[name].rows
        if name != HEAD and rows != wanted:
            message = f"{name} has {wanted} rows in the graph, and {rows} in the source"
            raise StageFailedError(message, fix="report it with the builder's log")


def _distance(name: str, tensor: Tensor, place: Place, graph: OnnxGraph, *, exact: bool) -> float:
    """Return how far the graph's weight is from the source's, in steps of the graph's grid.

    Raises:
        StageFailedError: Further than allowed.
    """
    import numpy as np

    product, largest = graph.products[place.product], 0.0
    for start in range(0, place.rows, ROWS):
        stop = min(start + ROWS, place.rows)
        wanted = tensor[place.source_row + start : place.source_row + stop].float().numpy()
        found, steps = graph.weight(product, place.graph_row + start, place.graph_row + stop)
        apart = np.abs(found - wanted) if found.shape == wanted.shape else np.full(1, np.inf)
        wrong = ~(apart <= (0 if exact else STEPS * steps))  # a NaN is wrong, too
        if wrong.any():
            message = f"{name}: {wrong.sum()} of {wrong.size} weights in the graph differ, the worst by {apart.max():g}"
            raise StageFailedError(message, fix="report it with the builder's log; its repacking isn't exact here")
        relative = np.divide(apart, steps, out=np.zeros_like(apart), where=steps > 0)
        largest = max(largest, float(relative.max(initial=0.0)))
    return largest


def _check_embedding(name: str, tensor: Tensor, graph: OnnxGraph) -> None:
    """Refuse an embedding that is neither the source's, bit by bit, nor looked up in the head's own tensors."""
    import numpy as np

    if TABLE in graph.tensors:
        columns = tensor.shape[1]
        for start in range(0, len(tensor), ROWS):
            wanted = tensor[start : start + ROWS].float().numpy()
            found = graph.read(TABLE, start * columns, wanted.size).reshape(wanted.shape)
            if not np.array_equal(found, wanted):
                raise StageFailedError(f"{name} differs in the graph", fix="report it with the builder's log")
        return
    head = graph.products[HEAD]
    read = {each for node in graph.model.graph.node if node.name.startswith(EMBEDDING) for each in node.input}
    if not {head.weight, *filter(None, (head.scales, head.zeros))} <= read:
        raise StageFailedError("the embedding isn't looked up in the head's weights", fix="report it with the log")
