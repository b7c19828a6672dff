"""The built-in scorer beside lm-evaluation-harness: the same items, the same model, choice by choice.

Run (minutes; the peer lives in an environment of its own, made with `pip install "lm_eval[hf]==0.4.13"`):

    python tests/benchmarks/lm_eval_agreement.py --model DIR --text prose.utf8 --peer-python PEER/bin/python --work W

Two tasks are made of prose, the same ones whenever they are made of the same file: which sentence comes next, and how
a sentence ends; wrong choices are the right ones of other items. Ours go through the stage that recipes use, theirs
through `simple_evaluate`, both in float32. Also perplexity of one text per word, under the protocol `lmeval`.
Exits with 1 where fewer than 99.5 % of the choices are the same.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

from optikit import host
from optikit.stage import Job
from optikit.stages.measure import quality, tasks
from optikit.store.sources import cut

HERE = Path(__file__).parent
WANTED = 0.995
CHOICES = 4
WORDS = (8, 40)
"""Shortest and longest sentence that an item is made of."""


def sentences(paragraph: str) -> list[str]:
    """Return the sentences of a paragraph, as the end of one and a capital letter part them."""
    return [each.strip() for each in re.split(r"(?<=[.!?])\s+(?=[A-Z0-9\"'(])", paragraph) if each.strip()]


def next_sentences(text: str) -> Iterator[tuple[str, str]]:
    """Yield (a sentence, the one after it), the first two of each paragraph that fit."""
    for paragraph in text.split("\n"):
        found = sentences(paragraph)
        fitting = (pair for pair in pairwise(found) if all(map(_fits, pair)))
        yield from list(fitting)[:1]


def endings(text: str) -> Iterator[tuple[str, str]]:
    """Yield (first half, second half) of one sentence of each paragraph, parted between two words."""
    for paragraph in text.split("\n"):
        for sentence in [each for each in sentences(paragraph) if _fits(each)][-1:]:
            words = sentence.split(" ")
            yield " ".join(words[: len(words) // 2]), " ".join(words[len(words) // 2 :])


def _fits(sentence: str) -> bool:
    return WORDS[0] <= len(sentence.split(" ")) <= WORDS[1]


def make(pairs: list[tuple[str, str]], count: int, seed: int) -> list[dict[str, Any]]:
    """Return items: the right continuation among those of other pairs, in an order that the seed decides."""
    draw = random.Random(seed)
    picked = draw.sample(sorted(set(pairs)), count)
    items = []
    for index, (prompt, right) in enumerate(picked):
        others = [other for place, (_, other) in enumerate(picked) if place != index and other != right]
        choices = [*draw.sample(others, CHOICES - 1), right]
        draw.shuffle(choices)
        items.append({"id": str(index), "prompt": prompt, "choices": choices, "answer": choices.index(right)})
    return items


def write(items: list[dict[str, Any]], path: Path) -> Path:
    """Write JSON Lines."""
    path.write_text("".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items), encoding="utf-8")
    return path


def ours(args: argparse.Namespace, files: dict[str, Path], document: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Answer the tasks and score the document with the stages that recipes use."""
    jobs = {}
    for name in ("tasks", "quality"):
        jobs[name] = args.work / f"ours-{name}"
        jobs[name].mkdir()
    inputs = {tasks.role(name): path for name, path in files.items()} | {"tokenizer": args.model}
    shared: dict[str, Any] = {"source": args.model, "scratch": args.work / "scratch", "threads": host.threads()}
    asked = tasks.Options.model_validate(
        {"dtype": "float32", "tasks": [{"name": name, "items": args.items} for name in files]}
    )
    tasks.run(asked, Job(dest=jobs["tasks"], inputs=inputs, **shared))
    scored = quality.Options.model_validate(
        {"dtype": "float32", "protocol": "lmeval", "window": args.window, "windows": None}
    )
    texts = {"text": document, "tokenizer": args.model}
    facts = quality.run(scored, Job(dest=jobs["quality"], inputs=texts, **shared))
    return tasks.read_items(jobs["tasks"]), facts["perplexity"]


