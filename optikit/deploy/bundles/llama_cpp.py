"""llama.cpp's server: the gguf file behind OpenAI's API."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from optikit.deploy.bundle import BATCH, EVERYWHERE, ROOT, Bundle, Served

SUMMARY = "llama.cpp's llama-server"
CHECKED = "gguf file loaded and decoded by llama.cpp; command emitted only"
IMAGES: Mapping[str, str] = MappingProxyType(
    {"cpu": "ghcr.io/ggml-org/llama.cpp:server", "cuda": "ghcr.io/ggml-org/llama.cpp:server-cuda"}
)


def bundle(options: Any, served: Served) -> Bundle:
    """Return how to start llama-server; its context is shared by all requests that it answers at a time."""
    context = (options.sequence_length or served.context) * (options.batch_size or BATCH)
    name = options.name or served.name
    arguments = [
        "-m",
        f"{ROOT}/{gguf(served)}",
        "--alias",
        name,
        "-c",
        str(context),
        "-np",
        str(options.batch_size or BATCH),
    ]
    arguments += ["--host", EVERYWHERE, "--port", "8080", "--metrics"]
    return Bundle(
        image=options.image or IMAGES[served.target.device],
        arguments=(*arguments, *(("-ngl", "999") if served.gpus else ())),
        port=8080,
        health="/health",
        api="openai",
        name=options.name or served.name,
        model=name,
        needs=("compiled/llama-cpp",),
        limits=LIMITS,
        source="ggml-org/llama.cpp tools/server/README.md, docs/docker.md",
    )


def gguf(served: Served) -> str:
    """Return the gguf file's path in the output; where it is only planned, the name that the stage gives it."""
    found = sorted(each for each in served.files if each.startswith("compiled/llama-cpp/") and each.endswith(".gguf"))
    return found[0] if found else "compiled/llama-cpp/model.gguf"


LIMITS = (
    "The images' tags move; pin one by digest.",
    "The context is divided among the requests that are answered at a time: -c is context times concurrency.",
)
