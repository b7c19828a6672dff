"""Translations of a model directory for older versions of transformers, as JSON."""

from __future__ import annotations

import json
from pathlib import Path

from optikit.formats.dialects import spoken

CONFIG = {"model_type": "llama", "dtype": "bfloat16", "rope_parameters": {"rope_theta": 1e5, "rope_type": "default"}}
TOKENIZER = {"model": {"type": "BPE", "merges": [["a", "b"], ["ab", "c"]]}}


def write(directory: Path, config: dict = CONFIG) -> Path:
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    told = {"tokenizer_class": "TokenizersBackend", "backend": "tokenizers", "is_local": True, "eos_token": "</s>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(told))
    (directory / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    (directory / "chat_template.jinja").write_text("{{ messages }}")
    (directory / "model.safetensors").write_bytes(b"weights")
    return directory


def read(directory: Path, name: str) -> dict:
    return json.loads((directory / name).read_text())


def test_4_51_reads_theta_dtype_tokenizer_and_template(tmp_path: Path) -> None:
    dest = spoken(write(tmp_path / "model"), tmp_path / "older", "4.51")
    assert read(dest, "config.json") == {
        "model_type": "llama",
        "torch_dtype": "bfloat16",
        "rope_theta": 1e5,
        "rope_scaling": None,
    }
    assert read(dest, "tokenizer_config.json") == {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "</s>",
        "chat_template": "{{ messages }}",
    }
    assert read(dest, "tokenizer.json") == TOKENIZER
    assert (dest / "model.safetensors").read_bytes() == b"weights"
    assert (dest / "model.safetensors").is_symlink()


def test_before_4_45_merges_are_strings(tmp_path: Path) -> None:
    dest = spoken(write(tmp_path / "model"), tmp_path / "older", "4.44.2")
    assert read(dest, "tokenizer.json")["model"]["merges"] == ["a b", "ab c"]


def test_a_scaled_rope_keeps_its_scaling(tmp_path: Path) -> None:
    rope = {"rope_theta": 5e5, "rope_type": "llama3", "factor": 8.0}
    dest = spoken(write(tmp_path / "model", {**CONFIG, "rope_parameters": rope}), tmp_path / "older", "4.51")
    assert read(dest, "config.json")["rope_theta"] == 5e5
    assert read(dest, "config.json")["rope_scaling"] == {"rope_type": "llama3", "factor": 8.0}


def test_5_reads_it_as_it_is_and_twice_is_as_once(tmp_path: Path) -> None:
    source = write(tmp_path / "model")
    for _ in range(2):
        dest = spoken(source, tmp_path / "same", "5.3")
    assert read(dest, "config.json") == CONFIG
    assert all(path.is_symlink() for path in dest.iterdir())
    older = spoken(source, tmp_path / "older", "4.51")
    assert read(spoken(older, tmp_path / "again", "4.51"), "config.json") == read(older, "config.json")
