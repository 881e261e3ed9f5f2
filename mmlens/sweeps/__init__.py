"""Sweeps: an analysis over a whole data set, which may be stopped at any time and goes on.

    mmlens.sweep("trace", "demo", "demo", "runs/trace", windows=(1, 3, 5))
    Sweep("runs/trace").summarize().write("runs/trace/summary")

- `task`: what is done with a question; `trace`, `contributions`, `edit`, or a dataclass of your own
- `items`, `plan`: which questions, in which shards, and whose turn it is
- `folder`: the files: whole or not at all, and never mixed
- `worker`: one model that turns shards into files, in this process or as a Ray actor
- `engines`, `ray_engine`: where workers live
- `progress`: the live line and the log
- `run`: `sweep`, which puts them together
- `results`, `summary`: what was written, and its means
"""

from mmlens.sweeps.contributions import ContributionsTask
from mmlens.sweeps.edit import EditTask
from mmlens.sweeps.folder import FolderInUse, OtherSettings
from mmlens.sweeps.ray_engine import RayMissing, WorkersLost
from mmlens.sweeps.results import Sweep
from mmlens.sweeps.run import sweep
from mmlens.sweeps.summary import Summary, summarize
from mmlens.sweeps.task import Asked, Carried, ImpossibleTask, Task
from mmlens.sweeps.trace import TraceTask

TASKS: dict[str, type[Task]] = {
    task.name: task for task in (TraceTask, ContributionsTask, EditTask)
}
"""The built-in tasks by their names."""

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
    "Summary",
    "Sweep",
    "Task",
    "TraceTask",
    "WorkersLost",
    "summarize",
    "sweep",
]
