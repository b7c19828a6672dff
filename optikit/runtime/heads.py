"""Medusa heads as a small ONNX Runtime session: from a hidden state to each head's likeliest token and its probability.

    heads.safetensors   {head}.{layer}.weight (hidden, hidden), {head}.{layer}.bias (hidden,)
                        output (drafted, hidden), or output.{head} where each head has its own
                        token_ids (drafted,) int64: which tokens the rows of the output stand for

A session of its own, of one thread: the model's session has its threads spinning for the next step, and a second pool
would fight them for the cores. The output layers are by far the largest part, so they are rounded to 8 bits, in blocks
of 32; a wrong guess costs time, never text.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from safetensors import SafetensorError, safe_open

from optikit.errors import IntegrityError, UsageError
from optikit.runtime.acceptors import Probabilities
from optikit.runtime.drafters import Hidden
from optikit.runtime.protocol import Tokens

HEADS = "heads.safetensors"
BLOCK = 32
"""Weights that share a scale in a rounded output layer."""
Weights = Mapping[str, NDArray[Any]]


class HeadSession:
    """Heads, ready to guess; what `drafters.Medusa` asks.

    Args:
        path: heads.safetensors.

    Attributes:
        heads: Number of heads.
        width: Width of the hidden states that they read.
        vocab: Tokens of the model that they were trained for.
        base: `origin.weights_digest` of that model; "" where it wasn't noted.

    Raises:
        IntegrityError: The file isn't what a `speculate: {method: medusa}` stage writes.
    """

    def __init__(self, path: Path) -> None:
        try:
            with safe_open(path, "numpy") as file:
                weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
                about = file.metadata()
            self.vocab = int(about["vocab"])
            self.base = about.get("base_sha256", "")
            self.heads = 1 + max(int(name.split(".")[0]) for name in weights if name[0].isdigit())
            self.width = int(weights["0.0.weight"].shape[1])
            self._token_ids = weights["token_ids"].astype(np.int64)
            model = _graph(weights, self.heads, self.width)
        except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
            message = f"{path} doesn't hold Medusa heads: {type(error).__name__}: {error}"
            raise IntegrityError(message, fix="run the recipe again") from error
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 3
        self._session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )

    def __call__(self, hidden: Hidden) -> tuple[Tokens, Probabilities]:
        """Return each head's likeliest token and its probability, both (heads,), from a state (hidden,)."""
        rows, probs = self._session.run(None, {"state": hidden[None]})
        return self._token_ids[rows], probs

    def require(self, *, width: int, vocab: int) -> None:
        """Refuse a model that these heads weren't trained for.

        Raises:
            UsageError: Other width or vocabulary.
        """
        if (self.width, self.vocab) != (width, vocab):
            message = (
                f"the heads read states of width {self.width} and know {self.vocab} tokens; "
                f"the model has width {width} and {vocab} tokens"
            )
            raise UsageError(message, fix="use heads that were trained for this model")


def _graph(weights: Weights, heads: int, width: int) -> onnx.ModelProto:
    """Return state (1, width) → rows (heads,), probs (heads,)."""
    nodes: list[onnx.NodeProto] = []
    constants: list[onnx.TensorProto] = []
    shared = "output" in weights
    if shared:
        _store_output("output", weights["output"], constants)
    for head in range(heads):
        state = _blocks(head, weights, nodes, constants)
        if not shared:
            _store_output(f"output.{head}", weights[f"output.{head}"], constants)
            nodes.append(_product(f"output.{head}", weights[f"output.{head}"], state, f"logits.{head}"))
    states = [f"state.{head}" if shared else f"logits.{head}" for head in range(heads)]
    nodes.append(helper.make_node("Concat", states, ["states" if shared else "logits"], axis=0))
    if shared:
        nodes.append(_product("output", weights["output"], "states", "logits"))
    constants.append(numpy_helper.from_array(np.array([1], np.int64), "last"))
    nodes += [
        helper.make_node("ArgMax", ["logits"], ["rows"], axis=1, keepdims=0),
        helper.make_node("ReduceMax", ["logits", "last"], ["largest"], keepdims=0),
        helper.make_node("ReduceLogSumExp", ["logits", "last"], ["sum"], keepdims=0),
        helper.make_node("Sub", ["largest", "sum"], ["log_probs"]),
        helper.make_node("Exp", ["log_probs"], ["probs"]),
    ]
    graph = helper.make_graph(
        nodes,
        "heads",
        [helper.make_tensor_value_info("state", TensorProto.FLOAT, [1, width])],
        [
            helper.make_tensor_value_info("rows", TensorProto.INT64, [heads]),
            helper.make_tensor_value_info("probs", TensorProto.FLOAT, [heads]),
        ],
        constants,
    )
    imports = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=imports, ir_version=10)


def _blocks(head: int, weights: Weights, nodes: list[onnx.NodeProto], constants: list[onnx.TensorProto]) -> str:
    """Add the residual layers of a head, x + SiLU(W x + b); return the name of what they give."""
    layers = sum(name.startswith(f"{head}.") and name.endswith(".weight") for name in weights)
    state = "state"
    for layer in range(layers):
        name = f"{head}.{layer}"
        out = f"state.{head}" if layer == layers - 1 else f"state.{name}"
        constants.append(numpy_helper.from_array(weights[f"{name}.weight"].astype(np.float32), f"{name}.weight"))
        constants.append(numpy_helper.from_array(weights[f"{name}.bias"].astype(np.float32), f"{name}.bias"))
        nodes += [
            helper.make_node("Gemm", [state, f"{name}.weight", f"{name}.bias"], [f"{name}.linear"], transB=1),
            helper.make_node("Sigmoid", [f"{name}.linear"], [f"{name}.gate"]),
            helper.make_node("Mul", [f"{name}.linear", f"{name}.gate"], [f"{name}.silu"]),
            helper.make_node("Add", [state, f"{name}.silu"], [out]),
        ]
        state = out
    return state


def _store_output(name: str, weight: NDArray[Any], constants: list[onnx.TensorProto]) -> None:
    """Round an output layer (rows, width) to 8 bits per block, symmetrically around the kernel's default zero, 128."""
    rows, width = weight.shape
    padded = np.zeros((rows, -(-width // BLOCK) * BLOCK), np.float32)
    padded[:, :width] = weight
    blocks = padded.reshape(rows, -1, BLOCK)
    scales = np.abs(blocks).max(-1) / 127
    codes = np.divide(blocks, scales[..., None], out=np.zeros_like(blocks), where=scales[..., None] > 0)
    packed = (np.rint(codes) + 128).astype(np.uint8)
    constants.append(numpy_helper.from_array(packed, f"{name}.codes"))
    constants.append(numpy_helper.from_array(scales.reshape(-1).astype(np.float32), f"{name}.scales"))


def _product(name: str, weight: NDArray[Any], source: str, out: str) -> onnx.NodeProto:
    rows, width = weight.shape
    return helper.make_node(
        "MatMulNBits",
        [source, f"{name}.codes", f"{name}.scales"],
        [out],
        domain="com.microsoft",
        K=width,
        N=rows,
        bits=8,
        block_size=BLOCK,
        accuracy_level=4,
    )
