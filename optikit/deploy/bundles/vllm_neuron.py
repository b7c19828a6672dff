"""vLLM on Trainium and Inferentia: the folder that `compile: {engine: neuron}` emits, started in a Neuron container."""

from __future__ import annotations

from typing import Any

from optikit.deploy.bundle import BATCH, EVERYWHERE, ROOT, Bundle, Served, words

SUMMARY = "vLLM with AWS' Neuron plugin"
CHECKED = "emitted only; the folder's own self-check runs on the instance"
IMAGE = (
    "763104351884.dkr.ecr.us-east-1.amazonaws.com/huggingface-vllm-inference-neuronx:"
    "0.11.0-optimum0.4.4-neuronx-py310-sdk2.26.1-ubuntu22.04"
)
COMPILED = "compiled/neuron"


def bundle(options: Any, served: Served) -> Bundle:
    """Return how to start the emitted folder; without one, vLLM on the model with the shapes that were asked for."""
    emitted = COMPILED in served.folders
    return Bundle(
        image=options.image or IMAGE,
        command=("sh", f"{ROOT}/{COMPILED}/serve.sh") if emitted else ("vllm", "serve", f"{ROOT}/model"),
        arguments=() if emitted else flags(options, served),
        port=8000,
        health="/health",
        api="openai",
        name=options.name or served.name,
        model=f"{ROOT}/model" if emitted else options.name or served.name,
        needs=(COMPILED, "model") if emitted else ("model",),
        writes=emitted,
        shared_memory=4,
        limits=LIMITS,
        source="sagemaker-python-sdk huggingface-vllm-neuronx.json; aws-neuron-sdk documentation",
    )


def flags(options: Any, served: Served) -> tuple[str, ...]:
    """Return what vLLM is told of a model without a folder of its own."""
    told = {
        "--host": EVERYWHERE,
        "--port": 8000,
        "--served-model-name": options.name or served.name,
        "--tensor-parallel-size": served.tensor_parallel("vllm-neuron", options),
        "--max-num-seqs": options.batch_size or BATCH,
        "--max-model-len": options.sequence_length or served.context,
    }
    return words(told)


LIMITS = (
    "The first start compiles where no cache is given; with `compile: {engine: neuron}` shapes are that stage's.",
    "The devices /dev/neuron* have to be passed to the container; on Kubernetes Neuron's device plugin does.",
)
