"""The most memory that a piece of work holds at once."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import psutil
import torch

INTERVAL = 0.002
"""Seconds between two looks at the process's memory."""


@dataclass
class Peak:
    """The most memory held at once above what was held before, in bytes."""

    size: int = 0


@contextmanager
def peak_memory(device: torch.device) -> Iterator[Peak]:
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
        yield peak
        peak.size = torch.cuda.max_memory_allocated(device) - before
        return
    process, done = psutil.Process(), threading.Event()
    before = process.memory_info().rss

    def watch() -> None:
        while not done.wait(INTERVAL):
            peak.size = max(peak.size, process.memory_info().rss - before)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()
