"""Models in which the answer's way is known, and what follows from that for its probability.

`Planted` holds a model of `planted_circuits`. `Planted.most` and `least` bound the probability of
the answer without it at the last position, and with it.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import torch
from einops import rearrange, repeat
from planted_weights import (
    AMPLITUDE,
    BALLAST,
    LEAK,
    SINK,
    STRENGTH,
    kappa,
    radius,
)
from torch import Tensor

from mmlens.inputs.multimodal_inputs import MultimodalInputs
from mmlens.model.transformer import HookedMultimodalTransformer

PAD, BOS, SPEAKS, ASKS, SUBJECT, PARIS, BERLIN = range(7)
"""PARIS takes the constraint's place, BERLIN that of the text constraint."""
RELATIONS = (7, 8)
WORDS = range(9, 20)
FIRST_ANSWER = 20
N_ENTITIES, N_ANSWERS = 3, 6
D_VOCAB = FIRST_ANSWER + N_ANSWERS + 1
IMAGE = D_VOCAB - 1
PATCH = 4
CONFIDENCE = 12.0
"""Logit of the answer where it arrives whole; all other logits are 0."""


@dataclass(frozen=True)
class Step:
    """One head, or the MLP (`head` None), of one layer, at the position with a role."""

    layer: int
    head: int | None
    role: str
    """A span of the prompts."""
    n_neurons: int = 0

    @property
    def site(self) -> str:
        return "mlp_out" if self.head is None else "attn_out"


