"""Compatibility rules: rows of compat.toml and one small engine."""

from __future__ import annotations

from optikit.rules.engine import Rule, check, packages, rules
from optikit.rules.stack import Placed, Stack

__all__ = ["Placed", "Rule", "Stack", "check", "packages", "rules"]
