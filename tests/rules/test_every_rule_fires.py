"""For every rule a recipe that fires it, through `load` and `make_plan`, or the reason why none can yet.

The page examples/rules_fired.md shows the recipes: python tests/benchmarks/rules_fired.py
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest

from optikit import host, stages
from optikit.recipe.schema import Recipe
from optikit.rules import rules

spec = importlib.util.spec_from_file_location("recipes", Path(__file__).with_name("recipes.py"))
recipes = importlib.util.module_from_spec(spec)
spec.loader.exec_module(recipes)


def _speculate_options() -> set[str]:
    loaded = [stages.load("speculate", method).Options for method in stages.methods("speculate")]
    return {name for options in loaded for name in options.model_fields}


SERVE = "needs a `serve:` section, which says what serves the artifact and how"
EAGLE = "needs `speculate: {method: eagle3}`"
ACCEPTOR = "needs `acceptor` as an option of speculate stages"
FLOATS = "needs fp4 weights: no stage writes them, and those of a source are dequantized"
COME: dict[str, Callable[[], bool]] = {
    SERVE: lambda: "serve" in Recipe.model_fields,
    EAGLE: lambda: "eagle3" in stages.methods("speculate"),
    ACCEPTOR: lambda: "acceptor" in _speculate_options(),
    FLOATS: lambda: bool({"nvfp4", "mxfp4"} & set(stages.methods("quantize"))),
}
"""Whether what a reason waits for is there; then its rules have to fire, or go."""

OUT_OF_REACH = {
    **dict.fromkeys(
        (
            "vllm-neuron-quantization-flag",
            "neuron-serve-shapes",
            "optimum-neuron-speculation-chunked-prefill",
            "neuron-draft-tensor-parallel",
            "nxdi-nki-kernels",
            "optimum-neuron-vllm-trn2",
            "vllm-shard-group",
            "vllm-heads",
            "vllm-quantization-flag",
            "vllm-medusa-removed",
            "vllm-draft-gap",
            "vllm-draft-tensor-parallel",
            "vllm-draft-tensor-parallel-equal",
            "vllm-speculative-key",
            "vllm-speculative-tokens",
            "lmi-medusa-removed",
            "lmi-neuron",
            "lmi-draft-key",
            "tgi-maintenance",
            "tgi-draft-model",
            "tgi-medusa-heads",
            "tgi-medusa-shared-layers",
            "tgi-medusa-shared-head",
            "openvino-assistant-both",
            "llamacpp-quantized-greedy",
            "gguf-k-quants",
            "onnxruntime-genai-medusa",
            "onnxruntime-genai-batch",
            "onnxruntime-genai-draft-provider",
            "onnxruntime-genai-lookup-range",
        ),
        SERVE,
    ),
    **dict.fromkeys(("vllm-neuron-speculation-sampling", "vllm-neuron-speculation-async", "eagle-rotated"), EAGLE),
    **dict.fromkeys(("vllm-neuron-mxfp4", "trtllm-fp4-blackwell"), FLOATS),
    "speculate-lossy": ACCEPTOR,
}
"""Rules that no recipe can fire yet, with what they wait for. It only ever shrinks."""


@pytest.mark.parametrize("name", rules())
def test_a_recipe_fires_every_rule_that_is_not_out_of_reach(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = recipes.case_of(name)
    here = host.describe()
    monkeypatch.setattr(host, "describe", lambda: here | case.get("host", {}))  # the machine is an input, too
    found = recipes.fired(case, tmp_path)
    if name in OUT_OF_REACH:
        assert name not in found, f"a recipe fires {name} now: take it off the list"
    else:
        assert name in found, f"no recipe fires {name}: {sorted(found)}\n{recipes.recipe(case)}"


@pytest.mark.parametrize("reason", COME)
def test_what_rules_wait_for_has_not_come(reason: str) -> None:
    waiting = sorted(name for name, why in OUT_OF_REACH.items() if why == reason)
    assert not COME[reason](), f"teach recipes.py to write it, and take these off the list, or out: {waiting}"


def test_only_rules_are_listed() -> None:
    assert OUT_OF_REACH.keys() <= rules().keys()
    assert recipes.BY_HAND.keys() <= rules().keys() - OUT_OF_REACH.keys()
