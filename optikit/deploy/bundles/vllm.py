"""vLLM: a model directory behind OpenAI's API, on NVIDIA GPUs and on x86 CPUs with AVX-512."""

from __future__ import annotations

import json
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from optikit.deploy.bundle import BATCH, EVERYWHERE, ROOT, Bundle, Served, release, speculation

SUMMARY = "vLLM's OpenAI server"
CHECKED = "arguments read by vLLM 0.32's own parser"
VERSION = "0.32.0"
"""0.33 has no Medusa; see support.toml."""
IMAGES: Mapping[str, str] = MappingProxyType(
    {"cuda": "vllm/vllm-openai:v", "cpu": "public.ecr.aws/q9t5s3a7/vllm-cpu-release-repo:v"}
)
CACHE_GIB = 4
"""Memory for the cache on a CPU."""


def engine_arguments(server: str, version: str, options: Any, served: Served, root: str = ROOT) -> dict[str, Any]:
    """Return vLLM's engine arguments: what its own command line, LMI and Triton's backend all take.

    Args:
        server: Whose vLLM it is, as support.toml calls it.
        version: Its release, as support.toml counts them.
        options: What the recipe says of it.
        served: The artifact.
        root: Where the output is seen.
    """
    found: dict[str, Any] = {
        "model": f"{root}/model",
        "max_model_len": options.sequence_length or served.context,
        "max_num_seqs": options.batch_size or BATCH,
    }
    told = {
        "dtype": options.dtype,
        "quantization": options.quantization,
        "pipeline_parallel_size": options.pipeline_parallel,
    }
    found |= {name: value for name, value in told.items() if value is not None}
    if served.gpus:
        found["tensor_parallel_size"] = served.tensor_parallel(server, options)
    method, place = speculation(server, served, version)
    if method:
        found["speculative_config"] = speculative(options, served, f"{root}/{place}" if place else "")
        found["speculative_config"] |= dict(options.speculative_config or {})
    return found


def speculative(options: Any, served: Served, directory: str) -> dict[str, Any]:
    """Return `speculative_config` as the speculator's stage wrote it, with its directory as the container sees it."""
    found = dict(served.speculation["servers"]["vllm"]["speculative_config"])
    if directory:
        found["model"] = directory
    if options.num_speculative_tokens is not None:
        found["num_speculative_tokens"] = options.num_speculative_tokens
    if "draft_tensor_parallel_size" in found:
        shared = options.draft_tensor_parallel or served.tensor_parallel("vllm", options)
        found["draft_tensor_parallel_size"] = shared
    return found


def flags(arguments: Mapping[str, Any]) -> tuple[str, ...]:
    """Return engine arguments as vLLM's command line wants them."""
    found = []
    for name, value in arguments.items():
        found += [f"--{name.replace('_', '-')}", json.dumps(value) if isinstance(value, dict) else str(value)]
    return tuple(found)


def bundle(options: Any, served: Served) -> Bundle:
    """Return how to start vLLM on the model directory."""
    name, version = options.name or served.name, release(options.version, VERSION)
    arguments = engine_arguments("vllm", version, options, served)
    environment = {"HF_HUB_OFFLINE": "1"}
    if served.gpus:
        arguments["gpu_memory_utilization"] = options.gpu_memory_utilization or 0.9
    else:
        environment["VLLM_CPU_KVCACHE_SPACE"] = str(CACHE_GIB)
    _, place = speculation("vllm", served, version)
    return Bundle(
        image=options.image or IMAGES[served.target.device] + version,
        arguments=(*flags(arguments), "--served-model-name", name, "--host", EVERYWHERE, "--port", "8000"),
        environment=environment,
        port=8000,
        health="/health",
        api="openai",
        name=options.name or served.name,
        model=name,
        needs=("model", *([place] if place else [])),
        shared_memory=4,
        limits=LIMITS,
        source="vllm 0.32.0 engine/arg_utils.py, entrypoints/openai; docs/deployment/docker.md",
    )


LIMITS = (
    "Medusa heads load in vLLM before 0.33 only, and draft one chain, no tree.",
    "On a CPU vLLM computes gptq and awq in 4 bits, compressed-tensors int8, and dense weights.",
)
