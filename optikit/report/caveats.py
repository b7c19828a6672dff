"""What a reader should know before trusting figures of speed."""

from __future__ import annotations

from collections.abc import Iterator

from optikit.evaluation.results import Timing

FOR_P95 = 90
"""`statistics.requests_needed(0.95)`; written out, because that module loads numpy."""
BUSY = 1.5
"""Load per thread above which others were at work; the step before leaves up to 1."""
MUCH_STEAL = 0.05
MUCH_NOISE = 0.05


def of_timing(timing: Timing | None, *, stored: bool) -> Iterator[str]:
    """Yield what was not as it should be when speed was timed.

    Args:
        timing: The figures; None: none were taken.
        stored: They come from an earlier run.
    """
    if timing is None:
        return
    if stored:
        yield "Speed was timed in an earlier run on this machine and taken from the store."
    yield from _of_machine(timing)
    timed = next(iter(timing.arms.values()))
    runs = timed.repetitions
    if timed.ttft_ms_p95 is None:
        yield f"95th percentiles are left out: {runs} repetitions are too few, {FOR_P95} are needed."
    if timing.prompts < runs:
        yield f"The text has only {timing.prompts} prompts of that length: some were decoded more than once."


def _of_machine(timing: Timing) -> Iterator[str]:
    """Yield what else the machine did meanwhile."""
    before = timing.host.before
    load = before["load_average_1min"]
    if load is not None and load > BUSY * before["threads"]:
        on = f"a load of {load:.1f} on {before['threads']} threads"
        yield f"When timing began the machine was already busy: {on}."
    steal = timing.host.steal_share
    if steal is not None and steal > MUCH_STEAL:
        yield f"While timing, the hypervisor gave {steal:.0%} of the processor time to other machines."
    floor = timing.noise["decode"].noise_floor
    if floor > MUCH_NOISE:
        yield f"The machine was noisy: the baseline differs from itself by up to {floor:.0%} in decode speed."
