"""The work of one section of the suite: `python -m tests.cuda.sections NAME DIRECTORY DEVICE`, a JSON row per part.

Every part guards itself: what it raises becomes its row, and the next one is done.
"""

from __future__ import annotations

import gc
import json
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from optikit import stages
from optikit.stage import Calibration, Job
from tests.cuda import parts

Found = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A Llama's, and how many calibration tokens it gets.

    Attributes:
        blocks: Fewer than a model of this width has: every block takes the same time.
    """

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocab: int
    blocks: int
    samples: int
    length: int

    @property
    def told(self) -> str:
        """The shape in words."""
        return (
            f"Llama {self.hidden}/{self.intermediate}, {self.heads} heads, {self.kv_heads} of keys, {self.blocks} "
            f"blocks, {self.vocab} tokens; random weights"
        )


EIGHT_B = Shape(hidden=4096, intermediate=14336, heads=32, kv_heads=8, vocab=4096, blocks=2, samples=32, length=2048)
"""Llama 3 8B's blocks (it has 32 of them), with a small vocabulary, which no block sees."""
SMALL = Shape(hidden=128, intermediate=384, heads=8, kv_heads=2, vocab=512, blocks=2, samples=6, length=64)


def random_llama(directory: Path, shape: Shape, device: str) -> Path:
    """Write a Llama of a shape, with random bf16 weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from tests.conftest import byte_tokenizer

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.blocks,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=8192,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    with torch.device(device):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(directory)
    byte_tokenizer(directory)
    return directory


def text(path: Path, tokens: int) -> Path:
    """Write a text of at least so many bytes, which are tokens here."""
    from tests.conftest import write_prose

    prose = write_prose(path).read_text(encoding="utf-8")
    path.write_text("\n".join(prose[i:] for i in range(2 + tokens // len(prose))), encoding="utf-8")
    return path


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Where a section works."""

    directory: Path
    device: str
    shape: Shape = field(default=EIGHT_B)

    @property
    def source(self) -> Path:
        """The model of this shape, written once."""
        path = self.directory / "llama"
        return path if path.exists() else random_llama(path, self.shape, self.device)

    def job(self, name: str, **more: Any) -> Job:
        """Return a job on it with places of its own."""
        place = self.directory / name
        for each in ("dest", "scratch"):
            (place / each).mkdir(parents=True)
        places = {"dest": place / "dest", "scratch": place / "scratch"}
        return Job(source=self.source, **places, device=self.device, threads=torch.get_num_threads(), **more)


def quantized(bench: Bench, name: str, method: str, options: Found) -> Found:
    """Quantize the model; tell the time of each block, what was read per second, and what was written."""
    stage = stages.load("quantize", method)
    chosen = stage.Options(**options)
    calibration, shape = None, bench.shape
    if "calibration" in stage.inputs(chosen):
        prose = text(bench.directory / f"{name}.txt", 2 * shape.samples * shape.length)
        calibration = Calibration(text=prose, samples=shape.samples, length=shape.length)
    ends: list[float] = []

    def watch(done: int, total: int, what: str) -> None:
        if what == "block":
            synchronize(bench.device)
            ends.append(time.perf_counter())

    job = bench.job(name, calibration=calibration, progress=watch)
    began = time.perf_counter()
    stage.run(chosen, job)
    seconds = time.perf_counter() - began
    read, written = (sum(path.stat().st_size for path in each.glob("*.safetensors")) for each in (job.source, job.dest))
    shutil.rmtree(bench.directory / name)
    found: Found = {"shape": shape.told, "bytes_out": written, "gb_per_s": round(read / seconds / 1e9, 3)}
    if calibration is not None:
        found["tokens"] = shape.samples * shape.length
    # The first block's time holds the start of everything.
    return found | {"block_seconds": [round(b - a, 2) for a, b in zip([began, *ends], ends, strict=False)]}


def windows(bench: Bench) -> Found:
    """Measure T(m), what a forward of m tokens takes behind 200."""
    import numpy as np

    from optikit import runtime
    from optikit.runtime.speculation.cost_model import measure_windows

    threads = torch.get_num_threads()
    decoder = runtime.load(bench.source, dtype="bfloat16", max_tokens=512, device=bench.device, threads=threads)
    context = np.random.default_rng(0).integers(3, 250, 200)
    costs = measure_windows(decoder, context)
    weights = sum(path.stat().st_size for path in bench.source.glob("*.safetensors"))
    rate = round(weights / (costs.ms[1] / 1000) / 1e9, 1)
    ms = {str(m): round(each, 3) for m, each in costs.ms.items()}
    return {"shape": bench.shape.told, "weight_bytes": weights, "ms": ms, "gb_per_s": rate}


