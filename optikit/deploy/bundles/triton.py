"""Triton Inference Server: vLLM's backend on the model directory, or the ONNX Runtime backend on the compiled graph.

The ONNX Runtime backend computes forward passes: whoever asks holds the cache and chooses the tokens, so client.py,
which does, lies beside it. vLLM's backend answers with text.
"""

from __future__ import annotations

import json
from typing import Any

from optikit.deploy.bundle import ROOT, Bundle, Served, release, speculation
from optikit.deploy.bundles import vllm

SUMMARY = "Triton Inference Server with vLLM's backend"
CHECKED = "config.pbtxt read as Triton's own message"
VERSION = "26.05"


def bundle(options: Any, served: Served) -> Bundle:
    """Return a model repository of one model: config.pbtxt, and vLLM's engine arguments in 1/model.json."""
    name = options.name or served.name
    arguments = vllm.engine_arguments("vllm", vllm.VERSION, options, served)
    _, place = speculation("vllm", served, vllm.VERSION)
    return Bundle(
        image=options.image or f"nvcr.io/nvidia/tritonserver:{release(options.version, VERSION)}-vllm-python-py3",
        command=("tritonserver",),
        arguments=("--model-repository", f"{ROOT}/serve/triton/models"),
        environment={"HF_HUB_OFFLINE": "1"},
        port=8000,
        health="/v2/health/ready",
        api="triton",
        name=options.name or served.name,
        model=name,
        files={
            f"models/{name}/config.pbtxt": CONFIG,
            f"models/{name}/1/model.json": json.dumps(
                arguments | {"gpu_memory_utilization": options.gpu_memory_utilization or 0.9}, indent=1
            )
            + "\n",
        },
        needs=("model", *([place] if place else [])),
        shared_memory=4,
        limits=LIMITS,
        source="triton-inference-server/vllm_backend README, samples/model_repository, src/model.py",
    )


CONFIG = """backend: "vllm"

# vLLM schedules requests and takes GPUs itself: one instance, chosen by the backend.
instance_group [
  {
    count: 1
    kind: KIND_MODEL
  }
]
model_transaction_policy {
  decoupled: true
}
"""
LIMITS = (
    "Clients ask /v2/models/NAME/generate with `text_input`; OpenAI's API is a front end of its own in that image.",
    "Speculation is that of the vLLM inside the image.",
)
