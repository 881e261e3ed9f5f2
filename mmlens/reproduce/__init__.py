"""The paper's figures, on any model and any questions. One file per figure.

    study = Study.open(Settings(model="demo", limit=60))
    make("layers", study, "reproduced")

`settings` says what is asked of whom, and `study` chooses the questions and runs them. Basu et al.
2024 (arXiv 2406.04236) is "the paper" throughout.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from mmlens.plots.figure_folder import FigureWithTables, is_complete, write
from mmlens.reproduce.auroc import auroc_figure
from mmlens.reproduce.constraints import constraints_figure
from mmlens.reproduce.correctness import correctness_figure
from mmlens.reproduce.knockout import knockout_figure
from mmlens.reproduce.layers import layers_figure
from mmlens.reproduce.settings import Settings
from mmlens.reproduce.study import Study
from mmlens.reproduce.visual_tokens import visual_tokens_figure
from mmlens.reproduce.windows import windows_figure
from mmlens.utils.resumable import locked

__all__ = ["FIGURES", "FigureWithTables", "Settings", "Study", "is_complete", "make", "write"]

FIGURES: dict[str, Callable[[Study], FigureWithTables]] = {
    "layers": layers_figure,
    "constraints": constraints_figure,
    "windows": windows_figure,
    "visual-tokens": visual_tokens_figure,
    "knockout": knockout_figure,
    "correctness": correctness_figure,
    "auroc": auroc_figure,
}


def make(name: str, study: Study, out: str | Path) -> list[Path]:
    """Make a figure and write its folder in `out`; returns its files.

    Where this was stopped, it goes on after the questions that are done: until the figure is
    complete, what was found for each of them is kept in the folder.

    Raises:
        FolderInUse: (a ValueError) another process makes the figure.
        ValueError: no question can be used.
    """
    with locked(Path(out) / name, "reproduction") as folder:
        study.unfinished = unfinished = folder / ".unfinished"
        try:
            made = FIGURES[name](study)
        finally:
            study.unfinished = None
        written = write(made, study.settings, study.model.device, out)
        shutil.rmtree(unfinished, ignore_errors=True)
    return written
