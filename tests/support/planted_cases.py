"""Questions to planted models, and in which activations their answers are."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

import torch
from planted_circuits import one_hop, two_hop
from planted_models import N_ENTITIES, RELATIONS, Planted, Step

from mmlens import attention_knockout, swap_span
from mmlens.inputs.multimodal_inputs import MultimodalInputs

SITES = ("resid_post", "attn_out", "mlp_out")
NORMED = ("q_norm.normalized", "k_norm.normalized")
"""Sites of decoders that normalise queries and keys."""


def window(layer: int, width: int) -> range:
    """The layers that are put back or cut around a layer; some of them may not be there."""
    return range(layer - width // 2, layer - width // 2 + width)


@dataclass
class Case:
    """A planted model, a question about an image, and the answer."""

    planted: Planted
    inputs: MultimodalInputs
    entity: int
    shown: list[tuple[int, int]]
    answer: int

    @property
    def patches(self) -> list[int]:
        """Positions of the visual tokens that show the entity."""
        return sorted(self.inputs.patch(*patch) for patch in self.shown)

    def swapped(self, **tokens: int) -> MultimodalInputs:
        inputs = self.inputs
        for span, token in tokens.items():
            inputs = swap_span(self.planted.model, inputs, span, token)
        return inputs

    def with_image(self, entity: int | None, seed: int) -> MultimodalInputs:
        return self.inputs.with_pixels(self.planted.picture(entity, self.shown, seed))


def make_case(planted: Planted, seed: int, n_relations: int = 0) -> Case:
    chance = random.Random(seed + 1)  # not the numbers that chose the sizes
    relation = chance.randrange(n_relations) if n_relations else None
    rows, columns = planted.grid
    grid = [(row, column) for row in range(rows) for column in range(columns)]
    shown = chance.sample(grid, chance.randint(1, len(grid) - 1))
    entity = chance.randrange(N_ENTITIES)
    pixels = planted.picture(entity, shown, seed)
    inputs = planted.prompt(chance, pixels, relation)
    return Case(planted, inputs, entity, shown, planted.facts[entity, relation or 0])


def one_hop_case(seed: int, **choices) -> Case:
    return make_case(one_hop(seed, **choices), seed)


def two_hop_case(seed: int, **choices) -> Case:
    return make_case(two_hop(seed, **choices), seed, len(RELATIONS))


# Where the answer is


@dataclass
class Trail:
    """The way that the information takes that the clean run has and the corrupted one has not.

    It begins in the residual stream at `origin` after layer `since` (-1: in the embedding), and
    each step carries it on.
    """

    origin: list[int]
    since: int
    steps: list[Step]
    inputs: MultimodalInputs
    n_layers: int

    def stays(self) -> list[tuple[list[int], int, int]]:
        """Positions, and the layers after which (from, to before) the stream has it there."""
        at = [self.origin, *(self.positions(step) for step in self.steps)]
        since = [self.since, *(step.layer for step in self.steps)]
        until = [*(step.layer for step in self.steps), self.n_layers]
        return list(zip(at, since, until, strict=True))

    def positions(self, step: Step) -> list[int]:
        return self.inputs.span(step.role).tolist()

    def has(self, site: str, position: int, layer: int) -> bool:
        """Whether the answer is back when this activation is."""
        if site in ("resid_pre", "resid_post"):
            behind = layer - (site == "resid_pre")
            return any(position in at and a <= behind < b for at, a, b in self.stays())
        kind = {"z": "attn_out", "post": "mlp_out"}.get(site, site)
        if kind in SITES:
            steps = [step for step in self.steps if step.site == kind]
            return any(layer == s.layer and position in self.positions(s) for s in steps)
        if site in ("q", NORMED[0], "rot_q", "pattern", "attn_scores"):  # who asks looks
            return layer == self.steps[0].layer and position in self.origin
        if site == "v":  # what later heads read
            sources = zip(self.stays()[1:], self.steps[1:], strict=False)
            heads = [(at, step) for (at, _, _), step in sources if step.head is not None]
            return any(layer == step.layer and position in at for at, step in heads)
        assert site in ("k", NORMED[1])  # a constraint's words are looked at whichever they are
        return False

    def cells(self, sites, groups, width=1) -> torch.Tensor:
        """`has` for windows of layers and groups of positions [site, group, layer]."""
        found = [
            any(self.has(s, p, i) for p in g for i in window(layer, width))
            for s in sites
            for g in groups
            for layer in range(self.n_layers)
        ]
        return torch.tensor(found).view(len(sites), len(groups), self.n_layers)


def asked(case: Case) -> Trail:
    """From the word that asks: for a corrupted constraint."""
    steps = list(case.planted.steps.values())
    return Trail(
        case.inputs.span("asks").tolist(), -1, steps, case.inputs, case.planted.model.cfg.n_layers
    )


def check(case: Case, trace, expected: torch.Tensor) -> None:
    """All of the answer in the expected cells, nothing of it in the others."""
    planted = case.planted
    assert trace.clean >= planted.least and trace.corrupted <= planted.most
    assert trace.restored.shape == expected.shape
    assert trace.restored[expected].min() >= planted.least
    assert trace.indirect_effect[~expected].abs().max() <= planted.nothing


def check_cut(case: Case, source, destination, layers: set[int], width=1) -> None:
    """P(answer) falls to nothing where a window holds one of `layers`, and nowhere else."""
    planted = case.planted
    cut = attention_knockout(planted.model, case.inputs, source, destination, window=width)
    assert cut.answer_tokens == (case.answer,)
    for layer, probability in zip(cut.layers, cut.probability.tolist(), strict=True):
        if layers & set(window(layer, width)):
            assert probability <= planted.most
        else:
            assert probability >= planted.least


def everywhere(case: Case) -> list[list[int]]:
    return [[position] for position in range(case.inputs.n_pos)]


def shown_to(case: Case) -> Trail:
    """From the patches that show the entity: for another image."""
    deepstack = case.planted.deepstack
    since = -1 if deepstack is None else deepstack
    return replace(asked(case), origin=case.patches, since=since)
