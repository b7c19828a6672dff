"""What every part of planning reads: the recipe with its sources resolved; and how a step gets its key."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from optikit import environments, host, stages
from optikit.host import versions
from optikit.models.facts import ModelFacts
from optikit.recipe.schema import Recipe
from optikit.stage import Stage, StageOptions
from optikit.store.code_digest import source_digest
from optikit.store.sources import ModelSource, TextSource
from optikit.store.store import cache_key
from optikit.targets import Target

KEY_SCHEMA = 1
"""Raised when the meaning of a cache key changes."""
BYTES_PER_TOKEN = 4
"""Of prose, by tokenizers of 32,000 to 150,000 words."""


@dataclass(frozen=True, kw_only=True)
class Context:
    """A recipe with its sources resolved.

    Attributes:
        device: torch device that calibrated stages will use.
        facts: Facts of the untouched model.
        texts: Resolved texts by role: `calibration`, `perplexity`, `prompts`.
        drafts: Resolved draft models by the index of the stage that names one.
    """

    recipe: Recipe
    device: str
    target: Target
    model: ModelSource
    facts: ModelFacts
    texts: Mapping[str, TextSource]
    drafts: Mapping[int, ModelSource] = field(default_factory=dict)

    def stage(self, verb: str, method: str, backend: str = stages.OURS) -> Stage:
        """Import a stage module."""
        return stages.load(verb, method, backend)

    def key(self, verb: str, method: str, options: StageOptions, *, backend: str | None = None, **parts: Any) -> str:
        """Return the cache key of a step: everything that decides its result, and nothing else.

        Never part of it: paths, times, user names, the number of threads.
        """
        who = stages.OURS if backend is None else backend
        stage = self.stage(verb, method, who)
        return cache_key(
            schema=KEY_SCHEMA,
            verb=verb,
            method=method,
            code=source_digest(stages.module(verb, method, who)),
            options=options.model_dump(mode="json"),
            seed=self.recipe.seed,
            **({} if backend is None else {"backend": backend}),
            **_installed(stage),
            **parts,
        )


def _installed(stage: Stage) -> dict[str, Any]:
    """Return what decides which libraries do the work: their versions here, or the environment's lock."""
    if stage.ENVIRONMENT is None:
        return {"versions": versions(stage.LIBRARIES)}
    return {"environment": environments.find(stage.ENVIRONMENT).digest}


def here() -> dict[str, Any]:
    """Return what of this machine decides a speed."""
    return {"cpu": host.cpu_model(), "threads": host.threads()}


def tokens_of(text: TextSource) -> int:
    """Return about how many tokens a text has, by its size: nobody has read it yet."""
    return text.path.stat().st_size // BYTES_PER_TOKEN
