"""Every row of architectures.toml against the real modules of transformers, built small."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from optikit.models import architectures
from optikit.models.architectures import Architecture
from tests.families import CONFIGS, model_of

ROWS = tuple(
    name for name, row in architectures.rows().items() if not row.experts and not row.computed_as
)  # mixtures.py has those


def row_of(name: str) -> Architecture:
    return architectures.rows()[name]


def test_every_row_has_a_tiny_model() -> None:
    assert set(CONFIGS) == set(ROWS)


@pytest.mark.parametrize("name", ROWS)
def test_config_json_chooses_the_row(name: str) -> None:
    from tests.families import config_of

    row = row_of(name)
    assert architectures.find(row.model_type, config_of(name).to_dict()) is row


def seen_by(model: Any, row: Architecture) -> Iterator[tuple[int, list[tuple[str, Any]]]]:
    """Yield the linears of each block in execution order, with their inputs."""
    import torch
    from transformers.pytorch_utils import Conv1D

    calls: dict[int, list[tuple[str, Any]]] = {}
    for index, block in enumerate(model.get_submodule(row.blocks)):
        calls[index] = []
        for name, module in block.named_modules():
            if isinstance(module, torch.nn.Linear | Conv1D):
                module.register_forward_hook(
                    lambda _, given, __, at=(index, name): calls[at[0]].append((at[1], given[0]))
                )
    with torch.no_grad():
        model(torch.arange(3, 15)[None], use_cache=False)
    yield from calls.items()


def faults(row: Architecture, model: Any) -> Iterator[str]:
    """Yield what a row says of linears and groups that isn't so."""
    listed = set()
    for index, calls in seen_by(model, row):
        order = [name for name, _ in calls]
        inputs = dict(calls)
        groups = [[name for name in group if name in inputs] for group in row.groups]
        groups = [group for group in groups if group]
        listed |= {name for group in groups for name in group}
        if {name for group in groups for name in group} != set(order):
            yield f"block {index} has {sorted(order)}"
            continue
        firsts = [order.index(group[0]) for group in groups]
        if firsts != sorted(firsts) or any(
            order.index(name) < order.index(group[0]) for group in groups for name in group
        ):
            yield f"block {index} runs in the order {order}"
        if any(inputs[name] is not inputs[group[0]] for group in groups for name in group):
            yield f"block {index} has groups of several inputs"
    if listed != set(row.linears):
        yield f"no block has {set(row.linears) - listed}"


@pytest.mark.parametrize("name", ROWS)
def test_names_linears_and_order_are_the_models_own(name: str) -> None:
    import torch
    from transformers.pytorch_utils import Conv1D

    row, model = row_of(name), model_of(name)
    modules = dict(model.named_modules())
    linears = [n for n, m in modules.items() if isinstance(m, torch.nn.Linear | Conv1D) and n != row.head]
    assert all(n.startswith(f"{row.blocks}.") for n in linears), "no linear outside the blocks but the head"
    assert isinstance(modules[row.embedding], torch.nn.Embedding)
    assert row.norm in modules
    assert row.head in modules
    assert row.transposed is any(isinstance(modules[n], Conv1D) for n in linears)
    assert not list(faults(row, model))


@pytest.mark.parametrize("name", ROWS)
def test_a_wrong_row_is_found(name: str) -> None:
    """A linear left out, or two groups swapped."""
    row = row_of(name)
    assert list(faults(replace(row, groups=row.groups[1:]), model_of(name)))
    assert list(faults(replace(row, groups=(*row.groups[:-2], row.groups[-1], row.groups[-2])), model_of(name)))


def apart(name: str, row: Architecture) -> float:
    """Return how far logits move, relative to their size, when all groups of both blocks are scaled and unscaled."""
    import torch

    model = model_of(name)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data += torch.randn(parameter.shape, generator=generator) * 0.15
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        before = model(tokens, use_cache=False).logits
        for block in range(2):
            for group, previous in zip(row.groups, row.previous_ops, strict=True):
                if previous:
                    _fold(model, row, block, group, previous)
        after = model(tokens, use_cache=False).logits
    assert torch.isfinite(before).all()
    return float((before - after).abs().max() / before.std())


