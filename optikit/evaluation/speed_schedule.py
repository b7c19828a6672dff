"""The order of a speed test, and what every run of it left."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from optikit.errors import StageFailedError
from optikit.evaluation.speed_client import Arm

if TYPE_CHECKING:
    from optikit.evaluation.energy import Meter
    from optikit.evaluation.speed import Trace
    from optikit.evaluation.speed_stopping import Stopping

Phase = Literal["cold", "warmup", "measured", "again", "repeating"]
AGAIN: Phase = "again"
"""The baseline's second run of a round: one side of the noise floor, part of nothing else."""
REPEATING: Phase = "repeating"
"""Rounds on prompts whose answer repeats itself: drafts come easily there, so they are told apart."""
SEEN_PER_ROUND = 3
"""Prompts of which one is answered in a round, where they are sorted by whether their answer repeats itself."""


@dataclass(frozen=True)
class Rounds:
    """How often: runs per arm before measuring, measured rounds at most, tokens per run, rounds on repeating answers.

    Attributes:
        stopping: When fewer rounds are enough; None makes all of them.
        plain: Arms whose answers may be cut short where they are slow: those that write one token at a time.
    """

    warmup: int
    repetitions: int
    new_tokens: int
    repeating: int = 0
    stopping: Stopping | None = None
    plain: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Sorted:
    """Prompts by whether the last arm's answer repeats itself.

    Attributes:
        seen: Prompts that were answered to know.
        steady: Those whose answer doesn't repeat itself, at most one for each round.
        repeating: Those whose answer does, at most as many.
        repeats: How many of those seen.
    """

    seen: int
    steady: Sequence[Sequence[int]]
    repeating: Sequence[Sequence[int]]
    repeats: int


def sort_prompts(
    arm: Arm, prompts: Sequence[Sequence[int]], rounds: Rounds, progress: Callable[[int, int, str], None]
) -> Sorted:
    """Let an arm answer prompts, untimed, until enough of them have an answer that doesn't repeat itself."""
    from optikit.evaluation.paired_decoding import repeats

    kept: tuple[list[Sequence[int]], list[Sequence[int]]] = ([], [])
    seen = 0
    for prompt in prompts:
        if len(kept[0]) == rounds.repetitions:
            break
        progress(seen, len(prompts), "prompt seen")
        answer = arm.ask("decode", prompt=list(prompt), new_tokens=rounds.new_tokens)
        kept[repeats(answer["tokens"])].append(prompt)
        seen += 1
    steady, repeating = kept
    return Sorted(seen, steady, repeating[: rounds.repetitions], len(repeating))


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One decoded prompt: by whom, in which phase and round, which prompt, what came out and when."""

    arm: str
    phase: Phase
    round: int
    prompt: int
    trace: Trace
    tokens: tuple[int, ...]
    energy_j: float | None = None
    """What the machine spent from before the call to after the last token; None where it doesn't tell."""

    def as_json(self) -> dict[str, Any]:
        """Return the line of samples.jsonl; token times count from the call."""
        return {
            "arm": self.arm,
            "phase": self.phase,
            "round": self.round,
            "prompt": self.prompt,
            "prompt_tokens": self.trace.prompt_tokens,
            "start_ns": self.trace.start_ns,
            "token_ns": [at - self.trace.start_ns for at in self.trace.token_ns],
            "tokens": list(self.tokens),
            "energy_j": self.energy_j,
        }


def schedule(
    names: Sequence[str], rounds: Rounds, wanted: Callable[[int], Collection[str]] | None = None
) -> Iterator[tuple[str, Phase, int]]:
    """Yield (arm, phase, round): cold runs, warm-up runs arm by arm, then rounds there and back again.

    The baseline, first of `names`, opens and closes every round; which of its two runs is the measured one alternates,
    so that neither side of the noise floor is always the earlier. Before each round, `wanted` is asked who is still to
    be timed after so many; None is everybody.

    >>> "".join(name for name, phase, _ in schedule("AB", Rounds(1, 2, 8)) if phase != "cold")
    'ABAABA'
    """
    yield from _warming_up(names, rounds)
    there: list[tuple[str, Phase]] = [(name, "measured") for name in names]
    there.append((names[0], AGAIN))
    for index in range(rounds.repetitions):
        asked = names if wanted is None else wanted(index)
        turns = there if index % 2 == 0 else reversed(there)
        yield from ((name, phase, index) for name, phase in turns if name in asked)
    for index in range(rounds.repeating):
        for name in names if index % 2 == 0 else reversed(names):
            yield name, REPEATING, index


def _warming_up(names: Sequence[str], rounds: Rounds) -> Iterator[tuple[str, Phase, int]]:
    yield from ((name, "cold", 0) for name in names)
    yield from ((name, "warmup", index) for name in names for index in range(1, rounds.warmup))


