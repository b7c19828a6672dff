"""Weights of an ONNX graph that the onnxruntime-genai builder wrote, unpacked one linear and a few rows at a time.

`MatMulNBits` (onnxruntime contrib operators) computes Y = A · dequantize(B)ᵀ. For K inputs, N outputs, `bits` per code
and `block_size` codes to a block, k = ceil(K / block_size) blocks to a row:

    B             (N, k, block_size · bits / 8)  uint8    codes; within a byte the first code in the lowest bits
    scales        (N, k)                         float32
    zero_points   (N, ceil(k · bits / 8))        uint8    packed like B; absent means 2^(bits - 1) everywhere

    weight[n, i] = (code[n, i] - zero[n, i // block_size]) · scale[n, i // block_size]

`GatherBlockQuantized` looks rows up in the same layout, its codes (N, k · block_size · bits / 8).

Written from the operator's documentation alone, without the code that packs: it is what packing is checked against.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from numpy.typing import NDArray

from optikit.errors import IntegrityError

Floats = NDArray[np.float32]
HEAD = "/lm_head/MatMul"
"""The product that is the output head."""
EMBEDDING = "/model/embed_tokens/"
"""What names of the embedding's nodes begin with."""
LOOKUPS = ("Gather", "GatherBlockQuantized")
SUFFIX = re.compile(r"(?:NBits|_Q\d)$")
"""What the builder and its quantizer append to the name of a product when they store it in fewer bits."""


