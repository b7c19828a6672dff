"""Compile engines."""
