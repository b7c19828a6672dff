"""Measure the memory of stages that need no calibration on a checkpoint with very wide layers and a huge embedding.

    python tests/benchmarks/streamed_rounding.py --work DIR [--layers N] [--only fp8-dynamic …]

Writes a random bf16 checkpoint of Llama's shapes at 8192 channels with an embedding of 152064 tokens, its head too
(4.2 GB with one block, 1.7 GB for every other), runs each stage by `optikit run`, and writes
examples/streamed_rounding.md: the peak of the stage's process as the report has it, beside what the plan expected. What
was run before is kept in DIR.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "examples" / "streamed_rounding.md"
HIDDEN, INNER, HEADS, KEYS, VOCAB = 8192, 28672, 64, 8, 152064
STAGES = {
    "fp8-dynamic": "quantize: {method: fp8}",
    "fp8-block": "quantize: {method: fp8, scheme: block}",
    "fp4-nvfp4": "quantize: {method: fp4, mse: false}",
    "fp4-mxfp4": "quantize: {method: fp4, scheme: mxfp4, mse: false}",
    "rtn": "quantize: {method: rtn, group_size: 128, mse: false}",
    "rtn-packed": "quantize: {method: rtn, group_size: 128, mse: false, format: pack-quantized}",
    "rtn-8": "quantize: {method: rtn, bits: 8, group_size: 128, mse: false}",
    "rtn-searched": "quantize: {method: rtn, group_size: 128}",
    "nf4": "quantize: {method: nf4}",
    "llm-int8": "quantize: {method: int8, scheme: llm_int8}",
    "cast": "quantize: {method: cast, dtype: float16}",
    "magnitude": "prune: {method: magnitude}",
    "magnitude-2-4": "prune: {method: magnitude, pattern: '2:4'}",
}
"""What reads no text: everything else looks at inputs, which takes blocks in float32 and matrices of widths squared."""
CHUNK = 1 << 24


def shapes(layers: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield every tensor of the checkpoint."""
    yield "model.embed_tokens.weight", (VOCAB, HIDDEN)
    width = HIDDEN * KEYS // HEADS
    for layer in range(layers):
        at = f"model.layers.{layer}."
        yield from ((f"{at}{name}.weight", (HIDDEN,)) for name in ("input_layernorm", "post_attention_layernorm"))
        rows = {"q": HIDDEN, "k": width, "v": width, "o": HIDDEN}
        yield from ((f"{at}self_attn.{name}_proj.weight", (rows[name], HIDDEN)) for name in rows)
        yield from ((f"{at}mlp.{name}_proj.weight", (INNER, HIDDEN)) for name in ("gate", "up"))
        yield f"{at}mlp.down_proj.weight", (HIDDEN, INNER)
    yield "model.norm.weight", (HIDDEN,)


def write_model(directory: Path, layers: int) -> int:
    """Write the checkpoint, a shard for each tensor that is large; return its bytes."""
    directory.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KEYS,
        "vocab_size": VOCAB,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    }
    (directory / "config.json").write_text(json.dumps(config))
    draw = np.random.default_rng(0).standard_normal(CHUNK, dtype=np.float32) * 0.02
    block = (draw.view(np.uint32) >> 16).astype(np.uint16).tobytes()  # bf16, rounded down
    where, total = {}, 0
    for number, (name, shape) in enumerate(shapes(layers)):
        size = 2 * math.prod(shape)
        file = f"model-{number:05d}.safetensors"
        where[name], total = file, total + size
        header = json.dumps({name: {"dtype": "BF16", "shape": shape, "data_offsets": [0, size]}}).encode()
        with (directory / file).open("wb") as out:
            out.write(struct.pack("<Q", len(header)) + header)
            for start in range(0, size, len(block)):
                out.write(block[: size - start])
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def run(name: str, work: Path) -> dict[str, float]:
    """Run one stage; return what its report says of it and what the plan expected."""
    recipe = work / f"{name}.yaml"
    recipe.write_text(f"model: model\ntarget: h100\nstages:\n  - {STAGES[name]}\n")
    environment = {**os.environ, "OPTIKIT_HOME": str(work / "home")}
    optikit = [sys.executable, "-m", "optikit"]
    planned = subprocess.run(
        [*optikit, "plan", recipe.name, "--json"], cwd=work, env=environment, check=True, capture_output=True
    )
    subprocess.run([*optikit, "run", recipe.name, "--out", name], cwd=work, env=environment, check=True)
    report = json.loads((work / name / "report.json").read_text())
    subprocess.run(["rm", "-rf", str(work / name), str(work / "home" / "artifacts")], check=True)
    [step] = report["steps"]
    expected = json.loads(planned.stdout)["steps"][0]["estimate_peak_bytes"]
    return {"peak": step["peak_memory_mib"], "planned": expected / 2**20, "seconds": step["seconds"]}


def page(found: dict[str, dict[str, float]], size: int, layers: int) -> str:
    """Return the page."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    rows = "".join(
        f"| `{STAGES[name]}` | {row['peak']:.0f} | {row['planned']:.0f} | {row['seconds']:.0f} |\n"
        for name, row in found.items()
    )
    return (
        "# Memory of stages that need no calibration\n\n"
        f"A random checkpoint of {size / 1e9:.1f} GB in bf16: {layers} block(s) of Llama at {HIDDEN} channels, MLP\n"
        f"{INNER} wide, and an embedding of {VOCAB} tokens, 2.5 GB. The peak is the largest resident set of the\n"
        "stage's process, verification included. Time is that of a machine with other work beside it. int8 (w8a16,\n"
        "w8a8), fp8 (static) and every other method look at inputs: what those hold is in `bounded_memory.md` and\n"
        "`experts.md`.\n\n"
        "| stage | peak MiB | planned MiB | s |\n|---|---:|---:|---:|\n"
        f"{rows}\nWritten by `python tests/benchmarks/streamed_rounding.py` at {commit.stdout.strip()}, Python\n"
        f"{platform.python_version()}, on {platform.processor() or platform.machine()} with {os.cpu_count()} threads.\n"
    )


def main() -> None:
    """Measure the stages that are named, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--only", nargs="*", choices=STAGES, default=list(STAGES))
    given = parser.parse_args()
    work = given.work.resolve()
    if not (work / "model" / "model.safetensors.index.json").is_file():
        write_model(work / "model", given.layers)
    size = json.loads((work / "model" / "model.safetensors.index.json").read_text())["metadata"]["total_size"]
    kept = work / "found.json"
    found: dict[str, dict[str, float]] = json.loads(kept.read_text()) if kept.is_file() else {}
    for name in given.only:
        found[name] = run(name, work)
        kept.write_text(json.dumps(found))
    PAGE.write_text(page({name: found[name] for name in STAGES if name in found}, size, given.layers), encoding="utf-8")


if __name__ == "__main__":
    main()
