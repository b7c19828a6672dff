"""`ModelFacts`: everything planning needs to know of a model directory, without its weights.

Facts of a model that exists come from `read(directory)` (config.json and safetensors headers) or `read_gguf(file)`.
Facts of a model that a stage *will* write come from that stage's `after(options, facts)`: the same type, so that the
next stage is checked and estimated before the first has run.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import gcd
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from optikit.models import architectures, language_part

if TYPE_CHECKING:
    from collections.abc import Mapping

    from optikit.models.architectures import Architecture

Trait = Literal[
    "dense",  # every weight in a float dtype
    "sparse_unstructured",  # zeros anywhere, stored dense
    "sparse_2_4",  # two zeros in every four, stored dense
    "sparse_4_8",
    "narrowed",  # fewer heads or channels than the source
    "shortened",  # fewer decoder layers than the source
    "finetuned",
    "int4_gptq",
    "int8_gptq",
    "int4_awq",
    "int8_w8a8",
    "int8_llm",  # LLM.int8, bitsandbytes
    "nf4",
    "fp8_dynamic",  # compressed-tensors, float-quantized
    "fp8_static",  # ModelOpt
    "fp8_block",  # DeepSeek
    "int4_packed",  # compressed-tensors, pack-quantized
    "int8_packed",
    "nvfp4_packed",  # compressed-tensors, nvfp4-pack-quantized
    "mxfp4_packed",
    "medusa_heads",
    "eagle3",
    "draft_model",
    "prompt_lookup",
    "onnx",
    "openvino",
    "gguf",
    "tensorrt",
    "neuron",
]
"""What a model directory *is*. Rules and stages speak only in these."""

_EXPERT = re.compile(r"\.experts\.\d+\.")
"""In the name of a linear: it is a routed expert's."""

DTYPE_BYTES: Mapping[str, float] = MappingProxyType(
    {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1}
    | {"C64": 8, "U64": 8, "U32": 4, "U16": 2, "F8_E5M2": 1, "F8_E8M0": 1, "F6_E2M3": 0.75, "F6_E3M2": 0.75, "F4": 0.5}
)
"""Bytes of one element by safetensors dtype name."""


