"""The commands together, and how they end."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib.metadata import version
from typing import Annotated, NoReturn

import typer

from mmlens.cli.contributions import contributions
from mmlens.cli.demo import demo
from mmlens.cli.edit import edit
from mmlens.cli.edit_bench import edit_bench
from mmlens.cli.errors import as_user_error, explained
from mmlens.cli.knockout import knockout
from mmlens.cli.report import report
from mmlens.cli.reproduce import reproduce
from mmlens.cli.steer import steer
from mmlens.cli.sweep import summarize, sweep, with_ray_address
from mmlens.cli.trace import trace
from mmlens.cli.verify import verify
from mmlens.utils.interrupts import Interrupts
from mmlens.utils.terminal import safe_streams, say

app = typer.Typer(
    name="mmlens",
    help="Look inside multimodal language models.",
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)
app.command()(demo)
app.command()(trace)
app.command()(report)
app.command()(contributions)
app.command()(knockout)
app.command()(steer)
app.command()(edit)
app.command("edit-bench")(edit_bench)
app.command()(reproduce)
app.command()(sweep)
app.command()(summarize)
app.command()(verify)


INTERRUPTED = 130
"""Exit status after Ctrl-C, as of other programs: 128 and the signal's number."""


def _print_version(wanted: bool | None) -> None:
    if wanted:
        print(f"mmlens {version('mmlens')}")
        raise typer.Exit


@app.callback()
def common(
    show_version: Annotated[
        bool | None,
        typer.Option("--version", callback=_print_version, help="Print the version."),
    ] = None,
) -> None:
    """Look inside multimodal language models."""
    if os.environ.get("MMLENS_THREADS"):  # a typing error there is no run's fault
        from mmlens.utils.threads import requested

        with explained():
            requested()


def main(arguments: Sequence[str] | None = None, interrupts: Interrupts | None = None) -> NoReturn:
    """Run the command line, with these arguments or those of the process, and exit.

    The code is 0; 2 for bad input and 1 for what may be tried again, such as a full disk, with one
    line on stderr; 130 after Ctrl-C, with one line, too. A mistake of ours shows its traceback.

    Args:
        interrupts: whether Ctrl-C was pressed: an error after it is then its consequence.
    """
    arguments = with_ray_address(sys.argv[1:] if arguments is None else arguments)
    with safe_streams():
        try:
            code = app(arguments or ["--help"], prog_name="mmlens", standalone_mode=False)
            sys.stdout.flush()
        except (KeyboardInterrupt, typer.Abort):
            code = INTERRUPTED
        except Exception as error:
            if interrupts is None or not interrupts.seen:
                _stop(*_said_of(error))
            code = INTERRUPTED
        if code == INTERRUPTED:  # typer has caught it, and prints nothing, in some versions
            _stop("interrupted", INTERRUPTED)
        sys.exit(code if isinstance(code, int) else 0)


def _said_of(error: Exception) -> tuple[str, int]:
    """The line and the exit code of an error; a traceback and no line where it is a mistake."""
    if told := as_user_error(error):
        return str(told), told.code
    # A usage error of click's, which typer carries inside itself in some versions.
    if hasattr(error, "format_message"):
        return " ".join(error.format_message().split()) or "see mmlens --help", 2
    sys.excepthook(type(error), error, error.__traceback__)
    return "", 1


def _stop(message: str, code: int) -> NoReturn:
    if message:
        say(message)
    try:
        sys.stdout.flush()
    except OSError:  # Python would try again when it ends, and say so
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)
