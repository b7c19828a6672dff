"""Medusa heads as a small ONNX Runtime session: from a hidden state to each head's likeliest token and its probability.

    heads.safetensors   {head}.{layer}.weight (hidden, hidden), {head}.{layer}.bias (hidden,)
                        output (drafted, hidden), or output.{head} where each head has its own
                        token_ids (drafted,) int64: which tokens the rows of the output stand for
    sequential heads    input.{head} (2 · hidden, (head + 1) · width): what the embeddings of the newest token and of
                        those drafted before this head's, one behind the other, add to the first layer: s and r of
                        x + s + SiLU(W x + b + r)
                        embedding (vocab, width) int8, embedding.scales (vocab,) float32: of all tokens

Sequential heads see the tokens drafted before theirs: they run one after the other, in one graph, which holds the
embeddings of what they can draft. The newest token can be any; its embedding is read from the file when it is asked.

A session of its own, of one thread: the model's session has its threads spinning for the next step, and a second pool
would fight them for the cores. The output layers are by far the largest part, so they are rounded to 8 bits, in blocks
of 32, and so is what embeddings are multiplied with; a wrong guess costs time, never text.
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
from optikit.runtime.decoder import Tokens
from optikit.runtime.speculation.acceptors import Probabilities
from optikit.runtime.speculation.drafters import Hidden
from optikit.runtime.speculation.fingerprint import tensors_digest
from optikit.runtime.speculation.rounded_layers import product, store_rounded

HEADS = "heads.safetensors"
TABLE = "embedding"
"""Name of the embeddings in that file: the one tensor that isn't read whole to be kept."""
Weights = Mapping[str, NDArray[Any]]


class HeadSession:
    """Heads, ready to guess; what `drafters.Medusa` asks.

    Args:
        path: heads.safetensors.

    Attributes:
        heads: Number of heads.
        sequential: Whether each sees the tokens drafted before it.
        width: Width of the hidden states that they read.
        vocab: Tokens of the model that they were trained for.
        base: `fingerprint.weights_digest` of that model; "" where it wasn't noted.

    Raises:
        IntegrityError: The file isn't what a `speculate: {method: medusa}` stage writes.
    """

    def __init__(self, path: Path) -> None:
        try:
            with safe_open(path, "numpy") as file:
                weights = {name: file.get_tensor(name) for name in file.keys() if name != TABLE}  # noqa: SIM118 - no mapping
                about = file.metadata()
            _require_whole(weights, about.get("tensors_sha256", ""))
            self.vocab = int(about["vocab"])
            self.base = about.get("base_sha256", "")
            self.heads = 1 + max(int(name.split(".")[0]) for name in weights if name[0].isdigit())
            self.width = int(weights["0.0.weight"].shape[1])
            self.sequential = "input.0" in weights
            self._token_ids = weights["token_ids"].astype(np.int64)
            self._embeddings = Embeddings(path, self.vocab) if self.sequential else None
            model = _graph(weights, self.heads, self.width, self._embeddings)
        except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
            message = f"{path} doesn't hold Medusa heads: {type(error).__name__}: {error}"
            raise IntegrityError(message, fix="run the recipe again") from error
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 3
        self._session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )

    def __call__(self, hidden: Hidden, newest: int) -> tuple[Tokens, Probabilities]:
        """Return each head's likeliest token and its probability, both (heads,).

        Args:
            hidden: (hidden,): the state that the newest token was predicted from.
            newest: That token; heads that aren't sequential don't look at it.
        """
        given = {"state": hidden[None]}
        if self._embeddings is not None:
            given["newest"] = self._embeddings.of(newest)[None]
        rows, probs = self._session.run(None, given)
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


def _require_whole(weights: Weights, digest: str) -> None:
    """Refuse tensors that aren't those that were written, though each may have a shape that fits.

    Raises:
        ValueError: They aren't.
    """
    if digest and digest != tensors_digest(weights):
        raise ValueError("its tensors aren't those that were written under these names")


class Embeddings:
    """Embeddings of all tokens, rounded to 8 bits row by row; they stay in the file but for what is asked.

    Args:
        path: heads.safetensors of sequential heads.
        vocab: Tokens that there have to be.

    Attributes:
        width: Of an embedding.

    Raises:
        ValueError: There are other numbers of them.
        SafetensorError: There are none.
    """

    def __init__(self, path: Path, vocab: int) -> None:
        file: Any = safe_open(path, "numpy")
        self._file = file
        self._codes = file.get_slice(TABLE)
        self._scales = file.get_tensor(f"{TABLE}.scales")
        rows, self.width = self._codes.get_shape()
        if not rows == len(self._scales) == vocab:
            raise ValueError(f"{rows} embeddings with {len(self._scales)} scales for {vocab} tokens")

    def of(self, token: int) -> NDArray[np.float32]:
        """Return the embedding (width,) of a token."""
        found: NDArray[np.float32] = self._codes[token] * self._scales[token]
        return found

    def rounded(self, tokens: Tokens) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
        """Return codes (n, width) and scales (n, 1) of tokens (n,)."""
        return self._file.get_tensor(TABLE)[tokens], self._scales[tokens, None]


