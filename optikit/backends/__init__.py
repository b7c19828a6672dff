"""Stages done by other libraries: `backend:` in a recipe names a module in `VERB/METHOD/`, which fits `protocol.Stage`.

Each runs in the managed environment that its `ENVIRONMENT` names, so `run` imports what that environment has, and
optikit's own modules only as far as they live on torch, safetensors and tokenizers. What it writes is held to the same
promise as what our own stages write, and read back bit by bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

REFUSED: Mapping[tuple[str, str, str], str] = MappingProxyType(
    {
        ("quantize", "gptq", "auto-gptq"): (
            "auto-gptq 0.7.1 quantizes with CUDA only, and its environment computes on the CPU (there it loads `gptq` "
            "directories)"
        ),
        ("quantize", "awq", "llm-compressor"): (
            "llm-compressor 0.14 does AWQ on an accelerator only, and its environment computes on the CPU"
        ),
    }
)
"""Libraries that have a method and can't do it here: (verb, method, backend) → why. Source: their own errors, "Load
pretrained model to do quantization requires CUDA available" and "Cannot access accelerator device when none is
available"."""
