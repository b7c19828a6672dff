"""Quantize weights: fewer bits per weight, in a format that servers load."""
