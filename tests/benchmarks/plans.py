"""Captures of `optikit plan`: stacks for several targets, and one broken recipe per family of rules with its repair.

    python tests/benchmarks/plans.py            # writes examples/plans/*.txt, examples/broken/*.txt and *.fixed.yaml
    python tests/benchmarks/plans.py --models D # only writes the models that these recipes name, into D
    python tests/benchmarks/plans.py --times    # measures how long each plan takes, and writes examples/plans/times.md

The models are shapes: the configuration of the model that the name says and the headers of all its tensors in a file
of the right size without contents, which planning never reads. So a 70 B model is planned on a laptop.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import resource
import shutil
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PLANS, BROKEN = ROOT / "examples" / "plans", ROOT / "examples" / "broken"
FIXED = ".fixed.yaml"

LLAMA = {
    "model_type": "llama",
    "vocab_size": 32000,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "torch_dtype": "float16",
}
SHAPES: dict[str, dict[str, Any]] = {
    "llama-2-70b": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64}
    | {"num_key_value_heads": 8, "max_position_embeddings": 4096},
    "llama-2-7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
    | {"num_key_value_heads": 32, "max_position_embeddings": 4096},
    "tinyllama-1.1b": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22}
    | {"num_attention_heads": 32, "num_key_value_heads": 4, "max_position_embeddings": 4096},
    "mistral-7b-v0.1": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
    | {"num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 32768}
    | {"model_type": "mistral", "sliding_window": 4096},
    "mixture-74b": {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 46, "head_dim": 128}
    | {"num_attention_heads": 64, "num_key_value_heads": 4, "max_position_embeddings": 40960, "vocab_size": 151936}
    | {"model_type": "qwen3_moe", "num_experts": 80, "num_experts_per_tok": 8, "moe_intermediate_size": 1536}
    | {"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []},
}
"""What the published config.json of each says of shapes; the mixture's figures are between those of Qwen3-30B-A3B and
Qwen3-235B-A22B."""
CLASSES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM"}
TOKENIZER = {
    "pre_tokenizer": {"type": "Whitespace"},
    "model": {"type": "WordLevel", "vocab": {"river": 0, "<unk>": 1}, "unk_token": "<unk>"},
}
"""One for all: a token per word. No plan here depends on more than how many there are, and that it is the same."""


def write_models(directory: Path, shapes: Mapping[str, dict[str, Any]] = SHAPES) -> None:
    """Write every shape into `directory`, and texts beside them."""
    for name, shape in shapes.items():
        place = directory / name
        place.mkdir(parents=True, exist_ok=True)
        config = LLAMA | {"tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2} | shape
        config["architectures"] = [CLASSES[config["model_type"]]]
        (place / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
        (place / "tokenizer.json").write_text(json.dumps(TOKENIZER), encoding="utf-8")
        _write_weights(place / "model.safetensors", config)
    (directory / "calibration.txt").write_text("The river is cold. " * 4000, encoding="utf-8")
    lines = [json.dumps({"prompt": f"Tell me of river number {index}. " + "It is cold. " * 300}) for index in range(64)]
    (directory / "prompts.jsonl").write_text("\n".join(lines), encoding="utf-8")


def _write_weights(path: Path, config: Mapping[str, Any]) -> None:
    """Write the headers of all tensors, and as many bytes as they promise, without contents."""
    entries, offset = {}, 0
    for name, shape in _tensors(config):
        size = 2
        for length in shape:
            size *= length
        entries[name] = {"dtype": "F16", "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    header = json.dumps(entries, separators=(",", ":")).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + offset)


def _tensors(config: Mapping[str, Any]) -> Iterator[tuple[str, list[int]]]:
    hidden, inner, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    head = config.get("head_dim", hidden // config["num_attention_heads"])
    across, width = head * config["num_attention_heads"], head * config["num_key_value_heads"]
    expert = config.get("moe_intermediate_size", inner)
    parts = [f".experts.{index}" for index in range(config.get("num_experts", 0))] or [""]
    yield "model.embed_tokens.weight", [vocab, hidden]
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield f"{at}.{name}.weight", [hidden]
        rows = {"q": [across, hidden], "k": [width, hidden], "v": [width, hidden], "o": [hidden, across]}
        yield from ((f"{at}.self_attn.{name}_proj.weight", rows[name]) for name in rows)
        if "num_experts" in config:
            yield from ((f"{at}.self_attn.{name}_norm.weight", [head]) for name in ("q", "k"))
            yield f"{at}.mlp.gate.weight", [config["num_experts"], hidden]
        for part in parts:
            yield from ((f"{at}.mlp{part}.{name}_proj.weight", [expert, hidden]) for name in ("gate", "up"))
            yield f"{at}.mlp{part}.down_proj.weight", [hidden, expert]
    yield "model.norm.weight", [hidden]
    yield "lm_head.weight", [vocab, hidden]


def command(*arguments: str) -> tuple[int, str]:
    """Run a command line in this process; return its exit code, and all that it printed, in order."""
    from optikit.cli.app import main

    printed = io.StringIO()
    before, sys.argv = sys.argv, ["optikit", *arguments]
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            main()
        code: Any = 0
    except SystemExit as ended:
        code = ended.code
    finally:
        sys.argv = before
    return int(code or 0), printed.getvalue()


@contextlib.contextmanager
def workplace(directory: Path) -> Iterator[Path]:
    """Work in a directory with the models in it and a store of its own, on a machine of a TiB; yields it."""
    from optikit import host
    from optikit.rules import repair

    repair.SECONDS = 600.0  # what is found is not to depend on how busy the machine is
    own, host.memory_bytes = host.memory_bytes, lambda: 2**40  # nor on how large it is
    before, home = Path.cwd(), os.environ.get("OPTIKIT_HOME")
    write_models(directory)
    os.environ["OPTIKIT_HOME"] = str(directory / "home")
    os.chdir(directory)
    try:
        yield directory
    finally:
        os.chdir(before)
        host.memory_bytes = own
        os.environ.pop("OPTIKIT_HOME")
        if home is not None:
            os.environ["OPTIKIT_HOME"] = home


def capture_plan(recipe: Path, directory: Path) -> str:
    """Return what `optikit plan` says of a recipe, with the command before it."""
    shutil.copy(recipe, directory / recipe.name)
    code, printed = command("plan", recipe.name)
    if code:
        raise SystemExit(f"{recipe.name} doesn't plan:\n{printed}")
    return f"$ optikit plan {recipe.name}\n{printed}"


def capture_broken(recipe: Path, directory: Path) -> tuple[str, str]:
    """Return what a broken recipe is told, as a capture, and what `--fix` (or `--unsafe-fixes`) wrote."""
    copy = directory / recipe.name
    shutil.copy(recipe, copy)
    code, printed = command("plan", copy.name)
    fixed, _ = command("plan", "--fix", copy.name)
    if fixed:
        fixed, _ = command("plan", "--fix", "--unsafe-fixes", copy.name)
    again, _ = command("plan", copy.name)
    if code != 65 or fixed or again:
        raise SystemExit(f"{recipe.name}: exit codes {code}, then {fixed} and {again}, not 65, 0, 0:\n{printed}")
    return f"$ optikit plan {recipe.name}\n{printed}$ echo $?\n{code}\n", copy.read_text(encoding="utf-8")


REPETITIONS = 9


def times(directory: Path) -> str:
    """Return a page with the time that each plan takes from the shell, as its user waits for it."""
    from optikit import __version__, host

    rows = []
    compiled = {**os.environ, "PYTHONPYCACHEPREFIX": str(directory / "pycache")}
    compiled.pop("PYTHONDONTWRITEBYTECODE", None)  # an installed package has its byte code
    for recipe in sorted(PLANS.glob("*.yaml")):
        shutil.copy(recipe, directory / recipe.name)
        model = recipe.read_text(encoding="utf-8").partition("model: ")[2].split()[0]
        said = [sys.executable, "-m", "optikit", "plan", recipe.name]
        _processor_seconds(said, compiled)  # compiles modules
        clock, used = [], []
        for _ in range(REPETITIONS):
            started = time.monotonic()
            used.append(_processor_seconds(said, compiled))
            clock.append(time.monotonic() - started)
        gigabytes = sum(path.stat().st_size for path in (directory / model).iterdir()) / 1e9
        least, median = min(clock), statistics.median(clock)
        figures = f"{least:.2f} | {median:.2f} | {min(used):.2f} | {statistics.median(used):.2f}"
        rows.append(f"| {recipe.name} | {model} | {gigabytes:.1f} | {figures} |\n")
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], check=True, capture_output=True, text=True, cwd=ROOT
    )
    return TIMES.format(
        rows="".join(rows),
        repetitions=REPETITIONS,
        cpu=host.cpu_model(),
        threads=host.threads(),
        version=__version__,
        commit=commit.stdout.strip(),
        python=sys.version.split()[0],
    )


def _processor_seconds(command: Sequence[str], environment: Mapping[str, str]) -> float:
    """Run a command; return the processor time that it took."""
    before = sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
    subprocess.run(command, env=environment, check=True, capture_output=True)
    return sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2]) - before


TIMES = """# How long a plan takes

