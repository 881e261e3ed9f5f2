"""The commands together, and how they end."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.metadata import version
from typing import Annotated, NoReturn

import typer

from mmlens.cli.contributions import contributions
from mmlens.cli.demo import demo
from mmlens.cli.edit import edit
from mmlens.cli.edit_bench import edit_bench
from mmlens.cli.errors import UserError
from mmlens.cli.knockout import knockout
from mmlens.cli.report import report
from mmlens.cli.reproduce import reproduce
from mmlens.cli.sweep import summarize, sweep, with_ray_address
from mmlens.cli.trace import trace
from mmlens.cli.verify import verify

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
app.command()(edit)
app.command("edit-bench")(edit_bench)
app.command()(reproduce)
app.command()(sweep)
app.command()(summarize)
app.command()(verify)


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


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit: 0, 2 for bad input (one line on stderr), 1 for other failures.

    Args:
        arguments: instead of those of the process.
    """
    from mmlens.demo.language_model import LanguageModelUnavailable

    arguments = with_ray_address(sys.argv[1:] if arguments is None else arguments)
    try:
        code = app(arguments or ["--help"], prog_name="mmlens", standalone_mode=False)
    except UserError as error:
        _stop(str(error), 2)
    except LanguageModelUnavailable as error:
        _stop(str(error), 1)
    except KeyboardInterrupt:
        _stop("interrupted", 130)
    except Exception as error:
        # A usage error of click's, which typer carries inside itself in some versions.
        if not hasattr(error, "format_message"):
            raise
        _stop(" ".join(error.format_message().split()) or "see mmlens --help", 2)
    sys.exit(code if isinstance(code, int) else 0)


def _stop(message: str, code: int) -> NoReturn:
    print(f"mmlens: {message}", file=sys.stderr)
    sys.exit(code)
