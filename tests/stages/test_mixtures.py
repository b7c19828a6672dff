"""Mixtures of experts through the walk: a tiny random model of every family that has them, against transformers' own.

What goes wrong with experts is which is which (stacked, renamed, gate and up the wrong way round), what the block goes
on with (the router's mixture, not every expert's), and what a rare expert is calibrated on.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from optikit import stages, targets
from optikit.algorithms.grid import Grid
from optikit.calibration import blockwise, write_checkpoint
from optikit.calibration.empty_model import EmptyModel
from optikit.calibration.method import Group, Result, Walked
from optikit.calibration.methods.pruning import Norms
from optikit.calibration.source_model import SourceModel
from optikit.errors import StageFailedError
from optikit.formats import census, dense_model, dequantized_state, loadable
from optikit.formats.checkpoint import Checkpoint
from optikit.models import architectures, stacked_experts
from optikit.models.reader import read
from optikit.runtime.decoders.transformers import load_model
from optikit.stage import Calibration, Job
from tests.mixtures import FAMILIES, losses, save

CASES = [
    *(("quantize", "gptq", {"group_size": 32}, name) for name in FAMILIES),
    *(
        ("quantize", "int8", {"scheme": "w8a8"}, name)
        for name in ("phimoe", "granitemoe", "qwen2_moe", "deepseek_v2", "gpt_oss", "llama4_text")
    ),
    *(("prune", "wanda", {"sparsity": 0.2}, name) for name in ("granitemoe", "deepseek_v3", "gpt_oss", "llama4_text")),
    *(("quantize", "awq", {"group_size": 32, "steps": 4}, name) for name in ("gpt_oss", "llama4_text")),
    ("prune", "magnitude", {"sparsity": 0.2}, "mixtral"),
    ("quantize", "rtn", {"group_size": 32}, "granitemoe"),
    ("quantize", "int8", {"group_size": 32}, "qwen3_moe"),
    ("quantize", "awq", {"group_size": 32, "steps": 4}, "mixtral"),
    ("quantize", "awq", {"group_size": 32, "steps": 4}, "qwen2_moe"),
    ("quantize", "nf4", {"ignore": ["*self_attn*", "down_proj"]}, "qwen3_moe"),
]


@pytest.fixture(scope="session")
def mixture(tmp_path_factory: pytest.TempPathFactory):
    """Return what makes a saved tiny model of a family, once."""
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            made[name] = save(name, tmp_path_factory.mktemp(name))
        return made[name]

    return make


def logits(directory: Path, tokens: Tensor) -> Tensor:
    model, missing, odd = dense_model.load(directory, torch.float32, attn_implementation="eager")
    assert not missing
    assert not odd
    with torch.no_grad():
        return model.eval()(tokens).logits


def walk(verb: str, method: str, source: Path, place: Path, prose: Path, **options: Any) -> dict[str, Any]:
    stage = stages.load(verb, method)
    for name in ("model", "scratch"):
        (place / name).mkdir(parents=True)
    text = Calibration(text=prose, samples=3, length=40)
    job = Job(source=source, dest=place / "model", scratch=place / "scratch", calibration=text)
    return stage.run(stage.Options(**options), job)


def test_every_row_with_experts_is_tried():
    assert set(FAMILIES) == {name for name, row in architectures.rows().items() if row.experts and not row.computed_as}


@pytest.mark.parametrize(("verb", "method", "options", "name"), CASES)
def test_every_family_computes_afterwards(verb, method, options, name, mixture, prose, tmp_path):
    source = mixture(name)
    stage, facts = stages.load(verb, method), read(source)
    chosen = stage.Options(**options)
    assert [problem.message for problem in stage.check(chosen, facts, targets.find("cpu"))] == []
    found = walk(verb, method, source, tmp_path, prose, **options)
    promised, written = stage.after(chosen, facts), read(tmp_path / "model")
    assert written.linears == promised.linears
    assert written.weight_bytes == pytest.approx(promised.weight_bytes, rel=0.02)
    loadable.require(tmp_path / "model")
    census.take(source, tmp_path / "model", stage.CHANGES, found)  # no tensor is lost, none appears
    tokens = torch.randint(3, 260, (2, 48), generator=torch.Generator().manual_seed(1))
    before, after = logits(source, tokens), logits(tmp_path / "model", tokens)
    off = float((after - before).norm() / before.norm())
    assert 0 < off < {"int8": 0.2}.get(method, 0.7)  # of random routers' choices some fall the other way
    if verb == "quantize":
        assert {row["experts"] for row in found["experts"]} == {4}


SERVED = {
    "static": ("fp8", "mixtral", {"scheme": "static", "kv_cache": True}),
    "dynamic": ("fp8", "qwen3_moe", {}),
    "packed": ("gptq", "mixtral", {"group_size": 32, "format": "pack-quantized"}),
}


@pytest.mark.parametrize("case", SERVED)
def test_what_servers_read_computes_with_inputs_rounded_as_they_do(case, mixture, prose, tmp_path):
    """Of FP8 the inputs of experts are rounded, too, which no weight shows; packed integers leave them as they are."""
    method, name, options = SERVED[case]
    source = mixture(name)
    found = walk("quantize", method, source, tmp_path, prose, **options)
    census.take(source, tmp_path / "model", "linears", found)
    loadable.require(tmp_path / "model")
    assert {row["experts"] for row in found["experts"]} == {4}
    tokens = torch.randint(3, 260, (2, 48), generator=torch.Generator().manual_seed(1))
    model = load_model(tmp_path / "model", "float32")
    with torch.no_grad():
        served = model(tokens).logits
    dense, weights = logits(source, tokens), logits(tmp_path / "model", tokens)
    assert float((served - dense).norm() / dense.norm()) < 0.6
    assert torch.allclose(served, weights, atol=1e-4) == (method != "fp8")
    experts = [module for module in model.modules() if hasattr(module, "_apply_gate")]
    assert all(bool(module._forward_pre_hooks) == (method == "fp8") for module in experts)


def test_routers_and_gates_of_shared_experts_stay_as_they_are(mixture, prose, tmp_path):
    walk("quantize", "gptq", mixture("qwen2_moe"), tmp_path, prose, group_size=32)
    before, after = Checkpoint(mixture("qwen2_moe")), Checkpoint(tmp_path / "model")
    for name in ("model.layers.1.mlp.gate.weight", "model.layers.1.mlp.shared_expert_gate.weight"):
        assert torch.equal(before.read(name), after.read(name))


@dataclass(frozen=True)
class Unchanged:
    """Looks at everything, changes nothing, writes nothing."""

    correct_damp: None = None

    @property
    def layout(self) -> Unchanged:
        return self

    def write(self, *_: object) -> dict[str, Any]:
        return {}

    def statistic(self, group: Group) -> Norms:
        return Norms(group)

    def apply(self, group: Group, statistic: Norms) -> Result:
        return Result(
            weights=group.weights, facts={name: {"seen": statistic.squared.sum().item()} for name in group.names}
        )


def followed(source: Path, prose: Path, scratch: Path, seen: str = "all") -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Return the last block's output as the walk has it, and as transformers has it; and facts about linears."""
    from optikit.calibration import calibration_set

    kept: list[bytes] = []

    def progress(done: int, total: int, _: str) -> None:
        if done == total:
            kept.append((scratch / f"hidden-{done:05}.bin").read_bytes())

    text = Calibration(text=prose, samples=3, length=40)
    job = Job(source=source, dest=scratch, scratch=scratch, calibration=text, progress=progress)
    rows = blockwise.run(job, Unchanged(), identity="unchanged", ignore=lambda _: False, experts=seen).rows
    dtype = blockwise.compute_dtype("cpu")
    ours = torch.frombuffer(bytearray(kept[0]), dtype=dtype).view(3, 40, -1).float()
    model, *_ = dense_model.load(source, dtype)
    outputs: list[Tensor] = []
    model.model.layers[-1].register_forward_hook(
        lambda _, __, out: outputs.append(out[0] if type(out) is tuple else out)
    )
    with torch.no_grad():
        model(calibration_set.draw(source, prose, samples=3, length=40, seed=0))
    return ours, outputs[0].float(), rows


