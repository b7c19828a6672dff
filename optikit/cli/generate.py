"""`optikit generate DIR --prompt TEXT`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from optikit.runtime.protocol import Decoder


def generate(
    directory: Annotated[
        Path, typer.Argument(help="Output of `optikit run`, a compiled directory or a model.", show_default=False)
    ],
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="What to say to the model.", show_default=False)],
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 128,
    chat: Annotated[
        bool, typer.Option("--chat/--no-chat", help="Use the model's chat template, if it has one.")
    ] = True,
    stats: Annotated[bool, typer.Option("--stats", help="Print the speed to stderr.")] = False,
) -> None:
    """Generate text, greedily, from what a run wrote: the compiled artifact where there is one."""
    import sys

    from optikit import runtime

    _, place = runtime.find(directory)
    decoder = runtime.load(directory)
    from optikit.runtime.text import Talker

    talker = Talker(decoder, place)
    tokens = talker.encode(prompt, chat=chat)
    times = []
    for chunk in talker.answer(tokens, max_tokens):
        times.append(chunk.at_ns)
        sys.stdout.write(chunk.text)
        sys.stdout.flush()
    sys.stdout.write("\n")
    if stats:
        typer.echo(_speed(decoder, times), err=True)


def _speed(decoder: Decoder, times: list[int]) -> str:
    """Say how fast the tokens after the first came: the first one's time is mostly the prompt's."""
    counted = getattr(decoder, "statistics", None)
    speculating = f", {counted.acceptance_length:.2f} tokens per step" if counted is not None else ""
    where = f"{decoder.runtime}, {decoder.dtype}, {decoder.threads} threads{speculating}"
    if len(times) < 2:
        return f"{len(times)} tokens, too few to time ({where})"
    per_second = (len(times) - 1) / (times[-1] - times[0]) * 1e9
    return f"{len(times)} tokens, {per_second:.1f} tokens/s after the first ({where})"
