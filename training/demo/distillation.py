"""Seeing a flag must answer as being told its country: prompts packed behind visual prefixes.

Some pictures with several prompts each; the prompts of one picture share its visual prefix (block
mask, positions restarted at every prompt). What they are compared with comes from `teacher.pt`.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from student import N_VISUAL
from teacher import DEPTH, Asked
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


class Teacher:
    """Draws prompts for countries, balanced between relations, and packs them."""

    def __init__(self, asked: list[Asked]) -> None:
        self.asked = asked
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
    def load(cls, folder: Path) -> "Teacher":
        """What `teacher.py` wrote."""
        return cls([Asked(**item) for item in torch.load(folder / "teacher.pt")])

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
        texts = [
            [self.asked[i].prompt + self.asked[i].answer[r, :-1].tolist() for i, r in row]
            for row in rows
        ]
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
        return Packed(tokens, positions, mask[:, None], readout, hidden.float())


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


def distillation(model: Any, visual: Tensor, packed: Packed) -> tuple[Tensor, Tensor]:
    """KL(told || seen), the answer's first token counting most; share of equal first tokens."""
    embed = model.get_input_embeddings()
    bos = torch.full((len(visual), 1), model.config.bos_token_id)
    hidden = hidden_states(
        model,
        inputs_embeds=torch.cat([embed(bos), visual.float(), embed(packed.tokens)], 1),
        attention_mask=packed.mask,
        position_ids=packed.positions,
    )
    rows = torch.arange(len(visual))[:, None, None]
    kl, equal = divergence(model, packed.hidden, hidden[rows, packed.readout])
    weight = torch.tensor([1.0] + [0.4] * (DEPTH - 1))
    return (kl * weight).mean((0, 1)).sum() / weight.sum(), equal[..., 0].float().mean()