@pytest.mark.parametrize("name", FAMILIES)
def test_the_walk_goes_on_with_what_transformers_computes(name, mixture, prose, tmp_path):
    ours, theirs, rows = followed(mixture(name), prose, tmp_path)
    assert float((ours - theirs).norm() / theirs.norm()) < 0.01
    experts = {
        row["seen"] for linear, row in rows.items() if ".experts." in linear and linear.endswith(("gate_proj", "w1"))
    }
    blocks = len({linear.partition(".experts.")[0] for linear in rows if ".experts." in linear})
    assert len(experts) == blocks  # all experts of a block share one statistic


@pytest.mark.parametrize("name", FAMILIES)
def test_a_walk_begins_without_reading_an_expert(name, mixture, monkeypatch):
    """A block of all its experts is what a walk's memory has no room for."""
    source = SourceModel(Checkpoint(mixture(name)))
    read = SourceModel.weight
    seen: list[str] = []
    monkeypatch.setattr(SourceModel, "read", _listed(SourceModel.read, seen))
    monkeypatch.setattr(SourceModel, "weight", lambda *given: seen.append(given[1].name) or read(*given))
    model = EmptyModel(source, dtype=torch.float32, device="cpu")
    with model.stem_filled():
        calls = model.record(torch.arange(3, 35)[None])
    assert len(calls) == source.layers
    assert seen
    assert not [each for each in seen if ".experts." in each]


