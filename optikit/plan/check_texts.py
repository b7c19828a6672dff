"""What can be said of texts before any work: what isn't text, holds too little, or doesn't fit the model's context."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from optikit import records
from optikit.errors import InputMissingError
from optikit.evaluation import task_items, texts
from optikit.evaluation.windows import FEWEST
from optikit.models import tokenizer
from optikit.plan.context import Context, at, stage_inputs
from optikit.problems import Hint, Level, Loc, Problem
from optikit.recipe.schema import CalibrationText, PerplexityOptions, StageEntry, TaskOptions, Text
from optikit.stage import Speculating
from optikit.store.sources import TextSource

if TYPE_CHECKING:
    from tokenizers import Tokenizer

CERTAIN = 16
"""Bytes per token that no text of any length has: one of so many bytes has tokens enough, and none is counted."""

MOST_TIMES = 64
"""Windows of a calibration text overlap; beyond this they teach nothing new, and take time and disk for it."""


def problems(context: Context, acquired: Path | None = None) -> Iterator[Problem]:
    """Yield why stages or an evaluation would fail on their texts, hours later.

    Args:
        context: What the recipe names.
        acquired: Directory that an earlier run made of the model, where it is a gguf file.
    """
    recipe, counter = context.recipe, Counter(context, acquired)
    yield from _tokenizer_problems(context)
    kinds = {wanted.of for _, _, _, wanted in stage_inputs(recipe)}
    if recipe.calibration is not None and "calibration" in kinds:
        yield from _calibration_problems(context, counter)
    if recipe.evaluate.perplexity is not None:
        yield from _perplexity_problems(recipe.evaluate.perplexity, context.texts["perplexity"], counter)
    for index, task in enumerate(recipe.evaluate.tasks):
        for problem in _task_problems(task, context.texts[f"tasks.{task.name}"], counter):
            yield problem.under("evaluate", "tasks", index)
    if recipe.evaluate.speed is not None:
        yield from _speed_problems(context, recipe.evaluate.speed.prompt_tokens, counter)
    for index, entry, role, wanted in stage_inputs(recipe):
        source = context.stage_text(index, role) if wanted.of == "prompts" else None
        if source is not None:
            own = ("stages", index, entry.verb, wanted.option)
            place = own if at(index, role) in context.texts else ("evaluate", "speed", "prompts")
            yield from _stage_prompt_problems(entry, source, counter, place)


class Counter:
    """Counts tokens as the model's own tokenizer does, which is loaded where bytes leave a doubt.

    A gguf file's tokenizer is no file until a run has made it one: till then only bytes count, of which a token has one
    at least and `CERTAIN` at most.
    """

    def __init__(self, context: Context, acquired: Path | None) -> None:
        self.positions = context.facts.max_positions
        self._directory = context.model.path if context.facts.tokenizer_sha256 else acquired

    @cached_property
    def by(self) -> Tokenizer | None:
        """The tokenizer; None where it can't be had yet."""
        return tokenizer.load(self._directory) if self._directory else None

    @cached_property
    def templates(self) -> frozenset[str]:
        """Names of the model's chat templates; none where they can't be known yet."""
        return tokenizer.template_names(self._directory) if self._directory else frozenset()

    def shortage(self, text: str, needed: int, windows: int = 1) -> str:
        """Return how much a text has where that is less than `needed` tokens; "" where it has enough, or may have.

        What the tokenizer puts before each of the windows counts as well.
        """
        size = len(text.encode())
        if size >= CERTAIN * needed:
            return ""
        own = needed if self.by is None else needed - windows * len(tokenizer.opening(self.by))
        if size < own or self.by is None:
            return f"{size} bytes" if size < own else ""
        count = len(tokenizer.encode(self.by, text, opened=False))
        return f"{count} tokens" if count < own else ""

    def excess(self, item: task_items.Item, max_tokens: int) -> int:
        """Return how many tokens an item needs where that is more than the model's context; 0 where it fits, or may."""
        # a token is a byte at least, but for two that may open and part a text
        if task_items.tokens_needed(item, max_tokens, lambda text: 2 + len(text.encode())) <= self.positions:
            return 0
        need = task_items.tokens_needed(item, max_tokens, self._count)
        return need if need > self.positions else 0

    def _count(self, text: str) -> int:
        """Return the tokens of a text, or as few as it can have where the tokenizer can't be had yet."""
        return len(text.encode()) // CERTAIN if self.by is None else len(tokenizer.encode(self.by, text))


