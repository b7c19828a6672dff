"""Text Generation Inference 3.3: a model directory on NVIDIA GPUs, with Medusa heads or lookup."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from optikit.deploy.bundle import BATCH, ROOT, Bundle, Served, release, speculation

SUMMARY = "Text Generation Inference 3.3 (maintained for faults only)"
CHECKED = "emitted only; flags read in its launcher's source"
VERSION = "3.3.7"
HEADS = "/data/heads"
"""Where TGI is given the heads as its model: their configuration names the base model."""


def environment(options: Any, served: Served, method: str) -> dict[str, str]:
    """Return the launcher's settings as its variables: the same in a container and on SageMaker."""
    context = options.sequence_length or served.context
    found = {
        "NUM_SHARD": str(served.tensor_parallel("tgi", options)),
        "MAX_TOTAL_TOKENS": str(context),
        "MAX_INPUT_TOKENS": str(context - 1),
        "MAX_CONCURRENT_REQUESTS": str(options.batch_size or BATCH),
        "HF_HUB_OFFLINE": "1",
    }
    if method == "lookup":
        found["SPECULATE"] = str(max(int(each) for each in served.speculation["lengths"].values()))
    return found


def base_config(config: Mapping[str, object], base: str) -> str:
    """Return the heads' config.json with the base model where the container sees it."""
    return json.dumps({**config, "base_model_name_or_path": base}, indent=2) + "\n"


def bundle(options: Any, served: Served) -> Bundle:
    """Return how to start TGI; with heads, on a directory of links whose configuration names the base model."""
    name = options.name or served.name
    version = release(options.version, VERSION)
    method, place = speculation("tgi", served, version)
    heads = method == "medusa"
    return Bundle(
        image=options.image or f"ghcr.io/huggingface/text-generation-inference:{version}",
        command=("sh", f"{ROOT}/serve/tgi/start.sh") if heads else (),
        arguments=() if heads else ("--model-id", f"{ROOT}/model", "--port", "8080"),
        environment=environment(options, served, method),
        port=8080,
        health="/health",
        api="openai",
        name=options.name or served.name,
        model=name,
        files={"start.sh": START} if heads else {},
        needs=("model", *([place] if place else [])),
        shared_memory=1,
        limits=LIMITS,
        source="text-generation-inference 3.3.7 launcher/src/main.rs, server/text_generation_server/models/__init__.py",
    )


START = f"""#!/bin/sh
# TGI is given the heads as its model; their config.json names the base model, as this container sees it.
set -eu
mkdir -p {HEADS}
for file in {ROOT}/speculator/v1/*; do ln -sf "$file" {HEADS}/; done
rm -f {HEADS}/config.json
sed 's|"base_model_name_or_path": *"[^"]*"|"base_model_name_or_path": "{ROOT}/model"|' \\
  {ROOT}/speculator/v1/config.json > {HEADS}/config.json
exec text-generation-launcher --model-id {HEADS} --port 8080
"""
LIMITS = (
    "The request's `model` is ignored: a launcher serves one model.",
    "With Medusa heads TGI drafts a chain; its kernels for gptq and awq want 4 bits.",
)
