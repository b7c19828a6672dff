"""Recipe → plan: resolved, checked, estimated, frozen; printable; needs no torch.

A `Step` names its inputs by cache key, so the whole chain of keys is known before anything runs: a plan can say what
is cached, and two recipes that share a prefix share its steps.
"""

from __future__ import annotations

from optikit.plan.make import make_plan
from optikit.plan.model import Plan, Step

__all__ = ["Plan", "Step", "make_plan"]
