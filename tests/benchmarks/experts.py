"""Memory of a walk over experts, and what each of them loses beside the same linears quantized alone.

    python tests/benchmarks/experts.py --out examples/experts.md [--work DIR] [--only gptq …]

A random Qwen3-MoE of two blocks with 4 and with 64 experts is taken through a stage, in a process of its own; peak
memory is the kernel's count of it. What a block holds besides experts, and one expert, are counted from their shapes. A
bound that held all experts of a block would grow with their number; this one doesn't. What was measured before is kept
in DIR. The losses are of tiny models, as the tests have them.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from optikit import host
from optikit.algorithms.precision import ROWS

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.benchmarks.record import commit  # noqa: E402
from tests.conftest import byte_tokenizer  # noqa: E402
from tests.mixtures import losses, save  # noqa: E402

EXPERTS = (4, 64)
HIDDEN, WIDTH, BLOCKS = 256, 512, 2
STAGES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gptq": ("quantize", "gptq", {"group_size": 64}),
    "gptq, routed": ("quantize", "gptq", {"group_size": 64, "experts": "routed"}),
    "awq": ("quantize", "awq", {"group_size": 64, "steps": 4}),
    "int8 w8a16": ("quantize", "int8", {"group_size": 64}),
    "int8 w8a8": ("quantize", "int8", {"scheme": "w8a8"}),
    "fp8 static": ("quantize", "fp8", {"scheme": "static"}),
    "wanda": ("prune", "wanda", {}),
    "sparsegpt": ("prune", "sparsegpt", {}),
    "rtn": ("quantize", "rtn", {"group_size": 64, "mse": False}),
    "fp8": ("quantize", "fp8", {"mse": False}),
    "nf4": ("quantize", "nf4", {}),
    "int8 llm_int8": ("quantize", "int8", {"scheme": "llm_int8"}),
    "magnitude": ("prune", "magnitude", {}),
}
ONE = """
import json, sys, time
from pathlib import Path
from optikit import stages
from optikit.process import memory
from optikit.stage import Calibration, Job
verb, method, options, source, work, text = sys.argv[1:]
stage, work = stages.load(verb, method), Path(work)
(work / "model").mkdir(parents=True); (work / "scratch").mkdir()
job = Job(source=Path(source), dest=work / "model", scratch=work / "scratch",
          calibration=Calibration(text=Path(text), samples=8, length=128))
start = time.monotonic()
facts = stage.run(stage.Options(**json.loads(options)), job)
peak = memory.peak_mib()  # getrusage's would be that of the process which built the model
few = len(facts.get("experts_with_too_few_tokens", ()))
print(json.dumps({"peak_mib": peak, "seconds": time.monotonic() - start, "few": few}))
"""


def build(directory: Path, experts: int) -> None:
    """Save a random model."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "qwen3_moe", vocab_size=260, hidden_size=HIDDEN, intermediate_size=WIDTH, moe_intermediate_size=WIDTH,
        num_hidden_layers=BLOCKS, num_attention_heads=8, num_key_value_heads=2, head_dim=64, num_experts=experts,
        num_experts_per_tok=2, max_position_embeddings=256, bos_token_id=0, eos_token_id=1, pad_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(directory)
    byte_tokenizer(directory)


