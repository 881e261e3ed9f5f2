"""What a trace costs with thousands of visual tokens, and how much memory it holds.

    OMP_NUM_THREADS=1 python benchmarks/tokens.py --shape onevision-0.5b --layers 6 --cpu-time
    OMP_NUM_THREADS=1 python benchmarks/tokens.py --shape smolvlm-256m --cpu-time

A trace of three sites at one position and the map of two sites at every text position, beside a
sample of the same cells by hand: forward hooks on transformers' decoder, one cell a pass, with the
same weights. Times are also given as forward-pass equivalents, by the two units of trace.py: the
plain call of transformers, which computes logits at every position, and the stricter one with
logits at the last position only, which is what all passes here do. The time by hand is
extrapolated: (time of the clean run) + (number of cells) x (mean time of the measured ones). The
trace at one position and the sample by hand take turns, and the fastest of each counts: what runs
first pays for memory that the system has not handed out before. Writes to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from measuring import machine, megabytes, table, write
from random_case import Case
from shapes import SHAPES, build
from tracers import ByHand, Cell

from mmlens import CausalTrace, causal_trace
from mmlens.utils.memory import peak_memory

SITES = ("resid_post", "attn_out", "mlp_out")
MAP_SITES = ("attn_out", "mlp_out")


@dataclass(frozen=True)
class Measured:
    """What a trace took."""

    trace: CausalTrace
    seconds: float
    memory: int

    @property
    def n_cells(self) -> int:
        """How many cells it has."""
        return self.trace.restored.numel()


def arithmetic(case: Case, sites: tuple[str, ...], positions: list[int], n_layers: int) -> float:
    """Token-passes of a trace, divided by those of one forward; see docs/benchmarks.md."""
    n_pos = case.clean.n_pos
    cells = sum(
        (n_pos - position) * (n_layers - layer - (site == "resid_post")) / n_layers
        for site in sites
        for position in positions
        for layer in range(n_layers)
    )
    return 1 + (n_pos - case.constraint[0] + cells) / n_pos


def traced(case: Case, clock: Callable[[], float], sites: tuple[str, ...], **how: Any) -> Measured:
    """A trace with its time and the most memory that it held above what was held before."""
    with peak_memory(case.device) as peak:
        began = clock()
        trace = causal_trace(case.model, case.clean, case.corrupted, sites=sites, **how)
        took = clock() - began
    return Measured(trace, took, peak.size)


@dataclass(frozen=True)
class Hand:
    """The sample by hand."""

    clean: float
    """Seconds of the clean run, whose activations are kept."""
    cells: list[float]
    """Seconds of each measured cell."""
    difference: float
    """The largest difference of P(answer) from the trace's."""
    plain: float
    """Seconds of a plain call, with logits at every position."""

    @property
    def strict(self) -> float:
        """The fastest pass with logits at the last position."""
        return min(self.clean, *self.cells)

    def seconds(self, n_cells: int) -> float:
        """All cells, extrapolated."""
        return self.clean + n_cells * sum(self.cells) / len(self.cells)

    @classmethod
    def fastest(cls, samples: list[Hand]) -> Hand:
        """The least time of each part over the samples."""
        return cls(
            min(each.clean for each in samples),
            [min(times) for times in zip(*(each.cells for each in samples), strict=True)],
            max(each.difference for each in samples),
            min(each.plain for each in samples),
        )


def by_hand(case: Case, clock: Callable[[], float], one: CausalTrace, n: int) -> Hand:
    """A random sample of a trace's cells, one whole pass each."""
    program = ByHand(case, SITES, one.answer_tokens[0])
    began = clock()
    program.prepare()
    clean = clock() - began
    places = [(site, layer) for site in SITES for layer in one.layers]
    times, differences = [], []
    for site, layer in random.Random(0).sample(places, n):
        began = clock()
        found = program.run([Cell(site, case.constraint[0], layer)])
        times.append(clock() - began)
        ours = one.restored[SITES.index(site), 0, layer]
        differences.append(abs(float(found) - float(ours)))
    began = clock()
    program.lm(inputs_embeds=program.clean, use_cache=False)
    return Hand(clean, times, max(differences), clock() - began)


