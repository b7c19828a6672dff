"""Families × techniques × engines: how far served logits are from transformers' own, in float32, with the same weights.

    python tests/benchmarks/catalogue.py --work DIR                writes examples/catalogue.md
    python tests/benchmarks/catalogue.py --work DIR --add gpt_oss  brings rows into it, or in the place of theirs

Every row of architectures.toml is built tiny and random by transformers' own classes and goes through each technique,
and what is written through each engine. The reference is transformers' model in float32 with the written weights,
which are unpacked here by slow code of their own. A cell is the largest difference of a logit on 48 tokens, over their
standard deviation; a refusal is its code, whose words stand below. Finished cells stay in DIR: a killed run goes on.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from optikit import host, runtime, stages, targets
from optikit.errors import OptikitError
from optikit.formats import census
from optikit.models import architectures
from optikit.models.facts import ModelFacts
from optikit.models.reader import read
from optikit.stage import Calibration, Changing, Job
from optikit.stages.compile import _genai_builder
from tests import mixtures
from tests.benchmarks import record
from tests.families import CONFIGS, save

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "examples" / "catalogue.md"
STAGES: Mapping[str, tuple[str, str, dict[str, Any]]] = {
    "rtn": ("quantize", "rtn", {"group_size": 32}),
    "gptq": ("quantize", "gptq", {"group_size": 32}),
    "awq": ("quantize", "awq", {"group_size": 32, "steps": 5}),
    "int8 w8a16": ("quantize", "int8", {"group_size": 32}),
    "int8 w8a8": ("quantize", "int8", {"scheme": "w8a8"}),
    "nf4": ("quantize", "nf4", {}),
    "sparsegpt": ("prune", "sparsegpt", {}),
    "wanda": ("prune", "wanda", {}),
    "magnitude": ("prune", "magnitude", {}),
    "width": ("prune", "width", {"multiple": 16, "importance": "contribution"}),
    "depth": ("prune", "depth", {"ratio": 0.5, "keep_last": 0}),
}
ON_ENGINES = ("dense", "gptq", "awq", "int8 w8a16", "wanda")
"""What is compiled, for the families that an engine knows."""
EXACT = {"accuracy_level": 1, "head": "float32", "embedding": "float32"}
"""How packed models are compiled, so that a cell shows arithmetic and no rounding that is asked for."""
EMBEDDINGS = ("float32", "int8", "int4")
UNPROVEN = ("gemma3_text", "nemotron", "olmo", "phi", "smollm3")
"""Families for which the builder has a class, and no row says so: they are built all the same, to tell why."""
TOKENS = np.random.default_rng(0).integers(3, 260, 48)
TEXT = " ".join(f"the {colour} house near the {word} stands." for colour in ("old", "green", "cold", "small")
                for word in ("river", "window", "water", "stone", "light")) * 8  # fmt: skip
AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


def bits_of(words: np.ndarray, bits: int) -> np.ndarray:
    """Return the codes in 32-bit words, (…, words · 32 / bits), lowest bits first."""
    shifted = [(words.astype(np.int64) >> (bits * place)) & (2**bits - 1) for place in range(32 // bits)]
    return np.stack(shifted, axis=-1).reshape(*words.shape[:-1], -1)


def unpacked(parts: Mapping[str, np.ndarray], settings: Mapping[str, Any], shape: tuple[int, int]) -> np.ndarray:
    """Return the weight (out, in) that packed tensors stand for, by the formats' own descriptions."""
    if settings["quant_method"] == "gptq":
        bits = settings["bits"]
        codes = bits_of(parts["qweight"].T, bits).T  # (in, out)
        zeros = bits_of(parts["qzeros"], bits) + 1
        group = parts["g_idx"]
        return ((codes - zeros[group]) * parts["scales"].astype(np.float32)[group]).T
    if settings["quant_method"] == "awq":
        codes, zeros = (
            bits_of(parts[name], 4).reshape(len(parts[name]), -1, 8)[:, :, AWQ_ORDER].reshape(len(parts[name]), -1)
            for name in ("qweight", "qzeros")
        )
        size = settings["group_size"] if settings["group_size"] > 0 else len(codes)
        group = np.arange(len(codes)) // size
        return ((codes - zeros[group]) * parts["scales"].astype(np.float32)[group]).T
    if settings["quant_method"] == "compressed-tensors":
        return parts["weight"].astype(np.float32) * parts["weight_scale"].astype(np.float32)
    state = json.loads(parts["weight.quant_state.bitsandbytes__nf4"].tobytes())
    packed = parts["weight"].reshape(-1)
    codes = np.stack([packed >> 4, packed & 15], axis=-1).reshape(-1)
    block = state["blocksize"]
    absmax = parts["weight.absmax"].astype(np.float32)
    if "weight.nested_absmax" in parts:
        nested = parts["weight.nested_absmax"].repeat(state["nested_blocksize"])[: len(absmax)]
        absmax = parts["weight.nested_quant_map"][parts["weight.absmax"]] * nested + state["nested_offset"]
    values = np.array(NF4, np.float32)[codes] * absmax.repeat(block)[: len(codes)]
    return values[: shape[0] * shape[1]].reshape(shape).astype(np.float32)


