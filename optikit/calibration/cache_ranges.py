"""Scales of an FP8 key-value cache: the largest keys and values that each block's attention was given.

Keys are seen as the cache would hold them, after the rotation. Names of the tensors, as vLLM and SGLang look for them:
beside the projections (ModelOpt), or at the attention itself (compressed-tensors).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from optikit.algorithms import fp8
from optikit.calibration import distributed
from optikit.errors import StageFailedError

SUFFIXES = (".k_scale", ".v_scale")
"""Ends of the names of the scales of keys and values."""
ATTENTION = "sdpa"
"""The attention whose keys and values can be seen: Gemma 2's capped one is a part of its model's class."""


@dataclass
class CacheRanges:
    """Watches the attention of one block after the other.

    Attributes:
        watch: Whether to; what doesn't watch finds nothing.
        at_projections: Name scales after the projections of keys and values, where there are such.
        largest: Largest magnitude of a code.
    """

    watch: bool = True
    at_projections: bool = False
    largest: float = fp8.LARGEST
    _seen: dict[nn.Module, tuple[Tensor, Tensor]] = field(default_factory=dict)

    @contextmanager
    def watching(self, block: nn.Module) -> Iterator[None]:
        """See keys and values of a block's attention while the context is open."""
        if not self.watch:
            yield
            return
        self._seen.clear()
        inside = set(block.modules())
        plain: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS[ATTENTION]

        def attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **more: Any) -> Any:
            if module in inside:
                self._take(module, key, value)
            return plain(module, query, key, value, *rest, **more)

        ALL_ATTENTION_FUNCTIONS[ATTENTION] = attention
        try:
            yield
        finally:
            del ALL_ATTENTION_FUNCTIONS[ATTENTION]

    def _take(self, module: nn.Module, key: Tensor, value: Tensor) -> None:
        now = (key.float().abs().amax(), value.float().abs().amax())
        before = self._seen.get(module, now)
        self._seen[module] = (torch.maximum(before[0], now[0]), torch.maximum(before[1], now[1]))

    def scales(self, prefix: str, block: nn.Module) -> dict[str, Tensor]:
        """Return the scales of a block, () float32 by full name.

        Args:
            prefix: Full name of the block.
            block: The module that was watched.

        Raises:
            StageFailedError: No attention was seen.
        """
        if not self.watch:
            return {}
        found: dict[str, Tensor] = {}
        for name, module in block.named_modules():
            for kind, absmax in zip("kv", self._seen.get(module, ()), strict=False):
                if distributed.count() > 1:
                    distributed.largest(absmax)
                place = f"{prefix}.{name}"
                if self.at_projections and hasattr(module, f"{kind}_proj"):
                    place += f".{kind}_proj"
                found[f"{place}.{kind}_scale"] = fp8.of_absmax(absmax, largest=self.largest).cpu().clone()
        if not found:
            message = f"the attention of {prefix} shows no keys and values"
            raise StageFailedError(message, fix="set kv_cache: false")
        return found
