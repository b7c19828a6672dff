"""A draft model writes ahead, and the model checks: a small model of the same vocabulary, given, or made of this one.

Paper   Leviathan et al. 2023, arXiv:2211.17192; distilled on self-generated text: Zhou et al. 2024, arXiv:2310.08461
Helps   large models with a small relative; servers that know drafts but no Medusa heads
Hurts   small models: a draft that agrees often costs a large part of what it saves; where measuring shows no gain it
        isn't asked
Cost    a given draft: seconds; a made one: writing `tokens` tokens with the model, then minutes of training, 16 bytes
        per weight of its blocks
Differs the window, and how sure the draft has to be to go on, are chosen by what was accepted and what each forward
        cost on the compiled models; what repeats is looked up first

The text stays the model's own: every draft token is checked.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import ConfigDict, Field, model_validator

from optikit.described import Described
from optikit.errors import StageFailedError
from optikit.models import architectures, tokenizer
from optikit.models.facts import ModelFacts
from optikit.problems import Problem
from optikit.stage import ANY, DENSE, MAIN, Estimate, Facts, Input, Job, directory_bytes
from optikit.stages._budget import Budget, budget
from optikit.stages.speculate import _prompts
from optikit.stages.speculate._prompts import WritingOptions
from optikit.targets import Target

if TYPE_CHECKING:
    from pathlib import Path

    from optikit.training.self_generated import GeneratedText

SUMMARY = "draft model: given, or made by leaving out blocks and distilling; lossless"
NEEDS = ANY
WRITES = "speculator"
USES_TARGET = False
LIBRARIES: tuple[str, ...] = (
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "numpy",
    "onnxruntime",
    "onnxruntime-genai",
)
ENVIRONMENT = MAIN
measured = _prompts.measured

COMPARED = 8192
"""Tokens on which predictions are compared while distilling: those that the model writes most."""
INFLUENCE_TEXTS = 16
"""Self-generated texts that the influence of blocks is measured on."""
BATCH = 8
"""Texts per step."""
WARMUP = 0.1
"""Share of the steps in which the learning rate rises."""


class Make(Described):
    """How to make a draft of the model itself."""

    model_config = ConfigDict(allow_inf_nan=False)

    layers: int = Field(default=6, ge=1, le=1000)
    """Blocks that the draft keeps: those that change most what passes through them."""
    distill: bool = True
    """Train them on what the model writes; without, a draft of few blocks is hardly ever right."""
    tokens: int = Field(default=100_000, ge=64)
    """Tokens that the model writes to train on, as far as there are prompts."""
    epochs: int | None = Field(default=None, ge=1, le=1000)
    """Passes over that text. Empty, where `steps` is, too, is 3."""
    steps: int | None = Field(default=None, ge=1, le=10**8)
    """Steps of eight texts, in place of `epochs`."""
    learning_rate: float = Field(default=5e-4, gt=0, le=1)
    """AdamW's, after a warm-up of a tenth of the steps."""

    @model_validator(mode="after")
    def _one_budget(self) -> Self:
        self.budget()
        return self

    def budget(self) -> Budget:
        """Return how much to train: epochs or steps."""
        return budget(("epochs", 3), epochs=self.epochs, steps=self.steps)

    def trained_tokens(self, text_tokens: int) -> int:
        """Return about how many tokens that is, where a text has at most so many."""
        unit, amount = self.budget()
        return amount * (self.tokens if unit == "epochs" else BATCH * text_tokens)


class Options(WritingOptions):
    """Options of `speculate: {method: draft}`."""

    model: str = ""
    """A draft that there is already: a directory, or `hf:ORG/NAME@REVISION`, with the model's own tokenizer."""
    make: Make | None = None
    """How to make one; empty, where no `model` is named, is {layers: 6}."""
    tokens: int = Field(default=4, ge=1, le=16)
    """Tokens to draft per step, where nothing else is chosen by measuring; servers are told this."""
    precision: Literal["int4", "int8", "fp32"] = "int8"
    """Weights of the draft where it runs here, rounded to nearest; its directory for servers keeps its own. A distilled
    draft of SmolLM2-135M guesses 27 % of tokens in bfloat16 and in int8; in int4 14 %, in 6.1 instead of 7.1 ms."""

    @model_validator(mode="after")
    def _one(self) -> Options:
        if self.model and self.make is not None:
            msg = "name a draft `model`, or say how to `make` one, not both"
            raise ValueError(msg)
        return self

    @property
    def making(self) -> Make | None:
        """How to make the draft; None where one is given."""
        return None if self.model else self.make or Make()


def inputs(options: Options) -> Mapping[str, Input]:
    """Declare the prompts, and the draft where one is named."""
    given = {"draft": Input(of="model", spec=options.model, option="model")} if options.model else {}
    return {**_prompts.inputs(options), **given}


