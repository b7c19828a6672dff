"""Passes that stop at capture points: same numbers, no leaks, and errors that reach whoever waits."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn

from optikit.calibration.paused_forward import PausedForward, capture_hooks


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.unused = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        return x + self.second(torch.relu(self.first(x))), None


@pytest.fixture
def block():
    torch.manual_seed(0)
    return Block()


def test_weights_changed_at_a_capture_point_are_used_behind_it(block):
    x = torch.randn(3, 4)
    with capture_hooks(block, ["first", "second"], ["first"]):
        forward = PausedForward(lambda: block(x))
        assert torch.equal(forward.advance("first"), x)
        with torch.no_grad():
            block.first.weight.mul_(2)
        hidden = forward.advance("second")
        assert torch.equal(hidden, torch.relu(block.first(x)))
        with torch.no_grad():
            block.second.weight.zero_()
            block.second.bias.zero_()
        assert torch.equal(forward.finish(), x)
        assert torch.equal(forward.watched["first"], x)
    assert not block.first._forward_pre_hooks


def test_many_passes_do_not_disturb_each_other(block):
    batches = [torch.randn(2, 4) for _ in range(5)]
    expected = [block(x)[0] for x in batches]
    with capture_hooks(block, ["first", "second"]):
        waiting = [PausedForward(lambda x=x: block(x)) for x in batches]
        for point in ("first", "second"):
            for forward in reversed(waiting):
                forward.advance(point)
        assert all(torch.equal(f.finish(), e) for f, e in zip(waiting, expected, strict=True))


def test_capture_points_may_be_passed_without_stopping(block):
    x = torch.randn(1, 4)
    with capture_hooks(block, ["first", "second"]):
        forward = PausedForward(lambda: block(x))
        assert torch.equal(forward.advance("second"), torch.relu(block.first(x)))
        assert torch.equal(forward.finish(), block(x)[0])


def test_abandoned_passes_end_their_threads(block):
    before = threading.active_count()
    with capture_hooks(block, ["second"]):
        waiting = [PausedForward(lambda: block(torch.ones(1, 4))) for _ in range(4)]
        for forward in waiting[:2]:
            forward.advance("second")
        for forward in waiting:
            forward.abandon()
            forward.abandon()
    assert threading.active_count() == before


def test_a_capture_point_that_is_never_reached_is_named(block):
    with capture_hooks(block, ["unused"]), pytest.raises(RuntimeError, match="the block never called unused"):
        PausedForward(lambda: block(torch.ones(1, 4))).advance("unused")


def test_errors_inside_a_pass_are_raised_where_it_is_waited_for(block):
    with capture_hooks(block, ["first"]):
        forward = PausedForward(lambda: block(torch.ones(1, 5)))
        forward.advance("first")
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            forward.finish()
