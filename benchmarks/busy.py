"""A machine that is busy with something else: how long edits, traces and passes take there.

    python benchmarks/busy.py

Measures in turns in two processes of the demo model: "all threads" has torch's own number of
threads in every run, through `MMLENS_THREADS`; "free cores" has as many as cores are free. Both are
measured while nothing else runs, and while this script keeps every core busy with a process that
does nothing but count. A measurement that takes longer than `--limit` is given up. Nothing else
should run meanwhile: how much did at the start is in the table. Writes to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import math
import os
import select
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import psutil
import torch
from measuring import machine, seconds, table, write

from mmlens.utils.threads import CHOSEN_BY, VARIABLE

WAYS = ("all threads", "free cores")
STATES = ("quiet", "busy")
COUNT = "import os\nparent = os.getppid()\nwhile os.getppid() == parent: sum(range(10**6))"
"""Ends by itself when the script that started it is gone."""
N_POSITIONS = 612
"""Of the pass: as many as 576 visual tokens and 36 others."""


def measured(steps: int) -> dict[str, Callable[[], Any]]:
    """What is measured: on the demo model, whose decoder is SmolLM2-135M."""
    from mmlens import (
        HookedMultimodalTransformer,
        causal_trace,
        demo_questions,
        multedit,
        swap_span,
    )
    from mmlens.editing import MultEditSettings

    model = HookedMultimodalTransformer.from_pretrained("demo", device="cpu").requires_grad_(False)
    question = next(q for q in demo_questions(relation="capital") if q.subject == "Italy")
    clean = model.prepare(question.question, question.image, spans={"constraint": "this country"})
    corrupted = swap_span(model, clean, "constraint", "Paris")
    positions = [clean.span("constraint"), clean.span("last")]
    tokens = torch.randint(5, 20_000, (1, N_POSITIONS), generator=torch.Generator().manual_seed(1))
    never = 2.0  # a probability at which no search stops
    return {
        f"multedit, {steps} steps": lambda: multedit(
            model,
            clean,
            "Madrid",
            settings=MultEditSettings.paper(steps=steps, stop_at=never),
        ),
        "causal_trace, two positions": lambda: causal_trace(
            model, clean, corrupted, positions=positions
        ),
        f"forward pass, {N_POSITIONS} positions": lambda: without_gradients(model, tokens),
        "forward pass, image and question": lambda: without_gradients(model, clean),
        "generate 16 tokens": lambda: model.generate(clean, 16, stop_at_eos=False),
    }


@torch.no_grad()
def without_gradients(model: Any, inputs: Any) -> torch.Tensor:
    """A plain pass."""
    return model(inputs)


def serve(steps: int) -> None:
    """Run what standard input names, line by line, and print how long it took."""
    runs = measured(steps)
    print("\n".join([*runs, "ready"]), flush=True)
    for line in sys.stdin:
        took, _ = seconds(runs[line.strip()], torch.device("cpu"))
        print(took, flush=True)


class Worker:
    """A process with the model, which measures what it is told to."""

    def __init__(self, threads: int | None, steps: int) -> None:
        """Start it and wait for its model.

        Args:
            threads: `MMLENS_THREADS`; None lets mmlens choose.
        """
        self._command = [sys.executable, __file__, "--serve", "--steps", str(steps)]
        self._environment = os.environ | {VARIABLE: str(threads or "")}
        self._process: subprocess.Popen[str] | None = None
        self.names = self._started()

    def _started(self) -> list[str]:
        self._process = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=self._environment,
        )
        names = []
        for line in self._process.stdout:
            if line == "ready\n":
                return names
            names.append(line.strip())
        raise RuntimeError("the process with the model ended before it was ready")

    def run(self, name: str, limit: float) -> float:
        """Seconds; infinity where it takes longer than `limit`, which ends the process."""
        if self._process is None:
            self._started()
        print(name, file=self._process.stdin, flush=True)
        ready, _, _ = select.select([self._process.stdout], [], [], limit)
        if ready:
            return float(self._process.stdout.readline())
        self.stop()
        return math.inf

    def stop(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


@contextmanager
def kept_busy(n: int) -> Iterator[None]:
    """`n` processes that do nothing but count."""
    counting = [subprocess.Popen([sys.executable, "-c", COUNT]) for _ in range(n)]
    try:
        yield
    finally:
        for each in counting:
            each.kill()
            each.wait()


def report(times: dict[tuple[str, str, str], list[float]], names: Sequence[str], load: str) -> str:
    """Medians, and how they compare with all threads on a quiet machine."""
    rows = []
    for name in names:
        medians = {
            (state, way): statistics.median(times[way, state, name])
            for state in STATES
            for way in WAYS
        }
        before = medians[STATES[0], WAYS[0]]
        took = [f"{each:.2f}" if each < math.inf else "given up" for each in medians.values()]
        ratios = [f"{each / before:.2f}" for each in medians.values()]
        rows.append([name, took[0], *map("{} ({})".format, took[1:], ratios[1:])])
    header = ["seconds", *(f"{state}, {way}" for state in STATES for way in WAYS)]
    return (
        f"# A busy machine\n\n{machine(torch.device('cpu'))}. Before anything was started, others "
        f"used {load}. Medians; in brackets as a multiple of the first.\n\n{table(header, rows)}\n"
    )


def main() -> None:
    """Measure, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=40, help="of multedit")
    parser.add_argument("--repeats", type=int, default=2, help="while nothing else runs")
    parser.add_argument("--busy-repeats", type=int, default=1)
    parser.add_argument("--limit", type=float, default=40.0, help="seconds of one measurement")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.steps)
        return
    if any(name in os.environ for name in CHOSEN_BY):
        parser.error(f"unset {' and '.join(CHOSEN_BY)}: torch's own number is what is compared")
    n_cores = len(os.sched_getaffinity(0))
    load = f"{psutil.cpu_percent(interval=2) * n_cores / 100:.2f} of {n_cores} cores"
    print(f"others use {load}", flush=True)
    workers: dict[str, Worker] = {}
    times: dict[tuple[str, str, str], list[float]] = {}
    try:
        for way, threads in zip(WAYS, (torch.get_num_threads(), None), strict=True):
            workers[way] = Worker(threads, options.steps)
        names = workers[WAYS[0]].names
        for way, name in ((way, name) for way in WAYS for name in names):
            workers[way].run(name, options.limit)  # warms up
        for state, repeats in zip(STATES, (options.repeats, options.busy_repeats), strict=True):
            with kept_busy(n_cores if state == "busy" else 0):
                for name, way in ((n, way) for n in names for _ in range(repeats) for way in WAYS):
                    took = workers[way].run(name, options.limit)
                    times.setdefault((way, state, name), []).append(took)
                    print(f"{state}, {way}, {name}: {took:.2f} s", flush=True)
    finally:
        for worker in workers.values():
            worker.stop()
    write("busy-cpu", report(times, names, load))


if __name__ == "__main__":
    main()