def reference(directory: Path, scratch: Path) -> np.ndarray:
    """Return transformers' logits in float32 with the weights of a directory, unpacked here."""
    from transformers import AutoModelForCausalLM

    told = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    settings = told.pop("quantization_config", None)
    dense = directory
    if settings is not None:
        dense = scratch / "reference"
        dense.mkdir(parents=True, exist_ok=True)
        (dense / "config.json").write_text(json.dumps(told), encoding="utf-8")
        save_file(unpacked_state(directory, settings), dense / "model.safetensors", {"format": "pt"})
    attention = "sdpa" if told["model_type"] == "falcon" and told.get("alibi") else "eager"
    model, found = AutoModelForCausalLM.from_pretrained(
        dense, dtype=torch.float32, attn_implementation=attention, output_loading_info=True
    )
    assert not found["unexpected_keys"]
    assert not found["missing_keys"]
    with torch.no_grad():
        return model.eval()(torch.from_numpy(TOKENS)[None], use_cache=False).logits[0].float().numpy()


def unpacked_state(directory: Path, settings: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Return the weights of a packed directory in float32, under their names in a dense checkpoint."""
    facts = read(directory)
    row = facts.architecture
    assert row is not None
    stored = load_file(directory / "model.safetensors")
    arrays = {name: t.float().numpy() if t.is_floating_point() else t.numpy() for name, t in stored.items()}
    named = {full: arrays[name] for name, full in row.full_names(list(arrays)).items()}
    for linear, shape in facts.linears.items():
        parts = {name.removeprefix(f"{linear}."): named.pop(name) for name in list(named)
                 if name.startswith(f"{linear}.") and name != f"{linear}.bias"}  # fmt: skip
        whole = unpacked(parts, settings, shape) if len(parts) > 1 else parts["weight"]
        named[f"{linear}.weight"] = whole.T if row.transposed and len(parts) > 1 else whole
    stack(named, facts)
    return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in named.items()}


def stack(named: dict[str, np.ndarray], facts: ModelFacts) -> None:
    """Join experts as checkpoints of granitemoe, gpt_oss and llama4_text have them; those of the others are alone."""
    joined = JOINED.get(facts.model_type)
    if joined is None:
        return
    base, whole, down, together = joined
    for block in range(facts.layers):
        prefix = f"model.layers.{block}.{base}"
        for leaf, ends in (("weight", (whole, down)), ("bias", (f"{whole}_bias", f"{down}_bias"))):
            names = [[f"{prefix}.experts.{expert}.{part}_proj.{leaf}" for part in ("gate", "up", "down")]
                     for expert in range(facts.experts)]  # fmt: skip
            parts = [[named.pop(name, None) for name in each] for each in names]
            if parts[0][0] is None:
                continue
            named[f"{prefix}.{ends[0]}"] = np.stack([together(*each[:2]) for each in parts])
            lying = facts.model_type != "granitemoe" and leaf == "weight"
            named[f"{prefix}.{ends[1]}"] = np.stack([each[2].T if lying else each[2] for each in parts])


def alternating(gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    """Return (in, 2 · out) of two (out, in), or (2 · out) of two (out), a column of each by turns."""
    return np.stack([gate, up], axis=1).reshape(2 * len(gate), *gate.shape[1:]).T


JOINED: Mapping[str, tuple[str, str, str, Callable[..., np.ndarray]]] = {
    "granitemoe": (
        "block_sparse_moe",
        "input_linear.weight",
        "output_linear.weight",
        lambda gate, up: np.concatenate([gate, up]),
    ),
    "gpt_oss": ("mlp", "experts.gate_up_proj", "experts.down_proj", alternating),
    "llama4_text": (
        "feed_forward",
        "experts.gate_up_proj",
        "experts.down_proj",
        lambda gate, up: np.concatenate([gate, up]).T,
    ),
}
"""Where blocks have experts, what holds gate and up of all, what holds down, and how gate and up are joined."""


def served(directory: Path) -> np.ndarray:
    """Return the logits that a runtime of optikit serves of a directory."""
    return np.asarray(runtime.load(directory, dtype="float32", threads=1).forward(TOKENS, 0))


def apart(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(one - other).max() / other.std())


def refusal(stage: Any, chosen: Any, facts: ModelFacts) -> dict[str, str]:
    """Return code and words of what refuses a stage on every target that could serve it; {} where one takes it."""
    found: dict[str, str] = {}
    for name in ("cpu", "l4"):
        problems = [p for p in stage.check(chosen, facts, targets.find(name)) if p.level == "error"]
        if not problems:
            return {}
        found = found or {"refused": problems[0].code, "why": f"{problems[0].message}; {problems[0].fix}"}
    return found


def cell(source: Path, place: Path, name: str) -> dict[str, Any]:
    """Run a technique; return how far what is served is from the reference, and how far both are from the source."""
    if name == "dense":
        written = source
        found: dict[str, Any] = {}
    else:
        verb, method, options = STAGES[name]
        stage, facts = stages.load(verb, method), read(source)
        chosen = stage.Options(**options)
        if refused := refusal(stage, chosen, facts):
            return refused
        for folder in ("model", "scratch"):
            shutil.rmtree(place / folder, ignore_errors=True)
            (place / folder).mkdir(parents=True)
        (place / "text.txt").write_text(TEXT, encoding="utf-8")
        written = place / "model"
        calibration = Calibration(text=place / "text.txt", samples=4, length=48)
        job = Job(source=source, dest=written, scratch=place / "scratch", calibration=calibration)
        facts_found = stage.run(chosen, job)
        changes = stage.CHANGES if isinstance(stage, Changing) else "all"
        found = {"tensors": census.take(source, written, changes, facts_found).facts()}
    wanted = reference(written, place)
    found |= {"transformers": apart(served(written), wanted), "moved": apart(wanted, reference(source, place))}
    if name in ON_ENGINES:
        found["onnxruntime"] = compiled(written, place, wanted)
    if name == "gptq" and source.parent.name == "llama":
        found["embeddings"] = {kind: compiled(written, place, wanted, embedding=kind) for kind in EMBEDDINGS}
    return found


def compiled(source: Path, place: Path, wanted: np.ndarray, **changes: Any) -> Any:
    """Return how far the graph's logits are from the reference, or what refuses it, or how it failed."""
    stage, facts = stages.load("compile", "onnxruntime"), read(source)
    chosen = stage.Options(**({} if facts.traits == {"dense"} else EXACT | changes))
    if refused := refusal(stage, chosen, facts):
        return refused
    try:
        return built(source, place, wanted, chosen)
    except OptikitError as error:
        return {"failed": int(error.code), "why": error.message}


def built(source: Path, place: Path, wanted: np.ndarray, chosen: Any) -> float:
    """Return how far a graph's logits are from the reference, on the tokens that its window allows."""
    dest = place / "compiled"
    shutil.rmtree(dest, ignore_errors=True)
    dest.mkdir(parents=True)
    stages.load("compile", "onnxruntime").run(chosen, Job(source=source, dest=dest, scratch=place / "compile-scratch"))
    right = TOKENS[: _genai_builder.window(read(source))]
    return apart(np.asarray(runtime.load(dest, threads=1).forward(right, 0)), wanted[: len(right)])


def unproven(source: Path, place: Path) -> dict[str, Any]:
    """Build what planning refuses; return how far its logits are, or the last words of what ended it."""
    chosen = stages.load("compile", "onnxruntime").Options()
    try:
        return {"apart": built(source, place, reference(source, place), chosen)}
    except (OptikitError, RuntimeError) as error:
        lines = str(error).strip().splitlines()
        return {"why": lines[-1].replace(str(source), "DIR")}


def cells(work: Path, families: list[str]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yield every cell, from the folder where it is done."""
    for family in families:
        source, place = work / family / "source", work / family / "place"
        if not (source / "tokenizer_config.json").is_file():
            (mixtures.save if family in mixtures.FAMILIES else save)(family, source)
        for name in ("dense", *STAGES, *(["unproven"] if family in UNPROVEN else [])):
            kept = work / family / f"{name.replace(' ', '-')}.json"
            if not kept.is_file():
                started = time.monotonic()
                try:
                    found = unproven(source, place) if name == "unproven" else cell(source, place, name)
                except OptikitError as error:
                    found = {"failed": int(error.code), "why": error.message}
                print(f"{family} {name} {time.monotonic() - started:.1f} s {found}", file=sys.stderr)
                kept.write_text(json.dumps(found | {"commit": record.commit()}), encoding="utf-8")
            yield family, name, json.loads(kept.read_text(encoding="utf-8"))


def told(value: Any) -> str:
    """Return a number, the code of a refusal, or – where nothing was to be done."""
    if value is None:
        return "–"
    if isinstance(value, dict):
        return f"`{value['refused']}`" if "refused" in value else f"**failed with {value['failed']}**"
    return "0" if value == 0 else f"{value:.0e}".replace("e-0", "e-").replace("e+00", "")


def served_by(engine: str, found: Mapping[str, Any]) -> str:
    return told(found if "why" in found else found.get(engine))


def moved(found: Mapping[str, Any]) -> str:
    return f"{found['moved']:.2f}" if "moved" in found else "–"


Cells = Mapping[tuple[str, str], dict[str, Any]]


def added(old: str, by: Cells) -> str:
    """Return the page with rows of families that it hadn't, or with new ones in the place of theirs."""
    families, sections = families_of(by), dict(section.split("\n", 1) for section in f"\n{old}".split("\n## "))
    known = [family for family in families if family in architectures.known_to("onnxruntime")]
    tables = {
        "Served by transformers": table(by, families, ("dense", *STAGES), partial(served_by, "transformers")),
        "Served by onnxruntime": table(by, known, ON_ENGINES, partial(served_by, "onnxruntime")),
        "How far each technique moves the logits": table(by, families, tuple(STAGES), moved),
    }
    for heading, rows in tables.items():
        sections[heading] = with_lines(sections[heading], rows[2:], "|")
    refusals = [f"- {code}: {why}" for code, why in words(by).items()]
    sections["Refusals and failures in words"] = with_lines(sections["Refusals and failures in words"], refusals, ":")
    first, text = next(iter(sections.items()))
    sections[first] = "\n".join((text.rstrip("\n"), *counts(by), ""))
    told = "\n## ".join("\n".join(each) for each in sections.items()).removeprefix("\n")
    refused = "".join(f", {family}" for family in families if family not in known and f", {family}" not in told)
    marked = "Refused when planning, `unknown-architecture`: "
    return (
        "\n".join(
            f"{line[:-1]}{refused}." if line.startswith(marked) else line for line in told.rstrip("\n").split("\n")
        )
        + "\n"
    )


def with_lines(section: str, lines: list[str], end: str) -> str:
    """Return a section with lines more, or in the place of those that begin as they do, up to the second `end`."""
    old = section.rstrip("\n").split("\n")
    for line in lines:
        start = line[: line.index(end, 1) + 1]
        at = next((index for index, each in enumerate(old) if each.startswith(start)), len(old))
        old[at : at + 1] = [line]
    return "\n".join((*old, ""))


def families_of(by: Cells) -> list[str]:
    return list(dict.fromkeys(family for family, _ in by))


def page(by: Cells) -> str:
    """Return the page: a table per engine, the words of refusals, and how far each technique moves the logits."""
    families = families_of(by)
    known = [family for family in families if family in architectures.known_to("onnxruntime")]
    lines = [*HEAD, *counts(by), "", "## Served by transformers", ""]
    lines += table(by, families, ("dense", *STAGES), partial(served_by, "transformers"))
    lines += ["", "## Served by onnxruntime", ""]
    lines += table(by, known, ON_ENGINES, partial(served_by, "onnxruntime"))
    lines += ["", *other_families(by, [family for family in families if family not in known]), ""]
    lines += [f"With other embeddings, of which int8 is the default for packed models: llama, gptq, {embeddings(by)}."]
    lines += ["", "## Refusals and failures in words", ""]
    lines += [f"- {code}: {why}" for code, why in words(by).items()]
    lines += ["", "## How far each technique moves the logits", ""]
    lines += ["Against the model before, with random weights (the worst case of any rounding).", ""]
    lines += table(by, families, tuple(STAGES), moved)
    return "\n".join(lines) + "\n"


def table(
    by: Cells, families: list[str], names: tuple[str, ...], shown: Callable[[Mapping[str, Any]], str]
) -> list[str]:
    lines = [f"| family | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    return lines + [
        f"| {family} | " + " | ".join(shown(by[family, name]) for name in names) + " |" for family in families
    ]


HEAD = (
    "# Families, techniques, engines",
    "",
    "Written by `python tests/benchmarks/catalogue.py --work DIR`: each family built tiny and random (two blocks,",
    "hidden 64) by transformers' own classes, through each technique, and what was written served by each engine.",
    "A cell is the largest difference of a logit over 48 tokens from transformers in float32 with the same",
    "weights, unpacked by the benchmark's own code, in standard deviations of the logits. A word in a cell is the",
    "code of what refuses it when planning; its words are below.",
    "",
    "`int8 w8a8` is served with inputs rounded to 8 bits, which its difference shows. In a mixture that rounding",
    "may choose another expert: with random routers a logit is then another altogether. On onnxruntime packed",
    "models have `accuracy_level: 1`, `head: float32` and `embedding: float32`, so that a cell shows arithmetic;",
    "dense ones have defaults. The builder leaves Mistral's window of 32 tokens out, which planning says: its",
    "cells are of 32 tokens. OpenVINO's exporter needs an environment that isn't built here. The reference attends",
    "in eager mode, but for falcon-rw: there transformers 5.24 adds ALiBi twice, to the mask and to the products,",
    "and logits are 7e-3 from those with `sdpa`, which adds it once. Language models that have no class of their own",
    "(`computed_as` in architectures.toml) are tried inside their wrappers, by tests/stages/test_wrapped.py.",
)


def counts(by: Cells) -> list[str]:
    """Return what was run, where, and the figures of the whole."""
    counted = [found["tensors"] for found in by.values() if "tensors" in found]
    total = sum(each["same"] + each["changed"] + each["replaced"] + sum(each["dropped"].values()) for each in counted)
    exact = [found for (_, name), found in by.items() if name != "int8 w8a8"]
    cells = [found for (_, name), found in by.items() if name != "unproven"]
    largest = max(found["transformers"] for found in exact if "transformers" in found)
    graphs = [found["onnxruntime"] for found in by.values() if isinstance(found.get("onnxruntime"), float)]
    failed = sum("failed" in each for each in refusing(by))
    commits = ", ".join(f"{name} ({count})" for name, count in Counter(each["commit"] for each in cells).most_common())
    versions = host.versions(("torch", "transformers", "onnxruntime", "onnxruntime-genai"))
    return [
        "",
        f"{len(families_of(by))} rows, {len(cells)} cells, {len(counted)} models written, {total} tensors accounted",
        f"for: none lost or strange. {failed} cells failed. Largest difference of what transformers serves, but for",
        f"`int8 w8a8`: {told(largest)}; of {len(graphs)} graphs on onnxruntime: {told(max(graphs, default=0.0))}.",
        f"Commits of the cells, where one may be as it was before a rebase: {commits}.",
        f"{host.cpu_model()}, one thread; Python {platform.python_version()}, "
        + ", ".join(f"{name} {version}" for name, version in versions.items())
        + ".",
    ]


def other_families(by: Cells, families: list[str]) -> Iterator[str]:
    """Yield which families aren't in the table of an engine, and why not those that its builder has a class for."""
    yield f"Refused when planning, `unknown-architecture`: {', '.join(families)}."
    yield ""
    yield "Of these the builder has classes for some, and was let build them all the same:"
    yield ""
    for family in families:
        if found := by.get((family, "unproven")):
            apart = f"logits {told(found['apart'])} apart" if "apart" in found else found["why"]
            yield f"- {family}: {apart}"


def embeddings(by: Cells) -> str:
    found = by.get(("llama", "gptq"), {}).get("embeddings", {})
    return ", ".join(f"`embedding: {kind}` is {told(value)} apart" for kind, value in found.items())


def refusing(by: Cells) -> list[dict[str, Any]]:
    """Return every refusal and failure, with its cell."""
    found = [(key, each) for key, whole in by.items() for each in (whole, whole.get("onnxruntime"))]
    return [each | {"cell": ", ".join(key)} for key, each in found
            if isinstance(each, dict) and {"refused", "failed"} & each.keys()]  # fmt: skip


def words(by: Cells) -> dict[str, str]:
    """Return code → the words of its first refusal, and cell → how it failed."""
    found: dict[str, str] = {}
    for each in refusing(by):
        if "failed" in each:
            found[each["cell"]] = f"ended with {each['failed']}: {each['why']}"
        else:
            found.setdefault(f"`{each['refused']}`", f"{each['why']} (here {each['cell']})")
    return found


def main() -> None:
    """Fill the matrix and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--add", default="", help="families, with commas between")
    arguments = parser.parse_args()
    families = arguments.add.split(",") if arguments.add else [*CONFIGS, *mixtures.FAMILIES]
    torch.set_num_threads(1)
    found = {(family, name): each for family, name, each in cells(arguments.work, families)}
    old = PAGE.read_text(encoding="utf-8") if arguments.add else ""
    PAGE.write_text(added(old, found) if arguments.add else page(found), encoding="utf-8")


if __name__ == "__main__":
    main()
