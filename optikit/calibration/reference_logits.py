"""What transformers computes with the weights that a compiled graph holds, in float32, a block at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from optikit.calibration.empty_model import EmptyModel
from optikit.calibration.source_model import SourceModel
from optikit.formats.checkpoint import Checkpoint

Weights = Mapping[str, Callable[[], Tensor]]


class _Substituted(SourceModel):
    """A model directory, some of whose weights are others."""

    def __init__(self, directory: Path, weights: Weights) -> None:
        super().__init__(Checkpoint(directory))
        self._weights = weights
        self.own_head = self.own_head or f"{self.row.head}.weight" in weights

    def read(self, name: str) -> Tensor:
        return self._weights[name]() if name in self._weights else super().read(name)


class ReferenceModel:
    """transformers' model of a directory.

    Args:
        directory: Hugging Face directory, dense or packed.
        weights: What reads the weight that stands for a tensor of the directory, (out_features, in_features) in a float
            dtype. All others are the directory's own.
    """

    def __init__(self, directory: Path, weights: Weights) -> None:
        self._empty = EmptyModel(_Substituted(directory, weights), dtype=torch.float32, device="cpu")

    @torch.inference_mode()
    def logits(self, tokens: Tensor) -> Tensor:
        """Return logits (tokens, vocabulary) of one text, (tokens,) int64."""
        text, empty = tokens[None], self._empty
        with empty.stem_filled():
            calls = empty.record(text)
            hidden = next(empty.embedded(text, 1))
        for index, call in enumerate(calls):
            output = empty.fill_block(index)(hidden, *call.args, **call.kwargs)
            hidden = output[0] if isinstance(output, tuple) else output
            empty.empty_block(index)
        with empty.head_filled():
            return empty.logits(text, hidden)[0]

    def rotary(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return cosines and sines, (tokens, channels) each, by which queries and keys at positions (tokens,) turn."""
        return self._empty.rotary(positions)