def _tokenizer_problems(context: Context) -> Iterator[Problem]:
    """Yield why texts can't become tokens of the model."""
    facts, model = context.facts, context.model
    if model.format != "safetensors" or (model.absent and not facts.tokenizer_sha256):  # it comes with the weights
        return
    read = bool(context.texts)
    if not facts.tokenizer_sha256 and read:
        message = f"{model.spec} has no {tokenizer.FILE}, and the recipe names texts to be read by it"
        fix = "copy it there from the original model, or save the model with its fast tokenizer"
        yield Problem(code="no-tokenizer", message=message, fix=fix, loc=("model",))
    if facts.tokenizer_tokens > facts.vocab:
        message = f"the tokenizer has {facts.tokenizer_tokens} tokens, the embedding {facts.vocab} rows"
        fix = f"resize the embedding, or take the tokens from {facts.vocab} on out of {tokenizer.FILE}"
        level: Level = "error" if read else "warning"
        yield Problem(code="tokenizer-exceeds-embedding", message=message, fix=fix, loc=("model",), level=level)


def _calibration_problems(context: Context, counter: Counter) -> Iterator[Problem]:
    wanted, source = context.recipe.calibration, context.texts["calibration"]
    assert wanted is not None  # noqa: S101 - the caller has looked
    if wanted.length > counter.positions:
        message = f"calibration windows of {wanted.length} tokens are longer than the model's context"
        fix = f"set length to {counter.positions} or less"
        hint = Hint(edit="write", text=str(counter.positions), told=f"set length to {counter.positions}")
        written = "length" in wanted.model_fields_set
        yield Problem(
            code="calibration-exceeds-context",
            message=message,
            fix=fix,
            loc=("calibration", "length"),
            hint=hint if written else None,
        )
    text = texts.read(source.path)
    yield from _json_problems(wanted, text, ("calibration",))
    found = counter.shortage(text, wanted.length)
    if found:
        message = f"{wanted.text} has {found}, fewer than one calibration window of {wanted.length} tokens"
        fix = "name a longer text, or a smaller length"
        yield Problem(code="text-too-short", message=message, fix=fix, loc=("calibration", "text"))
    yield from _repetition_problems(wanted, len(text.encode()))


def _repetition_problems(wanted: CalibrationText, size: int) -> Iterator[Problem]:
    """Yield that windows read a text of `size` bytes over and over: it has a token for each byte at most."""
    times = wanted.samples * wanted.length / max(1, size)
    if times > MOST_TIMES:
        asked = f"{wanted.samples} windows of {wanted.length} tokens"
        message = f"{asked} read each token of a text of {size} bytes at least {times:.0f} times"
        fix = f"set samples to {max(1, MOST_TIMES * size // wanted.length)} or less, or name a longer text"
        yield Problem(code="calibration-repeats", message=message, fix=fix, loc=("calibration", "samples"))


def _perplexity_problems(wanted: PerplexityOptions, source: TextSource, counter: Counter) -> Iterator[Problem]:
    text = texts.read(source.path)
    place = ("evaluate", "perplexity")
    yield from _json_problems(wanted, text, place)
    windows = 1 if wanted.protocol in ("hf", "lmeval") else wanted.windows or FEWEST
    least = windows * wanted.window
    found = counter.shortage(text, least, windows)
    if found:
        message = f"{wanted.text} has {found}, and protocol {wanted.protocol} needs {least} tokens"
        fix = "name a longer text, or ask for fewer or shorter windows"
        yield Problem(code="text-too-short", message=message, fix=fix, loc=(*place, "text"))


def _json_problems(wanted: Text, text: str, place: Loc) -> Iterator[Problem]:
    """Yield that a text which is read as prose is JSON: a model would see its braces and names."""
    fields = None if wanted.template else records.json_fields(text)
    if fields is None:
        return
    message = f"{wanted.text} is JSON, and would be read as prose, with its braces and names"
    fix, hint = "make it JSON Lines or a JSON array of objects with texts, and name one in `template`", None
    if fields:
        template = f'template: "{{{fields[0]}}}\\n"'
        fix = f"add `{template}`; its fields are {', '.join(fields)}"
        hint = (
            Hint(edit="beside", text=template, told=f"add {template}")
            if len(fields) == 1 and fields[0].isidentifier()
            else None
        )
    yield Problem(code="json-as-prose", message=message, fix=fix, loc=(*place, "text"), hint=hint)


def _task_problems(task: TaskOptions, source: TextSource, counter: Counter) -> Iterator[Problem]:
    """Yield what is wrong with a task; places are relative to it."""
    try:
        items = task_items.read(source.path)[: task.items]
    except InputMissingError as error:
        yield _unreadable(error, source, ("text",))
        return
    holding = task_items.cut_short(items, task.stop)
    if holding is not None:
        item, mark = holding
        message = f"the answer of item {item.id} holds {mark!r}, which ends what is written: it can't be given"
        fix = 'set stop to texts that no answer holds, e.g. ["\\n\\n"], or to [] for the end of the text alone'
        level: Level = "warning" if isinstance(item, task_items.Query) else "error"  # other SQL may do the same
        yield Problem(code="answer-holds-stop", message=message, fix=fix, loc=("stop",), level=level)
    needs = ((item, counter.excess(item, task.max_tokens)) for item in items)
    item, need = next((pair for pair in needs if pair[1]), (items[0], 0))
    if need and task.max_tokens < counter.positions:  # else the measurement itself says so
        least = "at least " if counter.by is None else ""
        message = f"item {item.id} needs {least}{need} tokens, and the model's context holds {counter.positions}"
        fix = "shorten its prompt, leave it out, or lower max_tokens"
        yield Problem(code="item-exceeds-context", message=message, fix=fix, loc=("text",))


