"""GPTQ by other libraries."""
