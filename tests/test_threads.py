"""How many threads a run may use: its size, the cores that are free, what others have chosen."""

import math
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_models import small_inputs, small_model
from thread_cases import MOST, counting, pretended_free_cores  # noqa: F401 (a fixture)

from mmlens.utils import threads
from mmlens.utils.threads import FreeCores, Reading, requested, threads_for

# The choice


@pytest.mark.parametrize(
    ("work", "free", "most", "expected"),
    [
        (10**9, 8.0, 8, 8),
        (10**9, math.inf, 8, 8),
        (10**9, 7.7, 8, 8),  # others used a third of a core
        (10**9, 7.5, 8, 7),
        (10**9, 1.9, 2, 2),
        (10**9, 1.0, 2, 1),
        (10**9, 0.1, 2, 1),
        (10**9, 100.0, 4, 4),
        (None, 3.0, 8, 3),
        (5 * threads.REPAID, 8.0, 8, 5),
        (5 * threads.REPAID, 2.0, 8, 2),
        (threads.REPAID - 1, 8.0, 8, 1),
        (0, 8.0, 8, 1),
    ],
)
def test_threads_follow_the_work_and_what_is_free(work, free, most, expected):
    assert threads_for(work, free, most) == expected


@given(st.integers(0, 10**12), st.floats(0, 300), st.integers(1, 256))
def test_more_work_and_more_free_cores_never_mean_fewer_threads(work, free, most):
    number = threads_for(work, free, most)
    assert 1 <= number <= most
    assert number <= threads_for(2 * work, free, most)
    assert number <= threads_for(work, free + 0.3, most)
    assert number <= threads_for(None, free, most)
    assert number - 1 < free + 1e-9  # each but the first has most of a core


# What is free


def looks(monkeypatch, number, **rates) -> float:
    """What is free after half a second in which the counters grew at these rates."""
    zeros = Reading(*[0.0] * 5)
    readings = [zeros, zeros._replace(at=0.5, **{k: 0.5 * v for k, v in rates.items()})]
    monkeypatch.setattr(Reading, "now", classmethod(lambda cls: readings.pop(0)))
    monkeypatch.setattr(threads, "cpu_quota", lambda: math.inf)
    monkeypatch.setattr(threads.time, "perf_counter", lambda: 0.5)
    return FreeCores().look(number)


@pytest.mark.parametrize(
    ("rates", "number", "expected"),
    [
        # Two cores that nobody uses; of which we use one, or both.
        ({"idle": 2.0, "counted": 2.0, "process": 0.0, "thread": 0.0}, 2, 2.0),
        ({"idle": 1.0, "counted": 2.0, "process": 1.0, "thread": 1.0}, 1, 2.0),
        ({"idle": 0.0, "counted": 2.0, "process": 2.0, "thread": 1.0}, 2, 2.0),
        # Another program has one; has one and we want two; has both.
        ({"idle": 0.0, "counted": 2.0, "process": 1.0, "thread": 1.0}, 1, 1.0),
        ({"idle": 0.0, "counted": 2.0, "process": 1.0, "thread": 0.5}, 2, 1.0),
        ({"idle": 0.0, "counted": 2.0, "process": 0.7, "thread": 0.7}, 1, 0.7),
        # Another thread of this process computes beside ours.
        ({"idle": 0.0, "counted": 2.0, "process": 2.0, "thread": 1.0}, 1, 1.0),
        # The system keeps no account.
        ({"idle": 0.0, "counted": 0.0, "process": 1.0, "thread": 1.0}, 1, math.inf),
    ],
)
def test_free_is_what_is_idle_and_what_we_use(monkeypatch, rates, number, expected):
    assert looks(monkeypatch, number, **rates) == pytest.approx(expected)


def test_the_quota_limits_what_is_free(monkeypatch):
    idle = Reading(0.0, 0.0, 0.0, 0.0, 0.0)
    readings = [idle, Reading(1.0, 64.0, 64.0, 0.0, 0.0)]
    monkeypatch.setattr(Reading, "now", classmethod(lambda cls: readings.pop(0)))
    monkeypatch.setattr(threads.time, "perf_counter", lambda: 1.0)
    monkeypatch.setattr(threads, "cpu_quota", lambda: 2.0)
    assert FreeCores().look(1) == 2.0


def test_cores_are_read_again_only_after_a_while(monkeypatch):
    """In between the last answer holds; before there is one, all are taken to be free."""
    now = SimpleNamespace(at=0.0)
    monkeypatch.setattr(threads.time, "perf_counter", lambda: now.at)
    counts = {"idle": 0.0, "counted": 0.0, "process": 0.0, "thread": 0.0}
    monkeypatch.setattr(Reading, "now", classmethod(lambda cls: Reading(now.at, **counts)))
    monkeypatch.setattr(threads, "cpu_quota", lambda: math.inf)
    cores = FreeCores()
    now.at, counts["counted"] = 0.9 * threads.INTERVAL, 1.0
    assert cores.look(1) == math.inf
    now.at, counts["counted"] = threads.INTERVAL, 2.0
    assert cores.look(1) == 0.0
    now.at, counts["counted"], counts["idle"] = 1.9 * threads.INTERVAL, 4.0, 4.0
    assert cores.look(1) == 0.0


