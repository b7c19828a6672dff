"""`optikit generate DIR --prompt TEXT`, or `--prompts FILE --batch N`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from optikit.runtime.decoder import Decoder
    from optikit.runtime.generate import TextGenerator


def generate(
    directory: Annotated[
        Path, typer.Argument(help="Output of `optikit run`, a compiled directory or a model.", show_default=False)
    ],
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="What to say to the model.", show_default=False)
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="File of prompts instead: lines, or JSON Lines with a `prompt` field. Prints answers as JSON Lines.",
            show_default=False,
        ),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Answers to a file of prompts that are written at once.")] = 1,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 128,
    chat: Annotated[
        bool, typer.Option("--chat/--no-chat", help="Use the model's chat template, if it has one.")
    ] = True,
    chat_template: Annotated[
        str, typer.Option(help="Name of the chat template to use, of a model with several.", show_default=False)
    ] = "",
    stats: Annotated[bool, typer.Option("--stats", help="Print the speed to stderr.")] = False,
) -> None:
    """Generate text, greedily, from what a run wrote: the compiled artifact where there is one."""
    from optikit import runtime
    from optikit.app import door
    from optikit.errors import UsageError

    if (prompt is None) == (prompts is None):
        raise UsageError("nothing to answer, or too much", fix="give either --prompt or --prompts")
    if prompts is None and batch > 1:
        raise UsageError(f"--batch {batch} has one prompt to answer", fix="give a file of prompts with --prompts")
    if chat_template and not chat:
        raise UsageError(f"--chat-template {chat_template} and --no-chat exclude each other", fix="leave one out")
    asked = _read_prompts(prompts) if prompts is not None else ()
    _, place = door.enter(directory)
    decoder = runtime.load(directory)
    from optikit.runtime.generate import TextGenerator

    generator = TextGenerator(decoder, place)
    turn = chat_template or chat
    if prompt is None:
        _answer_all(decoder, generator, asked, max_tokens=max_tokens, chat=turn, batch=batch, stats=stats)
        return
    _answer(decoder, generator, prompt, max_tokens=max_tokens, chat=turn, stats=stats)


def _answer(
    decoder: Decoder, generator: TextGenerator, prompt: str, *, max_tokens: int, chat: bool | str, stats: bool
) -> None:
    """Stream one answer."""
    import sys

    from optikit.progress import reader_gone

    tokens = generator.encode(prompt, chat=chat)
    times = []
    for chunk in generator.answer(tokens, max_tokens):
        times.append(chunk.at_ns)
        sys.stdout.write(chunk.text)
        sys.stdout.flush()
        if reader_gone(sys.stdout):
            break
    sys.stdout.write("\n")
    if stats:
        typer.echo(_speed(decoder, times), err=True)


def _answer_all(
    decoder: Decoder,
    generator: TextGenerator,
    prompts: Sequence[str],
    *,
    max_tokens: int,
    chat: bool | str,
    batch: int,
    stats: bool,
) -> None:
    """Print answers as JSON Lines, in the order of their prompts."""
    import sys
    import time

    from optikit.progress import reader_gone
    from optikit.text import dump_json

    tokens = [generator.encode(each, chat=chat) for each in prompts]
    begun, written = time.perf_counter(), 0
    for prompt, answer in zip(prompts, generator.answers(tokens, max_tokens, batch=batch), strict=True):
        written += answer.tokens
        line = {"prompt": prompt, "text": answer.text, "tokens": answer.tokens, "finish": answer.finish}
        typer.echo(dump_json(line))
        if reader_gone(sys.stdout):
            break
    if stats:
        seconds = time.perf_counter() - begun
        per_second = f"{written / seconds:.1f} tokens/s with their prompts, {batch} at once"
        typer.echo(f"{written} tokens in {len(prompts)} answers, {per_second} ({_where(decoder)})", err=True)


def _read_prompts(path: Path) -> list[str]:
    """Read prompts: the `prompt` field of JSON Lines, or the lines of a text that aren't empty.

    Raises:
        InputMissingError: There is no such file, or it isn't UTF-8.
        UsageError: It holds no prompts, or a record without one.
    """
    from optikit import records
    from optikit.errors import UsageError

    text = records.read(path)
    entries = list(records.parse(text, path))
    prompts = [(number, records.filled(entry, "{prompt}")) for number, entry in entries]
    for number, prompt in prompts:
        if not prompt:
            raise UsageError(f"{path}: record {number} has no `prompt`", fix='write {"prompt": "…"}')
    found = [prompt for _, prompt in prompts if prompt] or [line for _, line in records.lines(text)]
    if not found:
        raise UsageError(f"{path} holds no prompts", fix='write one per line, or {"prompt": "…"} per line')
    return found


def _where(decoder: Decoder) -> str:
    counted = getattr(decoder, "statistics", None)
    speculating = f", {counted.acceptance_length:.2f} tokens per step" if counted is not None else ""
    return f"{decoder.runtime}, {decoder.dtype}, {decoder.threads} threads{speculating}"


def _speed(decoder: Decoder, times: list[int]) -> str:
    """Say how fast the tokens after the first came: the first one's time is mostly the prompt's."""
    where = _where(decoder)
    if len(times) < 2:
        return f"{len(times)} tokens, too few to time ({where})"
    per_second = (len(times) - 1) / (times[-1] - times[0]) * 1e9
    return f"{len(times)} tokens, {per_second:.1f} tokens/s after the first ({where})"
