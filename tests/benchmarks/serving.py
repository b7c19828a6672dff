"""What serving costs over generating in the same process, and what several clients at once bring.

    python tests/benchmarks/serving.py OUTPUT [--rounds 12] [--tokens 64]

Rounds alternate: the same prompt by `TextGenerator` here, then by `optikit serve` over HTTP, streamed. Then clients ask
the server in a closed loop, 1, 4 and 8 at a time. Prints Markdown; times are medians of a sitting.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from optikit import host, runtime
from optikit.app import door
from optikit.evaluation import load_test
from optikit.evaluation.statistics import paired_ratio
from optikit.runtime.completions_client import Client, Streamed
from optikit.runtime.generate import TextGenerator

PROMPT = "The most important thing to know about rivers is that"
EXTRA = {"ignore_eos": True, "stream_options": {"include_usage": True}, "return_token_ids": True}


def here(generator: TextGenerator, tokens: int) -> Streamed:
    """Generate in this process, timed as a client times a server."""
    start = time.perf_counter_ns()
    prompt = generator.encode(PROMPT, chat=False)
    generator.ends = frozenset()
    pieces = [chunk.at_ns for chunk in generator.answer(prompt, tokens)]
    return Streamed(start_ns=start, piece_ns=tuple(pieces), prompt_tokens=len(prompt), output_tokens=len(pieces))


def main() -> None:
    """Measure, and print a page."""
    parser = argparse.ArgumentParser()
    parser.add_argument("output", type=Path)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--batch", type=int, default=8)
    asked = parser.parse_args()
    _, place = door.enter(asked.output)
    generator = TextGenerator(runtime.load(asked.output), place)
    command = [sys.executable, "-m", "optikit", "serve", str(asked.output), "--port", "0", "--batch", str(asked.batch)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ) as server:
        assert server.stderr is not None
        url = server.stderr.readline().strip()
        with Client(url, timeout_s=120) as client:
            model = client.models()[0]

            def ask(_: int) -> Streamed:
                return client.stream(model, PROMPT, asked.tokens, extra=EXTRA)

            here(generator, asked.tokens), ask(0)
            pairs = [(here(generator, asked.tokens), ask(0)) for _ in range(asked.rounds)]
            rates = {}
            for clients in (1, 4, 8):
                replies = load_test.closed_loop(ask, range(4 * clients), clients)
                ends = [each.streamed.piece_ns[-1] for each in replies if each.streamed]
                seconds = (max(ends) - min(each.due_ns for each in replies)) / 1e9
                rates[clients] = sum(each.streamed.tokens for each in replies if each.streamed) / seconds
        server.terminate()
    print(f"{host.cpu_model()}, {host.threads()} threads; {asked.rounds} rounds of {asked.tokens} tokens\n")
    print("| | in this process | served | served / here |\n|:--|--:|--:|--:|")
    for name in ("ttft_ms", "tpot_ms"):
        one, other = (np.array([getattr(pair[side], name) for pair in pairs]) for side in (0, 1))
        value, ci95 = paired_ratio(other, one)
        print(f"| {name} | {np.median(one):.2f} | {np.median(other):.2f} | {value:.3f} ({ci95[0]:.3f}–{ci95[1]:.3f}) |")
    print("\n| clients | tokens/s | of one client's |\n|--:|--:|--:|")
    for clients, rate in rates.items():
        print(f"| {clients} | {rate:.0f} | {rate / rates[1]:.2f} |")


if __name__ == "__main__":
    main()
