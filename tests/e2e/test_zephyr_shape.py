"""The article's recipe on the shape of its model, Zephyr: Mistral with an attention window, its weights tiny."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests import families

RECIPE = Path(__file__).parents[2] / "recipes" / "smollm2-135m-medusa-sql-cpu.yaml"
SMALLER = {
    "finetune": {"tokens": 2000, "rank": 4},
    "quantize": {"group_size": 32},
    "speculate": {"tokens": 1200, "epochs": 2, "eval_prompts": 8, "new_tokens": 24, "datastore_answers": 8},
    "compile": {},
}


def smaller(path, model, pairs):
    """Return the recipe for a tiny model: the same stages and measurements, fewer of everything."""
    value = yaml.safe_load(path.read_text(encoding="utf-8"))
    value |= {"model": str(model), "vars": {"pairs": str(pairs)}, "gates": {}}
    value["calibration"] |= {"samples": 4, "length": 64}
    for stage in value["stages"]:
        ((verb, options),) = stage.items()
        options |= SMALLER[verb]
    value["evaluate"]["perplexity"] |= {"window": 64, "windows": 4}
    value["evaluate"]["tasks"][0] |= {"items": 4}
    value["evaluate"]["speed"] |= {"prompt_tokens": 40, "new_tokens": 12, "repetitions": 2}
    return value


@pytest.mark.slow
def test_the_articles_recipe_runs_on_a_model_with_an_attention_window(tmp_path):
    model = families.save("mistral", tmp_path / "model", sliding_window=32, max_position_embeddings=512)
    pairs = tmp_path / "pairs.jsonl"
    rows = [
        {
            "question": f"How many {a} have {b}?",
            "context": f"CREATE TABLE {a} ({b} INT)",
            "answer": f"SELECT {b} FROM {a}",  # noqa: S608 - it is a text to learn
        }
        for a in ("pets", "cars", "songs", "heads", "ships", "trees", "rooms", "birds")
        for b in ("age", "name", "size", "year", "cost", "rank")
    ]
    pairs.write_text("\n".join(map(json.dumps, rows)))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(smaller(RECIPE, model, pairs)))
    command = [sys.executable, "-m", "optikit", "run", str(recipe), "--out", str(tmp_path / "out")]
    done = subprocess.run(
        command, env={**os.environ, "OPTIKIT_HOME": str(tmp_path / "home")}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    found = report["speculation"]
    assert (found["lossless"], found["unexplained"], found["verify_path"]) == (True, 0, "int8")
    assert {"name", "used"} <= found["own_drafter"].keys()
    assert report["speedup"]["repeating"]["prompts"] > 0
    assert (tmp_path / "out" / "compiled" / "onnxruntime" / "verify.onnx").is_file()
