"""Stacks out of cases.toml: facts of a 7 B llama, changed as a case says."""

from __future__ import annotations

import copy
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

from optikit.models.facts import ModelFacts
from optikit.rules import Placed, Stack
from optikit.targets import Target, rows

CASES = tomllib.loads((Path(__file__).parent / "cases.toml").read_text(encoding="utf-8"))

LARGE = {"hidden": 4096, "intermediate": 11008, "layers": 32, "heads": 32, "kv_heads": 8, "head_dim": 128}
SMALL = {"hidden": 2048, "intermediate": 5632, "layers": 22, "heads": 32, "kv_heads": 4, "head_dim": 64}

TRAITS = {
    "gptq": "int4_gptq",
    "awq": "int4_awq",
    "int8": "int8_w8a8",
    "wanda": "sparse_unstructured",
    "depth": "shortened",
    "width": "narrowed",
    "lora": "finetuned",
    "medusa2": "finetuned",
    "medusa": "medusa_heads",
    "draft": "draft_model",
    "lookup": "prompt_lookup",
    "onnxruntime": "onnx",
    "openvino": "openvino",
    "llama-cpp": "gguf",
}


def facts(changes: dict[str, Any], *, base: dict[str, int] = LARGE) -> ModelFacts:
    values: dict[str, Any] = {**base, "vocab": 32000, "max_positions": 4096, "tied": False, "dtype": "F16", **changes}
    config = {"bos_token_id": 1, "eos_token_id": values.pop("eos", 2)}
    if "quantization" in values:
        config["quantization_config"] = values.pop("quantization")
    first = values.pop("first_intermediate", values["intermediate"])
    made = ModelFacts(
        **{
            "model_type": "llama",
            "weight_bytes": 0,
            "tokenizer_sha256": values.pop("tokenizer", "same"),
            "traits": frozenset(values.pop("traits", ["dense"])),
            "linears": linears(values, first),
            "config": config,
            **values,
        }
    )
    return made if made.weight_bytes else replace(made, weight_bytes=2 * made.parameters)


def linears(values: dict[str, Any], first: int) -> dict[str, tuple[int, int]]:
    hidden, width = values["hidden"], values["heads"] * values["head_dim"]
    found = {}
    for layer in range(values["layers"]):
        inner = first if layer == 0 else values["intermediate"]
        shapes = {"q_proj": (width, hidden), "k_proj": (values["kv_heads"] * values["head_dim"], hidden)}
        shapes |= {"o_proj": (hidden, width), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}
        shapes |= {"v_proj": shapes["k_proj"], "gate_proj": shapes["up_proj"]}
        found |= {f"model.layers.{layer}.{name}": shape for name, shape in shapes.items()}
    return found


def stack(case: dict[str, Any]) -> Stack:
    model = facts(case.get("model", {}))
    return Stack(
        stages=tuple(placed(case.get("stages", []), model, case.get("model", {}))),
        target=target(case.get("target", "cpu")),
        model=model,
        draft=facts(case["draft"], base=SMALL) if "draft" in case else None,
        serve=case.get("serve", {}),
        packages=case.get("packages"),
        host=case.get("host", {}),
        gates=case.get("gates", ()),
    )


def target(named: str | dict[str, Any]) -> Target:
    return rows()[named] if isinstance(named, str) else Target(**named)


def placed(lines: list[str], model: ModelFacts, changes: dict[str, Any]) -> list[Placed]:
    before, found = model, []
    for line in lines:
        name, *words = line.split()
        verb, method = name.split(".")
        options = dict(word.split("=") for word in words)
        backend = options.pop("backend", "optikit")
        after = {key.removeprefix("after."): value(options.pop(key)) for key in list(options) if "after." in key}
        typed = {key: value(text) for key, text in options.items()}
        result = facts({**changes, **after}) if after else before
        result = replace(result, traits=traits(verb, method, typed, before))
        found.append(Placed(verb=verb, method=method, backend=backend, options=typed, before=before, after=result))
        before = result
    return found


def traits(verb: str, method: str, options: dict[str, Any], before: ModelFacts) -> frozenset[Any]:
    trait = "int8_gptq" if method == "gptq" and options.get("bits") == 8 else TRAITS.get(method)
    trait = f"fp8_{options.get('scheme', 'dynamic')}" if method == "fp8" else trait
    trait = f"{options.get('scheme', 'nvfp4')}_packed" if method == "fp4" else trait
    new = {trait} if trait else set()
    return frozenset(new if verb == "quantize" else before.traits | new)


def value(text: str) -> Any:
    if text in {"true", "false"}:
        return text == "true"
    if text.isdigit():
        return int(text)
    return text if text.count(".") != 1 or text.startswith("2.") else as_number(text)


def as_number(text: str) -> Any:
    try:
        return float(text)
    except ValueError:
        return text


def near(case: dict[str, Any]) -> dict[str, Any]:
    """Return a case with the changes of its near miss."""
    changes = copy.deepcopy(case["near"])
    drops = changes.pop("drop", [])
    merged = merge({key: value for key, value in case.items() if key != "near"}, changes)
    for path in drops:
        *parents, last = path.split(".")
        inner = merged
        for parent in parents:
            inner = inner[parent]
        del inner[last]
    return merged


def merge(left: dict[str, Any], right: dict[str, Any]) -> dict[str, Any]:
    merged = copy.deepcopy(left)
    for key, new in right.items():
        old = merged.get(key)
        merged[key] = merge(old, new) if isinstance(old, dict) and isinstance(new, dict) else new
    return merged
