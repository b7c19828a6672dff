"""Memory of a walk over experts: the same blocks with 4 and with 64 experts, each stage in a process of its own.

    python tests/benchmarks/experts.py --out examples/experts.md

A random Qwen3-MoE of two blocks is saved, block by block, and taken through a stage; peak memory is the kernel's count
of the process. What a block holds besides experts, and one expert, are counted from their shapes. A bound that held all
experts of a block would grow with their number; this one doesn't.
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

EXPERTS = (4, 64)
HIDDEN, WIDTH, BLOCKS = 512, 1024, 2
STAGES: dict[str, dict[str, Any]] = {
    "rtn": {"group_size": 64},
    "gptq": {"group_size": 64},
    "gptq, routed": {"group_size": 64, "experts": "routed"},
}
ONE = """
import json, resource, sys, time
from pathlib import Path
from optikit import stages
from optikit.stage import Calibration, Job
method, options, source, work, text = sys.argv[1:]
stage, work = stages.load("quantize", method), Path(work)
(work / "model").mkdir(parents=True); (work / "scratch").mkdir()
job = Job(source=Path(source), dest=work / "model", scratch=work / "scratch",
          calibration=Calibration(text=Path(text), samples=8, length=128))
start = time.monotonic()
facts = stage.run(stage.Options(**json.loads(options)), job)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
few = len(facts.get("experts_with_too_few_tokens", ()))
print(json.dumps({"peak_mib": peak, "seconds": time.monotonic() - start, "few": few}))
"""


def build(directory: Path, experts: int) -> None:
    """Save a random model."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    from tests.conftest import byte_tokenizer

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
    method = name.partition(",")[0]
    command = [sys.executable, "-c", ONE, method, json.dumps(STAGES[name]), str(source), str(work), str(text)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Measure and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--out", type=Path, required=True)
    out: Path = parser.parse_args().out
    rows: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        text = work / "text.txt"
        text.write_text(
            (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text(encoding="utf-8") * 2, encoding="utf-8"
        )
        found: dict[tuple[str, int], dict[str, Any]] = {}
        for experts in EXPERTS:
            build(work / str(experts), experts)
            for name in STAGES:
                found[name, experts] = measured(name, work / str(experts), work / f"{name}-{experts}", text)
        for name in STAGES:
            few, many = (found[name, experts] for experts in EXPERTS)
            peaks = few["peak_mib"], many["peak_mib"], many["peak_mib"] - few["peak_mib"]
            cells = [*(f"{each:.0f}" for each in peaks), f"{few['seconds']:.0f}", f"{many['seconds']:.0f}", many["few"]]
            rows.append(f"| {name} | {' | '.join(map(str, cells))} |")
    out.write_text(page(rows), encoding="utf-8")


PAGE = """# Memory of a mixture's walk

A random Qwen3-MoE of {blocks} blocks, hidden {hidden}, experts of {width}, in bfloat16; 8 windows of 128 tokens.
{machine}, {gib:.0f} GiB, torch {torch}; `python tests/benchmarks/experts.py --out examples/experts.md`.

An expert is {expert:.0f} MiB in float32, a block without experts {block:.0f} MiB. With {many} experts instead of {few}
a block holds {more:.0f} MiB more in bfloat16, {wide:.0f} MiB more in float32: a walk that held all of them would need
that much more.

| stage | peak MiB, {few} experts | {many} experts | difference | seconds, {few} | {many} | linears with few tokens |
|---|---|---|---|---|---|---|
{rows}
"""


def page(rows: list[str]) -> str:
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
        more=2 * more * expert / 2**20,
        wide=4 * more * expert / 2**20,
        rows="\n".join(rows),
    )


if __name__ == "__main__":
    main()
