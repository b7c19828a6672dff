"""E4M3 against the slow way: every one of its 254 numbers is tried for every weight."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optikit.algorithms import fp8

BITS = torch.arange(256, dtype=torch.uint8)
NUMBERS = BITS.view(torch.float8_e4m3fn).double()
FINITE = torch.isfinite(NUMBERS)


def nearest(value: float, largest: float) -> float:
    """Return the nearest number of E4M3; of two as near the one whose mantissa is even."""
    near = (NUMBERS - value).abs().masked_fill(~FINITE | (NUMBERS.abs() > largest), torch.inf)
    ties = BITS[near == near.min()]
    even = ties[ties % 2 == 0]
    return float(NUMBERS[int((even if len(even) else ties)[0])])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-1e5, 1e5, width=32), min_size=4, max_size=12), st.sampled_from([448.0, 240.0]))
def test_every_weight_goes_to_the_nearest_code_and_none_beyond_the_largest(values, largest):
    weight = torch.tensor([values])
    scales = fp8.of_absmax(fp8.channel_absmax(weight) * 0.25, largest=largest)  # so that some saturate
    codes = fp8.quantize(weight, scales, largest).double()
    wanted = [nearest(float(value), largest) for value in (weight / scales)[0]]
    assert codes[0].tolist() == wanted
    assert float(codes.abs().max()) <= largest


@pytest.mark.parametrize("tie", [17.0, 19.0, 464.0, -17.0, 2.0**-10, 3 * 2.0**-10, 1e9])
def test_ties_go_to_even_and_what_is_too_large_saturates(tie):
    assert float(fp8.quantize(torch.tensor([[tie]]), torch.ones(1, 1)).double()) == nearest(tie, 448.0)


def test_scales_of_regions_are_those_of_their_largest_weights():
    weight = torch.randn((200, 300), generator=torch.Generator().manual_seed(0))
    weight[7] = 0
    weight[:128, 128:256] = 0
    blocks = fp8.block_absmax(weight)
    slow = [[weight[r : r + 128, c : c + 128].abs().max() for c in (0, 128, 256)] for r in (0, 128)]
    assert torch.equal(blocks, torch.tensor(slow))
    scales = fp8.of_absmax(blocks)
    assert float(scales[0, 1]) == 1  # of zeros: any does, and none divides by zero
    spread = fp8.spread(scales, (200, 300))
    assert all(spread[r, c] == scales[r // 128, c // 128] for r in (0, 127, 128, 199) for c in (0, 127, 128, 299))
    rows = fp8.of_absmax(fp8.channel_absmax(weight), torch.bfloat16)
    assert rows.dtype == torch.bfloat16
    assert rows.shape == (200, 1)
    assert float(rows[7]) == 1


@pytest.mark.parametrize("kind", ["channel", "block"])
def test_the_search_is_no_worse_than_spanning_the_largest_and_is_the_best_of_what_it_tries(kind):
    weight = torch.randn((256, 384), generator=torch.Generator().manual_seed(1))
    if kind == "channel":
        absmax = fp8.channel_absmax(weight)
        found = fp8.search_channels(weight, absmax, torch.float32)
        regions = [(weight[r : r + 1], absmax[r], found[r]) for r in range(256)]
    else:
        absmax = fp8.block_absmax(weight)
        found = fp8.search_blocks(weight, absmax)
        places = [(r, c) for r in range(2) for c in range(3)]
        regions = [(weight[r * 128 :, c * 128 :][:128, :128], absmax[r, c], found[r, c]) for r, c in places]

    def error(part, scale):
        return float((fp8.dequantize(fp8.quantize(part, scale), scale) - part).square().sum())

    for part, largest, scale in regions:
        tried = [error(part, fp8.of_absmax(largest / ratio)) for ratio in fp8.RATIOS]
        assert error(part, scale) <= min(tried) * (1 + 1e-5)
    plain, searched = (sum(error(p, s) for p, s in pairs) for pairs in (
        [(p, fp8.of_absmax(m)) for p, m, _ in regions], [(p, s) for p, _, s in regions]))  # fmt: skip
    assert searched < (0.96 if kind == "channel" else 0.995) * plain


def test_activations_are_rounded_with_a_scale_for_each_token_or_128_channels_of_it():
    inputs = torch.randn((2, 3, 256), generator=torch.Generator().manual_seed(2)).bfloat16()
    inputs[0, 1] *= 1000
    inputs[1, 2] = 0
    for block, seen in ((None, fp8.round_tokens(inputs)), (128, fp8.round_tokens(inputs, block=128))):
        width = block or 256
        for token, rounded in zip(inputs.view(-1, width).float(), seen.view(-1, width), strict=True):
            scale = max(float(token.abs().max()) / 448, 1 / (448 * 512))
            slow = torch.tensor([nearest(float(x) / scale, 448.0) * scale for x in token[:16]])
            assert torch.allclose(rounded[:16].float(), slow.bfloat16().float(), rtol=1e-2, atol=1e-9)
    fixed = fp8.round_inputs(torch.tensor([[3.0, 1e6, -1e6, 0.01]]), torch.tensor(0.5))
    assert fixed.tolist()[0][:3] == [3.0, 224.0, -224.0]