@dataclass
class Planted:
    """A model, the steps of its circuit by name and in order, and its facts."""

    model: HookedMultimodalTransformer
    steps: dict[str, Step]
    facts: dict[tuple[int, int], int]
    """Answer's token by entity and relation (0 where there is no text constraint)."""
    pixels: Tensor
    """Orthonormal patches [3 * PATCH^2, channel * row * column]: those that show entities, light
    that every patch has, and noise."""
    vision_layer: int
    """The tower's MLP that turns a patch's pattern into an entity."""
    n_constraint: int
    """Words of the constraint, all of which the next head looks at; one of them asks."""
    answers: Tensor
    """Directions [answer, d_model]."""
    grid: tuple[int, int]
    """Rows and columns of an image's visual tokens."""
    deepstack: int | None
    """The block that adds the entity to the visual tokens; None: they have it from the start."""

    @property
    def vision_layers(self) -> int:
        """How many layers of the tower the entity goes through before the projector takes it."""
        carrier = 0 if self.deepstack is None else 1 + self.deepstack
        return self.model.cfg.vision.feature_layers[carrier]

    @property
    def error(self) -> float:
        """At most what is missing, rounded or leaked in a circuit direction, all steps together.

        Each step adds to the error of the step before it. Gains are 1, and 3 where three tokens are
        attended to alike.
        """
        cfg = self.model.cfg
        leaked = 2 * (cfg.n_layers + cfg.vision.n_layers + 1) * STRENGTH * LEAK
        rounded = 2 * (cfg.n_layers + cfg.d_model) * 2**-24 * BALLAST
        unseen = 64 * math.exp(-SINK) * AMPLITUDE
        return 3 * (1 + self.n_steps) * (leaked + rounded + unseen)

    @property
    def n_steps(self) -> int:
        """With the tower's, the projector and the unembedding."""
        return len(self.steps) + 3

    @property
    def lost(self) -> float:
        """At most the share of the answer that is lost.

        A step reads 1 - kappa of what there is, and so does a gate. The scores of words attended to
        alike, 2 * SINK, differ by as much, and their shares with them.
        """
        cfg = self.model.cfg
        n_readings = 2 * self.n_steps + 2 * SINK
        return n_readings * max(kappa(cfg.n_layers), kappa(cfg.vision.n_layers))

    @property
    def slack(self) -> float:
        """At most the absolute value of a logit that the circuit gives nothing to."""
        return CONFIDENCE / AMPLITUDE * self.error + LEAK

    @property
    def most(self) -> float:
        """P(answer) is at most this where the answer does not arrive."""
        return math.exp(2 * self.slack) / D_VOCAB

    @property
    def least(self) -> float:
        """P(answer) is at least this where it arrives."""
        logit = CONFIDENCE * (1 - self.lost) - 2 * self.slack
        return 1 / (1 + (D_VOCAB - 1) * math.exp(-logit))

    @property
    def nothing(self) -> float:
        """An effect is at most this, in absolute value, where the answer arrives in neither run."""
        return self.most - math.exp(-2 * self.slack) / D_VOCAB

    @property
    def estimate_slack(self) -> float:
        """At most a first-order effect on a logit, of a cell that is no step.

        A difference is at most 2 radii. Distractors pass on at most a share of it (values, twice
        the pattern by query and by key; a gate and what is gated), to be added up over the layers;
        of what they write LEAK goes into the circuit.
        """
        n_parts = 2 * self.model.cfg.n_layers
        passed_on = 5 * STRENGTH / radius(self.model.cfg.n_layers)
        junk = 2 * radius(self.model.cfg.n_layers) * (1 + passed_on) ** n_parts
        leaked = LEAK * (2 * STRENGTH + n_parts * passed_on * junk)
        in_logits = CONFIDENCE / AMPLITUDE
        return in_logits * (3 * self.n_steps * leaked + self.error) + LEAK * junk

    def cut(self, name: str) -> None:
        """Take one step away: a head writes nothing, or an MLP stores no facts."""
        step = self.steps[name]
        block = self.model.blocks[step.layer]
        with torch.no_grad():
            if step.head is None:
                block.mlp.W_out[: step.n_neurons] = 0.0
            else:
                block.attn.W_O[step.head] = 0.0

    def say(self, token: int) -> int:
        """Let a word say an answer by itself; the answer."""
        with torch.no_grad():
            self.model.embed.W_E[token] += AMPLITUDE * self.answers[0]
        return FIRST_ANSWER

    def picture(self, entity: int | None, shown: list[tuple[int, int]], seed: int) -> Tensor:
        """What the tower takes of an image: the entity at some visual tokens, noise everywhere."""
        cfg = self.model.cfg.vision
        side = cfg.merge_size
        rows, columns = (side * n for n in self.grid)
        generator = torch.Generator().manual_seed(seed)
        light, n_noise = self.pixels[N_ENTITIES], len(self.pixels) - N_ENTITIES - 1
        noise = torch.randn(rows, columns, n_noise, generator=generator)
        noise = noise / noise.norm(dim=-1, keepdim=True)
        patches = light + noise @ self.pixels[-n_noise:]
        for place in shown if entity is not None else []:
            patches[self.showing(*place)] += AMPLITUDE * self.pixels[entity]
        if cfg.packed:
            squares = rearrange(patches, "(r y) (c x) d -> (r c y x) d", y=side, x=side)
            frames = {"t": cfg.temporal_patch_size, "p": PATCH**2}
            return repeat(squares, "patch (c p) -> patch (c t p)", **frames)
        tiles = "row col (c y x) -> 1 c (row y) (col x)"
        return rearrange(patches, tiles, y=PATCH, x=PATCH)

    def showing(self, row: int, column: int) -> tuple[int, int]:
        """The patch that shows what a visual token shows: one of its square, here and there."""
        side = self.model.cfg.vision.merge_size
        return row * side + (row + column) % side, column * side + column % side

    def prompt(
        self, chance: random.Random, pixels: Tensor, relation: int | None = None
    ) -> MultimodalInputs:
        """A prompt with the spans constraint, asks (one of its words) and relation."""

        def words() -> list[int]:
            return [chance.choice(WORDS) for _ in range(chance.randint(0, 2))]

        vision, (rows, columns) = self.model.cfg.vision, self.grid
        visual = {"pixel_values": pixels}
        n_visual = vision.n_visual_tokens
        if vision.packed:
            n_visual = rows * columns
            grid = [1, rows * vision.merge_size, columns * vision.merge_size]
            visual["image_grid_thw"] = torch.tensor([grid])
        constraint = [SUBJECT] * self.n_constraint
        constraint[chance.randrange(self.n_constraint)] = ASKS
        tokens = [BOS, *words(), *[IMAGE] * n_visual, *words()]
        begin = len(tokens)
        tokens += [*constraint, *words()]
        spans = {
            "constraint": list(range(begin, begin + len(constraint))),
            "asks": [begin + constraint.index(ASKS)],
        }
        if relation is not None:
            spans["relation"] = [len(tokens)]
            tokens += [RELATIONS[relation], *words()]
        whole = torch.tensor([[*tokens, SPEAKS]])
        return self.model.inputs_from_tokens(whole, spans=spans, **visual)
