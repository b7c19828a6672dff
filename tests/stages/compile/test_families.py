"""Every family and every packing that the stage accepts, compiled for real and compared with transformers."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

import numpy as np
import pytest

from optikit import runtime
from optikit.models import architectures
from optikit.models.reader import read
from optikit.stage import Job
from optikit.stages.compile import onnxruntime
from optikit.stages.compile.onnxruntime import Options
from tests.families import save

pytestmark = pytest.mark.slow

PROMPT = np.random.default_rng(0).integers(3, 259, 60)
FAMILIES = {
    "llama": {"tie_word_embeddings": False},
    "mistral": {"sliding_window": None},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {},
    "gemma": {},
    "gemma2": {"sliding_window": 16},
    "phi3": {"original_max_position_embeddings": 256},
    "granite": {"residual_multiplier": 0.22, "embedding_multiplier": 12.0, "logits_scaling": 8.0},
    "ernie4_5": {"use_bias": True},
    "hunyuan_v1_dense": {},
}


def helpers():
    spec = importlib.util.spec_from_file_location("tiny", Path(__file__).parents[2] / "conftest.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build(family, directory):
    return save(family, directory / "model", **FAMILIES[family])


def compare(source, work, options):
    """Compile `source`, return the stage's facts, the largest difference of logits, and both sizes."""
    (dest := work / "dest").mkdir(parents=True)
    facts = onnxruntime.run(options, Job(source=source, dest=dest, scratch=work / "scratch"))
    wanted = runtime.load(source, dtype="float32", threads=1).forward(PROMPT, 0)
    apart = np.abs(runtime.load(dest, threads=1).forward(PROMPT, 0) - wanted).max()
    return (
        facts,
        apart,
        (onnxruntime.after(options, read(source)).weight_bytes, (dest / "model.onnx.data").stat().st_size),
    )


def test_every_accepted_family_is_tested():
    assert set(FAMILIES) == set(architectures.known_to("onnxruntime"))


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_transformers(family, tmp_path):
    facts, apart, (planned, written) = compare(build(family, tmp_path), tmp_path, Options())
    assert facts["linears_bit_equal"] == facts["linears_compared"] > 0
    assert apart < 2e-6
    assert planned == pytest.approx(written, rel=0.01)


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_logits_are_those_of_the_weights_they_stand_for(family, tmp_path):
    source = helpers().round_to_gptq(build(family, tmp_path), tmp_path / "packed")
    facts, apart, (planned, written) = compare(
        source, tmp_path, Options(accuracy_level=1, head="float32", embedding="float32")
    )
    assert facts["linears_bit_equal"] == facts["linears_compared"] > 0
    assert apart < 2e-6
    assert planned == pytest.approx(written, rel=0.01)


@pytest.mark.parametrize(("bits", "group_size"), [(8, 32), (4, 64), (4, 16)])
def test_other_grids(tiny_llama, tmp_path, bits, group_size):
    source = helpers().round_to_gptq(tiny_llama, tmp_path / "packed", bits=bits, group_size=group_size)
    facts, apart, (planned, written) = compare(source, tmp_path, Options(accuracy_level=1, head="float32"))
    assert facts["linears_bit_equal"] == facts["linears_compared"] > 0
    assert apart < 2e-6
    assert planned == written


def test_awq(tiny_llama, tiny_gptq, tmp_path):
    import json

    from optikit.formats import awq, gptq
    from optikit.formats.checkpoint import Checkpoint, save_tensors

    shutil.copytree(tiny_llama, source := tmp_path / "awq")
    packed, linears, written = Checkpoint(tiny_gptq), read(tiny_llama).linears, {}
    for name in Checkpoint(tiny_llama):
        layer = name.removesuffix(".weight")
        if layer in linears:
            tensors = {suffix: packed.read(f"{layer}.{suffix}") for suffix in gptq.SUFFIXES}
            written |= {f"{layer}.{s}": t for s, t in awq.pack(*gptq.unpack(tensors, 4)).items()}
        else:
            written[name] = packed.read(name)
    save_tensors(source / "model.safetensors", written)
    config = json.loads((source / "config.json").read_text())
    settings = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
    (source / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    facts, apart, _ = compare(source, tmp_path, Options(accuracy_level=1, head="float32"))
    assert facts["linears_bit_equal"] == facts["linears_compared"] == 14
    assert apart < 2e-6


@pytest.mark.parametrize(
    ("options", "embedding"),
    [
        (Options(precision="int4"), "the head's"),
        (Options(precision="int4", head="int4", block_size=64), "the head's"),
        (Options(precision="int8"), "float32"),
        (Options(precision="int8", head="int4"), "float32"),
        (Options(precision="int4", head="float32"), "float32"),
    ],
)
def test_the_engine_s_own_rounding_moves_no_weight_by_more_than_a_step(tiny_llama, tmp_path, options, embedding):
    facts, apart, (planned, written) = compare(tiny_llama, tmp_path, options)
    assert facts["linears_bit_equal"] == 0
    assert 0.4 < facts["linears_largest_steps"] <= 0.501
    assert (facts["head"], facts["embedding"]) == (options.head, embedding)
    assert apart < 0.5
    assert planned == written
