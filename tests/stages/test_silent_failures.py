"""What users of other tools reported as "exit code 0, file wrong", as fixtures: every one of them fails here.

experts swapped, or gate in the place of up     llm-compressor 2939, 2430, 1841: a mixture that lost 57 points
all codes the same                              llm-compressor 1765: every packed byte 0x88
the method did nothing                          llm-compressor 2855
tensors of drafts and gates left out            Model-Optimizer 2427: 0 of 15 tensors, exit 0
larger than what it was made from               auto-round 2293
a kernel that is wrong, slow, or none, for a legal file   onnxruntime 28551, 28528, 28552; vllm 55613, 37185
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from optikit import rules, stages
from optikit.algorithms import gptq
from optikit.calibration import write_checkpoint
from optikit.errors import IntegrityError, OptikitError, RecipeError, StageFailedError
from optikit.execution import check_backend
from optikit.formats.checkpoint import Entry
from optikit.models.reader import read
from optikit.plan import make_plan
from optikit.recipe.load import load
from optikit.stage import Calibration, Job
from optikit.stages.compile import _onnx_compare
from optikit.store.store import Store
from tests.conftest import round_to_gptq
from tests.rules import stacks
from tests.stages.test_mixtures import mixture  # noqa: F401 - a fixture

Tensors = dict[str, Tensor]


def exchange(one: str, other: str) -> Callable[[Tensors], None]:
    """Return what puts one linear's packed tensors in the place of another's."""

    def edit(tensors: Tensors) -> None:
        for suffix in ("qweight", "qzeros", "scales"):
            first, second = f"{one}.{suffix}", f"{other}.{suffix}"
            tensors[first], tensors[second] = tensors[second], tensors[first]

    return edit


def collapsed(tensors: Tensors) -> None:
    packed = tensors["model.layers.0.block_sparse_moe.experts.1.w2.qweight"]
    packed.fill_(-2004318072)  # 0x88888888: every code is the zero point


def stuck(tensors: Tensors) -> None:
    tensors["model.layers.0.block_sparse_moe.experts.1.w2.qweight"].fill_(0x11111111 * 7)


def scaled(tensors: Tensors) -> None:
    tensors["model.layers.1.block_sparse_moe.experts.3.w1.scales"].mul_(8)


def dropped(name: str) -> Callable[[Tensors], None]:
    def edit(tensors: Tensors) -> None:
        del tensors[name]

    return edit


BASE = "model.layers.0.block_sparse_moe.experts."
CASES: dict[str, tuple[str, Callable[[Tensors], None], str]] = {
    "experts swapped": ("mixtral", exchange(f"{BASE}0.w1", f"{BASE}2.w1"), r"experts\.0\.w1 is off"),
    "gate in the place of up": ("mixtral", exchange(f"{BASE}1.w1", f"{BASE}1.w3"), r"experts\.1\.w1 is off"),
    "stacked experts swapped": (
        "granitemoe",
        exchange(f"{BASE}0.down_proj", f"{BASE}3.down_proj"),
        r"down_proj is off",
    ),
    "one expert's scales of another": ("mixtral", scaled, r"experts\.3\.w1 is off"),
    "every code is zero": ("mixtral", collapsed, r"experts\.1\.w2 is off"),
    "every code is the same": ("mixtral", stuck, r"experts\.1\.w2"),
    "a router left out": ("mixtral", dropped("model.layers.1.block_sparse_moe.gate.weight"), r"gate\.weight was not"),
    "what a router adds left out": (
        "deepseek_v3",
        dropped("model.layers.1.mlp.gate.e_score_correction_bias"),
        r"e_score_correction_bias was not written",
    ),
    "a draft's block left out": ("deepseek_v3", dropped("model.layers.2.eh_proj.weight"), r"eh_proj\.weight was not"),
    "an embedding left out": ("mixtral", dropped("model.embed_tokens.weight"), r"embed_tokens\.weight was not"),
    "a head left out": ("mixtral", dropped("lm_head.weight"), r"lm_head\.weight was not"),
}


def rounded(source: Path, place: Path) -> dict[str, Any]:
    stage = stages.load("quantize", "rtn")
    for name in ("model", "scratch"):
        (place / name).mkdir()
    return stage.run(stage.Options(group_size=32), Job(source=source, dest=place / "model", scratch=place / "scratch"))


@pytest.mark.parametrize("case", CASES)
def test_a_wrong_file_is_no_result(case, mixture, tmp_path, monkeypatch):  # noqa: F811
    name, edit, message = CASES[case]
    source = mixture(name)
    if name == "deepseek_v3":
        source = tmp_path / "source"
        source.mkdir()
        for path in mixture(name).iterdir():
            (source / path.name).write_bytes(path.read_bytes())
        whole = load_file(source / "model.safetensors")
        whole["model.layers.2.eh_proj.weight"] = torch.ones(64, 128, dtype=torch.bfloat16)
        save_file(whole, source / "model.safetensors", {"format": "pt"})
    write = write_checkpoint.write_model

    def wrong(src: Path, dest: Path, entries: dict[str, Entry], **named: Any) -> None:
        write(src, dest, entries, **named)
        tensors = load_file(dest / "model.safetensors")
        edit(tensors)
        save_file(tensors, dest / "model.safetensors", {"format": "pt"})

    monkeypatch.setattr(write_checkpoint, "write_model", wrong)
    with pytest.raises(OptikitError, match=message) as caught:
        rounded(source, tmp_path)
    assert caught.value.code != 0


def test_a_method_that_did_nothing_is_no_result(mixture, prose, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(gptq, "inverse_factor", lambda *_: None)
    stage = stages.load("quantize", "gptq")
    (tmp_path / "model").mkdir()
    text = Calibration(text=prose, samples=3, length=40)
    job = Job(source=mixture("mixtral"), dest=tmp_path / "model", scratch=tmp_path / "scratch", calibration=text)
    with pytest.raises(StageFailedError, match="GPTQ did nothing"):
        stage.run(stage.Options(group_size=32), job)


def test_a_file_larger_than_promised_is_no_result(tiny_llama, tiny_gptq):
    promised = read(tiny_gptq)
    small = replace(promised, weight_bytes=promised.weight_bytes // 2)
    with pytest.raises(StageFailedError, match=r"promised .* MB, and wrote"):
        check_backend.require("1-quantize-gptq", "llm-compressor", tiny_llama, tiny_gptq, small)


def test_an_engine_that_answers_with_zeros_is_no_result(tiny_gptq, tiny_onnx_int4, monkeypatch):
    """The file holds the right weights, bit by bit; what the engine's kernel makes of them is nothing."""
    computed = _onnx_compare._computed
    monkeypatch.setattr(_onnx_compare, "_computed", lambda *given, **how: 0 * computed(*given, **how))
    with pytest.raises(IntegrityError, match="computes something else") as caught:
        _onnx_compare.compare(tiny_gptq, tiny_onnx_int4, read(tiny_gptq), window=512, threads=1)
    assert caught.value.code == 76


