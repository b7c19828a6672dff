"""A model as it is, fine-tuned, and fine-tuned with heads: made by three recipes, loaded side by side, recorded.

    python tests/benchmarks/three_variants.py --pairs pairs.jsonl --work WORK --requests 200 [--skip-runs]

`optikit run` makes the variants in WORK, and shares steps in WORK/home. Then `optikit bench` serves all three with
`optikit serve` and puts them under load in turns: the questions are the last fifth of the pairs, on which nothing was
trained, as the model's chat template writes them. examples/three_variants/ gets the pages, and each variant's report.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml
from record import KEPT, ROOT, commit, machine

VARIANTS = ("base", "finetuned", "heads")
OUT = ROOT / "examples" / "three_variants"
HELD_OUT = 0.8
"""Share of the pairs that training may see, as the recipes say."""


def recipe(name: str) -> Path:
    """Return the recipe of a variant."""
    return ROOT / "recipes" / f"sql-three-variants-{name}-cpu.yaml"


def make(name: str, work: Path, settings: list[str]) -> None:
    """Run a variant's recipe, where its command reads as a user's would."""
    given = [word for setting in ("vars.pairs=pairs.jsonl", *settings) for word in ("--set", setting)]
    optikit(work, "run", f"recipes/{recipe(name).name}", "--out", name, *given)


def optikit(work: Path, *words: str) -> None:
    """Run optikit in WORK with its own home."""
    home = {**os.environ, "OPTIKIT_HOME": str(work / "home")}
    subprocess.run([sys.executable, "-m", "optikit", *words], cwd=work, env=home, check=True)


def questions(pairs: Path, work: Path) -> int:
    """Write the questions that nothing was trained on; return how many there are."""
    records = [json.loads(line) for line in pairs.read_text(encoding="utf-8").splitlines()]
    held_out = records[int(HELD_OUT * len(records)) :]
    template = yaml.safe_load(recipe("base").read_text(encoding="utf-8"))["calibration"]["template"]
    asked = template.partition("{answer}")[0]
    lines = [json.dumps({"prompt": asked.format(**{k: each[k] for k in ("context", "question")})}) for each in held_out]
    (work / "questions.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return len(lines)


def compare(work: Path, requests: int, tokens: int, clients: str) -> dict[str, Any]:
    """Load all variants in turns."""
    price = yaml.safe_load(recipe("base").read_text(encoding="utf-8"))["cost"]["instance"]
    from optikit import targets

    usd = str(targets.rows()[price].usd_per_hour)
    limits = ["--usd-per-hour", usd, "--requests", str(requests), "--new-tokens", str(tokens), "--clients", clients]
    optikit(work, "bench", *VARIANTS, "--prompts", "questions.jsonl", "--out", "compared", *limits)
    found: dict[str, Any] = json.loads((work / "compared" / "bench.json").read_text(encoding="utf-8"))
    return found


def page(found: dict[str, Any], reports: dict[str, dict[str, Any]], count: int, settings: str) -> str:
    """Return the README of the record."""
    rows = [row for row in found["rows"] if row["load"] == found["rows"][0]["load"]]
    lines = [
        f"| [{row['variant']}]({row['variant']}/report.md) | {row['e2e_ms_mean']:.0f} | {row['e2e_ms_p50']:.0f} "
        f"| {_or_none(row['e2e_ms_p95'])} | {rows[0]['e2e_ms_mean'] / row['e2e_ms_mean']:.2f}× "
        f"| {reports[row['variant']]['result']['quality']['perplexity']['value']:.2f} "
        f"| {row['output_tokens_per_s']:.0f} | {row['usd_per_million_output_tokens']:.2f} |"
        for row in rows
    ]
    same = [
        f"- {each['variant']} against {each['against']}: {each['first_token']} of {each['prompts']} first tokens and "
        f"{each['whole']} of {each['prompts']} whole answers are the same."
        for each in found["identity"]
    ]
    return HEAD.format(
        settings=settings,
        commit=commit(),
        date=found["created"][:10],
        rows="\n".join(lines),
        load=f"{rows[0]['load']:g}",
        requests=rows[0]["requests"],
        count=count,
        tokens=found["new_tokens"],
        usd=found["usd_per_hour"],
        same="\n".join(same),
        machine=machine(reports["heads"]),
    )


def _or_none(value: float | None) -> str:
    return "–" if value is None else f"{value:.0f}"


HEAD = """# The article's three variants, on two CPU cores

`python tests/benchmarks/three_variants.py {settings}`, commit {commit}, {date}: the three recipes
`recipes/sql-three-variants-*-cpu.yaml`, each served by `optikit serve`, all under the same load in turns. AWS's
article asks 450 questions of a 7B model on a GPU; here it is SmolLM2-135M with 4-bit weights, {requests} requests at
each load, {count} held-out questions in turn, {tokens} tokens each. The questions are Spider's (dev, 16 of 20
databases) with their tables, not the article's records, which lie on a hub.

| {load} at a time | mean, ms | median, ms | p95, ms | sooner than base | perplexity | tokens/s | $ per M output |
|:--|--:|--:|--:|--:|--:|--:|--:|
{rows}

{same}

[bench.html](bench.html) has the curves over 1 to several clients, [bench.md](bench.md) the table; the price is
${usd}/h, as a c7i.xlarge. ![page](bench.png)

{machine}
"""


def main() -> None:
    """Make, load, record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=Path, required=True, help="JSON Lines of {question, context, answer}")
    parser.add_argument("--work", type=Path, required=True, help="directory for the store and the outputs")
    parser.add_argument("--requests", type=int, default=450)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--clients", default="1,4,8")
    parser.add_argument("--only-runs", action="store_true", help="make the variants, measure nothing")
    parser.add_argument("--skip-runs", action="store_true", help="they are in WORK already")
    parser.add_argument("--set", dest="settings", action="append", default=[], help="KEY=VALUE for every recipe")
    args = parser.parse_args()
    work, pairs = args.work.resolve(), args.pairs.resolve()
    work.mkdir(parents=True, exist_ok=True)
    (work / "recipes").mkdir(exist_ok=True)
    for name in VARIANTS:
        shutil.copyfile(recipe(name), work / "recipes" / recipe(name).name)
    shutil.copyfile(pairs, work / "recipes" / "pairs.jsonl")
    for name in () if args.skip_runs else VARIANTS:
        make(name, work, args.settings)
    if args.only_runs:
        return
    count = questions(pairs, work)
    found = compare(work, args.requests, args.tokens, args.clients)
    reports = {}
    for name in VARIANTS:
        (OUT / name).mkdir(parents=True, exist_ok=True)
        for file in KEPT:
            shutil.copyfile(work / name / file, OUT / name / file)
        reports[name] = json.loads((OUT / name / "report.json").read_text(encoding="utf-8"))
    for file in ("bench.json", "bench.md", "bench.html"):
        shutil.copyfile(work / "compared" / file, OUT / file)
    settings = f"--pairs pairs.jsonl --work WORK --requests {args.requests} --tokens {args.tokens}"
    settings += f" --clients {args.clients}" + "".join(f" --set {each}" for each in args.settings)
    (OUT / "README.md").write_text(page(found, reports, count, settings), encoding="utf-8")


if __name__ == "__main__":
    main()