def test_only_cores_that_the_process_may_use_count(monkeypatch):
    cores = [Core(idle=index, iowait=0.5, user=10.0) for index in range(4)]
    monkeypatch.setattr(threads.psutil, "cpu_times", lambda percpu: cores)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {1, 3}, raising=False)
    assert Reading.now().idle == 1 + 3 + 2 * 0.5
    assert Reading.now().counted == 1 + 3 + 2 * 10.5
    monkeypatch.delattr(os, "sched_getaffinity")  # macOS, where psutil knows no iowait either
    bare = [Core(idle=index, user=10.0) for index in range(4)]
    monkeypatch.setattr(threads.psutil, "cpu_times", lambda percpu: bare)
    assert Reading.now().idle == 6


class Core(tuple):
    """As psutil's times: a tuple with names."""

    def __new__(cls, **times):
        self = super().__new__(cls, times.values())
        self.__dict__ = times
        return self


def test_a_real_reading_counts_what_this_thread_computes():
    """In units of the system's clock: it is not less afterwards, and what we compute shows."""
    before = Reading.now()
    while threads.time.thread_time() - before.thread < 0.05:
        math.factorial(500)
    after = Reading.now()
    assert after.at - before.at >= 0.05
    assert after.process - before.process >= 0.05
    assert 0 <= after.idle - before.idle <= after.counted - before.counted + 0.01 * os.cpu_count()


# What others have chosen


@pytest.mark.parametrize(("value", "number"), [("1", 1), (" 12 ", 12), ("", None), ("  ", None)])
def test_the_variable_is_a_number(monkeypatch, value, number):
    monkeypatch.setenv("MMLENS_THREADS", value)
    assert requested() == number


@pytest.mark.parametrize(
    "value", ["0", "-1", "two", "1.5", "1e3", "4 cores", "auto", "9" * 30, "٣"]
)
def test_nonsense_in_the_variable_is_an_error_that_quotes_it(monkeypatch, seed, value):
    monkeypatch.setenv("MMLENS_THREADS", value)
    model = small_model(seed)
    with pytest.raises(ValueError, match=r"MMLENS_THREADS='.*': it is a whole number of threads"):
        model(small_inputs(model, seed))


def test_nonsense_in_the_variable_is_one_line_of_the_command(monkeypatch, capsys):
    from mmlens.cli import main

    monkeypatch.setenv("MMLENS_THREADS", "two")
    with pytest.raises(SystemExit) as stopped:
        main(["demo"])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith("mmlens: MMLENS_THREADS='two': it is a whole number")


def test_the_variable_overrides_everything(free, monkeypatch, seed):
    model = small_model(seed)
    inputs = small_inputs(model, seed)
    monkeypatch.setenv("MMLENS_THREADS", "2")
    monkeypatch.setenv("OMP_NUM_THREADS", str(MOST))
    hooks, seen = counting(model)
    model.run_with_hooks(inputs, fwd_hooks=hooks)
    assert set(seen) == {2}


@pytest.mark.parametrize("name", ["OMP_NUM_THREADS", "MKL_NUM_THREADS"])
def test_a_number_chosen_in_the_environment_is_left_alone(free, monkeypatch, seed, name):
    monkeypatch.setenv(name, str(MOST))
    model = small_model(seed)
    hooks, seen = counting(model)
    model.run_with_hooks(small_inputs(model, seed), fwd_hooks=hooks)
    assert set(seen) == {MOST}


def test_a_number_that_was_set_is_left_alone(free, seed):
    torch.set_num_threads(2)  # not the number that torch began with
    model = small_model(seed)
    hooks, seen = counting(model)
    model.run_with_hooks(small_inputs(model, seed), fwd_hooks=hooks)
    assert set(seen) == {2} and torch.get_num_threads() == 2


def test_setting_the_number_that_torch_began_with_is_a_choice_too(free, monkeypatch, seed):
    """MKL, which follows OpenMP, then has a number of its own; and it does the products."""
    monkeypatch.setattr(threads, "mkl_threads", lambda: MOST)
    model = small_model(seed)
    hooks, seen = counting(model)
    model.run_with_hooks(small_inputs(model, seed), fwd_hooks=hooks)
    assert set(seen) == {MOST} and torch.get_num_threads() == MOST


IN_A_NEW_PROCESS = """
import os, threading, torch
torch.get_num_threads()       # 2, by the environment, which is then as if it had never been set
del os.environ["OMP_NUM_THREADS"]
from mmlens.utils import threads
assert threads.DEFAULT == 2
threads.FreeCores.look = lambda self, threads: 1.0

@threads.on_free_cores
def run(model):
    other = []
    thread = threading.Thread(target=lambda: other.append((torch.get_num_threads(), mkl())))
    thread.start(); thread.join()
    return torch.get_num_threads(), mkl(), other[0]

def mkl():
    return threads.mkl_threads() or torch.get_num_threads()

model = torch.nn.Linear(3, 3)
print(run(model), torch.get_num_threads(), mkl())
torch.set_num_threads(2)
print(run(model), torch.get_num_threads(), mkl(), threads.mkl_threads() is None)
"""


def test_products_follow_and_other_threads_do_not():
    """In a process in which nobody called `torch.set_num_threads`, as pytest's did; then in one."""
    environment = os.environ | {"OMP_NUM_THREADS": "2", "MMLENS_THREADS": ""}
    environment.pop("MKL_NUM_THREADS", None)
    done = subprocess.run(
        [sys.executable, "-c", IN_A_NEW_PROCESS],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    chosen, left_alone = done.stdout.splitlines()
    assert chosen == "(1, 1, (2, 2)) 2 2"
    if not left_alone.endswith("True"):  # without MKL there is no telling
        assert left_alone == "(2, 2, (2, 2)) 2 2 False"