def fits(options: Options, facts: ModelFacts, models: Mapping[str, ModelFacts]) -> Iterator[Problem]:
    """Yield why the draft that is named can't serve this model."""
    from optikit.deploy.draft import problems

    for draft in models.values():
        for problem in (*problems(draft, facts), *_uncompiled(options, draft)):
            yield problem.under("model")


def _uncompiled(options: Options, draft: ModelFacts) -> Iterator[Problem]:
    """Yield why a draft can't be compiled for this runtime."""
    from optikit.stages.compile import onnxruntime

    chosen = onnxruntime.Options(precision=_precision(options, draft))
    yield from (replace(problem, loc=()) for problem in onnxruntime.unreadable(chosen, draft))


def _precision(options: Options, draft: ModelFacts) -> Literal["auto", "int4", "int8", "fp32"]:
    """Return how the draft is compiled: what a quantizer packed stays as it is."""
    from optikit.stages.compile import onnxruntime

    return "auto" if draft.traits & onnxruntime.QUANTIZED else options.precision


def check(options: Options, facts: ModelFacts, target: Target) -> Iterator[Problem]:
    """Yield why no draft can be made of this model."""
    yield from _prompts.check(options, facts)
    making = options.making
    if making is None:
        return
    if facts.architecture is None:
        message = f"model_type {facts.model_type!r} is not one whose blocks are known"
        yield Problem(code="unknown-architecture", message=message, fix=f"known: {', '.join(architectures.names())}")
    elif making.layers >= facts.layers:
        message = f"a draft of {making.layers} blocks is no smaller than the model with {facts.layers}"
        yield Problem(code="draft-too-large", message=message, fix="lower layers", loc=("make", "layers"))
    else:
        yield from _uncompiled(options, replace(facts, traits=DENSE))


def estimate(options: Options, facts: ModelFacts, target: Target, calibration_tokens: int) -> Estimate:
    """Estimate from SmolLM2-135M on two cores: writing, three passes of the draft per token and epoch, compiling."""
    making, embedding = options.making, facts.vocab * facts.hidden
    if making is None:
        return Estimate(seconds=40, peak_bytes=2_000_000_000, disk_bytes=6 * embedding)
    body = facts.linear_elements * making.layers // max(1, facts.layers)
    tokens = making.tokens if making.distill else INFLUENCE_TEXTS * options.new_tokens
    learning = making.trained_tokens(options.new_tokens) if making.distill else 0
    trained = 6 * learning * (2 * body + COMPARED * facts.hidden)
    return Estimate(
        seconds=60 + tokens * facts.parameters / 4e10 + trained / 1e11,
        peak_bytes=1_100_000_000 + 4 * facts.parameters + 20 * body + 4 * embedding,
        disk_bytes=_draft_bytes(options, body, embedding) + 2 * directory_bytes(0, facts.vocab),
        scratch_bytes=2 * tokens * facts.hidden,
    )


def _draft_bytes(options: Options, body: int, embedding: int) -> int:
    """Return the size of a draft in bfloat16 and compiled; only an int4 graph looks embeddings up in its int8 head."""
    per_weight = {"int4": (0.9, 1.06), "int8": (1.4, 5.06), "fp32": (4.0, 4.0)}
    blocks, table = per_weight[options.precision]
    return int((2 + blocks) * body + (2 + table) * embedding)


def drafts(options: Options, facts: ModelFacts, models: Mapping[str, ModelFacts]) -> ModelFacts | None:
    """Return the facts of the draft that is named, or of the one that will be made, in bfloat16."""
    making, row = options.making, facts.architecture
    if making is None:
        return models.get("draft")
    if row is None or making.layers >= facts.layers:
        return None
    kept = set(row.names(making.layers))
    linears = {name: shape for name, shape in facts.linears.items() if name in kept}
    made = replace(facts, layers=making.layers, linears=linears, traits=DENSE)
    return replace(made, weight_bytes=2 * made.parameters)


def after(options: Options, facts: ModelFacts) -> ModelFacts:
    """Return the facts of the same model with a draft beside it."""
    return facts.having("draft_model")


