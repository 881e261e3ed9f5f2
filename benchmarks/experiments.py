"""What experiments cost, by mmlens and by torch forward hooks on transformers' own decoder.

    python benchmarks/experiments.py --shape smollm2

Four experiments at the shape's number of visual tokens, in one run with the same weights:
- path patching: every head before a layer (3/4 of the depth) into the queries of that layer at the
  last position, with attention and MLPs frozen in between; by hand two passes for each head;
- an ablation scan: every head at all positions after the image; by hand a pass for each head;
- regions: an 8 x 8 grid of the image, each without its visual tokens' embeddings; a pass for each;
- features: 1,000 directions of a layer's residual stream at the last position, each taken out, by
  a function that is `batched`; a pass for each.

Times are forward-pass equivalents: time / time of one plain forward pass of transformers' decoder
on the same prompt (SDPA, logits at every position), the fastest of a few that are timed in turns
with the experiments. What is done by hand is measured on a random sample of the parts and
extrapolated. `difference` is the largest one of P(answer) over the parts that both have.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from measuring import machine, seconds, table, write
from random_case import Case
from shapes import SHAPES, build
from torch import Tensor

from mmlens import Intervention, ablation_scan, patch, path_patch
from mmlens.interventions.functions import batched

Edit = tuple[Any, bool, Callable[[Tensor], Tensor]]
"""A module, whether its input is edited (or its output), and how."""


@dataclass
class ByHand:
    """transformers' decoder with forward hooks, one experiment a pass."""

    case: Case
    answer: int

    def __post_init__(self) -> None:
        self.lm = self.case.decoder()
        self.clean = self.case.embeddings(self.case.clean)
        self.corrupted = self.case.embeddings(self.case.corrupted)

    def block(self, layer: int) -> Any:
        """A layer of the decoder."""
        return self.lm.model.layers[layer]

    def run(self, entering: Tensor, edits: Sequence[Edit] = ()) -> float:
        """P(answer) of one pass."""
        with ExitStack() as stack:
            for module, at_input, edit in edits:
                stack.callback(self.hook(module, at_input, edit).remove)
            logits = self.lm(inputs_embeds=entering, logits_to_keep=1, use_cache=False).logits
        return float(logits[0, -1].float().softmax(-1)[self.answer])

    @staticmethod
    def hook(module: Any, at_input: bool, edit: Callable[[Tensor], Tensor]) -> Any:
        """Register one edit."""
        if at_input:
            return module.register_forward_pre_hook(lambda _, args: (edit(args[0]), *args[1:]))

        def after(_: Any, args: Any, output: Any) -> Any:
            if isinstance(output, tuple):
                return (edit(output[0]), *output[1:])
            return edit(output)

        return module.register_forward_hook(after)

    def kept(self, entering: Tensor, places: dict[Any, tuple[Any, bool]]) -> dict[Any, Tensor]:
        """Inputs or outputs of modules in a plain pass."""
        found: dict[Any, Tensor] = {}

        def keeps(key: Any) -> Callable[[Tensor], Tensor]:
            def keep(x: Tensor) -> Tensor:
                found[key] = x
                return x

            return keep

        self.run(entering, [(*place, keeps(key)) for key, place in places.items()])
        return found

    def without(self, layer: int, head: int, first: int) -> float:
        """P(answer) without a head from a position on."""
        o_proj = self.block(layer).self_attn.o_proj
        return self.run(self.clean, [(o_proj, True, self.head(head, first, None))])

    def head(self, head: int, first: int, other: Tensor | None) -> Callable[[Tensor], Tensor]:
        """An edit of a head's output: zero, or that of another run."""
        d_head = self.case.model.cfg.d_head
        at = slice(head * d_head, (head + 1) * d_head)

        def edit(x: Tensor) -> Tensor:
            x = x.clone()
            x[:, first:, at] = 0.0 if other is None else other[:, first:, at]
            return x

        return edit


def path_patching(case: Case, hand: ByHand) -> Any:
    """Every head before a layer into that layer's queries at the last position."""
    cfg, first = case.model.cfg, case.constraint[0]
    target = 3 * cfg.n_layers // 4
    heads = [(layer, head) for layer in range(target) for head in range(cfg.n_heads)]
    last = [case.clean.n_pos - 1]

    def ours() -> Tensor:
        senders = [(f"z[{head}]", layer) for layer, head in heads]
        found = path_patch(case.model, case.clean, case.corrupted, senders,
                           [("q", target, last)], answer=hand.answer)  # fmt: skip
        return found.values

    out = {
        (layer, part): (getattr(hand.block(layer), part), False)
        for layer in range(target + 1)
        for part in ("self_attn", "mlp")
    }
    frozen = hand.kept(hand.clean, out)
    other = hand.kept(
        hand.corrupted, {i: (hand.block(i).self_attn.o_proj, True) for i in range(target)}
    )

    def by_hand(index: int) -> float:
        layer, head = heads[index]
        query = hand.block(target).self_attn.q_proj
        kept: list[Tensor] = []

        def keep(x: Tensor) -> Tensor:
            kept.append(x)
            return x

        edits: list[Edit] = [
            (hand.block(layer).self_attn.o_proj, True, hand.head(head, first, other[layer]))
        ]
        for (at, part), place in out.items():
            if at > layer or (at == layer and part == "mlp"):
                edits.append((*place, lambda x, at=at, part=part: frozen[at, part]))
        hand.run(hand.clean, [*edits, (query, False, keep)])

        def receive(x: Tensor) -> Tensor:
            x = x.clone()
            x[:, last] = kept[0][:, last]
            return x

        return hand.run(hand.clean, [(query, False, receive)])

    return ours, by_hand, len(heads)


