"""A cast tells what didn't fit, keeps what it was told to keep, and is what torch makes of each tensor alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from optikit import stages, targets
from optikit.algorithms.cast import cast
from optikit.errors import IntegrityError, StageFailedError
from optikit.models.reader import read
from optikit.stage import Job
from tests.conftest import build_tiny_llama

NORM = "model.layers.1.input_layernorm.weight"


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama in float32, head tied to the embedding."""
    directory = build_tiny_llama(tmp_path_factory.mktemp("wide"), layers=2)
    state = {name: tensor.float() for name, tensor in load_file(directory / "model.safetensors").items()}
    save_file(state, directory / "model.safetensors", {"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    key = "dtype" if "dtype" in config else "torch_dtype"
    (directory / "config.json").write_text(json.dumps({**config, key: "float32"}))
    return directory


def changed(source: Path, place: Path, name: str, values: dict[int, float]) -> Path:
    shutil.copytree(source, place)
    state = load_file(place / "model.safetensors")
    for index, value in values.items():
        state[name].view(-1)[index] = value
    save_file(state, place / "model.safetensors", {"format": "pt"})
    return place


def run(source: Path, place: Path, **options: Any) -> tuple[Path, dict[str, Any]]:
    for name in ("model", "scratch"):
        (place / name).mkdir(parents=True)
    stage = stages.load("quantize", "cast")
    job = Job(source=source, dest=place / "model", scratch=place / "scratch")
    return place / "model", stage.run(stage.Options(**options), job)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_every_tensor_is_what_torch_makes_of_it_and_ties_stay(wide, tmp_path, dtype):
    directory, facts = run(wide, tmp_path, dtype=dtype)
    source, written = (load_file(each / "model.safetensors") for each in (wide, directory))
    assert source.keys() == written.keys()
    assert all(torch.equal(written[name], tensor.to(getattr(torch, dtype))) for name, tensor in source.items())
    config, before = (json.loads((each / "config.json").read_text()) for each in (directory, wide))
    assert {key for key in config if config[key] != before.get(key)} == {
        "dtype" if "dtype" in before else "torch_dtype"
    }
    assert read(directory).tied == read(wide).tied
    assert facts["tensors_cast"] == len(source)
    assert facts["overflowed"] == 0
    assert (directory / "model.safetensors").stat().st_size < 0.51 * (wide / "model.safetensors").stat().st_size


def test_what_is_too_large_fails_by_name_or_saturates_as_asked(wide, tmp_path):
    source = changed(wide, tmp_path / "source", NORM, {0: 70000.0, 1: -1e30, 2: 65504.0, 3: 65519.9})
    with pytest.raises(StageFailedError, match=rf"{NORM} holds 2 values too large for float16, up to 1e\+30"):
        run(source, tmp_path / "refused", dtype="float16")
    directory, facts = run(source, tmp_path / "saturated", dtype="float16", overflow="saturate")
    written = load_file(directory / "model.safetensors")[NORM]
    assert written[:4].tolist() == [65504.0, -65504.0, 65504.0, 65504.0]
    assert facts["overflowed"] == 2
    assert facts["most_overflowed"] == {"tensor": NORM, "values": 2}
    _, plain = run(source, tmp_path / "bfloat16")
    assert plain["overflowed"] == 0


def test_what_becomes_zero_is_counted_and_its_tensor_named(wide, tmp_path):
    source = changed(wide, tmp_path / "source", NORM, {0: 1e-8, 1: -2e-8, 2: 0.0, 3: 1e-5})
    _, facts = run(source, tmp_path / "out", dtype="float16")
    assert facts["vanished"] >= 2
    name = facts["most_vanished"]["tensor"]
    tensor = load_file(source / "model.safetensors")[name]
    assert facts["most_vanished"]["values"] == int(((tensor.half() == 0) & (tensor != 0)).sum())


def test_what_is_kept_keeps_its_bytes_and_a_pattern_of_nothing_is_told(wide, tmp_path):
    directory, _ = run(wide, tmp_path / "out", keep=["*layernorm.weight", "*.embed_tokens.*"])
    source, written = (load_file(each / "model.safetensors") for each in (wide, directory))
    kept = {name for name in source if written[name].dtype == torch.float32}
    assert kept == {name for name in source if name.endswith("layernorm.weight") or "embed_tokens" in name}
    with pytest.raises(StageFailedError, match=r"keep 'no\.such' matches no tensor"):
        run(wide, tmp_path / "nothing", keep=["no.such"])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_number_is_named(wide, tmp_path, value):
    source = changed(wide, tmp_path / "source", NORM, {5: value})
    with pytest.raises(IntegrityError, match=NORM):
        run(source, tmp_path / "out")


def test_nothing_to_do_is_told_while_planning(wide):
    stage, target, facts = stages.load("quantize", "cast"), targets.find("cpu"), read(wide)
    assert target is not None
    assert not list(stage.check(stage.Options(), facts, target))
    done = stage.after(stage.Options(), facts)
    assert (done.dtype, done.traits) == ("BF16", facts.traits)
    assert [each.level for each in stage.check(stage.Options(), done, target)] == ["warning"]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), max_size=20))
def test_values_are_rounded_counted_and_always_finite(values):
    tensor = torch.tensor(values, dtype=torch.float32)
    for dtype in (torch.float16, torch.bfloat16):
        done = cast(tensor, dtype)
        plain = tensor.to(dtype)
        assert bool(torch.isfinite(done.values).all())
        assert torch.equal(done.values[torch.isfinite(plain)], plain[torch.isfinite(plain)])
        assert done.overflowed == int(torch.isinf(plain).sum())
        assert done.vanished == sum(v != 0 and p == 0 for v, p in zip(values, plain.tolist(), strict=True))
