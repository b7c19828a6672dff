"""Logits of a transformers model that is larger than memory: all windows go through one block, then through the next.

What is held is a block, or embedding and head, and what one batch needs on its way; hidden states lie on disk. Packed
linears are unpacked with their block. A pass that is killed goes on with the block that it was killed in.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from optikit import formats
from optikit.calibration.empty_model import Call, EmptyModel
from optikit.calibration.resume import HiddenStates, ResumeState
from optikit.calibration.source_model import SourceModel
from optikit.evaluation.scoring import CHUNK, Reading, Window
from optikit.evaluation.windows import BATCH_TOKENS
from optikit.process.allocator import one_arena, return_memory, settle
from optikit.runtime.decoder import Logits
from optikit.runtime.decoders import transformers

MOST_LENGTHS, GRANULARITY = 8, 128
"""Texts of more different lengths than the first are padded to multiples of the second: masks are kept per length."""


class _Equal:
    """Windows of one length, as the walk has them.

    Attributes:
        places: Which of all windows they are.
        tokens: (windows, tokens) int64, padded behind their ends, which what stands before can't see.
        batch: Windows that go through a block together.
        calls: What the model passes to each block.
    """

    def __init__(self, places: Sequence[int], windows: Sequence[Window], length: int, *, alone: bool) -> None:
        self.places = tuple(places)
        self.tokens = torch.zeros((len(places), length), dtype=torch.int64)
        for row, place in enumerate(places):
            read = torch.from_numpy(_read(windows[place]))
            self.tokens[row, : len(read)] = read
        self.batch = 1 if alone else max(1, BATCH_TOKENS // length)
        self.calls: list[Call] = []


def _read(window: Window) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Return the tokens that a model has to read: the last one predicts nothing that is scored."""
    return window.tokens[:-1]


