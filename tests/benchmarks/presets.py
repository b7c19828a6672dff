"""What recorded runs say of presets: reads examples/NAME, writes optikit/app/presets_recorded.toml and recipes/presets.

    python tests/benchmarks/record.py smollm2-135m-gptq-cpu --work WORK    # first, where a run is to be recorded anew
    python tests/benchmarks/presets.py

A record counts for a preset only if the run's stages had the options that the preset names; which machine and which
commit it was is carried along. `optikit presets` and `optikit recommend` read the file.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from optikit.app import presets
from optikit.app.presets import Preset
from optikit.app.recommend import measured

ROOT = Path(__file__).parents[2]
RECORDED = ROOT / "optikit" / "app" / "presets_recorded.toml"
RECIPES = ROOT / "recipes" / "presets"
HEAD = "# What recorded runs say of presets; made by tests/benchmarks/presets.py from the reports in examples/.\n"


def require_same(one: Preset, report: dict[str, Any]) -> None:
    """Refuse a record of other stages or of other options than the preset's."""
    made = [step for step in report["steps"] if step["verb"] != "acquire"]
    wanted = [(verb, dict(options)) for stage in one.stages for verb, options in yaml.safe_load(stage).items()]
    if len(made) != len(wanted):
        raise SystemExit(f"{one.name}: {one.record} has other stages")
    for step, (verb, options) in zip(made, wanted, strict=True):
        method = options.pop("method", None) or options.pop("engine")
        differs = {key: value for key, value in options.items() if step["options"].get(key) != value}
        if (step["verb"], step["method"]) != (verb, method) or differs:
            raise SystemExit(f"{one.name}: {one.record} ran {step['verb']} {step['method']}, {differs} differ")


def figures(one: Preset) -> dict[str, Any]:
    """Return what a run's report says, with hardware and commit."""
    folder = ROOT / "examples" / one.record
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    require_same(one, report)
    commit = re.search(r"^Commit (\w+)", (folder / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    if commit is None:
        raise SystemExit(f"examples/{one.record}/README.md names no commit")
    quality, speed = report["result"]["quality"]["perplexity"], report["result"]["speed"]
    found = {
        "report": f"examples/{one.record}/report.json",
        "commit": commit[1],
        "created": report["created"],
        "cpu": report["host"]["cpu"],
        "threads": report["host"]["threads"],
        "protocol": quality["protocol"],
        "perplexity_ratio": round(quality["ratio"], 4),
        "perplexity_ratio_ci95": [round(each, 4) for each in quality["ratio_ci95"]],
        "size_bytes": report["result"]["size_bytes"],
        "seconds": round(report["seconds"], 1),
    }
    if speed and report["speedup"]:
        found["decode_tokens_per_s"] = round(speed["decode_tokens_per_s"], 1)
        found["decode_speedup"] = round(report["speedup"]["decode"]["value"], 2)
        found["decode_speedup_ci95"] = [round(each, 2) for each in report["speedup"]["decode"]["ci95"]]
    rows = [{key: row[key] for key in row if key != "source" and row[key] is not None} for row in measured(folder)]
    return found | ({"evidence": rows[0]} if rows else {})


def lines(name: str, row: dict[str, Any]) -> Iterator[str]:
    """Yield a table of TOML."""
    yield f"\n[{name}]\n"
    tables = {key: value for key, value in row.items() if isinstance(value, dict)}
    yield from (f"{key} = {json.dumps(value)}\n" for key, value in row.items() if key not in tables)
    for key, value in tables.items():
        yield from lines(f"{name}.{key}", value)


def main() -> None:
    """Write both."""
    known = presets.rows()
    rows = {name: figures(one) for name, one in known.items() if one.record}
    RECORDED.write_text(HEAD + "".join(line for name in rows for line in lines(name, rows[name])), encoding="utf-8")
    presets.rows.cache_clear()
    RECIPES.mkdir(exist_ok=True)
    for name, one in presets.rows().items():
        path = RECIPES / f"{name}.yaml"
        text = presets.recipe(one, Path("recipes/presets") / path.name, model=None, target=None, schema="")
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
