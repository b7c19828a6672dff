"""What every method that calibrates asks of a mixture of experts, and what those that can't change one say."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from optikit.models import language_part
from optikit.models.facts import ModelFacts
from optikit.problems import Problem
from optikit.stage import StageOptions


class ExpertOptions(StageOptions):
    """How the experts of a mixture are calibrated."""

    experts: Literal["all", "routed"] = "all"
    """Mixtures of experts: calibrate every expert on all tokens, or only on those that its router sends to it. Experts
    that get fewer than 64 are then rounded or pruned without a look at data, and named."""


def refuse_wrapped(facts: ModelFacts, what: str) -> Iterator[Problem]:
    """Yield that a language model inside a wrapper can't go through something here."""
    if language_part.is_wrapped(facts.config):
        message = f"{facts.model_type} is the language model of a larger one, which {what}"
        yield Problem(code="wrapped-model", message=message, fix="leave this stage out, or start from the text model")


def refuse_experts(facts: ModelFacts, what: str) -> Iterator[Problem]:
    """Yield that a mixture of experts can't go through something here."""
    if facts.experts:
        message = f"{facts.model_type} is a mixture of {facts.experts} experts, and {what}"
        yield Problem(code="mixture-of-experts", message=message, fix="leave this stage out for a mixture of experts")
