"""`optikit generate DIR --prompt TEXT`, or `--prompts FILE --batch N`."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from optikit.app.device import DeviceChoice
from optikit.progress import reader_gone
from optikit.text import dump_json

if TYPE_CHECKING:
    from optikit.runtime.decoder import Decoder, Tokens
    from optikit.runtime.generate import Drawing, TextGenerator
    from optikit.runtime.speculation.acceptors import Acceptor, Sampling


Prompt = Annotated[str | None, typer.Option("--prompt", "-p", help="What to say to the model.", show_default=False)]
Prompts = Annotated[
    Path | None,
    typer.Option(
        help="File of prompts instead: lines, or JSON Lines with a `prompt` field. Prints answers as JSON Lines.",
        show_default=False,
    ),
]
Batch = Annotated[int, typer.Option(min=1, help="Answers to a file of prompts that are written at once.")]
Chat = Annotated[bool, typer.Option("--chat/--no-chat", help="Use the model's chat template, if it has one.")]
Template = Annotated[
    str, typer.Option(help="Name of the chat template to use, of a model with several.", show_default=False)
]
Temperature = Annotated[float, typer.Option(min=0, help="0 takes the likeliest token; above, tokens are drawn.")]
TopP = Annotated[float, typer.Option(help="Draw among the likeliest tokens of this mass.")]
TopK = Annotated[int, typer.Option(min=0, help="Draw among this many likeliest tokens; 0 among all.")]
AcceptorName = Annotated[
    str,
    typer.Option(
        help="What decides on drafts: greedy, rejection, sample_match, typical, or an installed package's. "
        "By default what the recipe chose, else greedy at temperature 0 and rejection above.",
        show_default=False,
    ),
]
Lossy = Annotated[bool, typer.Option("--allow-lossy", help="Take an acceptor whose text isn't the model's own.")]
Drafted = Annotated[
    int | None, typer.Option("--draft-tokens", "-k", min=1, help="Tokens to draft at once.", show_default=False)
]


def generate(
    directory: Annotated[
        Path, typer.Argument(help="Output of `optikit run`, a compiled directory or a model.", show_default=False)
    ],
    prompt: Prompt = None,
    prompts: Prompts = None,
    batch: Batch = 1,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 128,
    chat: Chat = True,
    chat_template: Template = "",
    temperature: Temperature = 0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    seed: Annotated[int, typer.Option(min=0, help="Of all draws.")] = 0,
    acceptor: AcceptorName = "",
    allow_lossy: Lossy = False,
    draft_tokens: Drafted = None,
    device: Annotated[DeviceChoice, typer.Option(help="Where a model for transformers computes.")] = DeviceChoice.CPU,
    stats: Annotated[bool, typer.Option("--stats", help="Print the speed to stderr.")] = False,
) -> None:
    """Generate text from what a run wrote: the compiled artifact where there is one, with its speculator."""
    from optikit import runtime
    from optikit.app import door
    from optikit.app.device import choose
    from optikit.errors import UsageError

    if (prompt is None) == (prompts is None):
        raise UsageError("nothing to answer, or too much", fix="give either --prompt or --prompts")
    if prompts is None and batch > 1:
        raise UsageError(f"--batch {batch} has one prompt to answer", fix="give a file of prompts with --prompts")
    if chat_template and not chat:
        raise UsageError(f"--chat-template {chat_template} and --no-chat exclude each other", fix="leave one out")
    asked = _read_prompts(prompts) if prompts is not None else []
    sampling = _sampling(temperature, top_p, top_k, acceptor)
    chosen = _acceptor(acceptor, sampling, allow_lossy=allow_lossy) if acceptor else None
    _, place = door.enter(directory)
    decoder = runtime.load(directory, device=choose(device))
    if draft_tokens is not None:
        decoder = _drafting(decoder, draft_tokens)
    drawing = _drawing(decoder, chosen, sampling, seed)
    from optikit.runtime.generate import TextGenerator

    writer = _Writer(decoder, TextGenerator(decoder, place), max_tokens, chat_template or chat, drawing, stats=stats)
    if prompt is None:
        writer.answer_all(asked, batch=batch)
    else:
        writer.answer(_whole(prompt))


def _whole(prompt: str) -> str:
    """Return a prompt as the shell gave it, U+FFFD in the place of each byte that is no UTF-8; that is told."""
    whole = re.sub("[\ud800-\udfff]", "\N{REPLACEMENT CHARACTER}", prompt)
    if whole != prompt:
        wrong = sum(ours != theirs for ours, theirs in zip(whole, prompt, strict=True))
        typer.echo(f"warning: the prompt isn't UTF-8: {wrong} bytes of it are put to the model as U+FFFD", err=True)
    return whole


def _sampling(temperature: float, top_p: float, top_k: int, acceptor: str) -> Sampling | None:
    """Return the distribution to draw from; None at temperature 0.

    Raises:
        UsageError: Something draws, and temperature 0 doesn't.
    """
    from optikit.errors import UsageError
    from optikit.runtime.speculation import acceptors

    if temperature:
        return acceptors.Sampling(temperature=temperature, top_p=top_p, top_k=top_k)
    if (top_p, top_k) != (1.0, 0):
        raise UsageError("--top-p and --top-k draw, and temperature 0 doesn't", fix="add --temperature 1")
    if acceptor in acceptors.DRAWING:
        raise UsageError(f"acceptor {acceptor} draws, and temperature 0 doesn't", fix="add --temperature 1")
    return None


def _acceptor(name: str, sampling: Sampling | None, *, allow_lossy: bool) -> Acceptor:
    """Return the acceptor that was asked for.

    Raises:
        UsageError: There is none of that name, it samples nothing, or it is lossy and that wasn't allowed.
    """
    from optikit.runtime.speculation import acceptors

    return acceptors.make(name, sampling, allow_lossy=allow_lossy)


def _drawing(decoder: Decoder, chosen: Acceptor | None, sampling: Sampling | None, seed: int) -> Drawing:
    """Return how tokens are chosen: as asked, or as the recipe says that made the speculator."""
    from optikit.runtime.generate import Drawing
    from optikit.runtime.speculation import acceptors
    from optikit.runtime.speculation.speculator import SpeculatingDecoder

    name = decoder.speculator.acceptor if isinstance(decoder, SpeculatingDecoder) else "greedy"
    return Drawing(acceptor=chosen or acceptors.kept(name, sampling), seed=seed)


def _drafting(decoder: Decoder, tokens: int) -> Decoder:
    """Return a decoder whose speculator drafts so many tokens at once."""
    from optikit.errors import UsageError
    from optikit.runtime.speculation.speculator import SpeculatingDecoder

    if not isinstance(decoder, SpeculatingDecoder):
        raise UsageError("there is no speculator that drafts", fix="leave out --draft-tokens")
    if tokens >= decoder.max_tokens:
        message = f"{tokens} draft tokens leave no room: this model holds {decoder.max_tokens}"
        raise UsageError(message, fix="draft fewer tokens")
    return SpeculatingDecoder(decoder.target, decoder.speculator.drafting(tokens))


@dataclass(frozen=True)
class _Writer:
    """Writes answers to stdout."""

    decoder: Decoder
    generator: TextGenerator
    max_tokens: int
    chat: bool | str
    drawing: Drawing
    stats: bool

    def answer(self, prompt: str) -> None:
        """Stream one answer."""
        tokens = self.generator.encode(prompt, chat=self.chat)
        times = []
        for chunk in self.generator.answer(tokens, self.max_tokens, self.drawing):
            times.append(chunk.at_ns)
            sys.stdout.write(chunk.text)
            sys.stdout.flush()
            if reader_gone(sys.stdout):
                break
        sys.stdout.write("\n")
        if self.stats:
            typer.echo(_speed(self.decoder, times), err=True)

    def answer_all(self, prompts: Sequence[tuple[str, str]], *, batch: int) -> None:
        """Print answers as JSON Lines, in the order of their prompts; each comes with its place in the file."""
        tokens = [self._encoded(place, prompt) for place, prompt in prompts]
        begun, written = time.perf_counter(), 0
        answers = self.generator.answers(tokens, self.max_tokens, batch=batch, drawing=self.drawing)
        for (_, prompt), answer in zip(prompts, answers, strict=True):
            written += answer.tokens
            line = {"prompt": prompt, "text": answer.text, "tokens": answer.tokens, "finish": answer.finish}
            typer.echo(dump_json(line))
            if reader_gone(sys.stdout):
                break
        if self.stats:
            seconds = time.perf_counter() - begun
            per_second = f"{written / seconds:.1f} tokens/s with their prompts, {batch} at once"
            typer.echo(f"{written} tokens in {len(prompts)} answers, {per_second} ({_where(self.decoder)})", err=True)

    def _encoded(self, place: str, prompt: str) -> Tokens:
        """Return the tokens of one prompt of a file.

        Raises:
            UsageError: It has none, or too many; with its place.
        """
        from optikit.errors import UsageError

        try:
            tokens = self.generator.encode(prompt, chat=self.chat)
            self.generator.require_room(tokens)
        except UsageError as error:
            raise UsageError(f"{place}: {error.message}", fix=error.fix) from error
        return tokens


def _read_prompts(path: Path) -> list[tuple[str, str]]:
    """Read prompts: the `prompt` field of JSON Lines, or the lines of a text that aren't empty.

    Returns:
        (place, prompt) each: the file and the number of the line or record, as messages name it.

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
    kind = "record" if prompts else "line"
    found = [(number, prompt) for number, prompt in prompts if prompt] or list(records.lines(text))
    if not found:
        raise UsageError(f"{path} holds no prompts", fix='write one per line, or {"prompt": "…"} per line')
    return [(f"{path}, {kind} {number}", prompt) for number, prompt in found]


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