def _fold(model: Any, row: Architecture, block: int, group: tuple[str, ...], previous: str) -> None:
    import torch

    modules = dict(model.get_submodule(row.block(block)).named_modules())
    if group[0] not in modules:
        return
    source, linears = modules[previous], [modules[name] for name in group]
    axis = 0 if row.transposed else 1
    width, own = linears[0].weight.shape[axis], source.weight.shape[0]
    scale = torch.rand(own) + 0.5
    offset = row.norm_offset if source.weight.ndim == 1 else 0.0
    shaped = scale if source.weight.ndim == 1 else scale[:, None]
    source.weight.copy_((source.weight + offset) / shaped - offset)
    if getattr(source, "bias", None) is not None:
        source.bias.div_(scale)
    repeat = width // own  # each value head feeds several query heads
    heads = scale.reshape(-1, 16) if repeat > 1 else scale.reshape(1, -1)
    wide = heads.repeat_interleave(repeat, dim=0).reshape(-1) if repeat > 1 else scale
    for linear in linears:
        linear.weight.mul_(wide[:, None] if row.transposed else wide[None, :])


@pytest.mark.parametrize("name", ROWS)
def test_previous_ops_really_absorb_a_scale(name: str) -> None:
    """Dividing a previous op's output channels by s and multiplying its group's input columns by s changes nothing."""
    row = row_of(name)
    assert len(row.previous_ops) == len(row.residual_sources) == len(row.groups)
    assert apart(name, row) < 2e-3
    place = next((i for i, previous in enumerate(row.previous_ops) if previous), None)
    if place is None:
        return
    wrong = list(row.previous_ops)
    wrong[place] = next((p for p in row.previous_ops[place + 1 :] if (p and "norm" in p) or p.startswith("ln_")), "")
    if wrong[place] and wrong[place] != row.previous_ops[place]:
        assert apart(name, replace(row, previous_ops=tuple(wrong))) > 0.02, "a wrong one is seen"


@pytest.mark.parametrize("name", ROWS)
def test_outputs_are_added_to_the_stream_that_the_row_names(name: str) -> None:
    """A norm's input, or the block's output, is that stream and the output; beside attention the MLP's, too."""

    row, model = row_of(name), model_of(name)
    scale = float(getattr(model.config, row.residual_scale)) if row.residual_scale else 1.0
    for block in model.get_submodule(row.blocks):
        modules = dict(block.named_modules())
        for group, residual in zip(row.groups, row.residual_sources, strict=True):
            if residual and group[0] in modules:
                assert len(group) == 1
                _adds(model, block, modules[group[0]], modules[residual], modules[row.linears[-1]], scale)


@pytest.mark.parametrize("name", [name for name in ROWS if len(set(row_of(name).residual_sources)) == 3])
def test_a_wrong_stream_is_found(name: str) -> None:
    row = row_of(name)
    first, *_, second = (i for i, source in enumerate(row.residual_sources) if source)
    model = model_of(name)
    block = model.get_submodule(row.block(1))
    names = row.groups[first][0] if row.groups[first][0] in dict(block.named_modules()) else "self_attn.o_proj"
    linear, source, last = (block.get_submodule(n) for n in (names, row.residual_sources[second], row.linears[-1]))
    with pytest.raises(AssertionError):
        _adds(model, block, linear, source, last, 1.0)


def _adds(model: Any, block: Any, linear: Any, source: Any, last: Any, scale: float) -> None:
    """Hold what comes after a linear to the stream that its output is added to."""
    import torch

    seen: dict[str, Any] = {}
    later: list[Any] = []
    hooks = [
        source.register_forward_pre_hook(lambda _, given: seen.update(stream=given[0].clone())),
        linear.register_forward_hook(lambda _, __, out: seen.update(out=out.clone())),
        last.register_forward_hook(lambda _, __, out: seen.update(last=out.clone())),
        block.register_forward_hook(lambda _, __, out: later.append(out[0] if isinstance(out, tuple) else out)),
    ]
    hooks += [
        module.register_forward_pre_hook(lambda _, given: later.append(given[0]) if "out" in seen else None)
        for name, module in block.named_modules()
        if "norm" in name.rpartition(".")[2] or name.startswith("ln_")
    ]
    with torch.no_grad():
        model(torch.arange(3, 15)[None], use_cache=False)
    for hook in hooks:
        hook.remove()
    alone = seen["stream"].flatten(0, -2) + scale * seen["out"].flatten(0, -2)
    both = alone + scale * seen["last"].flatten(0, -2)
    found = [each.flatten(0, -2) for each in later]
    assert any(torch.allclose(each, wanted, atol=1e-5) for each in found for wanted in (alone, both))


def test_an_unknown_family_is_none() -> None:
    assert architectures.find("mamba") is None
