"""`TorchBatch`: several texts through a transformers model at once, each at its own length.

Every layer keeps one row of keys and values per text. Windows are padded on the left to the longest; a mask lets each
token see its own text up to itself and nothing else, and padding is never written to the cache. Rolling a text back is
passing a smaller position: what lies behind is masked until it is written again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from optikit.errors import UsageError
from optikit.runtime.decoder import Logits, Window
from optikit.runtime.decoders.checks import cache_argument, check_call

KINDS = {"full_attention", "sliding_attention"}
"""Kinds of layers whose memory of a text can be cut back to any length."""


@dataclass(frozen=True)
class _Now:
    """Where the tokens of a forward belong; read by every layer.

    Attributes:
        places: Rows of the cache that are read, (b,) or a slice.
        valid: (b, m): tokens that aren't padding.
        rows, columns: (n,): row and position in the cache of each of them.
        length: Positions that are read.
    """

    places: Tensor | slice
    valid: Tensor
    rows: Tensor
    columns: Tensor
    length: int


class _Layer(DynamicLayer):  # type: ignore[misc]  # it comes untyped
    """Keys and values (places, heads, positions, head_dim) of one layer; grows by doubling, up to `most` positions."""

    is_croppable = False
    now: _Now

    def __init__(self, places: int, most: int) -> None:
        super().__init__()
        self._places, self._most = places, most

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make room for nothing yet, in the shape and type of what will come."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = (
            each.new_zeros(self._places, each.shape[1], 0, each.shape[3]) for each in (key_states, value_states)
        )
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Write the tokens that aren't padding; return what every text holds, up to the longest."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        now = self.now
        self.keys, self.values = self._roomy(self.keys), self._roomy(self.values)
        for kept, new in ((self.keys, key_states), (self.values, value_states)):
            kept[now.rows, :, now.columns] = new.transpose(1, 2)[now.valid]
        return self.keys[now.places, :, : now.length], self.values[now.places, :, : now.length]

    def _roomy(self, kept: Tensor) -> Tensor:
        """Return a tensor with room for the positions that are read now; zeros, because masked NaN would still show."""
        room = kept.shape[2]
        if room >= self.now.length:
            return kept
        larger = kept.new_zeros(*kept.shape[:2], min(self._most, max(self.now.length, 2 * room)), kept.shape[3])
        larger[:, :, :room] = kept
        return larger

    def move(self, source: int, target: int) -> None:
        """Copy one text's row over another's."""
        if self.is_initialized:
            self.keys[target], self.values[target] = self.keys[source], self.values[source]

    def get_seq_length(self) -> int:
        """Return 0: texts differ in length, so positions and masks are passed and nothing is derived from this."""
        return 0


class TorchBatch:
    """Caches for several texts on one model; see `decoder.BatchDecoder`.

    Args:
        model: A transformers decoder; others may use it, too.
        places: Texts at once.
        max_tokens: Longest sequence of each.

    Raises:
        UsageError: The model has layers that can't be rolled back, or `places` is below 1.
    """

    runtime = "transformers"

    def __init__(self, model: Any, *, places: int, max_tokens: int) -> None:
        config = model.config
        kinds = set(getattr(config, "layer_types", None) or ()) or {"full_attention"}
        if not kinds <= KINDS:
            message = f"layers of kind {min(kinds - KINDS)} can't be rolled back, and texts in a batch have to be"
            raise UsageError(message, fix="write one text at a time")
        if places < 1:
            raise UsageError(f"a batch of {places} texts holds none", fix="use 1 or more")
        self.places = places
        self.max_tokens = max_tokens
        self.vocab = int(config.vocab_size)
        self._model = model
        self._mixed = len(kinds) > 1
        self._window = getattr(config, "sliding_window", None)
        if kinds == {"full_attention"} and getattr(config, "layer_types", None):
            self._window = None
        self._layers = [_Layer(places, max_tokens) for _ in range(config.num_hidden_layers)]
        self._cache = Cache(layers=list(self._layers))
        self._filled = [0] * places
        self._rows: list[int] = []
        self._states = torch.empty(0)

    def _keep_states(self, _head: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._states = inputs[0]

    @torch.inference_mode()
    def forward(self, windows: Sequence[Window]) -> list[Logits]:
        """Run windows of different texts; see `decoder.BatchDecoder.forward`."""
        for place, tokens, position, rows in windows:
            filled = self._filled[place]
            check_call(tokens, position, rows=rows, filled=filled, vocab=self.vocab, max_tokens=self.max_tokens)
        longest = max(len(each.tokens) for each in windows)
        inputs, positions = self._lay_out(windows, longest)
        hook = self._model.get_output_embeddings().register_forward_pre_hook(self._keep_states)
        try:
            output = self._model(
                inputs,
                attention_mask=self._masks(positions, max(each.position + len(each.tokens) for each in windows)),
                position_ids=positions.clamp(min=0),
                **cache_argument(self._model, self._cache),
                use_cache=True,
                logits_to_keep=max(each.rows for each in windows),
            )
        finally:
            hook.remove()  # the model outlives this batch
        for place, ran, position, _ in windows:
            self._filled[place] = position + len(ran)
        self._rows = [each.rows for each in windows]
        logits = output.logits.float().cpu().numpy()
        return [logits[i, -each.rows :] for i, each in enumerate(windows)]

    def _lay_out(self, windows: Sequence[Window], longest: int) -> tuple[Tensor, Tensor]:
        """Return tokens and positions (b, longest), padded on the left; tell the layers what belongs where."""
        tokens = np.zeros((len(windows), longest), np.int64)
        for row, each in zip(tokens, windows, strict=True):
            row[longest - len(each.tokens) :] = each.tokens
        device = self._model.device
        starts = torch.tensor([each.position for each in windows], device=device)
        ends = starts + torch.tensor([len(each.tokens) for each in windows], device=device)
        positions = ends[:, None] - longest + torch.arange(longest, device=device)
        places = torch.tensor([each.place for each in windows], device=device)
        first, last = windows[0].place, windows[-1].place
        together = [each.place for each in windows] == list(range(first, last + 1))
        valid = positions >= starts[:, None]
        now = _Now(
            places=slice(first, last + 1) if together else places,
            valid=valid,
            rows=places[:, None].expand_as(positions)[valid],
            columns=positions[valid],
            length=max(each.position + len(each.tokens) for each in windows),
        )
        for layer in self._layers:
            layer.now = now
        return torch.from_numpy(tokens).to(device), positions

    def _masks(self, positions: Tensor, length: int) -> Tensor | dict[str, Tensor]:
        """Return what is added to the scores (b, 1, m, length): of all layers, or of each kind where there are two."""
        keys = torch.arange(length, device=positions.device)
        seen = keys <= positions[:, :, None]
        near = seen & (keys > positions[:, :, None] - self._window) if self._window else seen
        if self._mixed:
            return {"full_attention": self._additive(seen), "sliding_attention": self._additive(near)}
        return self._additive(near)

    def _additive(self, seen: Tensor) -> Tensor:
        dtype: torch.dtype = self._model.dtype
        return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, torch.finfo(dtype).min)[
            :, None
        ]

    def hidden(self, window: int, row: int) -> NDArray[np.float32]:
        """Return what the output head read for a row of a window's logits; see `batch_loop.HiddenBatchDecoder`."""
        state: NDArray[np.float32] = self._states[window, row - self._rows[window]].float().cpu().numpy()
        return state

    @torch.inference_mode()
    def move(self, source: int, target: int) -> None:
        """Put the cache of `source` in that of `target`; see `decoder.BatchDecoder.move`."""
        for layer in self._layers:
            layer.move(source, target)
        self._filled[target], self._filled[source] = self._filled[source], 0
