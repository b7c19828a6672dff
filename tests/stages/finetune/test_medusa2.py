"""Joint training: what it plans, and that heads which lie beside a model start later ones of the same shape only."""

from __future__ import annotations

from typing import Any

import pytest

from optikit import targets
from optikit.stages.finetune import medusa2
from tests.rules.stacks import facts


@pytest.mark.parametrize(("options", "weight"), [({}, 0.01), ({"aim": "text"}, 0.2), ({"heads_weight": 0.5}, 0.5)])
def test_the_weight_of_the_heads_follows_from_the_aim(options, weight):
    assert medusa2.Options(**options).weight() == weight


def test_more_heads_and_aims_are_planned_to_take_more():
    def seconds(**options: Any) -> float:
        return medusa2.estimate(medusa2.Options(**options), facts({}), targets.find("cpu"), 4096).seconds

    assert seconds(heads=5) > seconds()
    assert seconds(alone=0.9) < seconds()
    assert seconds(aim="text") < seconds()
    assert seconds(text="own") > seconds()


def test_a_missing_library_is_said_when_planning(monkeypatch):
    monkeypatch.setattr(medusa2, "find_spec", lambda _: None)
    found = list(medusa2.check(medusa2.Options(), facts({}), targets.find("cpu")))
    assert [problem.code for problem in found] == ["library-missing"]


def test_later_heads_start_from_those_that_fit(tmp_path):
    import torch

    from optikit.algorithms.medusa import MedusaHeads
    from optikit.formats.checkpoint import save_tensors
    from optikit.formats.heads_start import HEADS_START, start, tensors_of

    output = torch.randn(20, 16)
    trained = MedusaHeads(output, heads=2)
    with torch.no_grad():
        for each in trained.blocks.parameters():
            each.normal_()
    assert start(MedusaHeads(output, heads=2), tmp_path) == "there are none"
    save_tensors(tmp_path / HEADS_START, tensors_of(trained))
    for later in (MedusaHeads(output, heads=2), MedusaHeads(output, heads=2, embedding=torch.randn(20, 16))):
        assert start(later, tmp_path) == ""
        assert all(
            torch.equal(a, b) for a, b in zip(later.blocks.parameters(), trained.blocks.parameters(), strict=True)
        )
    for others in (MedusaHeads(output, heads=3), MedusaHeads(output, heads=2, layers=2)):
        assert start(others, tmp_path) == "they are 2 of 1 layers and width 16"
        assert not any(each.any() for each in others.blocks.parameters())
    assert start(MedusaHeads(torch.randn(20, 8), heads=2), tmp_path) == "they are 2 of 1 layers and width 16"
