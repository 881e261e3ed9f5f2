"""A worker: one model on one device, which turns shards into files.

The same class works in this process (`Here`) and as a Ray actor (`mmlens.sweeps.ray_engine`): both
hand out shards by `Turns`, workers write the results, and what comes back are reports. While a
worker computes, a thread of its own reads the questions to come: opens images, preprocesses and
tokenises.
"""

from __future__ import annotations

import copy
import gc
import hashlib
import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import psutil
import pyarrow as pa
import torch

from mmlens.data.reading import Refused
from mmlens.model.transformer import HookedMultimodalTransformer
from mmlens.sweeps.folder import Failure, Folder, ShardReport
from mmlens.sweeps.plan import Planned, Shard, Turns
from mmlens.sweeps.task import (
    Asked,
    Carried,
    ImpossibleTask,
    Task,
    UnusableRow,
    question_columns,
    reason_of,
)
from mmlens.utils.memory import is_out_of_memory
from mmlens.utils.printable import printable
from mmlens.utils.threads import requested

BACK_OFF = (64, 8, 1)
"""Rows computed at once after memory ran out, one after the other."""
CHUNK = 2**26
"""Bytes that are hashed at once."""

Tell = Callable[[bool], None]
"""Called after each question, with whether it worked."""


@dataclass(frozen=True)
class ModelSource:
    """How to get the model: a name, and options of `from_pretrained`."""

    name: str
    device: str | None = None
    dtype: str | None = None
    min_pixels: int | None = None
    max_pixels: int | None = None

    def load(self) -> HookedMultimodalTransformer:
        """The model, on its device."""
        dtype = getattr(torch, self.dtype) if self.dtype else None
        return HookedMultimodalTransformer.from_pretrained(
            self.name,
            device=self.device,
            dtype=dtype,
            min_pixels=self.min_pixels,
            max_pixels=self.max_pixels,
        )


@dataclass(frozen=True)
class ModelRecord:
    """Which model a worker has, and where."""

    name: str
    hash: str
    dtype: str
    device: str
    worker: str


