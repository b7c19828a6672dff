"""EAGLE-3: one decoder layer on the model's hidden states of three depths drafts, trained here or given.

Paper   Li et al. 2025, arXiv:2503.01840 (EAGLE-3); layout: vllm-project/speculators
Helps   where Medusa heads guess too little: every drafted token sees those before it; the drafter that current servers
        (vLLM, TensorRT-LLM, SGLang) support
Hurts   models so small that a layer and an output layer cost a good part of a forward; little text to learn from
Cost    writing `tokens` tokens with the model; then, per epoch, a forward of the model over prompts and answers and
        `unroll` passes of the layer over the answers, forth and back
Differs trained online on what the final, quantized weights write, no state is kept on disk; begun as the model's last
        block; the output layer is the model's, cut to the tokens that it writes most; a chain, no tree; what repeats is
        looked up first, and the drafter is asked where nothing repeats, if that pays

The text stays the model's own: every draft token is checked. What the drafter brings is measured on the compiled model,
and chosen there.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field, model_validator

from optikit.errors import StageFailedError
from optikit.models import eagle3 as drafters
from optikit.models.facts import ModelFacts
from optikit.problems import Problem
from optikit.stage import ANY, MAIN, Estimate, Facts, Input, Job
from optikit.stages._budget import Budget, Schedule, budget
from optikit.stages.speculate import _prompts
from optikit.stages.speculate._prompts import WritingOptions
from optikit.targets import Target

if TYPE_CHECKING:
    from torch import Tensor

    from optikit.algorithms.eagle3 import Eagle3
    from optikit.models.eagle3 import Drafter
    from optikit.training.draft_model import Sequences
    from optikit.training.loop import History

SUMMARY = "EAGLE-3 drafter, trained on what the final weights write, or given; lossless"
NEEDS = ANY
WRITES = "speculator"
USES_TARGET = False
LIBRARIES: tuple[str, ...] = ("torch", "transformers", "tokenizers", "safetensors", "numpy")
ENVIRONMENT = MAIN
measured = _prompts.measured

DRAFT_VOCAB = 8192
"""Tokens that can be drafted by default: the output layer is the larger part of a drafter of a small model."""
BATCH = 8
"""Texts per step."""
WARMUP = 0.05
"""Share of the steps in which the learning rate rises."""
PATIENCE = 2
"""Epochs without a better validation after which training ends."""
CLIP = 0.5
"""Largest norm of a step's gradient, as in the authors' code."""
LEAST_BLOCKS = 3
TRAINING = ("depths", "draft_vocab", "tokens", "epochs", "steps", "unroll", "learning_rate", "schedule", "optimizer")
"""Options that say how to train."""


class Options(WritingOptions):
    """Options of `speculate: {method: eagle3}`."""

    model: str = ""
    """A drafter that there is already: a directory as speculators or EAGLE write it, with safetensors, or
    `hf:ORG/NAME@REVISION`. Empty trains one."""
    length: int = Field(default=4, ge=1, le=8)
    """Tokens to draft per step, where nothing else is chosen by measuring; servers are told this."""
    depths: tuple[int, ...] | None = None
    """Blocks of the model whose inputs are read, ascending. Empty is the third, the middle one, and the third from the
    end, as servers take them."""
    draft_vocab: int | None = Field(default=None, ge=16)
    """Tokens that can be drafted: those that the model writes most often. Empty is 8192."""
    tokens: int = Field(default=100_000, ge=64)
    """Tokens that the model writes to train on, as far as there are prompts. The more, the better the drafter."""
    epochs: int | None = Field(default=None, ge=1, le=1000)
    """Most passes over that text; training ends when validation stops getting better. Empty, where `steps` is, too, is
    6."""
    steps: int | None = Field(default=None, ge=1, le=10**8)
    """Most steps of eight texts, in place of `epochs`."""
    unroll: int = Field(default=4, ge=1, le=8)
    """Tokens that it learns to draft one behind the other, each from its own output for the one before."""
    learning_rate: float = Field(default=1e-3, gt=0, le=1)
    """AdamW's, after a warm-up of a twentieth of the steps."""
    schedule: Schedule = "cosine"
    """How the learning rate goes on from there: down to a tenth, or not at all (`constant`)."""
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    """`adamw8bit` keeps its moments in 8 bits."""

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        told = sorted(self.model_fields_set.intersection(TRAINING))
        if self.model and told:
            msg = f"a drafter that is given isn't trained: leave {', '.join(told)} out, or `model`"
            raise ValueError(msg)
        self.budget()
        return self

    def budget(self) -> Budget:
        """Return how much to train at most: epochs or steps."""
        return budget(("epochs", 6), epochs=self.epochs, steps=self.steps)

    def passes(self) -> float:
        """Return about how often a text is trained on."""
        unit, amount = self.budget()
        return amount if unit == "epochs" else amount * BATCH * self.new_tokens / self.tokens


