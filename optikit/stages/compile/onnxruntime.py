"""ONNX Runtime: one graph for the CPU, with int4 matrix kernels where the weights are quantized.

onnxruntime-genai's model builder writes the graph from a `gptq` or `awq` directory (weights stay exactly what the
quantizer chose) or from a dense one (float32, or rounded to nearest by the engine). Afterwards every linear is unpacked
from the file again and compared with the source, bit by bit where nothing may have changed, and a child process decodes
with onnxruntime-genai itself.

Helps   decode at batch 1: a step reads a quarter to a seventh of the bytes, in integer instructions
Hurts   prefill gains less than decode: it is bound by arithmetic, not by bytes
Cost    seconds; memory of the builder: a few times the output head, plus the weights
Note    accuracy level 4 rounds activations to int8 per block: KL 0.006 nats on SmolLM2-135M. Its kernel for one token
        differs from the one for several by up to 1 logit, so a speculated text may differ from a plain one at near-ties
Note    a 4-bit head, which is the embedding too where they are tied, costs KL 0.10 there (perplexity +7 %), an 8-bit
        one next to nothing, at nearly the same speed
Note    the embedding is looked up in the head's own weights where the model ties them, and else rounded to 8 bits: its
        float32 table would be the largest part of a small model's file
Note    bf16 isn't offered: onnxruntime has no CPU kernels for it
Note    `verify: int8` writes a second graph for prompts and for drafts to be checked: one scale per output channel and
        one per token. It takes 8 more bits a weight, and a forward of 8 tokens little more time than one of one token
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from optikit import host
from optikit.models import engines, traits
from optikit.models.facts import ModelFacts
from optikit.models.reader import tensor_shapes
from optikit.problems import Problem
from optikit.stage import ANY, MAIN, Estimate, Facts, Job, StageOptions, directory_bytes, no_objection, nothing
from optikit.stages.compile import _genai_builder
from optikit.targets import Target

if TYPE_CHECKING:
    from torch import Tensor

SUMMARY = "ONNX Runtime graph for CPUs: int4 or int8 from gptq and awq weights, float32 from dense ones"
NEEDS = ANY
WRITES = "engine"
USES_TARGET = False
LIBRARIES = ("onnxruntime-genai", "onnxruntime", "onnx", "onnx-ir", "torch", "transformers")
ENVIRONMENT = MAIN
inputs = nothing
fits = no_objection

ENGINE = "onnxruntime"
READABLE = traits.read_by(ENGINE)
QUANTIZED = READABLE - {traits.DENSE}
"""How the weights may be stored: what the builder reads and what can be compared with its output."""
SPECULATORS = frozenset({"prompt_lookup", "medusa_heads", "draft_model"})
"""Traits of models that drafts will be checked with."""
TRIAL_TOKENS = 8
"""Tokens that a compiled artifact has to decode before it is accepted."""


class Options(StageOptions):
    """Options of `compile: {engine: onnxruntime}`."""

    precision: Literal["auto", "int4", "int8", "fp32"] = "auto"
    """Weights of the blocks: `auto` keeps what the source has; int4 and int8 let the engine round dense weights to
    nearest, which a quantize stage does better."""
    head: Literal["int8", "int4", "float32"] = "int8"
    """Output head, and the embedding where it is the same matrix. Quantized graphs only; a float32 graph keeps both."""
    embedding: Literal["auto", "int8", "int4", "float32"] = "auto"
    """Table that tokens are looked up in: `auto` is the head's own weights where the model ties the two, and else int8;
    a float32 graph keeps it as it is. Any other value is a table of its own."""
    accuracy_level: Literal[1, 4] = 4
    """Activations inside quantized products: 4 rounds them to int8, 1 keeps float32 and is several times slower."""
    block_size: Literal[16, 32, 64, 128, 256] = 32
    """Weights that share a scale, where the engine itself rounds: the head, and every layer of a dense source."""
    verify: Literal["auto", "int8", "own"] = "auto"
    """What runs several tokens at once, prompts and drafts: `int8` a second graph, the same weights in 8 bits with a
    scale per channel; `own` the only one. `auto` is int8 where a speculate stage came before, the weights are
    quantized, and this processor multiplies 8-bit integers exactly."""


def check(options: Options, facts: ModelFacts, target: Target) -> Iterator[Problem]:
    """Yield what the builder can't read, or the target can't run."""
    if ENGINE not in target.engines:
        message = f"target {target.name!r} doesn't run {ENGINE}"
        fix = f"it runs {', '.join(target.engines)}" if target.engines else "choose target: cpu"
        yield Problem(code="engine-not-on-target", message=message, fix=fix)
    yield from unreadable(options, facts)
    if options.accuracy_level == 1 and options.head == "int8" and _bits(options, facts) < 32:
        message = "onnxruntime has no fast int8 kernel for float32 activations: the head alone takes most of a step"
        fix = "use accuracy_level: 4, or head: float32"
        yield Problem(code="slow-head", message=message, fix=fix, loc=("head",), level="warning")
    if options.embedding in _TABLE_BITS and _table_group(options, facts) is None:
        message = f"rows of {facts.hidden} weights can't be cut into groups of {' or '.join(map(str, _GROUPS))}"
        fix = "use embedding: auto, or embedding: float32"
        yield Problem(code="embedding-width", message=message, fix=fix, loc=("embedding",))


def unreadable(options: Options, facts: ModelFacts) -> Iterator[Problem]:
    """Yield what of a model the builder can't read, or would compute otherwise."""
    yield from _genai_builder.problems(facts)
    stored = facts.traits & READABLE
    if not stored:
        message = f"the builder can't read these weights: {', '.join(sorted(facts.traits))}"
        fix = f"compile from {', '.join(sorted(READABLE))}"
        yield Problem(code="weights-not-readable", message=message, fix=fix)
    elif stored & QUANTIZED:
        yield from _check_packing(options, facts)


