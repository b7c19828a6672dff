"""The command line. Only typer and the standard library are imported here: `optikit --help` has to be instant."""

from __future__ import annotations

import os
import sys
from importlib import import_module
from typing import Any

import typer
from typer.core import TyperGroup

from optikit.errors import Exit, OptikitError

VERBS = {
    "run": "Make the artifact of a recipe, measure it, report on it.",
    "plan": "Check a recipe; print its steps and what they will take.",
    "sweep": "Run variants of a recipe, here or on a Ray cluster, and compare them.",
    "recommend": "Rank the stacks that are legal on a target.",
    "init": "Write a commented recipe to start from.",
    "presets": "List stacks worth trying, with what was recorded of them.",
    "schema": "Print the JSON Schema of recipes.",
    "targets": "List the hardware that a recipe may name.",
    "stages": "List verbs and methods.",
    "models": "List families of models and what works for each.",
    "explain": "Explain a rule, a stage or a target.",
    "doctor": "Examine this machine and what is installed.",
    "report": "Render the reports of a run again.",
    "diff": "Compare two runs.",
    "eval": "Measure a model or a server as it is.",
    "verify": "Check that an output directory is whole.",
    "reproduce": "Make an output again from its sealed recipe and lock; compare the bytes.",
    "generate": "Generate text with what a run wrote.",
    "serve": "Serve what a run wrote behind OpenAI's API.",
    "bench": "Load servers or artifacts and compare what their clients see.",
    "submit": "Write a folder with which a cluster runs a recipe.",
    "publish": "Put what a run wrote on a hub, in a registry or a bucket.",
    "cache": "Look after the store of finished steps.",
    "env": "Look after the environments that some backends run in.",
}
"""Every verb is in the module of its name, which is imported when the verb is used."""

EPILOG = """\
Exit codes: 0 ok, 1 bug, 2 usage, 10 gate failed, 11 gate inconclusive with --strict, 65 recipe invalid,
66 input missing, 69 unavailable, 70 stage failed, 73 cannot create output, 74 disk, 75 locked, 76 integrity,
77 refused, 124 timeout, 130 interrupted, 137 out of memory, 143 terminated.
"""


class Verbs(TyperGroup):
    """Commands that are imported when they are used."""

    def __init__(self, **attrs: Any) -> None:
        super().__init__(**attrs)
        self.commands = dict.fromkeys(VERBS)  # type: ignore[assignment]  # names; `get_command` has the rest

    def get_command(self, ctx: Any, cmd_name: str) -> Any:  # noqa: ARG002 - the signature is typer's
        """Import a verb and return its command; None for an unknown one."""
        if cmd_name not in VERBS:
            return None
        module = import_module(f"optikit.cli.{cmd_name}")
        verbs = getattr(module, "app", None)
        if verbs is None:
            verbs = typer.Typer(add_completion=False, rich_markup_mode=None)
            verbs.command(cmd_name)(getattr(module, cmd_name))
        return typer.main.get_command(verbs)

    def format_commands(self, ctx: Any, formatter: Any) -> None:  # noqa: ARG002 - the signature is typer's
        """Write the list of verbs."""
        with formatter.section("Commands"):
            formatter.write_dl(list(VERBS.items()))


app = typer.Typer(
    name="optikit",
    cls=Verbs,
    help="Optimize language models for inference by recipe: quantize, prune, speculate, compile, measure.",
    epilog=EPILOG,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        from optikit import __version__

        typer.echo(f"optikit {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    """Optimize language models for inference by recipe: quantize, prune, speculate, compile, measure."""


def main() -> None:
    """Run the command line; every failure ends with its sentence on stderr and its exit code."""
    from optikit.progress import Output

    _open_streams()
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "true")  # to find some, it reads what every package has installed
    sys.stdout, sys.stderr = Output(sys.stdout), Output(sys.stderr, expendable=True)
    try:
        app()
    except OptikitError as error:
        tell(error)
        sys.exit(int(error.code))
    except KeyboardInterrupt:
        sys.stderr.write("\ninterrupted\n")
        sys.exit(int(Exit.INTERRUPTED))
    except Exception as error:  # noqa: BLE001 - a bug is reported as one, with all that is needed to mend it
        from optikit.cli.crash import known, write_report

        named = known(error)
        if named is not None:
            tell(named)
            sys.exit(int(named.code))
        sys.stderr.write(f"error: optikit has a bug: {error!r}\nfix: send us this report: {write_report(error)}\n")
        sys.exit(int(Exit.BUG))


def _open_streams() -> None:
    """Put something below standard input, output and errors where they are closed.

    Python has no stream there, and the next file that is opened, an artifact's, would be what libraries print to.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest number that is free: this one
    for name, number in (("stdout", 1), ("stderr", 2)):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, "w", encoding="utf-8", closefd=False))


def tell(error: OptikitError) -> None:
    """Say a failure on stderr: every problem of a recipe in its place, or one sentence and its fix."""
    from optikit.errors import RecipeError
    from optikit.progress import below, is_terminal
    from optikit.text import redact

    if not (isinstance(error, RecipeError) and error.problems):
        fix = f"fix: {error.fix}\n" if error.fix else ""
        sys.stderr.write(f"error: {error.message}\n{fix}")
        return
    from optikit.recipe.render_problems import render_problems

    colour = is_terminal(sys.stderr)
    lines = f"{render_problems(error.problems, colour=colour)}\n{error.message}\n"
    if colour:  # its styles are ours, and what it quotes is made visible
        below(sys.stderr).write(redact(lines))
    else:
        sys.stderr.write(lines)
