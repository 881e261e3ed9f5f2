"""Sweeps: an analysis over a whole data set, which may be stopped at any time and goes on.

    mmlens.sweep("trace", "demo", "demo", "runs/trace", windows=(1, 3, 5))
    Sweep("runs/trace").summarize().write("runs/trace/summary")

- `task`: what is done with a question, a dataclass like those of `tasks`, or one of your own
- `items`, `plan`: which questions, in which shards, and whose turn it is
- `folder`: the files: whole or not at all, and never mixed
- `worker`, `ray_engine`: models that turn shards into files, in this process or as Ray actors
- `progress`: the live line and the log
- `run`: `sweep`, which puts them together
- `results`, `summary`: what was written, and its means
"""

from mmlens.sweeps.folder import OtherSettings
from mmlens.sweeps.ray_engine import RayMissing, WorkersLost
from mmlens.sweeps.results import Sweep
from mmlens.sweeps.run import sweep
from mmlens.sweeps.summary import Summary, summarize
from mmlens.sweeps.task import Asked, Carried, ImpossibleTask, Task
from mmlens.sweeps.tasks import TASKS, ContributionsTask, EditTask, SteerTask, TraceTask
from mmlens.utils.resumable import FolderInUse

__all__ = [
    "TASKS",
    "Asked",
    "Carried",
    "ContributionsTask",
    "EditTask",
    "FolderInUse",
    "ImpossibleTask",
    "OtherSettings",
    "RayMissing",
    "SteerTask",
    "Summary",
    "Sweep",
    "Task",
    "TraceTask",
    "WorkersLost",
    "summarize",
    "sweep",
]