def inputs(options: Options) -> Mapping[str, Input]:
    """Declare the prompts, and the drafter where one is named."""
    given = {"drafter": Input(of="drafter", spec=options.model, option="model")} if options.model else {}
    return {**_prompts.inputs(options), **given}


def fits(options: Options, facts: ModelFacts, models: Mapping[str, ModelFacts]) -> Iterator[Problem]:
    """Yield why the drafter that is named can't draft for this model."""
    from pathlib import Path

    for given in models.values():
        drafter = drafters.describe(given.config, Path("config.json"))
        yield from (problem.under("model") for problem in _misfits(drafter, given.tokenizer_sha256, facts))


def _misfits(drafter: Drafter, tokenizer: str, facts: ModelFacts) -> Iterator[Problem]:
    fix = "use a drafter that was trained for this model, or leave `model` out to train one"
    if drafter.target_hidden != facts.hidden:
        message = f"the drafter reads states of width {drafter.target_hidden}, the model has width {facts.hidden}"
        yield Problem(code="drafter-width", message=message, fix=fix)
    if drafter.vocab != facts.vocab:
        message = f"the drafter knows {drafter.vocab} tokens, the model {facts.vocab}"
        yield Problem(code="drafter-vocabulary", message=message, fix=fix)
    elif tokenizer and facts.tokenizer_sha256 and tokenizer != facts.tokenizer_sha256:
        message = f"the drafter's tokenizer ({tokenizer[:12]}) isn't the model's ({facts.tokenizer_sha256[:12]})"
        yield Problem(code="drafter-tokenizer", message=message, fix=fix)
    beyond = [block for block in drafter.layers if block >= facts.layers]
    if beyond or (not drafter.layers and facts.layers < LEAST_BLOCKS):
        read = beyond[0] if beyond else LEAST_BLOCKS - 1
        message = f"the drafter reads what block {read} is given, and the model has {facts.layers}"
        yield Problem(code="drafter-depths", message=message, fix=fix)


def check(options: Options, facts: ModelFacts, target: Target) -> Iterator[Problem]:
    """Yield why no drafter can be trained for this model."""
    yield from _prompts.check(options, facts)
    if options.model:
        return
    if facts.architecture is None:
        message = f"model_type {facts.model_type!r} is not one whose blocks are known"
        yield Problem(code="unknown-architecture", message=message, fix="use method lookup")
    depths = options.depths if options.depths is not None else drafters.default_layers(facts.layers)
    if facts.layers < LEAST_BLOCKS and options.depths is None:
        message = f"states of three depths are read, and the model has {facts.layers} blocks"
        yield Problem(code="drafter-depths", message=message, fix="name `depths`, or use method medusa")
    elif not depths or sorted(set(depths)) != list(depths) or not 0 <= depths[0] <= depths[-1] < facts.layers:
        message = f"depths {list(depths)} are not ascending numbers of the model's {facts.layers} blocks"
        fix = f"use for example {list(drafters.default_layers(facts.layers))}"
        yield Problem(code="drafter-depths", message=message, fix=fix, loc=("depths",))


def estimate(options: Options, facts: ModelFacts, target: Target, calibration_tokens: int) -> Estimate:
    """Estimate from SmolLM2-135M on two cores: writing, a forward per epoch, and the unrolled layer three times."""
    described = _described(options, facts)
    disk = 2 * (described.parameters + facts.vocab * facts.hidden)
    if options.model:
        return Estimate(seconds=20, peak_bytes=1_000_000_000 + 2 * disk, disk_bytes=disk)
    tokens = options.tokens * options.passes()
    run = 2 * 3 * tokens * facts.active_parameters  # prompts are about twice as long as answers
    trained = 6 * options.unroll * tokens * described.parameters
    return Estimate(
        seconds=30 + options.tokens * facts.active_parameters / 4e10 + (run + trained) / 1.5e11,
        peak_bytes=1_200_000_000 + 4 * facts.parameters + 16 * described.parameters,
        disk_bytes=disk,
    )


