"""Sweeps: what the folder, the threads and Ray cost beside the traces alone.

    python benchmarks/sweep.py --questions 48           # the demo, on this machine
    python benchmarks/sweep.py --model FOLDER --data FOLDER
    python benchmarks/sweep.py --count                  # token-passes of LLaVA-1.5-7B, no model

The traces alone are a loop over prepared inputs, without reading, writing or progress. Writes to
benchmarks/results/.
"""

from __future__ import annotations

import argparse
import importlib.util
import tempfile
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import torch
from measuring import machine, table, write

from mmlens import HookedMultimodalTransformer, window
from mmlens.data import open_questions
from mmlens.sweeps import TraceTask, sweep
from mmlens.sweeps.plan import plan
from mmlens.sweeps.task import Carried

# Of LLaVA-1.5-7B and a short question: BOS, 576 visual tokens, "USER: What city is this building
# in? Answer in a few words. ASSISTANT:" by Vicuna's tokenizer, about.
N_LAYERS, D_MODEL, D_MLP, N_POS = 32, 4096, 11008, 600
SUFFIXES = {"constraint": 16, "constraint last": 15, "after constraint": 14, "last token": 1}
SITES = ("resid_post", "attn_out", "mlp_out")
WINDOWS = (1, 3, 5, 6)
QUESTIONS = 9464

# Rates for an estimate. No H100 was there: how much of its published peak PyTorch reaches is what
# torchtitan's authors measured (benchmarks/llama3_h100_202412_torchtitan.md of pytorch/torchtitan:
# Llama 3.1 8B, bfloat16, training without torch.compile). The other two are ours, from CPUs.
PEAK = 989e12  # operations per second, dense bfloat16, H100 SXM
SHARE_OF_PEAK = 0.33
TIME_TO_COUNT = 1.24  # the largest of growth.py: a trace's time to what counting gives
SWEEP_TO_TRACES = 1.24  # of this script, in one process


def counted() -> str:
    """Token-passes (one token through all layers) of a question, operations, and an estimate."""
    positions = 0  # of one layer each
    for width in WINDOWS:
        for centre in range(N_LAYERS):
            first = min(
                layer for layer in window("mlp_out", centre, width) if 0 <= layer < N_LAYERS
            )
            for site in SITES:
                # What is put back into resid_post enters the next layer.
                joins = first + (site == "resid_post")
                positions += (N_LAYERS - joins) * sum(SUFFIXES.values())
    cells = positions / N_LAYERS
    corrupted = max(SUFFIXES.values())
    recordings = N_POS + corrupted + (len(WINDOWS) - 1) * (1 + corrupted)
    passes = cells + recordings
    n_cells = len(WINDOWS) * len(SITES) * len(SUFFIXES) * N_LAYERS
    weights = N_LAYERS * (4 * D_MODEL**2 + 3 * D_MODEL * D_MLP)
    operations = 2 * weights + 4 * N_LAYERS * D_MODEL * N_POS
    rate = SHARE_OF_PEAK * PEAK / operations
    hours = QUESTIONS * passes / rate * TIME_TO_COUNT * SWEEP_TO_TRACES / 3600
    lines = [
        f"cells of a question: {n_cells}, {cells:,.0f} token-passes",
        f"recordings of a question: {recordings} token-passes",
        f"a question: {passes:,.0f} token-passes of {operations:.3g} operations: "
        f"{passes * operations:.3g}",
        f"by whole passes: {(n_cells + 2) * N_POS:,} token-passes",
        f"{QUESTIONS:,} questions: {QUESTIONS * passes:,.0f} token-passes, "
        f"{QUESTIONS * passes * operations:.3g} operations",
        f"at {rate:,.0f} token-passes per second, times {TIME_TO_COUNT} and {SWEEP_TO_TRACES}: "
        f"{hours:.2f} hours on one GPU, {60 * hours / 8:.1f} minutes on eight",
    ]
    return "\n".join(lines)


def alone(model: HookedMultimodalTransformer, task: TraceTask, questions: list) -> float:
    """Seconds of the traces, in the order of the sweep."""
    order = [each.question for shard in plan(questions) for each in shard.questions]
    asked = [task.read(model, question) for question in order]
    began = time.perf_counter()
    carried = Carried()
    for each in asked:
        task.rows(model, each, carried)
    return time.perf_counter() - began


def timed(run: Callable[[Path], object]) -> float:
    """Seconds of a sweep into a new folder, with what its log says of start and end left out."""
    with tempfile.TemporaryDirectory() as folder:
        run(Path(folder) / "out")
        log = (Path(folder) / "out" / "log.txt").read_text().splitlines()
    stamps = [datetime.fromisoformat(" ".join(line.split()[:2])) for line in log]
    ready = next(i for i, line in enumerate(log) if "shards are there" in line)
    return (stamps[-1] - stamps[ready]).total_seconds()


def main() -> None:
    """Measure, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--data", default="demo")
    parser.add_argument("--questions", type=int, default=48)
    parser.add_argument("--shard-size", type=int, default=8)
    parser.add_argument("--count", action="store_true")
    options = parser.parse_args()
    if options.count:
        print(counted())
        return
    questions = list(open_questions(options.data))[: options.questions]
    task = TraceTask(sites=("mlp_out",))
    model = HookedMultimodalTransformer.from_pretrained(options.model)
    common = {"shard_size": options.shard_size, "progress": False}
    runs: dict[str, Callable[[], float]] = {
        "the traces alone": lambda: alone(model, task, questions),
        "sweep in this process": lambda: timed(
            lambda out: sweep(task, model, questions, out, **common)
        ),
    }
    if importlib.util.find_spec("ray") is not None:
        for workers in (1, 2):
            runs[f"sweep on Ray, {workers} worker(s)"] = lambda n=workers: timed(
                lambda out: sweep(
                    task, options.model, questions, out, ray="local", workers=n, **common
                )
            )
    runs["the traces alone"]()  # warms up
    times = {name: run() for name, run in runs.items()}
    base = times["the traces alone"]
    rows = [
        [name, f"{took:.1f}", f"{len(questions) / took:.2f}", f"{took / base:.3f}"]
        for name, took in times.items()
    ]
    header = ["", "s", "questions/s", "ratio"]
    text = (
        f"# Sweeps: {options.model}, {len(questions)} questions\n\n{machine(torch.device('cpu'))}; "
        f"site mlp_out, all layers, window 1. Loading of models is left out; Ray's workers share "
        f"the machine's cores.\n\n{table(header, rows)}\n"
    )
    write("sweep", text)


if __name__ == "__main__":
    main()
