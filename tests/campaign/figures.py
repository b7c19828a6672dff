"""What a campaign counted: cases by how they ended, and every one that ended wrongly, by a name that finds it again."""

from __future__ import annotations

import json
import os
import resource
import shlex
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from random import Random
from typing import Any, TypeVar

from optikit import host
from tests.benchmarks.record import commit, machine

SCALE = float(os.environ.get("OPTIKIT_CAMPAIGN", "1"))
"""Share of the cases to run: 1 is the whole campaign, 0.1 a tenth of it, at least one of each kind."""
SEED = int(os.environ.get("OPTIKIT_CAMPAIGN_SEED", "0"))
CORES = sorted(os.sched_getaffinity(0))[: int(os.environ.get("OPTIKIT_CAMPAIGN_JOBS", "1000"))]
"""Each runs one case at a time, which sees one core: threads that wait for each other would take most of the time."""
ONLY = os.environ.get("OPTIKIT_CAMPAIGN_ONLY", "")
"""Numbers of the cases to do again, with commas between them; empty is all."""


def chosen(count: int, least: int = 1) -> list[int]:
    """Return the numbers of the cases to run, of `count` in the whole campaign."""
    if ONLY:
        return [int(number) for number in ONLY.split(",") if int(number) < count]
    return list(range(max(least, round(count * SCALE))))


def draw(*what: object) -> Random:
    """Return a generator of random numbers for one case; the same in every campaign of this seed."""
    return Random(repr((SEED, *what)))


KINDS = ("lost", "silently different", "exit 1", "hung", "not found")
"""What a case may be wrong by that matters most."""
LIBRARIES = ("torch", "transformers", "onnxruntime", "onnxruntime-genai", "safetensors", "tokenizers")
R = TypeVar("R")
_FREE_CORES = iter(CORES)
_POOL = ThreadPoolExecutor(len(CORES), initializer=lambda: os.sched_setaffinity(0, {next(_FREE_CORES)}))


def start(what: Callable[[], R]) -> Future[R]:
    """Do something on the next core that is free."""
    return _POOL.submit(what)


@dataclass
class Group:
    """One kind of injection.

    Attributes:
        name: What was done.
        wanted: How many cases the whole campaign has.
        ended: How many ended how.
        wrong: Cases that ended wrongly: name → why.
        among: How many were of which kind, where a group has kinds.
    """

    name: str
    wanted: int
    ended: Counter[str] = field(default_factory=Counter)
    wrong: dict[str, list[str]] = field(default_factory=dict)
    among: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0

    def run(self, cases: Iterable[tuple[str, Callable[[], tuple[str, list[str]]]]]) -> None:
        """Do all cases, several at a time; each returns how it ended and what was wrong with that."""
        began = time.monotonic()
        for name, future in [(name, start(case)) for name, case in cases]:
            ended, wrong = future.result()
            self.ended[ended] += 1
            if wrong:
                self.wrong[name] = wrong
        self.seconds += time.monotonic() - began

    @property
    def count(self) -> int:
        """Cases that were done."""
        return self.ended.total()

    def told(self) -> str:
        """Return how many ended how, in words."""
        ended = ", ".join(f"{count} {how}" for how, count in sorted(self.ended.items()))
        kinds = ", ".join(f"{name} {count}" for name, count in self.among.most_common())
        return f"{ended} ({kinds})" if kinds else ended

    def lines(self) -> list[str]:
        """Return the figures as lines of text."""
        head = f"{self.name}: {self.count} of {self.wanted} in {self.seconds:.0f} s: {self.told()}"
        return [
            f"{head}; {len(self.wrong)} wrong",
            *(f"  WRONG {name}: {'; '.join(why)}" for name, why in self.wrong.items()),
        ]


@dataclass
class Figures:
    """All groups of a campaign."""

    groups: list[Group] = field(default_factory=list)

    def group(self, name: str, wanted: int) -> Group:
        """Begin a group."""
        self.groups.append(Group(name, wanted))
        return self.groups[-1]

    def lines(self) -> list[str]:
        """Return every group's lines and the sums that count."""
        return [*(line for group in self.groups for line in group.lines()), self.sums()]

    def sums(self) -> str:
        """Return what has to be none, counted over all groups."""
        why = [reason for group in self.groups for wrong in group.wrong.values() for reason in wrong]
        sums = ", ".join(f"{sum(kind in reason for reason in why)} {kind}" for kind in KINDS)
        return f"{sum(group.count for group in self.groups)} cases: {sums}"

    def write(self, path: Path, seconds: float) -> None:
        """Write the figures as JSON, with what they were measured by and on."""
        used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        found = {
            "command": shlex.join(
                ["pytest", *(each for each in sys.argv[1:] if each.startswith("tests") or each in ("-m", "slow"))]
            ),
            "commit": commit(),
            "date": f"{datetime.now(UTC):%-d %B %Y}",
            "machine": machine({"host": host.describe(), "versions": host.versions(LIBRARIES)}),
            "minutes": seconds / 60,
            "processor_minutes": sum(each.ru_utime + each.ru_stime for each in used) / 60,
            "cores": len(CORES),
            "seed": SEED,
            "sums": self.sums(),
            "groups": [[g.name, g.count, g.told(), len(g.wrong)] for g in self.groups],
        }
        path.write_text(json.dumps(found, indent=1), encoding="utf-8")


def page(parts: Sequence[dict[str, Any]]) -> str:
    """Return a page of what one or several runs of the campaign counted."""
    rows = "\n".join(f"| {' | '.join(map(str, row))} |" for part in parts for row in part["groups"])
    runs = "\n".join(
        f"- `{part['command']}`: {part['sums']}; commit {part['commit']}, {part['date']}, seed {part['seed']}, "
        f"{part['minutes']:.0f} min, {part['processor_minutes']:.0f} min of processor time on {part['cores']} cores"
        for part in parts
    )
    machines = "\n\n".join(dict.fromkeys(part["machine"] for part in parts))
    return f"""\
# The campaign

Kills, damage, full disks, tampered outputs and hostile inputs against real runs of a tiny model through every kind of
step; every count was counted. Each run was told to write its figures by `OPTIKIT_CAMPAIGN_OUT=PART.json`, and
`python -m tests.campaign.figures PART.json … > examples/campaign.md` wrote this page.

| what was done | cases | how they ended | wrong |
|---|---|---|---|
{rows}

{runs}

{machines}
"""


if __name__ == "__main__":
    sys.stdout.write(page([json.loads(Path(part).read_text(encoding="utf-8")) for part in sys.argv[1:]]))
