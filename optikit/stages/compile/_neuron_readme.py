"""README.md of a Neuron job folder: what an engineer who gets it has to know, in the order of doing it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from optikit.models.facts import ModelFacts
    from optikit.stages.compile._folder import Wanted
    from optikit.stages.compile._neuron_options import Kind, Options
    from optikit.targets import Target
    from optikit.targets.neuron import Placement

WHAT = {
    "run.sh": "the one command: installs, checks, compiles, decodes, writes result.json; again after an interruption",
    "check.py": "is all here (files, packages, devices, memory, disk)? and what result.json is written with",
    "check.json": "what check.py goes by, and the sha256 of this folder's files",
    "smoke.sh": "waits for the server and asks it for 8 tokens",
    "draft/": "what drafts for the model",
    "medusa_tree.json": "which tokens of the Medusa heads are tried",
    "job.py": "puts weights and configuration together, names the result, checks it",
    "compile.sh": "everything from weights to a compiled model that has decoded 8 tokens",
    "serve.sh": "an OpenAI-compatible server with exactly these shapes",
    "Dockerfile": "the same without installing anything on the host",
    "requirements.txt": "what to install, and Amazon's index to install it from",
    "job.json": "the options, the library's own configuration, sizes and sha256 of the model's files",
    "model/": "the model's configuration as transformers 4.57 and 5 both read it; weights are linked in here",
}
SETUP = {
    "optimum-neuron": "The Hugging Face Neuron AMI has the driver and tools; so has any Neuron Deep Learning AMI.",
    "nxd-inference": "A Neuron Deep Learning AMI has the driver, the tools and an environment with NxD Inference.",
    "vllm-neuron": "The Neuron Multi-Framework Deep Learning AMI has the plugin and everything it needs in an "
    "environment of its own; then skip the installation. Neuron SDK 2.31 or newer.",
}


def render(
    options: Options,
    facts: ModelFacts,
    target: Target,
    files: Iterable[str],
    placed: Placement,
    wanted: Wanted,
    kind: Kind,
) -> str:
    """Return the page."""
    table = _table(options, target, placed, wanted, kind)
    return "\n\n".join(_parts(options, facts, target, sorted(files), table)) + "\n"


def _parts(options: Options, facts: ModelFacts, target: Target, files: list[str], table: str) -> Iterator[str]:
    yield f"# {facts.model_type}, {facts.parameters / 1e6:.0f} M weights, for {target.name} ({options.backend})"
    yield (
        "Written by `optikit run`. Nothing here was compiled or timed: that needs Neuron's compiler and, to run, a "
        "Neuron device. The commands below do it on the instance."
    )
    yield table
    shown = ["model/" if name.startswith("model/") else name for name in files]
    yield "\n".join(f"- `{name}`: {WHAT[name]}" for name in dict.fromkeys(shown))
    yield "## On the instance\n\n" + _commands(options)
    if "Dockerfile" in files:
        yield (
            "In a container, or on a machine without a Neuron device (compiling needs none):\n\n"
            "```sh\ndocker build -t neuron-job compiled/neuron\n"
            'docker run --rm -v "$PWD:/out" -w /out/compiled/neuron neuron-job\n```'
        )
    yield "## Compile cache\n\n" + _cache(options)
    yield "## If it fails\n\n" + "\n".join(f"- {line}" for line in _failures(options, target))


def _table(options: Options, target: Target, placed: Placement, wanted: Wanted, kind: Kind) -> str:
    from optikit.stages.compile._neuron_options import core_set

    rows = {
        "batch size": options.batch_size,
        "longest sequence, tokens": options.sequence_length,
        "Neuron cores (tensor parallel)": f"{options.tensor_parallel} of {target.cores}: {core_set(options)}",
        "dtype": options.dtype + (f", weights {options.quantization_dtype}" if options.quantization_dtype else ""),
        "weights and caches on them, estimated": f"{placed.need_bytes / 1e9:.2f} GB",
        "the instance's own memory while loading, about": f"{placed.host_bytes / 1e9:.1f} GB",
    }
    low, high = wanted.python
    rows["Python there"] = f"{low[0]}.{low[1]} to {high[0]}.{high[1] - 1}, as the libraries have wheels"
    rows["disk for compiled files there, about"] = f"{wanted.disk_bytes / 1e9:.1f} GB, and what the libraries take"
    if target.core_memory_gb:
        rows["memory of those cores"] = f"{target.core_memory_gb * options.tensor_parallel:g} GB"
    if kind == "medusa":
        rows["speculation"] = "Medusa heads, in `model/medusa_heads.pt`"
    elif kind:
        programs = f"{options.speculation}, " if kind == "draft" else ""
        rows["speculation"] = f"{kind} in `draft/`: {programs}{options.speculation_length} tokens, {options.acceptor}"
    if options.sdk:
        rows["Neuron SDK"] = options.sdk
    return "\n".join(("| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())))


def _commands(options: Options) -> str:
    lines = [
        "# the whole output directory of `optikit run` is needed: model/ and compiled/neuron/",
        "rsync -a out/ INSTANCE:out/",
        "ssh INSTANCE sh out/compiled/neuron/run.sh        # minutes to an hour; run it again if it was interrupted",
        "rsync INSTANCE:out/compiled/neuron/result.json out/compiled/neuron/",
        "optikit run RECIPE --out out/ --resume            # the report then says what was decoded, and where",
    ]
    parts = [SETUP[options.backend], "```sh\n" + "\n".join(lines) + "\n```"]
    served = options.backend == "vllm-neuron" or (
        options.backend == "optimum-neuron" and not options.speculation_length
    )
    port = 8000 if options.backend == "vllm-neuron" else 8080
    if served:
        parts.append(f"Then `sh compiled/neuron/serve.sh` serves it on port {port}, as `model`; `PORT=` changes that.")
    if options.backend != "vllm-neuron":
        parts.append(
            "`sh compiled/neuron/compile.sh` is `run.sh` without installing and checking. Beside the compiled files it "
            "writes another `result.json`: sha256 of each, versions, flags."
        )
    if options.draft or options.speculation_length:
        parts.append(_order(options))
    return "\n\n".join(parts)


def _order(options: Options) -> str:
    if options.backend == "optimum-neuron":
        order = "The draft is compiled and loaded first, then the model"
    elif options.speculation == "fused" or options.backend == "vllm-neuron":
        order = "The drafter and the model are loaded together"
    else:
        order = "The model is compiled and loaded first, then the draft"
    return f"{order}, all on the same cores (`NEURON_RT_VISIBLE_CORES`) at the same degree: others fail to load."


def _cache(options: Options) -> str:
    if options.backend == "vllm-neuron":
        return (
            f"Compiled graphs lie under `VLLM_CACHE_ROOT` (`{options.cache}`), in `neuron/compile_cache`: copy that "
            "directory to other instances and they start without compiling. A bucket more or less is another graph."
        )
    where = (
        f"`compile.sh` names its result after a key of shapes, dtype, degree, speculation, compiler version and flags "
        f"(`NEURON_CC_FLAGS`): change one and it compiles anew, beside the old result; change none and it doesn't. "
        f"Below that, Neuron caches each graph in `{options.cache}`; `NEURON_COMPILE_CACHE_URL` overrides it."
    )
    if options.backend == "optimum-neuron":
        where += (
            "\n\nGraphs that Hugging Face has compiled already are fetched from its hub cache where it can be reached: "
            "`optimum-cli neuron cache lookup HUB_ID` lists them by shapes and degree."
        )
    where += " `optikit cache neuron` lists what is in the cache, on any machine."
    if options.cache.startswith("s3://"):
        where += " Reading and writing S3 needs the instance's role to allow it."
    return where


def _failures(options: Options, target: Target) -> Iterator[str]:
    yield "`isn't the file that this job was made for`: `model/` is not the one written with this folder; set `MODEL=`"
    if options.backend == "optimum-neuron":
        yield (
            "`Python 3.12 runs this`: install another beside it (`apt install python3.11 python3.11-venv`), or compile "
            "in the container"
        )
        yield "`neuronx-cc` 1.* is the public index's placeholder: requirements.txt names Amazon's index beside it"
        yield "`compiled for … cannot run on a … instance`: the folder is for " + target.name
        yield "`inconsistent with the one used to export`: serve with the shapes of the table, as serve.sh does"
    if options.backend == "vllm-neuron":
        check = "from vllm.platforms import current_platform; print(current_platform.device_name)"
        yield f"`python -c '{check}'` has to print `neuron`; if it doesn't, another environment is active"
    yield "out of device memory: more cores (`tensor_parallel`), a smaller `batch_size` or `sequence_length`, run again"
