"""What serving costs over generating in the same process, and what several clients at once bring.

    python tests/benchmarks/serving.py OUTPUT [--rounds 12] [--tokens 64] [--record examples/serving.md]

Rounds alternate: the same prompt by `TextGenerator` here, then by `optikit serve` over HTTP, streamed; once with
`--batch 1` and once with `--batch 8`. Then clients ask that server in a closed loop, 1, 4 and 8 at a time.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from record import commit, machine

from optikit import host, runtime
from optikit.app import door
from optikit.evaluation import load_test
from optikit.evaluation.statistics import paired_ratio
from optikit.runtime.completions_client import Client, Streamed
from optikit.runtime.generate import TextGenerator

BATCH = 8
LIBRARIES = ("onnxruntime", "tokenizers", "starlette", "uvicorn")
PROMPT = "The most important thing to know about rivers is that"
EXTRA = {"ignore_eos": True, "stream_options": {"include_usage": True}, "return_token_ids": True}


def here(generator: TextGenerator, tokens: int) -> Streamed:
    """Generate in this process, timed as a client times a server."""
    start = time.perf_counter_ns()
    prompt = generator.encode(PROMPT, chat=False)
    generator.ends = frozenset()
    pieces = [chunk.at_ns for chunk in generator.answer(prompt, tokens)]
    return Streamed(start_ns=start, piece_ns=tuple(pieces), prompt_tokens=len(prompt), output_tokens=len(pieces))


@contextmanager
def asking(output: Path, batch: int, tokens: int) -> Iterator[Callable[[int], Streamed]]:
    """Serve an output; yield what asks it once."""
    command = [sys.executable, "-m", "optikit", "serve", str(output), "--port", "0", "--batch", str(batch)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ) as server:
        assert server.stderr is not None
        try:
            with Client(server.stderr.readline().strip(), timeout_s=120) as client:
                model = client.models()[0]
                yield lambda _: client.stream(model, PROMPT, tokens, extra=EXTRA)
        finally:
            server.terminate()


def costs(generator: TextGenerator, ask: Callable[[int], Streamed], batch: int, args: argparse.Namespace) -> list[str]:
    """Return rows: what is written here against what is served."""
    for _ in range(2):
        here(generator, args.tokens), ask(0)
    pairs = [(here(generator, args.tokens), ask(0)) for _ in range(args.rounds)]
    rows = []
    for name, words in (("ttft_ms", "time to first token, ms"), ("tpot_ms", "time per output token, ms")):
        one, other = (np.array([getattr(pair[side], name) for pair in pairs]) for side in (0, 1))
        value, ci95 = paired_ratio(other, one)
        added = np.median(other - one)
        figures = (
            f"{np.median(one):.2f} | {np.median(other):.2f} | {added:+.2f} | {value:.3f} ({ci95[0]:.3f}–{ci95[1]:.3f})"
        )
        rows.append(f"| {batch} | {words} | {figures} |")
    return rows


def rates(ask: Callable[[int], Streamed], each: int) -> list[str]:
    """Return rows: tokens per second over the number of clients, each number in two passes that are summed."""
    tokens, seconds = Counter[int](), Counter[int]()
    for clients in (1, 4, 8) * 2:
        replies = load_test.closed_loop(ask, range(each * clients), clients)
        ends = [reply.streamed.piece_ns[-1] for reply in replies if reply.streamed]
        seconds[clients] += max(ends) - min(reply.due_ns for reply in replies)
        tokens[clients] += sum(reply.streamed.tokens for reply in replies if reply.streamed)
    found = {clients: 1e9 * tokens[clients] / seconds[clients] for clients in tokens}
    return [f"| {clients} | {rate:.0f} | {rate / found[1]:.2f} |" for clients, rate in found.items()]


def main() -> None:
    """Measure, and tell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--each", type=int, default=6, help="requests of each client")
    parser.add_argument("--record", type=Path)
    args = parser.parse_args()
    _, place = door.enter(args.output)
    generator = TextGenerator(runtime.load(args.output), place)
    rows = []
    for batch in (1, BATCH):
        with asking(args.output, batch, args.tokens) as ask:
            rows += costs(generator, ask, batch, args)
            several = rates(ask, args.each) if batch == BATCH else []
    page = PAGE.format(
        settings=f"--rounds {args.rounds} --tokens {args.tokens} --each {args.each}",
        commit=commit(),
        date=time.strftime("%Y-%m-%d"),
        machine=machine({"host": host.describe(), "versions": host.versions(LIBRARIES)}),
        rows="\n".join(rows),
        several="\n".join(several),
        batch=BATCH,
    )
    print(page)
    if args.record:
        args.record.write_text(page, encoding="utf-8")


PAGE = """# What serving costs, and what several clients at once bring

`python tests/benchmarks/serving.py OUTPUT {settings}` on what `recipes/quickstart.yaml` makes (SmolLM2-135M, 4 bits,
onnxruntime), commit {commit}, {date}. Rounds alternate: the same prompt in the benchmark's own process, then over HTTP,
streamed, from a server on the same cores. Medians; ratios with 95 % intervals.

| `--batch` | | in this process | served | added | served / here |
|--:|:--|--:|--:|--:|--:|
{rows}

| clients, `--batch {batch}` | tokens/s | of one client's |
|--:|--:|--:|
{several}

{machine}
"""


if __name__ == "__main__":
    main()
