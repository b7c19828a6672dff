"""Quantize a model that is larger than memory: peak and time of GPTQ and AWQ under a hard limit, by layers and width.

Run (the whole takes long and 20 GB of disk; --layers 4 8 --width 512 takes a minute):

    python tests/benchmarks/bounded_memory.py --work DIR

A Llama with random weights is written shard by shard, twice: with some number of layers and with twice as many. Every
arm is a child process whose private memory (heap, anonymous mappings, stacks: RLIMIT_DATA) the parent limits before it
starts, so an allocation beyond the limit fails, whatever the child thinks of it. Peak is the kernel's VmHWM: resident
memory, libraries included. A stage re-reads and checks what it wrote before it ends; an arm that fails is told as such.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from optikit import host
from optikit.models import headers

MIB = 2**20
VOCABULARY, HEAD = 32000, 128
WORDS = "the old stone stands near a cold river under green light and small windows face bright water"
METHODS: dict[str, dict[str, Any]] = {"gptq": {"group_size": 64}, "awq": {"group_size": 64, "steps": 4}}
"""Options of every arm; AWQ tries fewer scales than it does by default, which changes its time, not its memory."""
CHILD = """
import json, sys, time
from pathlib import Path
request = json.loads(sys.argv[1])
from optikit import stages
from optikit.stage import Calibration, Job
stage = stages.load("quantize", request["method"])
calibration = Calibration(text=Path(request["text"]), samples=request["samples"], length=request["length"])
paths = {name: Path(request[name]) for name in ("source", "dest", "scratch")}
started = time.monotonic()
job = Job(**paths, calibration=calibration, threads=request["threads"], max_memory_bytes=request["limit"])
stage.run(stage.Options(**request["options"]), job)
status = Path("/proc/self/status").read_text()
peak = int(next(line for line in status.splitlines() if line.startswith("VmHWM:")).split()[1]) / 1024
print(json.dumps({"seconds": time.monotonic() - started, "peak_mib": peak}))
"""


def config(layers: int, width: int) -> dict[str, Any]:
    """Return config.json of a Llama with MLPs 8/3 as wide as the residual stream, as a multiple of 256."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCABULARY,
        "hidden_size": width,
        "intermediate_size": -(-width * 8 // 3 // 256) * 256,
        "num_hidden_layers": layers,
        "num_attention_heads": width // HEAD,
        "num_key_value_heads": max(1, width // HEAD // 4),
        "head_dim": HEAD,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "bos_token_id": 0,
        "eos_token_id": 1,
    }


def shards(wanted: dict[str, Any]) -> Iterator[dict[str, torch.Tensor]]:
    """Yield the tensors of one shard after another: what is outside the blocks, then block by block."""
    width, inner = wanted["hidden_size"], wanted["intermediate_size"]
    keys = wanted["num_key_value_heads"] * HEAD
    draw = torch.Generator().manual_seed(0)

    def random(rows: int, columns: int) -> torch.Tensor:
        return (torch.randn(rows, columns, generator=draw) * 0.02).bfloat16()

    norm = partial(torch.ones, width, dtype=torch.bfloat16)
    yield {"model.embed_tokens.weight": random(VOCABULARY, width), "model.norm.weight": norm()}
    for index in range(wanted["num_hidden_layers"]):
        linears = {
            "self_attn.q_proj": random(width, width),
            "self_attn.k_proj": random(keys, width),
            "self_attn.v_proj": random(keys, width),
            "self_attn.o_proj": random(width, width),
            "mlp.gate_proj": random(inner, width),
            "mlp.up_proj": random(inner, width),
            "mlp.down_proj": random(width, inner),
            "input_layernorm": norm(),
            "post_attention_layernorm": norm(),
        }
        yield {f"model.layers.{index}.{name}.weight": tensor for name, tensor in linears.items()}


def write_model(directory: Path, layers: int, width: int) -> Path:
    """Write a random Llama, one block in memory at a time; one that is whole already is left as it is."""
    if (directory / headers.INDEX).exists():
        return directory
    directory.mkdir(parents=True, exist_ok=True)
    wanted = config(layers, width)
    located, total = {}, 0
    for number, tensors in enumerate(shards(wanted)):
        name = f"model-{number + 1:05}-of-{layers + 1:05}.safetensors"
        save_file(tensors, directory / name, {"format": "pt"})
        located |= dict.fromkeys(tensors, name)
        total += sum(tensor.nbytes for tensor in tensors.values())
    (directory / "config.json").write_text(json.dumps(wanted, indent=1))
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["[UNK]", *WORDS.split()])}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(directory / "tokenizer.json"))
    index = {"metadata": {"total_size": total}, "weight_map": located}
    (directory / headers.INDEX).write_text(json.dumps(index))
    return directory


def weight_bytes(directory: Path) -> int:
    """Return the bytes of a model's weights."""
    return sum(path.stat().st_size for path in directory.glob("*.safetensors"))


def arm(source: Path, method: str, wanted: argparse.Namespace, place: Path) -> dict[str, Any]:
    """Quantize in a child under the limit; return what it tells, or why it told nothing."""
    shutil.rmtree(place, ignore_errors=True)
    for name in ("dest", "scratch"):
        (place / name).mkdir(parents=True)
    limit = wanted.limit_mib * MIB
    request = {
        "method": method,
        "options": METHODS[method],
        "source": str(source),
        "dest": str(place / "dest"),
        "scratch": str(place / "scratch"),
        "text": str(wanted.work / "text.txt"),
        "samples": wanted.samples,
        "length": wanted.length,
        "threads": wanted.threads,
        "limit": limit,
    }
    ended = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CHILD, json.dumps(request)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": str(wanted.threads)},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (limit, limit)),
    )
    written = weight_bytes(place / "dest")
    shutil.rmtree(place)
    if ended.returncode:
        return {"failed": (ended.stderr.strip().splitlines() or [f"exit code {ended.returncode}"])[-1][:200]}
    return {**json.loads(ended.stdout.splitlines()[-1]), "written": written}


def row(source: Path, method: str, layers: int, wanted: argparse.Namespace) -> str:
    """Return an arm as a row of the table."""
    found = arm(source, method, wanted, wanted.work / "arm")
    start = f"| {method} | {layers} | {wanted.width} | {weight_bytes(source) / 1e9:.2f} GB | {wanted.limit_mib} MiB |"
    if "failed" in found:
        return f"{start} failed: {found['failed']} | | | |"
    seconds = found["seconds"]
    figures = f"{found['peak_mib']:.0f} MiB | {seconds:.0f} s | {seconds / layers:.2f} s"
    return f"{start} {figures} | {found['written'] / 1e9:.2f} GB |"


def main() -> None:
    """Write the models, run every arm, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="directory for models and results")
    parser.add_argument("--layers", type=int, nargs="+", default=[180, 360])
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--limit-mib", type=int, default=1024)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--threads", type=int, default=host.threads())
    wanted = parser.parse_args()
    wanted.work.mkdir(parents=True, exist_ok=True)
    (wanted.work / "text.txt").write_text(f"{WORDS}\n" * 2000)
    print(f"{wanted.samples} x {wanted.length} tokens, {wanted.threads} threads, {host.cpu_model()}\n")
    print("| method | layers | width | weights | limit | peak | time | per layer | written |")
    print("| :-- | --: | --: | --: | --: | --: | --: | --: | --: |", flush=True)
    for layers in wanted.layers:
        source = write_model(wanted.work / f"random-{wanted.width}-{layers}", layers, wanted.width)
        for method in wanted.methods:
            print(row(source, method, layers, wanted), flush=True)


if __name__ == "__main__":
    main()
