"""Multimodal transformers whose circuits are written by hand.

    patches that show the entity --looks--> asking word of the constraint --knows--> the fact
        --tells--> last position

`one_hop` is this; in `two_hop` the fact goes on to a word of the text constraint, where an MLP
makes one answer of it and that word:

    ... --knows--> bridge --joins--> word of the text constraint --answers--> --tells--> last

A step is a head or an MLP of one layer.
"""

from __future__ import annotations

import random

import torch
from planted_configs import planted_config
from planted_models import (
    ASKS,
    BERLIN,
    BOS,
    CONFIDENCE,
    D_VOCAB,
    FIRST_ANSWER,
    N_ANSWERS,
    N_ENTITIES,
    PARIS,
    PATCH,
    RELATIONS,
    SPEAKS,
    SUBJECT,
    Planted,
    Step,
)
from planted_weights import AMPLITUDE, BALLAST, LEAK, STRENGTH, Writer, random_matrix
from torch import Tensor

from mmlens.model.components.projector import Projector
from mmlens.model.transformer import HookedMultimodalTransformer


def plant_eyes(
    model: HookedMultimodalTransformer,
    decoder: Writer,
    entity: Tensor,
    deepstack: int | None,
    chance: random.Random,
) -> tuple[Tensor, int]:
    """Pixels -> pattern -> (an MLP of the tower) entity -> projector; the pixels and the layer.

    `deepstack` says in which block the entity comes; None: with the visual tokens.
    """
    vision, cfg, generator = model.vision, model.cfg.vision, decoder.generator
    tower = Writer(vision, cfg, generator)
    pattern, seen = tower.take(N_ENTITIES), tower.take(N_ENTITIES)
    size = 3 * PATCH**2
    pixels = torch.linalg.qr(torch.randn(size, size, generator=generator)).Q.T
    light, noise = pixels[N_ENTITIES], pixels[N_ENTITIES + 1 :]
    from_noise = random_matrix(len(noise), len(tower.junk), generator) @ tower.junk / 2
    maps = pixels[:N_ENTITIES].T @ pattern + noise.T @ from_noise
    if cfg.positions == "none":
        maps += torch.outer(light, BALLAST * tower.ballast + tower.some_junk(1)[0] / 2)
    else:
        vision.W_pos.copy_(BALLAST * tower.ballast + tower.some_junk(len(vision.W_pos)) / 2)
    weight = maps.T.unflatten(1, (3, PATCH, PATCH))
    if cfg.packed:  # each frame has its share
        weight = weight[:, :, None] / cfg.temporal_patch_size
    vision.patch_embed.weight.copy_(weight.expand_as(vision.patch_embed.weight))
    if cfg.patch_bias:
        vision.W_pos.sub_(from_noise[0] / 2)
        vision.patch_embed.bias.copy_(from_noise[0] / 2)
    if cfg.class_token:
        vision.class_embed.copy_(tower.some_junk(1)[0] / 2)
    if cfg.pre_norm:  # as good as none: it divides by what it multiplies with
        vision.ln_pre.w.fill_(BALLAST / cfg.d_model**0.5)
    connectors = [model.projector, *model.projector.deepstack]
    carrier = 0 if deepstack is None else 1 + deepstack
    layer = chance.randrange(cfg.feature_layers[carrier])
    tower.store(layer, pattern, seen)
    tower.distract()
    for index, connector in enumerate(connectors):
        carried = entity if index == carrier else torch.zeros_like(entity)
        plant_connector(connector, tower, decoder, seen, carried, 1 / len(connectors))
    model.projector.linear_2.bias += BALLAST * decoder.ballast
    return pixels, layer


def plant_connector(
    connector: Projector, tower: Writer, decoder: Writer, seen: Tensor, entity: Tensor, share: float
) -> None:
    """Features -> entity, and this share of the junk of length 1 that an image brings."""
    first, second = connector.linear_1, connector.linear_2
    n_features = connector.cfg.pixel_shuffle**2  # of a visual token, one of which shows the entity
    n_distractors, n_read = len(first.weight) - 2 * N_ENTITIES, len(tower.frame) - 1
    content = random_matrix(n_distractors, n_features * n_read, tower.generator)
    content = (content.unflatten(1, (n_features, n_read)) @ tower.frame[1:]).flatten(1)
    content /= tower.radius * n_features**0.5
    seen = seen.repeat(1, n_features)
    rows = torch.cat([seen, -seen, content])
    if connector.cfg.normalization_type is not None:
        tower.open_norm(connector.ln)
        rows = tower.read(connector.ln, rows)
    first.weight.copy_(rows)
    first.bias.zero_()
    junk = decoder.write_junk(n_distractors) * STRENGTH * share
    second.weight.copy_(torch.cat([entity, -entity, junk]).T)
    second.bias.copy_(decoder.some_junk(1)[0] / 2 * share)


