"""Every row of architectures.toml against the real modules of transformers, built small."""

from __future__ import annotations

from typing import Any

import pytest

from optikit.models import architectures

SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
SPECIAL: dict[str, dict[str, Any]] = {
    "gpt2": {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "opt": {
        "vocab_size": 64,
        "hidden_size": 32,
        "word_embed_proj_dim": 32,
        "ffn_dim": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
    },
}


def build(model_type: str):
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(model_type, **SPECIAL.get(model_type, SMALL))
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("model_type", architectures.names())
def test_names_linears_and_order_are_the_models_own(model_type: str) -> None:
    import torch
    from transformers.pytorch_utils import Conv1D

    row = architectures.find(model_type)
    assert row is not None
    model = build(model_type)
    modules = dict(model.named_modules())
    linears = [name for name, m in modules.items() if isinstance(m, torch.nn.Linear | Conv1D) and name != row.head]
    assert sorted(row.names(2)) == sorted(linears), "every linear of every block, and no other"
    assert isinstance(modules[row.embedding], torch.nn.Embedding)
    assert row.norm in modules
    assert row.head in modules
    assert row.transposed is any(isinstance(modules[name], Conv1D) for name in linears)

    inputs: dict[str, Any] = {}
    for name in [*row.names(1), *(f"{row.block(0)}.{previous}" for previous in row.previous_ops if previous)]:
        modules[name].register_forward_hook(lambda _, given, out, name=name: inputs.update({name: (given[0], out)}))
    with torch.no_grad():
        model(torch.arange(8)[None])
    short = {name.removeprefix(row.block(0) + "."): value for name, value in inputs.items()}
    seen = [name for name in short if name in row.linears]
    assert [set(group) for group in row.groups] == _grouped(seen, row.groups), "groups in execution order"
    for group in row.groups:
        first = short[group[0]][0]
        assert all(short[name][0] is first or torch.equal(short[name][0], first) for name in group)


def _grouped(seen: list[str], groups: tuple[tuple[str, ...], ...]) -> list[set[str]]:
    found, at = [], 0
    for group in groups:
        found.append(set(seen[at : at + len(group)]))
        at += len(group)
    return found


@pytest.mark.parametrize("model_type", architectures.names())
def test_previouss_really_absorb_a_scale(model_type: str) -> None:
    """Dividing a previous's output channels by s and multiplying its group's input columns by s changes nothing."""
    import torch

    row = architectures.find(model_type)
    assert row is not None
    assert len(row.previous_ops) == len(row.groups)
    torch.manual_seed(0)
    model = build(model_type).float()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        before = model(tokens).logits
        for group, previous in zip(row.groups, row.previous_ops, strict=True):
            if previous:
                _fold(model, row, group, previous)
        after = model(tokens).logits
    assert torch.allclose(before, after, atol=2e-4 * before.abs().max().item()), (before - after).abs().max()
    assert before.abs().max() > 0.1


def _fold(model: Any, row: Any, group: tuple[str, ...], previous: str) -> None:
    import torch

    source = model.get_submodule(f"{row.block(0)}.{previous}")
    linears = [model.get_submodule(f"{row.block(0)}.{name}") for name in group]
    axis = 0 if row.transposed else 1
    width, own = linears[0].weight.shape[axis], source.weight.shape[0]
    scale = torch.rand(own) + 0.5
    offset = row.norm_offset if source.weight.ndim == 1 else 0.0
    shaped = scale if source.weight.ndim == 1 else scale[:, None]
    source.weight.copy_((source.weight + offset) / shaped - offset)
    if getattr(source, "bias", None) is not None:
        source.bias.div_(scale)
    repeat = width // own  # each value head feeds several query heads
    heads = scale.reshape(-1, 8) if repeat > 1 else scale.reshape(1, -1)
    wide = heads.repeat_interleave(repeat, dim=0).reshape(-1) if repeat > 1 else scale
    for linear in linears:
        linear.weight.mul_(wide[:, None] if row.transposed else wide[None, :])


def test_an_unknown_family_is_none() -> None:
    assert architectures.find("mamba") is None
