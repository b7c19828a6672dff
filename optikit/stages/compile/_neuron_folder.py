"""The files of a Neuron job folder, rendered from options, facts and target. Nothing here imports a Neuron library."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optikit.errors import IntegrityError
from optikit.fileio import file_sha256
from optikit.models.facts import ModelFacts
from optikit.models.reader import read
from optikit.stage import EMITTED, Facts, Job
from optikit.stages.compile import _neuron_job, _neuron_readme
from optikit.stages.compile._neuron_options import PLATFORMS, Options, instance_family, placement
from optikit.stages.compile._overlay import overlay

if TYPE_CHECKING:
    from optikit.targets import Target

INDEX = "https://pip.repos.neuron.amazonaws.com"
"""Amazon's package index: the public one has placeholders under the same names."""
REQUIREMENTS: Mapping[str, tuple[str, ...]] = {
    "optimum-neuron": ("optimum-neuron[neuronx,vllm]==0.4.5", "transformers==4.57.6"),
    "nxd-inference": (
        "neuronx-distributed-inference",
        "neuronx-cc==2.*",
        "torch-neuronx==2.9.*",
        "transformers==4.57.*",
    ),
    "vllm-neuron": ("vllm-neuron @ git+https://github.com/vllm-project/vllm-neuron.git",),
}
LINKED = frozenset({".safetensors", ".json", ".jinja", ".model", ".txt"})
NOT_LINKED = frozenset({"artifact.json"})
PROMPT = shlex.quote(_neuron_job.PROMPT)


def write(options: Options, job: Job) -> Facts:
    """Write the folder into `job.dest` and return what was written.

    Raises:
        IntegrityError: The job names no target.
    """
    if job.target is None:
        raise IntegrityError("a Neuron job folder was asked for without its target", fix="run it through a recipe")
    facts = read(job.source)
    record = description(options, facts, job.target, job.source)
    files = dict(_scripts(options, facts, job.target))
    files["job.json"] = json.dumps(record, indent=1) + "\n"
    files["requirements.txt"] = "\n".join((f"--extra-index-url {INDEX}", *REQUIREMENTS[options.backend])) + "\n"
    files |= {f"model/{name}": json.dumps(value, indent=2) + "\n" for name, value in overlay(job.source, options.dtype)}
    files["README.md"] = _neuron_readme.render(options, facts, job.target, files)
    for name, text in files.items():
        path = job.dest / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    finish = "sh serve.sh" if options.backend == "vllm-neuron" else "sh compile.sh"
    return {EMITTED: True, "backend": options.backend, "finish": finish, "files": sorted(files), "key": record["key"]}


def description(options: Options, facts: ModelFacts, target: Target, source: Path) -> dict[str, Any]:
    """Return job.json: what to compile, what the result depends on, and which files it is made of."""
    family = instance_family(target)
    shapes = ("backend", "batch_size", "sequence_length", "tensor_parallel", "dtype", "on_device_sampling")
    spoken = ("speculation_length", "draft", "speculation", "quantization_dtype", "async_mode")
    chosen = {name: getattr(options, name) for name in (*shapes, *spoken)}
    return {
        "target": target.name,
        "instance_family": family,
        "draft": options.draft,
        "neuron_config": neuron_config(options, family),
        "draft_config": neuron_config(options, family) | {"speculation_length": 0, "on_device_sampling": False},
        "key": chosen
        | {"platform": PLATFORMS.get(family, family), "config_sha256": file_sha256(source / "config.json")},
        "need_bytes": placement(options, facts, ()).need_bytes,
        "files": dict(_records(source)),
    }


def neuron_config(options: Options, family: str) -> dict[str, Any]:
    """Return the arguments of optimum-neuron's `NxDNeuronConfig`, as its command line would choose them."""
    return {
        "batch_size": options.batch_size,
        "sequence_length": options.sequence_length,
        "tp_degree": options.tensor_parallel,
        "torch_dtype": options.dtype,
        "target": PLATFORMS.get(family, family),
        "on_device_sampling": options.on_device_sampling,
        "fused_qkv": True,
        "continuous_batching": options.batch_size > 1,
        "speculation_length": options.speculation_length,
    }


