"""What a model makes of questions: its greedy answer, and how probable the expected one is.

    examiner = Examiner(model)
    before = examiner.ask(questions)
    with edit.applied(model):
        after = examiner.ask(questions, before)

Questions about one image share its positions (`Recording.record`). An image is encoded once, for
runs with and without edits: those change the decoder alone. What is said after the prompts is
computed for all of them together; answers are the greedy ones, found by checking drafts in one
pass: the expected answer, or what was said before.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mmlens.analyses.targets import Answer, given_answer
from mmlens.branching.encoded_images import EncodedImages
from mmlens.branching.passes import size_limit
from mmlens.branching.recording import Recording
from mmlens.data import VisualQuestion, soft_accuracy
from mmlens.inputs.multimodal_inputs import MultimodalInputs
from mmlens.model.drafts import FinishedPrompt, GreedyContinuations
from mmlens.model.hooked_root_module import exclusively
from mmlens.model.transformer import HookedMultimodalTransformer
from mmlens.utils.divergence import divergence
from mmlens.utils.grad_mode import without_gradients

__all__ = ["Examiner", "Reply", "score"]

Images = tuple[str, ...]
"""What tells a question's images apart."""
IMAGES_KEPT = 128
"""Encoded images that are remembered, those used last."""


@dataclass(frozen=True, eq=False)
class Reply:
    """What a model, with the weights that it has, makes of a question."""

    tokens: tuple[int, ...]
    """The greedy continuation, up to an end token."""
    said: str
    """The same as text."""
    probability: float
    """Of the first expected answer, all of its tokens; NaN where none is known."""
    score: float
    """Whether what was said is right; see `score`. NaN where that is not known."""
    log_probs: Float[Tensor, " d_vocab"]
    """Of the next token, in nats."""

    def drift(self, before: Reply) -> float:
        """KL(before || this) of the next token, in nats."""
        return float(divergence(before.log_probs.double(), self.log_probs.double()))


class Examiner:
    """Asks a model questions, with whatever weights it has at that moment.

    Args:
        model: with a tokenizer.
        template: what stands around a question; see `model.prepare`.
        max_new_tokens: of answers to multiple choice and to OK-VQA. Other answers are followed as
            far as decides whether they are right: one token more than the longest expected answer.
    """

    def __init__(
        self,
        model: HookedMultimodalTransformer,
        *,
        template: str | None = "auto",
        max_new_tokens: int = 12,
    ) -> None:
        self.model = model
        self.template = template
        self.max_new_tokens = max_new_tokens
        self._images: OrderedDict[Images, EncodedImages | None] = OrderedDict()

    def prepared(self, question: VisualQuestion) -> MultimodalInputs:
        """The question as inputs of the model, with its spans.

        Raises:
            SpanNotFoundError: (a ValueError) a constraint that is not in the question.
            ValueError: an image is missing.
        """
        return self.model.prepare(
            question.prompt(),
            question.open_images() or None,
            spans=question.spans() or None,
            template=self.template,
        )

    @exclusively
    @without_gradients
    def ask(
        self, questions: Sequence[VisualQuestion], before: Sequence[Reply] | None = None
    ) -> list[Reply]:
        """The replies to questions, in their order.

        Args:
            questions: those about one image are computed together.
            before: replies to the same questions that may still hold. They change nothing but the
                time that it takes.

        Raises:
            ValueError: another number of replies, or as `prepared`.
        """
        if before is not None and len(before) != len(questions):
            raise ValueError(f"{len(before)} replies before for {len(questions)} questions")
        drafts = [reply.tokens for reply in before] if before else [()] * len(questions)
        images = [question.image_keys() for question in questions]
        order = sorted(range(len(questions)), key=lambda index: images.index(images[index]))
        replies: dict[int, Reply] = {}
        while order:
            prompts = self._run([(questions[index], images[index]) for index in order])
            members, order = order[: len(prompts)], order[len(prompts) :]
            asked = [questions[index] for index in members]
            found = self._replies(asked, prompts, [drafts[index] for index in members])
            replies.update(zip(members, found, strict=True))
        return [replies[index] for index in range(len(questions))]

    def _run(self, questions: Sequence[tuple[VisualQuestion, Images]]) -> list[FinishedPrompt]:
        """The first questions, as many as fit at once: one on each image, then the others."""
        prepared: list[MultimodalInputs] = []
        longest = 0
        firsts: dict[Images, MultimodalInputs] = {}
        for question, images in questions:
            prepared.append(self.prepared(question))
            firsts.setdefault(images, prepared[-1])
            longest = max(longest, prepared[-1].n_pos)
            if (len(prepared) + 1) * longest > size_limit(self.model, longest):
                break
        recorded = self._recorded(firsts)
        recordings = [
            recorded[images] if inputs is firsts[images] else recorded[images].record(inputs)
            for (_, images), inputs in zip(questions, prepared, strict=False)
        ]
        return [FinishedPrompt.of(recording) for recording in recordings]

    def _recorded(self, prompts: dict[Images, MultimodalInputs]) -> dict[Images, Recording]:
        """Prompts by their images, run together; images that are remembered are not encoded."""
        known = [self._images.pop(images) for images in prompts if images in self._images]
        parts = [encoded for encoded in known if encoded is not None]
        inputs = list(prompts.values())
        found = Recording.of_each(self.model, inputs, EncodedImages.of_all(parts))
        for images, recording in zip(prompts, found, strict=True):
            self._images[images] = recording.encoded_images
        while len(self._images) > IMAGES_KEPT:
            self._images.popitem(last=False)
        return dict(zip(prompts, found, strict=True))

    def _replies(
        self,
        questions: Sequence[VisualQuestion],
        prompts: Sequence[FinishedPrompt],
        drafts: Sequence[tuple[int, ...]],
    ) -> list[Reply]:
        answers = [
            [given_answer(self.model, prompt.inputs, answer) for answer in question.expected]
            for question, prompt in zip(questions, prompts, strict=True)
        ]
        after = GreedyContinuations(self.model, prompts)
        expected = [tuple(each[0].tokens.tolist()) if each else () for each in answers]
        logits = after.follow(expected)
        lengths = [self._length(*each) for each in zip(questions, answers, strict=True)]
        replies = []
        for row, tokens in enumerate(after.greedy(lengths, drafts)):
            probability, said = torch.nan, self.model.to_string(tokens, skip_special_tokens=True)
            if answers[row]:
                probability = float(answers[row][0].probability(logits[row][None, :-1]))
            log_probs = prompts[row].logits.log_softmax(dim=-1).cpu()
            replies.append(Reply(tokens, said, probability, score(questions[row], said), log_probs))
        return replies

    def _length(self, question: VisualQuestion, answers: Sequence[Answer]) -> int:
        """How many tokens decide whether what is said is right."""
        if question.options or is_vqa(question) or not answers:
            return self.max_new_tokens
        return max(len(answer.tokens) for answer in answers) + 1


def score(question: VisualQuestion, said: str) -> float:
    """How right an answer is: 1 or 0; on OK-VQA the share of the VQA accuracy; NaN if unknown."""
    if not question.answers:
        return torch.nan
    if is_vqa(question):
        first_line = said.strip().split("\n")[0].removesuffix(".")
        return soft_accuracy(first_line, question.answers)
    return float(question.is_right(said))


def is_vqa(question: VisualQuestion) -> bool:
    """Whether the answers are those of annotators, as in OK-VQA."""
    return question.source.startswith("okvqa/")
