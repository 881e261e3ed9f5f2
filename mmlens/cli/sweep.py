"""`mmlens sweep`: an analysis over a data set; `mmlens summarize`: what came of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from mmlens.cli import options
from mmlens.cli.console import out as console
from mmlens.cli.console import waiting
from mmlens.cli.errors import UserError, as_user_error, explained
from mmlens.cli.from_settings import from_settings
from mmlens.cli.trace import check_sites

if TYPE_CHECKING:
    from mmlens.sweeps import Summary, Sweep

TASK_NAMES = ("trace", "contributions", "edit", "steer")
NUMBERS = ("n", "mean", "low", "high")
FAILED_QUESTIONS = 3
"""Exit status of a sweep that is complete, but for questions that failed."""


@from_settings(
    *(f"sweeps/tasks/{name}.py:{name.title()}Task" for name in TASK_NAMES),
    called={"replacement": "corrupt_with"},
    declared={"layers": options.Layers},
    without=("corrupt", "method_settings", "n_key_questions", "n_kept"),
)
def sweep(
    task: Annotated[str, typer.Argument(help="trace, contributions, edit or steer.")],
    out: Annotated[Path, typer.Option(help="The folder of the sweep; an unfinished one goes on.")],
    model: options.Model = "demo",
    data: Annotated[
        str,
        typer.Option(
            help='"demo"; a csv of VQA-Constraints or a folder with its three; a jsonl file or '
            "folder of your own; NAME:PATH for encyclopedic_vqa, okvqa, gqa, pope, coco, mmmu "
            "(trace: pairs, whats_up; edit: mmedit, vlkeb)."
        ),
    ] = "demo",
    images: Annotated[
        Path | None, typer.Option(help="The folder of the images; by default that of the data.")
    ] = None,
    annotations: options.Annotations = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="A random sample of so many questions; default all.")
    ] = None,
    settings: Any = None,
    template: options.Template = "auto",
    seed: Annotated[int, typer.Option(help="Of the sample of questions.")] = 0,
    shard_size: Annotated[
        int, typer.Option(min=1, help="Questions that are written together.")
    ] = 8,
    min_pixels: options.MinPixels = None,
    max_pixels: options.MaxPixels = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    ray: Annotated[
        str | None,
        typer.Option(
            help="Run on Ray: --ray alone starts it on this machine, --ray auto or --ray "
            "HOST:PORT joins a cluster."
        ),
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Workers on Ray; by default one per GPU.")
    ] = None,
    retries: Annotated[
        int, typer.Option(min=0, help="Lost workers that a shard may cost beyond the first.")
    ] = 2,
    retry_failures: Annotated[
        bool, typer.Option("--retry-failures", help="Do shards with failures again.")
    ] = False,
) -> None:
    """Trace (or ...) every question of a data set, into a folder of parquet files.

    The same command goes on where it was stopped, however that happened. The exit status is 3
    where questions failed; FOLDER/failures.parquet says why.
    """
    check_sites(settings.get("sites", ()))
    files = options.two_files(annotations, "--annotations") if annotations else None
    options.writable_folder(out)
    options.check_device(device)
    with waiting("loading mmlens ..."):
        from mmlens.checkpoints.errors import CheckpointError
        from mmlens.sweeps import (
            TASKS,
            FolderInUse,
            ImpossibleTask,
            OtherSettings,
            RayMissing,
            WorkersLost,
        )
        from mmlens.sweeps import sweep as run_sweep
    if task not in TASKS:
        raise UserError(f"unknown task {task!r}; choose from {', '.join(TASKS)}")
    others = settings.keys() - {each.name for each in fields(TASKS[task])}
    if others:
        raise UserError(f"{task} has no {', '.join(sorted(others))}: an option of another task")
    with explained():
        chosen = TASKS[task](template=options.template_of(template), **settings)
    with explained("--data: "):
        questions = chosen.open(data, images, files, seed)
    try:
        found = run_sweep(
            chosen,
            model,
            questions,
            out,
            limit=limit,
            seed=seed,
            shard_size=shard_size,
            device=device,
            dtype=dtype,
            min_pixels=min_pixels,
            max_pixels=max_pixels,
            ray=ray,
            workers=workers,
            retries=retries,
            retry_failures=retry_failures,
        )
    except (CheckpointError, FolderInUse, ImpossibleTask, OtherSettings, RayMissing) as error:
        raise UserError(error) from error
    except (OSError, WorkersLost) as error:
        told = as_user_error(error) or UserError(error, 1)
        again = "what is there is complete, and the same command goes on"
        raise UserError(f"stopped: {told}; {again}", told.code) from error
    print_counts(found)
    if found.n_failed:
        raise typer.Exit(FAILED_QUESTIONS)


def print_counts(found: Sweep) -> None:
    """How many questions are done, and why others are not."""
    worked = found.n_done - found.n_failed
    line = f"{found.folder.path}: {worked} of {found.n_questions} questions have results"
    if found.n_failed:
        reasons = found.failures()["reason"].value_counts().items()
        line += f", {found.n_failed} failed ({', '.join(f'{n} {why}' for why, n in reasons)})"
    console().print(escape(line), soft_wrap=True)


def summarize(
    folder: Annotated[Path, typer.Argument(help="Of a sweep, finished or running.")],
    only_right: Annotated[
        bool, typer.Option("--only-right", help="Leave out questions not answered rightly.")
    ] = False,
    minimum_gap: Annotated[
        float | None,
        typer.Option(help="Least clean - corrupted probability (or --metric) of a trace."),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Resamples of the bootstrap.")] = 2000,
    level: Annotated[float, typer.Option(help="Of the intervals.")] = 0.95,
    seed: Annotated[int, typer.Option(help="Of the resampling.")] = 0,
    out: Annotated[
        Path | None, typer.Option(help="For tables and figures; by default FOLDER/summary.")
    ] = None,
) -> None:
    """Means over the questions of a sweep, with bootstrap intervals: tables and figures."""
    with waiting("loading mmlens ..."):
        from mmlens.sweeps import Sweep
    with explained(), waiting("resampling ..."):
        found = Sweep(folder)
        summary = found.summarize(
            only_right=only_right,
            minimum_gap=minimum_gap,
            samples=samples,
            level=level,
            seed=seed,
        )
    target = options.writable_folder(folder / "summary" if out is None else out)
    with waiting("drawing ..."):
        written = summary.write(target)
    print_counts(found)
    print_peaks(summary)
    names = ", ".join(path.name for path in written)
    console().print(escape(f"{target}: {names}"), soft_wrap=True)


def print_peaks(summary: Summary) -> None:
    """Where each mean is largest; without what is the same in all rows."""
    from mmlens.analyses.metrics import FALLING

    peaks = summary.peaks
    kept = [
        name
        for name in peaks.columns
        if name == "layer" or (name not in NUMBERS and peaks[name].nunique() > 1)
    ]
    kept.append("n")
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for name in (*kept, "mean", "interval"):
        table.add_column(escape(name.replace("_", " ")))
    for row in peaks.to_dict("records"):
        interval = f"{row['low']:.3f} to {row['high']:.3f}"
        table.add_row(*(escape(str(row[name])) for name in kept), f"{row['mean']:.3f}", interval)
    largest = "lowest" if summary.metric in FALLING else "largest"
    console().print(f"\n{largest} means over layers, {summary.counts['used']} questions:")
    console().print(table)


def with_ray_address(arguments: Sequence[str]) -> list[str]:
    """The arguments with "local" after a `--ray` that has no address.

    Click knows options whose value may be left out; typer does not.
    """
    filled = []
    for argument, following in zip(arguments, [*arguments, "--"][1:], strict=True):
        filled.append(argument)
        if argument == "--ray" and following.startswith("-"):
            filled.append("local")
    return filled
