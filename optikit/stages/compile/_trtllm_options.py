"""Options of `compile: {engine: tensorrt-llm}`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from optikit.stage import StageOptions


class Options(StageOptions):
    """Options of `compile: {engine: tensorrt-llm}`."""

    version: str = Field(default="1.2.1", pattern=r"\d+\.\d+\.\d+[a-z0-9.]*")
    """Release that will serve: the container's tag, and what rules go by."""
    dtype: Literal["auto", "bfloat16", "float16"] = "auto"
    """Dtype of unquantized weights and arithmetic; `auto` is the checkpoint's own."""
    tensor_parallel: int = Field(default=1, ge=1, le=64)
    """GPUs that share the model."""
    batch_size: int = Field(default=8, ge=1, le=4096)
    """Most requests in a step."""
    sequence_length: int = Field(default=2048, ge=16, le=1_048_576)
    """Longest sequence in tokens, prompt and answer together."""
    max_num_tokens: int = Field(default=2048, ge=16, le=1_048_576)
    """Most tokens in a step, over all requests: bounds how much of prompts is read at once."""
    kv_cache_dtype: Literal["auto", "fp8"] = "auto"
    """Dtype of the cache; fp8 halves it and needs compute capability 8.9."""
    kv_cache_fraction: float = Field(default=0.9, gt=0, le=0.98)
    """Share of the GPU memory that weights leave free which the cache takes."""
    speculation: Literal["none", "lookup", "draft"] = "none"
    """`lookup`: continue what the prompt said before (NGram); `draft`: a smaller model drafts."""
    speculation_length: int = Field(default=4, ge=1, le=31)
    """Tokens drafted per step."""
    longest_match: int = Field(default=3, ge=1, le=8)
    """Tokens that a lookup matches at most."""
    draft: str = ""
    """Draft model: a directory, or `hf:ORG/NAME@REVISION`; it is put into the folder. Empty takes what a speculate
    stage before has made."""
    overlap_scheduler: bool = False
    """Schedule the next step while the GPU works on this one; speculation here needs it off."""
