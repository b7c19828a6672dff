"""Every architecture in the rows through every technique: a tiny random model of each, and what it computes after.

What goes wrong between families is folding (offsets of Gemma's norms, biases of Qwen and OPT, shared value heads),
layout (GPT-2's transposed weights, Phi's fused projections) and configuration (Gemma's alternating attention).
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from optikit import formats, stages, targets
from optikit.models.reader import read
from optikit.stage import Calibration, Job
from tests.families import CONFIGS, save

EVERYWHERE = ("awq", "width")
"""What every row goes through in each run; all else does so for a few rows, and for the others where slow tests run."""
A_FEW = ("llama", "gemma2", "gpt2", "opt", "phi", "falcon-rw", "bloom", "mpt", "qwen3_5_text")
CASES = [
    ("quantize", "awq", {"group_size": 32, "steps": 5}),
    ("quantize", "int8", {"scheme": "w8a8"}),
    ("prune", "wanda", {"sparsity": 0.2}),
    ("prune", "depth", {"ratio": 0.5, "keep_last": 0}),
    ("prune", "width", {"multiple": 16}),
    ("prune", "width", {"heads": 0.5, "mlp": 0.0, "importance": "contribution"}),
]


@pytest.fixture(scope="session")
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model of the row named by the parameter: treat as read-only."""
    return save(str(request.param), tmp_path_factory.mktemp(str(request.param)))


def logits(directory: Path, tokens: Tensor) -> Tensor:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(directory)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    found = model.load_state_dict(formats.load_state(directory, torch.float32), strict=False)
    assert found.unexpected_keys == []
    model.tie_weights()
    with torch.no_grad():
        return model.eval()(tokens).logits


def _trials() -> Iterator[Any]:
    for name, (verb, method, options) in product(CONFIGS, CASES):
        often = name in A_FEW or (method in EVERYWHERE and "heads" not in options)
        told = "-".join((name, method, *map(str, options.values())))
        yield pytest.param(name, verb, method, options, id=told, marks=() if often else pytest.mark.slow)


@pytest.mark.parametrize(("family", "verb", "method", "options"), list(_trials()), indirect=["family"])
def test_every_family_computes_afterwards(family, verb, method, options, prose, tmp_path):
    stage, facts, target = stages.load(verb, method), read(family), targets.find("cpu")
    chosen = stage.Options(**options)
    refused = [problem.code for problem in stage.check(chosen, facts, target)]
    if refused:  # what can't be done is refused by name, before anything is read
        row = facts.architecture
        assert row is not None
        reasons = {"scheme-not-served": row.transposed, "heads-fixed": not row.free_heads, "blocks-differ": row.hybrid}
        reasons |= {"channels-fixed": not row.keys["intermediate"], "nothing-to-prune": facts.kv_heads == 1}
        assert all(reasons[code] for code in refused)
        return
    for name in ("model", "scratch"):
        (tmp_path / name).mkdir()
    text = Calibration(text=prose, samples=3, length=40)
    stage.run(chosen, Job(source=family, dest=tmp_path / "model", scratch=tmp_path / "scratch", calibration=text))
    promised, written = stage.after(chosen, facts), read(tmp_path / "model")
    assert (written.layers, written.linears) == (promised.layers, promised.linears)
    assert written.weight_bytes == pytest.approx(promised.weight_bytes, rel=0.02)
    tokens = torch.randint(3, 260, (2, 48), generator=torch.Generator().manual_seed(1))
    before, after = logits(family, tokens), logits(tmp_path / "model", tokens)
    assert torch.isfinite(after).all()
    off = float((after - before).norm() / before.norm())
    assert off > 0 or method == "width"  # OPT's dead channels go without a trace
    assert off < {"awq": 0.4, "int8": 0.05, "wanda": 0.5}.get(method, 1.5)