def _graph(weights: Weights, heads: int, width: int, embeddings: Embeddings | None) -> onnx.ModelProto:
    """Return state (1, width), with embeddings also newest (1, their width) → rows (heads,), probs (heads,)."""
    nodes: list[onnx.NodeProto] = []
    constants: list[onnx.TensorProto] = []
    given = [helper.make_tensor_value_info("state", TensorProto.FLOAT, [1, width])]
    for name in weights:
        if name.split(".")[0] == "output":
            store_rounded(name, weights[name], constants)
    if embeddings is not None:
        given.append(helper.make_tensor_value_info("newest", TensorProto.FLOAT, [1, embeddings.width]))
        _one_after_another(heads, weights, embeddings, nodes, constants)
    else:
        _side_by_side(heads, weights, nodes, constants)
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
        given,
        [
            helper.make_tensor_value_info("rows", TensorProto.INT64, [heads]),
            helper.make_tensor_value_info("probs", TensorProto.FLOAT, [heads]),
        ],
        constants,
    )
    imports = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=imports, ir_version=10)


def _side_by_side(heads: int, weights: Weights, nodes: list[onnx.NodeProto], constants: list[onnx.TensorProto]) -> None:
    """Add heads that see the state only: one product with the output layer for all of them, where they share it."""
    states = [_blocks(head, weights, nodes, constants) for head in range(heads)]
    if "output" in weights:
        nodes.append(helper.make_node("Concat", states, ["states"], axis=0))
        nodes.append(product("output", weights["output"], "states", "logits"))
        return
    for head, state in enumerate(states):
        nodes.append(product(f"output.{head}", weights[f"output.{head}"], state, f"logits.{head}"))
    nodes.append(helper.make_node("Concat", [f"logits.{head}" for head in range(heads)], ["logits"], axis=0))


def _one_after_another(
    heads: int,
    weights: Weights,
    embeddings: Embeddings,
    nodes: list[onnx.NodeProto],
    constants: list[onnx.TensorProto],
) -> None:
    """Add heads each of which sees the embeddings of the newest token and of what those before it find likeliest."""
    codes, scales = embeddings.rounded(weights["token_ids"])
    constants += [numpy_helper.from_array(codes, "drafted.codes"), numpy_helper.from_array(scales, "drafted.scales")]
    seen = ["newest"]
    for head in range(heads):
        _read(head, seen, weights, embeddings.width, nodes, constants)
        state = _blocks(head, weights, nodes, constants)
        output = "output" if "output" in weights else f"output.{head}"
        nodes.append(product(output, weights[output], state, f"logits.{head}"))
        if head < heads - 1:
            seen.append(_drafted(head, nodes))
    nodes.append(helper.make_node("Concat", [f"logits.{head}" for head in range(heads)], ["logits"], axis=0))


def _drafted(head: int, nodes: list[onnx.NodeProto]) -> str:
    """Look up the embedding (1, width) of what a head finds likeliest; return its name."""
    nodes += [
        helper.make_node("ArgMax", [f"logits.{head}"], [f"row.{head}"], axis=1, keepdims=0),
        helper.make_node("Gather", ["drafted.codes", f"row.{head}"], [f"codes.{head}"]),
        helper.make_node("Gather", ["drafted.scales", f"row.{head}"], [f"scale.{head}"]),
        helper.make_node("Cast", [f"codes.{head}"], [f"levels.{head}"], to=TensorProto.FLOAT),
        helper.make_node("Mul", [f"levels.{head}", f"scale.{head}"], [f"drafted.{head}"]),
    ]
    return f"drafted.{head}"


def _read(
    head: int,
    seen: list[str],
    weights: Weights,
    width: int,
    nodes: list[onnx.NodeProto],
    constants: list[onnx.TensorProto],
) -> None:
    """Add what embeddings bring to the first layer of a head."""
    name = f"input.{head}"
    if weights[name].shape[1] != width * len(seen):
        raise ValueError(f"{name} has shape {weights[name].shape} for {len(seen)} embeddings of width {width}")
    store_rounded(name, weights[name], constants)
    nodes += [
        helper.make_node("Concat", seen, [f"{name}.seen"], axis=1),
        product(name, weights[name], f"{name}.seen", f"{name}.more"),
        helper.make_node("Split", [f"{name}.more"], [f"{name}.beside", f"{name}.inside"], axis=1, num_outputs=2),
    ]


def _blocks(head: int, weights: Weights, nodes: list[onnx.NodeProto], constants: list[onnx.TensorProto]) -> str:
    """Add the residual layers of a head, x + SiLU(W x + b); return the name of what they give."""
    layers = sum(name.startswith(f"{head}.") and name.endswith(".weight") for name in weights)
    state, more = "state", f"input.{head}" in weights
    for layer in range(layers):
        name, out = f"{head}.{layer}", f"state.{head}.{layer}"
        linear, around = f"{name}.linear", state
        constants.append(numpy_helper.from_array(weights[f"{name}.weight"].astype(np.float32), f"{name}.weight"))
        constants.append(numpy_helper.from_array(weights[f"{name}.bias"].astype(np.float32), f"{name}.bias"))
        nodes += [
            helper.make_node("Gemm", [state, f"{name}.weight", f"{name}.bias"], [f"{name}.linear"], transB=1),
        ]
        if more and layer == 0:
            linear, around = f"{name}.whole", f"{name}.around"
            nodes.append(helper.make_node("Add", [f"{name}.linear", f"input.{head}.inside"], [linear]))
            nodes.append(helper.make_node("Add", [state, f"input.{head}.beside"], [around]))
        nodes += [
            helper.make_node("Sigmoid", [linear], [f"{name}.gate"]),
            helper.make_node("Mul", [linear, f"{name}.gate"], [f"{name}.silu"]),
            helper.make_node("Add", [around, f"{name}.silu"], [out]),
        ]
        state = out
    return state
