"""The onnxruntime stage with the real builder: what it promises, and that it notices when the graph isn't that."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from optikit.errors import StageFailedError
from optikit.formats.onnx_graph import OnnxGraph
from optikit.models.reader import read
from optikit.stage import Job
from optikit.stages.compile import _onnx_build, _onnx_verify, onnxruntime
from optikit.stages.compile.onnxruntime import Options
from optikit.targets import Target
from tests.stages.compile.conftest import tampered

CPU = Target(name="cpu", device="cpu", engines=("onnxruntime",))
QUANT = "model.layers.1.self_attn.v_proj"
"""A linear that the builder joins with two others: found only by counting rows."""


@pytest.fixture(scope="module")
def dense(tiny_llama):
    return read(tiny_llama)


@pytest.fixture(scope="module")
def packed(tiny_gptq):
    return read(tiny_gptq)


def told(directory):
    return json.loads((directory.parent / "facts.json").read_text())


def codes(facts, options=None, target=CPU):
    return [problem.code for problem in onnxruntime.check(options or Options(), facts, target)]


def repacked(facts, **changes):
    settings = {**facts.config["quantization_config"], **changes}
    return replace(facts, config={**facts.config, "quantization_config": settings})


def wait_for(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.02)
    return found


class TestCheck:
    def test_what_works_has_no_problems(self, dense, packed):
        assert codes(dense) == codes(packed) == []
        assert codes(packed, Options(precision="int4", head="float32", accuracy_level=1)) == []

    def test_the_target_must_run_it(self, dense):
        gpu = Target(name="l4", device="cuda", engines=("vllm",))
        (problem,) = onnxruntime.check(Options(), dense, gpu)
        assert problem.code == "engine-not-on-target"
        assert "l4" in problem.message
        assert "vllm" in problem.fix

    @pytest.mark.parametrize("trait", ["int8_w8a8", "nf4", "int8_llm", "openvino"])
    def test_weights_that_the_builder_cannot_read(self, dense, trait):
        (problem,) = onnxruntime.check(Options(), replace(dense, traits=frozenset({trait})), CPU)
        assert problem.code == "weights-not-readable"
        assert trait in problem.message

    def test_families_and_rotary_embeddings(self, dense):
        assert codes(replace(dense, model_type="opt")) == ["unknown-architecture"]
        assert codes(replace(dense, head_dim=24)) == ["head-width"]
        for kind in ("linear", "yarn", "longrope"):
            assert codes(replace(dense, config={"rope_scaling": {"type": kind}})) == ["unknown-rope"]
        assert codes(replace(dense, config={"rope_parameters": {"rope_type": "llama3"}})) == []
        linear = {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}
        assert codes(replace(dense, model_type="qwen2", config=linear)) == []
        partial = {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}
        assert codes(replace(dense, config=partial)) == ["unknown-rope"]

    @pytest.mark.parametrize(
        ("config", "context", "told"),
        [({}, 4096, []), ({}, 512, ["taken-for-longrope"]), ({"original_max_position_embeddings": 512}, 512, [])],
    )
    def test_a_context_that_the_builder_takes_for_longrope(self, dense, config, context, told):
        assert codes(replace(dense, model_type="phi3", config=config, max_positions=context)) == told
        assert codes(replace(dense, model_type="mistral", sliding_window=64)) == ["window-left-out"]

    @pytest.mark.parametrize(
        ("changes", "code"),
        [
            ({"group_size": -1}, "group-has-no-kernel"),
            ({"desc_act": True}, "groups-out-of-order"),
            ({"dynamic": {"-:^model.layers.0.mlp.up_proj$": {}}}, "partly-quantized"),
        ],
    )
    def test_packings_without_a_kernel(self, packed, changes, code):
        assert codes(repacked(packed, **changes)) == [code]

    def test_linears_that_were_left_dense(self, packed):
        left = replace(packed, left_dense=frozenset({"model.layers.1.mlp.up_proj"}))
        assert codes(left) == ["partly-quantized"]
        assert codes(repacked(packed, modules_to_not_convert=["down_proj"])) == ["partly-quantized"]
        assert codes(repacked(packed, modules_to_not_convert=["lm_head"])) == []

    def test_packed_weights_have_a_precision_already(self, packed):
        problems = list(onnxruntime.check(Options(precision="fp32"), packed, CPU))
        assert [(problem.code, problem.loc) for problem in problems] == [("precision-already-chosen", ("precision",))]

    def test_an_int8_head_is_slow_without_int8_activations(self, packed, dense):
        (problem,) = onnxruntime.check(Options(accuracy_level=1), packed, CPU)
        assert (problem.code, problem.level) == ("slow-head", "warning")
        assert codes(dense, Options(accuracy_level=1)) == []


class TestRun:
    def test_dense_weights_stay_bit_by_bit(self, tiny_onnx):
        facts = told(tiny_onnx)
        assert (facts["linears_compared"], facts["linears_bit_equal"]) == (14, 14)
        assert (facts["builder_precision"], facts["head"], facts["head_largest_steps"]) == ("fp32", "float32", 0)
        assert len(facts["trial"]["tokens"]) == 8

    def test_packed_weights_stay_bit_by_bit_and_only_the_head_is_rounded(self, tiny_onnx_int4):
        facts = told(tiny_onnx_int4)
        assert (facts["linears_compared"], facts["linears_bit_equal"], facts["linears_largest_steps"]) == (14, 14, 0)
        assert (facts["head"], facts["embedding"]) == ("int8", "the head's")
        assert 0.4 < facts["head_largest_steps"] <= 0.501  # rounding to nearest
        assert len(facts["trial"]["tokens"]) == 8

    @pytest.mark.parametrize("compiled", ["tiny_onnx", "tiny_onnx_int4"])
    def test_sizes_are_known_beforehand_to_the_byte(self, compiled, request, dense, packed):
        written = request.getfixturevalue(compiled) / "model.onnx.data"
        planned = onnxruntime.after(Options(), dense if compiled == "tiny_onnx" else packed)
        assert planned.weight_bytes == written.stat().st_size
        assert "onnx" in planned.traits

    def test_a_directory_is_complete(self, tiny_onnx_int4):
        names = {path.name for path in tiny_onnx_int4.iterdir()}
        assert names >= {
            "model.onnx",
            "model.onnx.data",
            "genai_config.json",
            "tokenizer.json",
            "tokenizer_config.json",
        }

    def test_nothing_of_the_repository_around_the_interpreter_is_in_the_graph(self, tiny_onnx_int4):
        import onnx
        import onnxruntime_genai

        graph = onnx.load(tiny_onnx_int4 / "model.onnx", load_external_data=False)
        commit = getattr(onnxruntime_genai, "__commit__", "")[:7]
        version = onnxruntime_genai.__version__
        assert graph.producer_version in (version, f"{version}+{commit}")

    def test_a_builder_that_fails_is_quoted(self, tiny_gptq, tmp_path):
        shutil.copytree(tiny_gptq, source := tmp_path / "source")
        broken = json.loads((source / "tokenizer.json").read_text()) | {"pre_tokenizer": {"type": "NoSuch"}}
        (source / "tokenizer.json").write_text(json.dumps(broken))
        (dest := tmp_path / "dest").mkdir()
        with pytest.raises(
            StageFailedError, match=r"builder: its process ended with exit code 1; its log ends:\n(.*\n)+.*tokenizer"
        ) as caught:
            onnxruntime.run(Options(), Job(source=source, dest=dest, scratch=tmp_path / "scratch"))
        assert str(tmp_path / "scratch") in caught.value.fix

    def test_progress_counts_the_blocks(self, dense, tmp_path, monkeypatch):
        seen = []
        fake = tmp_path / "noisy_builder.py"
        fake.write_text("print('Reading layer 0')\nprint('noise')\nprint('Reading layer 1')\n")
        monkeypatch.setattr(_onnx_build, "BUILDER", "noisy_builder")
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        job = Job(source=tmp_path, dest=tmp_path, scratch=tmp_path / "s", progress=lambda *each: seen.append(each))
        _onnx_build.build(job, "fp32", (), dense)
        assert seen == [(1, 2, "block"), (2, 2, "block")]
        assert "noise" in (tmp_path / "s" / "builder.log").read_text()

    def test_a_killed_worker_takes_the_builder_with_it(self, tmp_path):
        (tmp_path / "slow_builder.py").write_text(
            "import os, pathlib, sys, time\n"
            "pathlib.Path(sys.argv[4], 'pid').write_text(str(os.getpid()))\n"
            "time.sleep(60)\n"
        )
        code = (
            "import pathlib, sys\n"
            "from optikit.stages.compile import _onnx_build\n"
            "from optikit.stage import Job\n"
            "_onnx_build.BUILDER = 'slow_builder'\n"
            "here = pathlib.Path(sys.argv[1])\n"
            "_onnx_build.build(Job(source=here, dest=here, scratch=here / 's'), 'fp32', (), None)\n"
        )
        worker = subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path)], env={**os.environ, "PYTHONPATH": str(tmp_path)}
        )
        written = wait_for(lambda: (tmp_path / "pid").is_file() and (tmp_path / "pid").read_text())
        worker.kill()
        worker.wait()
        wait_for(lambda: not Path(f"/proc/{written}").exists())


class TestVerify:
    def compare(self, source, directory):
        return _onnx_verify.compare(source, directory, read(source), exact=True)

    def test_the_untouched_graph_passes(self, tiny_gptq, tiny_onnx_int4):
        assert self.compare(tiny_gptq, tiny_onnx_int4)["linears_bit_equal"] == 14

    def test_one_scale_in_its_last_bit(self, tiny_gptq, tiny_onnx_int4, tmp_path):
        def nudge(scales):
            scales[-1] = np.nextafter(scales[-1], np.float32(1))

        bad = tampered(tiny_onnx_int4, tmp_path / "bad", "model.layers.1.attn.qkv_proj.MatMulNBits.scales", nudge)
        with pytest.raises(StageFailedError, match=rf"{QUANT}\.weight: \d\d of 2048 weights in the graph differ"):
            self.compare(tiny_gptq, bad)

    def test_one_code(self, tiny_gptq, tiny_onnx_int4, tmp_path):
        def flip(values):
            values[0] ^= 1

        bad = tampered(tiny_onnx_int4, tmp_path / "bad", "model.layers.0.mlp.down_proj.MatMulNBits.qweight", flip)
        with pytest.raises(StageFailedError, match=r"model\.layers\.0\.mlp\.down_proj\.weight: 1 of 8192 weights"):
            self.compare(tiny_gptq, bad)

    def test_one_zero_point(self, tiny_gptq, tiny_onnx_int4, tmp_path):
        def flip(values):
            values[0] ^= 16

        bad = tampered(tiny_onnx_int4, tmp_path / "bad", "model.layers.0.mlp.up_proj.MatMulNBits.qzeros", flip)
        with pytest.raises(StageFailedError, match=r"model\.layers\.0\.mlp\.up_proj\.weight: 32 of 8192 weights"):
            self.compare(tiny_gptq, bad)

    def test_a_head_that_is_off_by_more_than_its_rounding(self, tiny_gptq, tiny_onnx_int4, tmp_path):
        def shift(values):
            values[:4] += 2

        name = OnnxGraph(tiny_onnx_int4 / "model.onnx").products["/lm_head/MatMul"].weight
        bad = tampered(tiny_onnx_int4, tmp_path / "bad", name, shift)
        with pytest.raises(StageFailedError, match=r"embed_tokens\.weight: \d of 16640 weights"):
            self.compare(tiny_gptq, bad)

    def test_another_model_s_graph(self, tiny_llama, tiny_onnx_int4):
        with pytest.raises(StageFailedError, match="weights in the graph differ"):
            self.compare(tiny_llama, tiny_onnx_int4)

    def test_a_source_with_another_number_of_blocks(self, tiny_gptq, tiny_onnx_int4):
        facts = read(tiny_gptq)
        fewer = {name: shape for name, shape in facts.linears.items() if ".layers.0." in name}
        with pytest.raises(StageFailedError, match=r"layers\.1.* rows in the graph, and 0 in the source"):
            _onnx_verify.compare(tiny_gptq, tiny_onnx_int4, replace(facts, linears=fewer), exact=True)


class TestTrial:
    def test_a_graph_that_does_not_load_fails_the_stage(self, tiny_onnx, tmp_path):
        shutil.copytree(tiny_onnx, bad := tmp_path / "bad")
        (bad / "model.onnx").write_bytes(b"junk")
        job = Job(source=tiny_onnx, dest=bad, scratch=tmp_path)
        with pytest.raises(StageFailedError, match="onnxruntime-genai: its process ended with exit code 1"):
            _onnx_build.decode(job, 8)