def run(options: Options, job: Job) -> Facts:
    """Write draft/ for servers, draft/onnxruntime for this runtime, and speculator.json.

    Raises:
        InputMissingError: Too few prompts.
        StageFailedError: The draft has other tokens than the model, or training met a bad number at once.
    """
    from optikit.deploy import draft as writer
    from optikit.models.reader import read

    target = read(job.source)
    made: Facts = {}
    if options.making is None:
        source = job.inputs["draft"]
    else:
        source = job.scratch / "made"
        made = _make(options, options.making, job, source)
    found = read(source)
    problem = next((each for each in writer.problems(found, target) if each.level == "error"), None)
    if problem is not None:
        raise StageFailedError(problem.message, fix=problem.fix)
    dest = job.dest / "draft"
    writer.write_draft(source, dest, tokens=options.tokens, context=target.max_positions)
    compiled = _compile(options, job, found, dest)
    loads_in = _write(options, job)
    return {
        "draft_layers": found.layers,
        "draft_parameters": found.parameters,
        "compiled": compiled,
        "loads_in": loads_in,
        **made,
    }


def _make(options: Options, making: Make, job: Job, dest: Path) -> Facts:
    """Write a draft directory of the model's own blocks."""
    import shutil

    import torch

    from optikit.algorithms import depth
    from optikit.models.reader import read
    from optikit.stages.speculate import _generated
    from optikit.training import draft_model

    torch.set_num_threads(job.threads)
    tokens = making.tokens if making.distill else INFLUENCE_TEXTS * options.new_tokens
    model, prompts, text = _generated.written(options, job, tokens)
    facts = read(job.source)
    row = facts.architecture
    if row is None:
        raise StageFailedError(f"model_type {facts.model_type!r} is unknown", fix="name a draft `model`")
    every = draft_model.sequences(prompts, text)
    influences = draft_model.influences(model, every.tokens[:INFLUENCE_TEXTS])
    gone = depth.removed(influences, facts.layers - making.layers, keep_first=1 if making.layers > 1 else 0)
    kept = [index for index in range(facts.layers) if index not in gone]
    student = draft_model.shortened(model, row.blocks, kept)
    del model
    found: Facts = {"self_generated_tokens": text.written, "blocks_kept": kept}
    if making.distill:
        found["training"] = _distil(making, job, (student, row.blocks), prompts, text)
    shutil.rmtree(dest, ignore_errors=True)
    student.to(torch.bfloat16).save_pretrained(dest)
    tokenizer.copy(job.source, dest)
    return found


def _distil(making: Make, job: Job, student: tuple[Any, str], prompts: list[list[int]], text: GeneratedText) -> Facts:
    """Train a student, given with the name of its list of blocks; return what became of it."""
    from optikit.algorithms.medusa import draft_vocabulary
    from optikit.algorithms.precision import compute_dtype, exact_products
    from optikit.training import draft_model, self_generated
    from optikit.training.loop import Settings, write_log

    model, blocks = student
    learning, held = self_generated.divide(text, 0.1)
    vocab = model.config.vocab_size
    drafted = draft_vocabulary(learning.tokens[learning.wanted], min(COMPARED, vocab), vocab=vocab)
    settings = Settings(
        budget=making.budget(), batch=BATCH, learning_rate=making.learning_rate, warmup=WARMUP, keep="best"
    )
    data, other = (draft_model.sequences(prompts, part) for part in (learning, held))
    with exact_products(compute_dtype(job.device)):
        history = draft_model.train_draft(model, blocks, data, other, drafted, settings, job)
    write_log(job.dest, history.rows())
    return {**history.summary(), "agreement": [each["score"] for each in history.validation]}


def _compile(options: Options, job: Job, facts: ModelFacts, directory: Path) -> dict[str, Any]:
    """Compile a draft directory for this runtime, into its own subdirectory."""
    from optikit.stages.compile import onnxruntime

    dest = directory / "onnxruntime"
    dest.mkdir()
    chosen = onnxruntime.Options(precision=_precision(options, facts))
    inner = replace(job, source=directory, dest=dest, scratch=job.scratch / "compile", inputs={})
    found = onnxruntime.run(chosen, inner)
    told = ("builder_precision", "linears_compared", "linears_largest_steps", "head", "logits_apart")
    return {name: found[name] for name in told}


def _write(options: Options, job: Job) -> dict[str, str]:
    """Write speculator.json; return which servers load the draft."""
    from optikit.deploy import support, vllm
    from optikit.runtime.speculation.speculator import AHEAD, SPECULATOR, Speculator

    speculator = Speculator(
        method="draft",
        lengths={3: 8, 2: 4},
        ahead=min(AHEAD, options.tokens),
        ahead_gate=0.4,
        min_window=2 if options.exact else 1,
        acceptor=options.acceptor,
    )
    servers = {
        "vllm": {"speculative_config": vllm.vllm("draft", tokens=options.tokens, directory="speculator/draft")},
        "transformers": {"assistant_model": "speculator/draft"},
    }
    loads_in = support.loads_in("draft")
    found = speculator.as_json() | {"servers": servers, "loads_in": loads_in}
    (job.dest / SPECULATOR).write_text(json.dumps(found, indent=1), encoding="utf-8")
    return loads_in
