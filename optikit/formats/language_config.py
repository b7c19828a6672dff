"""transformers' configuration of a directory's language model: of a wrapper's, the part that is one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoConfig


def read(directory: Path) -> Any:
    """Return the configuration of the dense language model in a directory, whatever its weights are packed in."""
    whole = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    config = getattr(whole, "text_config", whole)
    config.tie_word_embeddings = whole.tie_word_embeddings
    for each in (whole, config):
        vars(each).pop("quantization_config", None)
    return config