def unpack_codes(packed: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Unpack the last dimension: (…, b) bytes → (…, b · 8 / bits) codes, the lowest bits of a byte first.

    >>> unpack_codes(np.array([0x21, 0x43], np.uint8), 4).tolist()
    [1, 2, 3, 4]
    """
    if bits == 8:
        return packed
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    codes = (packed[..., None] >> shifts) & np.uint8(2**bits - 1)
    return codes.reshape(*packed.shape[:-1], -1)


@dataclass(frozen=True, kw_only=True)
class Product:
    """One matrix product of a graph: the tensors that hold its weight.

    Attributes:
        name: Node name without what marks it as quantized, e.g. `/model/layers.0/attn/qkv_proj/MatMul`.
        weight: Initializer of the codes, or of the float weight.
        scales, zeros: Initializers, or "".
        bits: Bits per code; 32 for a float weight.
        block_size: Codes that share a scale.
        rows, columns: (out_features, in_features).
        upright: A float weight lies (rows, columns), as an embedding does; a product's lies (columns, rows).
    """

    name: str
    weight: str
    scales: str = ""
    zeros: str = ""
    bits: int = 32
    block_size: int = 0
    rows: int
    columns: int
    upright: bool = False


class OnnxGraph:
    """An ONNX file whose weights lie in external data beside it; nothing is read before it is asked for.

    Raises:
        IntegrityError: The file isn't an ONNX graph.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.model = onnx.load(str(path), load_external_data=False)
        except DecodeError as error:
            raise IntegrityError(f"{path} is not an ONNX file: {error}", fix="build it again") from error
        self.tensors = {tensor.name: tensor for tensor in self.model.graph.initializer}
        self.products = {product.name: product for product in map(self._product, self.model.graph.node) if product}
        self.embedding = self._embedding()
        """Where tokens are looked up; the head's own product, if that is where."""

    def _product(self, node: onnx.NodeProto) -> Product | None:
        name = SUFFIX.sub("", node.name)
        if node.op_type == "MatMul" and node.input[1] in self.tensors:
            columns, rows = self.tensors[node.input[1]].dims
            return Product(name=name, weight=node.input[1], rows=rows, columns=columns)
        if node.op_type != "MatMulNBits":
            return None
        told = {attribute.name: attribute.i for attribute in node.attribute}
        inputs = [*node.input, "", ""]
        if inputs[4]:
            raise IntegrityError(f"{node.name} has groups out of order (g_idx)", fix="quantize with groups in place")
        return Product(
            name=name,
            weight=inputs[1],
            scales=inputs[2],
            zeros=inputs[3],
            bits=told["bits"],
            block_size=told["block_size"],
            rows=told["N"],
            columns=told["K"],
        )

    def _embedding(self) -> Product | None:
        """Return what the embedding's node reads, also where it is turned or flattened first."""
        nodes = [node for node in self.model.graph.node if node.name.startswith(EMBEDDING)]
        made_of = {node.output[0]: node.input[0] for node in nodes if node.op_type in ("Reshape", "Transpose")}
        for node in nodes:
            if node.op_type in LOOKUPS:
                return self._looked_up(node, [made_of.get(node.input[0], node.input[0]), *node.input[1:], "", ""])
        return None

    def _looked_up(self, node: onnx.NodeProto, inputs: list[str]) -> Product | None:
        """Return the weight that a node looks rows up in: weight, tokens, scales and zero points are its inputs."""
        weight, _, scales, zeros, *_ = inputs
        head = self.products.get(HEAD)
        if head is not None and weight == head.weight and (head.bits == 32 or scales == head.scales):
            return head
        if weight not in self.tensors:
            return None
        rows, width = self.tensors[weight].dims
        if node.op_type == "Gather":
            return Product(name=EMBEDDING, weight=weight, rows=rows, columns=width, upright=True)
        told = {attribute.name: attribute.i for attribute in node.attribute}
        return Product(
            name=EMBEDDING,
            weight=weight,
            scales=scales,
            zeros=zeros,
            bits=told["bits"],
            block_size=told["block_size"],
            rows=rows,
            columns=width * 8 // told["bits"],
        )

    def find(self, name: str) -> Product:
        """Return a product by name; that of `EMBEDDING` is where tokens are looked up.

        Raises:
            IntegrityError: There is none.
        """
        found = self.embedding if name == EMBEDDING else self.products.get(name)
        if found is None:
            raise IntegrityError(f"{self.path} has no weight at {name}", fix="build it again")
        return found

    def read(self, name: str, start: int = 0, count: int | None = None) -> NDArray[Any]:
        """Return `count` elements of an initializer from element `start` on, flat; the whole by default.

        Raises:
            IntegrityError: It isn't there, or its data file is too short.
        """
        if name not in self.tensors:
            raise IntegrityError(f"{self.path} has no tensor {name}", fix="build it again")
        tensor = self.tensors[name]
        dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type))
        size = int(np.prod(tensor.dims, dtype=np.int64))
        wanted = size - start if count is None else count
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            inside: NDArray[Any] = onnx.numpy_helper.to_array(tensor)
            return inside.reshape(-1)[start : start + wanted]
        place: Mapping[str, str] = {entry.key: entry.value for entry in tensor.external_data}
        file = self.path.parent / Path(place["location"]).name
        values = np.fromfile(file, dtype, wanted, offset=int(place.get("offset", 0)) + start * dtype.itemsize)
        if values.size != wanted:
            raise IntegrityError(f"{file} ends before tensor {name}", fix="build it again")
        return values

    def write(self, name: str, values: NDArray[Any]) -> None:
        """Put values in the place of an initializer's, in its dtype, in the file that holds its data.

        Raises:
            IntegrityError: It isn't there, has another shape, or lies in the graph itself.
        """
        tensor = self.tensors.get(name)
        if tensor is None or tuple(tensor.dims) != values.shape:
            raise IntegrityError(f"{self.path} has no tensor {name} {values.shape}", fix="build it again")
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            raise IntegrityError(f"{self.path} holds {name} itself, not beside it", fix="build it again")
        place: Mapping[str, str] = {entry.key: entry.value for entry in tensor.external_data}
        with (self.path.parent / Path(place["location"]).name).open("r+b") as file:
            file.seek(int(place.get("offset", 0)))
            file.write(values.astype(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)).tobytes())

    def weight(self, product: Product, start: int, stop: int) -> tuple[Floats, Floats]:
        """Return rows `start` to `stop` of a weight as the kernel sees them, and the step of each of its elements.

        Returns:
            (rows, in_features) float32 twice; the steps of a float weight are zero.
        """
        columns = product.columns
        if product.upright:
            table = self.read(product.weight, start * columns, (stop - start) * columns).reshape(-1, columns)
            return np.ascontiguousarray(table, np.float32), np.zeros(table.shape, np.float32)
        if product.bits == 32:
            stored = self.read(product.weight).reshape(columns, product.rows)
            weight = np.ascontiguousarray(stored[:, start:stop].T, np.float32)
            return weight, np.zeros_like(weight)
        rows = stop - start
        codes, scales = self.coded(product, start, stop)
        values = codes * scales[:, :, None]
        steps = np.broadcast_to(np.abs(scales)[:, :, None], codes.shape).reshape(rows, -1)[:, :columns]
        return values.reshape(rows, -1)[:, :columns], steps

    def coded(self, product: Product, start: int, stop: int) -> tuple[Floats, Floats]:
        """Return rows `start` to `stop` of a quantized weight as codes, zero points taken off, and scales.

        Returns:
            (rows, blocks, block size) and (rows, blocks), both float32; the last block may be padded.
        """
        rows, blocks = stop - start, -(-product.columns // product.block_size)
        row_bytes = blocks * product.block_size * product.bits // 8
        packed = self.read(product.weight, start * row_bytes, rows * row_bytes).reshape(rows, row_bytes)
        scales = self.read(product.scales, start * blocks, rows * blocks).astype(np.float32).reshape(rows, blocks)
        codes = unpack_codes(packed, product.bits).reshape(rows, blocks, product.block_size).astype(np.float32)
        return codes - self._zeros(product, start, rows, blocks), scales

    def _zeros(self, product: Product, start: int, rows: int, blocks: int) -> Floats | np.float32:
        if not product.zeros:
            return np.float32(2 ** (product.bits - 1))
        row_bytes = -(-blocks * product.bits // 8)
        packed = self.read(product.zeros, start * row_bytes, rows * row_bytes).reshape(rows, row_bytes)
        return unpack_codes(packed, product.bits)[:, :blocks].astype(np.float32)[:, :, None]
