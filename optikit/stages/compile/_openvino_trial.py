"""`python -m optikit.stages.compile._openvino_trial DIR N THREADS`: decode N tokens from DIR with openvino-genai alone.

A process of its own, because on a processor that OpenVINO can't use it ends by a signal. Prints {"text": "…"}.
"""

from __future__ import annotations

import json
import sys

PROMPT = "The capital of France is"


def main(directory: str, count: int, threads: int) -> None:
    """Decode greedily from a fixed prompt; end-of-text doesn't end it before `count` tokens are there."""
    import openvino_genai as genai

    # With one thread, 2026.4 dies of SIGFPE in attention where it computes in bf16; see runtime/openvino_decoder.py.
    precision = {"INFERENCE_PRECISION_HINT": "f32"} if threads == 1 else {}
    pipeline = genai.LLMPipeline(directory, "CPU", INFERENCE_NUM_THREADS=threads, **precision)
    settings = genai.GenerationConfig()
    settings.max_new_tokens = settings.min_new_tokens = count
    settings.do_sample = False
    settings.apply_chat_template = False
    text = str(pipeline.generate(PROMPT, settings))
    sys.stdout.write(json.dumps({"text": text}) + "\n")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
