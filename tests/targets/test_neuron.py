"""Neuron topology: AWS's worked example, and the edges of the rule."""

from __future__ import annotations

from dataclasses import replace

import pytest

from optikit.targets import rows
from optikit.targets.neuron import cores_needed, llama2_7b, llama2_70b, place, worked_example

TRN1 = rows()["trn1.32xlarge"]


def test_llama_sizes_are_the_published_ones():
    assert round(llama2_70b().parameters / 1e9, 2) == 68.98
    assert round(llama2_7b().parameters / 1e9, 2) == 6.74


def test_worked_example_in_bf16():
    """More than the 8 cores that a smaller degree has: 16 or 32."""
    assert place(TRN1, llama2_70b(2), llama2_7b(2)).degrees == (16, 32)
    assert place(TRN1, llama2_70b(2), llama2_7b(2)).cores_needed == 10


def test_worked_example_in_fp32():
    assert place(TRN1, llama2_70b(4), llama2_7b(4)).degrees == (32,)


def test_worked_example_is_explained():
    text = worked_example()
    assert "tensor_parallel 16 or 32" in text
    assert "tensor_parallel 32\n" in text


def test_what_does_not_fit_says_so():
    assert "none: it doesn't fit" in worked_example("inf2.xlarge")


def test_memory_has_to_be_more_than_the_need():
    assert cores_needed(16_000_000_000, 16) == 2
    assert cores_needed(15_999_999_999, 16) == 1


def test_degrees_divide_the_heads():
    odd = replace(llama2_7b(), heads=40)
    assert place(TRN1, odd).degrees == (1, 2, 8)


def test_longer_sequences_need_more_cores():
    inf2 = rows()["inf2.48xlarge"]
    short, long = place(inf2, llama2_7b(), batch=1, length=512), place(inf2, llama2_7b(), batch=32, length=4096)
    assert short.cores_needed < long.cores_needed


def test_undocumented_degrees_are_not_guessed():
    with pytest.raises(ValueError, match="trn3"):
        place(rows()["trn3"], llama2_7b())
