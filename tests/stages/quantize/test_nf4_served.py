"""An NF4 directory in the hands of who serves it: transformers with bitsandbytes, on the CPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from optikit import formats, stages, targets
from optikit.models.reader import read
from optikit.stage import Job


def written(source: Path, place: Path, **options: object) -> Path:
    for name in ("model", "scratch"):
        (place / name).mkdir(parents=True)
    stage = stages.load("quantize", "nf4")
    stage.run(stage.Options(**options), Job(source=source, dest=place / "model", scratch=place / "scratch"))
    return place / "model"


@pytest.mark.parametrize("options", [{}, {"double_quant": False, "ignore": ["*.1.mlp.*"]}], ids=["double", "single"])
def test_transformers_reads_the_same_weights_and_computes_the_same_logits(options, tiny_llama, tmp_path):
    from bitsandbytes.functional import dequantize_4bit

    directory = written(tiny_llama, tmp_path, **options)
    theirs = AutoModelForCausalLM.from_pretrained(directory, dtype="auto", local_files_only=True)
    state = formats.load_state(directory, torch.bfloat16)
    packed = {name: module for name, module in theirs.named_modules() if type(module).__name__ == "Linear4bit"}
    assert set(packed) == {name for name in read(tiny_llama).linears if not options or "1.mlp" not in name}
    for name, module in packed.items():
        weight = dequantize_4bit(module.weight.data, module.weight.quant_state)
        assert torch.equal(weight, state[f"{name}.weight"])
    config = AutoConfig.from_pretrained(directory)
    del config.quantization_config
    ours = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    ours.load_state_dict(state, strict=False)
    ours.tie_weights()
    tokens = torch.randint(3, config.vocab_size, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        mine, other = (model.eval()(tokens).logits.float() for model in (ours, theirs))
    assert torch.isfinite(other).all()
    assert (mine - other).norm() < 0.01 * mine.norm()


def test_it_is_refused_where_nothing_serves_it(tiny_llama):
    stage, target = stages.load("quantize", "nf4"), targets.find("inf2.48xlarge")
    assert target is not None
    problems = list(stage.check(stage.Options(), read(tiny_llama), target))
    assert [problem.code for problem in problems] == ["scheme-not-served"]


@pytest.mark.parametrize(("target", "codes"), [("cpu", ["block-divides-width"]), ("l4", [])])
def test_widths_that_bitsandbytes_reads_wrongly_on_a_cpu_are_refused_there(target, codes, tiny_llama):
    stage, found, facts = stages.load("quantize", "nf4"), targets.find(target), read(tiny_llama)
    assert found is not None
    narrow = replace(facts, linears={name: (rows, 96) for name, (rows, _) in facts.linears.items()})
    assert [problem.code for problem in stage.check(stage.Options(), narrow, found)] == codes


def test_weights_stored_the_other_way_round_are_refused(tiny_llama):
    stage, target = stages.load("quantize", "nf4"), targets.find("cpu")
    assert target is not None
    problems = list(stage.check(stage.Options(), replace(read(tiny_llama), model_type="gpt2"), target))
    assert [problem.code for problem in problems] == ["scheme-not-served"]
