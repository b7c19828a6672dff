"""Ollama: the gguf file under a name, by a Modelfile."""

from __future__ import annotations

from typing import Any

from optikit.deploy.bundle import BATCH, ROOT, Bundle, Served
from optikit.deploy.bundles.llama_cpp import gguf

SUMMARY = "Ollama"
CHECKED = "gguf file loaded and decoded by llama.cpp; Modelfile emitted only"
HERE = f"{ROOT}/serve/ollama"


def bundle(options: Any, served: Served) -> Bundle:
    """Return a Modelfile, and a start that makes the model known to Ollama before it serves."""
    name = options.name or served.name
    modelfile = f"FROM {ROOT}/{gguf(served)}\nPARAMETER num_ctx {options.sequence_length or served.context}\n"
    return Bundle(
        image=options.image or "ollama/ollama",
        command=("sh", f"{HERE}/start.sh"),
        environment={"OLLAMA_HOST": "0.0.0.0:11434", "OLLAMA_NUM_PARALLEL": str(options.batch_size or BATCH)},
        port=11434,
        health="/api/version",
        api="openai",
        name=options.name or served.name,
        model=name,
        files={"Modelfile": modelfile, "start.sh": START % (HERE, name)},
        needs=("compiled/llama-cpp",),
        limits=LIMITS,
        source="ollama/ollama docs/modelfile.md, docs/api.md, docs/openai.md",
    )


START = """#!/bin/sh
# Serve, and make the model known under its name: Ollama copies the gguf file into its own store.
set -eu
ollama serve &
server=$!
trap 'kill -TERM "$server"' TERM INT
until ollama list > /dev/null 2>&1; do sleep 1; kill -0 "$server"; done
cd %s
ollama create %s -f Modelfile
wait "$server"
"""
LIMITS = (
    "The chat template is the gguf file's own; a base model without one answers prompts, not chats.",
    "The image's tag moves; pin one by digest.",
)
