"""Decodes with the graph beside this file on an NVIDIA GPU; the first start makes the engine. Needs requirements.txt.

python3 run.py "The capital of France is" 32
"""

from __future__ import annotations

import sys
from pathlib import Path

EXECUTION_PROVIDER = "NvTensorRtRtx"


def main(prompt: str, tokens: int) -> None:
    """Print the prompt and what the model says next."""
    import onnxruntime_ep_nv_tensorrt_rtx as plugin
    import onnxruntime_genai as genai

    genai.register_execution_provider_library(EXECUTION_PROVIDER, plugin.get_library_path())
    config = genai.Config(str(Path(__file__).resolve().parent))
    config.clear_providers()
    config.append_provider(EXECUTION_PROVIDER)
    model = genai.Model(config)
    tokenizer = genai.Tokenizer(model)
    encoded = tokenizer.encode(prompt)
    settings = genai.GeneratorParams(model)
    settings.set_search_options(do_sample=False, max_length=len(encoded) + tokens)
    generator = genai.Generator(model, settings)
    generator.append_tokens(encoded)
    while not generator.is_done():
        generator.generate_next_token()
    sys.stdout.write(tokenizer.decode(generator.get_sequence(0)) + "\n")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "The capital of France is", int(sys.argv[2]) if len(sys.argv) > 2 else 8)
