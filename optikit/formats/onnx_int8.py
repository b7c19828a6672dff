"""A second graph of the same model, for several tokens at once: int8 codes with one scale per output channel.

Int4 kernels of CPUs unpack and rescale every block of weights for every token: beyond two tokens they are bound by
arithmetic. Codes of 8 bits with a scale per channel need neither, so a forward of 8 tokens takes little more than one
of one token. Every product of the first graph becomes, for its input x (tokens, columns):

    s = max |x| of a token / 127            a scale for each token, so that no token's result depends on its neighbours
    u = round(x / s) + 128                  uint8: what VNNI and AMX multiply with int8
    y = (u - 128) · codes · channel · s     MatMulIntegerToFloat; integer sums are exact, whatever the number of tokens

Codes are the first graph's weights bit for bit where every group's scale is a whole multiple k of its channel's and
k · code fits 8 bits (`scales: nested` of a quantize stage); otherwise they are rounded to 8 bits, and the distance is
told.
Progressive quantization: Lin et al. 2024 (QServe), arXiv:2405.04532.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from optikit.formats.onnx_graph import HEAD, OnnxGraph, Product
from optikit.models.onnx_files import VERIFY

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

ROWS = 1024
"""Rows unpacked at a time: bounds the memory."""
MOST = 127
CONTRIB = "com.microsoft"
PREFIX = "optikit_int8"
ALIGN = 4096
"""Bytes that a weight's place in the file is a multiple of: onnxruntime maps pages."""


@dataclass(frozen=True)
class Channels:
    """Rows of a weight in 8 bits.

    Attributes:
        codes: (rows, columns) int8.
        scales: (rows,) float32.
        steps: Largest distance to the weight, in steps of the channel's scale; 0 is bit-equal.
    """

    codes: NDArray[np.int8]
    scales: NDArray[np.float32]
    steps: float


def nested(scales: NDArray[np.float32], most: int) -> tuple[NDArray[np.float32], NDArray[np.float32]] | None:
    """Return what group scales are whole multiples of: scales of the rows (rows,), and the multiples (rows, groups).

    Args:
        scales: (rows, groups), of either sign.
        most: Largest multiple.

    Returns:
        None where a row has no such scale.
    """
    base = _common(np.abs(scales), most)
    multiples = np.round(scales / base[:, None]).astype(np.float32)
    same = (multiples * base[:, None] == scales).all() and np.abs(multiples).max(initial=0) <= most
    return (base, multiples) if same else None


def _common(scales: NDArray[np.float32], most: int) -> NDArray[np.float32]:
    """Return a scale per row that the largest is a multiple of, the largest such of which all are multiples, if any."""
    peak = scales.max(axis=1)
    found = (peak / most).astype(np.float32)
    open_rows = np.ones(len(scales), bool)
    for k in range(1, most + 1):
        base = (peak / np.float32(k)).astype(np.float32)
        safe = np.where(base > 0, base, 1)[:, None]
        fits = open_rows & (np.round(scales / safe) * safe == scales).all(axis=1)
        found = np.where(fits, base, found)
        open_rows &= ~fits
    return np.where(found > 0, found, np.float32(1))


def channels(graph: OnnxGraph, product: Product, start: int, stop: int) -> Channels:
    """Return rows `start` to `stop` of a product in 8 bits: bit-equal where its scales are nested, else rounded."""
    if product.bits < 32:
        exact = _exact(graph, product, start, stop)
        if exact is not None:
            return exact
    return _rounded(graph.weight(product, start, stop)[0])


def _rounded(weight: NDArray[np.float32]) -> Channels:
    """Round rows (rows, columns) to 8 bits, the largest weight of each to code 127."""
    peak = np.abs(weight).max(axis=1, keepdims=True)
    scales = np.where(peak > 0, peak / MOST, 1).astype(np.float32)
    codes = np.round(weight / scales)
    steps = float((np.abs(codes * scales - weight) / scales).max(initial=0))
    return Channels(codes.astype(np.int8), scales[:, 0], steps)


