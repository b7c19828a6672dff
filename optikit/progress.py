"""What a run shows while it works, on stderr: stdout belongs to data.

`make` returns progress in one of four modes. On a terminal the running step is redrawn in place; elsewhere every event
is a line, with a sign of life every half minute, because CI systems end jobs that say nothing. As JSON, each line is
one object with `event` (plan, start, update, finish, note), `time` (Unix seconds) and the arguments of that event.

Nothing here may end a run: what can't be written is dropped. Rich is imported only for a live terminal. Every name that
comes from outside is cleaned, and no string is ever read as markup.

`Output` is the edge: both standard streams of the command line go through it, so that what a model, a server or a file
says reaches no terminal and no CI system as anything but words, whichever verb or library prints it.
"""

from __future__ import annotations

import io
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Self, TextIO

from optikit import text
from optikit.errors import UsageError

if TYPE_CHECKING:
    from rich import progress
    from rich.console import Console


Status = Literal["executed", "cached", "emitted", "verified", "failed"]

MODES = ("auto", "plain", "json", "none")
START_SECONDS = 0.4
"""A step that ends sooner (it was cached) is one line, not two."""
HEARTBEAT_SECONDS = 30.0
JSON_UPDATE_SECONDS = 0.1


def make(mode: str, stream: TextIO | None = None) -> Progress:
    """Return progress of a mode: auto, plain, json or none; `stream` is stderr where not given.

    Raises:
        UsageError: There is no such mode.
    """
    out = stream or sys.stderr
    if mode == "auto":
        return Live(out) if is_terminal(out) else Plain(out)
    if mode == "plain":
        return Plain(out)
    if mode == "json":
        return Json(out)
    if mode == "none":
        return Progress(out)
    raise UsageError(f"--progress {text.clean(mode)!r} is unknown", fix=f"use one of {', '.join(MODES)}")


class Output(io.TextIOBase):
    """A text stream that writes only what can be read: `printable`, without credentials, in the stream's encoding.

    A reader who has gone (a closed pipe) is no failure: the rest is dropped, and `gone` says so. An `expendable` stream
    may fail in any way: what is told there is no result.
    """

    def __init__(self, stream: TextIO, *, expendable: bool = False) -> None:
        super().__init__()
        self._forgiven = OSError if expendable else BrokenPipeError
        self.stream = stream
        """What is below: for styles and orders to a CI system, whose words are cleaned and escaped already."""
        self.gone = False
        self._line = ""

    @property
    def encoding(self) -> str:  # type: ignore[override]  # io.TextIOBase has it as an attribute that can be set
        """Encoding of the stream below."""
        return self.stream.encoding

    def fileno(self) -> int:
        """Return the descriptor of the stream below."""
        return self.stream.fileno()

    def isatty(self) -> bool:
        """Tell whether the stream below is a terminal."""
        return self.stream.isatty()

    def writable(self) -> bool:
        """Return True."""
        return True

    def flush(self) -> None:
        """Flush the stream below."""
        if not self.gone:
            self._safely(self.stream.flush)

    def write(self, value: str) -> int:
        """Write text; it may be any part of a line."""
        shown = text.printable(self._line + text.redact(value))[len(self._line) :]
        line = shown.rpartition("\n")[2] if "\n" in shown else self._line + shown
        self._line = line if len(line) <= LINE_KEPT else f"…{line[-LINE_KEPT:]}"
        if not self.gone:
            encoding = self.encoding or "utf-8"
            self._safely(lambda: self.stream.write(shown.encode(encoding, "backslashreplace").decode(encoding)))
        return len(value)

    def _safely(self, action: Callable[[], object]) -> None:
        try:
            action()
        except self._forgiven:
            self.gone = True
            # What is still buffered would fail again when the interpreter ends.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.stream.fileno())
            os.close(nowhere)


LINE_KEPT = 256
"""Characters of an unfinished line that are kept, to know an order that comes in parts; none is longer."""


def below(stream: TextIO) -> TextIO:
    """Return the stream below an `Output`, else the stream itself."""
    return stream.stream if isinstance(stream, Output) else stream


def reader_gone(stream: TextIO) -> bool:
    """Tell whether nobody reads a stream any more, so that nothing needs to be made for it."""
    return isinstance(stream, Output) and stream.gone


def is_terminal(stream: TextIO) -> bool:
    """Tell whether lines can be redrawn there."""
    with suppress(ValueError):  # a closed stream is no terminal
        return stream.isatty() and os.environ.get("TERM") != "dumb"
    return False


def say(stream: TextIO, line: str) -> None:
    """Write one line; in ASCII where the encoding has no better, and not at all where the stream is gone."""
    with suppress(OSError, ValueError):  # a closed pipe must not end hours of work
        try:
            stream.write(f"{line}\n")
        except UnicodeEncodeError:
            stream.write(f"{_ascii(line)}\n")
        stream.flush()