def staged(world: parts.World, bench: Bench, name: str) -> Found:
    """Do a part on the device, and on the processor; say whether both found facts and files of the same names."""
    there, here = (
        parts.PARTS[name](world, bench.directory / name / each, device)
        for each, device in (("device", bench.device), ("processor", "cpu"))
    )
    shutil.rmtree(bench.directory / name, ignore_errors=True)
    if there.keys() != here.keys():
        raise AssertionError(f"facts and files differ: {sorted(there.keys() ^ here.keys())}")
    same = sum(there[key] == here[key] for key in here)
    return {"compared": f"{same} of {len(here)} equal"}


def loop(world: parts.World, bench: Bench, method: str) -> Found:
    """Train a speculator on the device, draft with it there, and hold every text to plain decoding."""
    from optikit.stages.measure import speculation
    from optikit.stages.speculate import lookup

    place = bench.directory / method
    made = place / "speculator"
    made.mkdir(parents=True)
    if method == "lookup":
        lookup.run(lookup.Options(), Job(source=world.source, dest=made, scratch=place))
    else:
        stage = stages.load("speculate", method)
        scratch = place / "scratch"
        scratch.mkdir()
        stage.run(
            stage.Options(**LEARNED[method]),
            Job(
                source=world.source,
                dest=made,
                scratch=scratch,
                inputs={"prompts": world.prompts},
                device=bench.device,
                threads=1,
            ),
        )
    job = parts.job_of(
        place, bench.device, world.source, speculator=made, tokenizer=world.source, prompts=world.prompts
    )
    options = speculation.Options(runtime="transformers", prompts=8, new_tokens=16, tune=False)
    found = speculation.run(options, job)["speculation"]
    return {name: found[name] for name in ("acceptance_length", "exact_match")}


LEARNED: dict[str, Found] = {
    "medusa": {"heads": 2, "tokens": 400, "new_tokens": 12, "eval_prompts": 8, "epochs": 2, "draft_vocab": 64},
    "eagle3": {"tokens": 400, "new_tokens": 12, "eval_prompts": 8, "epochs": 2, "draft_vocab": 64},
}
"""Options of speculators that are trained on the tiny model."""


def synchronize(device: str) -> None:
    """Wait for the device."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def of_section(name: str, bench: Bench) -> Iterator[tuple[str, Callable[[], Found]]]:
    """Yield the parts of a section."""
    if name == "blocks":
        for method, options in {"gptq": {"group_size": 128}, "awq": {"group_size": 128}}.items():
            yield method, partial(quantized, bench, method, method, options)
    elif name == "packing":
        for each, (method, options) in PACKED.items():
            yield each, partial(quantized, bench, each, method, options)
    elif name == "windows":
        yield "T(m)", partial(windows, bench)
    else:
        world = parts.make_world(bench.directory / "world")
        if name == "stages":
            for each in parts.PARTS:
                yield each, partial(staged, world, bench, each)
        else:
            learned = [each for each in LEARNED if each in stages.methods("speculate")]
            for each in ("lookup", *learned):
                yield each, partial(loop, world, bench, each)


PACKED: dict[str, tuple[str, Found]] = {
    "fp8-dynamic": ("fp8", {}),
    "fp8-static": ("fp8", {"scheme": "static"}),
    "int8-w8a16": ("int8", {"group_size": 128}),
    "int8-w8a8": ("int8", {"scheme": "w8a8"}),
    "rtn-int4": ("rtn", {"group_size": 128}),
    "nf4": ("nf4", {}),
}


def row(name: str, do: Callable[[], Found], device: str) -> Found:
    """Do a part; return its row, whatever became of it."""
    on_gpu = device.startswith("cuda")
    if on_gpu:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    began, found, status, error = time.perf_counter(), Found(), "ok", ""
    try:
        found = do()
        synchronize(device)
    except ModuleNotFoundError as missing:
        status, error = "skipped", f"needs {missing.name}"
    except Exception:  # noqa: BLE001 - whatever it is belongs to this part alone
        status, error = "failed", traceback.format_exc()[-3000:]
    memory = torch.cuda.max_memory_allocated() / 2**20 if on_gpu else None
    told = {"name": name, "status": status, "seconds": round(time.perf_counter() - began, 2)}
    return told | {"device_memory_mib": memory, "error": error} | found


def main(name: str, directory: Path, device: str) -> None:
    """Do a section."""
    directory.mkdir(parents=True, exist_ok=True)
    bench = Bench(directory=directory, device=device, shape=SMALL if device == "cpu" else EIGHT_B)
    for each, do in of_section(name, bench):
        print(json.dumps(row(each, do, device)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3])