def _check_packing(options: Options, facts: ModelFacts) -> Iterator[Problem]:
    packing = _packing(facts)
    bits = packing.get("bits", 4)
    if options.precision not in ("auto", f"int{bits}"):
        message = f"precision {options.precision} can't be made of weights that are already packed in {bits} bits"
        fix = "use precision: auto, or compile from the dense model"
        yield Problem(code="precision-already-chosen", message=message, fix=fix, loc=("precision",))
    group, sizes = packing.get("group_size", 64), engines.find(ENGINE).groups
    if group not in sizes:
        message = f"groups of {group} weights have no kernel in onnxruntime"
        fix = f"quantize with group_size {', '.join(map(str, sizes))}"
        yield Problem(code="group-has-no-kernel", message=message, fix=fix)
    if packing.get("desc_act"):
        message = "groups in activation order (desc_act) have no int8 kernel in onnxruntime"
        yield Problem(
            code="groups-out-of-order", message=message, fix="quantize with groups in place (desc_act: false)"
        )
    skipped = packing.get("modules_to_not_convert") or ()
    if facts.left_dense or packing.get("dynamic") or any(part in name for part in skipped for name in facts.linears):
        message = "the builder can't read a quantized directory in which some linears are dense"
        yield Problem(code="partly-quantized", message=message, fix="quantize every linear (ignore: [])")


def _packing(facts: ModelFacts) -> Mapping[str, Any]:
    found = facts.config.get("quantization_config")
    return found if isinstance(found, dict) else {}


def estimate(options: Options, facts: ModelFacts, target: Target, calibration_tokens: int) -> Estimate:
    """Estimate from what was measured on SmolLM2-135M: the builder holds the weights and copies of the head.

    Then transformers computes logits a block at a time, embedding and head in float32, beside the graph.
    """
    written = after(options, facts).weight_bytes
    if facts.traits & QUANTIZED:
        held = int(2.5 * facts.weight_bytes) + 20 * facts.vocab * facts.hidden
    else:
        held = (4 if _bits(options, facts) == 32 else 12) * facts.parameters
    compared = 480_000_000 + written + 8 * facts.vocab * facts.hidden
    return Estimate(
        seconds=23 + facts.parameters / 2e7,
        peak_bytes=max(450_000_000 + held, compared),
        disk_bytes=directory_bytes(written, facts.vocab),
    )


