"""What seeing a flag must answer: as when told its country, or what is true of it.

Prompts are packed behind visual prefixes: the prompts of one picture share its prefix (block mask,
positions restarted at every prompt). What the model says when told comes from `teacher.pt`; what is
true, from the package's table of countries.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from captions import token_ids
from countries import Country, read_countries
from student import N_VISUAL
from teacher import DEPTH, Asked, may_be_asked
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

#: how often a prompt of a relation is drawn, relative to one prompt of the scored relations
NAMING_SHARE = 0.15
AUXILIARY_SHARE = 0.2


@dataclass
class Packed:
    """Prompts behind their visual prefixes, ready for the language model."""

    tokens: Tensor  #: [batch, length] of the text part
    positions: Tensor  #: [batch, 1 + 64 + length]
    mask: Tensor  #: [batch, 1, all, all], True where attention is allowed
    readout: Tensor  #: [batch, prompts, DEPTH]: where the answers' tokens are predicted
    hidden: Tensor  #: [batch, prompts, DEPTH, width]: the teacher's
    truth: Tensor  #: [batch, prompts, DEPTH]: tokens of the true answer; -100 where it is not asked


class Teacher:
    """Draws prompts for countries, balanced between relations, and packs them.

    Args:
        asked: the prompts, and what the teacher said.
        truths: per prompt and country it was asked about, the true answer's tokens, if it has one.
        truth_share: of the prompts that have a true answer, how many ask for it.
    """

    def __init__(
        self,
        asked: list[Asked],
        truths: list[list[list[int]]] | None = None,
        truth_share: float = 0.0,
    ) -> None:
        self.asked, self.truth_share = asked, truth_share
        self.truths = truths or [[[] for _ in item.countries] for item in asked]
        self.row = [{int(c): i for i, c in enumerate(item.countries)} for item in asked]
        relations = sorted({item.relation for item in asked})
        by_relation = {
            name: [i for i, item in enumerate(asked) if item.relation == name] for name in relations
        }
        scored = [name for name in relations if name not in ("name", "auxiliary")]
        weight = torch.zeros(len(asked))
        for name, members in by_relation.items():
            fixed = {"name": NAMING_SHARE, "auxiliary": AUXILIARY_SHARE}
            rest = (1 - sum(fixed.values())) / len(scored)
            weight[members] = fixed.get(name, rest) / len(members)
        self.weight = weight

    @classmethod
    def load(cls, folder: Path, tokenizer: Any, truth_share: float) -> "Teacher":
        """What `teacher.py` wrote, and the facts of the countries that may be used."""
        asked = [Asked(**item) for item in torch.load(folder / "teacher.pt")]
        countries = read_countries()
        truths = [
            [
                token_ids(tokenizer, f" {truth}")[:DEPTH] if truth else []
                for truth in (true_answer(countries[c], item.relation) for c in item.countries)
            ]
            for item in asked
        ]
        return cls(asked, truths, truth_share)

    def draw(self, country: int, count: int, rng: torch.Generator) -> list[int]:
        """Different prompts that may be asked about the country."""
        allowed = torch.tensor([country in row for row in self.row])
        weight = self.weight * allowed
        count = min(count, int(allowed.sum()))
        return torch.multinomial(weight, count, generator=rng).tolist()

    def pack(self, countries: list[int], count: int, rng: torch.Generator) -> Packed:
        """Prompts for each country in one row; a row with fewer ones repeats some."""
        start = 1 + N_VISUAL
        rows = []
        for country in countries:
            drawn = self.draw(country, count, rng)
            drawn = (drawn * count)[:count]
            rows.append([(i, self.row[i][country]) for i in drawn])
        truth = torch.full((len(rows), count, DEPTH), -100)
        texts = [[self.asked[i].prompt for i, _ in row] for row in rows]
        for b, row in enumerate(rows):
            for p, (i, r) in enumerate(row):
                answer, true = self.asked[i].answer[r].tolist(), self.truths[i][r]
                if true and float(torch.rand((), generator=rng)) < self.truth_share:
                    truth[b, p, : len(true)] = torch.tensor(true)
                    answer = true + [0] * (DEPTH - len(true))  # what follows is not scored
                texts[b][p] = texts[b][p] + answer[:-1]
        length = max(sum(map(len, row)) for row in texts)
        batch = len(rows)
        tokens = torch.zeros(batch, length, dtype=torch.long)
        positions = torch.arange(start + length).repeat(batch, 1)
        block = torch.full((batch, start + length), -1)
        block[:, :start] = 0
        readout = torch.zeros(batch, count, DEPTH, dtype=torch.long)
        for b, row in enumerate(texts):
            at = 0
            for p, text in enumerate(row):
                place = slice(start + at, start + at + len(text))
                tokens[b, at : at + len(text)] = torch.tensor(text)
                positions[b, place] = start + torch.arange(len(text))
                block[b, place] = p + 1
                readout[b, p] = start + at + len(text) - DEPTH + torch.arange(DEPTH)
                at += len(text)
        same = block[:, :, None] == block[:, None, :]
        causal = torch.ones(start + length, start + length, dtype=torch.bool).tril()
        mask = (same | (block == 0)[:, None, :]) & causal
        hidden = torch.stack(
            [torch.stack([self.asked[i].hidden[r] for i, r in row]) for row in rows]
        )
        return Packed(tokens, positions, mask[:, None], readout, hidden.float(), truth)


def hidden_states(model: Any, **inputs: Tensor) -> Tensor:
    """The language model's final hidden states [batch, position, width], for training."""
    # on a CPU the fused attention's backward pass is four times slower than plain products
    with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
        hidden: Tensor = model.model(**inputs, use_cache=False).last_hidden_state
    return hidden.float()


