"""A model read block by block has the logits and the quality of the whole model, whatever its family and packing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from optikit import host, stages, targets
from optikit.errors import IntegrityError
from optikit.evaluation import streamed
from optikit.evaluation.scoring import Scores, Window, cached, score
from optikit.evaluation.streamed import Streamed
from optikit.models.reader import read
from optikit.runtime.decoders.transformers import TorchDecoder, load_model
from optikit.stage import Calibration, Job
from optikit.stages.measure import _streaming, quality, tasks
from tests.families import CONFIGS, save
from tests.shapes import llama2_70b

CPU = targets.find("cpu")
assert CPU is not None
LENGTHS = ((40, 39), (40, 20), (40, 39), (57, 8), (3, 2))
"""Tokens of every window, and how many of them are scored."""


@pytest.fixture(scope="module")
def windows() -> list[Window]:
    draw = np.random.default_rng(0)
    return [Window(draw.integers(0, 256, length), scored) for length, scored in LENGTHS]


def whole(directory: Path, windows: list[Window], dtype: str = "float32") -> tuple[Scores, list[np.ndarray[Any, Any]]]:
    """Return what transformers' own forward of each window finds."""
    model = load_model(directory, dtype)
    found = []
    for window in windows:
        with torch.inference_mode():
            logits = model(torch.from_numpy(window.tokens[:-1])[None], use_cache=False).logits[0]
        found.append(logits[len(logits) - window.scored :].float().numpy())
    return score(lambda index: iter([found[index]]), windows), found


def by_block(
    directory: Path, windows: list[Window], scratch: Path, dtype: str = "float32"
) -> tuple[Scores, list[np.ndarray[Any, Any]]]:
    with Streamed(directory, dtype=dtype, threads=1).reading(windows, scratch) as read:
        return score(read, windows), [np.concatenate(list(read(index))) for index in range(len(windows))]


