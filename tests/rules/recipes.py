"""Recipes out of cases.toml: the stack of a case as an author would write it, with a model that is only headers.

A case names facts, stages and words of serving; a recipe has a model directory, options, a target and servers. Words of
serving are options of the case's compile stage where it has them, and of an entry of `serve:` where not.
"""

from __future__ import annotations

import json
import struct
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from optikit.deploy.servers import SERVERS
from optikit.errors import RecipeError
from optikit.models import architectures, expected, traits
from optikit.plan.make import make_plan
from optikit.problems import Problem
from optikit.recipe.load import load
from optikit.rules import rules
from optikit.stages import load as load_stage
from optikit.store.store import Store
from tests.conftest import byte_tokenizer
from tests.rules import stacks

LARGE = {"hidden": 256, "intermediate": 704, "layers": 2, "heads": 32, "kv_heads": 8, "head_dim": 16, "vocab": 320}
SMALL = {**LARGE, "hidden": 128, "intermediate": 256, "layers": 1, "heads": 16, "kv_heads": 4}
KEYS = {
    "hidden": "hidden_size",
    "intermediate": "intermediate_size",
    "layers": "num_hidden_layers",
    "experts": "num_local_experts",
    "experts_chosen": "num_experts_per_tok",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "vocab": "vocab_size",
    "max_positions": "max_position_embeddings",
    "tied": "tie_word_embeddings",
    "sliding_window": "sliding_window",
    "model_type": "model_type",
    "eos": "eos_token_id",
    "bos": "bos_token_id",
}
"""Fact of a case → key of config.json."""
W8A8 = {
    "weights": {"num_bits": 8, "type": "int", "strategy": "channel"},
    "input_activations": {"num_bits": 8, "type": "int"},
}
STORED = {
    "int4_gptq": {"quant_method": "gptq", "bits": 4, "group_size": 64, "sym": True, "desc_act": False},
    "int8_gptq": {"quant_method": "gptq", "bits": 8, "group_size": 64, "sym": True, "desc_act": False},
    "int4_awq": {"quant_method": "awq", "bits": 4, "group_size": 64, "version": "gemm"},
    "nf4": {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "int8_w8a8": {"quant_method": "compressed-tensors", "format": "int-quantized", "config_groups": {"group_0": W8A8}},
}
"""Trait of a case → `quantization_config`."""
COMPILED = {
    "tensorrt-llm": {"engine": "tensorrt-llm"},
    "nxdi": {"engine": "neuron", "backend": "nxd-inference"},
    "optimum-neuron": {"engine": "neuron", "backend": "optimum-neuron"},
    "vllm-neuron": {"engine": "neuron", "backend": "vllm-neuron"},
}
"""Engine of a case without a compile stage → the stage that it comes from."""

NEURON = ("inf", "trn")
MADE_FOR = {"neuron": "optimum-neuron", "onnxruntime": "onnxruntime-genai"}
"""Engine of a compile stage → the server that loads what it writes, where it has another name."""
MACHINE = {"neuronx-cc": "2.21.33363.0", "gptqmodel": "7.1.0"}
"""Packages of the machine that plans, where a case doesn't say: rules about missing ones are cases of their own."""
TEXT = "The river runs under the old green window, and nobody counts the stones. " * 200
SELF = Path(__file__).parent
CASES = tomllib.loads((SELF / "cases.toml").read_text(encoding="utf-8"))
BY_HAND = tomllib.loads((SELF / "recipes.toml").read_text(encoding="utf-8"))

Case = Mapping[str, Any]
Tensor = tuple[str, tuple[int, ...], bytes]
"""Dtype, shape, data."""


def case_of(name: str) -> Case:
    """Return what a rule's recipe is made of: the row by hand, or else its case."""
    return {key: value for key, value in _row(name).items() if key != "near"}


def near_miss(name: str) -> Case:
    """Return the same with the changes that keep the rule from firing."""
    return stacks.near(dict(_row(name)))


def _row(name: str) -> Case:
    return BY_HAND.get(name) or CASES[name]


def fired(case: Case, directory: Path, *, device: str = "cuda") -> set[str]:
    """Write a case as a recipe, plan it, and return the ids of the rules that it breaks."""
    directory.mkdir(exist_ok=True)
    path, rows = directory / "recipe.yaml", targets(case)
    write_model(directory / "model", case.get("model", {}))
    if "draft" in case:
        write_model(directory / "draft", case["draft"], SMALL)
    (directory / "prose.txt").write_text(TEXT, encoding="utf-8")
    path.write_text(recipe(case), encoding="utf-8")
    extra = directory / "targets.toml" if rows else None
    if extra is not None:
        extra.write_text(rows, encoding="utf-8")
    try:
        plan = make_plan(load(path), Store(directory / "store"), extra_targets=extra, device=device)
        found: Sequence[Problem] = plan.warnings
    except RecipeError as error:
        found = error.problems
    return {each.code for each in found if each.code in rules() and each.source == rules()[each.code].source}


def recipe(case: Case) -> str:
    """Return the recipe of a case, beside which its model, draft and text lie."""
    target, serve = case.get("target", "cpu"), case.get("serve", {})
    written: dict[str, Any] = {"model": "model", "target": target if isinstance(target, str) else target["name"]}
    stages = list(_stages(case, written["target"], serve))
    if case.get("calibrated", True) and any({"prune", "finetune", "quantize"} & stage.keys() for stage in stages):
        written["calibration"] = {"text": "prose.txt", "samples": 4, "length": 32}
    gates = {name: {"max": 2.0} for name in case.get("gates", ())}
    evaluate = {"perplexity": {"text": "prose.txt"}} if gates else {}
    served = case.get("served") or _servers(case, stages)
    found = written | {"stages": stages, "serve": served, "evaluate": evaluate, "gates": gates}
    return yaml.safe_dump({key: value for key, value in found.items() if value}, sort_keys=False, width=110)


def _servers(case: Case, stages: Sequence[Mapping[str, Any]]) -> list[Any]:
    """Return the entry of `serve` that a case needs for words that its compile stage has no options for, if any."""
    compiled = next((stage["compile"] for stage in stages if "compile" in stage), {})
    told = {name: value for name, value in _told(case).items() if compiled.get(name) != value}
    engine = told.pop("engine", "")
    if compiled and not told and (engine == "" or engine in COMPILED):
        return []
    own = compiled.get("backend") or MADE_FOR.get(compiled.get("engine", ""), compiled.get("engine", ""))
    name = next((name for name, row in SERVERS.items() if row.engine == engine), own)
    if not name:
        return []
    return [{"server": name, **told} if told else name]


def _told(case: Case) -> dict[str, Any]:
    """Return a case's words of serving, with those of a compile stage for a backend that is a server here."""
    words = dict(case.get("serve", {}))
    for line in case.get("stages", []):
        name, *options = line.split()
        if name == "compile.onnxruntime" and "backend=onnxruntime-genai" in options:
            found = (word.partition("=") for word in options)
            words |= {key: _value(key, value) for key, _, value in found if key != "backend"}
            words["engine"] = "onnxruntime-genai"
    return words


def targets(case: Case) -> str:
    """Return the rows of targets that a case brings along, as TOML."""
    row = case.get("target", "cpu")
    if isinstance(row, str):
        return ""
    return f"[{row['name']}]\n" + "".join(f"{k} = {json.dumps(v)}\n" for k, v in row.items() if k != "name")


def _stages(case: Case, target: str, serve: Case) -> Iterator[dict[str, Any]]:
    """Yield the stages of a case; words of serving are options of its compile stage, which they may call for."""
    lines = [line.split() for line in case.get("stages", [])]
    for name, *words in lines:
        verb, _, method = name.partition(".")
        written = {"engine" if verb == "compile" else "method": method}
        written |= {key: _value(key, value) for key, _, value in (word.partition("=") for word in words)}
        if verb == "compile":
            written |= _words(method, serve)
        if written.get("backend") == "onnxruntime-genai":
            written = {"engine": "onnxruntime"}
        if "backend" in written:
            written["backend"] = COMPILED.get(written["backend"], written)["backend"]
        if verb == "speculate":
            written |= {"prompts": "prose.txt"} | ({"model": "draft"} if method == "draft" and "draft" in case else {})
        yield {verb: written}
    engine = COMPILED.get(serve.get("engine", ""), {"engine": "neuron"} if _on_neuron(target, serve) else {})
    if engine and not any(name.startswith("compile.") for name, *_ in lines):
        yield {"compile": engine | _words(engine["engine"], serve)}


def _on_neuron(target: str, serve: Case) -> bool:
    return target.startswith(NEURON) and bool(serve) and serve.get("engine", "neuron") == "neuron"


def _value(key: str, text: str) -> Any:
    return text if key in {"sdk", "version"} else yaml.safe_load(text)


def _words(engine: str, serve: Mapping[str, Any]) -> dict[str, Any]:
    """Return the words of serving that are options of the compile stage."""
    known = load_stage("compile", engine).Options.model_fields
    return {name: value for name, value in serve.items() if name in known}


def write_model(directory: Path, changes: Mapping[str, Any], base: Mapping[str, int] = LARGE) -> None:
    """Write config.json, tokenizer.json and a safetensors file of zeros for a llama-like model."""
    directory.mkdir(parents=True)
    facts: dict[str, Any] = {**base, "model_type": "llama", "max_positions": 4096, "tied": False, "bos": 1, "eos": 2}
    facts |= changes
    config = {key: facts[name] for name, key in KEYS.items() if name in facts}
    trait = next((trait for trait in changes.get("traits", []) if trait in STORED), "")
    if trait or "quantization" in changes:
        config["quantization_config"] = STORED.get(trait, {}) | changes.get("quantization", {})
    (directory / "config.json").write_text(json.dumps(config))
    _write_tokenizer(directory, changes.get("tokenizer", "same"))
    _write(directory / "model.safetensors", dict(_tensors(facts, config, trait)))


def _write_tokenizer(directory: Path, name: str) -> None:
    """Write a tokenizer of bytes; any name but `same` stands for another one."""
    byte_tokenizer(directory)
    if name != "same":
        path = directory / "tokenizer.json"
        content = json.loads(path.read_text())
        content["normalizer"] = {"type": "Lowercase"}
        path.write_text(json.dumps(content))


def _tensors(facts: Mapping[str, Any], config: Mapping[str, Any], trait: str) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor that such a model has; of packed linears, what planning reads has its shape."""
    architecture = architectures.find(facts["model_type"]) or architectures.find("llama")
    dtype = facts.get("dtype", "F16")
    settings = {**config, "tie_word_embeddings": facts["tied"]}
    sizes = {**facts, "expert_width": facts["intermediate"]}
    for name, shape in expected.tensors(architecture, sizes, settings).items():
        linear = name.removesuffix(".weight")
        if trait and linear.endswith(tuple(architecture.linears)) and name != linear:
            packed = dict.fromkeys(traits.rows()[trait].suffixes, _zeros("F16", 1))
            packed |= _packed(shape, trait, config["quantization_config"])
            yield from ((f"{linear}.{suffix}", tensor) for suffix, tensor in packed.items())
        else:
            yield name, _zeros(dtype, *shape)


def _packed(shape: tuple[int, ...], trait: str, settings: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the tensors of a packed linear, by the settings of its format."""
    rows, columns = shape
    if trait == "nf4":
        state = json.dumps({"shape": list(shape)}).encode()
        packed = {"weight": _zeros("U8", rows * columns // 2, 1)}
        return packed | {"weight.quant_state.bitsandbytes__nf4": ("U8", (len(state),), state)}
    if trait == "int8_w8a8":
        return {"weight": _zeros("I8", rows, columns), "weight_scale": _zeros("F16", rows, 1)}
    codes = 32 // settings["bits"]
    groups = columns // settings["group_size"]
    grid = {"qzeros": _zeros("I32", groups, rows // codes), "scales": _zeros("F16", groups, rows)}
    if trait == "int4_awq":
        return grid | {"qweight": _zeros("I32", columns, rows // codes)}
    return grid | {"qweight": _zeros("I32", columns // codes, rows), "g_idx": _zeros("I32", columns)}


def _zeros(dtype: str, *shape: int) -> Tensor:
    size = {"BF16": 2, "F16": 2, "F32": 4, "I8": 1, "U8": 1, "I32": 4}[dtype]
    for each in shape:
        size *= each
    return dtype, shape, bytes(size)


def _write(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file."""
    header, at = {}, 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + len(data)]}
        at += len(data)
    text = json.dumps(header).encode()
    path.write_bytes(b"".join([struct.pack("<Q", len(text)), text, *(data for _, _, data in tensors.values())]))
