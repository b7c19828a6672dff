"""Families whose decoders differ: recurrent layers that can't be cut back, contexts under other names."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from optikit import runtime
from tests.families import save

TOKENS = np.random.default_rng(0).integers(3, 260, 24)


@pytest.mark.parametrize(("name", "context"), [("qwen3_5_text", 256), ("bloom", 2048), ("mpt", 256)])
def test_a_text_that_is_cut_back_goes_on_as_if_nothing_had_followed(name: str, context: int, tmp_path: Path) -> None:
    decoder = runtime.load(save(name, tmp_path / name), dtype="float32", threads=1)
    assert decoder.max_tokens == context
    whole = np.array(decoder.forward(TOKENS, 0))
    decoder.forward(TOKENS[:3], 20)  # other tokens take the place of the last four
    again = np.array(decoder.forward(TOKENS[20:], 20))
    np.testing.assert_allclose(again, whole[20:], atol=1e-5)
    np.testing.assert_allclose(np.array(decoder.forward(TOKENS[:9], 0)), whole[:9], atol=1e-5)
