"""Every word that a rule may use, with its meaning: the closed vocabulary of compat.toml."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

FACTS: Mapping[str, str] = MappingProxyType(
    {
        "model_type": "transformers' model_type",
        "hidden": "width of the residual stream",
        "intermediate": "width inside the MLP",
        "layers": "decoder blocks",
        "experts": "routed experts of a block; 0 where there are none",
        "heads": "query heads",
        "kv_heads": "key-value heads",
        "head_dim": "width of a head",
        "vocab": "rows of the embedding",
        "max_positions": "longest context, tokens",
        "tied": "the output head is the embedding",
        "dtype": "dtype of most weights, safetensors name",
        "weight_bytes": "bytes of all weights",
        "parameters": "number of weights",
        "sliding_window": "attention window, tokens",
        "tokenizer": "hash of what tokenizer.json does",
        "traits": "set: what the directory is",
        "bos": "bos_token_id",
        "eos": "eos_token_id, as a sorted list",
        "input_width": "greatest common divisor of the linears' input widths",
        "output_width": "greatest common divisor of the linears' output widths",
    }
)
STAGE: Mapping[str, str] = MappingProxyType(
    {
        "verb": "prune, finetune, quantize, speculate, compile",
        "method": "the method, or the engine of a compile stage",
        "backend": "who does the work",
        "head_parameters": "weights of one Medusa head",
        "heads_percent": "weights of all Medusa heads, per cent of the model's",
    }
)
TARGET: Mapping[str, str] = MappingProxyType(
    {
        "name": "row of targets.toml",
        "device": "cpu, cuda, neuron",
        "accelerator": "product name",
        "count": "accelerators",
        "compute_capability": "CUDA compute capability times ten",
        "capability": "CUDA compute capability as NVIDIA writes it",
        "cores": "Neuron cores",
        "tensor_parallel": "set: degrees that the hardware allows",
        "older_tensor_parallel": "set: degrees that only older texts allow",
    }
)
WEIGHTS: Mapping[str, str] = MappingProxyType(
    {
        "quantized": "the weights are quantized",
        "quant_method": "config.json's quantization_config.quant_method",
        "bits": "bits per weight",
        "group_size": "weights that share a scale; -1 is a row",
        "sym": "symmetric",
        "desc_act": "columns were reordered",
        "format": "compressed-tensors format",
        "type": "int or float",
        "strategy": "tensor, channel, group, block",
        "scale_max": "largest value that the scales were made for",
    }
)
FIT: Mapping[str, str] = MappingProxyType(
    {
        "need_gb": "weights and caches of model and draft, 10⁹ bytes",
        "host_gb": "the instance's own memory that loading takes, 10⁹ bytes (Neuron)",
        "host_memory_gb": "the instance's own memory, 10⁹ bytes (Neuron)",
        "padded_heads": "attention heads after padding (Neuron)",
        "padded_kv_heads": "key-value heads after padding and replication (Neuron)",
        "padding_gb": "what that adds to the weights, 10⁹ bytes (Neuron)",
        "cache_gb": "caches of model and draft, 10⁹ bytes (Neuron)",
        "pipeline": "groups of accelerators that share the layers; 1 where none were named",
        "accelerators": "GPUs that one server uses",
        "cache_copies": "how many times the cache lies on them together",
        "memory_gb": "memory of the cores or accelerators used, 10⁹ bytes",
        "shard_width": "width of a row-parallel linear on one of tensor_parallel accelerators",
    }
)
STACK: Mapping[str, str] = MappingProxyType(
    {
        "methods": "set: methods of all stages",
        "gates": "set: gates of the recipe",
        "packages": "the versions of the main environment's packages are known",
    }
)
HOST: Mapping[str, str] = MappingProxyType(
    {
        "vendor": "amd or intel",
        "isa": "set: instruction sets",
        "cuda": "a CUDA device is present",
    }
)
SERVE: Mapping[str, str] = MappingProxyType(
    {
        "engine": "what loads the artifact: onnxruntime, openvino, vllm, tensorrt-llm, nxdi, …",
        "version": "its version",
        "sdk": "AWS Neuron SDK version",
        "vllm": "vLLM version inside another server",
        "plugins": "set: plugins installed in the server",
        "dtype": "dtype of the arithmetic, if chosen",
        "tensor_parallel": "accelerators or cores that share every layer",
        "pipeline_parallel": "groups of accelerators that share the layers among them",
        "draft_tensor_parallel": "the same for the draft",
        "batch_size": "sequences at once",
        "sequence_length": "tokens of a sequence, prompt included",
        "beams": "beams",
        "temperature": "sampling temperature",
        "quantization": "the server's quantization flag",
        "draft_quantization": "the same for the draft",
        "speculative_config": "vLLM's speculative_config",
        "speculative_draft_model": "LMI's option of that name",
        "num_speculative_tokens": "draft tokens per step",
        "speculation_length": "Neuron's name for the same",
        "async_mode": "NxD Inference's option of that name",
        "async_scheduling": "vLLM's option of that name",
        "overlap_scheduler": "TensorRT-LLM's overlap scheduler is on",
        "on_device_sampling": "sampling on the Neuron device",
        "prefill_chunk_size": "chunked prefill on Neuron, tokens",
        "quantized_checkpoints_path": "NxD Inference's option of that name",
        "quantization_dtype": "NxD Inference's option of that name",
        "nki_kernels": "NKI kernels are on",
        "precision": "precision asked of the compiler",
        "execution_provider": "ONNX Runtime's execution provider",
        "draft_execution_provider": "the same for the draft",
        "ngram_size": "words matched by prompt lookup",
        "dataset": "calibration set of the compiler",
        "scale_estimation": "NNCF's option of that name",
        "group_size": "weights that share a scale, for the compiler",
        "group_size_fallback": "what the compiler does where a group doesn't fit",
        "num_assistant_tokens": "OpenVINO's option of that name",
        "assistant_confidence_threshold": "OpenVINO's option of that name",
    }
)

OPEN = ("options", "package", "speculative_config")
"""Words below which anything may stand: options of stages, packages, servers' own configuration."""

WORDS: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {
        **dict.fromkeys(("stage", "first", "second"), STAGE),
        **dict.fromkeys(("model", "final", "draft", "before", "after"), FACTS),
        "target": TARGET,
        "weights": WEIGHTS,
        "fit": FIT,
        "stack": STACK,
        "host": HOST,
        "serve": SERVE,
    }
)


def unknown(path: str) -> bool:
    """Whether a dotted word isn't in the vocabulary.

    >>> unknown("target.device"), unknown("stage.after.heads"), unknown("stage.options.bits"), unknown("target.colour")
    (False, False, False, True)
    """
    parts = path.split(".")
    if any(part in OPEN for part in parts[:2]):
        return len(parts) < 2
    if parts[0] in {"stage", "first", "second"} and len(parts) == 3:
        parts = parts[1:]
    return len(parts) != 2 or parts[1] not in WORDS.get(parts[0], {})
