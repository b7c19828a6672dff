"""transformers' configuration of a directory's language model: of a wrapper's, the part that is one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoConfig

from optikit.models import architectures, language_part


def read(directory: Path) -> Any:
    """Return the configuration of the dense language model in a directory, whatever its weights are packed in."""
    whole = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    config = _as_causal(getattr(whole, "text_config", whole))
    config.tie_word_embeddings = whole.tie_word_embeddings
    for each in (whole, config):
        vars(each).pop("quantization_config", None)
    return config


def _as_causal(config: Any) -> Any:
    """Return the configuration of the class that computes a wrapper's language model in text, where it has none."""
    row = architectures.find(str(config.model_type))
    if row is None or not row.computed_as:
        return config
    told = row.meant(language_part.in_text(config.to_dict()))
    return AutoConfig.for_model(row.computed_as, **{key: value for key, value in told.items() if key != "model_type"})
