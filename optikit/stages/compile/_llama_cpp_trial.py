"""`python -m optikit.stages.compile._llama_cpp_trial DIR TOKENS.npy LOGITS.npy TEXTS.json N THREADS`: run a gguf file.

A process of its own, because llama.cpp ends it by a signal where it can't go on. Prints {"tokens": […], "texts": […]}.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

PROMPT = "The capital of France is"


def main(directory: str, tokens: str, logits: str, texts: str, count: int, threads: int) -> None:
    """Write the logits of a text, (tokens, vocabulary) float32; print what is decoded, and how texts are cut."""
    import numpy as np

    from optikit.runtime.decoders.llama_cpp import LlamaCppDecoder

    text = np.load(tokens, allow_pickle=False)
    decoder = LlamaCppDecoder(Path(directory), threads=threads, max_tokens=max(len(text), len(PROMPT) + count))
    np.save(logits, decoder.forward(text, 0))
    cut = [decoder.tokenize(each) for each in json.loads(Path(texts).read_text(encoding="utf-8"))]
    decoded = list(decoder.greedy(np.array(decoder.tokenize(PROMPT), np.int64), count))
    sys.stdout.write(json.dumps({"tokens": decoded, "texts": cut}) + "\n")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], sys.argv[4], int(sys.argv[5]), int(sys.argv[6]))
