"""A plan as a file: what was looked at and agreed to, run later only if everything that decides its result is the same.

The file holds the recipe (its text, and what it came to after `extends`, `--set` and variables), digests of model and
texts, the target's row, and for every step its options, the digest of its code, the versions of its libraries and its
cache key. Running it plans again and compares; what differs is named, and nothing is run.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ValidationError

from optikit import __version__, stages
from optikit.errors import InputMissingError, IntegrityError
from optikit.host import versions
from optikit.plan.model import Plan, Step
from optikit.store.code_digest import source_digest

if TYPE_CHECKING:
    from optikit.recipe.load import LoadedRecipe

SCHEMA = 1
MARK = "optikit_plan"
"""The key by which a plan's file is known; its value is the version of its form."""


@dataclass(frozen=True, kw_only=True)
class Frozen:
    """A plan's file, read.

    Attributes:
        path: The file.
        recipe: Path of the recipe that was planned, absolute.
        overrides: `--set` arguments that it was planned with.
        device: torch device that it was planned for.
        targets: File of further targets, or None.
        content: Everything that has to be the same.
    """

    path: Path
    recipe: Path
    overrides: tuple[str, ...]
    device: str
    targets: Path | None
    content: Mapping[str, Any]


class _Content(BaseModel):
    """What is looked into before it is compared."""

    recipe: dict[str, Any] = {}
    steps: dict[str, dict[str, Any]] = {}


class _File(BaseModel):
    """The form of a plan's file."""

    recipe_path: Path
    overrides: list[str]
    device: str
    targets: Path | None
    content: _Content


def freeze(plan: Plan, loaded: LoadedRecipe, *, overrides: tuple[str, ...], targets: Path | None) -> dict[str, Any]:
    """Return a plan as the content of a file."""
    return {
        MARK: SCHEMA,
        "optikit": __version__,
        "recipe_path": str(loaded.path.absolute()),
        "overrides": list(overrides),
        "device": plan.device,
        "targets": str(targets.absolute()) if targets else None,
        "content": _content(plan, loaded),
    }


def _content(plan: Plan, loaded: LoadedRecipe) -> dict[str, Any]:
    found = {
        "recipe": {"text": loaded.text, "written": loaded.written},
        "model": {"resolved": plan.model.resolved, "sha256": plan.model.digest},
        "texts": {role: text.digest for role, text in plan.texts.items()},
        "models": {role: model.digest for role, model in plan.models.items()},
        "target": asdict(plan.target),
        "steps": {step.name: _step(step) for step in (*plan.steps, *plan.measures)},
    }
    decoded: dict[str, Any] = json.loads(json.dumps(found, sort_keys=True))  # as it will be read back
    return decoded


def _step(step: Step) -> dict[str, Any]:
    return {
        "options": step.options.model_dump(mode="json"),
        "code": source_digest(stages.module(step.verb, step.method, step.backend)),
        "versions": versions(stages.load(step.verb, step.method, step.backend).LIBRARIES),
        "key": step.key,
        "estimate_seconds": step.estimate.seconds,
        "estimate_peak_bytes": step.estimate.peak_bytes,
        "estimate_disk_bytes": step.estimate.disk_bytes,
    }


def read(path: Path) -> Frozen | None:
    """Read a plan's file; None where a file is no such thing, but for example a recipe.

    Raises:
        InputMissingError: It is a plan, of a form that this version doesn't know, or incomplete.
    """
    try:
        loaded = json.loads(path.read_bytes()) if path.suffix == ".json" and path.is_file() else None
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(loaded, dict) or MARK not in loaded:
        return None
    again = "make it again with `optikit plan RECIPE --out FILE`"
    if loaded[MARK] != SCHEMA:
        raise InputMissingError(f"{path} is a plan of form {loaded[MARK]}, this version reads {SCHEMA}", fix=again)
    try:
        file = _File.model_validate(loaded)
    except ValidationError as error:
        first = error.errors()[0]
        message = f"{path} is an incomplete plan: {'.'.join(map(str, first['loc']))}: {first['msg']}"
        raise InputMissingError(message, fix=again) from error
    return Frozen(
        path=path,
        recipe=file.recipe_path,
        overrides=tuple(file.overrides),
        device=file.device,
        targets=file.targets,
        content=loaded["content"],
    )


def require_recipe(frozen: Frozen, loaded: LoadedRecipe) -> None:
    """Refuse a recipe that isn't what was planned, before its sources are fetched.

    Raises:
        IntegrityError: Naming the keys that differ.
    """
    before, now = frozen.content.get("recipe", {}), {"text": loaded.text, "written": loaded.written}
    if before == json.loads(json.dumps(now)):
        return
    keys = [key for key, _, _ in differences(before.get("written", {}), now["written"])]
    raise _drifted(frozen, [f"{loaded.path}: {', '.join(keys)}" if keys else f"{loaded.path}: its text"])


def require_same(frozen: Frozen, plan: Plan, loaded: LoadedRecipe) -> None:
    """Refuse to run what isn't what was planned.

    Raises:
        IntegrityError: Naming everything that differs: model, texts, target, options, code, libraries.
    """
    before, now = dict(frozen.content), _content(plan, loaded)
    steps = before.pop("steps", {}), now.pop("steps")
    found = [f"{key}: {_short(old)} is now {_short(new)}" for key, old, new in differences(before, now)]
    found += list(_steps(*steps))
    if found:
        raise _drifted(frozen, found)


def _steps(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """Say what changed in the steps, causes rather than keys: a key follows from the rest."""
    for name in {**before, **now}:
        if name not in before or name not in now:
            yield f"{name}: {'new' if name in now else 'gone'}"
        else:
            yield from (f"{name}: {cause}" for cause in _causes(before[name], now[name]))


def _causes(before: Any, now: Any) -> Iterator[str]:
    """Say what changed in one step."""
    causes = [each for each in differences(before, now) if not each[0].startswith("estimate")]
    told = [each for each in causes if each[0] != "key"]
    if any(key == "code" for key, _, _ in told):
        yield "optikit's code for it"
    yield from (f"{key}: {_short(old)} is now {_short(new)}" for key, old, new in told if key != "code")
    if causes and not told and now["key"] != before["key"]:
        yield "what it is made from, or this machine"


def differences(before: Any, now: Any, at: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield (dotted key, before, now) of every leaf in which two JSON values differ.

    >>> list(differences({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}}))
    [('a.c', 2, 3)]
    """
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for key in {**before, **now}:
            yield from differences(before.get(key), now.get(key), f"{at}.{key}" if at else key)
    elif before != now:
        yield at, before, now


def _short(value: Any) -> str:
    shown = json.dumps(value, ensure_ascii=False)
    return f"{shown[:60]}…" if len(shown) > 60 else shown


def _drifted(frozen: Frozen, found: list[str]) -> IntegrityError:
    shown = "; ".join(found[:6]) + (f"; and {len(found) - 6} more" if len(found) > 6 else "")
    fix = f"look at it again: `optikit plan {frozen.recipe} --out {frozen.path}`"
    return IntegrityError(f"{frozen.path} no longer holds: {shown}", fix=fix)