def _listed(read: Any, seen: list[str]) -> Any:
    return lambda source, name: seen.append(name) or read(source, name)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_row_with_gate_and_up_swapped_is_noticed(name, mixture, prose, tmp_path, monkeypatch):
    row = architectures.find(name)
    assert row is not None
    gate, up, down = row.experts.linears
    wrong = replace(row, experts=replace(row.experts, linears=(up, gate, down)))
    monkeypatch.setattr(architectures, "find", lambda *_: wrong)
    parts = stacked_experts.parts

    def exchanged(*args: Any, **named: Any) -> Any:
        for part in parts(*args, **named):
            projection = part.name.split(".")[-2]
            yield replace(part, name=part.name.replace(projection, {gate: up, up: gate}.get(projection, projection)))

    if row.experts.stacked:
        monkeypatch.setattr(stacked_experts, "parts", exchanged)
        monkeypatch.setattr(architectures, "find", lambda *_: row)
    ours, theirs, _ = followed(mixture(name), prose, tmp_path)
    monkeypatch.undo()
    assert float((ours - theirs).norm() / theirs.norm()) > 0.01


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_an_expert_loses_what_its_linears_lose_alone(name, mixture, prose, tmp_path):
    """Each linear quantized alone with the same data."""
    found = list(losses(name, mixture(name), prose, tmp_path))
    assert len(found) == 12
    for linear, walked, alone in found:
        assert 0 < walked <= 1.05 * alone, linear


def test_rare_experts_are_rounded_and_named(mixture, prose, tmp_path):
    """With 120 tokens on four experts some get fewer than 64: they come out as rounding to nearest makes them."""
    found = walk("quantize", "gptq", mixture("mixtral"), tmp_path / "a", prose, group_size=32, experts="routed")
    few = found["experts_with_too_few_tokens"]
    assert few
    assert set(few) <= set(found["rtn_fallback"])
    walk("quantize", "rtn", mixture("mixtral"), tmp_path / "b", prose, group_size=32)
    routed, nearest = Checkpoint(tmp_path / "a" / "model"), Checkpoint(tmp_path / "b" / "model")
    every = [name.removesuffix(".qweight") for name in routed if name.endswith(".qweight") and ".experts." in name]
    same = [name for name in every if torch.equal(routed.read(f"{name}.qweight"), nearest.read(f"{name}.qweight"))]
    assert sorted(same) == sorted(few)


def test_a_killed_walk_over_experts_resumes_to_the_same_bytes(mixture, prose, tmp_path):
    whole = walk("quantize", "gptq", mixture("qwen2_moe"), tmp_path / "a", prose, group_size=32)

    class KilledError(Exception):
        pass

    stage = stages.load("quantize", "gptq")
    for name in ("model", "scratch"):
        (tmp_path / "b" / name).mkdir(parents=True)

    def killed(*_: object) -> None:
        raise KilledError

    job = Job(
        source=mixture("qwen2_moe"), dest=tmp_path / "b" / "model", scratch=tmp_path / "b" / "scratch",
        calibration=Calibration(text=prose, samples=3, length=40), progress=killed,
    )  # fmt: skip
    with pytest.raises(KilledError):
        stage.run(stage.Options(group_size=32), job)
    again = stage.run(stage.Options(group_size=32), replace(job, progress=lambda *_: None))
    assert again == whole
    one, other = (tmp_path / each / "model" / "model.safetensors" for each in "ab")
    assert one.read_bytes() == other.read_bytes()


def test_what_cannot_be_taken_apart_is_refused(mixture):
    facts = read(mixture("mixtral"))
    for verb, method in (("prune", "width"), ("prune", "depth"), ("finetune", "lora")):
        stage = stages.load(verb, method)
        problems = list(stage.check(stage.Options(), facts, targets.find("cpu")))
        assert "mixture-of-experts" in {problem.code for problem in problems}


