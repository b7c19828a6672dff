"""A model read block by block has the logits and the quality of the whole model, whatever its family and packing."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from optikit import host, stages
from optikit.calibration.empty_model import EmptyModel
from optikit.errors import IntegrityError
from optikit.evaluation import streamed
from optikit.evaluation.scoring import Scores, Window, cached, score
from optikit.evaluation.streamed import Streamed
from optikit.runtime.decoders.transformers import TorchDecoder
from optikit.stage import Calibration, Job
from optikit.stages.measure import quality
from tests.stages.test_walk_families import FAMILIES, family  # noqa: F401 - a fixture

LENGTHS = ((40, 39), (40, 20), (40, 39), (57, 8), (3, 2))
"""Tokens of every window, and how many of them are scored."""


@pytest.fixture(scope="module")
def windows() -> list[Window]:
    draw = np.random.default_rng(0)
    return [Window(draw.integers(0, 256, length), scored) for length, scored in LENGTHS]


def whole(directory: Path, windows: list[Window], dtype: str = "float32") -> tuple[Scores, list[np.ndarray[Any, Any]]]:
    decoder = TorchDecoder(directory, dtype=dtype, threads=1)
    read = cached(decoder, windows)
    return score(read, windows), [np.concatenate(list(read(index))) for index in range(len(windows))]


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


@pytest.mark.parametrize("family", FAMILIES, indirect=True)
def test_every_family_has_the_logits_of_the_whole_model(family: Path, windows: list[Window], tmp_path: Path) -> None:  # noqa: F811
    require_equal(family, windows, tmp_path / "scratch", 1e-5)


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
    monkeypatch.setattr("optikit.formats.rounds_activations", lambda _: frozenset())
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
    filled: list[int] = []
    fill = EmptyModel.fill_block
    monkeypatch.setattr(EmptyModel, "fill_block", lambda self, index: filled.append(index) or fill(self, index))

    def kill(*_: object) -> None:
        raise KilledError

    def run(progress: Any = lambda *_: None, said: Any = lambda _: None) -> Scores:
        model = Streamed(tiny_llama, dtype="float32", threads=1)
        with model.reading(windows, tmp_path / "scratch", progress=progress, note=said) as read:
            return score(read, windows)

    with pytest.raises(KilledError):
        run(kill)
    assert np.array_equal(run().nll, wanted.nll, equal_nan=True)
    assert filled == [0, 1]
    kept = next((tmp_path / "scratch").glob("hidden-*.bin"))
    kept.write_bytes(bytes(kept.stat().st_size))
    assert np.array_equal(run().nll, wanted.nll, equal_nan=True)
    assert filled == [0, 1, 0, 1]


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
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from optikit.models.reader import read

    facts, options = read(tiny_llama), quality.Options.model_validate(OPTIONS)
    need = quality.estimate(options, facts, None, 0).peak_bytes
    monkeypatch.setattr(host, "room_bytes", lambda bound=None: need if bound is None else min(need, bound))
    assert not quality.streams(options, facts, None)
    assert quality.streams(options, facts, need - 1)
    compiled = quality.Options.model_validate(OPTIONS | {"runtime": "onnxruntime", "dtype": "auto"})
    assert not quality.streams(compiled, facts, 1)
    assert quality.estimate(compiled, facts, None, 0).streamed is None
