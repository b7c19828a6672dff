"""The embedding of a graph that the builder wrote: the head's own weights, or a table of 4 or 8 bits a weight.

onnxruntime-genai's builder (0.18) ties the two in 4-bit graphs with a quantized head only, and writes a float32 table
everywhere else: four bytes a weight, which is most of the file of a small model with a large vocabulary. So the graph
is written once more, with other nodes in the place of the one that looks tokens up:

    the head's codes    Reshape → GatherBlockQuantized, as the builder does where it ties
    the head's floats   Gather over its columns → Transpose: a head lies (hidden, vocabulary)
    a table of its own  GatherBlockQuantized: groups of a row share a scale around zero

Nothing else of the graph changes.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import onnx_ir as ir

from optikit.errors import StageFailedError
from optikit.formats.onnx_graph import EMBEDDING, HEAD, LOOKUPS, OnnxGraph

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

CONTRIB = "com.microsoft"
ROWS = 4096
"""Rows rounded at a time: bounds the memory."""


def tie(graph: Path, scratch: Path) -> None:
    """Look tokens up in the head's own weights.

    Args:
        graph: An ONNX file of the builder with a table of its own; replaced, with its data.
        scratch: Directory on the same disk.

    Raises:
        StageFailedError: The builder didn't write the node that is replaced.
    """
    head = OnnxGraph(graph).find(HEAD)
    model, lookup = _opened(graph)
    values, tokens = model.graph.initializers, lookup.inputs[1]
    if head.bits == 32:
        columns = _node("Gather", [values[head.weight], tokens], axis=1)
        made = [columns, _node("Transpose", columns.outputs, perm=[1, 2, 0])]
    else:
        width = -(-head.columns // head.block_size) * head.block_size * head.bits // 8
        shape = _node("Constant", [], value_ints=[head.rows, width])
        flat = _node("Reshape", [values[head.weight], shape.outputs[0]])
        scales = [values[name] for name in (head.scales, head.zeros) if name]
        made = [shape, flat, _lookup([flat.outputs[0], tokens, *scales], head.bits, head.block_size)]
    _replace(model, lookup, made)
    _save(model, graph, scratch)


def round_table(graph: Path, table: Tensor, bits: int, group_size: int, scratch: Path) -> None:
    """Look tokens up in a table of 4 or 8 bits a weight.

    Args:
        graph: An ONNX file of the builder with a table of its own; replaced, with its data.
        table: The embedding, (vocabulary, hidden), in any float dtype.
        bits: 4, with searched scales, or 8.
        group_size: Weights of a row that share a scale; divides `hidden`.
        scratch: Directory on the same disk.

    Raises:
        StageFailedError: The builder didn't write the node that is replaced.
    """
    model, lookup = _opened(graph)
    codes, scales = rounded(table, bits, group_size)
    held = [_initializer(model, "weight", codes), _initializer(model, "scales", scales)]
    _replace(model, lookup, [_lookup([held[0], lookup.inputs[1], held[1]], bits, group_size)])
    _save(model, graph, scratch)


def rounded(table: Tensor, bits: int, group_size: int) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Round a table (rows, columns); return codes (rows, columns · bits / 8) uint8 and scales (rows, groups) float32.

    Zero is code 2^(bits - 1); of two codes in a byte, the first one lies in the lower half.
    """
    import torch

    from optikit.algorithms import rtn
    from optikit.algorithms.grid import Grid

    grid = Grid(bits=bits, group_size=group_size, sym=True, search=bits < 8)
    parts = [rtn.quantize(part.float(), grid) for part in torch.split(table, ROWS)]
    codes = torch.cat([part.codes for part in parts])
    packed = codes if bits == 8 else codes[:, ::2] | codes[:, 1::2] << 4
    return packed.numpy(), torch.cat([part.scales for part in parts]).float().numpy()


def _opened(graph: Path) -> tuple[ir.Model, ir.Node]:
    """Return a graph, and its node that looks tokens up in a table of floats."""
    model = ir.load(graph)
    for node in model.graph:
        if (node.name or "").startswith(EMBEDDING) and node.op_type == LOOKUPS[0]:
            return model, node
    raise StageFailedError("the builder wrote no table of tokens", fix="use embedding: auto, and report the model")


def _initializer(model: ir.Model, name: str, values: NDArray[Any]) -> ir.Value:
    tensor = ir.tensor(values, name=f"{EMBEDDING}{name}")
    value = ir.Value(name=tensor.name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor)
    model.graph.register_initializer(value)
    return value


def _node(kind: str, inputs: Sequence[ir.Value | None], domain: str = "", **attributes: int | list[int]) -> ir.Node:
    name = f"{EMBEDDING}small/{kind}"  # the builder's own names are taken until its node goes
    outputs = [ir.Value(name=f"{name}/output_0")]
    return ir.node(kind, list(inputs), attributes, domain=domain, name=name, outputs=outputs)


def _lookup(inputs: Sequence[ir.Value | None], bits: int, group_size: int) -> ir.Node:
    settings = {"bits": bits, "block_size": group_size, "gather_axis": 0, "quantize_axis": 1}
    return _node(LOOKUPS[1], inputs, CONTRIB, **settings)


def _replace(model: ir.Model, lookup: ir.Node, made: Sequence[ir.Node]) -> None:
    """Put nodes in the place of another, whose table goes; what comes out of it keeps its name."""
    table, old, new = lookup.inputs[0], lookup.outputs[0], made[-1].outputs[0]
    model.graph.insert_before(lookup, made)
    ir.convenience.replace_all_uses_with(old, new)
    model.graph.remove(lookup, safe=True)
    new.name, new.shape, new.type = old.name, old.shape, old.type
    if table is not None and not table.uses():
        del model.graph.initializers[table.name]


def _save(model: ir.Model, graph: Path, scratch: Path) -> None:
    """Write a graph and its data elsewhere, then both in the place of what they were read from."""
    data, work = f"{graph.name}.data", scratch / "embedding"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    ir.save(model, work / graph.name, external_data=data, size_threshold_bytes=0)
    for name in (data, graph.name):
        (work / name).replace(graph.parent / name)
    work.rmdir()
