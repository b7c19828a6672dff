"""The servers that a recipe's `serve:` may name: what each loads, and what it can be told, in the words that rules use.

A bundle for a server reads one of these `Options`; a new server is a class and a row of `SERVERS`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

from pydantic import Field

from optikit.stage import StageOptions

DIRECTORY = "directory"
"""What a server loads that takes a model directory as transformers does, uncompiled."""


class Shared(StageOptions):
    """What every server can be told."""

    name: str = Field(default="", max_length=40, pattern=r"^([a-z]([-a-z0-9]*[a-z0-9])?)?$")
    """What clients and manifests call the model; by default as the recipe's file."""
    image: str = Field(default="", pattern=r"^\S*$")
    """Container image in the place of the server's usual one, best with its digest."""
    replicas: int = Field(default=1, ge=1, le=1000)
    """Copies in Kubernetes, or instances behind a SageMaker endpoint."""
    version: str | None = Field(default=None, pattern=r"^\d+(\.\d+)*([.+-]?[a-z0-9]+)*$")
    """Its release, quoted: '0.32.0'. Rules about versions say nothing where none is named."""
    batch_size: int | None = Field(default=None, ge=1, le=65536)
    """Sequences at once."""
    sequence_length: int | None = Field(default=None, ge=16, le=16_777_216)
    """Longest sequence in tokens, prompt and answer together."""
    num_speculative_tokens: int | None = Field(default=None, ge=1, le=1024)
    """Tokens drafted per step, where a speculate stage makes something that drafts."""
    temperature: float | None = Field(default=None, ge=0, le=10)
    """Sampling temperature that requests will ask for; 0 is greedy."""


class Parallel(Shared):
    """What servers can be told that share a model out over accelerators."""

    tensor_parallel: int | None = Field(default=None, ge=1, le=1024)
    """Accelerators or cores that share every layer."""
    pipeline_parallel: int | None = Field(default=None, ge=1, le=1024)
    """Groups of accelerators that share the layers among them."""


REGION = Field(default="us-east-1", pattern=r"^[a-z]{2}(-[a-z]+)+-\d$")


class Vllm(Parallel):
    """Options of vLLM."""

    gpu_memory_utilization: float | None = Field(default=None, gt=0, le=1)
    """Share of a GPU's memory for weights and cache."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] | None = None
    """`--dtype`; left out, it is the checkpoint's own."""
    quantization: str | None = None
    """`--quantization`; left out, vLLM reads it from config.json."""
    plugins: tuple[str, ...] | None = None
    """Distributions of plugins that are installed with it, e.g. [vllm-bnb-plugin]."""
    draft_tensor_parallel: int | None = Field(default=None, ge=1, le=1024)
    """Accelerators that share the draft: draft_tensor_parallel_size."""
    draft_quantization: str | None = None
    """How the draft's weights are quantized, where they are."""
    speculative_config: Mapping[str, Any] | None = None
    """Keys to add to vLLM's `--speculative-config`, in its own words."""


class Lmi(Vllm):
    """Options of SageMaker's large model inference containers (DJL Serving)."""

    vllm: str | None = Field(default=None, pattern=r"^\d+(\.\d+)*([.+-]?[a-z0-9]+)*$")
    """vLLM's release inside the container, quoted."""
    speculative_draft_model: str | None = None
    """`option.speculative_draft_model`, of containers before v15."""
    region: str = REGION
    """AWS region whose registry the image comes from."""


class Tgi(Parallel):
    """Options of Text Generation Inference: `--num-shard` is tensor_parallel, `--speculate` num_speculative_tokens."""

    dtype: Literal["bfloat16", "float16"] | None = None
    """`--dtype`; left out, it is the checkpoint's own."""
    quantization: str | None = None
    """`--quantize`; left out, TGI reads it from config.json."""


class SagemakerTgi(Tgi):
    """Options of a SageMaker endpoint on Hugging Face's TGI container."""

    region: str = REGION
    """AWS region of image and endpoint."""


class TensorrtLlm(Parallel):
    """Options of `trtllm-serve`."""

    overlap_scheduler: bool | None = None
    """Schedule the next step while the GPU works on this one."""


class Neuron(Shared):
    """What servers on Neuron cores can be told."""

    tensor_parallel: int | None = Field(default=None, ge=1, le=1024)
    """Neuron cores that share the model, as the SDK counts them."""
    draft_tensor_parallel: int | None = Field(default=None, ge=1, le=1024)
    """Neuron cores that share the draft."""
    sdk: str | None = Field(default=None, pattern=r"^\d+(\.\d+)*$")
    """Neuron SDK on the instance, quoted: '2.31'."""