`optikit plan RECIPE`, a new process each time, modules compiled before; {repetitions} repetitions. A plan reads
headers, not weights, whatever the size of the model. Written by `python tests/benchmarks/plans.py --times` at {commit}
(optikit {version}, Python {python}) on {cpu}, {threads} threads, with other work beside it, which lengthens
processor time, too; the least is nearest to what it takes alone.

| recipe | model | GB of weights | s, least | s, median | s of processor, least | s of processor, median |
|---|---|---:|---:|---:|---:|---:|
{rows}"""


def broken() -> list[Path]:
    """Return the broken recipes."""
    return sorted(path for path in BROKEN.glob("*.yaml") if not path.name.endswith(FIXED))


def main(arguments: Sequence[str] | None = None) -> int:
    """Write every capture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, help="only write the models into this directory")
    parser.add_argument("--times", action="store_true", help="only measure how long plans take")
    given = parser.parse_args(arguments)
    if given.models:
        write_models(given.models)
        return 0
    if given.times:
        with tempfile.TemporaryDirectory() as temporary, workplace(Path(temporary)) as directory:
            (PLANS / "times.md").write_text(times(directory), encoding="utf-8")
        return 0
    failed: list[str] = []
    with tempfile.TemporaryDirectory() as temporary, workplace(Path(temporary)) as directory:
        for recipe in sorted(PLANS.glob("*.yaml")):
            recipe.with_suffix(".txt").write_text(capture_plan(recipe, directory), encoding="utf-8")
        for recipe in broken():
            try:
                told, repaired = capture_broken(recipe, directory)
            except SystemExit as error:
                failed.append(str(error))
                continue
            recipe.with_suffix(".txt").write_text(told, encoding="utf-8")
            recipe.with_suffix(FIXED).write_text(repaired, encoding="utf-8")
    print("\n".join(failed), end="")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
