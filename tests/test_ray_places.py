"""Where Ray has room for workers, without Ray: it takes 10 s to start one."""

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmlens.sweeps import TraceTask, ray_engine
from mmlens.sweeps.ray_engine import OnRay, cpus_of_a_worker
from mmlens.sweeps.worker import ModelRecord, ModelSource

RECORD = ModelRecord("tiny", hash="0", dtype="float32", device="cpu", worker="host:1")


@pytest.mark.parametrize(
    ("nodes", "n_workers", "expected"),
    [
        ([8.0], 1, 8),
        ([8.0], 3, 2),
        ([2.0], 4, 1),  # two are at work at a time
        ([8.0, 8.0], 1, 8),  # not 16, which no machine has
        ([8.0, 8.0], 2, 8),
        ([8.0, 8.0], 3, 4),
        ([0.0, 4.0, 1.0], 2, 2),  # the first runs the cluster alone
        ([0.0], 1, 1),
        ([], 1, 1),
    ],
)
def test_workers_have_the_cpus_of_one_machine(nodes, n_workers, expected):
    assert cpus_of_a_worker(nodes, n_workers) == expected


@given(st.lists(st.integers(0, 40), min_size=1, max_size=6), st.integers(1, 30))
def test_all_workers_find_a_place_if_they_can(nodes, n_workers):
    cpus = cpus_of_a_worker(nodes, n_workers)
    places = sum(node // cpus for node in nodes)
    assert places >= n_workers or cpus == 1
    assert sum(node // (cpus + 1) for node in nodes) < n_workers  # and no more would do


def test_it_is_said_what_a_worker_waits_for(monkeypatch):
    """A cluster that others have filled: nothing is ready in the first two periods."""
    answers = [([], []), ([], []), ([RECORD], [])]

    class FakeRay(SimpleNamespace):
        """As much of Ray as the start uses."""

        def remote(self, worker):
            call = SimpleNamespace(remote=lambda: RECORD)
            made = SimpleNamespace(remote=lambda *given: SimpleNamespace(record=call))
            return SimpleNamespace(options=lambda **needs: made)

        def wait(self, waiting, num_returns, timeout):
            assert waiting == [RECORD] and timeout == ray_engine.PATIENCE
            return answers.pop(0)

    fake = FakeRay(
        is_initialized=lambda: True,
        cluster_resources=lambda: {"CPU": 6.0},
        available_resources=lambda: {"memory": 5.0},
        nodes=lambda: [
            {"Alive": True, "Resources": {"CPU": 2.0}},
            {"Alive": True, "Resources": {"CPU": 3.0}},
            {"Alive": False, "Resources": {"CPU": 64.0}},
        ],
        get=lambda ready: ready,
        exceptions=SimpleNamespace(RayActorError=RuntimeError),
    )
    monkeypatch.setattr(ray_engine, "import_ray", lambda: fake)
    said: list[str] = []
    engine = OnRay(ModelSource("demo", device="cpu"), TraceTask(), "auto", remark=said.append)
    assert engine.start() == RECORD
    assert len(said) == 3 and said[0] == said[1]
    assert "'num_cpus': 3.0" in said[0] and "{'memory': 5.0}" in said[0]
