"""README.md of a Neuron job folder: what an engineer who gets it has to know, in the order of doing it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from optikit.models.facts import ModelFacts
    from optikit.stages.compile._neuron_options import Options
    from optikit.targets import Target

WHAT = {
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


def render(options: Options, facts: ModelFacts, target: Target, files: Iterable[str]) -> str:
    """Return the page."""
    return "\n\n".join(_parts(options, facts, target, sorted(files))) + "\n"


def _parts(options: Options, facts: ModelFacts, target: Target, files: list[str]) -> Iterator[str]:
    yield f"# {facts.model_type}, {facts.parameters / 1e6:.0f} M weights, for {target.name} ({options.backend})"
    yield (
        "Written by `optikit run`. Nothing here was compiled or timed: that needs Neuron's compiler and, to run, a "
        "Neuron device. The commands below do it on the instance."
    )
    yield _table(options, facts, target)
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


def _table(options: Options, facts: ModelFacts, target: Target) -> str:
    from optikit.stages.compile._neuron_options import placement

    rows = {
        "batch size": options.batch_size,
        "longest sequence, tokens": options.sequence_length,
        "Neuron cores (tensor parallel)": f"{options.tensor_parallel} of {target.cores}",
        "dtype": options.dtype + (f", weights {options.quantization_dtype}" if options.quantization_dtype else ""),
        "weights and cache, estimated": f"{placement(options, facts, ()).need_bytes / 1e9:.2f} GB",
    }
    if target.core_memory_gb:
        rows["memory of those cores"] = f"{target.core_memory_gb * options.tensor_parallel:g} GB"
    if options.speculation_length:
        rows["speculation"] = f"{options.speculation}, {options.speculation_length} tokens, draft `{options.draft}`"
    if options.sdk:
        rows["Neuron SDK"] = options.sdk
    return "\n".join(("| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())))


def _commands(options: Options) -> str:
    lines = [
        "# the whole output directory of `optikit run` is needed: model/ and compiled/neuron/",
        "rsync -a out/ INSTANCE:out/",
        "ssh INSTANCE",
        "cd out",
        "python3 -m venv env && . env/bin/activate         # Python 3.10 or 3.11",
        "pip install -r compiled/neuron/requirements.txt",
    ]
    if options.backend == "vllm-neuron":
        lines[4] = lines[4].replace("3.10 or 3.11", "3.11 or newer")
        lines.append("sh compiled/neuron/serve.sh                       # the first start compiles, for minutes")
        lines.append("curl -s localhost:8000/v1/completions -H 'Content-Type: application/json' \\")
        lines.append('  -d \'{"model": "model", "prompt": "The capital of France is", "max_tokens": 8}\'')
        return f"{SETUP[options.backend]}\n\n```sh\n" + "\n".join(lines) + "\n```"
    lines.append(
        "sh compiled/neuron/compile.sh                     # minutes to an hour; prints the directory it wrote"
    )
    after = "It writes `result.json` (sha256 of every file, versions, flags) and, on a Neuron device, decodes 8 tokens."
    if options.backend == "optimum-neuron" and not options.speculation_length:
        lines.append("sh compiled/neuron/serve.sh                       # Inferentia2 and Trainium1; port 8080")
    if options.speculation_length:
        lines.insert(-1, "export DRAFT=/path/or/hub-id                      # if the draft lies elsewhere there")
    return f"{SETUP[options.backend]}\n\n```sh\n" + "\n".join(lines) + f"\n```\n\n{after}"


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
    if options.cache.startswith("s3://"):
        where += " Reading and writing S3 needs the instance's role to allow it."
    return where


def _failures(options: Options, target: Target) -> Iterator[str]:
    yield "`isn't the file that this job was made for`: `model/` is not the one written with this folder; set `MODEL=`"
    if options.backend == "optimum-neuron":
        yield "`neuronx-cc` 1.* is the public index's placeholder: requirements.txt names Amazon's index beside it"
        yield "`compiled for … cannot run on a … instance`: the folder is for " + target.name
        yield "`inconsistent with the one used to export`: serve with the shapes of the table, as serve.sh does"
    if options.backend == "vllm-neuron":
        check = "from vllm.platforms import current_platform; print(current_platform.device_name)"
        yield f"`python -c '{check}'` has to print `neuron`; if it doesn't, another environment is active"
    yield "out of device memory: more cores (`tensor_parallel`), a smaller `batch_size` or `sequence_length`, run again"
