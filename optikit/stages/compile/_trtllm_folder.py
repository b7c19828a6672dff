"""The files of a TensorRT-LLM serving folder, rendered from options, facts and target."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from optikit.errors import IntegrityError
from optikit.models.facts import ModelFacts
from optikit.models.reader import read
from optikit.stage import EMITTED, Facts, Job
from optikit.stages.compile import _folder, _speculators
from optikit.stages.compile._overlay import overlay
from optikit.stages.compile._trtllm_options import Options
from optikit.targets import Target

IMAGE = "nvcr.io/nvidia/tensorrt-llm/release"


def write(options: Options, job: Job) -> Facts:
    """Write the folder into `job.dest` and return what was written.

    Raises:
        IntegrityError: The job names no target.
    """
    if job.target is None:
        raise IntegrityError("a serving folder was asked for without its target", fix="run it through a recipe")
    facts, target = read(job.source), job.target
    draft = _speculators.place_draft(job)
    options = options if draft is None else options.model_copy(update={"speculation": "draft", "draft": DRAFT})
    files = {
        "serve.yaml": serve_yaml(options, target),
        "serve.sh": serve_sh(options),
        "smoke.sh": _folder.smoke(8000, 10),
        "run.sh": RUN,
        "Dockerfile": f"FROM {IMAGE}:{options.version}\nEXPOSE 8000\n"
        'ENTRYPOINT ["sh", "/out/compiled/tensorrt-llm/serve.sh"]\n',
    }
    dtype = "" if options.dtype == "auto" else options.dtype
    files |= {f"model/{name}": json.dumps(value, indent=2) + "\n" for name, value in overlay(job.source, dtype)}
    files["README.md"] = "\n\n".join(readme(options, facts, target)) + "\n"
    wanted = _folder.Wanted(
        kind="cuda",
        devices="/dev/nvidia[0-9]*",
        device_count=options.tensor_parallel,
        versions=("tensorrt-llm", "torch", "transformers"),
        tools=("trtllm-serve|docker", "curl"),
        disk_bytes=1_000_000_000,
        host_bytes=facts.weight_bytes,
    )
    written = _folder.write(job.dest, files, wanted, target)
    return {EMITTED: True, "version": options.version, "finish": "sh run.sh", "files": written}


DRAFT = "draft"
"""The draft's directory as serve.sh, which starts the server in its own directory, names it."""
RUN = (
    _folder.HEAD.format(
        what="checks this machine, starts the server, decodes 8 tokens, stops it, writes result.json.", stays=""
    )
    + """\
python3 check.py
if command -v trtllm-serve > /dev/null; then
sh serve.sh > server.log 2>&1 &
else
echo "no trtllm-serve here: in NVIDIA's container, which is pulled the first time" >&2
docker build -q -t trtllm-model . > /dev/null
docker run --rm --init --gpus all --ipc host --ulimit memlock=-1 --ulimit stack=67108864 \\
  -p "${PORT:-8000}:8000" -v "$(cd ../.. && pwd):/out" trtllm-model > server.log 2>&1 &
fi
"""
    + _folder.SERVED
)


def settings(options: Options) -> dict[str, Any]:
    """Return the server's configuration: keys are those of TensorRT-LLM's `TorchLlmArgs` (llmapi/llm_args.py, 1.2)."""
    found: dict[str, Any] = {
        "backend": "pytorch",
        "dtype": options.dtype,
        "tensor_parallel_size": options.tensor_parallel,
        "max_batch_size": options.batch_size,
        "max_num_tokens": options.max_num_tokens,
        "max_seq_len": options.sequence_length,
        "disable_overlap_scheduler": not options.overlap_scheduler,
        "kv_cache_config": {
            "dtype": options.kv_cache_dtype,
            "free_gpu_memory_fraction": options.kv_cache_fraction,
            "enable_block_reuse": True,
        },
    }
    return found | ({} if options.speculation == "none" else {"speculative_config": speculative(options)})


def speculative(options: Options) -> dict[str, Any]:
    """Return `speculative_config`; both kinds want the overlap scheduler off."""
    if options.speculation == "draft":
        drafting: dict[str, Any] = {"decoding_type": "Draft_Target", "speculative_model": options.draft}
    else:
        drafting = {"decoding_type": "NGram", "max_matching_ngram_size": options.longest_match}
    return drafting | {"max_draft_len": options.speculation_length}


def serve_yaml(options: Options, target: Target) -> str:
    """Return serve.yaml."""
    import yaml

    head = f"# trtllm-serve MODEL --config serve.yaml, TensorRT-LLM {options.version}, on {target.name}\n"
    return head + yaml.safe_dump(settings(options), sort_keys=False)


