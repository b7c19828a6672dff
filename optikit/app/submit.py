"""`optikit submit` as one function: a recipe, planned here, as a folder that a scheduler runs elsewhere.

What the job needs is taken from the plan's estimates. The recipe goes along as it stands after `extends`, `--set` and
variables, with the texts that it names; what the job couldn't see is refused.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optikit import __version__, host
from optikit.deploy import jobs
from optikit.deploy.jobs import RECIPE, Job, Scheduler
from optikit.errors import CannotCreateError, RecipeError, RefusedError
from optikit.recipe.load import loads
from optikit.store import files
from optikit.text import redact

if TYPE_CHECKING:
    from optikit.plan import Plan
    from optikit.recipe.load import LoadedRecipe

ROOM = 1.25
"""Memory and disk asked for, over what the plan expects."""
KEPT_BYTES = 2**30
"""Memory that optikit itself and the system have beside a step's process."""
LIBRARIES_BYTES = 12 * 2**30
"""Disk of torch and the others where they are installed on the volume."""
LATE, LEAST_SECONDS = 3.0, 3600
"""Longest time of an attempt, over what the plan expects of this machine, and the least."""
MOST_TEXT = 64 * 2**20


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What the command line says of the job; None is what the plan's estimates say."""

    name: str = ""
    cpus: int | None = None
    memory_bytes: int | None = None
    disk_bytes: int | None = None
    seconds: int | None = None
    install: str = f"optikit=={__version__}"
    image: str = ""
    shared: Path | None = None
    """A directory that the job sees at the same place: what lies below it isn't copied."""


def job(loaded: LoadedRecipe, plan: Plan, asked: Asked) -> Job:
    """Return the job of a planned recipe.

    Raises:
        RecipeError: The recipe names files that the job couldn't see.
        RefusedError: The recipe or a text holds what looks like a credential.
    """
    steps = (*plan.steps, *plan.measures)
    peak = max((step.estimate.peak_bytes for step in steps), default=0)
    disk = sum(step.estimate.disk_bytes + step.estimate.scratch_bytes for step in steps) + plan.facts.weight_bytes
    seconds = LATE * sum(step.estimate.seconds for step in steps)
    moved, content = _texts(loaded, plan, asked.shared)
    recipe = _recipe(loaded, plan, moved, asked.shared)
    return Job(
        name=named(asked.name or loaded.path.stem),
        files={RECIPE: recipe.encode(), **content},
        target=plan.target,
        cpus=asked.cpus or host.threads(),
        memory_bytes=asked.memory_bytes or int(peak * ROOM) + KEPT_BYTES,
        disk_bytes=asked.disk_bytes or int(disk * ROOM) + LIBRARIES_BYTES,
        seconds=asked.seconds or max(LEAST_SECONDS, int(seconds)),
        install=asked.install,
        image=asked.image,
    )


def named(text: str) -> str:
    """Return a name that every scheduler takes.

    >>> named("Llama-3.1_8B.gptq"), named("7b")
    ('llama-3-1-8b-gptq', 'optikit-7b')
    """
    name = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
    return (name if name[:1].isalpha() else f"optikit-{name}")[:40].rstrip("-")


def _texts(loaded: LoadedRecipe, plan: Plan, shared: Path | None) -> tuple[dict[str, str], dict[str, bytes]]:
    """Return what local texts are called in the recipe's copy, and what they hold."""
    moved: dict[str, str] = {}
    content: dict[str, bytes] = {}
    for spec in dict.fromkeys(text.spec for text in plan.texts.values()):
        path = _local(spec, loaded.base)
        if path is None:
            continue
        if _is_below(path, shared):
            moved[spec] = str(path)
            continue
        if path.stat().st_size > MOST_TEXT:
            _refuse(f"{spec} has {files.in_units(path.stat().st_size)}, and a folder takes texts up to 64 MiB")
        place = f"texts/{len(content)}-{re.sub(r'[^A-Za-z0-9._-]', '_', path.name)}"
        moved[spec] = place
        content[place] = path.read_bytes()
        if redact(text := content[place].decode(errors="replace")) != text:
            raise RefusedError(f"{spec} holds what looks like a password or a token", fix="take it out")
    return moved, content


def _local(spec: str, base: Path) -> Path | None:
    """Return the file or directory that a source names here; None for one of an index or a hub."""
    if spec.startswith(("pypi:", "hf:")):
        return None
    path = Path(spec).expanduser()
    beside = base / path
    return _plain(beside if beside.exists() else path)


