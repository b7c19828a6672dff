"""Medusa-1: small heads on the model's last hidden state guess the tokens after the next one; the model stays as it is.

Paper   Cai et al. 2024, arXiv:2401.10774 (Medusa-1, section 2.2.1; self-distillation, section 2.3.2); `sequential`:
        Ankner et al. 2024, arXiv:2402.05109 (Hydra)
Helps   domains whose texts are predictable: there the first head is right more often than not
Hurts   open-ended prose, above all from little text: where measuring shows no gain the heads aren't asked
Cost    writing `tokens` tokens with the model in batches, then minutes of training; 2 bytes per token and unit of width
Differs heads share the model's output layer, cut to the tokens that it writes most; they are trained on what the final,
        quantized weights write by themselves, greedily; a chain, no tree: on a CPU every checked token costs time; what
        repeats is looked up first, and heads are asked where nothing repeats, if that pays

Sequential heads see the tokens drafted before theirs, and the newest one: more of their drafts are right, above all the
later ones, and a draft costs a third more (1.7 ms instead of 1.3, three heads, measured on SmolLM2-135M), since one
head waits for the other. Only this tool's loop runs them.

The text stays the model's own: every draft token is checked. What the heads bring is measured on the compiled model,
and chosen there.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field, model_validator

from optikit.models.facts import ModelFacts
from optikit.problems import Problem
from optikit.stage import ANY, MAIN, Estimate, Facts, Input, Job, no_objection
from optikit.stages._budget import Budget, Schedule, budget
from optikit.stages.speculate import _prompts
from optikit.stages.speculate._prompts import WritingOptions
from optikit.targets import Target

if TYPE_CHECKING:
    from torch import Tensor

    from optikit.algorithms.medusa import MedusaHeads
    from optikit.deploy.medusa import HeadSet
    from optikit.training.loop import History
    from optikit.training.self_generated import GeneratedText

SUMMARY = "Medusa-1 heads, trained on what the final weights write; lossless"
NEEDS = ANY
WRITES = "speculator"
USES_TARGET = False
LIBRARIES: tuple[str, ...] = ("torch", "transformers", "tokenizers", "safetensors", "numpy")
ENVIRONMENT = MAIN
fits = no_objection
measured = _prompts.measured

DRAFT_VOCAB = 8192
"""Tokens that heads draft by default: an output layer of 49,152 rows costs as much as a fifth of SmolLM2-135M."""
BATCH = 256
"""Positions of text per step."""
WARMUP = 40
"""Steps in which the learning rate rises."""
PATIENCE = 2
"""Epochs without a better validation after which training ends."""
Layout = Literal["v1", "vllm", "nxdi"]


class Options(WritingOptions):
    """Options of `speculate: {method: medusa}`."""

    heads: int = Field(default=3, ge=1, le=8)
    """Heads: tokens that are drafted at most. Each guesses one token further, and worse."""
    layers: int = Field(default=1, ge=1, le=4)
    """Residual layers per head."""
    share_lm_head: bool = True
    """Read out through the model's own output layer; false trains a copy of it for each head, which is larger, slower
    and somewhat better."""
    sequential: bool = False
    """Each head also sees the newest token and those drafted before its own (Hydra): better drafts for more time, and
    no server's layout can express them."""
    draft_vocab: int | None = Field(default=None, ge=16)
    """Tokens that heads can draft: those that the model writes most often. Empty is 8192, or the whole vocabulary where
    heads don't share the output layer."""
    tokens: int = Field(default=100_000, ge=64)
    """Tokens that the model writes to train on, as far as there are prompts. The more, the better the heads."""
    epochs: int | None = Field(default=None, ge=1, le=1000)
    """Most passes over that text; training ends when validation stops getting better. Empty, where `steps` is, too, is
    10."""
    steps: int | None = Field(default=None, ge=1, le=10**8)
    """Most steps of 256 tokens, in place of `epochs`."""
    learning_rate: float = Field(default=1e-3, gt=0, le=1)
    """AdamW's, after a warm-up of 40 steps."""
    schedule: Schedule = "cosine"
    """How the learning rate goes on from there: down to a tenth, or not at all: `constant`, with 1e-4 and five heads,
    is the setting of AWS's article."""
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    """`adamw8bit` keeps its moments in 8 bits."""
    layouts: tuple[Layout, ...] | None = None
    """Servers' layouts to write beside the heads: v1 for TGI, TensorRT-LLM and vLLM 0.32, vllm for vLLM before 0.33,
    nxdi for NxD Inference. v1 and nxdi hold a copy of the output layer for every head. Empty is v1 and vllm, or none
    with `sequential`."""

    @model_validator(mode="after")
    def _one_budget(self) -> Self:
        self.budget()
        return self

    def budget(self) -> Budget:
        """Return how much to train at most: epochs or steps."""
        return budget(("epochs", 10), epochs=self.epochs, steps=self.steps)

    def trained_tokens(self) -> int:
        """Return about how many tokens that is: training seldom goes on for more than six epochs."""
        unit, amount = self.budget()
        return self.tokens * min(amount, 6) if unit == "epochs" else amount * BATCH

    def drafted(self, vocab: int) -> int:
        """Return how many tokens heads can draft."""
        chosen = self.draft_vocab or (DRAFT_VOCAB if self.share_lm_head else vocab)
        return min(chosen, vocab)

    @property
    def written_layouts(self) -> tuple[Layout, ...]:
        """Servers' layouts that are written."""
        if self.layouts is None:
            return () if self.sequential else ("v1", "vllm")
        return self.layouts


