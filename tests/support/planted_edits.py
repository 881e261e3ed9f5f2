"""Planted models that take questions as text and images, and edits whose effects are known.

A fact of `planted_circuits.one_hop` is a few neurons of one MLP. An edit that writes another answer
there makes the same planted model with another table: every bound of it holds as before.
"""

from __future__ import annotations

import random

import torch
from PIL import Image
from planted_circuits import one_hop
from planted_models import (
    ASKS,
    BOS,
    D_VOCAB,
    FIRST_ANSWER,
    IMAGE,
    N_ANSWERS,
    N_ENTITIES,
    PAD,
    SPEAKS,
    SUBJECT,
    WORDS,
    Planted,
)
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from mmlens.data import EditCase, VisualQuestion
from mmlens.editing import Edit, LowRank

SPECIAL = {PAD: "<pad>", BOS: "<s>", IMAGE: "<image>"}
NAMES = {SPEAKS: "says", ASKS: "asks", SUBJECT: "thing"}


def word(token: int) -> str:
    """The text of a token."""
    return SPECIAL.get(token) or NAMES.get(token, f"word{token}")


def planted_tokenizer() -> PreTrainedTokenizerFast:
    """One word per token of the planted models."""
    vocabulary = {word(token): token for token in range(D_VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, word(SUBJECT)))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=word(BOS),
        pad_token=word(PAD),
        additional_special_tokens=[word(IMAGE)],
    )


class PlantedEdits:
    """A planted model with words and images, its questions, and the edit of each of its facts."""

    def __init__(self, seed: int) -> None:
        self.planted: Planted = one_hop(seed)
        self.model = self.planted.model
        self.chance = random.Random(seed + 2)
        self.pixels: list[Tensor] = []
        self.model.tokenizer = planted_tokenizer()
        self.model.cfg.default_prepend_bos = True  # where attention rests
        self.model.image_processor = self._process

    def _process(self, pictures: list[Image.Image]) -> Tensor:
        """An image stands for pixel values that no image has: its colour is their number."""
        return torch.cat([self.pixels[picture.getpixel((0, 0))[0]] for picture in pictures])

    def picture(self, entity: int) -> Image.Image:
        """An image of an entity, on other patches and with other noise each time."""
        rows, columns = self.planted.grid
        grid = [(row, column) for row in range(rows) for column in range(columns)]
        shown = self.chance.sample(grid, self.chance.randint(1, len(grid) - 1))
        self.pixels.append(self.planted.picture(entity, shown, self.chance.randrange(2**30)))
        return Image.new("RGB", (2, 2), (len(self.pixels) - 1, 0, 0))

    def question(self, entity: int, picture: Image.Image | None = None) -> VisualQuestion:
        """The question about an entity, with other words around it each time."""

        def words() -> list[str]:
            return [word(self.chance.choice(WORDS)) for _ in range(self.chance.randint(0, 2))]

        constraint = [word(SUBJECT)] * self.planted.n_constraint
        constraint[self.chance.randrange(self.planted.n_constraint)] = word(ASKS)
        parts = [*words(), *constraint, *words(), word(SPEAKS)]
        return VisualQuestion(
            question=" ".join(parts),
            image=self.picture(entity) if picture is None else picture,
            visual_constraint=" ".join(constraint),
            answers=(word(self.planted.facts[entity, 0]),),
            subject=f"entity {entity}",
            source=f"planted/{entity}/{len(self.pixels)}",
        )

    def case(self, entity: int) -> EditCase:
        """The entity's fact is to be another one."""
        question = self.question(entity)
        others = [each for each in range(N_ENTITIES) if each != entity]
        answers = range(FIRST_ANSWER, FIRST_ANSWER + N_ANSWERS)
        new = self.chance.choice([a for a in answers if a != self.planted.facts[entity, 0]])
        return EditCase(
            question=question,
            target=word(new),
            paraphrases=(self.question(entity, question.image),),
            other_images=(self.question(entity), self.question(entity)),
            neighbours={"same question": tuple(map(self.question, others))},
        )

    def edit(self, entity: int, answer: int) -> Edit:
        """The weights in which the entity's fact is this answer."""
        step = self.planted.steps["knows"]
        weight = self.model.blocks[step.layer].mlp.down.weight
        old = self.planted.answers[self.planted.facts[entity, 0] - FIRST_ANSWER]
        new = self.planted.answers[answer - FIRST_ANSWER]
        gains = torch.zeros(weight.shape[1])
        for neuron in range(entity, step.n_neurons, N_ENTITIES):
            gains[neuron] = weight[:, neuron] @ old / (old @ old)
        delta = LowRank((new - old)[:, None], gains[None])
        return Edit.of(
            self.model, {f"blocks.{step.layer}.mlp.down.weight": delta}, method="planted"
        )

    def edit_of(self, case: EditCase) -> Edit:
        """The edit that a case asks for."""
        entity = int(case.question.subject.split()[1])
        return self.edit(entity, int(case.target.removeprefix("word")))
