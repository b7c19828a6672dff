"""optimum-intel and NNCF at work, in the `openvino` environment; and the trial of what they wrote, in a child."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optikit import records
from optikit.errors import IntegrityError, StageFailedError
from optikit.models.reader import read
from optikit.process import program
from optikit.stages.compile._logits import FIX, probe, relative_distance, short

if TYPE_CHECKING:
    from optikit.stage import Calibration, Job
    from optikit.stages.compile._openvino_options import Options

TRIAL = "optikit.stages.compile._openvino_trial"
LOGITS = "optikit.stages.compile._openvino_logits"
APART = {"float": 1e-2, "int8": 0.3, "int4": 1.0}
"""Relative distance of logits that rounding weights doesn't explain, by `weight_format`."""


def export(options: Options, job: Job) -> dict[str, Any]:
    """Write model, tokenizer and configuration to `job.dest`; return what NNCF was asked for.

    Raises:
        StageFailedError: The calibration text is too short.
    """
    os.environ["HF_HUB_OFFLINE"] = "1"
    from optimum.intel import OVModelForCausalLM
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(job.source))
    wanted = quantization(options, job)
    job.progress(0, 3, "export")
    model = OVModelForCausalLM.from_pretrained(
        str(job.source), export=True, compile=False, load_in_8bit=False, quantization_config=wanted
    )
    job.progress(1, 3, "export")
    model.save_pretrained(str(job.dest))
    tokenizer.save_pretrained(str(job.dest))
    _convert_tokenizer(tokenizer, job.dest)
    job.progress(2, 3, "export")
    return {"weight_format": options.weight_format, "nncf": wanted and _told(wanted)}


def quantization(options: Options, job: Job) -> Any:
    """Return optimum-intel's configuration for NNCF; None keeps the weights as they are."""
    if options.weight_format == "float":
        return None
    from optimum.intel import OVWeightQuantizationConfig

    from optikit.stages.compile._openvino_options import calibrated, group

    if options.weight_format == "int8":
        return OVWeightQuantizationConfig(bits=8, sym=False)
    texts = passages(job.calibration) if job.calibration and calibrated(options) else None
    return OVWeightQuantizationConfig(
        bits=4,
        sym=options.sym,
        group_size=group(options, read(job.source)),
        ratio=options.ratio,
        dataset=texts,
        tokenizer=str(job.source) if texts else None,
        num_samples=len(texts) if texts else None,
        quant_method="awq" if options.awq else "default",
        scale_estimation=options.scale_estimation or None,
    )


def passages(calibration: Calibration) -> list[str]:
    """Return as many passages of the calibration text as it has samples, evenly spread, four characters a token.

    Raises:
        StageFailedError: The text is shorter than one passage.
    """
    text = records.read(calibration.text)
    size = 4 * calibration.length
    if len(text) < size:
        message = f"the calibration text has {len(text)} characters, and one sample takes {size}"
        raise StageFailedError(message, fix="give more text, or a smaller calibration length")
    last = len(text) - size
    count = min(calibration.samples, max(1, last))
    starts = [last * index // max(1, count - 1) for index in range(count)]
    return [text[start : start + size] for start in starts]


def _told(config: Any) -> dict[str, Any]:
    """Return what was asked of NNCF, without the text."""
    kept = ("bits", "sym", "group_size", "ratio", "scale_estimation", "num_samples")
    return {name: getattr(config, name) for name in kept} | {"quant_method": str(config.quant_method)}


def _convert_tokenizer(tokenizer: Any, dest: Path) -> None:
    """Write the tokenizer as graphs, which is how openvino-genai wants it."""
    import openvino
    from openvino_tokenizers import convert_tokenizer

    for name, graph in zip(
        ("tokenizer", "detokenizer"), convert_tokenizer(tokenizer, with_detokenizer=True), strict=True
    ):
        openvino.save_model(graph, dest / f"openvino_{name}.xml")


def compare(options: Options, job: Job) -> dict[str, Any]:
    """Compare the logits of the IR with transformers', in float32; return how far they are apart.

    Raises:
        IntegrityError: Further than rounding the weights explains.
    """
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM

    facts = read(job.source)
    tokens = probe(facts, facts.max_positions)
    files = [str(job.scratch / name) for name in ("tokens.npy", "logits.npy")]
    job.scratch.mkdir(parents=True, exist_ok=True)
    np.save(files[0], tokens.numpy())
    _trial("computing with OpenVINO", LOGITS, job, *files)
    found = torch.from_numpy(np.load(files[1], allow_pickle=False))
    model = AutoModelForCausalLM.from_pretrained(str(job.source), dtype=torch.float32, local_files_only=True).eval()
    with torch.inference_mode():
        apart = relative_distance(found, model(tokens[None]).logits[0])
    if not apart <= APART[options.weight_format]:
        message = f"the IR computes something else than the model: its logits are {apart:.2g} of their spread apart"
        raise IntegrityError(f"{message}, and {options.weight_format} explains {APART[options.weight_format]}", fix=FIX)
    return {"logits_compared": len(tokens), "logits_apart": short(apart)}


def decode(job: Job, tokens: int) -> str:
    """Let openvino-genai decode from `job.dest`; see `program.trial`.

    Raises:
        StageFailedError: It crashed or refused.
    """
    return _trial("decoding with openvino-genai", TRIAL, job, str(tokens), str(job.threads))


def _trial(what: str, module: str, job: Job, *arguments: str) -> str:
    """Run a module on `job.dest`; on some processors OpenVINO ends by a signal."""
    try:
        return program.trial(what, module, job, *arguments)
    except StageFailedError as error:
        if "its process crashed with SIG" not in str(error):
            raise
        message = f"OpenVINO doesn't run on this processor: {error}"
        raise StageFailedError(message, fix="use `compile: {engine: onnxruntime}` on this machine") from error