class Worker:
    """Turns shards into files.

    Args:
        model: a model, or how to get one.
        task: what is done with each question.

    Raises:
        ImpossibleTask: (a ValueError) the model lacks what the task names.
        ValueError: `MMLENS_THREADS` is no number of threads, so that no question could be done.

    Example:
        >>> worker = Worker(ModelSource("demo"), TraceTask())
        >>> worker.run(folder, shards[0], shards[1])
    """

    def __init__(self, model: HookedMultimodalTransformer | ModelSource, task: Task) -> None:
        requested()
        given: Any = model
        self.model = given.load() if isinstance(given, ModelSource) else given
        self.task = task
        try:
            task.check(self.model)
        except ValueError as error:
            raise ImpossibleTask(str(error)) from error
        self._name = f"{socket.gethostname()}:{os.getpid()}"
        # A tokenizer cannot be used by two threads at once, so the reading one has its own.
        own = copy.deepcopy(self.model.tokenizer)
        self._processor = replace(self.model.processor, tokenizer=own)
        self._reading = ThreadPoolExecutor(1, "reading")
        self._read: dict[int, list[Future[Asked]]] = {}

    def record(self) -> ModelRecord:
        """Which model this is; takes a second per GB of weights or so."""
        device = self.model.device
        return ModelRecord(
            name=self.model.cfg.model_name or "",
            hash=model_hash(self.model),
            dtype=str(self.model.W_E.dtype).removeprefix("torch."),
            device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            worker=self._name,
        )

    def run(
        self, folder: Folder, shard: Shard, then: Shard | None = None, tell: Tell | None = None
    ) -> ShardReport:
        """Do the questions of a shard and write its file; read those of `then` in the meantime.

        Raises:
            OSError: the file cannot be written.
            torch.AcceleratorError: the GPU failed, and no question can be done any more.
        """
        began = time.perf_counter()
        if self.model.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.model.device)
        for index in self._read.keys() - {each.index for each in (shard, then) if each}:
            for future in self._read.pop(index):  # another worker took that shard
                future.cancel()
        for each in (shard, then):
            if each is not None and each.index not in self._read:
                asked = [self._reading.submit(self._asked, planned) for planned in each.questions]
                self._read[each.index] = asked
        tables: list[pa.Table] = []
        failures: list[Failure] = []
        carried = Carried()
        for planned, future in zip(shard.questions, self._read.pop(shard.index), strict=True):
            try:
                tables.append(self._rows(planned, future.result(), carried))
            except torch.AcceleratorError:
                raise
            except Exception as error:  # whatever it is, the other questions go on
                failures.append(failure_of(planned, error))
            if tell is not None:
                tell(not (failures and failures[-1].question == planned.row))
        report = ShardReport(
            sweep=folder.sweep,
            shard=shard.index,
            n_questions=len(shard.questions),
            failures=tuple(failures),
            seconds=round(time.perf_counter() - began, 3),
            memory=memory_used(self.model.device),
            worker=self._name,
        )
        return folder.write(report, tables, self.task.schema())

    def close(self) -> None:
        """Read no more."""
        self._reading.shutdown(wait=False, cancel_futures=True)

    def _asked(self, planned: Planned) -> Asked:
        """A question as the model takes it, on its device; runs in the reading thread."""
        if isinstance(planned.item, Refused):
            raise UnusableRow(planned.item.why)
        question_columns(planned.question, planned.images)
        asked = self.task.read(self._processor, planned.item)
        return replace(asked, inputs=asked.inputs.to(self.model.device))

    def _rows(self, planned: Planned, asked: Asked, carried: Carried) -> pa.Table:
        """The rows of a question as they are written; fewer at once where memory runs out."""
        before = carried.batch_rows
        tries = [before, *(n for n in BACK_OFF if before is None or n < before)]
        found = None
        for carried.batch_rows in tries:
            try:
                found = self.task.rows(self.model, asked, carried)
                break
            except Exception as error:
                if not is_out_of_memory(error) or carried.batch_rows == tries[-1]:
                    carried.batch_rows = before
                    raise
            # Outside of the handler, whose traceback holds on to tensors.
            carried.earlier.clear()
            gc.collect()
            if self.model.device.type == "cuda":
                torch.cuda.empty_cache()
        assert found is not None  # the last attempt returns or raises
        self.task.check_finite(found)
        common = {"question": planned.row, **question_columns(planned.question, planned.images)}
        rows = [common | row for row in found]
        return pa.Table.from_pylist(rows, schema=self.task.schema())


class Here:
    """One worker, in this process."""

    def __init__(self, model: HookedMultimodalTransformer | ModelSource, task: Task) -> None:
        self._model, self._task = model, task
        self._worker: Worker | None = None

    def start(self) -> ModelRecord:
        """Load the model, unless it is one already, and say which it is."""
        self._worker = Worker(self._model, self._task)
        return self._worker.record()

    def run(self, folder: Folder, shards: Sequence[Shard], tell: Tell) -> Iterator[ShardReport]:
        """One shard after the other: a report of each, once its file is there."""
        assert self._worker is not None
        turns = Turns(shards)
        while (turn := turns.take(self._worker)) is not None:
            yield self._worker.run(folder, *turn, tell)

    def stop(self) -> None:
        """End the reading thread."""
        if self._worker is not None:
            self._worker.close()


def failure_of(planned: Planned, error: BaseException, reason: str | None = None) -> Failure:
    """The row of a question that failed."""
    kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
    message = error.args[0] if isinstance(error, KeyError) and error.args else error
    return Failure(
        question=planned.row,
        source=printable(str(planned.question.source)),
        image=printable(" ".join(planned.images)),
        reason=reason or reason_of(error),
        message=printable(f"{kind}{' '.join(str(message).split())}"[:500]),
    )


def model_hash(model: HookedMultimodalTransformer) -> str:
    """A hash of every parameter's name, dtype, shape and bytes."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}".encode())
        content = parameter.detach().contiguous().flatten().view(torch.uint8)
        for part in content.split(CHUNK):
            digest.update(part.cpu().numpy())
    return digest.hexdigest()


def memory_used(device: torch.device) -> int:
    """Bytes: the most allocated on a GPU for this shard, or else the process's resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return psutil.Process().memory_info().rss