KERNELS: dict[str, tuple[dict[str, Any], str]] = {
    "a group of a whole row": ({"group_size": -1}, "group-has-no-kernel"),
    "codes of 2 bits, whose kernel wants 128 outputs at a time": ({"bits": 2}, "bad-choice"),
    "blocks of 128 outputs that a linear hasn't": ({"method": "fp8", "scheme": "block"}, "block-divides-width"),
}


@pytest.mark.parametrize("case", KERNELS)
def test_a_file_without_a_kernel_is_refused_before_it_is_made(case, tiny_llama, prose, tmp_path):
    options, code = KERNELS[case]
    named = options if "method" in options else {"method": "gptq", "group_size": 32, **options}
    stages_of = [{"quantize": named}, {"compile": {"engine": "onnxruntime"}}]
    recipe = {"model": str(tiny_llama), "target": "cpu", "stages": stages_of}
    recipe["calibration"] = {"text": str(prose), "samples": 4, "length": 32}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.raises(RecipeError) as caught:
        make_plan(load(tmp_path / "r.yaml"), Store(tmp_path / "home"))
    assert caught.value.code == 65
    assert code in {problem.code for problem in caught.value.problems}


@pytest.mark.parametrize(
    ("suffix", "dtype", "shape"),
    [("qzeros", torch.float16, (2, 64)), ("qzeros", torch.int32, (2, 64)), ("qweight", torch.uint8, (4, 64))],
    ids=["zero points that are floats", "zero points that aren't packed", "codes that aren't packed"],
)
def test_a_file_whose_codes_no_reader_takes_is_refused_before_it_is_read(suffix, dtype, shape, tiny_llama, tmp_path):
    """2 bits with a zero point of 1.5, as Quark has it, under the name of a format that has none such."""
    source = round_to_gptq(tiny_llama, tmp_path / "model", bits=2)
    make_plan(load(recipe_of(source, tmp_path)), Store(tmp_path / "home"))
    tensors = load_file(source / "model.safetensors")
    tensors[f"model.layers.0.self_attn.q_proj.{suffix}"] = torch.full(shape, 1.5).to(dtype)
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(IntegrityError, match=rf"q_proj\.{suffix} (is stored as|has shape)") as caught:
        make_plan(load(recipe_of(source, tmp_path)), Store(tmp_path / "home"))
    assert caught.value.code == 76


def recipe_of(model: Path, place: Path) -> Path:
    path = place / "r.yaml"
    stack = [{"compile": {"engine": "onnxruntime"}}]
    path.write_text(yaml.safe_dump({"model": str(model), "target": "cpu", "stages": stack}))
    return path


def test_a_processor_without_the_kernel_is_told_before_a_server_ends_on_it():
    stack = stacks.stack({key: each for key, each in stacks.CASES["vllm-cpu-avx512"].items() if key != "near"})
    assert [(problem.code, problem.level) for problem in rules.check(stack)] == [("vllm-cpu-avx512", "error")]
