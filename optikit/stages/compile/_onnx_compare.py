"""Compare what a compiled graph computes with what transformers computes with the very same weights, in float32.

`_onnx_verify` holds the weights to the source's. This holds everything else: rotary embeddings, norms, biases, masks,
scales, soft caps. So rounding is kept out of it: the model gets the weights that are in the graph, rounded or not, and
the graph is told, in memory, not to round activations. What is left is the order of float32 sums.

Tables of rotary embeddings, where the graph has them, are compared over the whole context: they are what a scaling of
positions changes most, and far positions cost nothing there.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from optikit.errors import IntegrityError
from optikit.formats.onnx_graph import EMBEDDING, HEAD, OnnxGraph
from optikit.stages.compile._logits import FIX, probe, relative_distance, short
from optikit.stages.compile._onnx_verify import GRAPH, Place, outer_names, places

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from optikit.calibration.reference_logits import ReferenceModel, Weights
    from optikit.models.facts import ModelFacts

APART = 1e-3
"""Relative distance of logits that float32 sums don't explain. Right graphs of tiny models are 2e-7 apart; rotary
embeddings that ignore a scaling 1e-2 and more."""
ROUNDED = 0.5
"""Relative distance that rounding activations to int8 doesn't explain: then a kernel is wrong on this processor."""
TABLES = {"cos_cache": 0, "sin_cache": 1}
"""Tables of rotary embeddings that the builder writes, (positions, channels / 2): the model's cosines and sines."""
ULP = 2.0**-22
"""Distance of two float32 angles relative to the position: both round the frequency and the product."""
ROWS = 4096
"""Positions compared at a time."""


def compare(source: Path, dest: Path, facts: ModelFacts, *, window: int, threads: int) -> dict[str, Any]:
    """Compare tables and logits of a graph with transformers'.

    Args:
        source: Hugging Face directory, dense or packed.
        dest: Directory with the graph.
        facts: Of the source.
        window: Tokens up to which the graph claims to be right.
        threads: CPU threads.

    Returns:
        How far apart they are, as JSON.

    Raises:
        IntegrityError: Further than float32 explains, or the kernels further than rounding does.
    """
    from optikit.calibration.reference_logits import ReferenceModel

    tokens = probe(facts, window)
    graph = OnnxGraph(dest / GRAPH)
    model = ReferenceModel(source, weights(facts, graph))
    positions = compare_tables(graph, model)
    found = _computed(dest, tokens, threads, exact=True)
    apart = relative_distance(found, model.logits(tokens))
    if not apart <= APART:
        message = (
            f"the compiled graph computes something else than the model: on {len(tokens)} tokens its logits are "
            f"{apart:.2g} of their spread apart, and float32 explains {APART:g}"
        )
        raise IntegrityError(message, fix=FIX)
    told = {"logits_compared": len(tokens), "logits_apart": short(apart), "rotary_positions_compared": positions}
    if any(product.bits < 32 for product in graph.products.values()):
        rounded = relative_distance(_computed(dest, tokens, threads, exact=False), found)
        if not rounded <= ROUNDED:
            message = f"the kernels of this processor change the logits by {rounded:.2g} of their spread"
            raise IntegrityError(message, fix="compile with accuracy_level: 1, and report the processor")
        told["activation_rounding_apart"] = short(rounded)
    return told


def compare_verify(dest: Path, facts: ModelFacts, *, window: int, threads: int) -> dict[str, Any]:
    """Compare the logits of the int8 graph with those of the first one, its activations in float32.

    Raises:
        IntegrityError: Further apart than rounding of activations and weights explains.
    """
    tokens = probe(facts, window)
    apart = relative_distance(
        _computed(dest, tokens, threads, exact=False), _computed(dest, tokens, threads, exact=True)
    )
    if not apart <= ROUNDED:
        message = f"the int8 graph changes the logits by {apart:.2g} of their spread"
        raise IntegrityError(message, fix="compile with verify: own, and report the model and the processor")
    return {"verify_apart": short(apart)}


def _computed(dest: Path, tokens: Tensor, threads: int, *, exact: bool) -> Tensor:
    """Return the graph's logits, (tokens, vocabulary)."""
    import torch

    from optikit.runtime.decoders.onnxruntime import OnnxDecoder

    decoder = OnnxDecoder(dest, threads=threads, max_tokens=len(tokens), exact=exact)
    return torch.from_numpy(decoder.forward(tokens.numpy(), 0))


def weights(facts: ModelFacts, graph: OnnxGraph) -> Weights:
    """Return what reads, for a tensor of the model, the weight that the graph has in its place.

    Norms and biases aren't among them: the source's own stand for those.
    """
    table, head = outer_names(facts)
    held = {f"{name}.weight": tuple(places(name, facts, graph)) for name in facts.linears}
    whole = (Place(product=HEAD, rows=graph.find(HEAD).rows),)
    held |= {head: whole, table: (Place(product=EMBEDDING, rows=whole[0].rows),)}
    return {name: partial(_weight, graph, parts) for name, parts in held.items()}


def _weight(graph: OnnxGraph, parts: tuple[Place, ...]) -> Tensor:
    """Return the rows of a weight, (out_features, in_features) float32."""
    import numpy as np
    import torch

    rows = [graph.weight(graph.find(p.product), p.graph_row, p.graph_row + p.rows)[0] for p in parts]
    return torch.from_numpy(np.concatenate(rows))


def compare_tables(graph: OnnxGraph, model: ReferenceModel) -> int:
    """Compare the graph's tables of rotary embeddings with the model's; return their positions, 0 without tables.

    Raises:
        IntegrityError: An angle differs by more than its rounding.
    """
    found = {name: graph.tensors[name].dims for name in TABLES if name in graph.tensors}
    for name, (count, width) in found.items():
        for start in range(0, count, ROWS):
            rows = min(ROWS, count - start)
            _compare_rows(name, start, graph.read(name, start * width, rows * width).reshape(rows, width), model)
    return max((count for count, _ in found.values()), default=0)


def _compare_rows(name: str, start: int, found: Any, model: ReferenceModel) -> None:
    import numpy as np
    import torch

    positions = np.arange(start, start + len(found), dtype=np.int64)
    wanted = model.rotary(torch.from_numpy(positions))[TABLES[name]][:, : found.shape[1]].numpy()
    rounding = 1e-5 if found.dtype == np.float32 else 1e-2  # half of bfloat16's last place is 4e-3
    apart = np.abs(found.astype(np.float32) - wanted)
    wrong = np.argwhere(~(apart <= (rounding + ULP * positions)[:, None]))
    if wrong.size:
        row, column = (int(index) for index in wrong[0])
        message = (
            f"the compiled graph rotates otherwise than the model: {name} has {found[row, column]:.6g} at position "
            f"{start + row}, channel {column}, and transformers {wanted[row, column]:.6g}"
        )
        raise IntegrityError(message, fix=FIX)
