"""Workers on a Ray cluster: one per GPU, on this machine or on many."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from mmlens.sweeps.folder import Folder, ShardReport
from mmlens.sweeps.plan import Shard, Turns
from mmlens.sweeps.task import Task
from mmlens.sweeps.worker import ModelRecord, ModelSource, Tell, Worker, failure_of

PATIENCE = 60.0
"""Seconds after which it is said, again and again, what the start of the first worker needs."""


class RayMissing(ValueError):
    """Ray is not installed."""


class WorkersLost(RuntimeError):
    """No worker could start, or none is left, or one has another model than the others."""


@dataclass
class OnRay:
    """A worker per GPU of a Ray cluster, or some on its CPUs.

    A worker that is lost (killed, out of memory, its machine gone) is replaced, and its shard done
    again. A shard that has taken more than `retries` workers with it is given up: its questions
    are failures. Where workers run, and when, is Ray's business.
    """

    model: ModelSource
    task: Task
    address: str = "local"
    """"local" starts Ray on this machine; "auto" or host:port joins a cluster."""
    workers: int | None = None
    """By default one per GPU, or one where there is none."""
    retries: int = 2
    remark: Callable[[str], None] = print
    """Takes a line for the log."""
    _busy: dict[Any, tuple[Any, Shard | None]] = field(default_factory=dict, init=False)
    """What is awaited, of which worker, and its shard: None while it starts."""
    _idle: list[Any] = field(default_factory=list, init=False)
    _tries: Counter[int] = field(default_factory=Counter, init=False)
    """How many workers each shard has taken with it."""

    def start(self) -> ModelRecord:
        """Start or join Ray, and wait for the first worker's model.

        Raises:
            RayMissing: (a ValueError) Ray is not installed.
            ConnectionError: no cluster at that address.
            WorkersLost: the first worker could not start.
        """
        ray = self._ray = import_ray()
        local = self.address == "local"
        self._was_there = ray.is_initialized()
        if not self._was_there:
            ray.init(
                address="local" if local else self.address,
                include_dashboard=False if local else None,
                logging_level=logging.WARNING,
                log_to_driver=False,
            )
        resources = ray.cluster_resources()
        gpus, cpus = int(resources.get("GPU", 0)), int(resources.get("CPU", 1))
        n_workers = self.workers or max(1, gpus)
        if gpus and self.model.device != "cpu":
            self._needs = {"num_gpus": min(1.0, gpus / n_workers)}
        else:  # Ray gives a worker as many threads as it has CPUs
            nodes = [node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]]
            self._needs = {"num_cpus": float(cpus_of_a_worker(nodes, n_workers))}
        for _ in range(n_workers):
            self._hire()
        while not (ready := ray.wait(list(self._busy), num_returns=1, timeout=PATIENCE)[0]):
            self.remark(
                f"Ray ({self.address}): no worker is ready. They load the model, or wait for a "
                f"place: each needs {self._needs}, and free are {ray.available_resources()}"
            )
        try:
            self._record: ModelRecord = ray.get(ready[0])
        except ray.exceptions.RayActorError as error:
            raise WorkersLost(f"a worker could not start: {last_line(error)}") from error
        self.remark(
            f"Ray ({self.address}): {n_workers} workers with {self._needs} each, of {cpus} CPUs "
            f"and {gpus} GPUs"
        )
        return self._record

    def run(self, folder: Folder, shards: Sequence[Shard], tell: Tell) -> Iterator[ShardReport]:
        """Shards go to whoever is free; reports come in the order in which shards are done.

        Raises:
            WorkersLost: no worker is left and none can start, or one has another model.
            OSError: a worker cannot write its results.
        """
        turns, left = Turns(shards), len(shards)
        while left:
            for worker in list(self._idle):
                if (turn := turns.take(worker)) is not None:
                    self._idle.remove(worker)
                    self._busy[worker.run.remote(folder, *turn)] = (worker, turn[0])
            ready, _ = self._ray.wait(list(self._busy), num_returns=1)
            report = self._finished(ready[0], folder, turns)
            if report is not None:
                for index in range(report.n_questions):
                    tell(index >= len(report.failures))
                left -= 1
                yield report

    def stop(self) -> None:
        """End the workers, and Ray if it was started here."""
        if not hasattr(self, "_was_there"):
            return
        try:
            for worker in [*self._idle, *(worker for worker, _ in self._busy.values())]:
                self._ray.kill(worker)
        finally:
            if not self._was_there:
                self._ray.shutdown()

    def _hire(self) -> None:
        """A new worker; it is awaited like a shard."""
        worker = self._ray.remote(Worker).options(max_restarts=0, **self._needs)
        worker = worker.remote(self.model, self.task)
        self._busy[worker.record.remote()] = (worker, None)

    def _finished(self, done: Any, folder: Folder, turns: Turns) -> ShardReport | None:
        """What became of a call: a report, or None where there is none to wait for."""
        worker, shard = self._busy.pop(done)
        try:
            found = self._ray.get(done)
        except (self._ray.exceptions.RayActorError, torch.AcceleratorError) as error:
            self._ray.kill(worker)
            turns.give_back(worker)
            return self._lost(shard, last_line(error), folder, turns)
        self._idle.append(worker)
        if shard is not None:
            return found
        if found.hash != self._record.hash:
            raise WorkersLost(
                f"worker {found.worker} has another model than {self._record.worker}: hashes "
                f"{found.hash[:12]} and {self._record.hash[:12]}"
            )
        return None

    def _lost(
        self, shard: Shard | None, why: str, folder: Folder, turns: Turns
    ) -> ShardReport | None:
        """Replace a worker that was at work; its shard is done again, or given up."""
        if shard is None:
            self.remark(f"a worker could not start: {why}")
            if not self._busy and not self._idle:
                raise WorkersLost(f"no worker is left; the last one could not start: {why}")
            return None
        self._hire()
        self._tries[shard.index] += 1
        self.remark(
            f"lost a worker at shard {shard.index}, {self._tries[shard.index]} time(s): {why}"
        )
        if self._tries[shard.index] <= self.retries:
            turns.give_back(None, shard)
            return None
        failures = tuple(
            failure_of(each, WorkersLost(why), "worker lost") for each in shard.questions
        )
        report = ShardReport(folder.sweep, shard.index, len(shard.questions), failures)
        return folder.write(report, [], self.task.schema())


def cpus_of_a_worker(nodes: Sequence[float], n_workers: int) -> int:
    """Return the most CPUs that each worker can have if all are to have a place; 1 at least.

    A worker is on one machine, and Ray waits for ever for more CPUs than any machine has.

    Args:
        nodes: CPUs of each machine.
    """
    whole = [int(cpus) for cpus in nodes]
    return next(
        (n for n in range(max(whole, default=1), 1, -1) if sum(c // n for c in whole) >= n_workers),
        1,
    )


def import_ray() -> Any:
    """The package."""
    try:
        import ray
    except ImportError as error:
        raise RayMissing(
            "a sweep on Ray needs the package ray: pip install 'mmlens[ray]' (without --ray it "
            "runs in this process)"
        ) from error
    return ray


def last_line(error: BaseException) -> str:
    """The end of an error's text, where Ray has what the worker said."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
