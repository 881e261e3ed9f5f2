"""`sweep`: an analysis over a data set, one folder of results."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mmlens.demo import is_embedded
from mmlens.model.transformer import HookedMultimodalTransformer
from mmlens.sweeps.folder import Folder, ShardReport
from mmlens.sweeps.items import Item
from mmlens.sweeps.plan import Shard, data_hash, plan
from mmlens.sweeps.progress import Log, SweepProgress
from mmlens.sweeps.ray_engine import OnRay
from mmlens.sweeps.results import Sweep
from mmlens.sweeps.task import Task
from mmlens.sweeps.tasks import TASKS
from mmlens.sweeps.worker import Here, ModelSource
from mmlens.utils.resumable import Resumable, versions

FORMAT = 1
"""Of the folder; another number means other columns, or another meaning of them."""
PACKAGES = ("torch", "transformers", "transformer_lens", "numpy", "pyarrow")


def sweep(
    task: str | Task,
    model: HookedMultimodalTransformer | str | Path,
    data: Sequence[Item] | str | Path,
    out: str | Path,
    *,
    images: str | Path | None = None,
    annotations: tuple[str, str] | None = None,
    limit: int | None = None,
    seed: int = 0,
    shard_size: int = 8,
    device: str | None = None,
    dtype: str | None = None,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
    ray: str | None = None,
    workers: int | None = None,
    retries: int = 2,
    retry_failures: bool = False,
    progress: bool | None = None,
    **options: Any,
) -> Sweep:
    """Do something with every question of a data set, and write what comes of it to a folder.

    Called again with the same arguments it goes on where it was stopped, however that happened:
    complete shards are skipped, all others are done again. Nothing is ever written twice.

    Args:
        task: "trace", "contributions", "edit" or "steer", or a `Task` of your own.
        model: a model, or a name for `from_pretrained` (on Ray a name, since workers load it).
        data: questions (for "trace" also `ImagePair`s, for "edit" `EditCase`s), or what the task's
            `open` takes: "demo", a path, "name:path", see `mmlens.data.open_questions`.
        out: the folder; see `docs/sweeps.md` for what is in it.
        images: the folder of the images.
        annotations: OK-VQA's questions and annotations, with the answers.
        limit: a random sample of so many questions; by default all.
        seed: of the sample, and of the choice among several images of a question.
        shard_size: questions that are written, or done again, together.
        device: where the model goes; by default the GPU if there is one.
        dtype: of its weights, "bfloat16"; by default the checkpoint's own.
        min_pixels: what an image has at least, scaled, as in `Processor.bounded`; a model that is
            given has its own bounds.
        max_pixels: the most.
        ray: None computes in this process; "local" starts Ray on this machine, "auto" or
            "host:port" joins a cluster.
        workers: on Ray; by default one per GPU.
        retries: how many lost workers a shard may cost beyond the first.
        retry_failures: do the shards that have failures again.
        progress: whether to show a live line; by default where stderr is a terminal.
        options: settings of the task, such as `sites`, `windows`, `roles` of `TraceTask`.

    Raises:
        OtherSettings: (a ValueError) the folder holds a sweep with other settings.
        FolderInUse: (a ValueError) another process is writing to it.
        ImpossibleTask: (a ValueError) the model has no such sites or layers.
        RayMissing: (a ValueError) `ray` is given and not installed.
        WorkersLost: no worker is left on Ray.
        OSError: results cannot be written. What is there is complete; call again when they can.
        TypeError: the task has no such option.

    Example:
        >>> found = mmlens.sweep("trace", "demo", "demo", "runs/trace", limit=100, windows=(1, 3))
        >>> found.summarize().figures["indirect_effect"].show()
    """
    chosen = make_task(task, options)
    if isinstance(data, str | Path):
        data = chosen.open(data, images, annotations, seed)
    shards = plan(data, limit=limit, seed=seed, shard_size=shard_size)
    source: Any = model
    if isinstance(model, str | Path):
        source = ModelSource(absolute_if_there(model), device, dtype, min_pixels, max_pixels)
    elif (min_pixels, max_pixels) != (None, None):
        raise ValueError(
            f"min_pixels={min_pixels} and max_pixels={max_pixels} are for a model that is given by "
            "name; set them where yours is loaded: from_pretrained(name, max_pixels=...)"
        )
    log = Log(Folder(Path(out)).log)
    engine: Here | OnRay = Here(source, chosen)
    if ray is not None:
        if not isinstance(source, ModelSource):
            raise ValueError(
                "on Ray each worker loads the model by itself: give its name or folder"
            )
        engine = OnRay(source, chosen, ray, workers, retries, log)
    with Folder(Path(out)).locked() as folder:
        try:
            bounds = (min_pixels, max_pixels)
            swept(folder, chosen, shards, engine, log, retry_failures, progress, bounds)
        except BaseException as error:
            log(f"stopped by {type(error).__name__}: {' '.join(str(error).split())}")
            raise
        finally:
            engine.stop()
    return Sweep(out)


def swept(
    folder: Folder,
    task: Task,
    shards: Sequence[Shard],
    engine: Here | OnRay,
    log: Log,
    retry_failures: bool,
    live: bool | None,
    bounds: tuple[int | None, int | None] = (None, None),
) -> None:
    """Do the shards that are missing."""
    identity = {
        "format": FORMAT,
        "mmlens": version("mmlens"),
        "task": task.name,
        "settings": task.settings(),
        "data": data_hash(shards),
        "shards": len(shards),
    }
    if bounds != (None, None):  # of an image's pixels; other tokens, so other results
        identity["pixels"] = list(bounds)
    total = sum(len(shard.questions) for shard in shards)
    folder.check(identity)  # before minutes of loading
    log(f"{task.name}: {total} questions in {len(shards)} shards; process on {platform.node()}")
    model = engine.start()
    log(f"{model.name} ({model.dtype}, sha256 {model.hash[:12]}) on {model.device}")
    identity["model"] = model.hash
    manifest = {
        "identity": identity,
        "n_questions": total,
        "model": asdict(model),
        "keys": list(task.keys),
        "measures": list(task.measures),
        "columns": {field.name: str(field.type) for field in task.schema()},
        "versions": [versions(PACKAGES)],
        "begun": f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC",
    }
    folder = folder.begin(manifest)
    # Workers write the files, so that no results go from one process to another.
    run: Resumable[int, ShardReport] = Resumable(dict.fromkeys(range(len(shards))))
    run.found, remarks = folder.finished()
    for remark in remarks:
        log(remark)
    if retry_failures:
        for index in [index for index, report in run.found.items() if report.failures]:
            folder.shard(index).unlink()
            del run.found[index]
    folder.write_failures(run.found)
    n_done = sum(report.n_questions for report in run.found.values())
    n_failed = sum(len(report.failures) for report in run.found.values())
    log(f"{len(run.found)} shards are there ({n_done} questions, {n_failed} failed)")
    missing = [shards[index] for index in run.missing]
    with SweepProgress(log, total, n_done, n_failed, live) as shown:
        for report in engine.run(folder, missing, shown.question):
            run.add(report.shard, report)
            shown.shard(report)
            if report.failures:
                folder.write_failures(run.found)
    log(f"complete: {shown.total} questions, {shown.failed} failed")


def make_task(task: str | Task, options: dict[str, Any]) -> Task:
    """A task by its name and settings."""
    if isinstance(task, Task):
        if options:
            raise ValueError(f"{type(task).__name__} has its settings already: {sorted(options)}")
        return task
    if task not in TASKS:
        raise ValueError(f"no task {task!r}; there are {', '.join(TASKS)}")
    return TASKS[task](**options)


def absolute_if_there(model: str | Path) -> str:
    """A folder or file by its absolute path, for workers elsewhere; a name as it is."""
    path = Path(model).expanduser()
    return str(path.absolute()) if path.exists() and not is_embedded(model) else str(model)