def _by_length(windows: Sequence[Window], source: SourceModel) -> list[_Equal]:
    """Sort windows by length, none longer than the model's context where it is padded."""
    longest, alone = source.max_positions, source.row.alone
    exact = len({len(window.tokens) for window in windows}) <= MOST_LENGTHS
    places: dict[int, list[int]] = {}
    for place, window in enumerate(windows):
        length = len(_read(window))
        padded = length if exact else min(-(-length // GRANULARITY) * GRANULARITY, max(longest, length))
        places.setdefault(padded, []).append(place)
    return [_Equal(found, windows, length, alone=alone) for length, found in sorted(places.items())]


class Streamed:
    """A Hugging Face directory, dense or packed, read a block at a time.

    Args:
        directory: The model.
        dtype: `auto` (the checkpoint's own), `float32`, `bfloat16` or `float16`.
        threads: CPU threads.
        device: torch device that holds the block at hand; hidden states wait on disk.

    Attributes:
        runtime, dtype, vocab, threads: As a `Decoder`'s.
    """

    runtime = "transformers"

    def __init__(self, directory: Path, *, dtype: str, threads: int, device: str = "cpu") -> None:
        torch.set_num_threads(threads)
        one_arena(bounded=True)
        self._source = SourceModel(formats.dense(directory))
        self.threads = threads
        self.vocab = int(str(self._source.config[self._source.row.keys["vocab"]]))
        self._dtype = self._own_dtype if dtype == "auto" else transformers.DTYPES[dtype]
        self.dtype = str(self._dtype).removeprefix("torch.")
        self._model = EmptyModel(self._source, dtype=self._dtype, device=device)
        transformers.round_activations(self._model.model, directory)
        settle()

    @cached_property
    def _own_dtype(self) -> torch.dtype:
        config = self._source.config
        stated = str(config.get("dtype") or config.get("torch_dtype")).removeprefix("torch.")
        floating = (entry.torch_dtype for entry in self._source.checkpoint.entries.values())
        return transformers.DTYPES.get(stated) or next(each for each in floating if each.is_floating_point)

    @contextmanager
    def reading(
        self,
        windows: Sequence[Window],
        scratch: Path,
        *,
        progress: Callable[[int, int, str], None] = lambda *_: None,
        note: Callable[[str], None] = lambda _: None,
    ) -> Iterator[Reading]:
        """Take windows through all blocks; yield what reads their logits.

        Args:
            windows: Of at most the model's context.
            scratch: Directory for hidden states, and what a killed pass goes on with.
            progress: Called after every block.
            note: Told of damage.

        Raises:
            IntegrityError: A weight holds NaN or infinity, a file is damaged.
        """
        passes = _Passes(self._model, self._source.layers, _by_length(windows, self._source), scratch)
        with torch.inference_mode():
            states = passes.walk(progress, note)
            with self._model.head_filled():
                yield lambda place: self._logits(windows[place], *states[place])

    def _logits(self, window: Window, states: HiddenStates, batch: int, row: int) -> Iterator[Logits]:
        """Yield the logits of a window's scored positions, a chunk at a time."""
        tokens = torch.from_numpy(_read(window))[None]
        hidden = states.read(batch)[row : row + 1].to(self._model.device)
        for start in range(tokens.shape[1] - window.scored, tokens.shape[1], CHUNK):
            part = slice(start, min(start + CHUNK, tokens.shape[1]))
            logits: Logits = self._model.logits(tokens[:, part], hidden[:, part])[0].float().cpu().numpy()
            yield logits


class _Passes:
    """All windows on their way through the blocks."""

    def __init__(self, model: EmptyModel, layers: int, equal: list[_Equal], scratch: Path) -> None:
        self._model, self._layers, self._equal, self._scratch = model, layers, equal, scratch

    def walk(
        self, progress: Callable[[int, int, str], None], note: Callable[[str], None]
    ) -> dict[int, tuple[HiddenStates, int, int]]:
        """Return where the last block's outputs lie: by window its file, the batch there, and the row in that."""
        digest = hashlib.sha256(b"".join(equal.tokens.numpy().tobytes() for equal in self._equal)).hexdigest()
        state = ResumeState(
            self._scratch, {"method": "score", "dtype": str(self._model.dtype), "windows": digest}, note
        )
        with self._model.stem_filled():
            for equal in self._equal:
                equal.calls = self._model.record(equal.tokens[:1])
            if not self._intact(state):
                state.reset()
                for states, equal in zip(self._states(state, 0), self._equal, strict=True):
                    states.write(self._model.embedded(equal.tokens, equal.batch))
        for index in range(state.done, self._layers):
            digests = self._through(index, state)
            state.commit({}, [], {}, " ".join(digests))
            for states in self._states(state, index):
                states.path.unlink(missing_ok=True)
            progress(index + 1, self._layers, "block")
        return dict(self._found(state))

    def _states(self, state: ResumeState, index: int) -> list[HiddenStates]:
        """Return the inputs of a block, a file for each length."""
        path = state.hidden_path(index)
        return [
            HiddenStates(
                path.with_suffix(f".{number}{path.suffix}"),
                (*equal.tokens.shape, self._model.width),
                self._model.dtype,
                equal.batch,
            )
            for number, equal in enumerate(self._equal)
        ]

    def _intact(self, state: ResumeState) -> bool:
        digests, states = state.hidden_sha256.split(), self._states(state, state.done)
        pairs = zip(states, digests, strict=False)
        return len(digests) == len(states) and all(each.intact(digest) for each, digest in pairs)

    def _through(self, index: int, state: ResumeState) -> list[str]:
        """Take all windows through a block; return the digests of its outputs."""
        block = self._model.fill_block(index)
        before, after = (self._states(state, place) for place in (index, index + 1))
        digests = [
            new.write(_outputs(block, equal.calls[index], old, self._model.device))
            for equal, old, new in zip(self._equal, before, after, strict=True)
        ]
        self._model.empty_block(index)
        return_memory()
        return digests

    def _found(self, state: ResumeState) -> Iterator[tuple[int, tuple[HiddenStates, int, int]]]:
        for states, equal in zip(self._states(state, self._layers), self._equal, strict=True):
            for row, place in enumerate(equal.places):
                yield place, (states, row // equal.batch, row % equal.batch)


def _outputs(block: nn.Module, call: Call, hidden: HiddenStates, device: str) -> Iterator[Tensor]:
    for index in range(hidden.batches):
        output = block(hidden.read(index).to(device), *call.args, **call.kwargs)
        yield (output[0] if isinstance(output, tuple) else output).cpu()
