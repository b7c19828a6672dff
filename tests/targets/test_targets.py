"""Rows of targets: sourced, consistent, extended by a user's file, refused with file and name when wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from optikit import host, targets
from optikit.errors import InputMissingError, RecipeError
from optikit.targets.target import load, rows

BUILT_IN = rows()


@pytest.fixture(autouse=True)
def no_calibration(tmp_path, monkeypatch):
    monkeypatch.setenv("OPTIKIT_HOME", str(tmp_path / "home"))


@pytest.mark.parametrize(
    "name",
    [
        *("cpu", "t4", "a10g", "l4", "l40s", "a100-40", "a100-80", "h100", "h200", "b200"),
        *("ml.g5.12xlarge", "ml.g6.xlarge", "ml.g6e.48xlarge", "ml.p4d.24xlarge", "ml.p4de.24xlarge"),
        *("ml.p5.48xlarge", "p5.48xlarge", "ml.p5en.48xlarge", "inf2.xlarge", "inf2.48xlarge", "trn1.2xlarge"),
        *("trn1.32xlarge", "trn2.48xlarge", "trn3"),
    ],
)
def test_promised_rows_are_there(name):
    assert targets.find(name).name == name


@pytest.mark.parametrize("target", BUILT_IN.values(), ids=list(BUILT_IN))
def test_every_figure_has_its_source(target):
    assert target.source or target.name == "cpu"
    assert bool(target.price_source) == (target.usd_per_hour is not None)
    if target.price_source:
        assert "read 20" in target.price_source
    assert target.engines


@pytest.mark.parametrize("target", BUILT_IN.values(), ids=list(BUILT_IN))
def test_figures_are_of_the_right_size(target):
    """A slip of units would show: gigabytes for bytes, sparse for dense."""
    if target.device == "cpu":
        return
    assert 8 <= target.memory_gib <= 300
    assert 200 <= target.bandwidth_gb_s <= 10_000
    rate = target.bf16_tflops or target.fp16_tflops
    assert 50 <= rate <= 3000
    if target.int8_tops is not None:
        assert 1.9 <= target.int8_tops / rate <= 2.1
    if target.usd_per_hour is not None:
        assert 0.1 <= target.usd_per_hour / target.count <= 20


def test_neuron_degrees_are_those_of_the_feature_guide():
    assert rows()["inf2.48xlarge"].tensor_parallel == (1, 2, 4, 8, 24)
    assert rows()["trn1.32xlarge"].tensor_parallel == (1, 2, 8, 16, 32)
    assert rows()["trn2.48xlarge"].tensor_parallel == (1, 2, 4, 8, 16, 32, 64)


@pytest.mark.parametrize("target", [t for t in BUILT_IN.values() if t.device == "neuron"], ids=lambda t: t.name)
def test_core_memory_adds_up_to_the_chips(target):
    """16 GB for each of an Inferentia2's two cores, 24 GB for each of a Trainium2's four: the chip's memory."""
    if target.core_memory_gb is not None:
        assert target.core_memory_gb * target.cores == target.memory_gib * target.count


def test_instances_have_as_much_as_their_accelerators():
    twelve = rows()["ml.g5.12xlarge"]
    assert (twelve.count, twelve.accelerator, twelve.compute_capability) == (4, "A10G", 86)
    assert twelve.memory_bytes == int(4 * 22.35 * 2**30)
    assert twelve.usd_per_hour == 7.09


def test_price_is_not_inherited():
    assert rows()["ml.p5.48xlarge"].usd_per_hour is None
    assert rows()["p5.48xlarge"].usd_per_hour == 55.04


def test_cpu_is_this_machine():
    cpu = targets.find("cpu")
    assert cpu.memory_gib == host.memory_bytes() / 2**30
    assert cpu.accelerator == host.cpu_model()
    assert cpu.bandwidth_gb_s is None


def test_unknown_name_is_none():
    assert targets.find("g7.xlarge") is None


def test_rows_of_the_user(tmp_path: Path):
    extra = tmp_path / "my.toml"
    extra.write_text(
        '[my-box]\nlike = "l4"\ncount = 2\nusd_per_hour = 0.5\nprice_source = "invoice 2026-11"\n'
        '[other]\nlike = "my-box"\naccelerator = "L4 mobile"\nbandwidth_gb_s = 200\n'
    )
    box, other = targets.find("my-box", extra), targets.find("other", extra)
    assert (box.count, box.compute_capability, box.usd_per_hour) == (2, 89, 0.5)
    assert (other.count, other.accelerator, other.bandwidth_gb_s, other.usd_per_hour) == (2, "L4 mobile", 200, None)
    assert targets.find("l4", extra) == rows()["l4"]
    assert targets.names(extra)[-2:] == ("my-box", "other")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[box\n", "can't be read"),
        ("box = 3\n", "target 'box' is 3, not a table"),
        ("[box]\n[box]\n", "can't be read"),
        ('[l4]\ndevice = "cuda"\n', "target 'l4' is a row of optikit's own"),
        ('[box]\ndevice = "gpu"\n', "target 'box' has device 'gpu'"),
        ("[box]\ncount = 2\n", "target 'box' has device None"),
        ('[box]\ndevice = "cuda"\n', "target 'box' lacks memory_gib, which a cuda target needs"),
        ('[box]\ndevice = "neuron"\nmemory_gib = 32\n', "target 'box' lacks cores"),
        ('[box]\ndevice = "cpu"\ncompute_capability = 80\n', "has compute_capability, but its device is cpu"),
        ('[box]\ndevice = "cpu"\nmemory_gib = -1\n', "target 'box' has memory_gib = -1"),
        ('[box]\ndevice = "cpu"\nmemory_gib = "8"\n', "has memory_gib = '8', of the wrong type"),
        ('[box]\ndevice = "cpu"\ncount = true\n', "has count = True, of the wrong type"),
        ('[box]\ndevice = "cpu"\nmemroy_gib = 8\n', "has unknown field 'memroy_gib'"),
        ('[box]\ndevice = "cpu"\nusd_per_hour = 1\n', "has a price without price_source"),
        ('[box]\nlike = "l5"\n', "target 'box' is like 'l5', which isn't there"),
        ('[box]\nlike = "box"\n', "target 'box' is like itself"),
        ('[a]\nlike = "b"\n[b]\nlike = "a"\n', "is like itself"),
        ('[box]\nlike = "inf2.xlarge"\ntensor_parallel = [4]\n', "allows tensor_parallel above its 2 cores"),
    ],
)
def test_bad_rows_are_refused_with_file_and_name(tmp_path, text, message):
    extra = tmp_path / "my.toml"
    extra.write_text(text)
    with pytest.raises(RecipeError) as caught:
        rows(extra)
    assert str(extra) in caught.value.message
    assert message in caught.value.message
    assert caught.value.fix


def test_misspelt_field_is_guessed():
    with pytest.raises(RecipeError) as caught:
        load('[box]\ndevice = "cpu"\nmemroy_gib = 8\n', "f")
    assert caught.value.fix == "did you mean 'memory_gib'?"


def test_missing_file(tmp_path):
    with pytest.raises(InputMissingError, match="no targets file"):
        rows(tmp_path / "none.toml")


def test_binary_file(tmp_path):
    extra = tmp_path / "my.toml"
    extra.write_bytes(b"\xff\xfe")
    with pytest.raises(RecipeError, match="can't be read"):
        rows(extra)