_ASCII = str.maketrans({"…": "...", "×": "x", "–": "-", "→": "->", "✓": "+", "✗": "x", "·": "-", "•": "-"})


def _ascii(line: str) -> str:
    return line.translate(_ASCII).encode("ascii", "replace").decode("ascii")


class Progress:
    """What the runner tells about its steps. This class keeps still: the mode `none`, and what the others build on."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._names: tuple[str, ...] = ()

    def plan(self, names: Sequence[str]) -> None:
        """Say which steps will run, in order."""
        self._names = tuple(names)

    def start(self, name: str) -> None:
        """Say that a step begins."""

    def update(self, name: str, done: int, total: int, what: str) -> None:
        """Say how far a step is: `done` of `total` units called `what`, e.g. blocks."""

    def finish(self, name: str, status: Status, seconds: float, peak_mib: float, note: str = "") -> None:
        """Say how a step ended. For a cached step, `seconds` and `peak_mib` are those of the run that made it."""

    def note(self, line: str) -> None:
        """Say something that belongs to no step."""

    def close(self) -> None:
        """End the display; may be called again."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _position(self, name: str) -> str:
        return f"[{self._names.index(name) + 1}/{len(self._names)}] " if name in self._names else ""


class Json(Progress):
    """One JSON object per event and line, for programs that watch a run."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream)
        self._updated = 0.0

    def plan(self, names: Sequence[str]) -> None:
        """See `Progress`."""
        super().plan(names)
        self._event("plan", names=list(names))

    def start(self, name: str) -> None:
        """See `Progress`."""
        self._event("start", name=name)

    def update(self, name: str, done: int, total: int, what: str) -> None:
        """See `Progress`; at most ten a second, but always the last."""
        if time.monotonic() - self._updated >= JSON_UPDATE_SECONDS or done == total:
            self._updated = time.monotonic()
            self._event("update", name=name, done=done, total=total, what=what)

    def finish(self, name: str, status: Status, seconds: float, peak_mib: float, note: str = "") -> None:
        """See `Progress`."""
        self._event("finish", name=name, status=status, seconds=seconds, peak_memory_mib=peak_mib, note=note)

    def note(self, line: str) -> None:
        """See `Progress`."""
        self._event("note", text=line)

    def _event(self, event: str, **values: object) -> None:
        say(self._stream, text.dump_json({"event": event, "time": round(time.time(), 3), **values}))


@dataclass
class _Running:
    """The step that runs now."""

    name: str
    began: float
    done: int = 0
    total: int = 0
    what: str = ""

    def far(self) -> str:
        """Return "12/30 blocks", or nothing where the step hasn't said."""
        return f"{self.done}/{self.total} {text.clean(self.what)}".rstrip() if self.total else ""

    def seconds(self) -> float:
        return time.monotonic() - self.began


class Plain(Progress):
    """One line when a step starts, one when it ends, and a sign of life in between."""

    def __init__(self, stream: TextIO, heartbeat: float = HEARTBEAT_SECONDS, patience: float = START_SECONDS) -> None:
        super().__init__(stream)
        self._waits = (patience, heartbeat)
        self._lock = threading.Lock()
        self._running: _Running | None = None
        self._ended = threading.Event()

    def start(self, name: str) -> None:
        """See `Progress`."""
        self._ended.set()
        self._ended = threading.Event()
        with self._lock:
            self._running = _Running(name, time.monotonic())
        threading.Thread(target=self._beat, args=(self._running, self._ended), daemon=True).start()

    def update(self, name: str, done: int, total: int, what: str) -> None:
        """See `Progress`."""
        with self._lock:
            if self._running is not None and self._running.name == name:
                self._running.done, self._running.total, self._running.what = done, total, what

    def finish(self, name: str, status: Status, seconds: float, peak_mib: float, note: str = "") -> None:
        """See `Progress`."""
        self._ended.set()
        with self._lock:
            self._running = None
            self._line(name, _ending(status, seconds, peak_mib, note))

    def note(self, line: str) -> None:
        """See `Progress`."""
        with self._lock:
            say(self._stream, text.clean(line))

    def close(self) -> None:
        """See `Progress`."""
        self._ended.set()

    def _beat(self, running: _Running, ended: threading.Event) -> None:
        first, later = self._waits
        if ended.wait(first):
            return
        self._alive(running, "")
        while not ended.wait(later):
            self._alive(running, f" {running.far() or 'still running'}, {text.duration(running.seconds())}")

    def _alive(self, running: _Running, ending: str) -> None:
        with self._lock:
            if running is self._running:  # not after its last line
                self._line(running.name, ending)

    def _line(self, name: str, ending: str) -> None:
        say(self._stream, f"{self._position(name)}{text.step_words(name)} …{ending}")


