"""Captures of `optikit plan`: five stacks for five targets, and one broken recipe per family of rules with its repair.

    python tests/benchmarks/plans.py            # writes examples/plans/*.txt, examples/broken/*.txt and *.fixed.yaml
    python tests/benchmarks/plans.py --models D # only writes the models that these recipes name, into D

The models are shapes: the configuration of the model that the name says and the headers of all its tensors in a file
of the right size without contents, which planning never reads. So a 70 B model is planned on a laptop.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import shutil
import struct
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from hashlib import sha256
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
}
"""What the published config.json of each says of shapes."""
TOKENIZER = {
    "pre_tokenizer": {"type": "Whitespace"},
    "model": {"type": "WordLevel", "vocab": {"river": 0, "<unk>": 1}, "unk_token": "<unk>"},
}
"""One for all: a token per word. No plan here depends on more than how many there are, and that it is the same."""


def write_models(directory: Path, home: Path) -> None:
    """Write every shape into `directory`, texts beside them, and what the store has to know of the files."""
    digests = {}
    for name, shape in SHAPES.items():
        place = directory / name
        place.mkdir(parents=True, exist_ok=True)
        config = LLAMA | {"tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2} | shape
        config["architectures"] = ["MistralForCausalLM" if "mistral" in name else "LlamaForCausalLM"]
        (place / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
        (place / "tokenizer.json").write_text(json.dumps(TOKENIZER), encoding="utf-8")
        weights = place / "model.safetensors"
        header = _write_weights(weights, config)
        stat = weights.stat()
        identity = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
        digests[str(weights.absolute())] = [*identity, sha256(header).hexdigest()]  # nothing but a header is there
    home.mkdir(parents=True, exist_ok=True)
    sealed = {"sha256": sha256(json.dumps(digests).encode()).hexdigest(), "entries": digests}
    (home / "digests.json").write_text(json.dumps(sealed), encoding="utf-8")
    (directory / "calibration.txt").write_text("The river is cold. " * 4000, encoding="utf-8")
    lines = [json.dumps({"prompt": f"Tell me of river number {index}. " + "It is cold. " * 300}) for index in range(64)]
    (directory / "prompts.jsonl").write_text("\n".join(lines), encoding="utf-8")


def _write_weights(path: Path, config: Mapping[str, Any]) -> bytes:
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
    return header


def _tensors(config: Mapping[str, Any]) -> Iterator[tuple[str, list[int]]]:
    hidden, inner, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    width = hidden * config["num_key_value_heads"] // config["num_attention_heads"]
    yield "model.embed_tokens.weight", [vocab, hidden]
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield f"{at}.{name}.weight", [hidden]
        rows = {"q": hidden, "k": width, "v": width, "o": hidden}
        yield from ((f"{at}.self_attn.{name}_proj.weight", [rows[name], hidden]) for name in rows)
        yield from ((f"{at}.mlp.{name}_proj.weight", [inner, hidden]) for name in ("gate", "up"))
        yield f"{at}.mlp.down_proj.weight", [hidden, inner]
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
    write_models(directory, directory / "home")
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


def broken() -> list[Path]:
    """Return the broken recipes."""
    return sorted(path for path in BROKEN.glob("*.yaml") if not path.name.endswith(FIXED))


def main(arguments: Sequence[str] | None = None) -> int:
    """Write every capture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, help="only write the models into this directory")
    given = parser.parse_args(arguments)
    if given.models:
        write_models(given.models, given.models / "home")
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