def _records(source: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield size of every file that makes the model, and sha256 of the small ones."""
    for path in sorted(source.iterdir()):
        if path.is_file() and path.suffix in LINKED and path.name not in NOT_LINKED:
            small = {"sha256": file_sha256(path)} if path.suffix == ".json" else {}
            yield path.name, {"size": path.stat().st_size, **small}


def _scripts(options: Options, facts: ModelFacts, target: Target) -> Iterator[tuple[str, str]]:
    yield "job.py", Path(_neuron_job.__file__).read_text(encoding="utf-8")
    if options.backend == "vllm-neuron":
        yield "serve.sh", vllm_serve(options)
        return
    yield "Dockerfile", DOCKERFILE
    family = instance_family(target)
    if options.backend == "nxd-inference":
        yield "compile.sh", nxd_compile(options, facts)
        return
    yield "compile.sh", optimum_compile(options, family)
    if family != "trn2" and not options.speculation_length:
        yield "serve.sh", optimum_serve(options)


DOCKERFILE = """\
# Compiles without a Neuron device, too. To run the result: --device=/dev/neuron0, and the driver on the host.
FROM public.ecr.aws/docker/library/python:3.11-slim-bookworm
COPY requirements.txt /requirements.txt
RUN pip install --no-cache-dir -r /requirements.txt
ENTRYPOINT ["sh", "compile.sh"]
"""

BEGIN = """\
#!/bin/sh
# {what}
set -eu
cd "$(dirname "$0")"
export NEURON_COMPILE_CACHE_URL="${{NEURON_COMPILE_CACHE_URL:-{cache}}}"
python3 job.py prepare "${{MODEL:-../../model}}"
OUT="compiled-$(python3 job.py key)"
"""
END = """\
if [ ! -f "$OUT/result.json" ]; then
rm -rf "$OUT"
{compiling}
python3 job.py result "$OUT"
fi
if [ -e /dev/neuron0 ]; then {smoke}; fi
echo "$OUT"
"""
"""What is finished is kept: an interrupted compilation has no result.json and begins again."""


def _begin(what: str, options: Options) -> str:
    return BEGIN.format(what=what, cache=_inside_quotes(options.cache))


def _inside_quotes(text: str) -> str:
    """Return text that means itself between double quotes of a shell."""
    return "".join(f"\\{letter}" if letter in '"\\$`}' else letter for letter in text)


def _lines(command: str, arguments: Mapping[str, Any] | list[tuple[str, Any]]) -> str:
    """Return a command line, one option per line; None is a flag without a value."""
    pairs = arguments.items() if isinstance(arguments, Mapping) else arguments
    parts = [command, *(name if value is None else f"{name} {value}" for name, value in pairs)]
    return " \\\n  ".join(parts)


def optimum_export(options: Options, family: str) -> dict[str, Any]:
    """Return the options of `optimum-cli export neuron`."""
    return {
        "--model": "model",
        "--task": "text-generation",
        "--instance_type": family,
        "--batch_size": options.batch_size,
        "--sequence_length": options.sequence_length,
        "--tensor_parallel_size": options.tensor_parallel,
        "--torch_dtype": options.dtype,
    }


def optimum_compile(options: Options, family: str) -> str:
    """Return compile.sh for optimum-neuron: its command line, or job.py for what that has no option for."""
    text = _begin(f"Compiles for {family} with optimum-neuron, then decodes 8 tokens if a device is here.", options)
    text += f"export NEURON_PLATFORM_TARGET_OVERRIDE={PLATFORMS[family]}\n"
    if options.speculation_length or not options.on_device_sampling:
        compiling = 'python3 job.py export "$OUT"'
    else:
        compiling = _lines("optimum-cli export neuron", optimum_export(options, family)) + ' \\\n  "$OUT"'
    return text + END.format(compiling=compiling, smoke='python3 job.py smoke "$OUT"')


def optimum_serve(options: Options) -> str:
    """Return serve.sh for optimum-neuron: shapes are those that were compiled in, anything else is refused there."""
    shapes = {
        "--model": '"$OUT"',
        "--served_model_name": "model",
        "--batch_size": options.batch_size,
        "--sequence_length": options.sequence_length,
        "--tensor_parallel_size": options.tensor_parallel,
        "--port": '"${PORT:-8080}"',
    }
    text = _begin("Serves the compiled model with an OpenAI-compatible API.", options)
    return text + _lines("exec optimum-cli neuron serve", shapes) + "\n"


def nxd_options(options: Options, facts: ModelFacts) -> list[tuple[str, Any]]:
    """Return the options of `inference_demo … run`; None is a flag without a value."""
    found: list[tuple[str, Any]] = [
        ("--model-path", "model"),
        ("--compiled-model-path", '"$OUT"'),
        ("--torch-dtype", options.dtype),
        ("--batch-size", options.batch_size),
        ("--seq-len", options.sequence_length),
        ("--tp-degree", options.tensor_parallel),
        ("--pad-token-id", _first(facts.config.get("pad_token_id"), facts.config.get("eos_token_id"), 0)),
        ("--enable-bucketing", None),
        ("--prompt", PROMPT),
    ]
    found += [("--on-device-sampling", None)] if options.on_device_sampling else []
    found += [("--async-mode", None)] if options.async_mode else []
    if options.batch_size > 1:
        found += [("--is-continuous-batching", None), ("--ctx-batch-size", 1), ("--tkg-batch-size", options.batch_size)]
    if options.quantization_dtype:
        found += [("--quantized", None), ("--quantization-dtype", options.quantization_dtype)]
        found += [("--quantization-type", "per_channel_symmetric")]
        found += [("--quantized-checkpoints-path", shlex.quote(options.quantized_checkpoints_path or "quantized"))]
    return found + _nxd_speculation(options)


def _nxd_speculation(options: Options) -> list[tuple[str, Any]]:
    if not options.speculation_length:
        return []
    found: list[tuple[str, Any]] = [
        ("--draft-model-path", '"$DRAFT"'),
        ("--speculation-length", options.speculation_length),
    ]
    if options.speculation == "fused":
        return [*found, ("--enable-fused-speculation", None)]
    return [*found, ("--compiled-draft-model-path", '"$OUT/draft"')]


def _first(*values: Any) -> int:
    """Return the first token id among values that may be None or lists."""
    found = next(value for value in values if value is not None)
    return int(found[0] if isinstance(found, list) else found)


def nxd_compile(options: Options, facts: ModelFacts) -> str:
    """Return compile.sh for NxD Inference; the same command decodes with what it compiled."""
    text = _begin("Compiles with NxD Inference, then decodes 8 tokens if a Neuron device is here.", options)
    if options.draft:
        text += f'DRAFT="${{DRAFT:-{_inside_quotes(options.draft)}}}"\n'
    if options.quantization_dtype == "f8e4m3":
        text += "export XLA_HANDLE_SPECIAL_SCALAR=1  # e4m3 ends at 240 on Neuron\n"
    command = f"inference_demo --model-type {facts.model_type} --task-type causal-lm run"
    run = _lines(f"  {command}", [*nxd_options(options, facts), ('"$@"', None)])
    text += f"demo() {{\n{run}\n}}\n"
    return text + END.format(compiling="demo --compile-only", smoke="demo --skip-compile --max-new-tokens 8")


def vllm_serve(options: Options) -> str:
    """Return serve.sh for the vLLM Neuron plugin: it compiles when it starts, and keeps what it compiled."""
    prefill = min(options.sequence_length, 2048)
    neuron = {"num_batched_tokens_buckets": [prefill], "num_seqs_buckets": [options.batch_size]}
    arguments = {
        "--dtype": options.dtype,
        "--tensor-parallel-size": options.tensor_parallel,
        "--max-num-seqs": options.batch_size,
        "--max-model-len": options.sequence_length,
        "--max-num-batched-tokens": prefill,
        "--no-enable-prefix-caching": None,
        "--additional-config": shlex.quote(json.dumps({"neuron_config": neuron})),
        "--served-model-name": "model",
        "--port": '"${PORT:-8000}"',
    }
    text = "#!/bin/sh\n# Serves the model with the vLLM Neuron plugin; the first start compiles.\n"
    text += 'set -eu\ncd "$(dirname "$0")"\n'
    text += f'export VLLM_CACHE_ROOT="${{VLLM_CACHE_ROOT:-{_inside_quotes(options.cache)}}}"\n'
    text += 'python3 job.py prepare "${MODEL:-../../model}"\n'
    return text + _lines("exec vllm serve model", arguments) + "\n"
