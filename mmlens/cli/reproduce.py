"""`mmlens reproduce`: the paper's figures, on any model and any questions."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from mmlens.cli import options
from mmlens.cli.console import err, waiting
from mmlens.cli.console import out as console
from mmlens.cli.errors import UserError, explained
from mmlens.cli.from_settings import from_settings

NAMES = ("layers", "constraints", "windows", "visual-tokens", "knockout", "correctness", "auroc")


@from_settings(
    "reproduce/settings.py:Settings",
    called={"replacement": "corrupt_with"},
    defaults={"asked": None},
    least={"limit": 2},
    without=("windows", "max_new_tokens", "samples", "level"),
)
def reproduce(
    figure: Annotated[
        str, typer.Argument(help=f"all, or some of {', '.join(NAMES)}, separated by commas.")
    ] = "all",
    settings: Any = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    out: Annotated[Path, typer.Option(help="A folder; each figure gets its own in it.")] = Path(
        "mmlens-reproduce"
    ),
) -> None:
    """Make the analogues of the paper's figures, with intervals, tables, raw results and settings.

    A figure that is in the folder already, with the same settings, is not made again; one that was
    stopped goes on after the questions that are done.
    """
    names = NAMES if figure == "all" else options.comma_list(figure, "FIGURE")
    for name in names:
        if name not in NAMES:
            raise UserError(f"unknown figure {name!r}; choose all, or from {', '.join(NAMES)}")
    folder = options.writable_folder(out)
    options.check_device(device)
    with waiting("loading mmlens ..."):
        import torch

        from mmlens.reproduce import Settings, Study, is_complete, make
    chosen = Settings(**{"asked": 3 * settings["limit"]} | settings)
    missing = [name for name in names if not is_complete(name, chosen, folder)]
    for name in names:
        if name not in missing:
            line = f"{name} is complete in {folder / name}"
            err().print(escape(line), style="dim", soft_wrap=True)
    if not missing:
        return
    with explained(), waiting(f"loading {chosen.model} ..."):
        study = Study.open(chosen, device=device, dtype=getattr(torch, dtype) if dtype else None)
    for name in missing:
        err().print(f"{name} ...", style="dim")
        with explained(f"{name}: "):
            written = make(name, study, folder)
        files_written = ", ".join(path.name for path in written)
        console().print(f"{escape(str(folder / name))}: {files_written}", soft_wrap=True)
