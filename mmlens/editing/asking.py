"""What a model makes of questions: its greedy answer, and how probable the expected one is.

    examiner = Examiner(model)
    before = examiner.ask(questions)
    with edit.applied(model):
        after = examiner.ask(questions, before)

Questions about one picture share its positions (`Recording.record`). A picture is encoded once, for
runs with and without edits: those change the decoder alone. Answers are the greedy ones, found by
checking a draft in one pass: the expected answer, or what was said before.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mmlens.answers import Answer, given_answer
from mmlens.branching import Recording
from mmlens.data import VisualQuestion, soft_accuracy
from mmlens.inputs import MultimodalInputs
from mmlens.model import HookedMultimodalTransformer
from mmlens.pictures import Pictures

__all__ = ["Examiner", "Reply", "score"]

PICTURES_KEPT = 128
"""Encoded pictures that are remembered, those used last."""


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
        known = before.log_probs > -torch.inf  # 0 x (-inf - -inf) where impossible in both
        expected, found = before.log_probs[known].double(), self.log_probs[known].double()
        return float((expected.exp() * (expected - found)).sum())


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
        self._pictures: OrderedDict[Hashable, Pictures | None] = OrderedDict()

    def prepared(self, question: VisualQuestion) -> MultimodalInputs:
        """The question as inputs of the model, with its spans.

        Raises:
            SpanNotFoundError: (a ValueError) a constraint that is not in the question.
            ValueError: a picture is missing.
        """
        return self.model.prepare(
            question.prompt(),
            question.open_images() or None,
            spans=question.spans() or None,
            template=self.template,
        )

    @torch.no_grad()
    def ask(
        self, questions: Sequence[VisualQuestion], before: Sequence[Reply] | None = None
    ) -> list[Reply]:
        """The replies to questions, in their order.

        Args:
            questions: those about one picture are computed together.
            before: replies to the same questions that may still hold. They change nothing but the
                time that it takes.

        Raises:
            ValueError: another number of replies, or as `prepared`.
        """
        if before is not None and len(before) != len(questions):
            raise ValueError(f"{len(before)} replies before for {len(questions)} questions")
        together: dict[Hashable, list[int]] = {}
        for index, question in enumerate(questions):
            together.setdefault(looks(question), []).append(index)
        replies: dict[int, Reply] = {}
        for picture, members in together.items():
            first = self._recorded(self.prepared(questions[members[0]]), picture)
            for index in members:
                question, draft = questions[index], before[index].tokens if before else ()
                recording = first
                if index != members[0]:
                    recording = first.record(self.prepared(question))
                replies[index] = self._reply(Continuations(recording), question, draft)
        return [replies[index] for index in range(len(questions))]

    def _recorded(self, inputs: MultimodalInputs, picture: Hashable) -> Recording:
        known = self._pictures.pop(picture, None)
        recording = Recording.of(self.model, inputs, known=known)
        self._pictures[picture] = recording.pictures
        if len(self._pictures) > PICTURES_KEPT:
            self._pictures.popitem(last=False)
        return recording

    def _reply(
        self, behind: Continuations, question: VisualQuestion, draft: tuple[int, ...]
    ) -> Reply:
        inputs = behind.recording.inputs
        answers = [given_answer(self.model, inputs, answer) for answer in question.answers]
        probability = behind.probability(answers[0]) if answers else torch.nan
        tokens = behind.greedy(self._length(question, answers), draft)
        said = self.model.to_string(tokens)
        return Reply(tokens, said, probability, score(question, said), behind.log_probs())

    def _length(self, question: VisualQuestion, answers: Sequence[Answer]) -> int:
        """How many tokens decide whether what is said is right."""
        if question.options or is_vqa(question) or not answers:
            return self.max_new_tokens
        return max(len(answer.tokens) for answer in answers) + 1


class Continuations:
    """What a model says behind a recorded prompt, and behind what it is told to have said."""

    def __init__(self, recording: Recording) -> None:
        self.recording = recording
        self.best: dict[tuple[int, ...], int] = {}
        """The most probable token behind each continuation that was followed."""
        self._logits = self.follow(())[0]

    def log_probs(self) -> Float[Tensor, " d_vocab"]:
        """Of the token behind the prompt, in nats."""
        return self._logits.log_softmax(dim=-1).cpu()

    def follow(self, tokens: tuple[int, ...]) -> Float[Tensor, "n_and_next d_vocab"]:
        """The logits behind the prompt and behind each of the tokens, in one pass; not all of it.

        Without tokens nothing is computed but the prompt's own logits.
        """
        recording = self.recording
        last = recording.inputs.n_pos - 1
        if tokens:
            told = torch.tensor(tokens, device=recording.inputs.device)
            recording = recording.record(recording.inputs.append(told))
        logits = recording.logits(range(last, last + len(tokens) + 1))[0]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        placeholder = recording.model.cfg.image_token_id
        words = logits
        if placeholder is not None and placeholder < logits.shape[-1]:
            words = logits.clone()
            words[:, placeholder] = -torch.inf  # no word: generation never says it
        for n, token in enumerate(words.argmax(dim=-1).tolist()):
            self.best[tokens[:n]] = token
        return logits

    def probability(self, answer: Answer) -> float:
        """The joint probability of an answer's tokens."""
        tokens = tuple(answer.tokens.tolist())
        logits = self._logits[None] if len(tokens) == 1 else self.follow(tokens)
        return float(answer.probability(logits[None, : len(tokens)]))

    def greedy(self, n: int, draft: tuple[int, ...] = ()) -> tuple[int, ...]:
        """At most `n` tokens, each the most probable one, up to an end token (which is left out).

        As `model.generate`; where the draft is right it takes one pass.
        """
        ends = self.recording.model.cfg.eos_token_ids
        said: tuple[int, ...] = ()
        while len(said) < n:
            if said not in self.best:
                guess = draft[: n - 1]
                self.follow(guess if guess[: len(said)] == said else said)
            if self.best[said] in ends:
                break
            said += (self.best[said],)
        return said


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


def looks(question: VisualQuestion) -> Hashable:
    """What tells pictures apart: files by their paths, others by their pixels."""

    def key(image: Any) -> Hashable:
        return str(image) if isinstance(image, str | Path) else (image.size, image.tobytes())

    return tuple(map(key, question.images))
