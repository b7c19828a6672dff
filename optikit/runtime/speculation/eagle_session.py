"""An EAGLE-3 drafter as ONNX Runtime sessions, with a cache: what `drafters.Eagle` asks.

    eagle3/config.json         as `formats.eagle3` writes it
    eagle3/model.safetensors   its tensors, embeddings and map of tokens

One graph fuses the target's states, another is the layer with the output layer behind it. Only keys and values are
computed for all rows of a call; the rest for the last, from which the next token is predicted. Rows that were drafted
lie in the cache behind those of the text until the text itself is taken in.

Sessions of one thread, and weights in 8 bits, as for Medusa heads. Embeddings stay in the file but for what is asked.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from optikit.errors import IntegrityError, OptikitError, UsageError
from optikit.formats import eagle3 as files
from optikit.models import eagle3
from optikit.models.eagle3 import EMBEDDING, Drafter
from optikit.runtime.decoder import Tokens
from optikit.runtime.speculation.drafters import Features
from optikit.runtime.speculation.rounded_layers import product, store_rounded

DIRECTORY = "eagle3"
CHUNK = 256
"""Rows per call of a longer text."""
MOST_TOKENS = 8192
"""Longest text that is drafted for: bounds the cache, whatever the drafter was made for."""
LAYER = "layers.0"
OPSETS = (("", 18), ("com.microsoft", 1))


class EagleSession:
    """A drafter with the cache of one text.

    Args:
        directory: What `formats.eagle3.write` wrote.

    Attributes:
        layers: Blocks of the target whose inputs it reads.
        width: Width of the target.
        vocab: Tokens of the target.
        base: `fingerprint.weights_digest` of the target; "" where it wasn't noted.
        max_tokens: Longest text that it drafts for.

    Raises:
        IntegrityError: The directory isn't what a `speculate: {method: eagle3}` stage writes.
    """

    def __init__(self, directory: Path) -> None:
        try:
            drafter = eagle3.read(directory)
            weights, self.base = files.read_arrays(directory)
            self._embedding = weights[EMBEDDING]
            self._token_ids = np.array(eagle3.tokens(directory, drafter), np.int64)
        except (OptikitError, KeyError) as error:
            message = f"{directory} doesn't hold an EAGLE-3 drafter: {error}"
            raise IntegrityError(message, fix="run the recipe again") from error
        self.layers, self.width, self.vocab = drafter.layers, drafter.target_hidden, drafter.vocab
        self.max_tokens = min(drafter.context, MOST_TOKENS)
        told = {name: files.as_float32(each) for name, each in weights.items() if name != EMBEDDING}
        self._fuse = _session(_fusing(told["fc.weight"]))
        self._layer = _session(_layer(told, drafter, self.max_tokens))
        shape = (1, drafter.kv_heads, self.max_tokens, drafter.head_dim)
        self._cache = {name: np.zeros(shape, np.float32) for name in ("key", "value")}
        self._state = np.zeros((1, 1, drafter.hidden), np.float32)
        self._text = self._filled = 0

    def begin(self) -> None:
        """Forget the text before."""
        self._text = self._filled = 0

    def read(self, tokens: Tokens, features: Features) -> tuple[int, float]:
        """Take in rows behind those of the text so far; what was drafted since is forgotten.

        Args:
            tokens: (m,), m ≥ 1.
            features: (m, layers · width): what the target's blocks were given for the token before each.

        Returns:
            The likeliest token behind the last of them, and its probability.
        """
        self._filled = self._text
        best = (0, 0.0)
        for start in range(0, len(tokens), CHUNK):
            some = slice(start, start + CHUNK)
            fused = self._fuse.run(None, {"features": features[None, some]})[0]
            best = self._run(tokens[some], fused)
        self._text = self._filled
        return best

    def ahead(self, token: int) -> tuple[int, float]:
        """Take in a token that was drafted; return the likeliest next one and its probability."""
        return self._run(np.array([token], np.int64), self._state)

    def _run(self, tokens: Tokens, hidden: NDArray[np.float32]) -> tuple[int, float]:
        embedded = files.as_float32(self._embedding[tokens])
        end = self._filled + len(tokens)
        binding = self._layer.io_binding()
        given = {"embedded": embedded[None], "hidden": hidden}
        given |= {"last": np.array([end - 1], np.int32), "length": np.array([end], np.int32)}
        for name, array in given.items():
            binding.bind_cpu_input(name, np.ascontiguousarray(array))
        for name, array in self._cache.items():  # bound as past and as present: rows are written in place
            place = ("cpu", 0, np.float32, array.shape, array.ctypes.data)
            binding.bind_input(f"past_{name}", *place)
            binding.bind_output(f"present_{name}", *place)
        for name in ("state", "row", "prob"):
            binding.bind_output(name)
        self._layer.run_with_iobinding(binding)
        outputs = binding.get_outputs()
        self._state, row, prob = (each.numpy() for each in outputs[2:])
        self._filled = end
        return int(self._token_ids[int(row)]), float(prob)

    def require(self, *, width: int, vocab: int) -> None:
        """Refuse a model that this drafter wasn't trained for.

        Raises:
            UsageError: Other width or vocabulary.
        """
        if (self.width, self.vocab) != (width, vocab):
            message = (
                f"the EAGLE-3 drafter reads states of width {self.width} and knows {self.vocab} tokens; "
                f"the model has width {width} and {vocab} tokens"
            )
            raise UsageError(message, fix="use a drafter that was trained for this model")


def _session(model: onnx.ModelProto) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _fusing(weight: NDArray[np.float32]) -> onnx.ModelProto:
    """Return features (1, m, fused) → hidden (1, m, hidden)."""
    constants: list[onnx.TensorProto] = []
    store_rounded("fc", weight, constants)
    rows, width = weight.shape
    given = [helper.make_tensor_value_info("features", TensorProto.FLOAT, [1, "m", width])]
    found = [helper.make_tensor_value_info("fused", TensorProto.FLOAT, [1, "m", rows])]
    return _model([product("fc", weight, "features", "fused")], given, found, constants)


class _Graph:
    """Nodes and constants of the layer, while it is put together."""

    def __init__(self, weights: dict[str, NDArray[np.float32]], eps: float) -> None:
        self.weights = weights
        self.eps = eps
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def add(self, kind: str, given: list[str], out: str, **attributes: Any) -> str:
        """Add a node with one output; return its name."""
        self.nodes.append(helper.make_node(kind, given, [out], **attributes))
        return out

    def constant(self, name: str, values: NDArray[Any]) -> str:
        """Add a constant; return its name."""
        self.constants.append(numpy_helper.from_array(values, name))
        return name

    def norm(self, name: str, source: str, out: str) -> str:
        """Add an RMS norm of one of the weights."""
        weight = self.constant(f"{name}.weight", self.weights[f"{name}.weight"])
        return self.add("SimplifiedLayerNormalization", [source, weight], out, axis=-1, epsilon=self.eps)

    def product(self, names: list[str], source: str, out: str) -> str:
        """Add the products with some weights, their rows one behind the other."""
        joined = np.concatenate([self.weights[f"{name}.weight"] for name in names])
        store_rounded(out, joined, self.constants)
        self.nodes.append(product(out, joined, source, out))
        return out


def _layer(weights: dict[str, NDArray[np.float32]], drafter: Drafter, context: int) -> onnx.ModelProto:
    """Return embedded and hidden (1, m, hidden), past keys and values → state (1, 1, hidden), row, prob of the last."""
    graph = _Graph(weights, drafter.eps)
    normed = graph.norm(f"{LAYER}.hidden_norm", "hidden", "normed")
    embedded = graph.norm(f"{LAYER}.input_layernorm", "embedded", "normed_embedded")
    joined = graph.add("Concat", [embedded, normed], "joined", axis=-1)
    attended = _attention(graph, joined, drafter, context)
    newest = graph.constant("newest", np.array([-1], np.int64))
    residual = normed if drafter.norm_before_residual else "hidden"
    residual = graph.add("Gather", [residual, newest], "residual", axis=1)
    attended = graph.add("Gather", [attended, newest], "attended_last", axis=1)
    out = graph.product([f"{LAYER}.self_attn.o_proj"], attended, "projected")
    hidden = graph.add("Add", [residual, out], "between")
    inner = graph.norm(f"{LAYER}.post_attention_layernorm", hidden, "inner")
    graph.product([f"{LAYER}.mlp.gate_proj", f"{LAYER}.mlp.up_proj"], inner, "gate_up")
    graph.nodes.append(helper.make_node("Split", ["gate_up"], ["gate", "up"], axis=-1, num_outputs=2))
    graph.add("Sigmoid", ["gate"], "sigmoid")
    graph.add("Mul", ["gate", "sigmoid"], "silu")
    graph.add("Mul", ["silu", "up"], "gated")
    graph.product([f"{LAYER}.mlp.down_proj"], "gated", "down")
    graph.add("Add", [hidden, "down"], "state")
    graph.norm("norm", "state", "final")
    graph.product(["lm_head"], "final", "logits")
    _likeliest(graph)
    return _model(graph.nodes, _given(drafter, context), _found(drafter, context), graph.constants)


def _attention(graph: _Graph, joined: str, drafter: Drafter, context: int) -> str:
    """Add attention over the cache and these rows; return the name of (1, m, heads · head_dim)."""
    graph.product([f"{LAYER}.self_attn.{each}_proj" for each in "qkv"], joined, "qkv")
    angles = np.arange(context)[:, None] * np.array(drafter.frequencies())
    cosine, sine = (
        graph.constant(name, of(angles).astype(np.float32)) for name, of in (("cosine", np.cos), ("sine", np.sin))
    )
    node = helper.make_node(
        "GroupQueryAttention",
        ["qkv", "", "", "past_key", "past_value", "last", "length", cosine, sine],
        ["attended", "present_key", "present_value"],
        domain="com.microsoft",
        num_heads=drafter.heads,
        kv_num_heads=drafter.kv_heads,
        scale=drafter.head_dim**-0.5,
        do_rotary=1,
    )
    graph.nodes.append(node)
    return "attended"


def _likeliest(graph: _Graph) -> None:
    """Add the likeliest row of the logits (1, 1, drafted), and its probability."""
    axis = graph.constant("axis", np.array([0, 1, 2], np.int64))
    flat = graph.add("Reshape", ["logits", graph.constant("flat", np.array([-1], np.int64))], "flat_logits")
    graph.add("ArgMax", [flat], "row", axis=0, keepdims=0)
    graph.add("ReduceMax", ["logits", axis], "largest", keepdims=0)
    graph.add("ReduceLogSumExp", ["logits", axis], "sum", keepdims=0)
    graph.add("Sub", ["largest", "sum"], "log_prob")
    graph.add("Exp", ["log_prob"], "prob")


def _given(drafter: Drafter, context: int) -> list[onnx.ValueInfoProto]:
    rows = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, "m", drafter.hidden])
        for name in ("embedded", "hidden")
    ]
    lengths = [helper.make_tensor_value_info(name, TensorProto.INT32, [1]) for name in ("last", "length")]
    return rows + lengths + _cached("past", drafter, context)


def _found(drafter: Drafter, context: int) -> list[onnx.ValueInfoProto]:
    return [
        *_cached("present", drafter, context),
        helper.make_tensor_value_info("state", TensorProto.FLOAT, [1, 1, drafter.hidden]),
        helper.make_tensor_value_info("row", TensorProto.INT64, []),
        helper.make_tensor_value_info("prob", TensorProto.FLOAT, []),
    ]


def _cached(name: str, drafter: Drafter, context: int) -> list[onnx.ValueInfoProto]:
    shape = [1, drafter.kv_heads, context, drafter.head_dim]
    return [helper.make_tensor_value_info(f"{name}_{kind}", TensorProto.FLOAT, shape) for kind in ("key", "value")]


def _model(
    nodes: list[onnx.NodeProto],
    given: list[onnx.ValueInfoProto],
    found: list[onnx.ValueInfoProto],
    constants: list[onnx.TensorProto],
) -> onnx.ModelProto:
    graph = helper.make_graph(nodes, "eagle3", given, found, constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid(*each) for each in OPSETS], ir_version=10)
