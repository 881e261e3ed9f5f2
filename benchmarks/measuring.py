"""Time and memory of a call, and results as a table and an image."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers
from plotly import graph_objects as go

from mmlens.plots.save import FigureNotSaved, save_figure
from mmlens.utils.files import write_atomically

RESULTS = Path(__file__).parent / "results"


def seconds(run: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """How long one call takes, and its result."""
    wait(device)
    began = time.perf_counter()
    result = run()
    wait(device)
    return time.perf_counter() - began, result


def wait(device: torch.device) -> None:
    """Until the GPU has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def median_seconds(
    runs: dict[str, Callable[[], Any]], device: torch.device, repeats: int
) -> dict[str, float]:
    """The median time of each, taken in turns so that all see the same machine."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()  # warms up
    for _ in range(repeats):
        for name, run in runs.items():
            times[name].append(seconds(run, device)[0])
    return {name: float(torch.tensor(each).median()) for name, each in times.items()}


def machine(device: torch.device) -> str:
    """What it was measured on."""
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}; {versions}"
    load = psutil.getloadavg()[0]
    return (
        f"{platform.machine()} CPU, {torch.get_num_threads()} threads (load average {load:.1f} "
        f"at the end, ours included); {versions}"
    )


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def write(name: str, text: str, figure: go.Figure | None = None) -> None:
    """The report (and its image) into `benchmarks/results/`, and onto the screen."""
    RESULTS.mkdir(exist_ok=True)
    if figure is not None:
        try:
            save_figure(figure, RESULTS / f"{name}.svg")
            text += f"\n![{name}]({name}.svg)\n"
        except FigureNotSaved as error:
            print(f"no image: {error}")
    write_atomically(RESULTS / f"{name}.md", text)
    print(text)


def megabytes(size: int) -> str:
    """For a table."""
    return f"{size / 2**20:,.0f}"