class OptimumNeuron(Neuron):
    """Options of optimum-neuron's server."""

    vllm: str | None = Field(default=None, pattern=r"^\d+(\.\d+)*([.+-]?[a-z0-9]+)*$")
    """vLLM's release that its plugin runs in, quoted."""
    prefill_chunk_size: int | None = Field(default=None, ge=0, le=1_048_576)
    """Chunked prefill, tokens; 0 is off."""


class NxdInference(Neuron):
    """Options of NxD Inference."""

    nki_kernels: bool | None = None
    """Use kernels written with NKI."""


class VllmNeuron(Neuron):
    """Options of the vLLM plugin for Neuron."""

    quantization: str | None = None
    """`--quantization`."""
    on_device_sampling: bool | None = None
    """Choose tokens on the device."""
    async_scheduling: bool | None = None
    """`--async-scheduling`."""


class OnnxruntimeGenai(Shared):
    """Options of a server that runs onnxruntime-genai's own generator."""

    execution_provider: Literal["cpu", "cuda", "dml", "webgpu"] | None = None
    """Who computes the model."""
    draft_execution_provider: Literal["cpu", "cuda", "dml", "webgpu"] | None = None
    """Who computes the draft."""
    beams: int | None = Field(default=None, ge=1, le=64)
    """Beams of a search."""
    ngram_size: int | None = Field(default=None, ge=1, le=64)
    """Tokens that a lookup matches."""


class Openvino(Shared):
    """Options of OpenVINO GenAI and its model server."""

    num_assistant_tokens: int | None = Field(default=None, ge=0, le=64)
    """Tokens drafted per step, always."""
    assistant_confidence_threshold: float | None = Field(default=None, ge=0, le=1)
    """Draft until the draft model is less sure than this."""


@dataclass(frozen=True, kw_only=True)
class Server:
    """One server.

    Attributes:
        Options: What a recipe may say of it.
        engine: Its name in rules.
        runs_as: Its name among a target's `engines`; "" where that isn't asked.
        loads: `directory`, or engines of compile stages whose result it loads.
        speculates_as: Its name in support.toml.
    """

    Options: type[Shared]
    engine: str
    runs_as: str
    loads: tuple[str, ...]
    speculates_as: str


def _row(options: type[Shared], name: str, *loads: str, runs_as: str | None = None, speculates: str = "") -> Server:
    runs = name if runs_as is None else runs_as
    return Server(Options=options, engine=name, runs_as=runs, loads=loads, speculates_as=speculates or name)


SERVERS: Mapping[str, Server] = MappingProxyType(
    {
        "vllm": _row(Vllm, "vllm", DIRECTORY),
        "tgi": _row(Tgi, "tgi", DIRECTORY),
        "lmi": _row(Lmi, "lmi", DIRECTORY),
        "sagemaker-tgi": _row(SagemakerTgi, "tgi", DIRECTORY, runs_as="tgi", speculates="sagemaker-tgi"),
        "sagemaker-lmi": _row(Lmi, "lmi", DIRECTORY, runs_as="lmi", speculates="lmi"),
        "triton": _row(Vllm, "vllm", DIRECTORY, runs_as="triton", speculates="vllm"),
        "tensorrt-llm": _row(TensorrtLlm, "tensorrt-llm", "tensorrt-llm", DIRECTORY),
        "optimum-neuron": _row(OptimumNeuron, "optimum-neuron", "neuron", DIRECTORY),
        "nxd-inference": _row(NxdInference, "nxdi", "neuron", DIRECTORY, speculates="neuronx-distributed-inference"),
        "vllm-neuron": _row(VllmNeuron, "vllm-neuron", "neuron", DIRECTORY),
        "onnxruntime-genai": _row(OnnxruntimeGenai, "onnxruntime-genai", "onnxruntime", runs_as="onnxruntime"),
        "openvino": _row(Openvino, "openvino", "openvino"),
        "llama-cpp": _row(Shared, "llama.cpp", "llama-cpp"),
        "ollama": _row(Shared, "llama.cpp", "llama-cpp", runs_as="llama.cpp"),
        "transformers": _row(Shared, "transformers", DIRECTORY),
        "optikit": _row(Shared, "optikit", "onnxruntime", "openvino", "llama-cpp", DIRECTORY, runs_as=""),
    }
)
"""By the name that a recipe writes."""
