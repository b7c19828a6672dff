"""`python -m optikit.stages.compile._onnx_trial DIR N`: decode N tokens from DIR with onnxruntime-genai alone.

A process of its own, because a wrong graph ends it by a signal. Prints {"tokens": […], "text": "…"}.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

PROMPT = "The capital of France is"


def main(directory: str, count: int) -> None:
    """Decode greedily from a fixed prompt; end-of-text is put off until `count` tokens are there."""
    import onnxruntime_genai as genai

    model = genai.Model(directory)
    tokenizer = genai.Tokenizer(model)
    prompt = tokenizer.encode(PROMPT)
    settings = genai.GeneratorParams(model)
    length = len(prompt) + count
    settings.set_search_options(do_sample=False, min_length=length, max_length=_places(directory, length))
    generator = genai.Generator(model, settings)
    generator.append_tokens(prompt)
    tokens: list[int] = []
    while len(tokens) < count and not generator.is_done():
        generator.generate_next_token()
        tokens.append(int(generator.get_next_tokens()[0]))
    sys.stdout.write(json.dumps({"tokens": tokens, "text": tokenizer.decode(tokens)}) + "\n")


def _places(directory: str, length: int) -> int:
    """Return how many places the cache needs: attention with a window refuses one that is smaller than the window."""
    model = json.loads((Path(directory) / "genai_config.json").read_text(encoding="utf-8"))["model"]
    window = int(model["decoder"].get("sliding_window", {}).get("window_size", 0))
    return max(length, min(window, int(model["context_length"])))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
