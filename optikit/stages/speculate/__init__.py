"""Speculative decoding methods."""
