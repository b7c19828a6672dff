"""What every stage that writes a model directory promises, held to it by one row each.

A row is a verb, a method, options, and what of the directory differs from the dense one. From it follow, for every
stage: a complete card, described and frozen options, a pure check, a run on a tiny model whose result is what `after`
said, the same bytes for the same seed, and the same bytes after being killed half-way.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from optikit import stages, targets
from optikit.described import docstrings
from optikit.models.facts import ModelFacts
from optikit.models.reader import read
from optikit.stage import Calibration, Job, Stage

SAMPLES, LENGTH = 6, 48
WRITTEN_BY_PLAN = {"sparse_unstructured", "sparse_2_4", "sparse_4_8", "narrowed", "shortened", "finetuned"}
"""Traits that a directory doesn't show: the plan carries them."""
LOGS = {"training.jsonl", "heads.start", "hf_quant_config.json"}
"""What a training leaves beside the model, and what ModelOpt keeps there."""


TRAINING = {"tokens": 4 * 2 * LENGTH, "batch": 2, "learning_rate": 0.01}
"""Four steps of two windows."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One stage with options that a tiny Llama (hidden 64, intermediate 128, 4 layers) can take."""

    verb: str
    method: str
    options: dict[str, Any] = field(default_factory=dict)
    variant: str = ""
    backend: str = stages.OURS

    @property
    def name(self) -> str:
        backend = "" if self.backend == stages.OURS else self.backend
        return "-".join(filter(None, (self.verb, self.method, self.variant, backend)))

    @property
    def stage(self) -> Stage:
        return stages.load(self.verb, self.method, self.backend)


PACKED = {"format": "pack-quantized", "ignore": ["*.1.mlp.*"]}
NARROW = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"]
"""Linears of the tiny model whose inputs are fewer than a block of FP8."""
ROWS = (
    Row(verb="prune", method="magnitude"),
    Row(verb="prune", method="magnitude", options={"pattern": "4:8"}, variant="4:8"),
    Row(verb="prune", method="wanda", options={"sparsity": 0.6}),
    Row(verb="prune", method="sparsegpt", options={"pattern": "2:4"}),
    Row(verb="prune", method="depth", options={"ratio": 0.25}),
    Row(verb="prune", method="width", options={"multiple": 32, "heads": 0.5}),
    Row(verb="finetune", method="full", options=TRAINING),
    Row(verb="finetune", method="distill", options=TRAINING),
    Row(verb="finetune", method="lora", options={**TRAINING, "rank": 4}),
    Row(verb="finetune", method="medusa2", options={**TRAINING, "rank": 4, "heads": 2}),
    Row(verb="quantize", method="rtn", options={"group_size": 32}),
    Row(verb="quantize", method="gptq", options={"group_size": 32}),
    Row(verb="quantize", method="awq", options={"group_size": 32, "steps": 4}),
    Row(verb="quantize", method="awq", options={"rounding": "gptq", "ignore": ["*.1.*"], "steps": 4}, variant="gptq"),
    Row(verb="quantize", method="int8", options={"group_size": 32}),
    Row(verb="quantize", method="int8", options={"scheme": "w8a8"}, variant="w8a8"),
    Row(verb="quantize", method="int8", options={"scheme": "llm_int8"}, variant="llm-int8"),
    Row(verb="quantize", method="rtn", options={"group_size": -1, "bits": 8, **PACKED}, variant="packed8"),
    Row(verb="quantize", method="gptq", options={"group_size": 32, "sym": False, **PACKED}, variant="packed"),
    Row(verb="quantize", method="awq", options={"group_size": 32, "steps": 4, **PACKED}, variant="packed"),
    Row(verb="quantize", method="cast", options={"dtype": "float16", "keep": ["norm.weight"]}),
    Row(verb="quantize", method="nf4"),
    Row(verb="quantize", method="fp4", options={"ignore": ["*.1.mlp.*"]}, variant="nvfp4"),
    Row(verb="quantize", method="fp4", options={"scheme": "mxfp4", "mse": False}, variant="mxfp4"),
    Row(verb="quantize", method="fp8", options={"ignore": ["*.1.mlp.*"]}, variant="dynamic"),
    Row(verb="quantize", method="fp8", options={"mse": True, "scale_max": 240, "kv_cache": True}, variant="cache"),
    Row(verb="quantize", method="fp8", options={"scheme": "static"}, variant="static"),
    Row(verb="quantize", method="fp8", options={"scheme": "block", "ignore": NARROW}, variant="block"),
    Row(verb="quantize", method="fp8", options={"scheme": "static", "kv_cache": True}, variant="static-cache"),
)
"""Speculation and compilation write other things than a changed checkpoint; their tests are their own."""

FOREIGN = (
    Row(verb="quantize", method="awq", options={"group_size": 32, "clip": False}, backend="autoawq"),
    Row(verb="quantize", method="gptq", options={"group_size": 32}, backend="llm-compressor"),
    Row(verb="quantize", method="gptq", options={"group_size": 32}, backend="gptqmodel"),
)
"""Libraries run in environments of their own: tests/stages/backends runs them, here they are held to all that planning
asks for."""

