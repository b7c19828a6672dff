"""A backward pass through all blocks, one block in memory at a time: how the loss depends on every linear's weights.

Forward, the input of each block is written to disk; backward, each block is filled again, run again with gradients, and
emptied. On disk: blocks · tokens · width activations; in memory: one block with its gradients, one window inside it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from optikit.calibration.empty_model import Call, EmptyModel
from optikit.calibration.resume import HiddenStates


def gradients(model: EmptyModel, windows: Tensor, directory: Path) -> Iterator[tuple[int, nn.Module]]:
    """Yield each block from the last to the first; `grad` of its weights is the loss's, summed over the windows.

    The loss of a window is the mean cross-entropy of its next tokens. A block is emptied when the next is asked for.

    Args:
        model: The model; its dtype is that of all arithmetic here.
        windows: (samples, tokens) int64.
        directory: Where activations are kept meanwhile.
    """
    count = len(model.blocks)

    def states(name: str) -> HiddenStates:
        return HiddenStates(directory / f"{name}.bin", (*windows.shape, model.width), model.dtype, 1)

    with model.stem_filled(), torch.no_grad():
        calls = model.record(windows[:1])
        states("input-0").write(model.embedded(windows, 1))
    for index in range(count):
        block = model.fill_block(index)
        states(f"input-{index + 1}").write(_forward(model, block, calls[index], states(f"input-{index}")))
        model.empty_block(index)
    with model.head_filled():
        states(f"gradient-{count}").write(_of_loss(model, windows, states(f"input-{count}")))
    for index in reversed(range(count)):
        block = model.fill_block(index).requires_grad_()
        passed = _backward(model, block, calls[index], states(f"input-{index}"), states(f"gradient-{index + 1}"))
        states(f"gradient-{index}").write(passed)
        yield index, block
        block.zero_grad()
        model.empty_block(index)
        for done in (f"input-{index + 1}", f"gradient-{index + 1}"):
            states(done).path.unlink()
    for done in ("input-0", "gradient-0"):
        states(done).path.unlink()


def _run(block: nn.Module, call: Call, hidden: Tensor) -> Tensor:
    output = block(hidden, *call.args, **call.kwargs)
    found: Tensor = output[0] if isinstance(output, tuple) else output
    return found


def _forward(model: EmptyModel, block: nn.Module, call: Call, inputs: HiddenStates) -> Iterator[Tensor]:
    for index in range(inputs.batches):
        with torch.no_grad():
            yield _run(block, call, inputs.read(index).to(model.device)).cpu()


def _of_loss(model: EmptyModel, windows: Tensor, outputs: HiddenStates) -> Iterator[Tensor]:
    """Yield the gradient of every window's loss with respect to the last block's output."""
    for index in range(outputs.batches):
        hidden = outputs.read(index).to(model.device).requires_grad_()
        window = windows[index : index + 1].to(model.device)
        with torch.enable_grad():
            logits = model.logits(window, hidden)
            loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), window[:, 1:].flatten())
            (gradient,) = torch.autograd.grad(loss, hidden)
        yield gradient.cpu()


def _backward(
    model: EmptyModel, block: nn.Module, call: Call, inputs: HiddenStates, after: HiddenStates
) -> Iterator[Tensor]:
    """Add up the weights' gradients and yield those of the block's inputs."""
    for index in range(inputs.batches):
        hidden = inputs.read(index).to(model.device).requires_grad_()
        with torch.enable_grad():
            output = _run(block, call, hidden)
            torch.autograd.backward(output, after.read(index).to(model.device))
        if hidden.grad is None:
            raise RuntimeError("a block's output does not depend on its input")
        yield hidden.grad.cpu()
