"""Compatibility rules: rows of compat.toml and one small engine."""