def _plain(path: Path) -> Path:
    """Return an absolute path without `..`; links stay, as the job may see them elsewhere."""
    return Path(os.path.normpath(path.absolute()))


def _is_below(path: Path, shared: Path | None) -> bool:
    return shared is not None and path.is_relative_to(_plain(shared))


def _refuse(message: str) -> None:
    fix = "name it as hf:ORG/NAME or pypi:NAME==VERSION, or put it where the job sees it too and pass --shared DIR"
    raise RecipeError(message, fix=fix)


def _recipe(loaded: LoadedRecipe, plan: Plan, moved: Mapping[str, str], shared: Path | None) -> str:
    """Return the recipe that the job runs: the same values, texts where the folder has them."""
    moved = dict(moved)
    for model in (plan.model, *plan.models.values()):
        path = _local(model.spec, loaded.base)
        if path is not None and not _is_below(path, shared):
            _refuse(f"the model {model.spec} lies on this machine, and the job runs on another")
        if path is not None:
            moved[model.spec] = str(path)
    values = _replaced(loaded.written, moved)
    text = f"# {loaded.path.name}, as `optikit submit` read it.\n" + "".join(_yaml(values))
    if redact(text) != text:
        raise RefusedError(f"{loaded.path} holds what looks like a password or a token", fix="take it out")
    loads(text, Path(RECIPE))
    return text


def _replaced(value: Any, moved: Mapping[str, str]) -> Any:
    if isinstance(value, dict):
        return {key: _replaced(each, moved) for key, each in value.items()}
    if isinstance(value, list):
        return [_replaced(each, moved) for each in value]
    return moved.get(value, value) if isinstance(value, str) else value


def _yaml(values: Mapping[str, Any], indent: str = "") -> Iterator[str]:
    """Yield lines of YAML: mappings in blocks, everything else as JSON, which is YAML 1.2."""
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield f"{indent}{key}:\n"
            yield from _yaml(value, indent + "  ")
        elif isinstance(value, list) and value and all(isinstance(each, dict) for each in value):
            yield f"{indent}{key}:\n"
            yield from (f"{indent}  - {json.dumps(each, ensure_ascii=False)}\n" for each in value)
        else:
            yield f"{indent}{key}: {json.dumps(value, ensure_ascii=False)}\n"


def write(made: Job, scheduler: str, out: Path) -> list[str]:
    """Write the folder of a job, whole or not at all; return its files.

    Raises:
        RecipeError: It can't go there.
        CannotCreateError: The folder exists.
    """
    module = jobs.load(scheduler)
    why, fix = module.refusal(made)
    if why:
        raise RecipeError(why, fix=fix)
    content = {**made.files, **{name: text.encode() for name, text in module.files(made).items()}}
    content["README.md"] = _readme(made, module).encode()
    if os.path.lexists(out) or any(each.is_file() for each in out.parents):
        raise CannotCreateError(f"{out} exists, or lies below a file", fix="name a folder that doesn't")
    partial = out.with_name(f".{out.name}.part")
    files.remove_tree(partial)
    with files.disk_errors(out.parent, f"writing {out}", fix="choose another place"):
        try:
            for name, data in content.items():
                (partial / name).parent.mkdir(parents=True, exist_ok=True)
                (partial / name).write_bytes(data)
            partial.rename(out)
        finally:
            files.remove_tree(partial)
    return sorted(content)


def asks(made: Job) -> list[tuple[str, str]]:
    """Return what the job asks for, a word and a value each."""
    rows = [("processors", str(made.cpus)), ("memory", files.in_units(made.memory_bytes))]
    rows += [("disk", files.in_units(made.disk_bytes)), ("longest attempt", f"{made.seconds / 3600:.1f} h")]
    if made.target.device != "cpu":
        rows.append(("accelerators", f"{made.target.count} × {made.target.accelerator or made.target.name}"))
    return rows


def _readme(made: Job, module: Scheduler) -> str:
    rows = "".join(f"| {word} | {value} |\n" for word, value in asks(made))
    return (
        f"# {made.name}\n\n{module.SUMMARY}. Typed in this folder:\n\n```sh\n{module.command(made)}\n```\n\n"
        f"It runs `optikit run` on `{RECIPE}` with a store that outlives it. {module.again(made)}\n\n"
        f"| asks for | |\n|---|---|\n{rows}\n"
        "Time, memory and disk come from the plan's estimates, with room; edit them in the file. "
        f"`{made.install}` has to be there for\n`pip install`: an index, an address or a file of the volume.\n\n"
        f"How files of this kind were checked: {module.CHECKED}. No cluster was reached.\n"
    )
