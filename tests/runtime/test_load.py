"""Which directory is loaded by which runtime."""

from __future__ import annotations

import pytest

from optikit import runtime
from optikit.errors import InputMissingError, UsageError


def marked(directory, *names):
    directory.mkdir(parents=True, exist_ok=True)
    for name in names:
        (directory / name).write_text("{}")
    return directory


def test_a_hugging_face_directory(tmp_path):
    assert runtime.find(marked(tmp_path, "config.json")) == ("transformers", tmp_path)


def test_a_compiled_directory_wins_over_its_own_copy_of_config_json(tmp_path):
    assert runtime.find(marked(tmp_path, "config.json", "genai_config.json")) == ("onnxruntime", tmp_path)


def test_the_output_of_a_run_serves_what_was_compiled(tmp_path):
    marked(tmp_path / "model", "config.json")
    assert runtime.find(tmp_path) == ("transformers", tmp_path / "model")
    compiled = marked(tmp_path / "compiled" / "onnxruntime", "genai_config.json")
    assert runtime.find(tmp_path) == ("onnxruntime", compiled)
    assert runtime.find(tmp_path, "transformers") == ("transformers", tmp_path / "model")


def test_nothing_to_load(tmp_path):
    with pytest.raises(
        InputMissingError, match=r"no genai_config\.json or openvino_model\.xml or model\.gguf or config\.json"
    ):
        runtime.load(tmp_path)
    with pytest.raises(InputMissingError, match="is not a directory"):
        runtime.load(tmp_path / "absent")
    with pytest.raises(InputMissingError, match=r"no genai_config\.json"):
        runtime.load(marked(tmp_path, "config.json"), runtime="onnxruntime")


def test_no_such_runtime(tmp_path):
    with pytest.raises(UsageError, match="no runtime 'tensorflow'"):
        runtime.load(tmp_path, runtime="tensorflow")
