"""The command line. Only typer and the standard library are imported here: `optikit --help` has to be instant."""

from __future__ import annotations

import sys

import typer

from optikit.cli.cache import app as cache
from optikit.cli.diff import diff
from optikit.cli.doctor import doctor
from optikit.cli.explain import explain
from optikit.cli.generate import generate
from optikit.cli.init import init
from optikit.cli.plan import plan
from optikit.cli.recommend import recommend
from optikit.cli.report import report
from optikit.cli.run import run
from optikit.cli.schema import schema
from optikit.cli.stages import stages
from optikit.cli.targets import targets
from optikit.cli.verify import verify
from optikit.errors import Exit, OptikitError

EPILOG = """\
Exit codes: 0 ok, 1 bug, 2 usage, 10 gate failed, 11 gate inconclusive with --strict, 65 recipe invalid,
66 input missing, 69 unavailable, 70 stage failed, 73 cannot create output, 74 disk, 75 locked, 76 integrity,
77 refused, 124 timeout, 130 interrupted, 137 out of memory, 143 terminated.
"""

app = typer.Typer(
    name="optikit",
    help="Optimize language models for inference by recipe: quantize, prune, speculate, compile, measure.",
    epilog=EPILOG,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

for verb in (run, plan, recommend, init, schema, targets, stages, explain, doctor, report, diff, verify, generate):
    app.command()(verb)
app.add_typer(cache, name="cache")


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
    try:
        app()
    except OptikitError as error:
        sys.stderr.write(_told(error))
        sys.exit(int(error.code))
    except KeyboardInterrupt:
        sys.stderr.write("\ninterrupted\n")
        sys.exit(int(Exit.INTERRUPTED))
    except BrokenPipeError:
        sys.exit(int(Exit.OK))  # the reader of our output has seen enough
    except Exception as error:  # noqa: BLE001 - a bug is reported as one, with all that is needed to mend it
        from optikit.cli.crash import write_report

        sys.stderr.write(f"error: optikit has a bug: {error!r}\nfix: send us this report: {write_report(error)}\n")
        sys.exit(int(Exit.BUG))


def _told(error: OptikitError) -> str:
    """Return what a failure says on stderr: every problem of a recipe in its place, or one sentence and its fix."""
    from optikit.errors import RecipeError

    if isinstance(error, RecipeError) and error.problems:
        from optikit.recipe.render import render_problems

        return f"{render_problems(error.problems, colour=sys.stderr.isatty())}\n{error.message}\n"
    fix = f"fix: {error.fix}\n" if error.fix else ""
    return f"error: {error.message}\n{fix}"
