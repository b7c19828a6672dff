"""All calibration batches on their way through one block, within a bound of memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from optikit.calibration.empty_model import Call
from optikit.calibration.paused_forward import CapturePoint, PausedForward
from optikit.calibration.resume import HiddenStates


class ForwardPasses:
    """One forward pass per batch: the first `keep` wait at capture points, the others run again for each point.

    Args:
        block: A filled block inside `capture_hooks`.
        call: What the model passes to it after the hidden states.
        hidden: The block's input.
        keep: Batches that may wait.
        device: Where the block is.
    """

    def __init__(self, block: nn.Module, call: Call, hidden: HiddenStates, *, keep: int, device: str) -> None:
        self._block, self._call, self._hidden, self._keep, self._device = block, call, hidden, keep, device
        self._waiting: dict[int, PausedForward] = {}
        self._answers: dict[CapturePoint, Sequence[Tensor]] = {}

    def _get(self, index: int) -> PausedForward:
        if index not in self._waiting:
            hidden = self._hidden.read(index).to(self._device)
            args, kwargs = self._call.args, self._call.kwargs
            self._waiting[index] = PausedForward(lambda: self._block(hidden, *args, **kwargs))
        forward = self._waiting[index]
        forward.answers = {point: outputs[index] for point, outputs in self._answers.items()}
        return forward

    def calls(self, point: CapturePoint) -> Iterator[tuple[Any, ...]]:
        """Yield, by batch, all that a module is called with."""
        for index in range(self._hidden.batches):
            yield self._get(index).called(point)
            self._let_go(index)

    def answer(self, point: CapturePoint, outputs: Sequence[Tensor]) -> None:
        """Give what a module gives that isn't called, by batch."""
        self._answers[point] = outputs

    def inputs(self, point: CapturePoint, residual: CapturePoint = "") -> Iterator[tuple[Tensor, Tensor | None]]:
        """Yield, by batch, the input of a linear, (tokens, in_features), and of a watched module passed before."""
        for index in range(self._hidden.batches):
            forward = self._get(index)
            inputs = forward.advance(point)
            yield _by_token(inputs), _by_token(forward.watched[residual]) if residual else None
            self._let_go(index)

    def _let_go(self, index: int) -> None:
        if index >= self._keep:
            self._waiting.pop(index).abandon()

    def outputs(self) -> Iterator[Tensor]:
        """Yield the block's output, (windows, tokens, width) on the CPU, batch by batch."""
        for index in range(self._hidden.batches):
            yield self._get(index).finish().cpu()
            del self._waiting[index]

    def close(self) -> None:
        """Unwind whatever still waits."""
        for forward in self._waiting.values():
            forward.abandon()
        self._waiting.clear()


def _by_token(hidden: Tensor) -> Tensor:
    return hidden.reshape(-1, hidden.shape[-1])
