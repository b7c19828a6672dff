"""One arm of a speed test: a process that loads one model once and decodes when told to. JSON lines in and out.

    in   {"load": {"directory": "…", "runtime": "…", "dtype": "…", "threads": 2, "max_tokens": 192, …}}
    out  {"ok": true, "runtime": "…", "dtype": "…", "threads": 2, "max_tokens": 192, "load_s": 1.5}
    in   {"decode": {"prompt": [1, 2], "new_tokens": 64}}
    out  {"ok": true, "start_ns": 1, "token_ns": [2, 3], "tokens": [7, 8]}
    in   {"peak": {}}
    out  {"ok": true, "peak_memory_mib": 512.0}

A failure is {"ok": false, "code": …, "message": …, "fix": …}. The end of the input ends the process. Whatever a library
prints goes to stderr.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optikit.process import failure, memory

if TYPE_CHECKING:
    from optikit.runtime.decoder import Decoder
    from optikit.runtime.decoders.vllm import ServedDecoder


def load(request: dict[str, Any]) -> tuple[Decoder | ServedDecoder, dict[str, Any]]:
    """Load the model and say what was really loaded: nothing falls back silently.

    The time counts from files on disk and no library imported, as a server's cold start does.
    """
    started = time.perf_counter()
    decoder: Decoder | ServedDecoder = _served(request) if request["runtime"] == "vllm" else _loaded(request)
    seconds = time.perf_counter() - started
    read_back = ("runtime", "dtype", "threads", "max_tokens")
    found = {name: getattr(decoder, name) for name in read_back}
    return decoder, {"load_s": seconds, "device": getattr(decoder, "device", "cpu")} | found


def _loaded(request: dict[str, Any]) -> Decoder:
    from optikit import runtime

    directory, speculator = request.pop("directory"), request.pop("speculator", None)
    return runtime.load(Path(directory), **request, speculator=Path(speculator) if speculator else None)


def _served(request: dict[str, Any]) -> ServedDecoder:
    from optikit.runtime.decoders.vllm import ServedDecoder

    return ServedDecoder(
        Path(request["directory"]),
        threads=request["threads"],
        max_tokens=request["max_tokens"],
        log=Path(request["log"]),
        hang_s=request["hang_s"],
        speculator=Path(request["speculator"]) if request["speculator"] else None,
    )


def peak(decoder: Decoder | ServedDecoder | None) -> dict[str, Any]:
    """Return the highest resident memory of whatever holds the model, and that of the GPU where it holds it."""
    served = getattr(decoder, "peak_mib", None)
    found: dict[str, Any] = {"peak_memory_mib": served() if served else memory.peak_mib()}
    device = getattr(decoder, "device", "cpu")
    return found | {"device_memory_mib": _device_mib(device) if device.startswith("cuda") else None}


def _device_mib(device: str) -> float:
    import torch

    return torch.cuda.max_memory_allocated(device) / 2**20


def decode(decoder: Decoder | ServedDecoder, request: dict[str, Any]) -> dict[str, Any]:
    """Decode and time every token; garbage of the run before is collected first, outside the clock."""
    import numpy as np

    prompt = np.array(request["prompt"], np.int64)
    token_ns, tokens = [], []
    gc.collect()
    start_ns = time.perf_counter_ns()
    for token in decoder.greedy(prompt, request["new_tokens"]):
        token_ns.append(time.perf_counter_ns())
        tokens.append(int(token))
    return {"start_ns": start_ns, "token_ns": token_ns, "tokens": tokens}


def serve() -> None:
    """Answer requests until the input ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    decoder: Decoder | ServedDecoder | None = None
    for line in sys.stdin:
        ((verb, request),) = json.loads(line).items()
        try:
            if verb == "load":
                decoder, answer = load(request)
            elif verb == "decode" and decoder is not None:
                answer = decode(decoder, request)
            else:
                answer = peak(decoder)
        except Exception as error:  # noqa: BLE001 - whatever goes wrong has to cross the process border
            answer = failure.as_failure(error)
            sys.stderr.write(answer["traceback"])
        print(json.dumps({"ok": True} | answer), file=answers, flush=True)


if __name__ == "__main__":
    serve()
