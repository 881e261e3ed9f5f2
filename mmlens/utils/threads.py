"""The number of CPU threads of a run: as many as cores are free and as its work can use.

Torch divides an operation among its threads and waits for the last of them. A thread that shares
its core with another program keeps all others waiting for milliseconds, in operations that take
microseconds: where another program had one of two cores, passes on two threads took 4 to 10 times
as long as on one. So while a function that is marked `on_free_cores` runs, every layer compares the
number of threads with the cores that are free; at the end the number is put back.

A number that was chosen is left alone: `OMP_NUM_THREADS` or `MKL_NUM_THREADS` in the environment, a
call of `torch.set_num_threads`; `MMLENS_THREADS` in the environment overrides all of these.
Nothing is changed for models on a GPU.
"""

from __future__ import annotations

import ctypes
import functools
import math
import os
import re
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, ParamSpec, TypeVar

import psutil
import torch
from torch import nn

from mmlens.utils.control_groups import cpu_quota

VARIABLE = "MMLENS_THREADS"
CHOSEN_BY = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
"""Variables with which other programs, and Ray for its workers, choose a number of threads."""

INTERVAL = 0.2
"""The least seconds between two readings of the cores' times, which count in hundredths."""
REPAID = 2**17
"""Multiply-adds of a layer's largest product that repay one thread. On two cores that nothing else
used, a second thread saved nothing (-4 to +6 %) in layers with 0.1 million of them, 0 to 20 % with
0.3 to 1 million, 37 % with 28 million."""
MOSTLY = 0.6
"""The share of a core that must be free for a thread on it. Waiting for a thread that has to share
costs more than doing without."""

P = ParamSpec("P")
T = TypeVar("T")


def threads_for(work: int | None, free: float, most: int) -> int:
    """Return the number of threads for a piece of work: at least 1, at most `most`.

    `work` is the multiply-adds of its largest product, where that is known, and `free` the cores
    that are free, in parts: 1.5 is one, and half of another.
    """
    repaid = most if work is None else work // REPAID
    on_cores = most if free >= most else math.floor(free + 1 - MOSTLY)
    return max(1, min(most, repaid, on_cores))


class Reading(NamedTuple):
    """Seconds that were counted until a moment."""

    at: float
    idle: float
    """Of all cores that this process may use."""
    counted: float
    """Idle or not; does not grow where the system keeps no account."""
    process: float
    """Computed by this process."""
    thread: float
    """Computed by this thread of it."""

    @classmethod
    def now(cls) -> Reading:
        """Read the cores' times and our own."""
        cores = psutil.cpu_times(percpu=True)
        if hasattr(os, "sched_getaffinity"):
            allowed = os.sched_getaffinity(0)
            cores = [core for index, core in enumerate(cores) if index in allowed]
        idle = sum(core.idle + getattr(core, "iowait", 0.0) for core in cores)
        counted = sum(map(sum, cores))
        return cls(time.perf_counter(), idle, counted, time.process_time(), time.thread_time())


class FreeCores:
    """The cores that a thread's work can have: those that are idle, and those that it uses."""

    def __init__(self) -> None:
        self._last = Reading.now()
        self._quota = cpu_quota()
        self._free = self._quota

    def look(self, threads: int) -> float:
        """Return the free cores, in parts, since the last reading or, at once after it, until it.

        What the process computed beyond `threads`, in other threads of its own, is not free.
        """
        if time.perf_counter() - self._last.at < INTERVAL:
            return self._free
        last, now = self._last, Reading.now()
        self._last = now
        if now.counted <= last.counted:
            self._free = math.inf  # nothing is known
        else:
            ours = min(now.process - last.process, threads * (now.thread - last.thread))
            self._free = (now.idle - last.idle + ours) / (now.at - last.at)
        self._free = min(self._free, self._quota)
        return self._free