def _speed_problems(context: Context, length: int, counter: Counter) -> Iterator[Problem]:
    """Yield why no prompt of a speed test has its length."""
    named = context.texts.get("prompts")
    source = named or context.texts.get("perplexity")
    if source is None:
        return
    place = ("evaluate", "speed", "prompts" if named else "prompt_tokens")
    found = _prompts(source, "", place)
    if isinstance(found, Problem):
        yield found
        return
    lacking = _all_short(found or [texts.read(source.path)], length, counter)
    if lacking:
        message = f"no prompt of {source.spec} has {length} tokens; the longest has {lacking}"
        fix = "lower prompt_tokens, or give longer prompts"
        yield Problem(code="prompts-too-short", message=message, fix=fix, loc=place)


def _all_short(prompts: Sequence[str], length: int, counter: Counter) -> str:
    """Return what the longest of some prompts has where none has `length` tokens; "" where one has, or may have."""
    longest = ""
    for prompt in sorted(prompts, key=len, reverse=True):
        lacking = counter.shortage(prompt, length)
        if not lacking:
            return ""
        longest = longest or lacking
    return longest


def _prompts(source: TextSource, template: str, loc: Loc) -> list[str] | Problem:
    """Return the prompts of a file, none of prose; or what is wrong with it."""
    try:
        return list(texts.prompt_fields(source.path, texts.read(source.path), template))
    except InputMissingError as error:
        return _unreadable(error, source, loc)


def _unreadable(error: InputMissingError, source: TextSource, loc: Loc) -> Problem:
    # the file that was fetched and cut has no name that its author knows
    return Problem(
        code="bad-items", message=error.message.replace(str(source.path), source.spec), fix=error.fix, loc=loc
    )


def _stage_prompt_problems(entry: StageEntry, source: TextSource, counter: Counter, loc: Loc) -> Iterator[Problem]:
    """Yield why a stage can't be chosen and judged on its prompts."""
    assert isinstance(entry.stage, Speculating)  # noqa: S101 - no other stage reads prompts
    options = SimpleNamespace(**entry.stage.measured(entry.options))
    found = _prompts(source, options.template, loc)
    if isinstance(found, Problem):
        yield found
    elif found:
        yield from _template_problems(options, counter, loc)
        first, last = (int(len(found) * edge) for edge in options.eval_part)
        if last - first < texts.FEWEST_PROMPTS:
            message = (
                f"{last - first} of the {len(found)} prompts of {source.spec} judge: {texts.FEWEST_PROMPTS} are needed"
            )
            fix = "give more prompts: half of them choose, the other half judge"
            yield Problem(code="too-few-prompts", message=message, fix=fix, loc=loc)
    else:
        yield from _passage_problems(options, source, counter, loc)


def _passage_problems(options: Any, source: TextSource, counter: Counter, loc: Loc) -> Iterator[Problem]:
    """Yield why prose makes no prompts."""
    length, room = options.prompt_tokens, counter.positions - options.new_tokens
    if length > room > 0:
        message = f"passages of {length} tokens and answers of {options.new_tokens} exceed the model's context"
        fix = f"keep the sum of prompt_tokens and new_tokens at {counter.positions} or less"
        yield Problem(code="prompt-exceeds-context", message=message, fix=fix, loc=loc)
    count = texts.FEWEST_PROMPTS
    lacking = counter.shortage(texts.read(source.path), count * length, count)
    if lacking:
        message = f"{source.spec} has {lacking}, and {count} passages of {length} are needed"
        yield Problem(
            code="too-few-prompts", message=message, fix="name a longer text, or lower prompt_tokens", loc=loc
        )


def _template_problems(options: Any, counter: Counter, loc: Loc) -> Iterator[Problem]:
    """Yield that a model has chat templates, and none of the name that is used."""
    name = options.chat_template or tokenizer.DEFAULT_TEMPLATE
    known = counter.templates
    if options.chat and name not in known and (known or (options.chat_template and counter.by is not None)):
        message = f"the model has no chat template {name!r}, but {', '.join(sorted(known)) or 'none at all'}"
        fix = "name one of them as `chat_template`, or set `chat: false`"
        yield Problem(code="no-chat-template", message=message, fix=fix, loc=loc)
