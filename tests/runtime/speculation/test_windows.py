"""Models with an attention window: drafts are rolled back in texts longer than it, and change nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from optikit import runtime
from optikit.runtime.speculation.acceptors import Greedy
from optikit.runtime.speculation.decoding_loop import Request, generate
from optikit.runtime.speculation.drafters import EMPTY, Draft
from tests import families
from tests.conftest import compile_onnx

PROMPT = np.random.default_rng(0).integers(3, 250, 60)
WRITTEN = 24
QWEN2 = {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}


class Mixed:
    """Drafts what is right for a while, then what isn't: every length of roll-back happens."""

    reads_hidden = reads_features = False

    def __init__(self, right):
        self._right, self._known = right, 0

    def start(self, _prompt, /):
        self._known = 0

    def extend(self, tokens, _hidden, /):
        self._known += len(tokens)

    def draft(self, limit, rng, /):
        kept = int(rng.integers(0, 5))
        tokens = [*self._right[self._known : self._known + kept], *rng.integers(3, 250, 4)][:limit]
        return Draft(np.array(tokens, np.int64), "mixed") if tokens else EMPTY


def without_a_cache(directory):
    """Return the greedy text, every token from the whole text before it: slow and obvious."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    text = PROMPT.tolist()
    with torch.inference_mode():
        for _ in range(WRITTEN):
            text.append(int(model(torch.tensor([text]), use_cache=False).logits[0, -1].argmax()))
    return text[len(PROMPT) :]


@pytest.mark.parametrize(
    ("family", "changes", "compiled"),
    [("mistral", {}, False), ("qwen2", QWEN2, False), ("gemma3_text", {}, False), ("gemma2", {}, True)],
)
def test_drafts_are_rolled_back_beyond_the_window(family, changes, compiled, tmp_path):
    source = families.save(family, tmp_path / "model", **changes)
    wanted = without_a_cache(source)
    (tmp_path / "work").mkdir()
    place = compile_onnx(source, tmp_path / "work") if compiled else source
    decoder = runtime.load(place, threads=1, dtype="auto" if compiled else "float32")
    steps = list(generate(decoder, Mixed(wanted), Greedy(), PROMPT, Request(max_new_tokens=WRITTEN)))
    assert [token for step in steps for token in step.tokens] == wanted
    rolled = {step.drafted - step.accepted for step in steps if step.drafted}
    assert len(rolled) > 1
    assert any(step.accepted for step in steps)
