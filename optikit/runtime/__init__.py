"""Runtimes behind one `Decoder` protocol: transformers, onnxruntime, OpenVINO, llama.cpp.

    from optikit import runtime
    decoder = runtime.load(Path("out/compiled/onnxruntime"))
    for token in decoder.greedy(np.array(tokenizer.encode("Once upon a time")), 64): ...
    for number, step in batched.write(decoder, prompts, requests, batch=8): ...

What isn't needed isn't imported: a compiled directory is served without torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from optikit.errors import InputMissingError, UsageError
from optikit.models import intake

if TYPE_CHECKING:
    from optikit.runtime.decoder import Decoder

MARKS = {
    "onnxruntime": "genai_config.json",
    "openvino": "openvino_model.xml",
    "llama-cpp": "model.gguf",
    "transformers": "config.json",
}
"""The file by which a directory of each runtime is known, in the order of preference."""
INSIDE = ("compiled/onnxruntime", "compiled/openvino", "compiled/llama-cpp", "model")
"""Where an output directory of `optikit run` holds such directories, best first."""
SPECULATOR = "speculator"
"""Where it holds the parameters of its speculation."""


def find(directory: Path, runtime: str = "auto") -> tuple[str, Path]:
    """Return the runtime that loads a directory, and the directory it loads.

    Args:
        directory: A compiled directory, a Hugging Face directory, or what `optikit run` wrote.
        runtime: `auto`, or the runtime that it has to be.

    Raises:
        InputMissingError: Nothing there can be loaded.
        UsageError: There is no such runtime.
    """
    if runtime not in ("auto", *MARKS):
        raise UsageError(f"there is no runtime {runtime!r}", fix=f"use auto, {' or '.join(MARKS)}")
    wanted = MARKS if runtime == "auto" else {runtime: MARKS[runtime]}
    for place in (*(directory / inside for inside in INSIDE if inside != "model"), directory, directory / "model"):
        for name, mark in wanted.items():
            if (place / mark).is_file():
                return name, place
    if not directory.is_dir():
        raise InputMissingError(f"{directory} is not a directory", fix="give a model directory")
    message = f"{directory} holds no model: no {' or '.join(wanted.values())}"
    raise InputMissingError(message, fix="give a compiled directory, a Hugging Face directory, or the output of a run")


def load(
    directory: Path,
    *,
    runtime: str = "auto",
    dtype: str = "auto",
    threads: int | None = None,
    max_tokens: int | None = None,
    speculator: Path | Literal["auto"] | None = "auto",
    device: str = "cpu",
) -> Decoder:
    """Load a model.

    Args:
        directory: A compiled directory, a Hugging Face directory (dense or packed), or what `optikit run` wrote.
        runtime: `auto`, `onnxruntime`, `openvino`, `llama-cpp` or `transformers`.
        dtype: `auto` is what the directory holds; transformers can also run it in `float32` or `bfloat16`.
        threads: CPU threads; None is all that this process may use.
        max_tokens: Longest sequence that the cache will hold; None is the model's context.
        speculator: Directory of a speculator; `auto` takes the one that a run left beside the model, None none. The
            decoder's greedy texts then are the same, sooner.
        device: torch device of what transformers loads; compiled directories run on the processor, for which they
            were compiled.

    Raises:
        InputMissingError: Nothing there can be loaded.
        IntegrityError: A file is damaged.
        RefusedError: Its settings would make a loader run code.
        UsageError: A runtime, dtype or length that it can't have.
    """
    name, place = find(directory, runtime)
    intake.require_harmless(place)
    if speculator == "auto":
        beside = directory / SPECULATOR
        speculator = beside if place != directory and beside.is_dir() else None
    decoder = _load(name, place, device, dtype=dtype, threads=threads, max_tokens=max_tokens)
    if speculator is None:
        return decoder
    from optikit.runtime.speculation.speculator import read, speculating

    return speculating(decoder, read(speculator), _weights(directory, place))


def _weights(directory: Path, place: Path) -> Path | None:
    """Return the directory of the weights that a decoder was made of, where they are at hand."""
    return next((each for each in (directory / "model", place) if any(each.glob("*.safetensors"))), None)


def _load(name: str, place: Path, device: str, *, dtype: str, threads: int | None, max_tokens: int | None) -> Decoder:
    if name == "onnxruntime":
        from optikit.runtime.decoders.onnxruntime import OnnxDecoder

        return OnnxDecoder(place, dtype=dtype, threads=threads, max_tokens=max_tokens)
    if name == "openvino":
        from optikit.runtime.decoders.openvino import OpenVinoDecoder

        return OpenVinoDecoder(place, dtype=dtype, threads=threads, max_tokens=max_tokens)
    if name == "llama-cpp":
        from optikit.runtime.decoders.llama_cpp import LlamaCppDecoder

        return LlamaCppDecoder(place, dtype=dtype, threads=threads, max_tokens=max_tokens)
    from optikit.runtime.decoders.transformers import TorchDecoder

    return TorchDecoder(place, dtype=dtype, threads=threads, max_tokens=max_tokens, device=device)