def require_equal(directory: Path, windows: list[Window], scratch: Path, tolerance: float = 1e-4) -> None:
    (wanted, wanted_logits), (found, found_logits) = whole(directory, windows), by_block(directory, windows, scratch)
    for one, other in zip(wanted_logits, found_logits, strict=True):
        np.testing.assert_allclose(other, one, atol=tolerance * np.abs(one).max(), rtol=0)
    np.testing.assert_allclose(found.nll, wanted.nll, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("family", CONFIGS)
def test_every_family_has_the_logits_of_the_whole_model(family: str, windows: list[Window], tmp_path: Path) -> None:
    require_equal(save(family, tmp_path / "model"), windows, tmp_path / "scratch", 1e-5)


def test_a_decoder_finds_the_same(tiny_llama: Path, windows: list[Window], tmp_path: Path) -> None:
    read = cached(TorchDecoder(tiny_llama, dtype="float32", threads=1), windows)
    found = score(read, windows)
    np.testing.assert_allclose(by_block(tiny_llama, windows, tmp_path)[0].nll, found.nll, rtol=1e-5)


PACKED = {
    "gptq": ("gptq", {"group_size": 32}),
    "awq": ("awq", {"group_size": 32, "steps": 2}),
    "w8a16": ("int8", {"scheme": "w8a16", "group_size": 32}),
    "w8a8": ("int8", {"scheme": "w8a8"}),
    "llm_int8": ("int8", {"scheme": "llm_int8"}),
    "nf4": ("nf4", {}),
}


@pytest.mark.parametrize("name", PACKED)
def test_every_packing_is_unpacked_block_by_block(
    name: str, tiny_llama: Path, prose: Path, windows: list[Window], tmp_path: Path
) -> None:
    method, options = PACKED[name]
    stage = stages.load("quantize", method)
    (tmp_path / "model").mkdir()
    calibration = Calibration(text=prose, samples=4, length=32)
    places = {"source": tiny_llama, "dest": tmp_path / "model", "scratch": tmp_path / "walk"}
    stage.run(stage.Options.model_validate(options), Job(**places, calibration=calibration))
    # Rounded activations part where sums of another order end just beside a half.
    require_equal(tmp_path / "model", windows, tmp_path / "scratch", 2e-2 if name == "w8a8" else 1e-5)


def test_without_its_rounding_w8a8_would_differ(
    tiny_llama: Path, prose: Path, windows: list[Window], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = stages.load("quantize", "int8")
    (tmp_path / "model").mkdir()
    places = {"source": tiny_llama, "dest": tmp_path / "model", "scratch": tmp_path / "walk"}
    calibration = Calibration(text=prose, samples=4, length=32)
    stage.run(stage.Options.model_validate({"scheme": "w8a8"}), Job(**places, calibration=calibration))
    wanted, _ = whole(tmp_path / "model", windows)
    found, _ = by_block(tmp_path / "model", windows, tmp_path / "one")
    monkeypatch.setattr("optikit.formats.activations.of", lambda _: {})
    without, _ = by_block(tmp_path / "model", windows, tmp_path / "two")
    near, far = (np.nanmean(np.abs(each.nll - wanted.nll)) for each in (found, without))
    assert near < far / 10


def test_windows_of_many_lengths_are_padded_and_read_the_same(
    tiny_llama: Path, windows: list[Window], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streamed, "MOST_LENGTHS", 1)
    monkeypatch.setattr(streamed, "GRANULARITY", 24)
    require_equal(tiny_llama, windows, tmp_path / "scratch", 1e-5)


def test_bfloat16_is_computed_as_such(tiny_llama: Path, windows: list[Window], tmp_path: Path) -> None:
    exact, _ = whole(tiny_llama, windows)
    wanted, found = (
        whole(tiny_llama, windows, "bfloat16")[0],
        by_block(tiny_llama, windows, tmp_path, "bfloat16")[0],
    )
    assert np.nanmax(np.abs(found.nll - exact.nll)) < 5 * np.nanmax(np.abs(wanted.nll - exact.nll)) + 1e-3


class KilledError(Exception):
    pass


def test_a_killed_pass_goes_on_where_it_was(
    tiny_llama: Path, windows: list[Window], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted, _ = by_block(tiny_llama, windows, tmp_path / "uninterrupted")
    passed: list[int] = []
    through = streamed._Passes._through
    monkeypatch.setattr(
        streamed._Passes, "_through", lambda self, index, state: passed.append(index) or through(self, index, state)
    )

    def kill(*_: object) -> None:
        raise KilledError

    def run(progress: Any = lambda *_: None, said: Any = lambda _: None) -> Scores:
        model = Streamed(tiny_llama, dtype="float32", threads=1)
        with model.reading(windows, tmp_path / "scratch", progress=progress, note=said) as read:
            return score(read, windows)

    with pytest.raises(KilledError):
        run(kill)
    assert np.array_equal(run().nll, wanted.nll, equal_nan=True)
    assert passed == [0, 1]
    kept = next((tmp_path / "scratch").glob("hidden-*.bin"))
    kept.write_bytes(bytes(kept.stat().st_size))
    assert np.array_equal(run().nll, wanted.nll, equal_nan=True)
    assert passed == [0, 1, 0, 1]


def test_a_weight_that_is_not_finite_is_named(tiny_llama: Path, windows: list[Window], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(tiny_llama, tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][0, 0] = torch.nan
    save_file(weights, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(IntegrityError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        by_block(tmp_path / "model", windows, tmp_path / "scratch")


OPTIONS = {"runtime": "transformers", "dtype": "float32", "window": 48, "windows": 9}


def measured(
    dest: Path, source: Path, prose: Path, bound: int | None, baseline: Path | None, notes: list[str]
) -> dict[str, Any]:
    dest.mkdir()
    inputs = {"text": prose, "tokenizer": source} | ({"baseline": baseline} if baseline else {})
    job = Job(
        source=source,
        dest=dest,
        scratch=dest.with_name(f"{dest.name}-scratch"),
        inputs=inputs,
        threads=1,
        max_memory_bytes=bound,
        note=notes.append,
    )
    return quality.run(quality.Options.model_validate(OPTIONS | {"keep_logits": baseline is None}), job)


def test_the_step_streams_what_does_not_fit_and_finds_the_same(tiny_llama: Path, prose: Path, tmp_path: Path) -> None:
    notes: list[str] = []
    one = measured(tmp_path / "whole", tiny_llama, prose, None, None, notes)
    assert notes == []
    other = measured(tmp_path / "streamed", tiny_llama, prose, 2**20, None, notes)
    assert "block by block" in notes.pop()
    assert other["perplexity"]["value"] == pytest.approx(one["perplexity"]["value"], rel=1e-6)
    assert {**other["about"]} == {**one["about"]}
    compared = measured(tmp_path / "compared", tiny_llama, prose, 2**20, tmp_path / "whole", notes)
    assert compared["kl_divergence"]["max"] < 1e-5
    assert compared["top1_agreement"] == 1.0


def test_what_fits_is_not_streamed_and_compiled_models_never_are(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts, options = read(tiny_llama), quality.Options.model_validate(OPTIONS)
    expected = quality.estimate(options, facts, CPU, 0)
    job = Job(source=tiny_llama, dest=tmp_path, scratch=tmp_path)
    loaded: dict[str, Any] = {"runtime": "transformers", "dtype": "float32", "max_tokens": 48}
    for room, kind in ((expected.peak_bytes, TorchDecoder), (expected.peak_bytes - 1, Streamed)):
        monkeypatch.setattr(host, "room_bytes", lambda _, room=room: room)
        assert isinstance(_streaming.opened(job, lambda _: expected, **loaded), kind)
    compiled = quality.Options.model_validate(OPTIONS | {"runtime": "onnxruntime", "dtype": "auto"})
    assert quality.estimate(compiled, facts, CPU, 0).streamed is None


def test_the_memory_of_70_b_is_a_block_and_not_the_model() -> None:
    facts = llama2_70b()
    whole = quality.estimate(quality.Options.model_validate(OPTIONS), facts, CPU, 0)
    assert whole.streamed is not None
    assert whole.peak_bytes > 256 * 2**30
    assert whole.streamed.peak_bytes < 8 * 2**30
    assert whole.streamed.scratch_bytes == 2 * 4 * 48 * 9 * facts.hidden


CHOICES = [
    {"prompt": "The old stone", "choices": ["house", "river and the light", "x"], "answer": 1},
    {"prompt": "", "choices": ["near", "a cold"], "answer": 0},
    {"prompt": "Water faces a bright ", "choices": ["window", "green"], "answer": 0},
]


def asked(
    place: Path, source: Path, bound: int | None, notes: list[str]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    for name in ("dest", "scratch"):
        (place / name).mkdir(parents=True)
    (place / "t.jsonl").write_text("".join(f"{json.dumps(item)}\n" for item in CHOICES))
    options = tasks.Options.model_validate({"dtype": "float32", "tasks": [{"name": "t", "items": 3, "written": False}]})
    inputs = {"task:t": place / "t.jsonl", "tokenizer": source}
    places = {"source": source, "dest": place / "dest", "scratch": place / "scratch"}
    facts = tasks.run(options, Job(**places, inputs=inputs, threads=1, max_memory_bytes=bound, note=notes.append))
    return facts, tasks.read_items(place / "dest")["t"]


def test_choices_are_scored_block_by_block_as_by_the_whole_model(tiny_llama: Path, tmp_path: Path) -> None:
    notes: list[str] = []
    one, wanted = asked(tmp_path / "whole", tiny_llama, None, notes)
    assert notes == []
    other, found = asked(tmp_path / "streamed", tiny_llama, 2**20, notes)
    assert "block by block" in notes.pop()
    assert other["tasks"] == one["tasks"]
    for a, b in zip(wanted, found, strict=True):
        np.testing.assert_allclose(b.pop("loglikelihoods"), a.pop("loglikelihoods"), rtol=1e-5)
        assert a == b


@pytest.mark.parametrize(("written", "streams"), [(True, False), (False, True)])
def test_only_tasks_of_choices_are_streamed(tiny_llama: Path, written: bool, streams: bool) -> None:
    options = tasks.Options.model_validate({"tasks": [{"name": "t", "written": written}]})
    assert (tasks.estimate(options, read(tiny_llama), CPU, 0).streamed is not None) is streams
