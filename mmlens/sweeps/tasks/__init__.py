"""The built-in tasks of a sweep."""

from mmlens.sweeps.task import Task
from mmlens.sweeps.tasks.contributions import ContributionsTask
from mmlens.sweeps.tasks.edit import EditTask
from mmlens.sweeps.tasks.steer import SteerTask
from mmlens.sweeps.tasks.trace import TraceTask

__all__ = ["TASKS", "ContributionsTask", "EditTask", "SteerTask", "TraceTask"]

TASKS: dict[str, type[Task]] = {
    task.name: task for task in (TraceTask, ContributionsTask, EditTask, SteerTask)
}
"""The built-in tasks by their names."""
