"""Keys of questions that edits are not about, for methods that can keep what they give."""

from __future__ import annotations

import random
from collections.abc import Hashable, Iterable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from mmlens.data import VisualQuestion
from mmlens.editing.asking import Examiner, looks
from mmlens.editing.multedit import keys_of

__all__ = ["PreservedKeys"]


class PreservedKeys:
    """A pool of questions whose keys keep their values: never one that is asked about an edit.

    Args:
        examiner: who prepares them.
        questions: the pool; those without a visual constraint have no key, and are passed over.
        n: how many of them each edit gets.
        seed: of their order.

    Example:
        >>> preserved = PreservedKeys(Examiner(model), demo_questions(), n=200)
        >>> multedit(model, request, layer=3, kept=preserved.of(3, examination.questions))
    """

    def __init__(
        self, examiner: Examiner, questions: Sequence[VisualQuestion], n: int, seed: int = 0
    ) -> None:
        self.examiner, self.questions, self.n = examiner, questions, n
        self.order = random.Random(f"{seed} preserved").sample(
            range(len(questions)), len(questions)
        )
        self._keys: dict[tuple[int, int], Tensor] = {}

    def of(self, layer: int, asked: Iterable[VisualQuestion]) -> Float[Tensor, "d_mlp _"]:
        """The keys of the first `n` questions that are not asked.

        Raises:
            ValueError: there are none.
        """
        hidden = {told_apart(question) for question in asked}
        found: list[Tensor] = []
        for row in self.order:
            if len(found) == self.n:
                break
            question = self.questions[row]
            if question.visual_constraint and told_apart(question) not in hidden:
                if (layer, row) not in self._keys:
                    inputs = self.examiner.prepared(question)
                    self._keys[layer, row] = keys_of(self.examiner.model, [inputs], layer)
                found.append(self._keys[layer, row])
        if not found:
            raise ValueError("no questions to preserve: all of them are asked, or without a key")
        return torch.cat(found, dim=1)


def told_apart(question: VisualQuestion) -> Hashable:
    """What is the same for the same words about the same picture."""
    return question.prompt(), looks(question)
