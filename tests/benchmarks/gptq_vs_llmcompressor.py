"""GPTQ beside llm-compressor's, in one sitting: perplexity, time and peak memory on the same windows of the same text.

Run (minutes; the peer lives in an environment of its own, made with `pip install llmcompressor==0.14.0.1`):

    python tests/benchmarks/gptq_vs_llmcompressor.py --model DIR --text prose.utf8 --peer-python PEER/bin/python

Every arm is a child process from start to written weights: its wall time and peak resident memory are what the kernel
says of it. All weights, ours and the peer's, are judged by the same code: perplexity in float32 on the last fifth of
the text, which calibration never sees.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from optikit import host
from optikit.calibration import calibration_set
from optikit.evaluation.perplexity import token_nll
from optikit.formats import load_state
from optikit.stage import Calibration
from optikit.store.sources import cut

HERE = Path(__file__).parent
ARMS: dict[str, dict[str, Any]] = {
    "optikit rtn, symmetric": {"method": "rtn", "mse": False},
    "optikit gptq, plain": {"method": "gptq", "mse": False, "correct": False},
    "optikit gptq, defaults": {"method": "gptq"},
    "optikit gptq, asymmetric": {"method": "gptq", "sym": False},
}
OURS = """
import json, sys
from pathlib import Path
from optikit import stages
from optikit.stage import Calibration, Job
request = json.loads(Path(sys.argv[1]).read_text())
stage = stages.load("quantize", request["method"])
options = stage.Options.model_validate(request["options"])
calibration = Calibration(text=Path(request["text"]), samples=request["samples"], length=request["length"])
paths = {name: Path(request[name]) for name in ("source", "dest", "scratch")}
for name in ("dest", "scratch"):
    paths[name].mkdir(parents=True)
stage.run(options, Job(**paths, calibration=calibration, threads=request["threads"]))
"""


def child(command: list[str], log: Path) -> tuple[float, float, str]:
    """Run a command and return its seconds, its peak resident memory in MiB, and what it printed."""
    started = time.monotonic()
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{command[0]} failed; see {log}")
    return time.monotonic() - started, usage.ru_maxrss / 1024, log.read_text()


def ours(arm: dict[str, Any], args: argparse.Namespace, work: Path, name: str) -> tuple[float, float, Path]:
    """Quantize in a child; return seconds, MiB and the directory that was written."""
    place = work / name.replace(" ", "-").replace(",", "")
    place.mkdir()
    options = {key: value for key, value in arm.items() if key != "method"} | {"group_size": args.group_size}
    request = {
        "method": arm["method"],
        "options": options,
        "source": str(args.model),
        "dest": str(place / "dest"),
        "scratch": str(place / "scratch"),
        "text": str(work / "calibration.txt"),
        "samples": args.samples,
        "length": args.length,
        "threads": host.threads(),
    }
    (place / "request.json").write_text(json.dumps(request))
    seconds, mib, _ = child([sys.executable, "-c", OURS, str(place / "request.json")], place / "log.txt")
    return seconds, mib, place / "dest"


def peer(args: argparse.Namespace, work: Path, tokens: np.ndarray) -> tuple[float, float, Path, Any]:
    """Quantize with llm-compressor; return seconds, MiB, the file of its dense weights, and its versions."""
    place = work / "peer"
    place.mkdir()
    np.save(place / "tokens.npy", tokens)
    request = {
        "model": str(args.model),
        "tokens": str(place / "tokens.npy"),
        "group_size": args.group_size,
        "dest": str(place),
        "threads": host.threads(),
    }
    (place / "request.json").write_text(json.dumps(request))
    command = [str(args.peer_python), str(HERE / "peers_llmcompressor.py"), str(place / "request.json")]
    seconds, mib, printed = child(command, place / "log.txt")
    return seconds, mib, place / "dequantized.safetensors", json.loads(printed.strip().splitlines()[-1])["versions"]


def weights(made: Path, model: Path) -> dict[str, Any]:
    """Return dense weights of a directory of ours, or of the model with what a peer's file replaces of it."""
    if made.is_dir():
        return dict(load_state(made, torch.float32))
    return dict(load_state(model, torch.float32)) | load_file(made)