def measured(name: str, source: Path, work: Path, text: Path) -> dict[str, Any]:
    """Return peak memory and seconds of a stage in a process of its own."""
    verb, method, options = STAGES[name]
    command = [sys.executable, "-c", ONE, verb, method, json.dumps(options), str(source), str(work), str(text)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def lost(work: Path, text: Path) -> list[str]:
    """Return a row for each tiny model: how many linears, what they lose, and the largest ratio to themselves alone."""
    rows = []
    for name in ("mixtral", "qwen3_moe"):
        source = save(name, work / name)
        found = list(losses(name, source, text, work / f"{name}-alone"))
        walked = [each.walked for each in found]
        ratios = [each.walked / each.alone for each in found]
        figures = (f"{each:.4f}" for each in (min(walked), max(walked), max(ratios)))
        rows.append(f"| {name} | {len(found)} | {' | '.join(figures)} |")
    return rows


def main() -> None:
    """Measure and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--only", nargs="*", choices=STAGES, default=list(STAGES))
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work: Path = given.work or Path(folder)
        work.mkdir(exist_ok=True)
        text, kept = work / "text.txt", work / "found.json"
        text.write_text((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8") * 2, encoding="utf-8")
        found: dict[str, dict[str, Any]] = json.loads(kept.read_text()) if kept.is_file() else {}
        for experts in EXPERTS:
            source = work / str(experts)
            if not (source / "config.json").is_file():
                build(source, experts)
            for name in given.only:
                with tempfile.TemporaryDirectory(dir=work) as place:
                    found.setdefault(name, {})[str(experts)] = measured(name, source, Path(place), text)
                kept.write_text(json.dumps(found))
        with tempfile.TemporaryDirectory(dir=work) as place:
            told = lost(Path(place), text)
    given.out.write_text(page([row(name, found[name]) for name in STAGES if name in found], told), encoding="utf-8")


def row(name: str, found: dict[str, Any]) -> str:
    """Return a row of memory."""
    few, many = (found[str(experts)] for experts in EXPERTS)
    peaks = few["peak_mib"], many["peak_mib"], many["peak_mib"] - few["peak_mib"]
    cells = [*(f"{each:.0f}" for each in peaks), f"{few['seconds']:.0f}", f"{many['seconds']:.0f}", many["few"]]
    return f"| {name} | {' | '.join(map(str, cells))} |"


PAGE = """# Mixtures of experts: memory of a walk, and losses

A random Qwen3-MoE of {blocks} blocks, hidden {hidden}, experts of {width}, in bfloat16; 8 windows of 128 tokens.
{machine}, {gib:.0f} GiB, torch {torch}, at {commit}, with other work beside it;
`python tests/benchmarks/experts.py --out examples/experts.md`.

An expert is {expert:.0f} MiB in float32, a block without experts {block:.0f} MiB. With {many} experts instead of {few}
a block holds {more:.0f} MiB more in bfloat16, {wide:.0f} MiB more in float32: a walk that held all of them would need
that much more. Most of the difference there was before came of what products leave behind: oneDNN keeps a compiled
product for every shape, and each expert has its own number of tokens (512 shapes with inputs of 512 and 1024: 368 MiB,
with AMX). They are filled up to multiples of {filled} tokens now, which leaves {kept} shapes.

| stage | peak MiB, {few} experts | {many} experts | difference | seconds, {few} | {many} | linears with few tokens |
|---|---:|---:|---:|---:|---:|---:|
{rows}

## What an expert loses

Relative loss of outputs by GPTQ (4 bits, groups of 32) of every linear of the experts of a tiny random model's first
block, calibrated on all tokens, beside the same linear quantized alone on the same inputs.

| model | linears | least | most | largest ratio to alone |
|---|---:|---:|---:|---:|
{lost}
"""


def page(rows: list[str], told: list[str]) -> str:
    """Return the page."""
    expert, block, more = 3 * HIDDEN * WIDTH, HIDDEN * (8 * 64 * 2 + 2 * 64 * 2), EXPERTS[1] - EXPERTS[0]
    return PAGE.format(
        blocks=BLOCKS,
        hidden=HIDDEN,
        width=WIDTH,
        machine=platform.machine(),
        gib=host.memory_bytes() / 2**30,
        torch=torch.__version__,
        expert=4 * expert / 2**20,
        block=4 * block / 2**20,
        few=EXPERTS[0],
        many=EXPERTS[1],
        filled=ROWS,
        kept=8 * 128 // ROWS,
        more=2 * more * expert / 2**20,
        wide=4 * more * expert / 2**20,
        rows="\n".join(rows),
        lost="\n".join(told),
        commit=commit(),
    )


if __name__ == "__main__":
    main()
