"""TensorRT-LLM's own server: trtllm-serve, on the folder that its compile stage emits or on the model directory."""

from __future__ import annotations

from typing import Any

from optikit.deploy.bundle import BATCH, EVERYWHERE, ROOT, Bundle, Served, release, words

SUMMARY = "TensorRT-LLM's trtllm-serve"
CHECKED = "emitted only; keys and flags read in its source"
VERSION = "1.2.1"
COMPILED = "compiled/tensorrt-llm"


def bundle(options: Any, served: Served) -> Bundle:
    """Return how to start the emitted folder, whose serve.yaml says how; without one, the model with flags."""
    emitted = COMPILED in served.folders
    return Bundle(
        image=options.image or f"nvcr.io/nvidia/tensorrt-llm/release:{release(options.version, VERSION)}",
        command=("sh", f"{ROOT}/{COMPILED}/serve.sh") if emitted else ("trtllm-serve", f"{ROOT}/model"),
        arguments=() if emitted else flags(options, served),
        port=8000,
        health="/health",
        api="openai",
        name=options.name or served.name,
        model="model" if emitted else options.name or served.name,
        needs=(COMPILED, "model") if emitted else ("model",),
        writes=emitted,
        shared_memory=4,
        limits=LIMITS if emitted else (),
        source="NVIDIA/TensorRT-LLM tensorrt_llm/commands/serve.py, llmapi/llm_args.py (1.2)",
    )


def flags(options: Any, served: Served) -> tuple[str, ...]:
    """Return what trtllm-serve is told of a model without a folder of its own."""
    told = {
        "--host": EVERYWHERE,
        "--port": 8000,
        "--served_model_name": options.name or served.name,
        "--tp_size": served.tensor_parallel("tensorrt-llm", options),
        "--pp_size": options.pipeline_parallel or 1,
        "--max_batch_size": options.batch_size or BATCH,
        "--max_seq_len": options.sequence_length or served.context,
    }
    return words(told)


LIMITS = ("Length, batch and degree are those of `compile: {engine: tensorrt-llm}`: change them there.",)