def inputs(options: Options) -> Mapping[str, Input]:
    """Declare the prompts, and heads to start from where a step before has trained some."""
    return {**_prompts.inputs(options), "start": Input(of="step", made_by=("finetune", "medusa2"))}


def check(options: Options, facts: ModelFacts, target: Target) -> Iterator[Problem]:
    """Yield why this model can't get heads."""
    yield from _prompts.check(options, facts)
    layouts = options.written_layouts
    if options.sequential and layouts:
        message = (
            f"heads that see the tokens drafted before theirs fit no server's layout, and layouts is {list(layouts)}"
        )
        fix = "leave layouts out, or set sequential: false"
        yield Problem(code="sequential-layouts", message=message, fix=fix, loc=("layouts",))
    if not options.share_lm_head and layouts and options.drafted(facts.vocab) < facts.vocab:
        message = f"heads with output layers of their own for {options.draft_vocab} tokens fit no server's layout"
        fix = "leave draft_vocab out, set share_lm_head: true, or layouts: []"
        yield Problem(code="head-vocabulary", message=message, fix=fix, loc=("draft_vocab",))
    if "nxdi" in layouts and options.layers != 1:
        message = f"NxD Inference builds Medusa heads of one layer, and layers is {options.layers}"
        yield Problem(code="nxdi-layers", message=message, fix="set layers: 1", loc=("layers",))


def estimate(options: Options, facts: ModelFacts, target: Target, calibration_tokens: int) -> Estimate:
    """Estimate from SmolLM2-135M on two cores: a token written in a batch costs a forward, a trained one its heads'."""
    seen = facts.hidden * (options.heads + 1) if options.sequential else 0
    head = facts.hidden * (options.layers * facts.hidden + seen + options.drafted(facts.vocab))
    trained = 6 * options.heads * head * options.trained_tokens()
    return Estimate(
        seconds=20 + options.tokens * facts.parameters / 2.9e10 + trained / 7e10,
        peak_bytes=900_000_000 + 4 * facts.parameters + 2 * options.tokens * facts.hidden,
        disk_bytes=2 * options.tokens * facts.hidden + _table_bytes(options, facts) + _layout_bytes(options, facts),
    )


def _table_bytes(options: Options, facts: ModelFacts) -> int:
    """Return the size of the embeddings that sequential heads look tokens up in."""
    return facts.vocab * (facts.hidden + 4) if options.sequential else 0


def _layout_bytes(options: Options, facts: ModelFacts) -> int:
    copies = {"v1": options.heads, "nxdi": options.heads, "vllm": 1 if options.share_lm_head else options.heads}
    return sum(2 * copies[name] * facts.vocab * facts.hidden for name in options.written_layouts)


def after(options: Options, facts: ModelFacts) -> ModelFacts:
    """Return the facts of the same model with heads beside it."""
    return facts.having("medusa_heads")


def run(options: Options, job: Job) -> Facts:
    """Let the model write, train heads on it, and write them for this runtime and for servers.

    Raises:
        InputMissingError: Too few prompts.
        StageFailedError: The training met a bad number before there were any good heads.
    """
    import torch

    from optikit.algorithms.medusa import coverage
    from optikit.algorithms.precision import compute_dtype, exact_products
    from optikit.stages.speculate import _generated
    from optikit.training import self_generated
    from optikit.training.loop import Settings, write_log
    from optikit.training.medusa_heads import train_heads

    torch.set_num_threads(job.threads)
    model, _, text = _generated.written(options, job, options.tokens)
    learning, held = self_generated.divide(text, 0.1)
    lm_head = model.get_output_embeddings().weight.detach().float().cpu()
    embedding = model.get_input_embeddings().weight.detach().cpu() if options.sequential else None
    heads = _heads(options, lm_head, embedding, learning.tokens[learning.wanted], job.seed)
    started = _start(heads, job)
    settings = Settings(
        budget=options.budget(),
        batch=BATCH,
        learning_rate=options.learning_rate,
        schedule=options.schedule,
        warmup=WARMUP,
        clip=math.inf,
        optimizer=options.optimizer,
        patience=PATIENCE,
        keep="best",
    )
    with exact_products(compute_dtype(job.device)):
        history = train_heads(heads, _rows(learning, heads), _rows(held, heads), settings, job)
    heads.cpu()
    write_log(job.dest, history.rows())
    _write(options, job, heads, lm_head)
    covered = 1.0 if heads.token_ids is None else coverage(held.tokens[held.wanted], heads.token_ids)
    return {
        "self_generated_tokens": text.written,
        "self_generated_texts": text.texts,
        "draft_vocab": options.drafted(len(lm_head)),
        "draft_vocab_coverage": covered,
        "started_from": started,
        **_summary(history),
        "loads_in": _loads_in(options),
    }


