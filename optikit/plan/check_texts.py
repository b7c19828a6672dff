"""What can be said of evaluation texts before any work: a task that is none, a text that can't fill its windows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from optikit.errors import InputMissingError
from optikit.evaluation import texts
from optikit.evaluation.task_items import read as read_items
from optikit.plan.context import Context
from optikit.problems import Loc, Problem
from optikit.store.sources import TextSource


def problems(context: Context) -> Iterator[Problem]:
    """Yield why an evaluation would fail on its texts, hours later."""
    wanted, texts = context.recipe.evaluate, context.texts
    for index, task in enumerate(wanted.tasks):
        yield from _unreadable(texts[f"tasks.{task.name}"], read_items, ("evaluate", "tasks", index, "text"))
    if "prompts" in texts:
        yield from _unreadable(texts["prompts"], _read_prompts, ("evaluate", "speed", "prompts"))
    scored = wanted.perplexity
    if scored is None:
        return
    least = (scored.windows or 1) * scored.window if scored.protocol != "hf" else scored.window
    size = texts["perplexity"].path.stat().st_size
    if size < least:  # a token is a byte at least
        message = f"{scored.text} has {size} bytes, and protocol {scored.protocol} needs {least} tokens"
        fix = "name a longer text, or ask for fewer or shorter windows"
        yield Problem(code="text-too-short", message=message, fix=fix, loc=("evaluate", "perplexity", "text"))


def _read_prompts(path: Path) -> object:
    return list(texts.prompt_fields(path, texts.read(path)))


def _unreadable(text: TextSource, read: Callable[[Path], object], loc: Loc) -> Iterator[Problem]:
    try:
        read(text.path)
    except InputMissingError as error:  # the file that was fetched and cut has no name that its author knows
        message = error.message.replace(str(text.path), text.spec)
        yield Problem(code="bad-items", message=message, fix=error.fix, loc=loc)
