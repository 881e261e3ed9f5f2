"""The paper's figures, on any model and any questions. One file per figure.

    study = Study.open(Settings(model="demo", limit=60))
    write(FIGURES["layers"](study), study, "reproduced")

`settings` says what is asked of whom, `study` chooses the questions and runs them, `figure` writes
what a figure is made of. Basu et al. 2024 (arXiv 2406.04236) is "the paper" throughout.
"""

from __future__ import annotations

from collections.abc import Callable

from mmlens.reproduce.auroc import auroc
from mmlens.reproduce.constraints import constraints
from mmlens.reproduce.correctness import correctness
from mmlens.reproduce.figure import Figure, is_complete, write
from mmlens.reproduce.knockout import knockout
from mmlens.reproduce.layers import layers
from mmlens.reproduce.settings import Settings
from mmlens.reproduce.study import Study
from mmlens.reproduce.visual_tokens import visual_tokens
from mmlens.reproduce.windows import windows

__all__ = ["FIGURES", "Figure", "Settings", "Study", "is_complete", "write"]

FIGURES: dict[str, Callable[[Study], Figure]] = {
    "layers": layers,
    "constraints": constraints,
    "windows": windows,
    "visual-tokens": visual_tokens,
    "knockout": knockout,
    "correctness": correctness,
    "auroc": auroc,
}
