"""Decode speed at batch 1, side by side: transformers, onnxruntime-genai's own loop, ours, llama.cpp.

    python tests/benchmarks/decode_speed.py --dense DIR --compiled DIR --text FILE \
        --gguf FILE --llama-python ENV/bin/python --repetitions 10 --json result.json

Every arm is a process of its own that loads its model once. All arms decode the same prompt in a round; rounds go
there and back again (A B C, C B A). An arm that waits is stopped by SIGSTOP, so that no spinning thread disturbs.
Speed is (tokens - 1) / (time of the last - time of the first); the ratio is the median over rounds of the ratio to
`optikit` within a round. Leave an option out and its arms are left out.

llama.cpp needs `pip install llama-cpp-python` in an environment of its own; this file is also the program that runs
there and needs nothing else. It is driven through its C interface, without the Python wrapper's sampling. Its AMX
kernels die with a general protection fault on some virtual machines (0.3.36: `ldtilecfg`); `--llama-plain` avoids them.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

Decode = Callable[[list[int], int], Iterator[int]]


def genai_loop(directory: str, threads: int, _length: int) -> Decode:
    """Load a compiled directory into onnxruntime-genai; end-of-text is put off by its own `min_length`."""
    import numpy as np
    import onnxruntime_genai as genai

    config = genai.Config(directory)
    config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
    model = genai.Model(config)

    def decode(prompt: list[int], new_tokens: int) -> Iterator[int]:
        settings, length = genai.GeneratorParams(model), len(prompt) + new_tokens
        settings.set_search_options(do_sample=False, min_length=length, max_length=length)
        generator = genai.Generator(model, settings)
        generator.append_tokens(np.array(prompt, np.int32))
        while not generator.is_done():
            generator.generate_next_token()
            yield int(generator.get_next_tokens()[0])

    return decode


def llama_loop(gguf: str, threads: int, length: int, repacked: bool = True) -> Decode:
    """Load a gguf file into llama.cpp; greedy, end-of-text ignored."""
    import llama_cpp
    import numpy as np

    llama_cpp.llama_backend_init()
    loading = llama_cpp.llama_model_default_params()
    loading.use_extra_bufts = repacked
    model = llama_cpp.llama_model_load_from_file(gguf.encode(), loading)
    running = llama_cpp.llama_context_default_params()
    running.n_ctx = running.n_batch = length + 8
    running.n_threads = running.n_threads_batch = threads
    context = llama_cpp.llama_init_from_model(model, running)
    vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))

    def run(tokens: list[int]) -> int:
        row = (llama_cpp.llama_token * len(tokens))(*tokens)
        if llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(row, len(tokens))):
            raise RuntimeError("llama_decode failed")
        return int(np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(context, -1), (vocab,)).argmax())

    def decode(prompt: list[int], new_tokens: int) -> Iterator[int]:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        token = run(prompt)
        for _ in range(new_tokens - 1):
            yield token
            token = run([token])
        yield token

    return decode


def plain_llama_loop(gguf: str, threads: int, length: int) -> Decode:
    """Load a gguf file into llama.cpp without repacking its weights."""
    return llama_loop(gguf, threads, length, repacked=False)


LOOPS = {"genai": genai_loop, "llama": llama_loop, "plain-llama": plain_llama_loop}
PACKAGES = {"genai": ("onnxruntime-genai", "onnxruntime")}


def serve(kind: str) -> None:
    """Answer `load` and `decode` requests as JSON lines, as optikit's own arms do."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    decode: Decode | None = None
    for line in sys.stdin:
        ((verb, request),) = json.loads(line).items()
        if verb == "load":
            decode = LOOPS[kind](request["directory"], request["threads"], request["length"])
            answer: dict[str, Any] = {
                "versions": {name: metadata.version(name) for name in PACKAGES.get(kind, ("llama-cpp-python",))}
            }
        elif decode is None:
            raise RuntimeError("decode before load")
        else:
            token_ns, tokens, start = [], [], time.perf_counter_ns()
            for token in decode(request["prompt"], request["new_tokens"]):
                token_ns.append(time.perf_counter_ns())
                tokens.append(token)
            answer = {"start_ns": start, "token_ns": token_ns, "tokens": tokens}
        print(json.dumps({"ok": True, **answer}), file=answers, flush=True)


