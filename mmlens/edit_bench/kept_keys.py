"""Keys of questions that edits are not about, for methods that can keep what they give."""

from __future__ import annotations

import random
from collections.abc import Hashable, Iterable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from mmlens.data import VisualQuestion
from mmlens.edit_bench.settings import EVERYWHERE
from mmlens.editing.examiner import Examiner
from mmlens.editing.multedit import keys_of


class PreservedKeys:
    """A pool of questions whose keys keep their values: never one that is asked about an edit.

    An edit moves whatever resembles its key. Questions of its form do, where its key is; and so may
    any other position, of the image above all, which only whole prompts can tell.

    Args:
        examiner: who prepares them.
        questions: the pool.
        n: of how many the key is kept that is where the edit's is.
        n_whole: of how many further ones the keys at all positions are kept.
        seed: of their order.

    Example:
        >>> preserved = PreservedKeys(Examiner(model), demo_questions(), n=200, n_whole=30)
        >>> multedit(model, request, layer=3, kept=preserved.of(3, examination.questions))
    """

    def __init__(
        self,
        examiner: Examiner,
        questions: Sequence[VisualQuestion],
        n: int,
        n_whole: int = 0,
        *,
        seed: int = 0,
    ) -> None:
        self.examiner, self.questions = examiner, questions
        self.n, self.n_whole = n, n_whole
        rows = range(len(questions))
        self.order = random.Random(f"{seed} preserved").sample(rows, len(rows))
        self._keys: dict[tuple[int, int, str | None], Tensor] = {}

    def of(
        self, layer: int, asked: Iterable[VisualQuestion], place: str | None = None
    ) -> Float[Tensor, "d_mlp _"]:
        """The keys of the first questions that are not asked.

        Args:
            layer: whose MLP.
            asked: what is asked about the edit.
            place: where the edit's keys are: at the last token of a span, or at `EVERYWHERE`, for
                which every word's key is kept. None is the visual constraint, and questions that
                have none are passed over.

        Raises:
            ValueError: there are none.
        """
        hidden = {told_apart(question) for question in asked}
        found: list[Tensor] = []
        for row in self.order:
            if len(found) == self.n + self.n_whole:
                break
            question = self.questions[row]
            keyed = place is not None or bool(question.visual_constraint)
            if keyed and told_apart(question) not in hidden:
                whole = len(found) >= self.n
                found.append(self._of_row(row, layer, None if whole else place or "constraint"))
        if not found:
            raise ValueError("no questions to preserve: all of them are asked, or without a key")
        return torch.cat(found, dim=1)

    def _of_row(self, row: int, layer: int, place: str | None) -> Tensor:
        """A question's key; those of all its words; or all of them, where no place is given."""
        if (layer, row, place) not in self._keys:
            inputs = self.examiner.prepared(self.questions[row])
            span = None if place == EVERYWHERE else place
            keys = keys_of(self.examiner.model, [inputs], layer, span=span)
            words = ~inputs.is_image[0]
            self._keys[layer, row, place] = keys[:, words] if place == EVERYWHERE else keys
        return self._keys[layer, row, place]


def told_apart(question: VisualQuestion) -> Hashable:
    """What is the same for the same words about the same image."""
    return question.prompt(), question.image_keys()
