"""Arithmetic only: tensors in, tensors out, one paper per file."""
