"""What a causal trace costs, by several programs, in one run on one device with the same weights.

    python benchmarks/trace.py --shape smollm2            # one position, three sites, all layers
    python benchmarks/trace.py --shape smollm2 --map      # every text position, two sites
    python benchmarks/trace.py --shape llava-7b [--map]   # random weights; on a GPU in bfloat16
    python benchmarks/trace.py --shape bunny-3b [--map]   # on a CPU: --only-by-hand --repeats 1
    python benchmarks/trace.py --shape qwen2.5-vl-3b      # 1,200 visual tokens; the same

Times are also given as forward-pass equivalents: time / time of one Hugging Face SDPA forward of
the same prompt through the decoder, measured between the programs of the same run, the fastest
counts. The unit is the plain call, which computes logits at every position; a second column takes
the stricter one with logits at the last position only, which is what all programs do for a cell.
Branching is always measured whole. The others are, too, where that takes less than `--budget`
seconds; else on a random sample of cells, as the table says: their time is then extrapolated, (time
of the clean run) + (number of cells) x (mean time of the measured ones), and the difference is over
those. Nothing else should run meanwhile. Writes to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import math
import random
from dataclasses import dataclass
from typing import Any

import torch
from measuring import machine, megabytes, seconds, table, write
from plotly import graph_objects as go
from random_case import Case
from shapes import SHAPES, build
from tracers import Batched, Branch, Bridge, ByHand, Cell, Naive, NNsightTracer, Released

from mmlens.utils.memory import peak_memory

PROGRAMS = (ByHand, Batched, Bridge, NNsightTracer, Naive, Branch)
MAP_PROGRAMS = (ByHand, Released, *PROGRAMS[1:])


@dataclass
class Measured:
    """One line of the table."""

    name: str
    seconds: float
    memory: int
    n_cells: int
    found: dict[Cell, float]

    def difference(self, reference: dict[Cell, float]) -> float | None:
        """The largest difference of P(answer) over the cells that both have."""
        both = [abs(p - reference[cell]) for cell, p in self.found.items() if cell in reference]
        return max(both, default=None)

    @property
    def is_extrapolated(self) -> bool:
        """Whether only some of the cells were measured."""
        return len(self.found) < self.n_cells


@torch.no_grad()
def measure(
    program: Any, cells: list[Cell], device: torch.device, budget: float, repeats: int
) -> Measured:
    """Time, memory and results of one program.

    Args:
        cells: in random order; where all take longer than `budget` seconds, the first of them.
        repeats: runs of branching, of which the fastest counts.
    """
    with peak_memory(device) as peak:
        prepared, _ = seconds(program.prepare, device)
        at_once = len(cells) if isinstance(program, Branch) else getattr(program, "size", 1)
        if not isinstance(program, Branch):
            repeats = 1
            program.run(cells[:1])  # warms up
        chosen = cells[:at_once]
        times = []
        for _ in range(repeats):
            took, found = seconds(lambda: program.run(chosen), device)
            times.append(took)
        more = int(budget / took) * at_once
        if more > at_once and len(chosen) < len(cells):
            chosen = cells[:more]
            took, found = seconds(lambda: program.run(chosen), device)
            times = [took]
    total = prepared + min(times) * len(cells) / len(chosen)
    values = dict(zip(chosen, found.double().tolist(), strict=True))
    return Measured(program.name, total, peak.size, len(cells), values)


@torch.no_grad()
def units(case: Case, repeats: int) -> tuple[float, float]:
    """Seconds of one Hugging Face forward: plain, and with logits at the last position only.

    In turns, the fastest of each.
    """
    lm, entering = case.decoder(), case.embeddings(case.clean)
    options = {"inputs_embeds": entering, "use_cache": False}

    def took(**more: int) -> float:
        return seconds(lambda: lm(**options, **more), case.device)[0]

    times = [(took(), took(logits_to_keep=1)) for _ in range(repeats)]
    return min(plain for plain, _ in times), min(last for _, last in times)


def cells_of(case: Case, is_map: bool) -> tuple[list[str], list[int]]:
    """Sites and positions: three at the last of the swapped words, or two at all from the first."""
    if is_map:
        return ["attn_out", "mlp_out"], list(range(case.constraint[0], case.clean.n_pos))
    return ["resid_post", "attn_out", "mlp_out"], [case.constraint[0]]


def main() -> None:
    """Measure, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="demo")
    parser.add_argument("--map", action="store_true", help="every text position, two sites")
    parser.add_argument("--budget", type=float, default=120.0, help="seconds for one program")
    parser.add_argument("--repeats", type=int, default=3, help="runs of branching and of the unit")
    parser.add_argument("--batch", type=int, default=64, help="rows of the batched program")
    parser.add_argument("--only-by-hand", action="store_true", help="nothing else beside mmlens")
    options = parser.parse_args()
    case = build(options.shape)
    sites, positions = cells_of(case, options.map)
    n_layers, device = case.model.cfg.n_layers, case.device
    cells = [Cell(s, p, layer) for s in sites for p in positions for layer in range(n_layers)]
    random.Random(0).shuffle(cells)
    with torch.no_grad():
        answer = int(case.model(case.clean)[0, -1].argmax())
    Batched.size = options.batch
    (plain, last), measured = units(case, options.repeats), []
    programs = MAP_PROGRAMS if options.map else PROGRAMS
    for program in (ByHand, Branch) if options.only_by_hand else programs:
        run = program(case, sites, answer)
        measured.append(measure(run, cells, device, options.budget, options.repeats))
        print(f"{measured[-1].name}: {measured[-1].seconds:.1f} s", flush=True)
        plain, last = map(min, (plain, last), units(case, options.repeats))
    kind = "map" if options.map else "one position"
    text = report(case, kind, sites, positions, measured, plain, last)
    name = f"trace-{options.shape}-{kind.replace(' ', '-')}-{device.type}"
    write(name, text, picture(f"{case.name}, {kind}", measured, plain))


