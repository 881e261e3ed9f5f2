"""Where workers live: `Here`, in this process; on a Ray cluster see `mmlens.sweeps.ray_engine`.

Both hand out shards by the same `Turns` to the same `Worker`s, which write the results themselves;
what comes back are reports.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from mmlens.sweeps.folder import ShardReport
from mmlens.sweeps.plan import Shard, Turns
from mmlens.sweeps.task import Task
from mmlens.sweeps.worker import ModelRecord, ModelSource, Target, Tell, Worker

if TYPE_CHECKING:
    from mmlens.model import HookedMultimodalTransformer

__all__ = ["Engine", "Here", "Remark"]

Remark = Callable[[str], None]
"""Takes a line for the log."""


@runtime_checkable
class Engine(Protocol):
    """Something that runs shards."""

    def start(self) -> ModelRecord:
        """Get the model ready, and say which it is."""
        ...

    def run(self, target: Target, shards: Sequence[Shard], tell: Tell) -> Iterator[ShardReport]:
        """A report of every shard, once its file is there."""
        ...

    def stop(self) -> None:
        """Let go of threads and processes."""
        ...


class Here:
    """One worker, in this process."""

    def __init__(self, model: HookedMultimodalTransformer | ModelSource, task: Task) -> None:
        self._model, self._task = model, task
        self._worker: Worker | None = None

    def start(self) -> ModelRecord:
        """Load the model, unless it is one already."""
        self._worker = Worker(self._model, self._task)
        return self._worker.record()

    def run(self, target: Target, shards: Sequence[Shard], tell: Tell) -> Iterator[ShardReport]:
        """One shard after the other; `tell` is called after each question."""
        assert self._worker is not None
        turns = Turns(shards)
        while (turn := turns.take(self._worker)) is not None:
            yield self._worker.run(target, *turn, tell)

    def stop(self) -> None:
        """End the reading thread."""
        if self._worker is not None:
            self._worker.close()