each_row = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
each_planned_row = pytest.mark.parametrize("row", [*ROWS, *FOREIGN], ids=lambda row: row.name)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.conftest import build_tiny_llama

    return build_tiny_llama(tmp_path_factory.mktemp("source"), layers=4)


@pytest.fixture(scope="module")
def facts(source: Path) -> ModelFacts:
    return read(source)


def perform(row: Row, source: Path, prose: Path, directory: Path, **changes: Any) -> dict[str, Any]:
    """Run a stage in this process; return its facts."""
    for name in ("model", "scratch"):
        (directory / name).mkdir(parents=True, exist_ok=True)
    calibration = (
        Calibration(text=prose, samples=SAMPLES, length=LENGTH)
        if "calibration" in row.stage.inputs(row.stage.Options(**row.options))
        else None
    )
    places = {"source": source, "dest": directory / "model", "scratch": directory / "scratch"}
    job = Job(**places, inputs={"teacher": source}, calibration=calibration, **changes)
    return row.stage.run(row.stage.Options(**row.options), job)


def digests(directory: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(directory.iterdir())}


@pytest.fixture(scope="module")
def results(source: Path, prose: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Any]]:
    """The model directory that every row writes, and the facts it returns: made once, looked at by many tests."""
    made = {}
    for row in ROWS:
        directory = tmp_path_factory.mktemp("result")
        made[row.name] = directory / "model", perform(row, source, prose, directory)
    return made


def test_every_stage_has_a_row():
    on_disk = {(verb, method) for verb in ("prune", "finetune", "quantize") for method in stages.methods(verb)}
    assert on_disk == {(row.verb, row.method) for row in ROWS}
    libraries = {(*each, name) for each in on_disk for name in stages.backend_names(*each) if name != stages.OURS}
    assert libraries == {(row.verb, row.method, row.backend) for row in FOREIGN}


@pytest.mark.parametrize("row", list(FOREIGN), ids=lambda row: row.name)
def test_a_library_promises_what_ours_does(row, facts):
    """What comes after it can't tell who did it: same traits, shapes and sizes, same words in config.json."""
    ours = stages.load(row.verb, row.method)
    mine = ours.after(ours.Options(group_size=32), facts)
    theirs = row.stage.after(row.stage.Options(**row.options), facts)
    assert (theirs.traits, theirs.linears, theirs.weight_bytes) == (mine.traits, mine.linears, mine.weight_bytes)
    packing, own = (each.config["quantization_config"] for each in (theirs, mine))
    assert packing.keys() == own.keys()
    assert {key for key in own if packing[key] != own[key]} <= {"damp_percent"}


@each_planned_row
def test_the_card_is_complete(row):
    card = row.stage.__doc__
    assert card
    first, *rest = card.strip().splitlines()
    assert first.endswith(".")
    headings = {line.split()[0] for line in rest if line and not line.startswith(" ")}
    assert {"Paper", "Helps", "Hurts", "Cost", "Differs"} >= headings >= {"Paper", "Helps", "Hurts", "Cost"}
    assert len(row.stage.SUMMARY) < 100


@each_planned_row
def test_options_are_frozen_described_and_closed(row):
    options = row.stage.Options(**row.options)
    said = docstrings(type(options))
    assert [name for name in type(options).model_fields if not said.get(name)] == []
    with pytest.raises(ValidationError):
        row.stage.Options(**row.options, no_such_option=1)
    with pytest.raises(ValidationError):
        options.ignore = ()
    written = json.loads(json.dumps(options.model_dump(mode="json")))
    assert row.stage.Options.model_validate(written) == options


@each_planned_row
def test_check_accepts_these_options_and_refuses_an_unknown_architecture(row, facts):
    from dataclasses import replace

    target = targets.find("cpu")
    assert target is not None
    options = row.stage.Options(**row.options)
    assert [p for p in row.stage.check(options, facts, target) if p.level == "error"] == []
    codes = [p.code for p in row.stage.check(options, replace(facts, model_type="mystery"), target)]
    assert "unknown-architecture" in codes


def test_planning_imports_no_torch():
    names = sorted({stages.module(row.verb, row.method, row.backend) for row in (*ROWS, *FOREIGN)})
    code = f"import importlib, sys; [importlib.import_module(n) for n in {names}]; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@each_planned_row
def test_the_estimate_grows_with_the_model(row, facts):
    from dataclasses import replace

    target = targets.find("cpu")
    assert target is not None
    options = row.stage.Options(**row.options)
    wide = {name: (8 * rows, 8 * columns) for name, (rows, columns) in facts.linears.items()}
    small = row.stage.estimate(options, facts, target, 4096)
    large = row.stage.estimate(
        options, replace(facts, linears=wide, intermediate=1024, weight_bytes=64 * facts.weight_bytes), target, 4096
    )
    assert 0 < small.seconds < large.seconds
    assert 0 < small.peak_bytes < large.peak_bytes
    assert 0 < small.disk_bytes < large.disk_bytes


