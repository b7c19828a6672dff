"""What vLLM accepts of the heads or the draft that a run left, beside what our own loop accepts of them.

    python tests/benchmarks/vllm_drafts.py OUT [OUT ...] --text FILE --vllm-python ENV/bin/python --json result.json

Each OUT is what `optikit run` wrote with a `speculate` stage by `medusa` (with `layouts: [vllm]`) or `draft`. vLLM
serves its `model/` twice: as it is, and with what its `speculator.json` says of vLLM; ours decodes
`compiled/onnxruntime` with the same heads or draft, drafting the same number of tokens at every step. Prompts are
passages of the text. Printed are tokens a step and the share of steps that kept the token at each position, for both:
a mistake in a tensor's name shows as an acceptance of 0. vLLM's texts with and without drafts are compared token by
token; it computes in bfloat16, so that near-ties part, and the margin of each is printed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from optikit import host, runtime
from optikit.runtime.decoders.onnxruntime import OnnxDecoder
from optikit.runtime.speculation.medusa_session import HEADS, HeadSession
from optikit.runtime.speculation.speculator import COMPILED_DRAFT, SPECULATOR, Method, SpeculatingDecoder, Speculator

DECODES = Path(__file__).parents[1] / "environments" / "vllm_decodes.py"


def passages(text: Path, tokenizer: Tokenizer, count: int, length: int) -> list[list[int]]:
    """Return the first tokens of paragraphs that are long enough, spread over the file."""
    tokens = (tokenizer.encode(each).ids for each in text.read_text(encoding="utf-8").split("\n") if len(each) > 200)
    long = [ids[:length] for ids in tokens if len(ids) >= length]
    if len(long) < count:
        sys.exit(f"{text} has {len(long)} paragraphs of {length} tokens")
    return long[:: len(long) // count][:count]


def ours(out: Path, method: Method, prompts: list[list[int]], count: int, tokens: int) -> dict[str, Any]:
    """Decode with the run's own heads or draft alone, `tokens` at every step."""
    beside = out / "speculator"
    speculator = Speculator(
        method=method,
        ahead=tokens,
        ahead_gate=0.0,
        heads=HeadSession(beside / HEADS) if method == "medusa" else None,
        draft=OnnxDecoder(beside / COMPILED_DRAFT, threads=1, spinning=False) if method == "draft" else None,
    )
    decoder = SpeculatingDecoder(runtime.load(out, speculator=None), speculator)
    for prompt in prompts:
        deque(decoder.greedy(np.array(prompt, np.int64), count), maxlen=0)
    statistics = decoder.statistics
    return {
        "acceptance_length": statistics.acceptance_length,
        "by_position": list(statistics.acceptance_by_position),
    }


def theirs(jobs: list[dict[str, Any]], python: Path) -> list[dict[str, Any]]:
    """Let vLLM do its jobs, all in one process."""
    with tempfile.TemporaryDirectory() as work:
        path = Path(work) / "jobs.json"
        path.write_text(json.dumps(jobs), encoding="utf-8")
        command = [str(python), "-P", str(DECODES), str(path)]
        done = subprocess.run(command, cwd=work, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr[-3000:])
    found: list[dict[str, Any]] = json.loads(done.stdout.strip().splitlines()[-1])
    for each in found:
        if "error" in each:
            sys.exit(each["error"])
    return found


def partings(plain: dict[str, Any], drafted: dict[str, Any]) -> list[float | None]:
    """Return for each text None where both are the same, else by how many nats the first choice was the likelier."""
    found: list[float | None] = []
    for one, other, margins in zip(plain["tokens"], drafted["tokens"], plain["margins"], strict=True):
        index = next((i for i, pair in enumerate(zip(one, other, strict=True)) if pair[0] != pair[1]), None)
        found.append(None if index is None else margins[index])
    return found


def compared(out: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Return one row: our acceptance and vLLM's."""
    tokenizer = Tokenizer.from_file(str(out / "model" / "tokenizer.json"))
    prompts = passages(args.text, tokenizer, args.prompts, args.length)
    made = json.loads((out / "speculator" / SPECULATOR).read_text(encoding="utf-8"))
    config = dict(made["servers"]["vllm"]["speculative_config"])
    config["model"] = str((out / config["model"]).absolute())
    shared = {"directory": str((out / "model").absolute()), "prompts": prompts, "count": args.count, "context": 512}
    plain, drafted = theirs([{**shared, "speculative_config": each} for each in (None, config)], args.vllm_python)
    rates = [kept / drafted["drafts"] for kept in drafted["by_position"]]
    parted = partings(plain, drafted)
    return {
        "method": made["method"],
        "prompts": len(prompts),
        "optikit": ours(out, made["method"], prompts, args.count, config["num_speculative_tokens"]),
        "vllm": {"acceptance_length": 1 + drafted["accepted"] / drafted["drafts"], "by_position": rates},
        "vllm_same_texts": sum(each is None for each in parted),
        "vllm_parted_margins": [each for each in parted if each is not None],
    }


def main() -> None:
    """Compare every output and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("outputs", nargs="+", type=Path)
    parser.add_argument("--text", type=Path, required=True, help="UTF-8 prose, a paragraph per line")
    parser.add_argument("--vllm-python", type=Path, required=True, help="python of an environment with vLLM 0.32")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--length", type=int, default=48, help="tokens of a prompt")
    parser.add_argument("--count", type=int, default=96, help="tokens to write")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = [compared(out, args) for out in args.outputs]
    print(f"{'':8}{'tokens a step':>32}{'kept at each position':>48}")
    print(f"{'':8}{'optikit':>20}{'vLLM':>12}{'optikit':>24}{'vLLM':>24}{'same texts':>14}")
    for row in rows:
        kept = ["/".join(f"{share:.2f}" for share in row[who]["by_position"]) for who in ("optikit", "vllm")]
        lengths = [row[who]["acceptance_length"] for who in ("optikit", "vllm")]
        same = f"{row['vllm_same_texts']} of {row['prompts']}"
        print(f"{row['method']:8}{lengths[0]:20.3f}{lengths[1]:12.3f}{kept[0]:>24}{kept[1]:>24}{same:>14}")
        print(f"{'':8}vLLM's texts part at margins of {[round(each, 3) for each in row['vllm_parted_margins']]} nats")
    if args.json:
        found = {"cpu": host.cpu_model(), "threads": host.threads(), "rows": rows}
        args.json.write_text(json.dumps(found, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
