"""The rules as a page of Markdown: `optikit explain --list --markdown > examples/rules.md`."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

from optikit.rules.conditions import describe
from optikit.rules.engine import Rule, rules

FAMILIES = {
    "order": "Order of stages",
    "quantize": "Quantization",
    "prune": "Pruning",
    "target": "Engines and devices",
    "parallel": "Several accelerators",
    "neuron": "AWS Neuron",
    "nxdi": "AWS Neuron: NxD Inference",
    "optimum-neuron": "AWS Neuron: optimum-neuron",
    "vllm-neuron": "AWS Neuron: vLLM plugin",
    "trtllm": "TensorRT-LLM",
    "cuda": "TensorRT",
    "vllm": "vLLM",
    "lmi": "SageMaker LMI",
    "tgi": "Text Generation Inference",
    "llamacpp": "llama.cpp",
    "openvino": "OpenVINO",
    "onnxruntime": "ONNX Runtime",
    "draft": "Draft models",
    "speculate": "Speculation",
    "medusa": "Medusa",
}
"""Headings by what a rule's id begins with."""


def family(rule: Rule) -> str:
    """Return the heading that a rule stands under: that of the longest family its id begins with."""
    fitting = [name for name in FAMILIES if rule.id.startswith(f"{name}-")]
    return FAMILIES[max(fitting, key=len)]


def markdown() -> str:
    """Return every rule with its reason, fix, condition and source."""
    order = list(dict.fromkeys(FAMILIES.values()))
    ordered = sorted(rules().values(), key=lambda rule: order.index(family(rule)))
    lines = [
        "# Rules",
        "",
        f"{len(ordered)} rules, checked before any weight is loaded. Generated from `optikit/rules/compat.toml` by",
        "`optikit explain --list --markdown`; words in braces are filled in from the recipe.",
    ]
    for heading, group in groupby(ordered, key=family):
        lines += ["", f"## {heading}"]
        for rule in group:
            lines += _entry(rule)
    return "\n".join(lines) + "\n"


def _entry(rule: Rule) -> Iterator[str]:
    yield ""
    yield f"### `{rule.id}` ({rule.level})"
    yield ""
    yield f"{_escaped(rule.why)}."
    yield ""
    yield f"- **Fix:** {_escaped(rule.fix)}"
    yield f"- **When:** {'; '.join(f'`{line}`' for line in describe(rule.when))}"
    yield f"- **Source:** {_escaped(rule.source)} (read {rule.date})"


def _escaped(text: str) -> str:
    """Keep words such as `<engine>` and `*_ASYM` from being read as markup; code in backquotes stays."""
    parts = text.split("`")
    parts[::2] = [part.replace("<", "&lt;").replace("*", "\\*").replace("_", "\\_") for part in parts[::2]]
    return "`".join(parts)
