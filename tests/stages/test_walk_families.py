"""Every architecture in the rows through every technique: a tiny random model of each, and what it computes after.

What goes wrong between families is folding (offsets of Gemma's norms, biases of Qwen and OPT, shared value heads),
layout (GPT-2's transposed weights, Phi's fused projections) and configuration (Gemma's alternating attention).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from optikit import formats, stages, targets
from optikit.models import architectures
from optikit.models.reader import read
from optikit.stage import Calibration, Job

COMMON = {
    "vocab_size": 260,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": COMMON | {"tie_word_embeddings": False},
    "mistral": COMMON | {"sliding_window": 32},
    "qwen2": COMMON,
    "qwen3": COMMON,
    "gemma2": COMMON | {"sliding_window": 16, "query_pre_attn_scalar": 16},
    "gemma3_text": COMMON | {"sliding_window": 16, "query_pre_attn_scalar": 16, "sliding_window_pattern": 2},
    "phi3": COMMON | {"sliding_window": None},
    "gpt2": {
        "vocab_size": 260, "n_embd": 64, "n_inner": 128, "n_layer": 2, "n_head": 4, "n_positions": 256,
        "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2,
    },
    "opt": {
        "vocab_size": 260, "hidden_size": 64, "ffn_dim": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "max_position_embeddings": 256, "word_embed_proj_dim": 64, "bos_token_id": 0, "eos_token_id": 1,
        "pad_token_id": 2,
    },
}  # fmt: skip

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
    """A saved model of the family named by the parameter, its norms and biases far from ones and zeros."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from tests.conftest import byte_tokenizer

    directory = tmp_path_factory.mktemp(str(request.param))
    torch.manual_seed(0)
    config = AutoConfig.for_model(request.param, **FAMILIES[request.param])
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    for name, parameter in model.named_parameters():
        if "norm" in name or "ln_" in name or name.endswith("bias"):
            parameter.data += 0.3 * torch.randn_like(parameter)
    model.save_pretrained(directory)
    byte_tokenizer(directory)
    return directory


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


def test_every_row_is_tried():
    assert set(FAMILIES) == set(architectures.names())


@pytest.mark.parametrize("family", FAMILIES, indirect=True)
@pytest.mark.parametrize(("verb", "method", "options"), CASES)
def test_every_family_computes_afterwards(family, verb, method, options, prose, tmp_path):
    stage, facts, target = stages.load(verb, method), read(family), targets.find("cpu")
    chosen = stage.Options(**options)
    refused = [problem.code for problem in stage.check(chosen, facts, target)]
    if refused:  # what can't be done is refused by name, before anything is read
        assert set(refused) <= {"scheme-not-served", "heads-fixed"}
        assert facts.model_type in {"gpt2", "opt", "phi3"}
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
