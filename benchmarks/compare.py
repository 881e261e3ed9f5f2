"""Two checkouts of mmlens side by side: has a change made anything slower?

    git worktree add ../before <commit>
    python benchmarks/compare.py ../before . --shape demo

Each checkout has a process of its own, with its own `mmlens` and `benchmarks/shapes.py`. The two
are measured in turns, so that both see the same machine. Writes to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measuring import machine, seconds, table, write

SITES = ("resid_post", "attn_out", "mlp_out")


def runs(shape: str) -> dict[str, Callable[[], Any]]:
    """What is measured, by public names alone."""
    from shapes import build

    from mmlens import causal_trace, hook_name

    case = build(shape)
    model, clean, corrupted = case.model, case.clean, case.corrupted
    names = [hook_name(site, layer) for site in SITES for layer in range(model.cfg.n_layers)]
    text = clean.span("text")

    def forward() -> Any:
        with torch.no_grad():
            return model(clean)

    def cached() -> Any:
        with torch.no_grad():
            return model.run_with_cache(clean, names_filter=names)

    def traced(sites: list[str], positions: Any) -> Any:
        return causal_trace(model, clean, corrupted, sites=sites, positions=positions)

    return {
        "forward": forward,
        "three sites of every layer cached": cached,
        "generate 8 tokens": lambda: model.generate(
            clean, 8, stop_at_eos=False, return_type="tokens"
        ),
        "trace, three sites, last token": lambda: traced(list(SITES), [clean.span("last")]),
        "trace, two sites, all text positions": lambda: traced(
            ["mlp_out", "attn_out"], [text[i : i + 1] for i in range(len(text))]
        ),
    }


def serve(shape: str) -> None:
    """Run what standard input names, line by line, and print how long it took."""
    measured = runs(shape)
    print("\n".join([*measured, "ready"]), flush=True)
    for line in sys.stdin:
        took, _ = seconds(measured[line.strip()], torch.device("cpu"))
        print(took, flush=True)


class Checkout:
    """A process that measures one checkout."""

    def __init__(self, folder: Path, shape: str) -> None:
        """Start it, and wait for its model."""
        paths = [str(folder), str(folder / "benchmarks")]
        code = f"import sys; sys.path[:0] = {paths!r}\nimport runpy\n"
        code += f"runpy.run_path({__file__!r}, run_name='served')['serve']({shape!r})"
        self.process = subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.names = list(iter(self.line, "ready"))

    def line(self) -> str:
        """The next line that it prints.

        Raises:
            RuntimeError: it has ended.
        """
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError("the process has ended; its error is above")
        return line.strip()

    def seconds(self, name: str) -> float:
        """How long one run takes."""
        print(name, file=self.process.stdin, flush=True)
        return float(self.line())


def main() -> None:
    """Measure in turns, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--shape", default="demo", help="demo, smollm2 ...: of shapes.py")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--only", nargs="+", default=[""], help="beginnings of what is measured")
    options = parser.parse_args()
    checkouts = [
        Checkout(each.resolve(), options.shape) for each in (options.before, options.after)
    ]
    rows = []
    try:
        for name in filter(lambda name: name.startswith(tuple(options.only)), checkouts[0].names):
            before, after = in_turns(checkouts, name, options.repeats)
            ratio, low, high = ratio_of(before, after)
            seconds = [f"{statistics.median(times):.3f}" for times in (before, after)]
            rows.append([name, *seconds, f"{ratio:.3f}", f"{low:.3f} to {high:.3f}"])
            print(rows[-1], flush=True)
    finally:
        for each in checkouts:
            each.process.kill()
            each.process.wait()
    header = ["seconds", "before", "after", "after / before", "95 % interval"]
    title = f"# Before and after, shape {options.shape}"
    how = f"Medians of {options.repeats} pairs of runs, and the median of the pairs' ratios."
    write(
        f"compare-{options.shape}-cpu",
        f"{title}\n\n{machine(torch.device('cpu'))}. {how}\n\n{table(header, rows)}\n",
    )


def in_turns(checkouts: list[Checkout], name: str, pairs: int) -> tuple[list[float], list[float]]:
    """Seconds of two checkouts; the one that goes first changes from pair to pair."""
    times: list[list[float]] = [[], []]
    for pair in range(-1, pairs):
        for which in (0, 1) if pair % 2 else (1, 0):
            # The other's threads wait for work for a while, and free cores are counted.
            time.sleep(0.5)
            took = checkouts[which].seconds(name)
            if pair >= 0:  # the first warms up
                times[which].append(took)
    return times[0], times[1]


def ratio_of(before: list[float], after: list[float]) -> tuple[float, float, float]:
    """The median of the pairs' ratios, and its bootstrap interval."""
    ratios = [new / old for old, new in zip(before, after, strict=True)]
    chance = random.Random(0)
    drawn = sorted(statistics.median(chance.choices(ratios, k=len(ratios))) for _ in range(2000))
    return statistics.median(ratios), drawn[50], drawn[-51]


if __name__ == "__main__":
    main()
