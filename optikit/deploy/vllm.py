"""What to tell a server about a speculator: vLLM's speculative_config, LMI's properties, transformers' arguments.

A speculator is `{"method": "medusa" | "eagle3" | "draft" | "lookup", "tokens": k, …}`, as `speculator.json` has it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from optikit.errors import UsageError


def vllm(method: str, *, tokens: int, directory: str = "", longest_match: int = 3, parallel: int = 1) -> dict[str, Any]:
    """Return vLLM's `speculative_config`.

    Args:
        method: `medusa`, `eagle3`, `draft` or `lookup`.
        tokens: Tokens to draft per step.
        directory: Where the server sees heads or draft.
        longest_match: Tokens that a lookup matches at most; it goes down to 2, or to this if that is less.
        parallel: Tensor parallel size of the target, which vLLM wants of the draft, too.

    Raises:
        UsageError: There is no such method.
    """
    if method in ("medusa", "eagle3"):
        return {"method": method, "model": directory, "num_speculative_tokens": tokens}
    if method == "draft":
        found = {"method": "draft_model", "model": directory, "num_speculative_tokens": tokens}
        return found | {"draft_tensor_parallel_size": parallel}
    if method == "lookup":
        bounds = {"prompt_lookup_max": longest_match, "prompt_lookup_min": min(2, longest_match)}
        return {"method": "ngram", "num_speculative_tokens": tokens} | bounds
    raise UsageError(f"vLLM has no speculation by {method!r}", fix="use medusa, eagle3, draft or lookup")


def lmi_properties(model: str, speculation: Mapping[str, Any]) -> str:
    """Return the serving.properties of a large-model-inference container: vLLM's speculative_config as one line."""
    config = json.dumps(speculation, separators=(",", ":"))
    return f"engine=Python\noption.model_id={model}\noption.speculative_config={config}\n"


def transformers_arguments(method: str, *, tokens: int, longest_match: int = 3) -> dict[str, Any]:
    """Return arguments of transformers' `generate`; a draft is passed as `assistant_model` and brings its own settings.

    Raises:
        UsageError: transformers can't draft that way.
    """
    if method == "lookup":
        return {"prompt_lookup_num_tokens": tokens, "max_matching_ngram_size": longest_match}
    if method == "draft":
        return {}
    raise UsageError(f"transformers has no speculation by {method!r}", fix="use draft or lookup, or another server")