def _exact(graph: OnnxGraph, product: Product, start: int, stop: int) -> Channels | None:
    codes, scales = graph.coded(product, start, stop)
    largest = int(np.abs(codes).max(initial=1))
    found = nested(scales, max(1, MOST // max(1, largest)))
    if found is None:
        return None
    base, multiples = found
    wide = codes * multiples[:, :, None]
    whole = wide.reshape(stop - start, -1)[:, : product.columns]
    return Channels(np.ascontiguousarray(whole, np.int8), base, 0.0)


def align_head(path: Path, weight: Tensor) -> None:
    """Round the 8-bit head of a graph anew, one scale per row: two graphs can share that.

    Args:
        path: An ONNX file of the builder; the data of its head is replaced.
        weight: The head, (vocabulary, hidden), in any float dtype.

    Raises:
        IntegrityError: The graph has no head of that shape.
    """
    graph = OnnxGraph(path)
    head = graph.find(HEAD)
    blocks = -(-head.columns // head.block_size)
    codes = np.full((head.rows, blocks * head.block_size), 128, np.uint8)
    scales = np.ones((head.rows, blocks), np.float32)
    for start in range(0, min(head.rows, len(weight)), ROWS):
        part = _rounded(weight[start : start + ROWS].float().numpy())
        rows = slice(start, start + len(part.codes))
        codes[rows, : head.columns] = part.codes.astype(np.int16) + 128
        scales[rows] = part.scales[:, None]
    held: dict[str, NDArray[Any]] = {head.weight: codes, head.scales: scales}
    if head.zeros:
        held[head.zeros] = np.full((head.rows, blocks), 128, np.uint8)
    for name, values in held.items():
        graph.write(name, values.reshape(tuple(graph.tensors[name].dims)))


def build(path: Path) -> dict[str, Any]:
    """Write the second graph and its weights beside the first one, whose other tensors it reads.

    Args:
        path: The first graph.

    Returns:
        How many products it has, how many are bit-equal to the first graph's, and how far the others are from theirs.
    """
    first, directory = OnnxGraph(path), path.parent
    model = onnx.ModelProto()
    model.CopyFrom(first.model)
    products = {name: product for name, product in first.products.items() if product.weight in first.tensors}
    with (directory / f"{VERIFY}.data").open("w+b") as data:
        stored = {name: _store(first, product, data) for name, product in products.items()}
    rewrite(model.graph, {name: tensors for name, (tensors, _) in stored.items()}, products)
    onnx.save(model, str(directory / VERIFY))
    apart = [steps for _, steps in stored.values()]
    return {
        "verify_products": len(apart),
        "verify_bit_equal": sum(steps == 0 for steps in apart),
        "verify_largest_steps": round(max(apart), 4),
    }


def _store(graph: OnnxGraph, product: Product, data: IO[bytes]) -> tuple[list[onnx.TensorProto], float]:
    """Append a product's codes (columns, rows) to the file; return its tensors, and its distance in steps."""
    data.seek(0, 2)
    offset = -(-data.tell() // ALIGN) * ALIGN
    shape = product.columns, product.rows
    data.truncate(offset + shape[0] * shape[1])
    codes = np.memmap(data, np.int8, "r+", offset, shape)
    scales, steps = np.empty(product.rows, np.float32), 0.0
    for start in range(0, product.rows, ROWS):
        stop = min(start + ROWS, product.rows)
        part = channels(graph, product, start, stop)
        codes[:, start:stop], scales[start:stop] = part.codes.T, part.scales
        steps = max(steps, part.steps)
    codes.flush()
    weight = onnx.TensorProto(name=f"{product.name}/int8", data_type=TensorProto.INT8, dims=shape)
    weight.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", f"{VERIFY}.data"), ("offset", offset), ("length", shape[0] * shape[1])):
        weight.external_data.add(key=key, value=str(value))
    return [weight, onnx.numpy_helper.from_array(scales, f"{product.name}/scales")], steps


def rewrite(
    graph: onnx.GraphProto, stored: Mapping[str, list[onnx.TensorProto]], products: Mapping[str, Product]
) -> None:
    """Put int8 products in the place of a graph's, and drop the weights that nothing reads any more."""
    graph.initializer.extend(_constants())
    nodes = list(_rewritten(graph.node, stored, {product.weight: name for name, product in products.items()}))
    del graph.node[:]
    graph.node.extend(nodes)
    graph.initializer.extend(tensor for tensors in stored.values() for tensor in tensors)
    read = {name for node in graph.node for name in node.input}
    kept = [tensor for tensor in graph.initializer if tensor.name in read]
    del graph.initializer[:]
    graph.initializer.extend(kept)


def _rewritten(
    nodes: Iterable[onnx.NodeProto], stored: Mapping[str, list[onnx.TensorProto]], by_weight: Mapping[str, str]
) -> Iterator[onnx.NodeProto]:
    """Yield the nodes of the second graph; what several products read is rounded once."""
    rounded: set[str] = set()
    for node in nodes:
        name = by_weight.get(node.input[1]) if node.op_type in ("MatMulNBits", "MatMul") else None
        if name is None:
            yield node
            continue
        x = node.input[0]
        if name == HEAD:  # what its rows are chosen before, as before the first graph's head
            yield helper.make_node("Identity", [x], [f"{x}/head"], name=f"{HEAD}/rows")
            x = f"{x}/head"
        if x not in rounded:
            yield from _rounding(x)
            rounded.add(x)
        yield from _product(node, x, [tensor.name for tensor in stored[name]])


def _constants() -> Iterator[onnx.TensorProto]:
    floats = {"one": 1.0, "inverse": 1 / MOST, "least": 1e-30}
    for name, value in floats.items():
        yield onnx.numpy_helper.from_array(np.float32(value), f"{PREFIX}/{name}")
    yield onnx.numpy_helper.from_array(np.uint8(128), f"{PREFIX}/zero")
    yield onnx.numpy_helper.from_array(np.array([-1], np.int64), f"{PREFIX}/axis")


def _rounding(x: str) -> Iterator[onnx.NodeProto]:
    """Yield what gives a tensor's scale per token, `x/scale`, and its codes, `x/codes`."""

    def node(kind: str, inputs: list[str], output: str, **attributes: int) -> onnx.NodeProto:
        name = f"{PREFIX}{x}/{output}"
        return helper.make_node(kind, inputs, [f"{x}/{output}"], name=name, **attributes)

    yield node("Abs", [x], "size")
    yield node("ReduceMax", [f"{x}/size", f"{PREFIX}/axis"], "peak", keepdims=1)
    yield node("Max", [f"{x}/peak", f"{PREFIX}/least"], "held")
    yield node("Mul", [f"{x}/held", f"{PREFIX}/inverse"], "scale")
    yield node("Div", [x, f"{x}/scale"], "scaled")
    yield node("QuantizeLinear", [f"{x}/scaled", f"{PREFIX}/one", f"{PREFIX}/zero"], "codes")


def _product(node: onnx.NodeProto, x: str, held: list[str]) -> Iterator[onnx.NodeProto]:
    """Yield the int8 product, and what undoes the scaling of its tokens; what comes out keeps its name."""
    codes, scales = held
    out, bias = node.output[0], node.input[5] if len(node.input) > 5 else ""
    inputs = [f"{x}/codes", codes, f"{PREFIX}/one", scales, f"{PREFIX}/zero"]
    name = f"{PREFIX}{node.name}"
    yield helper.make_node("MatMulIntegerToFloat", inputs, [f"{out}/sums"], name=name, domain=CONTRIB)
    scaled = f"{out}/scaled" if bias else out
    yield helper.make_node("Mul", [f"{out}/sums", f"{x}/scale"], [scaled], name=f"{name}/scaled")
    if bias:
        yield helper.make_node("Add", [scaled, bias], [out], name=f"{name}/bias")