class Draft:
    """A model in the making: directions, embeddings and eyes are there, the steps are not."""

    @torch.no_grad()
    def __init__(
        self,
        seed: int,
        names: list[str],
        layers: list[int] | None,
        deepstack: int | None = None,
        **choices,
    ) -> None:
        chance = random.Random(seed)
        cfg, self.grid = planted_config(chance, **choices)
        if layers is None:
            layers = sorted(chance.sample(range(cfg.n_layers), len(names)))
        self.layers = dict(zip(names, layers, strict=True))
        self.heads = {name: chance.randrange(cfg.n_heads) for name in names}
        self.n_constraint = chance.randint(1, 3)
        self.steps: dict[str, Step] = {}
        self.model = HookedMultimodalTransformer(cfg)
        self.writer = writer = Writer(self.model, cfg, torch.Generator().manual_seed(seed))
        self.entity, self.seen, self.bridge, self.joined = (
            writer.take(N_ENTITIES) for _ in range(4)
        )
        self.answers, self.relations = writer.take(N_ANSWERS), writer.take(len(RELATIONS))
        self.bos, self.asks, self.subject, self.topic, self.speaks = writer.take(5)
        order = chance.sample(range(N_ANSWERS), N_ANSWERS)
        self.table = {
            (entity, relation): order[entity + N_ENTITIES * relation]
            for relation in range(len(RELATIONS))
            for entity in range(N_ENTITIES)
        }
        self.plant_words()
        reachable = min(cfg.n_deepstack, self.layers["looks"])
        self.deepstack = chance.randrange(reachable) if reachable else None
        self.deepstack = self.deepstack if deepstack is None else deepstack
        self.pixels, self.vision_layer = plant_eyes(
            self.model, writer, self.entity, self.deepstack, chance
        )

    def plant_words(self) -> None:
        """What each token is, and what the stream says."""
        model, writer = self.model, self.writer
        writer.open_norm(model.ln_final)
        model.embed.W_E.copy_(BALLAST * writer.ballast + writer.some_junk(D_VOCAB))
        flags = {
            BOS: self.bos,
            ASKS: self.asks + self.subject,
            SUBJECT: self.subject,
            PARIS: self.subject,
            BERLIN: self.topic,
            SPEAKS: self.speaks,
        }
        flags |= dict(zip(RELATIONS, self.relations + self.topic, strict=True))
        for token, flag in flags.items():
            model.embed.W_E[token] += flag
        model.unembed.weight.copy_(LEAK * writer.read_anything(model.ln_final, D_VOCAB))
        model.unembed.weight[FIRST_ANSWER : FIRST_ANSWER + N_ANSWERS] += (
            writer.read(model.ln_final, self.answers) * CONFIDENCE / AMPLITUDE
        )

    def answers_to(self, relations: range) -> Tensor:
        """Directions of the answers to every entity, for each relation."""
        return self.answers[[self.table[i, r] for r in relations for i in range(N_ENTITIES)]]

    def move(self, name: str, role: str, *moved: Tensor, query: Tensor, key: Tensor, gain: float):
        self.steps[name] = step = Step(self.layers[name], self.heads[name], role)
        self.writer.move(
            step.layer, step.head, query=query, key=key, sink=self.bos, moved=moved, gain=gain
        )

    def store(self, name: str, role: str, *facts: Tensor) -> None:
        layer = self.layers[name]
        self.writer.store(layer, *facts)
        self.steps[name] = Step(layer, None, role, self.writer.n_neurons[layer])

    def look_and_know(self, known: Tensor) -> None:
        """The entity comes from the image, and an MLP makes `known` of it."""
        key = self.entity.sum(dim=0) / AMPLITUDE
        self.move("looks", "asks", self.entity, self.seen, query=self.asks, key=key, gain=1)
        self.store("knows", "asks", self.seen, known)

    def finished(self) -> Planted:
        self.writer.distract()
        return Planted(
            self.model.requires_grad_(False),
            self.steps,
            {fact: FIRST_ANSWER + answer for fact, answer in self.table.items()},
            self.pixels,
            self.vision_layer,
            self.n_constraint,
            self.answers,
            self.grid,
            self.deepstack,
        )


@torch.no_grad()
def one_hop(seed: int, layers: list[int] | None = None, **choices) -> Planted:
    """The entity's fact is the answer. `layers` are those of the steps, ascending."""
    draft = Draft(seed, ["looks", "knows", "tells"], layers, **choices)
    draft.look_and_know(draft.answers_to(range(1)))
    draft.move(
        "tells",
        "last",
        draft.answers,
        draft.answers,
        query=draft.speaks,
        key=draft.subject,
        gain=draft.n_constraint,
    )
    return draft.finished()


@torch.no_grad()
def two_hop(seed: int, layers: list[int] | None = None, **choices) -> Planted:
    """The answer needs the entity's fact and the relation."""
    names = ["looks", "knows", "joins", "answers", "tells"]
    n_layers = random.Random(seed + 1).randint(5, 7)
    draft = Draft(seed, names, layers, gated_mlp=True, n_layers=n_layers, **choices)
    draft.look_and_know(draft.bridge)
    draft.move(
        "joins",
        "relation",
        draft.bridge,
        draft.joined,
        query=draft.relations.sum(dim=0),
        key=draft.subject,
        gain=draft.n_constraint,
    )
    draft.store(
        "answers",
        "relation",
        draft.joined.repeat(len(RELATIONS), 1),
        draft.answers_to(range(len(RELATIONS))),
        draft.relations.repeat_interleave(N_ENTITIES, dim=0),
    )
    answers = draft.answers
    draft.move("tells", "last", answers, answers, query=draft.speaks, key=draft.topic, gain=1)
    return draft.finished()
