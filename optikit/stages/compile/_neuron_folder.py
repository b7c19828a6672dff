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
from optikit.stages.compile import _folder, _neuron_job, _neuron_readme, _speculators
from optikit.stages.compile._neuron_options import (
    PLATFORMS,
    Kind,
    Options,
    core_set,
    instance_family,
    kind_of,
    placement,
    samples_on_device,
)
from optikit.stages.compile._overlay import overlay

if TYPE_CHECKING:
    from optikit.targets import Target
    from optikit.targets.neuron import Placement

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
PYTHON: Mapping[str, tuple[tuple[int, int], tuple[int, int]]] = {
    "optimum-neuron": ((3, 10), (3, 12)),
    "nxd-inference": ((3, 10), (3, 13)),
    "vllm-neuron": ((3, 11), (3, 14)),
}
PACKAGES: Mapping[str, Mapping[str, str]] = {
    "optimum-neuron": {"optimum-neuron": r"0\.4\.5", "transformers": r"4\.57\..*", "neuronx-cc": r"2\..*"},
    "nxd-inference": {
        "neuronx-distributed-inference": r"0\.[2-9].*|[1-9].*",
        "transformers": r"4\.57\..*",
        "neuronx-cc": r"2\..*",
    },
    "vllm-neuron": {"vllm": r"0\.(?:1[3-9]|[2-9]\d)\..*", "vllm-neuron": r"(?!0\.1\.0$).*"},
}
"""Distribution → expression of its version. neuronx-cc 1.*, neuronx-distributed-inference 0.1.0 and vllm-neuron 0.1.0
of the public index are empty placeholders."""
TOOLS: Mapping[str, tuple[str, ...]] = {
    "optimum-neuron": ("optimum-cli", "neuronx-cc"),
    "nxd-inference": ("inference_demo", "neuronx-cc"),
    "vllm-neuron": ("vllm", "curl"),
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
    facts, target = read(job.source), job.target
    draft = _speculators.place_draft(job, options.dtype)
    heads = _speculators.place_heads(job) if options.backend == "nxd-inference" else 0
    kind: Kind = "medusa" if heads else kind_of(options, facts) if draft is None else _drafter(job)
    record = description(options, facts, target, job.source, kind)
    record["draft_files"] = [] if draft is None else sorted(path.name for path in (job.dest / "draft").iterdir())
    files = dict(_scripts(options, facts, target, kind, heads))
    files["job.json"] = json.dumps(record, indent=1) + "\n"
    files["requirements.txt"] = "\n".join((f"--extra-index-url {INDEX}", *REQUIREMENTS[options.backend])) + "\n"
    files |= {f"model/{name}": json.dumps(value, indent=2) + "\n" for name, value in overlay(job.source, options.dtype)}
    placed = placement(options, facts, () if draft is None or kind == "eagle3" else (read(draft),), heads)
    names = [*files, "check.py", "check.json", *(["draft/"] if draft else []), *(["medusa_tree.json"] if heads else [])]
    wants = wanted(options, target, placed)
    files["README.md"] = _neuron_readme.render(options, facts, target, names, placed, wants, kind)
    written = _folder.write(job.dest, files, wants, target)
    return {EMITTED: True, "backend": options.backend, "finish": "sh run.sh", "files": written, "key": record["key"]}


def _drafter(job: Job) -> Kind:
    given = dict(job.inputs)
    return "eagle3" if "made_eagle3" in given and "made_draft" not in given else "draft"


def wanted(options: Options, target: Target, placed: Placement) -> _folder.Wanted:
    """Return what the folder wants of the instance; compiled graphs and sharded weights take the weights again."""
    chips = max(1, target.count)
    per_chip = max(1, (target.cores or 1) // chips)
    return _folder.Wanted(
        kind="neuron",
        devices="/dev/neuron[0-9]*",
        device_count=-(-(options.first_core + options.tensor_parallel) // per_chip),
        python=PYTHON[options.backend],
        packages=PACKAGES[options.backend],
        versions=_neuron_job.LIBRARIES,
        tools=TOOLS[options.backend],
        disk_bytes=2 * sum(each.host_bytes for each in placed.residents),
        host_bytes=placed.host_bytes,
    )


def description(options: Options, facts: ModelFacts, target: Target, source: Path, kind: Kind) -> dict[str, Any]:
    """Return job.json: what to compile, what the result depends on, and which files it is made of."""
    family = instance_family(target)
    shapes = ("backend", "batch_size", "sequence_length", "tensor_parallel", "dtype", "on_device_sampling")
    spoken = ("speculation_length", "speculation", "acceptor", "quantization_dtype", "async_mode")
    chosen = {name: getattr(options, name) for name in (*shapes, *spoken)}
    chosen |= {"drafter": kind, "on_device_sampling": samples_on_device(options, kind)}
    return {
        "target": target.name,
        "instance_family": family,
        "draft": "draft" if kind in ("draft", "eagle3") else "",
        "cores": core_set(options),
        "load_order": ["draft", "model"] if kind == "draft" and options.speculation == "vanilla" else ["model"],
        "neuron_config": neuron_config(options, family, kind),
        "draft_config": neuron_config(options, family, kind) | {"speculation_length": 0, "on_device_sampling": False},
        "key": chosen
        | {"platform": PLATFORMS.get(family, family), "config_sha256": file_sha256(source / "config.json")},
        "files": dict(_records(source)),
    }


def neuron_config(options: Options, family: str, kind: Kind = "") -> dict[str, Any]:
    """Return the arguments of optimum-neuron's `NxDNeuronConfig`, as its command line would choose them."""
    return {
        "batch_size": options.batch_size,
        "sequence_length": options.sequence_length,
        "tp_degree": options.tensor_parallel,
        "torch_dtype": options.dtype,
        "target": PLATFORMS.get(family, family),
        "on_device_sampling": samples_on_device(options, kind),
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


def _scripts(
    options: Options, facts: ModelFacts, target: Target, kind: Kind = "", heads: int = 0
) -> Iterator[tuple[str, str]]:
    yield "job.py", Path(_neuron_job.__file__).read_text(encoding="utf-8")
    if options.backend == "vllm-neuron":
        yield "serve.sh", vllm_serve(options, kind)
        yield "smoke.sh", _folder.smoke(8000, 90)
        what = "installs what is missing, checks this machine, starts the server (the first start compiles),\n"
        what += "# decodes 8 tokens, stops it, writes result.json."
        yield "run.sh", _folder.begin(what) + "sh serve.sh > server.log 2>&1 &\n" + _folder.SERVED
        return
    what = "installs what is missing, checks this machine, compiles, decodes 8 tokens, writes result.json."
    yield "run.sh", _folder.begin(what) + "sh compile.sh\n"
    yield "Dockerfile", DOCKERFILE
    family = instance_family(target)
    if options.backend == "nxd-inference":
        yield "compile.sh", nxd_compile(options, facts, kind, heads)
        return
    yield "compile.sh", optimum_compile(options, family, kind)
    if family != "trn2" and not options.speculation_length:
        yield "serve.sh", optimum_serve(options)


DOCKERFILE = """\
# Compiles without a Neuron device, too. To run the result: --device=/dev/neuron0 and so on for each
# chip that is used, and the driver on the host.
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
{activate}export NEURON_COMPILE_CACHE_URL="${{NEURON_COMPILE_CACHE_URL:-{cache}}}"
export NEURON_RT_VISIBLE_CORES="${{NEURON_RT_VISIBLE_CORES:-{cores}}}"  # of the model, and of what drafts for it
python3 job.py prepare "${{MODEL:-../../model}}"
OUT="compiled-$(python3 job.py key)"
"""
END = """\
if [ ! -f "$OUT/result.json" ]; then
rm -rf "$OUT"
began=$(date +%s)
{compiling}
python3 job.py result "$OUT" "$(($(date +%s) - began))"
fi
if [ -e /dev/neuron0 ]; then
{smoke} > smoke.log 2> smoke.err || {{ cat smoke.log smoke.err >&2; exit 70; }}
cat smoke.log
python3 check.py record "$(python3 job.py seconds "$OUT")"
fi
echo "$OUT"
"""
"""What is finished is kept: an interrupted compilation has no result.json and begins again."""


def _begin(what: str, options: Options) -> str:
    return BEGIN.format(
        what=what, activate=_folder.ACTIVATE, cache=_inside_quotes(options.cache), cores=core_set(options)
    )


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


def optimum_compile(options: Options, family: str, kind: Kind = "") -> str:
    """Return compile.sh for optimum-neuron: its command line, or job.py for what that has no option for."""
    text = _begin(f"Compiles for {family} with optimum-neuron, then decodes 8 tokens if a device is here.", options)
    text += f"export NEURON_PLATFORM_TARGET_OVERRIDE={PLATFORMS[family]}\n"
    if options.speculation_length or not samples_on_device(options, kind):
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


def nxd_options(options: Options, facts: ModelFacts, kind: Kind = "", heads: int = 0) -> list[tuple[str, Any]]:
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
    found += [("--on-device-sampling", None)] if samples_on_device(options, kind) else []
    found += [("--do-sample", None), ("--top-k", 50)] if options.acceptor == "rejection" else []
    found += [("--async-mode", None)] if options.async_mode else []
    if options.batch_size > 1:
        found += [("--is-continuous-batching", None), ("--ctx-batch-size", 1), ("--tkg-batch-size", options.batch_size)]
    if options.quantization_dtype:
        found += [("--quantized", None), ("--quantization-dtype", options.quantization_dtype)]
        found += [("--quantization-type", "per_channel_symmetric")]
        found += [("--quantized-checkpoints-path", shlex.quote(options.quantized_checkpoints_path or "quantized"))]
    return found + _nxd_speculation(options, kind, heads)


def _nxd_speculation(options: Options, kind: Kind, heads: int) -> list[tuple[str, Any]]:
    if kind == "medusa":
        return [
            ("--is-medusa", None),
            ("--num-medusa-heads", heads),
            ("--medusa-speculation-length", heads + 1),
            ("--medusa-tree-json", _speculators.TREE),
        ]
    if kind != "draft":
        return []
    found: list[tuple[str, Any]] = [
        ("--draft-model-path", '"$DRAFT"'),
        ("--draft-model-tp-degree", options.tensor_parallel),
        ("--speculation-length", options.speculation_length),
    ]
    if options.speculation == "fused":
        return [*found, ("--enable-fused-speculation", None)]
    return [*found, ("--compiled-draft-model-path", '"$OUT/draft"')]


def _first(*values: Any) -> int:
    """Return the first token id among values that may be None or lists."""
    found = next(value for value in values if value is not None)
    return int(found[0] if isinstance(found, list) else found)


def nxd_compile(options: Options, facts: ModelFacts, kind: Kind = "", heads: int = 0) -> str:
    """Return compile.sh for NxD Inference; the same command decodes with what it compiled."""
    text = _begin("Compiles with NxD Inference, then decodes 8 tokens if a Neuron device is here.", options)
    if kind == "draft":
        text += 'DRAFT="${DRAFT:-draft}"  # compiled and loaded after the model, on the same cores\n'
    if options.quantization_dtype == "f8e4m3":
        text += "export XLA_HANDLE_SPECIAL_SCALAR=1  # e4m3 ends at 240 on Neuron\n"
    command = f"inference_demo --model-type {facts.model_type} --task-type causal-lm run"
    run = _lines(f"  {command}", [*nxd_options(options, facts, kind, heads), ('"$@"', None)])
    text += f"demo() {{\n{run}\n}}\n"
    return text + END.format(compiling="demo --compile-only", smoke="demo --skip-compile --max-new-tokens 8")


def vllm_serve(options: Options, kind: Kind = "") -> str:
    """Return serve.sh for the vLLM Neuron plugin: it compiles when it starts, and keeps what it compiled."""
    prefill = min(options.sequence_length, 2048)
    neuron: dict[str, Any] = {"num_batched_tokens_buckets": [prefill], "num_seqs_buckets": [options.batch_size]}
    speculative: dict[str, Any] = {}
    if kind == "eagle3":
        drafting = {"method": "eagle3", "model": "draft", "num_speculative_tokens": options.speculation_length}
        speculative["--speculative-config"] = shlex.quote(json.dumps(drafting))
        temperature = "0" if options.acceptor == "greedy" else "1"
        neuron["on_device_sampling_config"] = {"temperature": temperature}
    arguments = {
        "--dtype": options.dtype,
        "--tensor-parallel-size": options.tensor_parallel,
        "--max-num-seqs": options.batch_size,
        "--max-model-len": options.sequence_length,
        "--max-num-batched-tokens": prefill,
        "--no-enable-prefix-caching": None,
        **speculative,
        "--additional-config": shlex.quote(json.dumps({"neuron_config": neuron})),
        "--served-model-name": "model",
        "--port": '"${PORT:-8000}"',
    }
    text = "#!/bin/sh\n# Serves the model with the vLLM Neuron plugin; the first start compiles.\n"
    text += 'set -eu\ncd "$(dirname "$0")"\n' + _folder.ACTIVATE
    text += f'export VLLM_CACHE_ROOT="${{VLLM_CACHE_ROOT:-{_inside_quotes(options.cache)}}}"\n'
    text += f'export NEURON_RT_VISIBLE_CORES="${{NEURON_RT_VISIBLE_CORES:-{core_set(options)}}}"\n'
    text += 'python3 job.py prepare "${MODEL:-../../model}"\n'
    return text + _lines("exec vllm serve model", arguments) + "\n"
