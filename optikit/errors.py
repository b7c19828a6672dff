"""Every way a command can fail, on one page: a class is an exit code, its text says what, where and one fix.

Codes follow sysexits(3) where it has a name for the case; 124, 130, 137 and 143 follow the shell and timeout(1).
A test asserts that no two classes share a code.
"""

from __future__ import annotations

from enum import IntEnum
from typing import TYPE_CHECKING

from optikit.text import redact

if TYPE_CHECKING:
    from collections.abc import Sequence

    from optikit.problems import Problem


class Exit(IntEnum):
    """Exit codes of every verb."""

    OK = 0
    BUG = 1
    USAGE = 2
    GATE_FAILED = 10
    GATE_INCONCLUSIVE = 11
    RECIPE = 65
    INPUT_MISSING = 66
    UNAVAILABLE = 69
    STAGE_FAILED = 70
    CANNOT_CREATE = 73
    IO = 74
    LOCKED = 75
    INTEGRITY = 76
    REFUSED = 77
    TIMEOUT = 124
    INTERRUPTED = 130
    OUT_OF_MEMORY = 137
    TERMINATED = 143


class OptikitError(Exception):
    """A failure with a name: `message` says what happened to which value, `fix` is one thing to do about it.

    Neither holds a credential, whoever wrote it: both may end in a log, a report or a bug report.
    """

    code = Exit.BUG

    def __init__(self, message: str, *, fix: str = "") -> None:
        super().__init__(redact(message))
        self.message = redact(message)
        self.fix = redact(fix)


class UsageError(OptikitError):
    """The command line itself is wrong."""

    code = Exit.USAGE


class RecipeError(OptikitError):
    """The recipe is invalid or its stack can't work; carries every problem found, not only the first."""

    code = Exit.RECIPE

    def __init__(self, message: str, *, problems: Sequence[Problem] = (), fix: str = "") -> None:
        super().__init__(message, fix=fix)
        self.problems = tuple(problems)


class InputMissingError(OptikitError):
    """A file, model or text that the recipe names isn't there."""

    code = Exit.INPUT_MISSING


class GateFailedError(OptikitError):
    """A gate failed that may not: it stopped the run, or nothing was left to roll back to."""

    code = Exit.GATE_FAILED


class UnavailableError(OptikitError):
    """A device, a backend or a network source can't be reached now."""

    code = Exit.UNAVAILABLE


class StageFailedError(OptikitError):
    """A stage ran and failed, or wrote something else than it promised."""

    code = Exit.STAGE_FAILED


class CannotCreateError(OptikitError):
    """The output directory can't be made or holds something else."""

    code = Exit.CANNOT_CREATE


class DiskError(OptikitError):
    """Input/output failed, most often a full disk."""

    code = Exit.IO


class LockedError(OptikitError):
    """Another run holds the lock for longer than --lock-timeout."""

    code = Exit.LOCKED


class IntegrityError(OptikitError):
    """Bytes differ from what a manifest, a lock or a pin says."""

    code = Exit.INTEGRITY


class RefusedError(OptikitError):
    """Refused for security: a pickle, a config key that runs code, a path that leaves its root."""

    code = Exit.REFUSED


class StageTimeoutError(OptikitError):
    """A step ran longer than its timeout."""

    code = Exit.TIMEOUT


class InterruptError(OptikitError):
    """Ctrl-C (SIGINT)."""

    code = Exit.INTERRUPTED


class OutOfMemoryError(OptikitError):
    """A step's process was killed for memory, or couldn't allocate."""

    code = Exit.OUT_OF_MEMORY


class TerminatedError(OptikitError):
    """SIGTERM."""

    code = Exit.TERMINATED


BY_CODE: dict[int, type[OptikitError]] = {
    error.code: error
    for error in (
        OptikitError,
        UsageError,
        RecipeError,
        InputMissingError,
        GateFailedError,
        UnavailableError,
        StageFailedError,
        CannotCreateError,
        DiskError,
        LockedError,
        IntegrityError,
        RefusedError,
        StageTimeoutError,
        InterruptError,
        OutOfMemoryError,
        TerminatedError,
    )
}
"""The class of each exit code: a worker's error crosses the process border as its code, message and fix."""