@dataclass(frozen=True, kw_only=True)
class TensorFacts:
    """One tensor of a checkpoint, from its header: safetensors dtype name and shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        """Number of elements."""
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def bytes(self) -> int:
        """Size in bytes."""
        return int(self.elements * DTYPE_BYTES[self.dtype])


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """A decoder-only language model as its configuration and headers describe it.

    Attributes:
        model_type: transformers' `model_type`, e.g. `llama`.
        hidden: Width of the residual stream.
        intermediate: Width inside the MLP.
        layers: Number of decoder blocks.
        heads, kv_heads, head_dim: Attention shape.
        vocab: Rows of the embedding.
        max_positions: Longest context the model was made for, in tokens.
        tied: The output head is the embedding.
        dtype: Dtype of most weights, safetensors name.
        weight_bytes: Size of all weights on disk.
        second_bytes: What of it is a second form of the same weights, for several tokens at once.
        linears: Linear layers inside the blocks: full name → (out_features, in_features).
        traits: What the directory is.
        tokenizer_sha256: Hash of what tokenizer.json does, see `tokenizer.Described`; empty where there is none.
        tokenizer_tokens: Rows of an embedding that it needs; 0 where there is none.
        config: The raw config.json.
        sliding_window: Attention window in tokens, or None.
        left_dense: Linears that a packed directory holds as floats.
        generic: What its headers show, where its family has no row; see generic.py.
        experts: Routed experts of a block that has them; 0 where there are none.
        experts_chosen: How many of them see a token.
        cached: Elements that a token leaves in a block's cache; 0 for keys and values of every head.
        routers: Matrices of blocks that no stage quantizes, full names: what chooses experts, and gates of shared ones.
        carried: Parts of the checkpoint that aren't the language model, such as a vision tower → tensors of each.
        packing: How its weights are packed, in words, where no stage reads that; "" elsewhere.
    """

    model_type: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    max_positions: int
    tied: bool
    dtype: str
    weight_bytes: int
    linears: Mapping[str, tuple[int, int]]
    traits: frozenset[Trait]
    tokenizer_sha256: str = ""
    tokenizer_tokens: int = 0
    sliding_window: int | None = None
    left_dense: frozenset[str] = frozenset()
    generic: Architecture | None = field(default=None, repr=False)
    experts: int = 0
    experts_chosen: int = 0
    cached: int = 0
    routers: tuple[str, ...] = ()
    carried: Mapping[str, int] = field(default_factory=dict)
    packing: str = ""
    config: Mapping[str, Any] = field(default_factory=dict, repr=False)
    second_bytes: int = 0

    @property
    def first_bytes(self) -> int:
        """Size of the weights that one token is computed with."""
        return self.weight_bytes - self.second_bytes

    @property
    def architecture(self) -> Architecture | None:
        """Its row of architectures.toml, or what was made in its place; None where neither is known."""
        return self.generic or architectures.find(self.model_type, language_part.settings_of(self.config))

    def having(self, *traits: Trait, without: frozenset[Trait] = frozenset()) -> ModelFacts:
        """Return these facts with traits added and others taken away."""
        return replace(self, traits=(self.traits - without) | frozenset(traits))

    @cached_property
    def linear_elements(self) -> int:
        """Weights in the blocks' linear layers: what quantization changes."""
        return sum(rows * columns for rows, columns in self.linears.values())

    @cached_property
    def widths(self) -> tuple[int, int]:
        """Greatest common divisors of the linears' input and output widths; 0 where there are none."""
        shapes = set(self.linears.values())
        return gcd(*(columns for _, columns in shapes)), gcd(*(rows for rows, _ in shapes))

    @cached_property
    def expert_elements(self) -> int:
        """Weights in the blocks' routed experts, of all blocks and all experts."""
        if not self.experts:
            return 0
        return sum(rows * columns for name, (rows, columns) in self.linears.items() if _EXPERT.search(name))

    def read_elements(self, tokens: int) -> float:
        """Return how many linear weights a pass over so many tokens reads: not the experts that no token chooses.

        Tokens are taken to choose evenly and on their own: of E experts, E (1 - (1 - k/E)^tokens) are seen.
        """
        experts = self.expert_elements
        if not experts:
            return self.linear_elements
        seen = 1 - (1 - self.experts_chosen / self.experts) ** tokens
        return self.linear_elements - experts * (1 - seen)

    @property
    def walked_elements(self) -> int:
        """Linear weights that a walk holds at a time: a block's, and of its routed experts one."""
        experts = self.expert_elements
        return (self.linear_elements - experts + experts // max(self.experts, 1)) // max(self.layers, 1)

    @property
    def kept(self) -> tuple[str, ...]:
        """Names of modules that a server must not take for quantized ones: routers, and the parts that are carried."""
        return (*self.routers, *self.carried)

    @property
    def active_elements(self) -> int:
        """Weights in linear layers that a token is multiplied with: of the routed experts, only those it chooses."""
        experts = self.expert_elements
        return self.linear_elements - experts + (experts * self.experts_chosen // self.experts if experts else 0)

    @property
    def active_parameters(self) -> int:
        """`parameters`, without the experts that a token doesn't choose."""
        return self.parameters - self.linear_elements + self.active_elements

    @property
    def parameters(self) -> int:
        """All weights: linear layers, embedding, untied head, norms."""
        embeddings = self.vocab * self.hidden * (1 if self.tied else 2)
        return self.linear_elements + embeddings + (2 * self.layers + 1) * self.hidden

    def kv_cache_bytes(self, tokens: int, *, batch: int = 1, element_bytes: int = 2) -> int:
        """Bytes of the key and value cache for `batch` sequences of `tokens`."""
        each = self.cached or 2 * self.kv_heads * self.head_dim
        return self.layers * each * tokens * batch * element_bytes
