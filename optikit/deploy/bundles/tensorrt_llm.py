"""TensorRT-LLM's own server: trtllm-serve on the model directory, with the folder that its compile stage emits."""

from __future__ import annotations

from typing import Any

from optikit.deploy.bundle import ROOT, Bundle, Served

SUMMARY = "TensorRT-LLM's trtllm-serve"
IMAGE = "nvcr.io/nvidia/tensorrt-llm/release:1.2.1"


def bundle(options: Any, served: Served) -> Bundle:
    """Return how to start the emitted folder; what the engine is told stands in its serve.yaml."""
    return Bundle(
        image=options.image or IMAGE,
        command=("sh", f"{ROOT}/compiled/tensorrt-llm/serve.sh"),
        port=8000,
        health="/health",
        api="openai",
        model=options.name or served.name,
        needs=("compiled/tensorrt-llm", "model"),
        shared_memory=4,
        limits=LIMITS,
        source="NVIDIA/TensorRT-LLM tensorrt_llm/commands/serve.py, llmapi/llm_args.py (1.2)",
    )


LIMITS = ("Length, batch and degree are those of `compile: {engine: tensorrt-llm}`: change them there.",)
