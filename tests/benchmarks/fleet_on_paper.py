"""What a sweep of 1,000 recipes of an 8B model on 50 nodes asks of the store that they share, reckoned.

    python tests/benchmarks/fleet_on_paper.py --write examples/fleet_on_paper.md

Sizes are those that `optikit plan` expects of each step on the shape of Llama 3.1 8B; how often a lease is written, and
how long a lost node's steps wait, are the constants of the code; what plans, listings and collections cost was measured
(`store_scale.md`, `sweep/`). Nothing was run on 50 nodes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from optikit.store.lease import EXPIRY_SECONDS, HEARTBEAT_SECONDS
from optikit.store.store import LOCK_POLL_SECONDS
from tests.benchmarks.plans import SHAPES, write_models
from tests.benchmarks.record import commit

RECIPES, NODES, PREFIXES = 1000, 50, 20
SHAPE = SHAPES["mistral-7b-v0.1"] | {"model_type": "llama", "sliding_window": None, "vocab_size": 128_256}
RECIPE = """\
model: {place}/llama-3.1-8b
calibration: {{text: {place}/calibration.txt, samples: 32, length: 512}}
stages:
  - quantize: {{method: gptq, bits: 4, group_size: 128}}
evaluate:
  perplexity: {{text: {place}/calibration.txt, window: 512, windows: 12}}
"""
GB = 1e9


def planned() -> dict[str, Any]:
    """Return the plan of one of the recipes."""
    with tempfile.TemporaryDirectory() as place:
        write_models(Path(place), {"llama-3.1-8b": SHAPE})
        recipe = Path(place) / "recipe.yaml"
        recipe.write_text(RECIPE.format(place=place), encoding="utf-8")
        command = [sys.executable, "-m", "optikit", "plan", str(recipe), "--json"]
        environ = os.environ | {"OPTIKIT_HOME": f"{place}/home"}
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environ)
        plan: dict[str, Any] = json.loads(done.stdout)
        plan["weights"] = (Path(place) / "llama-3.1-8b/model.safetensors").stat().st_size
        return plan


def rows(plan: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Return (what, how much, how reckoned)."""
    sizes = {each["name"]: each["estimate_disk_bytes"] / GB for each in (*plan["steps"], *plan["measures"])}
    dense, packed = plan["weights"] / GB, sizes["1-quantize-gptq"]
    scored, baseline = sizes["measure-quality-1-quantize-gptq"], sizes["measure-quality-baseline"]
    protocols = RECIPES // PREFIXES
    disk = PREFIXES * packed + RECIPES * scored + protocols * baseline
    read = PREFIXES * dense + protocols * dense + RECIPES * (packed + baseline)
    alone = RECIPES * (packed + baseline + scored)
    heartbeats = NODES / HEARTBEAT_SECONDS
    return [
        ("steps asked for", f"{RECIPES * 3:,}", "quantize, quality before and after, per recipe"),
        (
            "steps made",
            f"{PREFIXES + protocols + RECIPES:,}",
            f"{PREFIXES} ways to quantize x {protocols} protocols share prefixes and baselines",
        ),
        (
            "disk of the store",
            f"{disk:,.0f} GB",
            f"{packed:.1f} GB packed, {baseline:.2f} GB of a baseline's logits, {scored * 1e6:.0f} kB of a result's",
        ),
        ("disk without sharing", f"{alone:,.0f} GB", "a store per recipe; the model itself counts in neither"),
        (
            "read from the store, and of the model",
            f"{read:,.0f} GB",
            f"each step reads its weights ({dense:.1f} GB dense), and logits",
        ),
        ("per node", f"{read / NODES:,.0f} GB", f"of {NODES} nodes"),
        ("written to the store", f"{disk:,.0f} GB", "everything once"),
        ("leases at once", f"at most {NODES}", "one per step that is being made"),
        ("writes of leases", f"{heartbeats:.0f} a second", f"each holder every {HEARTBEAT_SECONDS:g} s, a few bytes"),
        (
            "looks of those that wait",
            f"{(NODES - 1) / LOCK_POLL_SECONDS:,.0f} a second at worst",
            f"{NODES - 1} nodes that wait for one step, every {LOCK_POLL_SECONDS:g} s",
        ),
        ("a lost node's step waits", f"{EXPIRY_SECONDS:g} s", "and then goes on behind its last block"),
    ]


def page() -> str:
    """Return the record as Markdown."""
    table = "\n".join(f"| {what} | {much} | {how} |" for what, much, how in rows(planned()))
    return (
        "# A thousand recipes on fifty nodes, on paper\n\n"
        f"`python tests/benchmarks/fleet_on_paper.py`, commit {commit()}. Reckoned from plans, constants of the code\n"
        "and what was measured on one machine; nothing was run on fifty. The model has the shape of Llama 3.1 8B.\n\n"
        f"```yaml\n{RECIPE.format(place='.')}```\n\n"
        f"| what | how much | reckoned from |\n|---|---:|---|\n{table}\n\n"
        "What commands take in a store of 10,000 artifacts is in [store_scale.md](store_scale.md); what a killed node\n"
        "cost when it was tried on two, in [sweep/](sweep/README.md).\n"
    )


def main() -> None:
    """Print the page, and write it where asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path)
    text, asked = page(), parser.parse_args()
    if asked.write:
        asked.write.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
