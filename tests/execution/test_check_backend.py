"""What a library wrote is looked at before it counts: nothing, pickles, another model than promised."""

from __future__ import annotations

import json
import pickle
import shutil
from dataclasses import replace
from functools import partial

import pytest
from safetensors.torch import load_file, save_file

from optikit.errors import RefusedError, StageFailedError
from optikit.execution import check_backend
from optikit.models.reader import read


@pytest.fixture
def wrote(tiny_gptq, tmp_path):
    return shutil.copytree(tiny_gptq, tmp_path / "dest")


@pytest.fixture
def require(tiny_llama):
    return partial(check_backend.require, "1-quantize-gptq", "llm-compressor", tiny_llama)


def test_what_was_promised_is_let_through(wrote, tiny_gptq, require):
    tensors = require(wrote, read(tiny_gptq))["tensors"]
    assert tensors["replaced"] == 14
    assert tensors["dropped"] == {}


def test_a_tensor_that_got_lost_is_told(wrote, tiny_gptq, require):
    """A file of the right shape in every header that planning reads, and yet a norm of another model."""
    planned = read(tiny_gptq)
    tensors = load_file(wrote / "model.safetensors")
    tensors["model.extra.weight"] = tensors["model.norm.weight"].clone()
    save_file(tensors, wrote / "model.safetensors", {"format": "pt"})
    with pytest.raises(StageFailedError, match=r"llm-compressor wrote .*model\.extra\.weight"):
        require(wrote, planned)


def test_nothing_is_no_result(tmp_path, tiny_gptq, require):
    (tmp_path / "dest").mkdir()
    with pytest.raises(StageFailedError, match="llm-compressor ended without an error and wrote nothing"):
        require(tmp_path / "dest", read(tiny_gptq))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "nested/model.pt", "modeling_own.py"])
def test_what_can_run_code_is_refused(wrote, tiny_gptq, name, require):
    (wrote / name).parent.mkdir(exist_ok=True)
    (wrote / name).write_bytes(pickle.dumps({"weight": 1}))
    with pytest.raises(RefusedError, match="which can run code when it is loaded"):
        require(wrote, read(tiny_gptq))


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_half_a_directory_is_no_model(wrote, tiny_gptq, missing, require):
    (wrote / missing).unlink()
    with pytest.raises(StageFailedError, match="wrote no model"):
        require(wrote, read(tiny_gptq))


def test_a_model_that_was_left_dense_is_told(tiny_llama, tiny_gptq, require):
    with pytest.raises(StageFailedError, match="promised weights int4_gptq, and what it wrote has dense"):
        require(tiny_llama, read(tiny_gptq))


def test_blocks_that_got_lost_are_told(wrote, tiny_gptq, require):
    planned = read(tiny_gptq)
    with pytest.raises(StageFailedError, match="promised layers 3, and what it wrote has 2"):
        require(wrote, replace(planned, layers=3))


def test_damaged_weights_are_told(wrote, tiny_gptq, require):
    planned = read(tiny_gptq)
    config = json.loads((wrote / "config.json").read_text())
    (wrote / "config.json").write_text(json.dumps(config | {"intermediate_size": 96}))
    with pytest.raises(StageFailedError):
        require(wrote, planned)
