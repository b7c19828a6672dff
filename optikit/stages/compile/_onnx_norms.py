"""Norms whose stored weight has a number added before it multiplies (Gemma: 1), written into a graph as they are.

onnxruntime-genai's builder adds in the dtype of the checkpoint (0.18, builders/base.py, make_layernorm): in bfloat16 a
weight of 0.3 becomes 1.2969 and not 1.3008, which moved logits of Gemma 2 by 0.005 of their spread. transformers adds
in float32. Norms are small, so the sums are made again and put in their places in the graph's data.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from optikit.models.facts import ModelFacts

NORM = "norm.weight"
"""End of the names of norms, in checkpoints and in graphs."""


def mend(source: Path, graph: Path, facts: ModelFacts) -> int:
    """Write every norm of a graph anew from the source, offset in float32.

    Args:
        source: Hugging Face directory.
        graph: What the builder made of it, its weights in external data.
        facts: Of the source.

    Returns:
        Norms written; 0 for a family without an offset.

    Raises:
        IntegrityError: The graph lacks a norm of the source, or has it in another shape.
    """
    row = facts.architecture
    if row is None or not row.norm_offset:
        return 0
    from optikit.formats.checkpoint import Checkpoint
    from optikit.formats.onnx_graph import OnnxGraph

    built, checkpoint = OnnxGraph(graph), Checkpoint(source)
    names = dict(_names(checkpoint, facts))
    for stored, name in names.items():
        built.write(name, (checkpoint.read(stored).float() + row.norm_offset).numpy())
    return len(names)


def _names(stored: Iterable[str], facts: ModelFacts) -> Iterator[tuple[str, str]]:
    """Yield the name of each norm in the source, and in the graph, where the last one is that of a block more."""
    row = facts.architecture
    for name in stored:
        if row is not None and name == f"{row.norm}.weight":
            yield name, f"{row.block(facts.layers)}.final_norm_layernorm.weight"
        elif name.endswith(NORM):
            yield name, name