def _heads(options: Options, lm_head: Tensor, embedding: Tensor | None, written: Tensor, seed: int) -> MedusaHeads:
    import torch

    from optikit.algorithms.medusa import MedusaHeads, draft_vocabulary

    torch.manual_seed(seed)
    vocab, drafted = len(lm_head), options.drafted(len(lm_head))
    ids = None if drafted == vocab else draft_vocabulary(written, drafted, vocab=vocab)
    return MedusaHeads(
        lm_head,
        heads=options.heads,
        layers=options.layers,
        shared=options.share_lm_head,
        token_ids=ids,
        embedding=embedding,
    )


def _start(heads: MedusaHeads, job: Job) -> str:
    """Give heads what was trained with the model before its last stages, if it fits; return what they start from."""
    from optikit.formats.medusa import start

    if "start" not in job.inputs:
        return "zero"
    why = start(heads, job.inputs["start"])
    return f"zero: heads were trained with the model, but {why}" if why else "heads trained with the model"


def _rows(text: GeneratedText, heads: MedusaHeads) -> Any:
    from optikit.algorithms.medusa import make_before, make_targets
    from optikit.training.medusa_heads import Rows

    return Rows(
        hidden=text.hidden,
        targets=make_targets(text.tokens, text.documents, text.wanted, heads.heads),
        before=make_before(text.tokens, heads.heads) if heads.sequential else None,
    )


def _summary(history: History) -> dict[str, Any]:
    """Return what became of the training, as JSON."""
    best = {name: value for name, value in history.validation[history.best].items() if name != "score"}
    return {"training": history.summary(), "validation": best}


def _write(options: Options, job: Job, heads: MedusaHeads, lm_head: Tensor) -> None:
    """Write heads.safetensors, speculator.json, and a directory per layout."""
    from optikit.deploy import medusa, vllm
    from optikit.formats.checkpoint import save_tensors
    from optikit.formats.medusa import tensors
    from optikit.runtime.speculation.fingerprint import tensors_digest, weights_digest
    from optikit.runtime.speculation.medusa_session import HEADS, TABLE
    from optikit.runtime.speculation.speculator import SPECULATOR, Speculator

    vocab, width = lm_head.shape
    digest = weights_digest(job.source)
    held = tensors(heads)
    own = tensors_digest({name: each.detach().cpu().numpy() for name, each in held.items() if name != TABLE})
    save_tensors(job.dest / HEADS, held, {"vocab": str(vocab), "base_sha256": digest, "tensors_sha256": own})
    layouts = options.written_layouts
    if layouts:
        _write_layouts(options, job, medusa.head_set(heads, lm_head))
    speculator = Speculator(
        method="medusa",
        lengths={3: 8, 2: 4},
        ahead=heads.heads,
        ahead_gate=0.4,
        min_window=2 if options.exact else 1,
        acceptor=options.acceptor,
    )
    served = vllm.vllm("medusa", tokens=options.heads, directory="speculator/vllm")
    servers = {"vllm": {"speculative_config": served}} if "vllm" in layouts else {}
    base = {"vocab": vocab, "width": width, "weights_sha256": digest}
    found = speculator.as_json() | {"base": base, "servers": servers, "loads_in": _loads_in(options)}
    (job.dest / SPECULATOR).write_text(json.dumps(found, indent=1), encoding="utf-8")


def _write_layouts(options: Options, job: Job, heads: HeadSet) -> None:
    import torch

    from optikit.deploy import medusa

    for name in options.written_layouts:
        dest = job.dest / name
        if name == "v1":
            medusa.write_v1(heads, dest, base="../../model", tokenizer=job.source, dtype=torch.bfloat16)
        elif name == "vllm":
            medusa.write_vllm(heads, dest, dtype=torch.bfloat16)
        else:
            medusa.write_nxdi(heads, dest, dtype=torch.bfloat16)


def _loads_in(options: Options) -> dict[str, dict[str, str]]:
    """Return which servers load which of the layouts that were written; sequential heads are this tool's own."""
    from optikit.deploy import support

    names = ("sequential",) if options.sequential else options.written_layouts
    return {name: support.loads_in(name) for name in names}
