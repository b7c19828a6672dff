"""A day of requests as 50,000 short ones against one server: memory, and every answer held to plain decoding.

    python tests/benchmarks/soak.py OUTPUT [--requests 50000] [--clients 16] [--record examples/soak.md]

OUTPUT is what `optikit run` wrote; `--tiny DIR` makes one of random weights there first. Clients ask in closed loops on
kept connections, each its own prompts: a prompt's number is in its text, and every answer is compared with what
`runtime.load(OUTPUT)` decodes alone. Every 50th is a stream that its client leaves, every 500th is garbage.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml
from record import ROOT, commit
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(ROOT))

from optikit import host, runtime
from optikit.app import door
from optikit.runtime.generate import TextGenerator
from tests.conftest import build_tiny_llama

PROMPTS, TOKENS = 400, 6
LEFT, GARBAGE = 50, 500
"""Every so many-th request is a stream that is left, or is no request at all."""
STRENGTH = 12
LEAST_DISTINCT = 0.9
"""Share of prompts whose answer no other prompt has: fewer, and a mixed-up answer wouldn't show."""
WARM_SHARE = 0.1
"""Requests after which memory is compared with."""


@dataclass
class Seen:
    """What clients counted, and the server's memory over the requests."""

    counts: Counter[str] = field(default_factory=Counter)
    memory: list[tuple[int, float]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, what: str) -> None:
        """Count."""
        with self.lock:
            self.counts[what] += 1


