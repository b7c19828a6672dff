"""vLLM on Trainium and Inferentia: the folder that `compile: {engine: neuron}` emits, started in AWS' container."""

from __future__ import annotations

from typing import Any

from optikit.deploy.bundle import ROOT, Bundle, Served

SUMMARY = "vLLM on AWS Neuron"
IMAGE = (
    "763104351884.dkr.ecr.us-east-1.amazonaws.com/huggingface-vllm-inference-neuronx:"
    "0.11.0-optimum0.4.4-neuronx-py310-sdk2.26.1-ubuntu22.04"
)


def bundle(options: Any, served: Served) -> Bundle:
    """Return how to start the emitted folder."""
    return Bundle(
        image=options.image or IMAGE,
        command=("sh", f"{ROOT}/compiled/neuron/serve.sh"),
        port=8000,
        health="/health",
        api="openai",
        model=options.name or served.name,
        needs=("compiled/neuron", "model"),
        shared_memory=4,
        limits=LIMITS,
        source="sagemaker-python-sdk huggingface-vllm-neuronx.json; aws-neuron-sdk documentation",
    )


LIMITS = (
    "Shapes are those of `compile: {engine: neuron}`; the first start compiles where no cache is given.",
    "The devices /dev/neuron* have to be passed to the container; on Kubernetes Neuron's device plugin does.",
)