def test_an_expert_written_in_place_of_another_is_noticed(mixture, prose, tmp_path):
    """What users saw as a file that loads and answers nonsense: every expert is held to its own weights."""
    from optikit.calibration.verify import verify_rounded
    from optikit.calibration.write_checkpoint import grid_layout

    source = mixture("mixtral")
    walk("quantize", "rtn", source, tmp_path, prose, group_size=32)
    written = tmp_path / "model"
    tensors = load_file(written / "model.safetensors")
    one, other = (f"model.layers.0.block_sparse_moe.experts.{n}.w1." for n in (0, 3))
    for suffix in ("qweight", "scales", "qzeros"):
        tensors[one + suffix], tensors[other + suffix] = tensors[other + suffix], tensors[one + suffix]
    save_file(tensors, written / "model.safetensors", {"format": "pt"})
    linears = tuple(name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight"))
    packing = grid_layout("gptq", Grid(bits=4, group_size=32, sym=True), {}).packing
    walked = Walked(entries={}, linears=linears, ignore=lambda _: False)
    with pytest.raises(StageFailedError, match=r"experts\.0\.w1 is off"):
        verify_rounded(source, written, packing, walked)


def test_config_is_kept(mixture, prose, tmp_path):
    walk("quantize", "gptq", mixture("deepseek_v3"), tmp_path, prose, group_size=32)
    before, after = (
        json.loads((each / "config.json").read_text()) for each in (mixture("deepseek_v3"), tmp_path / "model")
    )
    assert after.pop("quantization_config")["quant_method"] == "gptq"
    assert before == after
    shutil.rmtree(tmp_path / "model")


JOINT = {
    "mixtral": "block_sparse_moe.gate", "phimoe": "block_sparse_moe.gate", "qwen2_moe": "mlp.gate",
    "granitemoe": "block_sparse_moe.router.layer", "glm4_moe": "mlp.gate", "gpt_oss": "mlp.router",
    "llama4_text": "feed_forward.router",
}  # fmt: skip


def with_salient_channels(source: Path, directory: Path) -> Path:
    """Write a model whose experts are given four channels that are thirty times larger than the others."""
    shutil.copytree(source, directory)
    tensors = load_file(directory / "model.safetensors")
    for key in tensors:
        if key.endswith("post_attention_layernorm.weight"):
            tensors[key][[3, 17, 30, 55]] *= 32
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    return directory


@pytest.mark.parametrize("name", JOINT)
def test_awq_scales_what_all_experts_read_and_routers_choose_as_before(name, mixture, prose, tmp_path, monkeypatch):
    source = with_salient_channels(mixture(name), tmp_path / "source")
    losses = []
    for joint in (True, False):
        with monkeypatch.context() as patched:
            if not joint:
                patched.setattr(SourceModel, "joint", lambda *_: None)
            place = tmp_path / str(joint)
            found = walk("quantize", "awq", source, place, prose, group_size=32, steps=4)
        if joint:
            census.take(source, place / "model", stages.load("quantize", "awq").CHANGES, found)
            loadable.require(place / "model")
        tensors = dict(dequantized_state(place / "model"))
        losses.append(_lost(source, tensors, place / "model"))
    assert losses[0] < 0.95 * losses[1]
    before, after = Checkpoint(source), Checkpoint(tmp_path / "True" / "model")
    norm = "model.layers.1.post_attention_layernorm.weight"
    by = before.read(norm).float() / after.read(norm).float()
    assert len(by.unique()) > 1
    assert torch.equal(by.log2(), by.log2().round())  # powers of two: nothing is rounded on the way
    router = f"model.layers.1.{JOINT[name]}.weight"
    assert torch.equal(before.read(router).float() * by, after.read(router).float())


def _lost(source: Path, tensors: dict[str, Tensor], written: Path) -> float:
    """Return the squared error of what gate projections of the last block make of what the dense model gives them."""
    dense, row, total = SourceModel(Checkpoint(source)), architectures.find(read(source).model_type), 0.0
    model, *_ = dense_model.load(source, torch.float32, attn_implementation="eager")
    given: list[Tensor] = []
    model.model.layers[1].post_attention_layernorm.register_forward_hook(lambda _, __, out: given.append(out))
    with torch.no_grad():
        model(torch.randint(3, 260, (4, 64), generator=torch.Generator().manual_seed(1)))
    norm = "model.layers.1.post_attention_layernorm.weight"
    columns = Checkpoint(source).read(norm).float() / Checkpoint(written).read(norm).float()
    for expert in range(4):
        name = f"model.layers.1.{row.experts.linear(expert, 0)}.weight"
        off = tensors[name].float() / columns - dense.read(name).float()
        total += float((given[0].flatten(0, 1) @ off.T).square().sum())
    return total


def test_a_router_that_was_not_scaled_is_noticed(mixture, prose, tmp_path, monkeypatch):
    source = with_salient_channels(mixture("mixtral"), tmp_path / "source")
    found = SourceModel.joint

    def forgetful(self, *args):
        read = found(self, *args)
        return read if read is None else replace(read, readers=())

    with monkeypatch.context() as patched:
        patched.setattr(SourceModel, "joint", forgetful)
        walk("quantize", "awq", source, tmp_path / "a", prose, group_size=32, steps=4)
    joint = SourceModel(Checkpoint(source)).joint(1, lambda _: False)
    with pytest.raises(StageFailedError, match=r"gate\.weight isn't scaled as"):
        write_checkpoint._check_readers(joint, SourceModel(Checkpoint(source)), Checkpoint(tmp_path / "a" / "model"))
