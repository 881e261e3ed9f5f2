"""Models in which the answer's way is known, and what follows from that for its probability.

`Planted` holds a model of `planted_circuits`. `Planted.most` and `least` bound the probability of
the answer without it at the last position, and with it.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import torch
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

from mmlens.config import MultimodalConfig, ProjectorConfig, VisionConfig
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
    """Orthonormal patches [3 * PATCH^2, channel * row * column]; the first show entities."""
    vision_layer: int
    """The tower's MLP that turns a patch's pattern into an entity."""
    n_constraint: int
    """Words of the constraint, all of which the next head looks at; one of them asks."""
    answers: Tensor
    """Directions [answer, d_model]."""

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
        """Pixels [1, 3, height, width]: the entity on some patches, noise on all."""
        cfg = self.model.cfg.vision
        rows, columns = cfg.grid
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(rows, columns, len(self.pixels) - N_ENTITIES, generator=generator)
        noise = noise / noise.norm(dim=-1, keepdim=True)
        patches = noise @ self.pixels[N_ENTITIES:]
        for row, column in shown if entity is not None else []:
            patches[row, column] += AMPLITUDE * self.pixels[entity]
        patches = patches.unflatten(-1, (3, PATCH, PATCH)).permute(2, 0, 3, 1, 4)
        return patches.flatten(1, 2).flatten(2, 3)[None]

    def prompt(
        self, chance: random.Random, pixels: Tensor, relation: int | None = None
    ) -> MultimodalInputs:
        """A prompt with the spans constraint, asks (one of its words) and relation."""

        def words() -> list[int]:
            return [chance.choice(WORDS) for _ in range(chance.randint(0, 2))]

        n_visual = self.model.cfg.vision.n_visual_tokens
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
        return self.model.inputs_from_tokens(torch.tensor([[*tokens, SPEAKS]]), pixels, spans=spans)


def planted_config(chance: random.Random, **choices) -> MultimodalConfig:
    """Random sizes; `choices` fixes fields of the decoder."""
    n_kv_heads = chance.choice([1, 1, 2, 3])
    rows, columns = chance.choice([(2, 2), (2, 3), (3, 2), (1, 4)])
    class_token = chance.random() < 0.5
    vision = VisionConfig(
        n_layers=chance.randint(1, 3),
        d_model=chance.choice([20, 26]),
        n_heads=2,
        d_head=5,
        d_mlp=17,
        act_fn="quick_gelu",
        normalization_type="LN",
        eps=1e-5,
        qkv_bias=True,
        o_bias=True,
        mlp_bias=True,
        image_size=(PATCH * rows, PATCH * columns),
        patch_size=PATCH,
        feature_layers=(0,),
        select="default" if class_token and chance.random() < 0.7 else "full",
        class_token=class_token,
        pre_norm=chance.random() < 0.5,
    )
    vision.feature_layers = (vision.n_layers,)
    sizes = {
        "n_layers": chance.randint(3, 6),
        "d_model": chance.choice([40, 47, 56]),
        "n_key_value_heads": n_kv_heads,
        "n_heads": n_kv_heads * chance.choice([1, 2]),
        "d_head": chance.choice([8, 12]),
        "d_mlp": chance.choice([19, 28]),
        "gated_mlp": chance.random() < 0.5,
        "act_fn": chance.choice(["silu", "gelu", "gelu_pytorch_tanh"]),
        "normalization_type": chance.choice(["RMS", "LN"]),
        "parallel_attn_mlp": chance.random() < 0.3,
        "qkv_bias": chance.random() < 0.3,
        "mlp_bias": chance.random() < 0.3,
        **choices,
    }
    return MultimodalConfig(
        eps=1e-6,
        n_ctx=128,
        d_vocab=D_VOCAB,
        rope_parameters={"rope_theta": 10000.0, "partial_rotary_factor": 0.5},
        image_token_id=IMAGE,
        bos_token_id=BOS,
        vision=vision,
        projector=ProjectorConfig(d_in=vision.d_model, d_hidden=15, d_out=sizes["d_model"]),
        **sizes,
    )