def serve_sh(options: Options) -> str:
    """Return serve.sh: the weights are linked beside the configuration for this server, then it starts."""
    sizes = {
        "--tp_size": options.tensor_parallel,
        "--max_batch_size": options.batch_size,
        "--max_num_tokens": options.max_num_tokens,
        "--max_seq_len": options.sequence_length,
    }
    arguments = " ".join(f"{name} {value}" for name, value in sizes.items())
    return f"""\
#!/bin/sh
# Serves ../../model (or $MODEL) with TensorRT-LLM {options.version} and an OpenAI-compatible API.
set -eu
cd "$(dirname "$0")"
MODEL="${{MODEL:-../../model}}"
[ -f "$MODEL/config.json" ] || {{ echo "no model in $MODEL: set MODEL to what optikit wrote" >&2; exit 66; }}
for file in "$MODEL"/*; do
  name=$(basename "$file")
  [ -f "model/$name" ] || [ "$name" = artifact.json ] || ln -sf "$(realpath --relative-to=model "$file")" "model/$name"
done
exec trtllm-serve model --host 0.0.0.0 --port "${{PORT:-8000}}" {arguments} --config serve.yaml
"""


def readme(options: Options, facts: ModelFacts, target: Target) -> Iterator[str]:
    """Yield the parts of README.md: what an engineer who gets the folder has to know, in the order of doing it."""
    title = f"{facts.model_type}, {facts.parameters / 1e6:.0f} M weights"
    yield f"# {title}, for TensorRT-LLM {options.version} on {target.name}"
    yield "Written by `optikit run`. Nothing here was run or timed: that needs the GPU. The commands below do it there."
    yield _table(options, facts, target)
    yield (
        "- `serve.yaml`: the server's configuration\n- `serve.sh`: links the weights beside `model/config.json`, "
        "starts the server\n- `smoke.sh`: waits for it and asks for 8 tokens\n- `run.sh`: the one command: checks, "
        "serves, asks, stops, writes `result.json`\n- `check.py`, `check.json`: is all here, and as it was written?\n"
        "- `Dockerfile`: NVIDIA's container of "
        "that release with `serve.sh` as its entry\n- `model/`: the model's configuration as transformers 4.57 and 5 "
        "both read it"
    )
    yield (
        "## On the GPU\n\nThe driver and the NVIDIA container toolkit are needed; TensorRT-LLM comes with the "
        "container, which takes far more disk than the model.\n\n```sh\n"
        "# the whole output directory of `optikit run` is needed: model/ and compiled/tensorrt-llm/\n"
        "rsync -a out/ INSTANCE:out/\nssh INSTANCE\ncd out\n"
        "sh compiled/tensorrt-llm/run.sh      # checks, serves, decodes 8 tokens, writes result.json\n```\n\n"
        "Back here the report says what was decoded, and where:\n\n```sh\n"
        "rsync INSTANCE:out/compiled/tensorrt-llm/result.json out/compiled/tensorrt-llm/\n"
        "optikit run RECIPE --out out/ --resume\n```\n\nTo serve it, there:\n\n```sh\n"
        "docker build -t trtllm-model compiled/tensorrt-llm\n"
        "docker run -d --init --gpus all --ipc host --ulimit memlock=-1 --ulimit stack=67108864 \\\n"
        '  -p 8000:8000 -v "$PWD:/out" trtllm-model\n```'
    )
    if options.draft:
        yield "The draft lies in `draft/` and is served from there; it has the model's tokenizer."
    yield (
        "## What it loads\n\nDense weights; gptq with 4 bits and groups of 64 or 128 in releases after 1.2.1; fp8 and "
        "NVFP4 from ModelOpt. No awq, no int8, no bitsandbytes, no Medusa heads: `optikit plan` refuses those before "
        "anything is written."
    )
    failures = [
        "`no such option: --config`: the release is older than 1.2; call it `--extra_llm_api_options` there",
        "out of memory while loading: lower `kv_cache_fraction`, `batch_size` or `max_num_tokens`, and run again",
        "`Draft_Target` or `NGram` refused together with the overlap scheduler: serve.yaml was changed by hand",
    ]
    yield "## If it fails\n\n" + "\n".join(f"- {line}" for line in failures)


def _table(options: Options, facts: ModelFacts, target: Target) -> str:
    cache = facts.kv_cache_bytes(options.sequence_length, element_bytes=1 if options.kv_cache_dtype == "fp8" else 2)
    memory = f"{target.memory_gib:g} GiB" if target.memory_gib else "unknown"
    rows: dict[str, Any] = {
        "requests in a step, at most": options.batch_size,
        "longest sequence, tokens": options.sequence_length,
        "GPUs (tensor parallel)": f"{options.tensor_parallel} of {target.count}, {memory} each",
        "weights, stored as": f"{facts.weight_bytes / 1e9:.2f} GB, {', '.join(sorted(facts.traits))}",
        "cache of one longest sequence": f"{cache / 1e9:.2f} GB",
    }
    if options.speculation != "none":
        rows["speculation"] = f"{options.speculation}, {options.speculation_length} tokens"
        rows["speculation"] += f", draft `{options.draft}`" if options.draft else ""
    return "\n".join(("| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())))