def divergence(model: Any, wanted: Tensor, found: Tensor) -> tuple[Tensor, Tensor]:
    """KL(wanted || found) of the next-token distributions, in nats, and where the first is equal.

    Both are final hidden states [..., width]; the result has their shape without the width.
    """
    with torch.no_grad():
        target = model.lm_head(wanted).log_softmax(-1)
    predicted = model.lm_head(found).log_softmax(-1)
    kl = F.kl_div(predicted, target, log_target=True, reduction="none").sum(-1)
    return kl, target.argmax(-1) == predicted.argmax(-1)


@dataclass
class Answered:
    """How well what is seen answers."""

    told: Tensor  #: KL(told || seen) in nats, the answer's first token counting most
    truth: Tensor  #: -log P(true answer's token) in nats
    equal: Tensor  #: the share of first tokens that are as when told


def answers(model: Any, visual: Tensor, packed: Packed) -> Answered:
    """Run the prompts; each counts for one of the two losses."""
    embed = model.get_input_embeddings()
    bos = torch.full((len(visual), 1), model.config.bos_token_id)
    hidden = hidden_states(
        model,
        inputs_embeds=torch.cat([embed(bos), visual.float(), embed(packed.tokens)], 1),
        attention_mask=packed.mask,
        position_ids=packed.positions,
    )
    rows = torch.arange(len(visual))[:, None, None]
    found = hidden[rows, packed.readout]
    as_told = packed.truth[..., 0] < 0
    kl, equal = divergence(model, packed.hidden[as_told], found[as_told])
    weight = torch.tensor([1.0] + [0.4] * (DEPTH - 1))
    scored = packed.truth >= 0
    surprise = F.cross_entropy(model.lm_head(found[scored]), packed.truth[scored])
    return Answered(
        told=(kl * weight).mean(0).sum() / weight.sum(),
        truth=surprise if scored.any() else torch.zeros(()),
        equal=equal[..., 0].float().mean(),
    )


def true_answer(country: Country, relation: str) -> str:
    """The usual one, or nothing: auxiliary prompts have none, nor facts of held-out countries."""
    if relation == "name":
        return country.name
    if relation == "auxiliary" or not may_be_asked(country, relation):
        return ""
    accepted = getattr(country, relation)
    return accepted[0] if accepted else ""