def ablation(case: Case, hand: ByHand) -> Any:
    """Every head at the positions after the image."""
    cfg = case.model.cfg
    first = int(case.clean.span("image")[-1]) + 1
    after = range(first, case.clean.n_pos)

    def ours() -> Tensor:
        return ablation_scan(
            case.model, case.clean, "heads", positions=after, answer=hand.answer
        ).values.flatten()

    def by_hand(index: int) -> float:
        return hand.without(*divmod(index, cfg.n_heads), first)

    return ours, by_hand, cfg.n_layers * cfg.n_heads


def regions(case: Case, hand: ByHand) -> Any:
    """An 8 x 8 grid of the image."""
    tiles = case.clean.tiles(8, 8)

    def ours() -> Tensor:
        return ablation_scan(
            case.model, case.clean, "regions", regions=(8, 8), answer=hand.answer
        ).values.flatten()

    def by_hand(index: int) -> float:
        entering = hand.clean.clone()
        entering[:, tiles[index]] = 0.0
        return hand.run(entering)

    return ours, by_hand, len(tiles)


def features(case: Case, hand: ByHand, n: int = 1000) -> Any:
    """Directions of the residual stream, halfway up."""
    layer, last = case.model.cfg.n_layers // 2, case.clean.n_pos - 1
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(n, case.model.cfg.d_model, generator=generator)
    directions = (directions / directions.norm(dim=-1, keepdim=True)).to(case.device)

    @batched
    def without(slices: Tensor, hook: Any, branches: Tensor) -> Tensor:
        own = directions[branches][:, None, None].to(slices)
        return slices - (slices * own).sum(-1, keepdim=True) * own

    edit = Intervention("resid_post", layer, last, without)

    def ours() -> Tensor:
        cells = {feature: [edit] for feature in range(n)}
        return patch(case.model.record(case.clean), cells, answer=hand.answer).values

    def by_hand(index: int) -> float:
        own = directions[index].to(hand.clean)

        def take_out(x: Tensor) -> Tensor:
            x = x.clone()
            x[:, last] -= (x[:, last] @ own)[:, None] * own
            return x

        return hand.run(hand.clean, [(hand.block(layer), False, take_out)])

    return ours, by_hand, n


EXPERIMENTS = {
    "path patching, every head into one layer's queries": path_patching,
    "ablation scan, every head after the image": ablation,
    "image regions, 8 x 8": regions,
    "1,000 features, batched": features,
}


@torch.no_grad()
def main() -> None:
    """Measure, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="smollm2")
    parser.add_argument("--sample", type=int, default=8, help="parts that are done by hand")
    parser.add_argument("--repeats", type=int, default=2, help="runs of ours; the fastest counts")
    options = parser.parse_args()
    case = build(options.shape)
    answer = int(case.model(case.clean)[0, -1].argmax())
    hand = ByHand(case, answer)
    unit, rows = float("inf"), []

    def forward() -> float:
        run = seconds(lambda: hand.lm(inputs_embeds=hand.clean, use_cache=False), case.device)
        return run[0]

    forward()
    for name, make in EXPERIMENTS.items():
        ours, by_hand, n = make(case, hand)
        unit = min(unit, forward())
        runs = [seconds(ours, case.device) for _ in range(options.repeats)]
        took = min(each for each, _ in runs)
        chosen = random.Random(0).sample(range(n), min(options.sample, n))
        by_hand(chosen[0])  # warms up
        there, values = seconds(partial(list, map(by_hand, chosen)), case.device)
        unit = min(unit, forward())
        found = runs[0][1][chosen].tolist()
        off = f"{max(abs(a - b) for a, b in zip(found, values, strict=True)):.1e}"
        rows.append((name, n, took, there * n / len(chosen), off))
    header = ["experiment", "parts", "mmlens", "forward hooks", "ratio", "difference"]
    lines = [
        [name, str(n), *(f"{each:.1f}" for each in (took / unit, there / unit, there / took)), off]
        for name, n, took, there, off in rows
    ]
    n_visual = int(case.clean.is_image.sum())
    write(
        f"experiments-{options.shape}-{case.device.type}",
        f"# Experiments, {case.name}\n\n{n_visual} visual tokens, {case.clean.n_pos} positions. "
        "mmlens and forward hooks in forward-pass equivalents: time / time of one plain forward "
        f"pass of transformers' decoder ({unit:.2f} s). Forward hooks: {options.sample} parts "
        f"measured, the rest extrapolated.\n\n{table(header, lines)}\n\n{machine(case.device)}\n",
    )


if __name__ == "__main__":
    main()