def after(options: Options, facts: ModelFacts) -> ModelFacts:
    """Return the facts of the same model with a drafter beside it."""
    return facts.having("eagle3")


def _described(options: Options, facts: ModelFacts) -> Drafter:
    """Return what a drafter trained for a model is: a layer as wide as the model's."""
    rope = drafters.rope_of(facts.config)
    return drafters.Drafter(
        hidden=facts.hidden,
        intermediate=facts.intermediate if not facts.experts else 3 * facts.hidden,
        heads=facts.heads,
        kv_heads=facts.kv_heads,
        head_dim=-(-facts.head_dim // drafters.HEAD_WIDTH) * drafters.HEAD_WIDTH,
        target_hidden=facts.hidden,
        vocab=facts.vocab,
        drafted=min(options.draft_vocab or DRAFT_VOCAB, facts.vocab),
        layers=options.depths or drafters.default_layers(facts.layers),
        eps=float(facts.config.get("rms_norm_eps") or 1e-6),
        rope=rope,
        context=facts.max_positions,
        norm_before_residual=False,
    )


def run(options: Options, job: Job) -> Facts:
    """Train a drafter on what the model writes, or take the one that is given; write it for this runtime and servers.

    Raises:
        InputMissingError: Too few prompts.
        IntegrityError: A given drafter is damaged.
        StageFailedError: It was made for another model, or training met a bad number before there was a good drafter.
    """
    from optikit.models.reader import read

    facts = read(job.source)
    found = _given(options, job, facts) if options.model else _trained(options, job, facts)
    return {**found, "loads_in": _describe_speculator(options, job, facts)}


def _given(options: Options, job: Job, facts: ModelFacts) -> Facts:
    """Write a drafter that there is in the one layout."""
    import torch

    from optikit.formats import eagle3 as files
    from optikit.models import tokenizer

    source = job.inputs["drafter"]
    drafter = drafters.read(source)
    told = tokenizer.describe(source)
    problem = next(_misfits(drafter, told.sha256 if told else "", facts), None)
    if problem is not None:
        raise StageFailedError(problem.message, fix=problem.fix)
    tensors = files.read_tensors(source, drafter)
    tensors.setdefault(drafters.EMBEDDING, _embedding(job, facts))
    ids = drafters.tokens(source, drafter)
    whole = drafter.drafted == drafter.vocab
    order = torch.tensor(sorted(range(len(ids)), key=ids.__getitem__))
    tensors["lm_head.weight"] = tensors["lm_head.weight"][order]
    _write(options, job, facts, drafter, tensors, None if whole else torch.tensor(ids)[order], base="")
    return {"drafter_parameters": drafter.parameters, "draft_vocab": drafter.drafted, "trained": False}


def _embedding(job: Job, facts: ModelFacts) -> Tensor:
    """Return the model's token embeddings (vocab, hidden)."""
    from optikit.formats.checkpoint import Checkpoint

    row = facts.architecture
    checkpoint = Checkpoint(job.source)
    name = f"{row.embedding}.weight" if row else ""
    if name not in checkpoint:
        message = "the drafter has no token embeddings, and the model's aren't known"
        raise StageFailedError(message, fix="add embed_tokens.weight to the drafter")
    return checkpoint.read(name)


def _trained(options: Options, job: Job, facts: ModelFacts) -> Facts:
    """Let the model write, and train a drafter on it."""
    import torch

    from optikit.algorithms.medusa import coverage, draft_vocabulary
    from optikit.algorithms.precision import compute_dtype, exact_products
    from optikit.runtime.speculation.fingerprint import weights_digest
    from optikit.stages.speculate import _generated
    from optikit.training import eagle3_drafter as training
    from optikit.training import self_generated
    from optikit.training.draft_model import sequences
    from optikit.training.loop import write_log

    torch.set_num_threads(job.threads)
    model, prompts, text = _generated.written(options, job, options.tokens, states=False)
    learning, held = self_generated.divide(text, 0.1)
    described = _described(options, facts)
    ids = draft_vocabulary(learning.tokens[learning.wanted], described.drafted, vocab=described.vocab)
    torch.manual_seed(job.seed)
    drafter, begun = _begin(model, described, facts, ids)
    row = facts.architecture
    if row is None:
        raise StageFailedError(f"model_type {facts.model_type!r} is unknown", fix="use method lookup")
    target = training.Target(model, row.blocks, described.layers, ids, job.device)
    parts: list[Sequences] = [sequences(prompts, part) for part in (learning, held)]
    with exact_products(compute_dtype(job.device)):
        history = training.train_drafter(
            drafter, target, parts[0], parts[1], _settings(options), job, steps=options.unroll
        )
    write_log(job.dest, history.rows())
    tensors = {**drafter.cpu().state_dict(), drafters.EMBEDDING: drafter.embedding}
    whole = described.drafted == described.vocab
    _write(options, job, facts, described, tensors, None if whole else ids, base=weights_digest(job.source))
    return {
        "self_generated_tokens": text.written,
        "self_generated_texts": text.texts,
        "drafter_parameters": described.parameters,
        "draft_vocab": described.drafted,
        "draft_vocab_coverage": coverage(held.tokens[held.wanted], ids),
        "depths": list(described.layers),
        "started_from": "the model's last block" if begun else "random weights",
        **_summary(history),
    }


def _begin(model: Any, described: Drafter, facts: ModelFacts, ids: Tensor) -> tuple[Eagle3, bool]:
    """Return an untrained drafter, and whether it begins as the model's last block."""
    import torch

    from optikit.algorithms.eagle3 import Eagle3, Shape
    from optikit.training.eagle3_drafter import start

    shape = Shape(
        hidden=described.hidden,
        fused=len(described.layers) * described.target_hidden,
        intermediate=described.intermediate,
        heads=described.heads,
        kv_heads=described.kv_heads,
        head_dim=described.head_dim,
        drafted=described.drafted,
        eps=described.eps,
    )
    drafter = Eagle3(
        shape,
        embedding=model.get_input_embeddings().weight.cpu(),
        token_ids=ids,
        inverse_frequencies=torch.tensor(described.frequencies()),
        norm_before_residual=described.norm_before_residual,
    )
    with torch.no_grad():
        drafter.lm_head.weight.copy_(model.get_output_embeddings().weight[ids])
    row = facts.architecture
    if row is None or row.norm_offset:
        return drafter, False
    block = model.get_submodule(f"{row.blocks}.{facts.layers - 1}").state_dict()
    norm = getattr(model.get_submodule(row.norm), "weight", None)
    return drafter, start(drafter, block, norm)


def _settings(options: Options) -> Any:
    from optikit.training.loop import Settings

    return Settings(
        budget=options.budget(),
        batch=BATCH,
        learning_rate=options.learning_rate,
        schedule=options.schedule,
        warmup=WARMUP,
        clip=CLIP,
        optimizer=options.optimizer,
        patience=PATIENCE,
        keep="best",
    )


def _summary(history: History) -> dict[str, Any]:
    """Return what became of the training, as JSON."""
    best = {name: value for name, value in history.validation[history.best].items() if name != "score"}
    return {"training": history.summary(), "validation": best}


def _write(
    options: Options,
    job: Job,
    facts: ModelFacts,
    drafter: Drafter,
    tensors: Mapping[str, Tensor],
    ids: Tensor | None,
    *,
    base: str,
) -> None:
    """Write the drafter's directory."""
    from dataclasses import replace

    from optikit.formats import eagle3 as files
    from optikit.runtime.speculation.eagle_session import DIRECTORY

    layers = drafter.layers or drafters.default_layers(facts.layers)
    context = min(drafter.context, facts.max_positions)
    settled = replace(drafter, layers=layers, context=context)
    config = files.settings(settled, facts, "../../model", options.length)
    files.write(job.dest / DIRECTORY, config, tensors, ids, base=base)


def _describe_speculator(options: Options, job: Job, facts: ModelFacts) -> dict[str, dict[str, str]]:
    """Write speculator.json; return which servers load the drafter."""
    from optikit.deploy import support, vllm
    from optikit.runtime.speculation.eagle_session import DIRECTORY
    from optikit.runtime.speculation.speculator import SPECULATOR, Speculator

    speculator = Speculator(
        method="eagle3",
        lengths={3: 8, 2: 4},
        ahead=options.length,
        ahead_gate=0.4,
        min_window=2 if options.exact else 1,
        acceptor=options.acceptor,
    )
    served = vllm.vllm("eagle3", tokens=options.length, directory=f"speculator/{DIRECTORY}")
    loads_in = {"eagle3": support.loads_in("eagle3")}
    found = speculator.as_json() | {"servers": {"vllm": {"speculative_config": served}}, "loads_in": loads_in}
    (job.dest / SPECULATOR).write_text(json.dumps(found, indent=1), encoding="utf-8")
    return loads_in
