"""A report as GitHub-flavoured Markdown, for pull requests and job summaries.

Words from outside are written as code spans or with every active character escaped: they can't open a tag, a link, a
table column or a mention.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from optikit import text
from optikit.evaluation.results import Report, StepReport
from optikit.report import figures, gates, load_table, server_table, task_table, values, wording
from optikit.report import speculation_table as speculating
from optikit.report.headline import headline

_ACTIVE = re.compile(r"([\\`*_{}\[\]|~$<>&]|^[-+#]|(?<=^\d)[.)](?=\s))")
_LINKED = re.compile(r"@|(?:#|GH-)(?=\d)|:(?=//)|\bwww(?=\.)")
_MARK: Mapping[gates.Mark, str] = {"pass": "✅", "lax": "⚠️", "fail": "❌", "inconclusive": "⚠️", "emitted": "📦"}


def render(report: Report) -> str:
    """Return the whole report as Markdown; ends with a newline."""
    return "\n".join(line for block in _blocks(report) for line in (*block, ""))


def escape(value: str) -> str:
    r"""Write foreign words as Markdown text that shows them as they are.

    >>> escape("a|b <i> `c`")
    'a\\|b &lt;i&gt; \\`c\\`'
    """
    html = {"<": "&lt;", ">": "&gt;", "&": "&amp;"}
    shown = _ACTIVE.sub(lambda m: html.get(m[1], f"\\{m[1]}"), text.clean(value).strip())
    return _LINKED.sub("\\g<0>\u2060", shown)  # an invisible word joiner: no mention, no reference, no automatic link


def code(value: str) -> str:
    r"""Write foreign words as a code span inside a table cell: fence longer than any inside, pipes escaped.

    >>> code("a|b"), code("x`y")
    ('`a\\|b`', '``x`y``')
    """
    shown = text.clean(value).strip().replace("|", "\\|")
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", shown)), default=0))
    pad = " " if shown.startswith("`") or shown.endswith("`") else ""
    return f"{fence}{pad}{shown or '–'}{pad}{fence}"


def table(header: Iterable[str], rows: Iterable[Iterable[str]], align: str) -> list[str]:
    """Return the lines of a table; `align` has one of l, r per column, cells are already escaped."""
    rule = {"l": ":--", "r": "--:"}
    return [_row(header), _row(rule[side] for side in align), *(_row(row) for row in rows)]


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _blocks(report: Report) -> Iterator[list[str]]:
    yield [f"## {_MARK[gates.mark(report)]} {escape(headline(report))}"]
    yield [f"**{gates.verdict(report)}** · {escape(gates.sentence(report))}"]
    yield [f"Done: {escape(wording.what_was_done(report))}"]
    yield from _gates(report)
    yield from _figures(report)
    yield from _tasks(report)
    yield from _served(report)
    yield from _loaded(report)
    yield from _steps(report)
    yield from _attribution(report)
    yield from _speculation(report.speculation)
    yield from _warnings(report)
    yield from _reproduce(report)


def _gates(report: Report) -> Iterator[list[str]]:
    if not report.gates:
        return
    rows = (
        (
            code(gates.name(gate)),
            escape(gate.limit),
            escape(gates.value(gate)),
            gates.interval(gate) or "–",
            f"{_MARK[gate.verdict]} {gate.verdict}" + (f": {escape(gate.reason)}" if gate.reason else ""),
        )
        for gate in report.gates
    )
    yield ["### Gates"]
    yield table(("Gate", "Limit", "Measured", "95 % interval", "Verdict"), rows, "lrrrl")


def _figures(report: Report) -> Iterator[list[str]]:
    if wording.measured_only(report):
        yield from _measured(report)
        return
    rows = [
        (f"**{figure.label}**", figure.baseline or "–", figure.result, figure.change or "–", figure.interval or "–")
        for group in figures.groups(report)
        for figure in group.figures
    ]
    yield ["### Before and after"]
    yield table(("", "Baseline", "Result", "Change", "95 % interval"), rows, "lrrrr")
    yield _notes(report)
    if report.other_baselines:
        yield _others(report)


def _tasks(report: Report) -> Iterator[list[str]]:
    shown = task_table.rows(report)
    if not shown:
        return
    yield ["### Tasks"]
    if sentence := task_table.sentence(report):
        yield [escape(sentence)]
    header = ("Task", "Items", "Baseline", "Result", "Change", "95 % interval", "Flips", "p, worse")
    cells = ([r.items, r.baseline, r.result, r.change, r.interval, r.flips, r.p_worse] for r in shown)
    rows = ((escape(row.name), *(cell or "–" for cell in own)) for row, own in zip(shown, cells, strict=True))
    yield table(header, rows, "lrrrrrrr")
    flips = task_table.flips(report)
    if flips:
        examples = ((escape(task), f.change, code(f.prompt), code(f.baseline), code(f.result)) for task, f in flips)
        yield ["<details><summary>Items that flipped</summary>"]
        yield table(("Task", "", "Prompt ends", "Baseline", "Result"), examples, "lllll")
        yield ["</details>"]


def _measured(report: Report) -> Iterator[list[str]]:
    rows = [(f"**{figure.label}**", figure.result) for group in figures.groups(report) for figure in group.figures]
    yield ["### Measured"]
    yield table(("", "Measured"), rows, "lr")
    yield _notes(report)


def _notes(report: Report) -> list[str]:
    missing = (f"Missing: {reason}." for reason in wording.reasons(report))
    return [f"- {escape(note)}" for note in (wording.compared(report), *wording.conditions(report), *missing)]


def _served(report: Report) -> Iterator[list[str]]:
    rows = server_table.rows(report)
    if rows:
        yield ["### By number of requests at a time"]
        yield table(server_table.HEADER, rows, "r" * len(server_table.HEADER))
        yield [f"- {escape(line)}" for line in server_table.conditions(report)]


def _loaded(report: Report) -> Iterator[list[str]]:
    if report.loaded:
        rows = [[escape(cell) for cell in row[1:]] for row in load_table.rows(report.loaded.rows)]
        yield ["### Under load"]
        yield table(load_table.HEADER[1:], rows, "r" * (len(load_table.HEADER) - 1))
        yield [f"- {escape(line)}" for line in load_table.conditions(report)]


def _others(report: Report) -> list[str]:
    rows = (
        (
            escape(other.name),
            f"{text.number(other.speed.decode_tokens_per_s)} tok/s",
            text.ratio(decode.value, decode.ci95) if decode else "–",
            text.ratio_interval(decode.value, decode.ci95) if decode else "–",
        )
        for other in report.other_baselines
        for decode in [other.speedup.decode]
    )
    return table(("Other baseline", "Decode speed", "Speedup", "95 % interval"), rows, "lrrr")


def _steps(report: Report) -> Iterator[list[str]]:
    yield [f"### Steps ({text.duration(report.seconds)} in all)"]
    header = ("Step", "Status", "Time", "Peak memory", "Size after")
    yield table(header, (_step(step) for step in (*report.steps, *report.measures)), "llrrr")


def _step(step: StepReport) -> tuple[str, ...]:
    return (
        escape(wording.step_label(step)),
        step.status,
        text.duration(step.seconds),
        text.memory(step.peak_memory_mib),
        "–" if step.verb == "measure" else text.size(wording.size_after(step)),
    )


def _attribution(report: Report) -> Iterator[list[str]]:
    header, rows = values.table(report.attribution)
    if rows:
        yield ["### What each step brought"]
        yield table(map(escape, header), (map(escape, row) for row in rows), "l" + "r" * (len(header) - 1))


def _speculation(speculation: Mapping[str, Any] | None) -> Iterator[list[str]]:
    if not speculation:
        return
    yield ["### Speculation"]
    rows = speculating.listed(speculation, drawn=False)
    yield table(("", ""), ((escape(name), escape(value)) for name, value in rows), "ll")


def _warnings(report: Report) -> Iterator[list[str]]:
    if report.warnings:
        yield ["### Warnings"]
        yield [f"- {escape(warning)}" for warning in report.warnings]


def _reproduce(report: Report) -> Iterator[list[str]]:
    yield ["### Reproduce"]
    command = text.clean(report.command)
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", command)), default=0))
    yield [f"{fence}sh", command, fence]
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    host = str(report.host.get("cpu", "an unknown processor"))
    yield [f"{escape(report.created)} on {escape(host)}; {escape(versions)}."]
