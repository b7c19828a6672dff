"""optikit's own server: a compiled graph or a model directory behind OpenAI's API, with its speculator."""

from __future__ import annotations

from typing import Any

from optikit import __version__
from optikit.deploy.bundle import BATCH, EVERYWHERE, ROOT, Bundle, Served

SUMMARY = "optikit serve"
CHECKED = "served, and asked for tokens"


def bundle(options: Any, served: Served) -> Bundle:
    """Return how to start `optikit serve` on the output itself."""
    name = options.name or served.name
    arguments = ["serve", ROOT, "--host", EVERYWHERE, "--port", "8000", "--batch", str(options.batch_size or BATCH)]
    if options.sequence_length is not None:
        arguments += ["--max-length", str(options.sequence_length)]
    return Bundle(
        image=options.image or "python:3.12-slim",
        build=f"RUN pip install --no-cache-dir 'optikit[serve]=={__version__}'",
        command=("optikit",),
        arguments=(*arguments, "--name", name),
        port=8000,
        health="/health",
        api="openai",
        name=options.name or served.name,
        model=name,
        needs=(
            "compiled/onnxruntime" if "compiled/onnxruntime" in served.folders else "model",
            *(["speculator"] if "speculator" in served.folders else []),
        ),
        limits=LIMITS,
        source="optikit serve --help",
    )


LIMITS = ("Several texts at once are decoded in one batch without the speculator; one text alone uses it.",)