def tiny(place: Path) -> Path:
    """Make an output of random weights with the public command; return it."""
    model = build_tiny_llama(place / "model")
    strengthen(model / "model.safetensors")
    recipe = {"model": str(model), "stages": [{"compile": {"engine": "onnxruntime"}}]}  # float32: no ties by rounding
    (place / "tiny.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    command = [sys.executable, "-m", "optikit", "run", str(place / "tiny.yaml"), "--out", str(place / "out")]
    subprocess.run(command, check=True)
    return place / "out"


def strengthen(weights: Path) -> None:
    """Make answers of a random model depend on all of a prompt: let its blocks outweigh the last token's embedding."""
    stronger = {
        name: tensor * STRENGTH if name.endswith("_proj.weight") else tensor
        for name, tensor in load_file(weights).items()
    }
    save_file(stronger, weights, metadata={"format": "pt"})


def expected(output: Path) -> list[tuple[str, list[int]]]:
    """Return prompts, and the tokens that are decoded after each alone."""
    _, place = door.enter(output)
    decoder = runtime.load(output)
    generator = TextGenerator(decoder, place)
    prompts = [f"stone {number} river {number * 7 % 101} the" for number in range(PROMPTS)]
    found = []
    for prompt in prompts:
        tokens = decoder.greedy(generator.encode(prompt, chat=False), TOKENS)
        found.append((prompt, [int(token) for token in tokens]))
    return found


@contextmanager
def served(output: Path, batch: int) -> Iterator[tuple[str, int]]:
    """Serve an output; yield address and process id."""
    command = [sys.executable, "-m", "optikit", "serve", str(output), "--port", "0", "--batch", str(batch)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ) as server:
        assert server.stderr is not None
        try:
            yield server.stderr.readline().strip(), server.pid
        finally:
            server.terminate()


def rss_mib(pid: int) -> float:
    """Return the resident memory of a process."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def client(url: str, known: list[tuple[str, list[int]]], numbers: range, seen: Seen) -> None:
    """Ask, and hold every answer to what is known."""
    place = urlsplit(url)
    connection = http.client.HTTPConnection(place.hostname or "", place.port, timeout=120)
    for number in numbers:
        if number % GARBAGE == 1:
            connection.request("POST", f"{place.path}/completions", b'{"prompt": [[')
            response = connection.getresponse()
            response.read()
            seen.add("garbage refused" if response.status == http.HTTPStatus.BAD_REQUEST else "garbage taken")
        elif number % LEFT == 1:
            leave(place.hostname or "", place.port or 0, f"{place.path}/completions", known[number % PROMPTS][0])
            seen.add("streams left")
        else:
            prompt, tokens = known[number % PROMPTS]
            body = asked(prompt)
            connection.request("POST", f"{place.path}/completions", json.dumps(body))
            response = connection.getresponse()
            found = json.loads(response.read())
            if response.status != http.HTTPStatus.OK:
                seen.add(f"status {response.status}")
            else:
                seen.add("right" if found["choices"][0]["token_ids"] == tokens else "wrong")


def asked(prompt: str) -> dict[str, Any]:
    """Return the body of a request."""
    fixed = {"max_tokens": TOKENS, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    return {"prompt": prompt, **fixed}


def leave(name: str, port: int, path: str, prompt: str) -> None:
    """Begin to read a stream, and go."""
    connection = http.client.HTTPConnection(name, port, timeout=120)
    connection.request("POST", path, json.dumps({**asked(prompt), "stream": True}))
    connection.getresponse().read(10)
    connection.close()


def main() -> None:
    """Ask, and tell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--tiny", action="store_true", help="make OUTPUT/out of random weights first")
    parser.add_argument("--requests", type=int, default=50_000)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--record", type=Path)
    args = parser.parse_args()
    output = tiny(args.output) if args.tiny else args.output
    known, seen = expected(output), Seen()
    distinct = len({tuple(tokens) for _, tokens in known})
    if distinct < LEAST_DISTINCT * PROMPTS:
        sys.exit(f"only {distinct} of {PROMPTS} answers differ: a mixed-up one wouldn't show")
    with served(output, args.batch) as (url, pid):
        started = time.monotonic()
        threads = [
            threading.Thread(target=client, args=(url, known, range(first, args.requests, args.clients), seen))
            for first in range(args.clients)
        ]
        for each in threads:
            each.start()
        while any(each.is_alive() for each in threads):
            seen.memory.append((sum(seen.counts.values()), rss_mib(pid)))
            time.sleep(1)
        seconds = time.monotonic() - started
        seen.memory.append((sum(seen.counts.values()), rss_mib(pid)))
    warm = next(mib for count, mib in seen.memory if count >= WARM_SHARE * args.requests)
    last = seen.memory[-1][1]
    lost = args.requests - sum(seen.counts.values())
    counted = "\n".join(f"| {what} | {count} |" for what, count in sorted(seen.counts.items()))
    settings = f"--requests {args.requests} --clients {args.clients} --batch {args.batch}"
    page = PAGE.format(
        settings=settings + (" --tiny" if args.tiny else ""),
        commit=commit(),
        date=time.strftime("%Y-%m-%d"),
        cpu=host.cpu_model(),
        threads=host.threads(),
        seconds=seconds,
        rate=args.requests / seconds,
        counted=counted,
        lost=lost,
        warm=warm,
        last=last,
        growth=100 * (last / warm - 1),
        distinct=distinct,
        prompts=PROMPTS,
        tokens=TOKENS,
    )
    print(page)
    if args.record:
        args.record.write_text(page, encoding="utf-8")
    failed = seen.counts["wrong"] or lost or last > 1.05 * warm
    sys.exit(1 if failed else 0)


PAGE = """# A day of requests against one server

`python tests/benchmarks/soak.py DIR {settings}`, commit {commit}, {date},
{cpu}, {threads} threads: {seconds:.0f} s, {rate:.0f} requests per second. A model of random
weights behind `optikit serve`; {prompts} prompts with {distinct} different answers of {tokens} tokens, each answer
compared with what is decoded alone. Every 50th request is a stream that its client leaves, every 500th is no JSON.

| what | requests |
|:--|--:|
{counted}
| lost | {lost} |

Resident memory of the server: {warm:.1f} MiB after a tenth of the requests, {last:.1f} MiB after all ({growth:+.1f} %).
"""

if __name__ == "__main__":
    main()
