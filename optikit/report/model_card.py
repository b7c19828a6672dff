"""README.md of a published model: what a hub shows, made from report and recipe; no figure but measured ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import yaml

from optikit import text
from optikit.evaluation.results import Report
from optikit.report import gates, markdown, wording
from optikit.report.headline import headline

RESULTS = "## Results"


def render(report: Report, recipe: str, *, licence: str, serving: Sequence[tuple[str, str]]) -> str:
    """Return the card.

    Args:
        report: Of the run.
        recipe: Its recipe, verbatim.
        licence: Of the base model, as hubs name it; "" where nobody said.
        serving: Name and command of each way to run it.
    """
    front = yaml.safe_dump(_front(report, licence), sort_keys=False, allow_unicode=True)
    return f"---\n{front}---\n\n" + "\n".join(_lines(report, recipe, licence=licence, serving=serving)) + "\n"


def base(report: Report) -> str:
    """Return the base model's name on the hub, or "" where it came from elsewhere."""
    source = str(report.model.get("source", ""))
    return source.removeprefix("hf:").split("@")[0] if source.startswith("hf:") else ""


def _front(report: Report, licence: str) -> dict[str, Any]:
    front: dict[str, Any] = {"pipeline_tag": "text-generation", "tags": ["optikit", *_methods(report)]}
    if licence:
        front["license"] = licence
    if base(report):
        front |= {"base_model": base(report), "base_model_relation": "quantized"}
    metrics = list(_metrics(report))
    if metrics:
        task = {"type": "text-generation"}
        result = {"task": task, "dataset": {"name": "see Results", "type": "text"}, "metrics": metrics}
        front["model-index"] = [{"name": wording.model_name(report), "results": [result]}]
    return front


def _methods(report: Report) -> list[str]:
    names = (f"{step.method or step.verb}" for step in report.steps)
    return list(dict.fromkeys(text.clean(name) for name in names))


def _metrics(report: Report) -> Iterator[dict[str, Any]]:
    quality = report.result.quality
    if quality is not None and quality.perplexity is not None:
        yield {"type": "perplexity", "value": round(quality.perplexity.value, 4), "name": quality.perplexity.protocol}


def _lines(report: Report, recipe: str, *, licence: str, serving: Sequence[tuple[str, str]]) -> Iterator[str]:
    yield f"# {markdown.escape(wording.model_name(report))}, optimized by optikit"
    yield ""
    yield f"**{markdown.escape(headline(report))}**"
    yield ""
    yield markdown.escape(gates.sentence(report))
    yield ""
    yield "## How to run it"
    yield ""
    for name, command in serving:
        yield f"{markdown.escape(name)}:"
        yield from ("", "```sh", command, "```", "")
    yield RESULTS
    yield ""
    yield from _results(report)
    yield "## How it was made"
    yield ""
    yield f"From {markdown.code(str(report.model.get('source', '')))}, by this recipe, which `optikit run` repeats:"
    yield ""
    fence = "```" if "```" not in recipe else "~~~~"
    yield from (f"{fence}yaml", recipe.rstrip("\n"), fence, "")
    yield "## Limits"
    yield ""
    yield from (f"- {markdown.escape(each)}" for each in limits(report, licence))


def _results(report: Report) -> Iterator[str]:
    body = markdown.render(report)
    yield from (line.replace("## ", "### ", 1) if line.startswith("## ") else line for line in body.splitlines())


def limits(report: Report, licence: str) -> tuple[str, ...]:
    """Return what a user of the model has to know."""
    found = [
        "Figures hold for the machine, texts and lengths named above, and for no others.",
        *(text.clean(each) for each in report.warnings),
        *(f"Not measured: {reason}" for reason in wording.reasons(report)),
    ]
    if not licence:
        found.append("The licence of the base model isn't recorded here: what it allows holds for this one, too.")
    return tuple(found)
