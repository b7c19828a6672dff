"""Finishes a job folder of `compile: {engine: neuron}`; needs Python 3.10 and what requirements.txt names, not optikit.

Copied into the folder as job.py and called by its scripts:

    python3 job.py prepare MODEL    put the weights of MODEL beside the configuration in model/
    python3 job.py key              print what the result depends on, as 16 hexadecimal digits
    python3 job.py export OUT       compile with optimum-neuron, as job.json says; with a draft, that too
    python3 job.py smoke OUT        load OUT on this instance and decode 8 tokens
    python3 job.py result OUT TIME  write OUT/result.json: sha256 of every file, versions, the key, seconds of compiling
    python3 job.py seconds OUT      print those seconds
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
LIBRARIES = ("neuronx-cc", "optimum-neuron", "neuronx-distributed-inference", "torch-neuronx", "transformers", "torch")
PROMPT = "The capital of France is"


def job() -> dict[str, Any]:
    """Return job.json."""
    found: dict[str, Any] = json.loads((HERE / "job.json").read_text(encoding="utf-8"))
    return found


def versions() -> dict[str, str]:
    """Return the installed versions of what decides the result."""
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def flags() -> list[str]:
    """Return the compiler flags of the environment that change its result: all but those about the cache."""
    return sorted(flag for flag in os.environ.get("NEURON_CC_FLAGS", "").split() if "cache" not in flag)


def key() -> str:
    """Return what a compiled model depends on: shapes, dtype, degree, speculation, compiler and flags."""
    parts = {"compiled": job()["key"], "versions": versions(), "flags": flags()}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def prepare(source: Path) -> None:
    """Link the weights that this job was made for into model/, beside the configuration for this transformers."""
    model = HERE / "model"
    for name, record in job()["files"].items():
        path = source / name
        if not path.is_file():
            sys.exit(f"{path} isn't there: give the model directory that optikit wrote, e.g. MODEL=/data/model")
        if path.stat().st_size != record["size"]:
            sys.exit(f"{path} has {path.stat().st_size} bytes, not {record['size']}: this job is for another model")
        if name.endswith(".json") and digest(path) != record["sha256"]:
            sys.exit(f"{path} isn't the file that this job was made for")
        placed = model / name
        if placed.is_symlink():
            placed.unlink()
        if not placed.exists():
            placed.symlink_to(os.path.relpath(path.resolve(), model))  # holds inside a container, too


def digest(path: Path) -> str:
    """Return the sha256 of a file."""
    with path.open("rb") as file:
        found = hashlib.sha256()
        while block := file.read(1 << 20):
            found.update(block)
    return found.hexdigest()


def export(out: Path) -> None:
    """Compile what job.json says into OUT, and the draft into OUT/draft: the draft first, as it is loaded."""
    from optimum.neuron import NeuronModelForCausalLM
    from optimum.neuron.models.inference.backend.config import NxDNeuronConfig
    from transformers import AutoTokenizer

    found = job()
    parts = {"model": (str(HERE / "model"), found["neuron_config"], out)}
    parts["draft"] = (os.environ.get("DRAFT", str(HERE / "draft")), found["draft_config"], out / "draft")
    for source, config, place in (parts[name] for name in found["load_order"]):
        model = NeuronModelForCausalLM.export(source, NxDNeuronConfig(**config), load_weights=False)
        model.save_pretrained(place)
        AutoTokenizer.from_pretrained(source).save_pretrained(place)


def smoke(out: Path) -> None:
    """Load OUT and decode 8 tokens, with its draft if it has one; what is loaded first is the first on the cores."""
    from optimum.neuron import NeuronModelForCausalLM
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(out)
    places = {"model": out, "draft": out / "draft"}
    loaded = {name: NeuronModelForCausalLM.from_pretrained(str(places[name])) for name in job()["load_order"]}
    model = loaded.pop("model")
    drafted = {"assistant_model": loaded["draft"]} if loaded else {}  # its tokens stay while they are the model's own
    inputs = tokenizer(PROMPT, return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=8, do_sample=False, **drafted)[0]
    new = tokens[inputs["input_ids"].shape[1] :]
    if not len(new):
        sys.exit("the compiled model decoded nothing")
    sys.stdout.write(f"decoded {len(new)} tokens: {tokenizer.decode(tokens)!r}\n")


def result(out: Path, seconds: str = "0") -> None:
    """Write OUT/result.json."""
    files = {
        str(path.relative_to(out)): {"size": path.stat().st_size, "sha256": digest(path)}
        for path in sorted(out.rglob("*"))
        if path.is_file() and path.name != "result.json"
    }
    written: dict[str, Any] = {
        "key": key(),
        "versions": versions(),
        "flags": flags(),
        "job": job()["key"],
        "files": files,
    }
    written["seconds"] = float(seconds)
    (out / "result.json").write_text(json.dumps(written, indent=1), encoding="utf-8")


def main(verb: str, *arguments: str) -> None:
    """Do what the command line says."""
    if verb == "key":
        sys.stdout.write(key() + "\n")
        return
    if verb == "seconds":
        sys.stdout.write(f"{json.loads((Path(arguments[0]) / 'result.json').read_text())['seconds']}\n")
        return
    place, *more = arguments
    {"prepare": prepare, "export": export, "smoke": smoke, "result": result}[verb](Path(place), *more)


if __name__ == "__main__":
    main(*sys.argv[1:])