class _Session:
    """What a speed test has found so far, and what that leaves to do."""

    def __init__(self, names: Sequence[str], rounds: Rounds, *, metered: bool) -> None:
        self.names = names
        self.rounds = rounds
        self.samples: list[Sample] = []
        self.told = ""
        self._metered = metered
        self._wanted: Collection[str] = names
        self._lengths: Mapping[str, int] = {}

    def wanted(self, done: int) -> Collection[str]:
        """Return whom to time in the next round: arms of a ratio that isn't known yet, and those without a ratio."""
        stopping = self.rounds.stopping
        if stopping is not None and any(look.samples == done for look in stopping.looks):
            unknown = stopping.unknown({name: select(self.samples, name, "measured") for name in self.names})
            paired = {name for pair in stopping.pairs for name in pair}
            left = {name for pair in unknown for name in pair}
            self._wanted = [name for name in self.names if name in left or name not in paired]
            self.told = next(iter(unknown.values()), "")
        return self._wanted

    def length(self, name: str, phase: Phase) -> int:
        """Return how many tokens an arm writes now: all of them at first, which says how many are enough."""
        from optikit.evaluation.speed_stopping import answer_lengths

        if phase == "cold" or self._metered or self.rounds.stopping is None:
            return self.rounds.new_tokens  # where energy is counted, the prompt has to weigh the same for all
        if not self._lengths:
            cold = {each: select(self.samples, each, "cold")[0] for each in self.names}
            self._lengths = answer_lengths(cold, self.rounds.new_tokens, self.rounds.plain)
        return self._lengths[name]

    def left(self, phase: Phase, index: int) -> int:
        """Return about how many runs follow, if no ratio becomes known."""
        if phase in ("cold", "warmup"):
            return (1 + len(self.names)) * self.rounds.repetitions + len(self.names) * self.rounds.repeating
        rounds = self.rounds.repeating - index - 1 if phase == REPEATING else self.rounds.repetitions - index - 1
        each = len(self._wanted) + (self.names[0] in self._wanted)
        return rounds * (len(self.names) if phase == REPEATING else each)


def conduct(
    arms: Mapping[str, Arm],
    prompts: Sequence[Sequence[int]],
    rounds: Rounds,
    progress: Callable[[int, int, str], None],
    meter: Meter | None = None,
    repeating: Sequence[Sequence[int]] = (),
) -> list[Sample]:
    """Run the schedule; in a round every arm decodes the same prompt. Fewer prompts than rounds are used again.

    Args:
        arms: What is timed, by name.
        prompts: Tokens each, for warming up and for the measured rounds.
        rounds: How often.
        progress: Told (done, total, what); the total falls as ratios become known.
        meter: Of energy.
        repeating: Prompts of the rounds that are told apart.

    Raises:
        StageFailedError: An arm returned another number of tokens than asked for.
    """
    metered = meter is not None and bool(meter.counters)
    session = _Session(list(arms), rounds, metered=metered)
    for name, phase, index in schedule(list(arms), rounds, session.wanted):
        done = len(session.samples)
        said = f"run, ratio {session.told}" if session.told else "run"
        progress(done, done + 1 + session.left(phase, index), said)
        number = (index if phase in ("cold", "warmup") else rounds.warmup + index) % len(prompts)
        prompt = repeating[index] if phase == REPEATING else prompts[number]
        length = session.length(name, phase)
        before = meter.read() if meter else ()
        answer = arms[name].ask("decode", prompt=list(prompt), new_tokens=length)
        energy_j = meter.joules(before, meter.read()) if meter else None
        sample = _sample(answer, name, phase, index, number, len(prompt), length)
        session.samples.append(replace(sample, energy_j=energy_j))
    done = len(session.samples)
    progress(done, done, "run")
    return session.samples


def _sample(
    answer: Mapping[str, Any], name: str, phase: Phase, index: int, number: int, prompt_tokens: int, length: int
) -> Sample:
    from optikit.evaluation.speed import Trace

    if len(answer["tokens"]) != length:
        message = f"{name}: {length} tokens were asked for, {len(answer['tokens'])} came"
        raise StageFailedError(message, fix="shorten new_tokens, or lengthen the model's context")
    trace = Trace(start_ns=answer["start_ns"], token_ns=tuple(answer["token_ns"]), prompt_tokens=prompt_tokens)
    return Sample(arm=name, phase=phase, round=index, prompt=number, trace=trace, tokens=tuple(answer["tokens"]))


def select(samples: Sequence[Sample], arm: str, phase: Phase) -> list[Trace]:
    """Return the traces of an arm in a phase, by round."""
    found = [sample for sample in samples if sample.arm == arm and sample.phase == phase]
    return [sample.trace for sample in sorted(found, key=lambda sample: sample.round)]


def joules_per_token(samples: Sequence[Sample], arm: str) -> float | None:
    """Return the energy of an arm's measured runs by the tokens that they wrote; None where the machine doesn't tell.

    Sums, not a median of quotients: the counters move in steps of a millisecond or more. Prompts are part of it.
    """
    found = [sample for sample in samples if sample.arm == arm and sample.phase == "measured"]
    energies = [sample.energy_j for sample in found if sample.energy_j is not None]
    if not energies or len(energies) < len(found):
        return None
    return sum(energies) / sum(len(sample.tokens) for sample in found)


def write_samples(samples: Sequence[Sample], path: Path) -> None:
    """Write every sample as a JSON line, in the order they were taken."""
    lines = (json.dumps(sample.as_json(), separators=(",", ":")) for sample in samples)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
