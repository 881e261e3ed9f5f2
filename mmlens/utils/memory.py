"""How much memory is free, whether it ran out, and the most that a piece of work holds at once."""

from __future__ import annotations

import gc
import threading
from dataclasses import dataclass

import psutil
import torch

from mmlens.utils.control_groups import memory_left
from mmlens.utils.temporary import Changes, temporary

INTERVAL = 0.002
"""Seconds between two looks at the process's memory."""


@dataclass
class Peak:
    """The most memory held at once above what was held before, in bytes."""

    size: int = 0


@temporary
def peak_memory(device: torch.device) -> Changes[Peak]:
    """Measure memory: allocations on a GPU, else the process's resident set every 2 ms.

    Example:
        >>> with peak_memory(model.device) as peak:
        ...     edit = multedit(model, request, layer=3)
        >>> peak.size
    """
    peak = Peak()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)

        def read() -> None:
            peak.size = torch.cuda.max_memory_allocated(device) - before

        yield read
        return peak
    process, done = psutil.Process(), threading.Event()
    before = process.memory_info().rss

    def watch() -> None:
        while not done.wait(INTERVAL):
            peak.size = max(peak.size, process.memory_info().rss - before)

    thread = threading.Thread(target=watch, daemon=True)

    def stop() -> None:
        done.set()
        if thread.ident is not None:  # it has begun
            thread.join()

    yield stop
    thread.start()
    return peak


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated on a device."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    return int(min(psutil.virtual_memory().available, memory_left()))


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error means that an allocation failed, on a GPU or in main memory."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return "can't allocate memory" in str(error)  # the CPU's allocator has no error of its own