def _bits(options: Options, facts: ModelFacts) -> int:
    """Return the bits per weight of the blocks' linears."""
    if facts.traits & QUANTIZED:
        return traits.bits(facts.traits)
    return {"int4": 4, "int8": 8}.get(options.precision, 32)


def _packed_bytes(shape: tuple[int, int], bits: int, group: int, *, zeros: bool) -> int:
    """Return the bytes of a MatMulNBits weight (out_features, in_features): codes, float32 scales, zero points."""
    rows, columns = shape
    blocks = -(-columns // group)
    return rows * (blocks * (group * bits // 8 + 4) + (-(-blocks * bits // 8) if zeros else 0))


def after(options: Options, facts: ModelFacts) -> ModelFacts:
    """Return the facts of the compiled artifact; its size is computed from the shapes."""
    bits, table = _bits(options, facts), _table_bytes(options, facts)
    vectors = sum(shape[0] for shape in tensor_shapes(facts).values() if len(shape) == 1)  # norms and biases
    rest = 4 * vectors + 4 * facts.max_positions * facts.head_dim  # and the table of angles
    if bits == 32:
        size = 4 * (facts.linear_elements + facts.vocab * facts.hidden) + table + rest
        return replace(facts.having("onnx"), weight_bytes=size)
    quantized = bool(facts.traits & QUANTIZED)
    group = _packing(facts).get("group_size", 64) if quantized else options.block_size
    body = sum(_packed_bytes(shape, bits, group, zeros=quantized) for shape in facts.linears.values())
    second = _verify_bytes(options, facts)
    return replace(
        facts.having("onnx", without=frozenset() if quantized else frozenset({"dense"})),
        weight_bytes=body + _head_bytes(options, facts) + table + rest + second,
        second_bytes=second,
    )


def verifies(options: Options, facts: ModelFacts) -> bool:
    """Return whether a second graph is written, for several tokens at once."""
    if options.verify == "auto":
        asked = bool(facts.traits & SPECULATORS) and options.accuracy_level == 4
        return asked and _bits(options, facts) < 32 and host.multiplies_int8()
    return options.verify == "int8"


def settle(options: Options, facts: ModelFacts) -> Options:
    """Return the options with `verify` chosen."""
    return options.model_copy(update={"verify": "int8" if verifies(options, facts) else "own"})


def _verify_bytes(options: Options, facts: ModelFacts) -> int:
    """Return the bytes of the second graph's weights: codes, and a float32 scale per row; the rest it shares."""
    if not verifies(options, facts):
        return 0
    shapes = (*facts.linears.values(), (facts.vocab, facts.hidden))
    return sum(rows * (columns + 4) for rows, columns in shapes)


def _head_bytes(options: Options, facts: ModelFacts) -> int:
    if options.head == "float32":
        return 4 * facts.vocab * facts.hidden
    bits = 8 if options.head == "int8" else 4
    return _packed_bytes((facts.vocab, facts.hidden), bits, options.block_size, zeros=False)


_TABLE_BITS = {"int8": 8, "int4": 4}
_GROUPS = (256, 128, 64, 32, 16)
"""Weights that may share a scale in a table."""


def _table_group(options: Options, facts: ModelFacts) -> int | None:
    """Return how many weights of an embedding share a scale: `block_size`, or what of it divides a row."""
    return next((each for each in _GROUPS if each <= options.block_size and facts.hidden % each == 0), None)


def table(options: Options, facts: ModelFacts) -> Literal["head", "int8", "int4", "float32"]:
    """Return where tokens are looked up: in the head's own weights, or in a table of its own, stored so."""
    if options.embedding != "auto":
        return options.embedding
    ragged = facts.hidden % options.block_size != 0
    if facts.tied and (_bits(options, facts) == 32 or _builder_ties(options, facts) or not ragged):
        return "head"
    return "float32" if _bits(options, facts) == 32 or _table_group(options, facts) is None else "int8"


def _table_bytes(options: Options, facts: ModelFacts) -> int:
    """Return the bytes of the embedding beside the head's: codes and float32 scales, or floats."""
    stored = table(options, facts)
    if stored in ("head", "float32"):
        return 0 if stored == "head" else 4 * facts.vocab * facts.hidden
    group = _table_group(options, facts) or facts.hidden
    return _packed_bytes((facts.vocab, facts.hidden), _TABLE_BITS[stored], group, zeros=False)


def _builder_ties(options: Options, facts: ModelFacts) -> bool:
    """Return whether the builder itself looks tokens up in the head: with a quantized one in 4-bit graphs only."""
    if builder_precision(options, facts) == "fp32":
        return facts.tied
    return facts.tied and options.head != "float32" and builder_precision(options, facts) == "int4"


def builder_precision(options: Options, facts: ModelFacts) -> str:
    """Return the builder's `-p`: for packed weights it only reaches what the quantizer left in float."""
    if facts.traits & QUANTIZED:
        return "int4"
    return "fp32" if options.precision == "auto" else options.precision


def builder_options(options: Options, facts: ModelFacts) -> tuple[str, ...]:
    """Return the builder's `--extra_options`.

    Its `rtn` rounding, not its default one: the default names an 8-bit head in a way that a tied embedding doesn't find
    (onnxruntime-genai 0.18).
    """
    apart = () if _builder_ties(options, facts) and table(options, facts) == "head" else ("shared_embeddings=false",)
    if builder_precision(options, facts) == "fp32":
        return apart
    common = (f"accuracy_level={options.accuracy_level}", f"block_size={options.block_size}", "algo_config=rtn")
    if options.head == "float32":
        return (*common, "nodes_to_exclude=/lm_head/MatMul", *apart)
    return (*common, f"matmul_mixed_precision=last_matmul:{options.head}", *apart)


def run(options: Options, job: Job) -> Facts:
    """Build the graph, compare its weights and its logits with the source's, decode with it.

    Raises:
        StageFailedError: The builder failed, wrote other weights than it read, or a graph that doesn't run.
        IntegrityError: The graph computes something else than the model.
    """
    from optikit.formats import onnx_int8
    from optikit.models.reader import read
    from optikit.stages.compile import _onnx_build, _onnx_compare, _onnx_verify

    facts = read(job.source)
    precision = builder_precision(options, facts)
    extra = builder_options(options, facts)
    _onnx_build.build(job, precision, extra, facts)
    _embed(options, job, facts)
    graph, wide = job.dest / _onnx_verify.GRAPH, verifies(options, facts)
    if wide and options.head == "int8":
        onnx_int8.align_head(graph, _head(job, facts))
    found = _onnx_verify.compare(
        job.source, job.dest, facts, exact=precision == "fp32" or bool(facts.traits & QUANTIZED)
    )
    window = _genai_builder.window(facts)
    found |= _onnx_compare.compare(job.source, job.dest, facts, window=window, threads=job.threads)
    if wide:
        found |= onnx_int8.build(graph)
        found |= _onnx_compare.compare_verify(job.dest, facts, window=window, threads=job.threads)
    trial = json.loads(_onnx_build.decode(job, TRIAL_TOKENS))
    return {"builder_precision": precision, "builder_options": list(extra), **found, "trial": trial}


def _head(job: Job, facts: ModelFacts) -> Tensor:
    """Return the output head of the source, (vocabulary, hidden)."""
    from optikit.formats.checkpoint import Checkpoint
    from optikit.stages.compile import _onnx_verify

    return Checkpoint(job.source).read(_onnx_verify.outer_names(facts)[0 if facts.tied else 1])


def _embed(options: Options, job: Job, facts: ModelFacts) -> None:
    """Put the embedding that was asked for in the place of the builder's float32 table."""
    from optikit.formats.checkpoint import Checkpoint
    from optikit.stages.compile import _onnx_embedding, _onnx_verify

    graph, stored = job.dest / _onnx_verify.GRAPH, table(options, facts)
    if stored == "head" and not _builder_ties(options, facts):
        _onnx_embedding.tie(graph, job.scratch)
    elif stored in _TABLE_BITS:
        weight = Checkpoint(job.source).read(_onnx_verify.outer_names(facts)[0])
        group = _table_group(options, facts) or facts.hidden
        _onnx_embedding.round_table(graph, weight, _TABLE_BITS[stored], group, job.scratch)