@torch.inference_mode()
def perplexity(model: Any, state: dict[str, Any], rows: np.ndarray) -> float:
    """Return the perplexity of a state dict on (windows, length) tokens."""
    unexpected = model.load_state_dict(state, strict=False).unexpected_keys
    if unexpected:
        sys.exit(f"the model has no {unexpected[0]}")
    total, count = 0.0, 0
    for row in rows:
        logits = model(torch.from_numpy(row[None]), use_cache=False).logits[0]
        nll = token_nll(logits[:-1].numpy(), row[1:])
        total, count = total + float(nll.sum()), count + len(nll)
    return math.exp(total / count)


def main() -> None:
    """Measure every arm and print a table and JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="dense model directory")
    parser.add_argument("--text", type=Path, required=True, help="UTF-8 prose")
    parser.add_argument("--peer-python", type=Path, help="python of an environment with llmcompressor")
    parser.add_argument("--work", type=Path, required=True, help="empty directory for what is written")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--window", type=int, default=2048)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--arms", nargs="*", default=list(ARMS))
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    text = args.text.read_text(encoding="utf-8")
    for name, part in (("calibration", (0.0, 0.8)), ("held-out", (0.8, 1.0))):
        (args.work / f"{name}.txt").write_text(cut(text, part, ("<doc", "</doc")), encoding="utf-8")

    calibration = Calibration(text=args.work / "calibration.txt", samples=args.samples, length=args.length)
    tokens = calibration_set.draw(
        args.model, calibration.text, samples=calibration.samples, length=calibration.length, seed=0
    ).numpy()
    rows: dict[str, dict[str, float]] = {}
    # Weights are read after the last child: a child's peak starts at the memory of the process that started it.
    made: dict[str, Path] = {}
    versions: Any = {}
    for name in args.arms:
        seconds, mib, made[name] = ours(ARMS[name], args, args.work, name)
        rows[name] = {"seconds": seconds, "peak_memory_mib": mib}
        print(name, rows[name], flush=True)
    if args.peer_python:
        seconds, mib, made["llm-compressor gptq"], versions = peer(args, args.work, tokens)
        rows["llm-compressor gptq"] = {"seconds": seconds, "peak_memory_mib": mib}
    judge(args, rows, made)
    report(rows, versions)


def judge(args: argparse.Namespace, rows: dict[str, dict[str, float]], made: dict[str, Path]) -> None:
    """Fill in the perplexity of every arm and of the dense model."""
    from tokenizers import Tokenizer
    from transformers import AutoModelForCausalLM

    tokenizer = Tokenizer.from_file(str(args.model / "tokenizer.json"))
    ids = tokenizer.encode((args.work / "held-out.txt").read_text(encoding="utf-8"), add_special_tokens=False).ids
    held_out = np.array(ids[: args.window * args.windows]).reshape(args.windows, args.window)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    rows["dense"] = {"perplexity": perplexity(model, dict(load_state(args.model, torch.float32)), held_out)}
    for name, path in made.items():
        rows[name]["perplexity"] = perplexity(model, weights(path, args.model), held_out)


def report(rows: dict[str, dict[str, float]], versions: Any) -> None:
    """Print what was measured, and ratios against the peer."""
    against = rows.get("llm-compressor gptq", {})
    print(f"\n{'arm':28} {'perplexity':>10} {'seconds':>8} {'MiB':>6} {'time / peer':>11}")
    for name, row in rows.items():
        ratio = f"{row['seconds'] / against['seconds']:.2f}" if against and "seconds" in row else ""
        cells = [f"{row['perplexity']:10.2f}", f"{row.get('seconds', 0):8.1f}", f"{row.get('peak_memory_mib', 0):6.0f}"]
        print(f"{name:28} {' '.join(cells)} {ratio:>11}")
    print(json.dumps({"rows": rows, "peer": versions, "host": host.describe(), "torch": torch.__version__}))


if __name__ == "__main__":
    main()