@each_row
def test_what_is_written_is_what_was_planned(row, facts, results):
    directory, found = results[row.name]
    promised, written = row.stage.after(row.stage.Options(**row.options), facts), read(directory)
    assert written.traits == promised.traits - WRITTEN_BY_PLAN
    assert written.weight_bytes == pytest.approx(promised.weight_bytes, rel=0.02)
    for name in ("linears", "layers", "hidden", "intermediate", "heads", "kv_heads", "head_dim", "vocab", "tied"):
        assert getattr(written, name) == getattr(promised, name), name
    packing, packed = (config.get("quantization_config", {}) for config in (promised.config, written.config))
    assert packed == {**packed, **packing}
    json.dumps(found)


@each_row
def test_nothing_is_written_that_nobody_asked_for(row, source, results):
    directory, _ = results[row.name]
    assert {path.name for path in directory.iterdir()} <= {path.name for path in source.iterdir()} | LOGS
    kept = digests(source)
    for name, digest in digests(directory).items():
        assert name in {"config.json", "model.safetensors", *LOGS} or digest == kept[name]


@each_row
def test_something_changed_and_the_model_still_computes(row, source, results):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from optikit import formats

    directory, _ = results[row.name]
    tokens = torch.randint(3, 260, (2, 40), generator=torch.Generator().manual_seed(1))
    logits = []
    for path in (source, directory):
        config = AutoConfig.from_pretrained(path)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        model.load_state_dict(formats.load_state(path, torch.float32), strict=False)
        model.tie_weights()
        with torch.no_grad():
            logits.append(model(tokens).logits)
    before, after = logits
    assert torch.isfinite(after).all()
    assert not torch.equal(before, after)
    if row.verb == "quantize":  # random weights forgive nothing that isn't rounding
        assert (after - before).norm() < 0.35 * before.norm()


@each_row
def test_same_seed_same_bytes(row, source, prose, tmp_path, results):
    directory, found = results[row.name]
    assert perform(row, source, prose, tmp_path) == found
    assert digests(tmp_path / "model") == digests(directory)


class Killed(BaseException):
    """Stands for SIGKILL: nothing in a stage catches it."""


@each_row
def test_killed_half_way_and_resumed_the_bytes_are_the_same(row, source, prose, tmp_path, results):
    directory, found = results[row.name]

    def kill(done: int, total: int, what: str) -> None:
        if done == 2 and what in ("block", "training step"):
            raise Killed

    with pytest.raises(Killed):
        perform(row, source, prose, tmp_path, progress=kill)
    assert list((tmp_path / "model").iterdir()) == []
    seen: list[int] = []
    resumed = perform(row, source, prose, tmp_path, progress=lambda done, *_: seen.append(done))
    assert resumed == found
    assert digests(tmp_path / "model") == digests(directory)
    assert seen[0] == 3  # the two finished blocks or steps were not done again


def problems(method: str, options: dict[str, Any], facts: ModelFacts, verb: str, on: str = "cpu") -> Iterator[str]:
    stage, target = stages.load(verb, method), targets.find(on)
    assert target is not None
    return (problem.code for problem in stage.check(stage.Options(**options), facts, target))


@pytest.mark.parametrize(
    ("verb", "method", "options", "code"),
    [
        ("prune", "wanda", {"pattern": "2:4", "sparsity": 0.6}, "pattern-fixes-sparsity"),
        ("prune", "magnitude", {"ignore": ["no_such"]}, "ignore-matches-nothing"),
        ("prune", "sparsegpt", {"ignore": ["_proj", "*"]}, "nothing-to-prune"),
        ("prune", "depth", {"ratio": 0.01}, "nothing-to-prune"),
        ("prune", "depth", {"ratio": 0.9}, "too-many-blocks"),
        ("prune", "width", {"multiple": 128}, "nothing-to-prune"),
        ("prune", "width", {"mlp": 0}, "nothing-to-prune"),
        ("prune", "width", {"heads": 0.1}, "nothing-to-prune"),
        ("quantize", "awq", {"group_size": 128}, "group-divides-width"),
    ],
)
def test_what_cannot_be_is_refused_before_any_weight_is_read(verb, method, options, code, facts):
    assert code in set(problems(method, options, facts, verb))


def test_int8_is_refused_where_nothing_serves_it(facts):
    assert "scheme-not-served" in set(problems("int8", {"scheme": "w8a8"}, facts, "quantize", on="inf2.48xlarge"))
    assert "scheme-not-served" in set(problems("int8", {"scheme": "llm_int8"}, facts, "quantize", on="inf2.48xlarge"))
    assert set(problems("int8", {"scheme": "w8a8"}, facts, "quantize")) == set()
