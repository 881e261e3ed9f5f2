"""Sweeps on Ray: the same table as in this process, also when workers are killed."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from pathlib import Path

import pytest
from sweep_cases import assert_same, made_questions, swept
from tiny_checkpoint import write_tiny_llava

from mmlens.data import VisualQuestion
from mmlens.sweeps import Sweep, WorkersLost

ray = pytest.importorskip("ray", reason="ray is an extra: pip install 'mmlens[ray]'")
pytestmark = pytest.mark.slow  # every worker imports torch: 10 s

QUESTIONS = 24


@pytest.fixture(scope="module")
def cluster():
    """One for all tests; workers are new in each."""
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_llava(tmp_path_factory.mktemp("ray") / "model", n_layers=2)


@pytest.fixture
def questions(tmp_path, seed):
    made = made_questions(tmp_path, n=QUESTIONS, n_images=QUESTIONS)
    texts = ("this country is", "the capital of this country", "in this country which city")
    return [
        VisualQuestion(
            random.choice(texts), each.image, visual_constraint="this country", source=each.source
        )
        for each in made
    ]


def workers_of(out: Path) -> set[str]:
    """Hosts and processes that wrote the results."""
    return {report.worker for report in Sweep(out)._reports}


def test_two_workers_give_the_table_of_one_process(cluster, folder, questions, tmp_path):
    expected = swept(folder, questions, tmp_path / "here", dtype="float64")
    found = swept(folder, questions, tmp_path / "ray", ray="local", workers=2, dtype="float64")
    assert_same(found, expected)
    assert str(os.getpid()) not in {
        name.rpartition(":")[2] for name in workers_of(tmp_path / "ray")
    }
    log = (tmp_path / "ray" / "log.txt").read_text()
    assert "2 workers" in log


def test_killed_workers_are_replaced(cluster, folder, questions, tmp_path):
    expected = swept(folder, questions, tmp_path / "here", shard_size=1, dtype="float64")
    out = tmp_path / "ray"
    killed: list[int] = []
    stopped = threading.Event()

    def kill() -> None:
        """Two workers, each some time after it has written its first results."""
        while not stopped.wait(0.01) and len(killed) < 2:
            there = {path: path.stat() for path in out.glob("results/*.parquet")}
            pids = {int(name.rpartition(":")[2]) for name in (workers_of(out) if there else ())}
            for pid in pids - set(killed):
                time.sleep(random.uniform(0, 0.2))
                os.kill(pid, signal.SIGKILL)
                killed.append(pid)
                break

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        found = swept(folder, questions, out, shard_size=1, ray="local", workers=1, dtype="float64")
    finally:
        stopped.set()
        thread.join()
    assert_same(found, expected)
    log = (out / "log.txt").read_text()
    assert log.count("lost a worker") <= len(killed)


def test_a_shard_that_kills_its_workers_is_given_up(cluster, folder, questions, tmp_path):
    from dataclasses import dataclass

    from mmlens.sweeps import TraceTask, sweep

    @dataclass(frozen=True, kw_only=True)
    class Deadly(TraceTask):
        def rows(self, model, asked, carried):
            if asked.question.source == "made/0":
                os.kill(os.getpid(), 9)
            return super().rows(model, asked, carried)

    found = sweep(
        Deadly(),
        folder,
        questions[:4],
        tmp_path / "out",
        shard_size=1,
        ray="local",
        workers=1,
        retries=1,
        progress=False,
    )
    (failure,) = found.failures().to_dict("records")
    assert (failure["question"], failure["reason"]) == (0, "worker lost")
    assert found.n_done == 4
    assert set(found.results()["question"]) == {1, 2, 3}


def test_workers_that_cannot_start_are_told_of(cluster, questions, tmp_path):
    with pytest.raises(WorkersLost, match="no-such-model"):
        swept("no-such-model", questions, tmp_path / "out", ray="local")
