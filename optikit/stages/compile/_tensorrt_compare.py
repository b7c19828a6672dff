"""Compare what a graph for TensorRT computes with what transformers computes with weights of the same dtype.

No processor here computes as the GPU will. So a copy of the graph is made in which every float is a float32, and that
is run by onnxruntime: what is left is the graph's arithmetic, and that of transformers on weights of the same dtype.
"""

from __future__ import annotations

import shutil
from functools import partial
from typing import TYPE_CHECKING, Any

from optikit.errors import IntegrityError
from optikit.stages.compile import _genai_builder
from optikit.stages.compile._logits import FIX, probe, relative_distance, short
from optikit.stages.compile._onnx_compare import compare_tables
from optikit.stages.compile._onnx_verify import GRAPH

if TYPE_CHECKING:
    from pathlib import Path

    import onnx
    import torch
    from torch import Tensor

    from optikit.formats.checkpoint import Checkpoint
    from optikit.models.facts import ModelFacts
    from optikit.stage import Job

APART = 1e-2
"""Relative distance of logits that the dtype doesn't explain: norms that are offset are rounded after that."""
HALVES = {10: "float16", 16: "bfloat16"}
"""Types of ONNX that become float32, as torch names them."""
FLOAT = 1


def compare(job: Job, facts: ModelFacts) -> dict[str, Any]:
    """Compare tables and logits of `job.dest` with transformers' of `job.source`; return how far they are apart.

    Raises:
        IntegrityError: Further than the dtype explains.
    """
    from optikit.calibration.reference_logits import ReferenceModel
    from optikit.formats.checkpoint import Checkpoint
    from optikit.formats.onnx_graph import OnnxGraph

    graph, source = OnnxGraph(job.dest / GRAPH), Checkpoint(job.source)
    dtype = next((HALVES[each.data_type] for each in graph.tensors.values() if each.data_type in HALVES), "float32")
    model = ReferenceModel(job.source, {name: partial(_rounded, source, name, dtype) for name in source})
    positions = compare_tables(graph, model)
    tokens = probe(facts, _genai_builder.window(facts))
    widened = job.scratch / "float32"
    shutil.rmtree(widened, ignore_errors=True)
    widened.mkdir(parents=True)
    try:
        found = _computed(widen(job.dest / GRAPH, widened), tokens, facts, job.threads)
    finally:
        shutil.rmtree(widened, ignore_errors=True)
    apart = relative_distance(found, model.logits(tokens))
    if not apart <= APART:
        message = f"the graph computes something else than the model: its logits are {apart:.2g} of their spread apart"
        raise IntegrityError(message, fix=FIX)
    return {"logits_compared": len(tokens), "logits_apart": short(apart), "rotary_positions_compared": positions}


def _rounded(source: Checkpoint, name: str, dtype: str) -> Tensor:
    """Return a tensor of the source as a graph of that dtype holds it, float32."""
    import torch

    kept: torch.dtype = getattr(torch, dtype)
    return source.read(name).to(kept).float()


def widen(graph: Path, directory: Path) -> Path:
    """Write a copy of a graph to a directory, with a float32 for every float16 and bfloat16; return its path."""
    import numpy as np
    import onnx

    model = onnx.load(str(graph))
    held = [*model.graph.initializer, *(each.t for node in model.graph.node for each in node.attribute)]
    for tensor in held:
        if tensor.data_type in HALVES:
            values = onnx.numpy_helper.to_array(tensor).astype(np.float32)
            tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    for node in model.graph.node:
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i in HALVES:
                attribute.i = FLOAT
    _retype([*model.graph.input, *model.graph.output, *model.graph.value_info])
    path = directory / GRAPH
    onnx.save(model, str(path), save_as_external_data=True, location=f"{GRAPH}.data")
    return path


def _retype(values: list[onnx.ValueInfoProto]) -> None:
    for value in values:
        kind = value.type.tensor_type
        if kind.elem_type in HALVES:
            kind.elem_type = FLOAT


def _computed(graph: Path, tokens: Tensor, facts: ModelFacts, threads: int) -> Tensor:
    """Return the logits, (tokens, vocabulary), of a graph whose cache is empty."""
    import numpy as np
    import onnxruntime
    import torch

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
    text = tokens.numpy()[None]
    positions = np.arange(text.shape[1])[None]
    known = {"input_ids": text, "attention_mask": np.ones_like(text), "position_ids": positions}
    cache = np.zeros((1, facts.kv_heads, 0, facts.head_dim), np.float32)
    fed = {wanted.name: known.get(wanted.name, cache) for wanted in session.get_inputs()}
    (logits,) = session.run(["logits"], fed)
    return torch.from_numpy(logits[0])
