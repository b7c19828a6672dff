"""Quantization by other libraries."""
