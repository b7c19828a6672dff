"""A plan reads headers, not weights: a large checkpoint costs it nothing, and it knows what was run before."""

from __future__ import annotations

import json
import math
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from optikit.models.expected import tensors
from optikit.plan import Plan, make_plan
from optikit.plan.render import as_json, render
from optikit.recipe.load import load
from optikit.store import digests
from optikit.store.store import Artifact, Manifest, Store

WIDE = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 200_000,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}


def sparse(directory: Path) -> Path:
    """A checkpoint of zeros that takes no room: a header, and a hole of 26 MB."""
    from optikit.models import architectures

    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(WIDE))
    row = architectures.find("llama")
    assert row is not None
    sizes = {
        "layers": 2,
        "hidden": 64,
        "intermediate": 128,
        "heads": 2,
        "kv_heads": 2,
        "head_dim": 32,
        "vocab": 200_000,
    }
    header, end = {}, 0
    for name, shape in tensors(row, sizes, WIDE).items():
        begin, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [begin, end]}
    content = json.dumps(header).encode()
    with (directory / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(content)) + content)
        file.truncate(8 + len(content) + end)
    time.sleep(2 * digests.STEP_NS / 1e9)  # younger files aren't remembered
    return directory


@pytest.fixture
def plan(tmp_path: Path) -> Callable[..., Plan]:
    model = sparse(tmp_path / "model")
    recipe = {"model": str(model), "stages": [{"quantize": {"method": "rtn", "group_size": 32}}]}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))

    def made(**how: Any) -> Plan:
        return make_plan(load(tmp_path / "r.yaml"), Store(tmp_path / "home"), **how)

    return made


def test_it_reads_none_and_then_knows_what_a_run_has_read(plan, tmp_path, monkeypatch) -> None:
    read: list[str] = []
    honest = digests.Digests.read
    monkeypatch.setattr(digests.Digests, "read", lambda self, path: read.append(path.name) or honest(self, path))
    store = Store(tmp_path / "home")

    before = plan(weights=False, digests=False)
    assert "model.safetensors" not in read
    told = as_json(before, store)
    assert told["model"]["digest"] == told["steps"][0]["key"] == ""
    assert not told["steps"][0]["cached"]
    assert f"not read yet: {before.model.spec}" in render(before, store)

    run = plan()
    assert read.count("model.safetensors") == 1
    assert run.steps[0].key != before.steps[0].key
    _keep(store, run.steps[0].key, run.steps[0].method)

    after = plan(weights=False, digests=False)
    assert read.count("model.safetensors") == 1
    assert [step.key for step in after.steps] == [step.key for step in run.steps]
    told = as_json(after, store)["steps"][0]
    assert told["key"] == run.steps[0].key
    assert told["cached"]
    assert "not read" not in render(after, store)

    (tmp_path / "model" / "model.safetensors").touch()
    changed = plan(weights=False, digests=False)
    assert not as_json(changed, store)["steps"][0]["cached"]
    assert read.count("model.safetensors") == 1


def _keep(store: Store, key: str, method: str) -> Artifact:
    directory = store.staging(key)
    (directory / "config.json").write_text("{}")
    facts: dict[str, Any] = {"verb": "quantize", "method": method, "backend": "optikit", "options": {}, "parent": ""}
    measured: dict[str, Any] = {"facts": {}, "seconds": 1.0, "peak_memory_mib": 1.0, "versions": {}, "created": ""}
    return store.commit(key, directory, Manifest(key=key, inputs={}, traits=(), **facts, **measured))
