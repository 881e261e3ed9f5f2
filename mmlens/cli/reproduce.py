"""`mmlens reproduce`: the paper's figures, on any model and any questions."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from mmlens.cli import options
from mmlens.cli.console import err, waiting
from mmlens.cli.console import out as console
from mmlens.cli.errors import UserError, explained

NAMES = ("layers", "constraints", "windows", "visual-tokens", "knockout", "correctness", "auroc")


def reproduce(
    figure: Annotated[
        str, typer.Argument(help=f"all, or some of {', '.join(NAMES)}, separated by commas.")
    ] = "all",
    model: options.Model = "demo",
    data: Annotated[
        str,
        typer.Option(
            help='"demo", a csv of VQA-Constraints, or a jsonl file or folder of your own.'
        ),
    ] = "demo",
    images: Annotated[
        Path | None, typer.Option(help="The folder of the csv's pictures; by default its own.")
    ] = None,
    annotations: Annotated[
        str | None,
        typer.Option(help="QUESTIONS.json,ANNOTATIONS.json of OK-VQA: the answers to okvqa.csv."),
    ] = None,
    language_model: Annotated[
        str | None,
        typer.Option(help="Who is told the name; by default the model's own language model."),
    ] = None,
    limit: Annotated[int, typer.Option(min=2, help="Questions that are traced.")] = 60,
    asked: Annotated[
        int | None,
        typer.Option(help="Questions asked for right and wrong answers; by default 3 x limit."),
    ] = None,
    corrupt_with: Annotated[
        str, typer.Option(help="The word that takes the constraint's place in the corrupted run.")
    ] = "Paris",
    minimum_gap: Annotated[
        float, typer.Option(help="Least clean - corrupted probability of a traced question.")
    ] = 0.05,
    template: options.Template = "auto",
    seed: Annotated[int, typer.Option(help="Of the choice of questions and the resampling.")] = 0,
    device: options.Device = None,
    dtype: options.Dtype = None,
    out: Annotated[Path, typer.Option(help="A folder; each figure gets its own in it.")] = Path(
        "mmlens-reproduce"
    ),
) -> None:
    """Make the analogues of the paper's figures, with intervals, tables, raw results and settings.

    A figure that is in the folder already, with the same settings, is not made again.
    """
    chosen = NAMES if figure == "all" else options.comma_list(figure, "FIGURE")
    for name in chosen:
        if name not in NAMES:
            raise UserError(f"unknown figure {name!r}; choose all, or from {', '.join(NAMES)}")
    files = options.comma_list(annotations, "--annotations") if annotations else None
    if files is not None and len(files) != 2:
        raise UserError(f"--annotations: two files, questions and annotations, not {annotations!r}")
    folder = options.writable_folder(out)
    options.check_device(device)
    with waiting("loading mmlens ..."):
        import torch

        from mmlens.reproduce import FIGURES, Settings, Study, is_complete, write
    settings = Settings(
        model=model,
        language_model=language_model,
        data=data,
        images=str(images) if images else None,
        annotations=(files[0], files[1]) if files else None,
        template=options.template_of(template),
        limit=limit,
        asked=3 * limit if asked is None else asked,
        replacement=corrupt_with,
        minimum_gap=minimum_gap,
        seed=seed,
    )
    missing = [name for name in chosen if not is_complete(name, settings, folder)]
    for name in chosen:
        if name not in missing:
            err().print(f"{name} is complete in {folder / name}", style="dim", soft_wrap=True)
    if not missing:
        return
    with explained(), waiting(f"loading {model} ..."):
        study = Study.open(settings, device=device, dtype=getattr(torch, dtype) if dtype else None)
    for name in missing:
        err().print(f"{name} ...", style="dim")
        with explained(f"{name}: "):
            made = FIGURES[name](study)
        files_written = ", ".join(path.name for path in write(made, study, folder))
        console().print(f"{escape(str(folder / name))}: {files_written}", soft_wrap=True)