def requested() -> int | None:
    """Return the number that `MMLENS_THREADS` asks for; None where it does not."""
    value = os.environ.get(VARIABLE, "").strip()
    if not value:
        return None
    if not re.fullmatch(r"[0-9]{1,6}", value) or int(value) < 1:
        raise ValueError(
            f"{VARIABLE}={value!r}: it is a whole number of threads, 1 or more, such as 2; without "
            "it mmlens uses the cores that are free"
        )
    return int(value)


def openmp_setter() -> Callable[[int], None] | None:
    """Return what sets the calling thread's number; None where torch is built without OpenMP.

    `torch.set_num_threads` would also set it, for good, in each thread that first uses torch until
    it is called again.
    """
    try:
        setter = ctypes.CDLL(torch._C.__file__).omp_set_num_threads
    except (OSError, AttributeError):  # on Windows libraries are not searched through others
        return None
    setter.restype = None
    return setter


def mkl_threads() -> int | None:
    """Return MKL's number of threads, OpenMP's unless somebody chose; None without MKL."""
    found = re.search(r"mkl_get_max_threads\(\) : (\d+)", torch.__config__.parallel_info())
    return int(found[1]) if found else None


set_threads = openmp_setter()
DEFAULT = torch.get_num_threads()
"""Of torch, unless somebody chooses."""


class Run(threading.local):
    """What a thread is running; each thread has its own."""

    most = 0
    """Threads that it had before; 0 while it runs nothing whose threads are chosen here."""

    def __init__(self) -> None:
        self.cores = FreeCores()


_run = Run()


def on_free_cores(function: Callable[P, T]) -> Callable[P, T]:
    """Let a function run on as many threads as cores are free, and put the number back at its end.

    Args:
        function: whose first argument is a model, or holds one as `model`; or a class method whose
            second is. A backward pass in it gets the number of the layer that ran last before.

    Raises:
        ValueError: (when the function is called) as `requested`.

    Example:
        >>> @on_free_cores
        ... def step(model, inputs, delta):
        ...     loss = model(inputs, return_type="loss")
        ...     return torch.autograd.grad(loss, [delta])
    """

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        if torch.compiler.is_compiling() or _run.most or not to_be_chosen(device_of(args)):
            return function(*args, **kwargs)
        most = torch.get_num_threads()
        _run.most = most
        try:
            adjust_threads()
            return function(*args, **kwargs)
        finally:  # no signal is handled here before the number is back: both are done in C
            _run.most = 0
            set_threads(most)  # type: ignore[misc]

    return run


def to_be_chosen(device: torch.device | None) -> bool:
    """Return whether a run's number is chosen here, after `MMLENS_THREADS` has been obeyed."""
    if device is None or device.type != "cpu":
        return False
    if (number := requested()) is not None:
        if number != torch.get_num_threads():
            torch.set_num_threads(number)
        return False
    number = torch.get_num_threads()
    chosen = number != DEFAULT or any(os.environ.get(name) for name in CHOSEN_BY)
    return number > 1 and not chosen and set_threads is not None


def device_of(arguments: Sequence[Any]) -> torch.device | None:
    """Return where the model is that is the first argument, the second, or held by one of them."""
    held = [getattr(argument, "model", argument) for argument in arguments[:2]]
    models = [each for each in held if isinstance(each, nn.Module)]
    return next(models[0].parameters()).device if models else None


def adjust_threads(work: int | None = None) -> None:
    """Give a run the threads that its next work is worth now; only in functions `on_free_cores`.

    Args:
        work: multiply-adds of its largest product, where they are known.
    """
    if torch.compiler.is_compiling() or not _run.most or set_threads is None:
        return
    most = _run.most
    before = torch.get_num_threads()
    number = threads_for(work, _run.cores.look(before), most)
    if number == before:
        return
    set_threads(number)
    if (mkl_threads() or 0) > number:  # somebody called torch.set_num_threads with this number
        _run.most = 0
        set_threads(most)
