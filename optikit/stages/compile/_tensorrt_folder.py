"""The graph for TensorRT, checked as ONNX, and the files around it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optikit.errors import IntegrityError, StageFailedError
from optikit.models.reader import read
from optikit.stage import EMITTED
from optikit.stages.compile import _folder, _onnx_build, _tensorrt_compare, _tensorrt_run

if TYPE_CHECKING:
    from optikit.models.facts import ModelFacts
    from optikit.stage import Facts, Job
    from optikit.stages.compile._tensorrt_options import Options
    from optikit.targets import Target

REQUIREMENTS = ("onnxruntime>=1.24", "onnxruntime-genai==0.18.*", "onnxruntime-ep-nv-tensorrt-rtx")


def write(options: Options, job: Job) -> Facts:
    """Build, check, and describe.

    Raises:
        StageFailedError: The builder failed, or wrote what isn't ONNX.
        IntegrityError: The job names no target, or the graph computes something else than the model.
    """
    if job.target is None:
        raise IntegrityError("a graph for TensorRT was asked for without its target", fix="run it through a recipe")
    facts = read(job.source)
    _onnx_build.build(job, options.precision, (), facts, provider=_tensorrt_run.EXECUTION_PROVIDER)
    found = checked(job.dest / "model.onnx", facts) | _tensorrt_compare.compare(job, facts)
    target = job.target
    files = {
        "run.py": Path(_tensorrt_run.__file__).read_text(encoding="utf-8"),
        "run.sh": RUN,
        "requirements.txt": "\n".join(REQUIREMENTS) + "\n",
        "README.md": "\n\n".join(readme(options, facts, target, found)) + "\n",
    }
    wanted = _folder.Wanted(
        kind="cuda",
        devices="/dev/nvidia[0-9]*",
        python=((3, 10), (3, 15)),
        packages={
            "onnxruntime": r"1\.(?:2[4-9]|[3-9]\d)\..*",
            "onnxruntime-genai": r"0\.18\..*",
            "onnxruntime-ep-nv-tensorrt-rtx|onnxruntime-ep-nv-tensorrt-rtx-cu12": r".*",
        },
        disk_bytes=2 * facts.weight_bytes,
        host_bytes=facts.weight_bytes,
    )
    written = _folder.write(job.dest, files, wanted, target)
    return {EMITTED: True, "finish": "sh run.sh", "files": sorted(files), **found} | {"written": len(written)}


RUN = (
    _folder.begin(
        "installs what is missing, checks this machine, makes the engine, decodes 8 tokens, writes\n# result.json."
    )
    + """\
began=$(date +%s)
python3 run.py "The capital of France is" 8 > smoke.log
cat smoke.log
python3 check.py record "$(($(date +%s) - began))"
"""
)


def checked(graph: Path, facts: ModelFacts) -> dict[str, Any]:
    """Check a graph with onnx.checker and against the model's shape; return what is in it.

    Raises:
        StageFailedError: It isn't ONNX, or not this model's.
    """
    import onnx

    try:
        onnx.checker.check_model(str(graph))
    except (onnx.checker.ValidationError, ValueError, OSError) as error:
        raise StageFailedError(f"the builder's graph isn't valid ONNX: {error}", fix="compile again") from error
    model = onnx.load(str(graph), load_external_data=False)
    caches = sum(each.name.startswith("past_key_values.") for each in model.graph.input)
    outputs = {each.name for each in model.graph.output}
    if caches != 2 * facts.layers or "logits" not in outputs:
        message = f"the graph has {caches} caches for {facts.layers} layers, and outputs {sorted(outputs)[:3]}"
        raise StageFailedError(message, fix="compile again")
    operators = Counter(node.op_type for node in model.graph.node)
    return {
        "checked": "onnx.checker",
        "operators": dict(operators.most_common(8)),
        "opset": {each.domain or "ai.onnx": each.version for each in model.opset_import},
        "typed": sorted({onnx.TensorProto.DataType.Name(each.data_type) for each in model.graph.initializer}),
    }


def readme(options: Options, facts: ModelFacts, target: Target, found: dict[str, Any]) -> Iterator[str]:
    """Yield the parts of README.md."""
    title = f"{facts.model_type}, {facts.parameters / 1e6:.0f} M weights, {options.precision}"
    yield f"# {title}, for TensorRT on {target.name}"
    yield (
        "Written by `optikit run`. The graph was built and passed `onnx.checker`; no engine was made of it and nothing "
        "was timed: that needs the GPU."
    )
    opsets = ", ".join(f"{name} {version}" for name, version in found["opset"].items())
    yield f"- `model.onnx`, `model.onnx.data`: the graph ({opsets}) and its weights ({', '.join(found['typed'])})"
    yield (
        "## On the GPU\n\nAn NVIDIA GPU of Ampere or newer with a driver for CUDA 13. For CUDA 12, before `run.sh`, "
        "in this folder: `python3 -m venv env && env/bin/pip install 'onnxruntime>=1.24' 'onnxruntime-genai==0.18.*' "
        "onnxruntime-ep-nv-tensorrt-rtx-cu12`. `onnxruntime-gpu` must not be installed beside it.\n\n```sh\n"
        "rsync -a out/ INSTANCE:out/\nssh INSTANCE sh out/compiled/tensorrt/run.sh    # makes the engine\n"
        "rsync INSTANCE:out/compiled/tensorrt/result.json out/compiled/tensorrt/\n"
        "optikit run RECIPE --out out/ --resume    # the report then says what was decoded, and where\n```\n\n"
        "`run.sh` installs what is missing, checks files, packages and devices (`check.py`), decodes 8 tokens and "
        'writes `result.json`; after that `env/bin/python run.py "PROMPT" 32` decodes what you like.'
    )
    yield (
        "## If it fails\n\n- `No TensorRT RTX EP devices`: the driver is too old, or the GPU is older than Ampere\n"
        "- an unknown provider: `onnxruntime` is older than 1.24, or another build of it is installed\n"
        "- an unsupported operator: send the operators of the report's step, and use `engine: tensorrt-llm` meanwhile"
    )
