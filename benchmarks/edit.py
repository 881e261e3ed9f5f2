"""What one edit costs: MultEdit through branches, the same with full passes, and fine-tuning.

    python benchmarks/edit.py --shape smollm2            # 576 visual tokens
    python benchmarks/edit.py --shape llava-7b           # on a GPU: bfloat16, random weights
    python benchmarks/edit.py --shape demo --steps 3     # to see whether it runs

All take the same number of steps from the same prompt to the same target; none stops early. "Full
passes" is the same optimisation with the same objective, in which every step runs the whole decoder
(the image is encoded once there as well). Nothing else should run meanwhile. Writes to
benchmarks/results/.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.util import find_spec

import torch
from measuring import machine, megabytes, seconds, table, write
from plotly import graph_objects as go
from random_case import Case
from shapes import SHAPES, build

from mmlens.analyses.targets import given_answer, with_answer
from mmlens.edit_bench.settings import default_layer
from mmlens.editing import METHODS, Edit, EditRequest, LowRank, MultEditSettings
from mmlens.editing.multedit import down_weight
from mmlens.plots.style import LINES, layout
from mmlens.utils.memory import peak_memory

NEVER = 2.0
"""A probability at which no optimisation stops."""


@dataclass
class Measured:
    """One line of the table."""

    name: str
    seconds: float
    memory: int
    probability: float
    """Of the target, with the edit."""


def request_of(case: Case) -> EditRequest:
    """The clean prompt, keyed at the swapped words; the target is the 100th most probable token."""
    spans = {**case.clean.spans[0], "constraint": torch.tensor(case.constraint).to(case.device)}
    inputs = replace(case.clean, spans=(spans,))
    with torch.no_grad():
        target = int(case.model(inputs)[0, -1].topk(100).indices[-1])
    return EditRequest(inputs, target)


def full_passes(case: Case, request: EditRequest, layer: int, settings: MultEditSettings) -> Edit:
    """MultEdit by hand: every step runs the whole decoder, forwards and backwards."""
    model, name = case.model, f"blocks.{layer}.hook_mlp_out"
    answer = given_answer(model, request.inputs, request.target)
    inputs = with_answer(request.inputs, answer)
    at = request.position(inputs)
    with torch.no_grad():
        entering = model.input_embeddings(inputs)
        _, cache = model.run_with_cache(
            entering, start_at_layer=0, names_filter=[name, f"blocks.{layer}.mlp.hook_post"]
        )
    key = cache[f"blocks.{layer}.mlp.hook_post"][0, at].float()
    size = cache[name][0, at].float().norm()
    delta = torch.zeros(model.cfg.d_model, device=case.device, requires_grad=True)
    optimiser = torch.optim.Adam([delta], lr=settings.lr)

    def add_delta(activation, hook):
        changed = activation.clone()
        changed[:, at] += delta.to(activation)
        return changed

    for _ in range(settings.steps):
        logits = model.run_with_hooks(entering, start_at_layer=0, fwd_hooks=[(name, add_delta)])
        loss = -answer.log_probability(logits[:, answer.positions]).mean()
        if bool(delta.any()):
            loss = loss + settings.weight_decay * delta.norm() / size**2
        [delta.grad] = torch.autograd.grad(loss, [delta])
        optimiser.step()
        with torch.no_grad():
            delta *= (settings.clamp * size / delta.norm()).clamp(max=1.0)
    row = key / (settings.lam + key @ key)
    return Edit.of(model, {down_weight(layer): LowRank(delta.detach()[:, None], row[None])})


def programs(case: Case, request: EditRequest, layer: int, steps: int) -> dict[str, Callable]:
    """What is measured, by name; the first is what the others are compared with."""
    one_key = {
        "settings": MultEditSettings.paper(lr=0.5, clamp=8.0, first_token_only=False),
        "references": None,
    }
    settings = replace(one_key["settings"], steps=steps, stop_at=NEVER)

    def method(name: str, **options) -> Callable[[], Edit]:
        return lambda: METHODS[name](case.model, request, steps=steps, stop_at=NEVER, **options)

    found = {
        "multedit, through branches": method("multedit", layer=layer, **one_key),
        "multedit, full passes": lambda: full_passes(case, request, layer, settings),
        "fine_tune, one layer": method("fine_tune", layer=layer),
        "constrained_fine_tune, one layer": method("constrained_fine_tune", layer=layer),
        "fine_tune, all layers": method("fine_tune", layer=None),
    }
    if find_spec("peft"):
        found["lora, all layers"] = method("lora", layer=None)
    return found


def measure(case: Case, request: EditRequest, name: str, run: Callable, repeats: int) -> Measured:
    """The fastest of some runs; "out of memory" shows as times and probabilities that are NaN."""
    answer = given_answer(case.model, request.inputs, request.target)
    try:
        with peak_memory(case.device) as peak:
            times, edits = zip(*(seconds(run, case.device) for _ in range(repeats)), strict=True)
        with torch.no_grad(), edits[-1].applied(case.model):
            logits = case.model(with_answer(request.inputs, answer))[:, answer.positions]
            probability = float(answer.probability(logits))
        return Measured(name, min(times), peak.size, probability)
    except (torch.OutOfMemoryError, MemoryError):
        return Measured(f"{name} (out of memory)", float("nan"), 0, float("nan"))


def report(case: Case, layer: int, steps: int, lines: list[Measured]) -> str:
    """The table, and what it says."""
    first = lines[0]
    # A CPU's allocator keeps what an earlier line freed, so that later ones seem to need nothing.
    on_gpu = case.device.type == "cuda"
    rows = [
        [
            each.name,
            f"{each.seconds:,.2f}",
            f"{each.seconds / steps * 1000:,.0f}",
            f"{each.seconds / first.seconds:,.1f}",
            *([megabytes(each.memory)] if on_gpu else []),
            f"{each.probability:.4f}",
        ]
        for each in lines
    ]
    header = [
        "method",
        "seconds an edit",
        "ms a step",
        "times multedit's",
        *(["peak memory, MB"] if on_gpu else []),
        "P(target) with the edit",
    ]
    visual = int(case.clean.is_image.sum())
    return "\n\n".join(
        [
            f"# One edit: {case.name}",
            f"{machine(case.device)}; {str(case.model.cfg.dtype).removeprefix('torch.')}.",
            f"{case.clean.n_pos} positions, of which {visual} visual; the key is at "
            f"{max(case.constraint)}; layer {layer} of {case.model.cfg.n_layers}; {steps} steps "
            "each." + (" Memory is what is held above the weights." if on_gpu else ""),
            table(header, rows),
            "",
        ]
    )


def picture(title: str, lines: list[Measured]) -> go.Figure:
    """Seconds as bars."""
    figure = go.Figure(
        go.Bar(
            x=[each.seconds for each in lines][::-1],
            y=[each.name for each in lines][::-1],
            orientation="h",
            marker={"color": LINES[0].color},
            text=[f"{each.seconds:,.2f} s" for each in lines][::-1],
            textposition="auto",
        )
    )
    margin = {"l": 260, "r": 30, "t": 60, "b": 55}
    figure.update_layout(layout(width=820, height=130 + 42 * len(lines), margin=margin))
    figure.update_layout(title_text=title)
    return figure.update_xaxes(title_text="seconds an edit")


def main() -> None:
    """Measure, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="demo")
    parser.add_argument("--layer", type=int, help="by default 2 of 32, in proportion")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=2, help="runs, of which the fastest counts")
    options = parser.parse_args()
    case = build(options.shape)
    case.model.requires_grad_(False)
    layer = default_layer(case.model) if options.layer is None else options.layer
    request = request_of(case)
    lines = []
    for name, run in programs(case, request, layer, options.steps).items():
        lines.append(measure(case, request, name, run, options.repeats))
        print(f"{name}: {lines[-1].seconds:.2f} s", flush=True)
    text = report(case, layer, options.steps, lines)
    name = f"edit-{options.shape}-{case.device.type}"
    write(name, text, picture(f"One edit, {case.name}", lines))


if __name__ == "__main__":
    main()