def _ending(status: Status, seconds: float, peak_mib: float, note: str) -> str:
    facts = {
        "executed": f"ok {text.duration(seconds)}, peak {text.memory(peak_mib)}",
        "cached": "cached",
        "emitted": f"emitted {text.duration(seconds)}: files written, not run here",
        "verified": "verified: it came back from its device",
        "failed": "failed",
    }[status]
    return f" {facts}{f': {text.clean(note)}' if note else ''}"


class _Memory:
    """Highest memory seen of this process's children, sampled at most once a second; as text, for the display."""

    def __init__(self) -> None:
        self._peak = 0
        self._sampled = 0.0

    def __str__(self) -> str:
        if time.monotonic() - self._sampled >= 1.0:
            self._sampled = time.monotonic()
            self._peak = max(self._peak, sum(_resident_bytes()))
        return text.size(self._peak) if self._peak else ""


class Live(Progress):
    """On a terminal: finished steps above, the running one redrawn with its bar, time and memory."""

    def __init__(self, stream: TextIO, console: Console | None = None) -> None:
        from rich import progress
        from rich.console import Console
        from rich.table import Column

        super().__init__(stream)
        self._console = console or Console(file=below(stream))

        def words(field: str) -> progress.TextColumn:
            """Return a column of one line of text, which is never read as markup."""
            return progress.TextColumn(f"{{task.{field}}}", markup=False, table_column=Column(no_wrap=True))

        # Standard streams stay as they are: what a verb prints to stdout must not end up on the console's stream.
        self._display = progress.Progress(
            progress.SpinnerColumn(style="cyan"),
            words("description"),
            progress.BarColumn(14),
            progress.TimeElapsedColumn(),
            words("fields[far]"),
            words("fields[memory]"),
            console=self._console,
            refresh_per_second=4,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._all = self._display.add_task("in all", total=None, far="", memory="")
        self._running: tuple[str, progress.TaskID] | None = None

    def plan(self, names: Sequence[str]) -> None:
        """See `Progress`."""
        super().plan(names)
        self._display.update(self._all, total=len(names))

    def start(self, name: str) -> None:
        """See `Progress`."""
        self._safely(self._display.start)
        self._safely(lambda: self._begin(name))

    def _begin(self, name: str) -> None:
        self._display.update(self._all, far=self._position(name))
        task = self._display.add_task(text.step_words(name), total=None, far="", memory=_Memory())
        self._running = (name, task)

    def update(self, name: str, done: int, total: int, what: str) -> None:
        """See `Progress`."""
        if self._running is not None and self._running[0] == name:
            far = f"{done}/{total} {text.clean(what)}" if total else ""
            self._display.update(self._running[1], completed=done, total=total or None, far=far)

    def finish(self, name: str, status: Status, seconds: float, peak_mib: float, note: str = "") -> None:
        """See `Progress`."""
        from rich.text import Text

        self._end()
        self._display.advance(self._all)
        mark, style = {
            "executed": ("✓", "green"),
            "cached": ("•", "cyan"),
            "emitted": ("→", "yellow"),
            "verified": ("✓", "cyan"),
            "failed": ("✗", "bold red"),
        }[status]
        timed = status in {"executed", "emitted"}
        line = Text.assemble(
            (f"{self._shown(mark)} ", style),
            f"{text.step_words(name):<{self._label_width()}}",
            (f"  {text.duration(seconds):>12}  {text.memory(peak_mib):>9}" if timed else f"  {status:>12}", "dim"),
            (f"  {text.clean(note)}" if note else "", "yellow"),
        )
        self._safely(lambda: self._console.print(line, overflow="ellipsis", no_wrap=True))

    def note(self, line: str) -> None:
        """See `Progress`."""
        from rich.text import Text

        self._safely(lambda: self._console.print(Text(text.clean(line), style="dim")))

    def close(self) -> None:
        """See `Progress`."""
        self._end()
        self._safely(self._display.stop)

    def _end(self) -> None:
        if self._running is not None:
            self._display.remove_task(self._running[1])
            self._running = None

    def _safely(self, action: Callable[[], object]) -> None:
        with suppress(OSError, ValueError):  # a closed terminal must not end hours of work
            action()

    def _shown(self, mark: str) -> str:
        return _ascii(mark) if self._console.options.ascii_only else mark

    def _label_width(self) -> int:
        return min(40, max((len(text.step_words(name)) for name in self._names), default=24))


def _resident_bytes() -> Iterator[int]:
    import psutil

    with suppress(psutil.Error):
        for child in psutil.Process().children(recursive=True):
            with suppress(psutil.Error):  # it has ended meanwhile
                yield child.memory_info().rss
