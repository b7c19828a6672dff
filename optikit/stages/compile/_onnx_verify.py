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
from optikit.formats.onnx_graph import EMBEDDING, HEAD, OnnxGraph

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from optikit.models.facts import ModelFacts

GRAPH = "model.onnx"
PACKED_TOGETHER = ("q_proj", "k_proj", "v_proj")
"""Linears that the builder joins to one product, in this order."""
ROWS = 4096
"""Rows compared at a time: bounds the memory."""
STEPS = 1.001
"""Where the engine rounds by itself, no weight may move further than one step of its grid (and float32's rounding)."""
CLIPPED_STEPS = 2.5
"""And where scales of 4-bit rows were searched, the largest weights of a group may be clipped, too."""


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
    graph = OnnxGraph(dest / GRAPH)
    held = {f"{name}.weight": tuple(places(name, facts, graph)) for name in facts.linears}
    _check_products(held, graph)
    distances = _distances(source, held, graph, facts, exact=exact)
    missing = next((name for name in (*held, HEAD, EMBEDDING) if name not in distances), None)
    if missing is not None:
        raise StageFailedError(f"{missing} is in the graph, but not in the source", fix="check the model directory")
    return {
        "linears_compared": len(held),
        "linears_bit_equal": len(held) if exact else 0,
        "linears_largest_steps": round(max(distances[name] for name in held), 4),
        "head": _stored(graph.find(HEAD).bits),
        "head_largest_steps": round(distances[HEAD], 4),
        "embedding": "the head's" if graph.embedding == graph.find(HEAD) else _stored(graph.find(EMBEDDING).bits),
        "embedding_largest_steps": round(distances[EMBEDDING], 4),
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
            steps = _distance(name, tensor, place, graph, allowed=0 if exact else STEPS)
            distances[name] = max(distances.get(name, 0.0), steps)
        if name == table:
            distances[EMBEDDING] = _whole_distance(name, tensor, EMBEDDING, graph)
        if name == head:
            distances[HEAD] = _whole_distance(name, tensor, HEAD, graph)
    return distances


def _whole_distance(name: str, tensor: Tensor, where: str, graph: OnnxGraph) -> float:
    """Return how far the embedding or the head is from the source's, in steps of its own grid."""
    product = graph.find(where)
    allowed = {32: 0.0, 4: CLIPPED_STEPS}.get(product.bits, STEPS)
    if product.rows != len(tensor):
        message = f"{name} has {product.rows} rows in the graph, and {len(tensor)} in the source"
        raise StageFailedError(message, fix="report it with the builder's log")
    return _distance(name, tensor, Place(product=where, rows=product.rows), graph, allowed=allowed)


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


def _distance(name: str, tensor: Tensor, place: Place, graph: OnnxGraph, *, allowed: float) -> float:
    """Return how far the graph's weight is from the source's, in steps of the graph's grid.

    Raises:
        StageFailedError: Further than allowed.
    """
    import numpy as np

    product, largest = graph.find(place.product), 0.0
    for start in range(0, place.rows, ROWS):
        stop = min(start + ROWS, place.rows)
        wanted = tensor[place.source_row + start : place.source_row + stop].float().numpy()
        found, steps = graph.weight(product, place.graph_row + start, place.graph_row + stop)
        apart = np.abs(found - wanted) if found.shape == wanted.shape else np.full(1, np.inf)
        wrong = ~(apart <= allowed * steps)  # a NaN is wrong, too
        if wrong.any():
            message = f"{name}: {wrong.sum()} of {wrong.size} weights in the graph differ, the worst by {apart.max():g}"
            raise StageFailedError(message, fix="report it with the builder's log; its repacking isn't exact here")
        relative = np.divide(apart, steps, out=np.zeros_like(apart), where=steps > 0)
        largest = max(largest, float(relative.max(initial=0.0)))
    return largest