def theirs(args: argparse.Namespace, files: dict[str, Path], document: Path) -> dict[str, Any]:
    """Let lm-eval do the same."""
    text = write([{"text": document.read_text(encoding="utf-8")}], args.work / "document.jsonl")
    request = {
        "model": str(args.model.absolute()),
        "tasks": {name: str(path.absolute()) for name, path in files.items()},
        "document": str(text.absolute()),
        "window": args.window,
        "items": args.items,
        "threads": host.threads(),
    }
    path = args.work / "request.json"
    path.write_text(json.dumps(request), encoding="utf-8")
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(args.work.absolute() / "hf")}
    command = [str(args.peer_python), str(HERE / "peers_lm_eval.py"), str(path)]
    with (args.work / "lm-eval.log").open("w") as log:
        settings: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": log, "text": True}
        done = subprocess.run(command, check=False, env=os.environ | offline, **settings)
    if done.returncode:
        sys.exit(f"lm-eval failed; see {args.work / 'lm-eval.log'}")
    answer: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return answer


def compare(own: list[dict[str, Any]], peer: list[dict[str, Any]]) -> dict[str, Any]:
    """Count equal choices of the same items, and say how far log-likelihoods are apart where they are furthest."""
    if len(own) != len(peer):
        sys.exit(f"{len(own)} items of ours, {len(peer)} of lm-eval's")
    pairs = list(zip(own, peer, strict=True))
    return {
        "items": len(pairs),
        "same": sum(a["choice"] == b["choice"] for a, b in pairs) / len(pairs),
        "same_norm": sum(a["choice_norm"] == b["choice_norm"] for a, b in pairs) / len(pairs),
        "accuracy_norm": sum(a["correct_norm"] for a in own) / len(pairs),
        "furthest_nats": max(
            abs(x - y) for a, b in pairs for x, y in zip(a["loglikelihoods"], b["loglikelihoods"], strict=True)
        ),
    }


def main() -> None:
    """Make the tasks, answer them twice, print a table and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="dense model directory")
    parser.add_argument("--text", type=Path, required=True, help="UTF-8 prose, a paragraph per line")
    parser.add_argument("--peer-python", type=Path, required=True, help="python of an environment with lm_eval")
    parser.add_argument("--work", type=Path, required=True, help="empty directory for what is written")
    parser.add_argument("--items", type=int, default=400, help="items per task")
    parser.add_argument("--window", type=int, default=2048, help="most tokens read at once for perplexity")
    parser.add_argument("--characters", type=int, default=40_000, help="length of the text for perplexity")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    text = cut(args.text.read_text(encoding="utf-8"), (0.0, 1.0), ("<doc", "</doc"))
    makers = {"next-sentence": next_sentences, "ending": endings}
    files = {
        name: write(make(list(maker(text)), args.items, args.seed), args.work / f"{name}.jsonl")
        for name, maker in makers.items()
    }
    document = args.work / "document.txt"
    document.write_text(text[: args.characters], encoding="utf-8")
    answers, scored = ours(args, files, document)
    peer = theirs(args, files, document)
    found = {name: compare(answers[name], peer["choices"][name]) for name in files}
    words = {"optikit": scored["word_perplexity"], "lm-eval": peer["word_perplexity"]}
    result = {"tasks": found, "word_perplexity": words, "protocol": scored["protocol"], "versions": peer["versions"]}
    (args.work / "agreement.json").write_text(json.dumps(result, indent=1), encoding="utf-8")
    print(f"{'':16}{'items':>7}{'same choice':>13}{'per character':>15}{'right':>8}{'furthest, nats':>16}")
    for name, row in found.items():
        shares = f"{row['same']:13.2%}{row['same_norm']:15.2%}{row['accuracy_norm']:8.1%}"
        print(f"{name:16}{row['items']:7}{shares}{row['furthest_nats']:16.1e}")
    print(f"perplexity per word: {words['optikit']:.6f}, lm-eval {words['lm-eval']:.6f} ({scored['protocol']})")
    sys.exit(any(min(row["same"], row["same_norm"]) < WANTED for row in found.values()))


if __name__ == "__main__":
    main()
