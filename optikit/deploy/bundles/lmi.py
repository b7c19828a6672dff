"""Large Model Inference containers of AWS (DJL Serving with vLLM): serving.properties beside a model directory."""

from __future__ import annotations

import json
from typing import Any

from optikit.deploy.bundle import Bundle, Served, speculation
from optikit.deploy.bundles import vllm

SUMMARY = "AWS Large Model Inference container (DJL Serving on vLLM)"
CHECKED = "emitted only; keys read in its documentation"
REPOSITORY = "763104351884.dkr.ecr.{region}.amazonaws.com/djl-inference"
VERSION = "20"
TAG = f"0.36.0-lmi{VERSION}.0.0-cu128-v1.0"
"""vLLM 0.15.1 (djl-serving docs, lmi/release_notes.md)."""
MODEL = "/opt/ml/model"
"""Where the container looks for serving.properties."""


def properties(options: Any, served: Served) -> str:
    """Return serving.properties: the engine, and vLLM's arguments passed through as `option.NAME`."""
    arguments = vllm.engine_arguments("lmi", VERSION, options, served, MODEL)
    lines = ["engine=Python", f"option.model_id={arguments.pop('model')}"]
    lines.append(f"option.tensor_parallel_degree={arguments.pop('tensor_parallel_size', 1)}")
    return "\n".join([*lines, *(f"option.{name}={_value(value)}" for name, value in arguments.items())]) + "\n"


def _value(value: Any) -> str:
    return json.dumps(value, separators=(",", ":")) if isinstance(value, dict) else str(value)


def bundle(options: Any, served: Served) -> Bundle:
    """Return how to start the container on one machine; `sagemaker-lmi` is the same behind an endpoint."""
    _, place = speculation("lmi", served, VERSION)
    mounts = [("serve/lmi/serving.properties", f"{MODEL}/serving.properties"), ("model", f"{MODEL}/model")]
    return Bundle(
        image=options.image or f"{REPOSITORY.format(region=options.region)}:{TAG}",
        environment={"HF_HUB_OFFLINE": "1"},
        port=8080,
        health="/ping",
        api="openai",
        name=options.name or served.name,
        model=options.name or served.name,
        files={"serving.properties": properties(options, served)},
        mounts=(*mounts, *([(place, f"{MODEL}/{place}")] if place else [])),
        needs=("model", *([place] if place else [])),
        shared_memory=4,
        limits=LIMITS,
        source="djl-serving 0.36 docs lmi/user_guides/vllm_user_guide.md, lmi/release_notes.md",
    )


LIMITS = (
    "Pulling the image needs `aws ecr get-login-password` for its registry first.",
    "Speculation is that of the vLLM inside (0.15.1): EAGLE-3, drafts, lookup and Medusa as that version has them.",
)
