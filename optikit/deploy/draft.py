"""Draft models as servers want them: a Hugging Face directory of the target's vocabulary, with the window chosen here.

transformers reads how many tokens to draft from the *draft's* generation_config.json; its default there is 20, which
pays for few drafts. Others are told on their own command line.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optikit.models import intake
from optikit.problems import Problem

if TYPE_CHECKING:
    from optikit.models.facts import ModelFacts

CONFIG = "config.json"
GENERATION = "generation_config.json"


def problems(draft: ModelFacts, target: ModelFacts) -> Iterator[Problem]:
    """Yield why a draft can't serve a target: other tokens, a window that can't be rolled back, nothing to gain."""
    if draft.vocab != target.vocab:
        message = f"the draft's embedding has {draft.vocab} rows, the model's {target.vocab}"
        fix = "use a draft of the same family, or pad the smaller embedding where only its padding differs"
        yield Problem(code="draft-vocabulary", message=message, fix=fix)
    elif target.tokenizer_sha256 and draft.tokenizer_sha256 != target.tokenizer_sha256:
        ours, theirs = target.tokenizer_sha256[:12], draft.tokenizer_sha256[:12] or "none"
        message = f"the draft's tokenizer ({theirs}) does something else than the model's ({ours}): other vocabulary, "
        message += "merges, added tokens or splitting, so that its tokens mean other texts"
        yield Problem(code="draft-tokenizer", message=message, fix="use a draft made with the model's own tokenizer")
    if draft.sliding_window is not None:
        message = f"the draft keeps a window of {draft.sliding_window} tokens, which can't be rolled back"
        yield Problem(code="draft-window", message=message, fix="use a draft with full attention")
    if draft.parameters >= target.parameters:
        message = f"the draft has {draft.parameters} weights, the model {target.parameters}: drafting can't pay"
        yield Problem(code="draft-too-large", message=message, fix="use a smaller draft")


def write_draft(source: Path, dest: Path, *, tokens: int, context: int, schedule: str = "constant") -> None:
    """Write a draft directory: the source's files, its context raised to the target's, the window in its settings.

    Args:
        source: Hugging Face directory of the draft.
        dest: Directory to write to.
        tokens: Tokens to draft per step.
        context: The target's context: beyond its own, a draft is asked for positions that it doesn't have.
        schedule: `constant`, or `heuristic`: transformers then moves the window by what was accepted.
    """
    dest.mkdir(parents=True, exist_ok=True)
    for name in intake.model_files(source):  # copies: a file with two names in the store would change in both
        if name not in (CONFIG, GENERATION):
            shutil.copyfile(source / name, dest / name)
    config = _read(source / CONFIG)
    config["max_position_embeddings"] = max(context, config["max_position_embeddings"])
    _write(config, dest / CONFIG)
    settings = _read(source / GENERATION) if (source / GENERATION).is_file() else {}
    chosen = {"num_assistant_tokens": tokens, "num_assistant_tokens_schedule": schedule}
    # 0.4 there drops tokens that the draft isn't sure of; how far to draft was measured here, not guessed.
    _write(settings | chosen | {"assistant_confidence_threshold": 0.0}, dest / GENERATION)


def _read(path: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return value


def _write(value: Mapping[str, Any], path: Path) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
