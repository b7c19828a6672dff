"""Options that every way to speculate shares: which prompts it is made, chosen and evaluated on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any

from pydantic import Field

from optikit import records
from optikit.models.facts import ModelFacts
from optikit.problems import Problem
from optikit.stage import Input, StageOptions


class PromptOptions(StageOptions):
    """Prompts, and what is written to them."""

    prompts: str = ""
    """Prompts of the kind that the model will get: JSON Lines with a `prompt` field, or prose. Empty takes those of
    `evaluate: {speed: …}`."""
    template: str = ""
    """How a prompt is made of other fields of the JSON Lines, or of a JSON array: "{context}\\n{question}"; empty is
    the `prompt` field."""
    prompt_tokens: int = Field(default=64, ge=1, le=131_072)
    """Tokens of a prompt, where prompts have to be cut from prose."""
    chat: bool = True
    """Put prompts through the model's chat template, if it has one; passages of prose are continued as they are."""
    chat_template: str = ""
    """Name of the chat template to use, of a model with several; empty is the one called `default`."""
    eval_prompts: int = Field(default=40, ge=4, le=100_000)
    """Prompts, drawn by the seed, half of which choose the speculator and half evaluate it; nothing else sees them."""
    eval_part: tuple[Annotated[float, Field(ge=0, le=1)], Annotated[float, Field(ge=0, le=1)]] = (0.0, 1.0)
    """Share of the file, by prompts, that these are drawn from: [0.8, 1] for the last fifth. Whatever learns then sees
    the rest of the file only, as does a `finetune` stage whose `calibration` has the complement as its `part`."""
    new_tokens: int = Field(default=96, ge=8, le=4096)
    """Tokens to write per prompt, unless the text ends before."""
    datastore_answers: int = Field(default=200, ge=0, le=100_000)
    """Prompts, beside those, whose answers become n-grams to draft from."""
    tune: bool = True
    """Choose lengths anew by what they would bring on half of the prompts, measured costs included."""
    acceptor: str = "greedy"
    """What decides on drafts where answers are written: `greedy`; `sample_match` or `rejection`, which draw like the
    model itself where a temperature is asked for; `typical`, which is lossy; or the name of an installed package's."""
    allow_lossy: bool = False
    """Take an acceptor whose text isn't the model's own."""
    exact: bool = False
    """Never run one token alone, so that texts equal those of plain decoding with the same kernels token by token; some
    engines round one token otherwise than several."""


class WritingOptions(PromptOptions):
    """Options of methods that learn from what the final weights write."""

    answers: int = Field(default=1, ge=1, le=64)
    """Answers to learn from per prompt: the first is greedy, as the drafts' use is, others are drawn. More where there
    are few prompts, or short answers."""
    temperature: float = Field(default=0.7, gt=0, le=2)
    """Of the answers that are drawn."""


def inputs(options: PromptOptions) -> Mapping[str, Input]:
    """Declare the prompts."""
    return {"prompts": Input(of="prompts", spec=options.prompts, option="prompts")}


def measured(options: PromptOptions) -> dict[str, Any]:
    """Return how `measure speculation` chooses and judges what these options ask for, as options of its own."""
    fields = {"acceptor", "tune", "chat", "chat_template", "new_tokens", "datastore_answers", "template", "eval_part"}
    return options.model_dump(include={*fields, "prompt_tokens"}) | {"prompts": options.eval_prompts}


def check(options: PromptOptions, facts: ModelFacts) -> Iterator[Problem]:
    """Yield why this model can't be speculated on, or these prompts not be read."""
    if options.new_tokens >= facts.max_positions:
        message = f"answers of {options.new_tokens} tokens leave no room in the model's context for a prompt"
        fix = f"set new_tokens below {facts.max_positions}"
        yield Problem(code="answer-exceeds-context", message=message, fix=fix, loc=("new_tokens",))
    try:
        records.fields(options.template)
    except ValueError as error:
        yield Problem(code="bad-template", message=str(error), fix='write "{field}"', loc=("template",))
    yield from _check_acceptor(options)
    if options.eval_part[0] >= options.eval_part[1]:
        message = f"eval_part {list(options.eval_part)} is empty"
        yield Problem(code="bad-part", message=message, fix="write [0.8, 1]", loc=("eval_part",))


LOSSLESS = ("greedy", "sample_match", "rejection")


def _check_acceptor(options: PromptOptions) -> Iterator[Problem]:
    """Yield why an acceptor can't be had, or isn't allowed to be."""
    if options.acceptor in LOSSLESS:
        return
    from optikit.errors import UsageError
    from optikit.runtime.speculation import acceptors

    try:
        lossless = acceptors.make(options.acceptor, allow_lossy=True).lossless
    except UsageError as error:
        yield Problem(code="no-acceptor", message=error.message, fix=error.fix, loc=("acceptor",))
        return
    if not (lossless or options.allow_lossy or options.acceptor in acceptors.NAMES):  # those are a rule's
        message = f"acceptor {options.acceptor} is lossy: texts will not be the model's own"
        yield Problem(
            code="lossy-acceptor", message=message, fix="set allow_lossy: true, or leave it out", loc=("acceptor",)
        )
