"""A forward pass through one block that can be stopped at capture points and continued with other weights.

True-sequential quantization needs the inputs of a block's later linears *after* its earlier ones have been quantized.
Running the block again for every group of linears costs two and a half times a forward pass. Here each batch runs
once: its thread waits at the first linear of every group until that group's new weights are in place. One thread runs
at a time, so this is a coroutine that can stop inside code that knows nothing of it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

CapturePoint = str
"""Name of a linear, relative to its block, before which a pass stops and its input is captured."""


class _AbandonedError(BaseException):
    """Unwinds a pass that nobody will continue."""


class PausedForward:
    """One batch on its way through a block.

    Args:
        call: Runs a block inside `capture_hooks`, and returns its output.

    Attributes:
        watched: Inputs of the watched modules that were passed so far.
        answers: What modules give that can't be called, because what they need isn't in memory: routed experts.
    """

    def __init__(self, call: Callable[[], Any]) -> None:
        self._call = call
        self.watched: dict[CapturePoint, Tensor] = {}
        self.answers: dict[CapturePoint, Tensor] = {}
        self._stop: CapturePoint | None = None
        self._input: tuple[Any, ...] | None = None
        self._output: Tensor | None = None
        self._error: BaseException | None = None
        self._abandoned = False
        self._go = threading.Semaphore(0)
        self._stopped = threading.Semaphore(0)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        self._go.acquire()
        _current.forward = self
        try:
            if not self._abandoned:
                with torch.no_grad():
                    output = self._call()
                self._output = output[0] if isinstance(output, tuple) else output
        except _AbandonedError:
            pass
        except BaseException as error:  # noqa: BLE001 - raised again in the thread that waits
            self._error = error
        finally:
            del self._call
            self._stopped.release()

    def _resume(self, stop: CapturePoint | None) -> None:
        self._stop = stop
        self._go.release()
        self._stopped.acquire()
        if self._error is not None:
            raise self._error

    def advance(self, point: CapturePoint) -> Tensor:
        """Run until the block calls `point`; return that linear's input (batch, tokens, in_features)."""
        inputs: Tensor = self.called(point)[0]
        return inputs

    def called(self, point: CapturePoint) -> tuple[Any, ...]:
        """Run until the block calls `point`; return all that it is called with."""
        self._resume(point)
        if self._input is None:
            raise RuntimeError(f"the block never called {point}")
        found, self._input = self._input, None
        return found

    def finish(self) -> Tensor:
        """Run to the end; return the block's output (batch, tokens, width)."""
        self._resume(None)
        self._thread.join()
        if self._output is None:
            raise RuntimeError("the block returned nothing")
        return self._output

    def abandon(self) -> None:
        """Unwind a pass that waits at a capture point, and free what it holds."""
        if self._thread.is_alive():
            self._abandoned = True
            self._go.release()
            self._thread.join()

    def capture(self, point: CapturePoint, given: tuple[Any, ...]) -> None:
        """Wait here if this is the point to stop at. Called by the hook, in the pass's own thread."""
        if point != self._stop:
            return
        self._input = given
        self._stopped.release()
        self._go.acquire()
        if self._abandoned:
            raise _AbandonedError


class _Current(threading.local):
    forward: PausedForward | None = None


_current = _Current()


@contextmanager
def capture_hooks(
    block: nn.Module,
    points: Iterable[CapturePoint],
    watched: Iterable[CapturePoint] = (),
) -> Iterator[None]:
    """Hold forward pre-hooks on modules of a block.

    Args:
        block: The block.
        points: Linears before which a pass can stop.
        watched: Modules whose input is kept as it is passed.
    """

    def stop_at(point: CapturePoint) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            if _current.forward is not None:
                _current.forward.capture(point, args)

        return hook

    def watch(name: CapturePoint) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            if _current.forward is not None:
                _current.forward.watched[name] = args[0]

        return hook

    handles = [block.get_submodule(point).register_forward_pre_hook(stop_at(point)) for point in points]
    handles += [block.get_submodule(name).register_forward_pre_hook(watch(name)) for name in watched]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def answered(block: nn.Module, names: Iterable[CapturePoint]) -> Iterator[None]:
    """Let modules of a block not be called: a pass can stop before them, and goes on with its `answers`."""

    def answer(name: CapturePoint) -> Callable[..., Tensor]:
        def forward(*args: Any) -> Tensor:
            if _current.forward is None:
                raise RuntimeError(f"{name} is called outside of a pass")
            if name not in _current.forward.answers:
                _current.forward.capture(name, args)
            return _current.forward.answers[name]

        return forward

    modules = {name: block.get_submodule(name) for name in names}
    for name, module in modules.items():
        module.forward = answer(name)
    try:
        yield
    finally:
        for module in modules.values():
            del module.forward