def wanted_arms(given: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Return what to start and what to tell it, by arm."""
    arms: dict[str, dict[str, Any]] = {}
    length = given.prompt_tokens + given.new_tokens
    mine = [sys.executable, str(Path(__file__).resolve()), "--serve"]
    if given.dense:
        for dtype in ("float32", "bfloat16"):
            load = {"directory": given.dense, "runtime": "transformers", "dtype": dtype}
            arms[f"transformers {dtype}"] = {"command": None, "load": load}
    if given.compiled:
        arms["onnxruntime-genai"] = {
            "command": [*mine, "genai"],
            "load": {"directory": given.compiled, "length": length},
        }
    if given.gguf and given.llama_python:
        command = [given.llama_python, *mine[1:], "plain-llama" if given.llama_plain else "llama"]
        arms[f"llama.cpp {Path(given.gguf).stem.split('.')[-1]}"] = {
            "command": command,
            "load": {"directory": given.gguf, "length": length},
        }
    if given.compiled:
        load = {"directory": given.compiled, "runtime": "onnxruntime", "dtype": "auto"}
        arms["optikit"] = {"command": None, "load": load}
    return arms


def prompts(given: argparse.Namespace) -> list[list[int]]:
    """Cut the text into prompts of equal length."""
    from transformers import AutoTokenizer

    directory = given.dense or given.compiled
    text = Path(given.text).read_text(encoding="utf-8")[: 20 * given.prompt_tokens * (given.repetitions + 1)]
    tokens = AutoTokenizer.from_pretrained(directory, local_files_only=True)(text).input_ids
    size = given.prompt_tokens
    found = [tokens[start : start + size] for start in range(0, len(tokens) - size + 1, size)]
    if not found:
        raise SystemExit(f"{given.text} has {len(tokens)} tokens, fewer than a prompt")
    return found


def tokens_per_s(answer: dict[str, Any]) -> float:
    times = answer["token_ns"]
    return (len(times) - 1) / (times[-1] - times[0]) * 1e9


def measure(given: argparse.Namespace) -> dict[str, Any]:
    """Run all rounds; return every sample with versions and host."""
    from optikit import host
    from optikit.evaluation.speed_client import Arm

    texts, specs = prompts(given), wanted_arms(given)
    samples: dict[str, list[dict[str, Any]]] = {name: [] for name in specs}
    versions: dict[str, str] = {}
    with contextlib.ExitStack() as stack, tempfile.TemporaryDirectory() as logs:
        arms = {}
        for number, (name, spec) in enumerate(specs.items()):
            arm = stack.enter_context(Arm(name, log=Path(logs) / f"{number}.log", hang_s=600, command=spec["command"]))
            answer = arm.ask("load", threads=given.threads, **spec["load"])
            versions |= answer.get("versions", {})
            arm.ask("decode", prompt=texts[0], new_tokens=given.new_tokens)  # warm
            arms[name] = arm
        for index in range(given.repetitions):
            for name in list(arms) if index % 2 == 0 else reversed(arms):
                prompt = texts[(index + 1) % len(texts)]
                answer = arms[name].ask("decode", prompt=prompt, new_tokens=given.new_tokens)
                if len(answer["tokens"]) != given.new_tokens:
                    raise SystemExit(f"{name} decoded {len(answer['tokens'])} tokens, not {given.new_tokens}")
                samples[name].append({"round": index, "tokens_per_s": tokens_per_s(answer), **answer})
            print(f"round {index + 1} of {given.repetitions}", file=sys.stderr)
    ours = ("torch", "transformers", "onnxruntime", "onnxruntime-genai")
    return {
        "host": host.describe(),
        "load_average": os.getloadavg(),
        "threads": given.threads,
        "versions": versions | {name: metadata.version(name) for name in ours},
        "prompt_tokens": given.prompt_tokens,
        "new_tokens": given.new_tokens,
        "arms": summarize(samples),
        "samples": samples,
    }


def summarize(samples: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, float]]:
    """Return the median speed of each arm, its spread, and how much faster `optikit` was in the same rounds."""
    speeds = {name: [sample["tokens_per_s"] for sample in each] for name, each in samples.items()}
    found = {}
    for name, each in speeds.items():
        ratios = [ours / theirs for ours, theirs in zip(speeds.get("optikit", each), each, strict=True)]
        first = statistics.median((s["token_ns"][0] - s["start_ns"]) / 1e6 for s in samples[name])
        row = {"tokens_per_s": statistics.median(each), "slowest": min(each), "fastest": max(each)}
        found[name] = row | {"ttft_ms": first, "optikit_is_faster_by": statistics.median(ratios)}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--serve", choices=LOOPS, help=argparse.SUPPRESS)
    parser.add_argument("--dense", help="Hugging Face directory: transformers in float32 and bfloat16")
    parser.add_argument("--compiled", help="directory of the onnxruntime engine: genai's loop and ours")
    parser.add_argument("--gguf", help="4-bit gguf file of the same model")
    parser.add_argument("--llama-python", help="interpreter that has llama-cpp-python")
    parser.add_argument(
        "--llama-plain",
        action="store_true",
        help="don't repack weights; AMX kernels of some builds crash on some hosts",
    )
    parser.add_argument("--text", help="UTF-8 text to take prompts from")
    parser.add_argument("--prompt-tokens", type=int, default=96)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--repetitions", type=int, default=10)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--json", help="file for every sample")
    given = parser.parse_args()
    if given.serve:
        serve(given.serve)
        return
    if not given.text or not (given.dense or given.compiled):
        parser.error("--text and one of --dense and --compiled are needed")
    result = measure(given)
    if given.json:
        Path(given.json).write_text(json.dumps(result, indent=1), encoding="utf-8")
    print(f"{'':24}{'tokens/s':>10}{'slowest':>10}{'fastest':>10}{'TTFT ms':>10}{'optikit':>10}")
    for name, row in result["arms"].items():
        figures = [row[key] for key in ("tokens_per_s", "slowest", "fastest", "ttft_ms")]
        print(f"{name:24}" + "".join(f"{figure:10.1f}" for figure in figures) + f"{row['optikit_is_faster_by']:9.2f}x")


if __name__ == "__main__":
    main()
