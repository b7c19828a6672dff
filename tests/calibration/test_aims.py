"""What is kept of a corrected weight tells how far a written one is from it."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optikit.calibration import aims


@settings(max_examples=25)
@given(
    rows=st.integers(64, 200), width=st.integers(1, 80), off=st.sampled_from([0.0, 0.1, 1.4]), seed=st.integers(0, 9)
)
def test_the_error_of_a_weight_is_that_of_what_is_kept(rows, width, off, seed):
    draw = torch.Generator().manual_seed(seed)
    weight, noise = torch.randn(rows, width, generator=draw), torch.randn(rows, width, generator=draw)
    kept = aims.kept(["q"], [weight])["q"]
    assert kept.shape == (rows, aims.NUMBERS)
    written = weight + off * noise
    error = float((aims.seen(written) - kept).norm() / kept.norm())
    wanted = off * float(noise.norm() / weight.norm())
    assert abs(error - wanted) <= 0.2 * wanted + 1e-6


def test_the_scale_is_kept_with_every_linear_of_a_group():
    scale = torch.rand(5)
    kept = aims.kept(["q", "k"], [torch.randn(3, 5), torch.randn(2, 5)], scale)
    assert sorted(kept) == ["k", "k.scale", "q", "q.scale"]
    assert torch.equal(kept["q.scale"], scale)
    assert kept["q.scale"].data_ptr() != kept["k.scale"].data_ptr()  # a file refuses tensors that share memory