def report(
    case: Case,
    kind: str,
    sites: list[str],
    positions: list[int],
    lines: list[Measured],
    plain: float,
    last: float,
) -> str:
    """The table, and what it says."""
    by_hand = lines[0]
    rows = []
    for each in lines:
        difference = each.difference(by_hand.found)
        n = f"{len(each.found)} of {each.n_cells}" if each.is_extrapolated else "all"
        rows.append(
            [
                each.name,
                f"{each.seconds:,.2f}{' (extrapolated)' if each.is_extrapolated else ''}",
                f"{each.seconds / plain:,.2f}",
                f"{each.seconds / last:,.2f}",
                f"{by_hand.seconds / each.seconds:,.1f}",
                megabytes(each.memory),
                n,
                "reference" if each is by_hand else f"{difference:.1e}",
            ]
        )
    header = [
        "program",
        "seconds",
        "forward-pass equivalents",
        "with last logits only",
        "times faster than by hand",
        "peak memory, MB",
        "cells measured",
        "largest difference",
    ]
    cfg, distinct = case.model.cfg, case.n_distinct_layers
    sharing = f" (memory holds the weights of {distinct}, which they share)" if distinct else ""
    return (
        f"# A causal trace, {kind}: {case.name}\n\n"
        f"{machine(case.device)}; {str(cfg.dtype).removeprefix('torch.')}.\n\n"
        f"{case.clean.n_pos} positions, of which {int(case.clean.is_image.sum())} visual; "
        f"{len(positions)} traced, from {positions[0]} on; sites {', '.join(sites)}; "
        f"{cfg.n_layers} layers{sharing}: {lines[0].n_cells} cells. "
        f"One Hugging Face SDPA forward of the decoder takes {plain * 1e3:,.1f} ms, "
        f"{last * 1e3:,.1f} ms with logits at the last position only. Memory is what is held above "
        "the weights and the prompts' embeddings. "
        "Differences are between probabilities of the answer, over the cells "
        f"that were measured by hand as well.\n\n{table(header, rows)}\n"
    )


def picture(title: str, lines: list[Measured], one: float) -> go.Figure:
    """Forward-pass equivalents of every program."""
    decades = math.log10(max(each.seconds for each in lines) / one) + 0.4
    figure = go.Figure(
        go.Bar(
            x=[each.seconds / one for each in lines],
            y=[each.name + (" *" if each.is_extrapolated else "") for each in lines],
            orientation="h",
            marker_color=["#999999"] * (len(lines) - 1) + ["#0072b2"],
            text=[f"{each.seconds / one:,.1f}" for each in lines],
            textposition="outside",
            cliponaxis=False,
        )
    )
    figure.update_layout(
        title=f"A causal trace: {title} (* extrapolated)",
        xaxis={"type": "log", "title": "forward-pass equivalents", "range": [0, decades]},
        yaxis={"autorange": "reversed"},
        template="plotly_white",
        width=900,
        height=360,
        margin={"l": 300, "r": 60},
    )
    return figure


if __name__ == "__main__":
    main()
