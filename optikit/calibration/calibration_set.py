"""Calibration text → windows of token ids: spread over the whole text, seeded, begun as the model expects."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from optikit import records
from optikit.errors import StageFailedError
from optikit.models import tokenizer

CHUNK_CHARACTERS = 200_000
"""Text is tokenized in pieces of about this size, cut at line ends: a tokenizer keeps 50 bytes per character."""

HELD_OUT = 4
"""One window of so many is held out: corrections are tried on it, not fitted to it."""


def held_out(samples: int) -> Tensor:
    """Return which of the windows are held out, (samples,) bool; none of a single one."""
    every = min(HELD_OUT, samples)
    return torch.arange(samples) % every == every - 1 if every > 1 else torch.zeros(samples, dtype=torch.bool)


def _pieces(text: str) -> list[str]:
    pieces = []
    start = 0
    while start < len(text):
        cut = text.find("\n", start + CHUNK_CHARACTERS)
        stop = len(text) if cut < 0 else cut + 1
        pieces.append(text[start:stop])
        start = stop
    return pieces


def draw(directory: Path, text: Path, *, samples: int, length: int, seed: int) -> Tensor:
    """Draw windows from a text: one from each of `samples` equal parts of it, at a random place.

    Args:
        directory: Model directory with a tokenizer.json.
        text: UTF-8 file.
        samples: Number of windows.
        length: Tokens per window, a begin-of-text token included where the tokenizer puts one.
        seed: Decides the places.

    Returns:
        (samples, length) int64.

    Raises:
        InputMissingError: No tokenizer.json, or a text that isn't UTF-8.
        IntegrityError: A damaged tokenizer.json.
        StageFailedError: The text has fewer tokens than one window.
    """
    by = tokenizer.load(directory)
    prefix = torch.tensor(tokenizer.opening(by), dtype=torch.int64)
    pieces = _pieces(records.read(text))
    tokens = torch.cat([torch.tensor(tokenizer.encode(by, piece, opened=False), dtype=torch.int64) for piece in pieces])
    wanted = length - len(prefix)
    if len(tokens) < wanted:
        message = f"{text.name} has {len(tokens)} tokens, fewer than one calibration window of {length}"
        raise StageFailedError(message, fix="use a longer text or a smaller calibration.length")
    generator = torch.Generator().manual_seed(seed)
    places = torch.arange(samples) + torch.rand(samples, generator=generator, dtype=torch.float64)
    starts = (places / samples * (len(tokens) - wanted + 1)).long()
    return torch.stack([torch.cat([prefix, tokens[start : start + wanted]]) for start in starts.tolist()])
