"""The OpenVINO stage: what is refused, and, where its environment can be built, what the real exporter writes."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import asdict, replace

import numpy as np
import pytest

from optikit import runtime, targets
from optikit.errors import StageFailedError
from optikit.models.reader import read
from optikit.stage import Calibration
from optikit.stages.compile import _openvino_build, _openvino_options, openvino
from optikit.stages.compile._openvino_options import Options
from optikit.targets import Target

CPU = Target(name="cpu", device="cpu", engines=("openvino",))
PYTHON = "OPTIKIT_TEST_OPENVINO_PYTHON"
"""An interpreter with the packages of locks/openvino.txt; without it, the managed environment is used."""


@pytest.fixture(scope="module")
def facts(tiny_llama):
    return read(tiny_llama)


def codes(facts, target=CPU, **options):
    return [problem.code for problem in openvino.check(Options(**options), facts, target)]


def test_what_works_has_no_problems(facts):
    assert codes(facts) == codes(facts, weight_format="int4", awq=True, scale_estimation=True) == []
    assert codes(facts, targets.find("cpu")) == []


def test_what_cannot_be(facts):
    assert codes(facts, Target(name="l4", device="cuda", engines=("vllm",))) == ["engine-not-on-target"]
    assert codes(replace(facts, model_type="opt")) == ["unknown-architecture"]
    assert codes(replace(facts, config={"rope_parameters": {"rope_type": "yarn"}})) == []
    assert codes(replace(facts, config={"rope_parameters": {"rope_type": "proportional"}})) == ["unknown-rope"]
    assert codes(facts, awq=True) == ["only-for-int4"]
    assert codes(facts, weight_format="float", scale_estimation=True) == ["only-for-int4"]


def test_only_fitted_weights_need_calibration_text():
    assert not _openvino_options.calibrated(Options(weight_format="int4"))
    assert _openvino_options.calibrated(Options(weight_format="int4", awq=True))
    assert _openvino_options.calibrated(Options(weight_format="int4", scale_estimation=True))


def test_groups_divide_every_width(facts):
    assert _openvino_options.group(Options(), facts) == 64
    assert _openvino_options.group(Options(group_size=32), facts) == 32
    odd = replace(facts, linears=dict.fromkeys(facts.linears, (64, 96)))
    assert _openvino_options.group(Options(), odd) == 32
    assert _openvino_options.group(Options(), replace(facts, linears=dict.fromkeys(facts.linears, (64, 100)))) == -1


def test_smaller_formats_are_estimated_smaller(facts):
    sizes = [openvino.after(Options(weight_format=name), facts).weight_bytes for name in ("float", "int8", "int4")]
    assert sizes == sorted(sizes, reverse=True)
    assert "dense" not in openvino.after(Options(), facts).traits


def test_passages_are_as_many_as_asked_for_and_differ(tmp_path):
    path = tmp_path / "text"
    path.write_text("".join(f"{number} " for number in range(2000)), encoding="utf-8")
    found = _openvino_build.passages(Calibration(text=path, samples=7, length=16))
    assert len(found) == len(set(found)) == 7
    assert {len(text) for text in found} == {64}
    with pytest.raises(StageFailedError, match="characters"):
        _openvino_build.passages(Calibration(text=path, samples=1, length=100_000))


@pytest.fixture(scope="module")
def interpreter(tmp_path_factory):
    """Return the environment's interpreter and the variables it wants."""
    from optikit import environments
    from optikit.store.store import Store

    given = os.environ.get(PYTHON)
    if given:
        root = str(runtime.__file__).rpartition("/optikit/")[0]
        return given, os.environ | {"PYTHONPATH": root}
    environment = environments.ensure("openvino", Store.default())
    return str(environment.python), environment.variables(os.environ, tmp_path_factory.mktemp("job"))


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.parametrize(
    ("options", "dtype", "apart"),
    [
        ({"weight_format": "float"}, "bfloat16", 0.05),
        ({"weight_format": "int8"}, "int8", 0.1),
        ({"weight_format": "int4", "group_size": 32, "awq": True, "scale_estimation": True}, "int4", 0.5),
    ],
)
def test_the_real_exporter_writes_what_decodes_alike(tiny_llama, prose, tmp_path, interpreter, options, dtype, apart):
    pytest.importorskip("openvino")
    python, variables = interpreter
    job = tmp_path / "job"
    for directory in (job, tmp_path / "ir", tmp_path / "scratch"):
        directory.mkdir()
    request = {
        "verb": "compile",
        "method": "openvino",
        "options": options,
        "source": str(tiny_llama),
        "dest": str(tmp_path / "ir"),
        "scratch": str(tmp_path / "scratch"),
        "inputs": {},
        "calibration": {"text": str(prose), "samples": 4, "length": 32},
        "seed": 0,
        "device": "cpu",
        "threads": 1,
        "max_memory_bytes": None,
        "target": asdict(targets.rows()["cpu"]),
    }
    (job / "request.json").write_text(json.dumps(request))
    done = subprocess.run(
        [python, "-m", "optikit.execution.worker", job], env=variables, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads((job / "response.json").read_text())["facts"]
    assert len(told["trial"]["text"]) > 0
    assert told["logits_compared"] == 256
    print(options, told["logits_apart"])
    assert told["logits_apart"] < apart
    decoder = runtime.load(tmp_path / "ir", threads=1)
    assert (decoder.runtime, decoder.dtype) == ("openvino", dtype)
    reference = runtime.load(tiny_llama, dtype="float32", threads=1)
    tokens = np.random.default_rng(0).integers(3, 259, 40)
    ours, theirs = decoder.forward(tokens, 0), reference.forward(tokens, 0)
    assert np.linalg.norm(ours - theirs) < apart * np.linalg.norm(theirs)
    back = decoder.forward(tokens[10:], 10)
    assert np.linalg.norm(back - theirs[10:]) < 1.2 * apart * np.linalg.norm(theirs[10:])
