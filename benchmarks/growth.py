"""How the cost of a trace grows: with visual tokens, layers and the length of the question.

    python benchmarks/growth.py [--layers 12] [--repeats 3]

Forward-pass equivalents of `causal_trace` (one position, three sites, all layers; SmolLM2-135M's
width) for prompts of one image and a question, beside what counting gives: one pass for the
clean run, the suffix for the corrupted one, and for every branch the suffix from the layer where it
joins. The count knows nothing of attention, which costs more where more keys are looked at, nor
that the last layer computes only what is read. Writes to benchmarks/results/.
"""

from __future__ import annotations

import argparse

import torch
from measuring import machine, seconds, table, write
from plotly import graph_objects as go
from plotly.subplots import make_subplots
from random_case import Case, random_case
from shapes import smollm2_config, stand_in_tower

from mmlens import causal_trace

SITES = ("resid_post", "attn_out", "mlp_out")
GRIDS = ((12, 12), (24, 24), (34, 34), (48, 48), (48, 60))  # 144 ... 2,880 visual tokens
LAYERS = (6, 12, 18, 24, 30)
SUFFIXES = (4, 8, 16, 32, 64)


def arithmetic(n_pos: int, suffix: int, n_layers: int) -> float:
    """Token-passes of a trace at one position, divided by those of one forward."""
    joined = sum(
        n_layers - layer - (site == "resid_post") for site in SITES for layer in range(n_layers)
    )
    return 1 + suffix / n_pos + suffix * joined / (n_pos * n_layers)


@torch.no_grad()
def measured(case: Case, repeats: int) -> float:
    """Time of a trace at the first swapped word / time of a Hugging Face forward, in turns.

    The forward computes logits at the last position only, as the trace does.
    """
    lm, entering = case.decoder(), case.embeddings(case.clean)
    forwards, traces = [], []
    for _ in range(repeats + 1):
        took, _ = seconds(
            lambda: lm(inputs_embeds=entering, logits_to_keep=1, use_cache=False), case.device
        )
        forwards.append(took)
        took, _ = seconds(
            lambda: causal_trace(
                case.model,
                case.clean,
                case.corrupted,
                sites=SITES,
                positions=[case.constraint[0]],
            ),
            case.device,
        )
        traces.append(took)
    return min(traces[1:]) / min(forwards[1:])


def case_of(grid: tuple[int, int], n_layers: int, suffix: int) -> Case:
    """One image, 13 words, and the suffix."""
    cuda = torch.cuda.is_available()
    return random_case(
        "SmolLM2-135M width",
        smollm2_config(n_layers),
        stand_in_tower(*grid),
        torch.device("cuda" if cuda else "cpu"),
        torch.bfloat16 if cuda else torch.float32,
        before=13,
        suffix=suffix,
    )


def main() -> None:
    """Measure, print and write tables and images."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--layers", type=int, default=12, help="where layers are not varied")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    usual = {"grid": (24, 24), "n_layers": options.layers, "suffix": 22}
    sweeps = {
        "visual tokens": [(a * b, usual | {"grid": (a, b)}) for a, b in GRIDS],
        "layers": [(n, usual | {"n_layers": n}) for n in LAYERS],
        "suffix: positions from the traced one on": [(n, usual | {"suffix": n}) for n in SUFFIXES],
    }
    figure = make_subplots(1, len(sweeps), subplot_titles=list(sweeps))
    parts = []
    for column, (title, points) in enumerate(sweeps.items(), start=1):
        rows, xs, found, counted = [], [], [], []
        for x, sizes in points:
            case = case_of(**sizes)
            xs.append(x)
            found.append(measured(case, options.repeats))
            n_pos = case.clean.n_pos
            counted.append(arithmetic(n_pos, sizes["suffix"], sizes["n_layers"]))
            device = case.device
            del case
            cells = len(SITES) * sizes["n_layers"]
            rows.append([str(x), str(n_pos), str(cells), f"{found[-1]:.2f}", f"{counted[-1]:.2f}"])
            print(title, *rows[-1], flush=True)
        header = [title, "positions", "cells", "measured", "token-passes"]
        parts.append(f"## By {title}\n\n{table(header, rows)}\n")
        for name, ys, dash in (("measured", found, "solid"), ("token-passes", counted, "dot")):
            line = go.Scatter(
                x=xs,
                y=ys,
                name=name,
                line={"dash": dash, "color": "#0072b2" if dash == "solid" else "#999999"},
                mode="lines+markers",
                showlegend=column == 1,
            )
            figure.add_trace(line, row=1, col=column)
        figure.update_xaxes(title=title, row=1, col=column)
    figure.update_yaxes(title="forward-pass equivalents", rangemode="tozero")
    figure.update_layout(template="plotly_white", width=1200, height=400)
    text = (
        "# How the cost of a trace grows\n\n"
        f"{machine(device)}. One position, three sites, all layers; where it is not varied: 576 "
        f"visual tokens, {options.layers} layers, 22 positions from the traced one on.\n\n"
        + "\n".join(parts)
    )
    write(f"growth-{device.type}", text, figure)


if __name__ == "__main__":
    main()