@torch.no_grad()
def main() -> None:
    """Measure, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="smolvlm-256m")
    parser.add_argument("--layers", type=int, help="of the decoder; by default all")
    parser.add_argument("--cells", type=int, default=1, help="measured by hand")
    parser.add_argument("--repeats", type=int, default=2, help="of what is at one position")
    parser.add_argument(
        "--cpu-time", action="store_true", help="of this process, for a machine that others use"
    )
    options = parser.parse_args()
    if options.cpu_time:
        torch.set_num_threads(1)  # so that waiting for threads is not counted
    clock = time.process_time if options.cpu_time else time.perf_counter
    case = build(options.shape, n_layers=options.layers)
    first, n_layers = case.constraint[0], case.model.cfg.n_layers
    at_one, samples = [], []
    for _ in range(options.repeats):
        at_one.append(traced(case, clock, SITES, positions=[first]))
        print(f"one position: {at_one[-1].seconds:.1f} s", flush=True)
        samples.append(by_hand(case, clock, at_one[-1].trace, options.cells))
        print(f"by hand: {samples[-1]}", flush=True)
    one = replace(at_one[0], seconds=min(each.seconds for each in at_one))
    hand = Hand.fastest(samples)
    positions = list(range(first, case.clean.n_pos))
    whole = traced(case, clock, MAP_SITES, positions=positions)
    counts = [
        arithmetic(case, SITES, [first], n_layers),
        arithmetic(case, MAP_SITES, positions, n_layers),
    ]
    text = report(case, options.cpu_time, options.repeats, [one, whole], counts, hand)
    write(f"tokens-{options.shape}-{case.device.type}", text)


def report(
    case: Case,
    cpu_time: bool,
    repeats: int,
    traces: list[Measured],
    counts: list[float],
    hand: Hand,
) -> str:
    """The table, and what it says."""
    names = ["three sites, one position", "two sites, every text position"]
    rows = [
        [
            f"{name}: {each.n_cells:,} cells",
            f"{each.seconds:,.1f}",
            f"{each.seconds / hand.plain:,.2f}",
            f"{each.seconds / hand.strict:,.2f}",
            f"{count:,.2f}",
            f"{hand.seconds(each.n_cells):,.0f}",
            f"{hand.seconds(each.n_cells) / hand.plain:,.0f}",
            f"{hand.seconds(each.n_cells) / each.seconds:,.1f}",
            megabytes(each.memory),
        ]
        for name, each, count in zip(names, traces, counts, strict=True)
    ]
    header = ["trace", "seconds", "forward-pass equivalents", "the same, last logits only"]
    header += ["count", "seconds by hand (extrapolated)", "forward-pass equivalents by hand"]
    header += ["times faster", "peak memory, MB"]
    clock = " (of the CPU, in this process alone: others use the machine)" if cpu_time else ""
    visual, n_cells = int(case.clean.is_image.sum()), len(hand.cells)
    return (
        f"# Traces with {visual:,} visual tokens: {case.name}\n\n"
        f"{machine(case.device)}; {str(case.model.cfg.dtype).removeprefix('torch.')}.\n\n"
        f"{case.clean.n_pos:,} positions, of which {visual:,} visual; random weights; a vision "
        f"tower of one narrow layer. Times are seconds{clock}, the least of {repeats} for what is "
        "at one position. The unit of equivalents is one "
        f"Hugging Face SDPA forward of the decoder, {hand.plain:,.1f} s, and in the second column "
        "one with logits at the last position only, "
        f"{hand.strict:,.1f} s. Times by hand are extrapolated from the clean run "
        f"({hand.clean:,.1f} s) and {n_cells} cell(s) (mean {sum(hand.cells) / n_cells:,.1f} s), "
        f"whose P(answer) differs by at most {hand.difference:.0e} from the trace's. Memory is "
        "what is held above the weights, and for the second trace above what the process had kept "
        "by then. The count is that of docs/benchmarks.md.\n\n"
        f"{table(header, rows)}\n"
    )


if __name__ == "__main__":
    main()
