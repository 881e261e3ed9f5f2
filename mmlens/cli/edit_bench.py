"""`mmlens edit-bench`: editing methods side by side, by layer, or one edit after another."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from mmlens.cli import options
from mmlens.cli.console import err, waiting
from mmlens.cli.console import out as console
from mmlens.cli.edit import MethodSettings, method_settings
from mmlens.cli.errors import explained
from mmlens.cli.from_settings import from_settings
from mmlens.cli.trace import open_model
from mmlens.utils.progress import progress_bar

DEFAULT = "multedit,fine_tune,fine_tune@all,constrained_fine_tune"


@from_settings(
    "edit_bench/settings.py:BenchSettings",
    called={
        "method_settings": "set",
        "n_key_questions": "key_questions",
        "n_kept": "kept",
    },
    declared={"method_settings": MethodSettings},
    defaults={"methods": DEFAULT, "method_settings": None},
    least={
        "limit": 1,
        "n_unrelated": 1,
        **dict.fromkeys(("n_key_questions", "n_kept", "n_preserved", "n_preserved_whole"), 0),
    },
    without=("at", "samples", "level"),
)
def edit_bench(
    settings: dict[str, Any],
    device: options.Device = None,
    dtype: options.Dtype = None,
    out: Annotated[Path, typer.Option(help="A folder for results, tables and figures.")] = Path(
        "mmlens-edit-bench"
    ),
) -> None:
    """Measure what edits do: efficacy, generalisation, specificity, portability, drift, cost.

    Every edit's results are kept in the folder as they are found: the same command goes on where it
    was stopped.
    """
    names = settings["methods"]
    named = [name.partition("@")[0] for name in names]
    plain = [name.partition("-")[0] for name in named]
    given = settings.pop("method_settings", None)
    given = method_settings(given, tuple(dict.fromkeys([*plain, *named])))
    folder = options.writable_folder(out)
    options.check_device(device)
    with waiting("loading mmlens ..."):
        from mmlens.data.open import open_cases
        from mmlens.edit_bench.bench import EditBench
        from mmlens.edit_bench.settings import BenchSettings, Variant
    chosen = BenchSettings(**settings, method_settings=given)
    with explained():
        for name in names:
            Variant.parsed(name, [0])
        cases = open_cases(chosen.data, chosen.images, seed=chosen.seed)
    bounds = (chosen.min_pixels, chosen.max_pixels)
    loaded = open_model(chosen.model, device, dtype, bounds)
    with explained():
        bench = EditBench(chosen, loaded, cases)
        _, counts = bench.chosen
    err().print(escape(", ".join(f"{what} {n}" for what, n in counts.items())), style="dim")
    with progress_bar("editing") as moved, explained():
        found = bench.evaluations(folder, moved)
    with waiting("drawing ..."):
        written = bench.write(found, folder)
    for variant, each in found.items():
        for reason, n in each.metadata["failed"].items():
            line = f"{variant.label}: {n} edits could not be made: {reason}"
            err().print(escape(line), soft_wrap=True)
    for path in written:
        console().print(escape(str(path)), soft_wrap=True)
