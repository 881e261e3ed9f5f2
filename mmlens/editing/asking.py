"""What a model makes of questions: its greedy answer, and how probable the expected one is.

    examiner = Examiner(model)
    before = examiner.ask(questions)
    with edit.applied(model):
        after = examiner.ask(questions, before)

Questions about one picture share its positions (`Recording.record`). A picture is encoded once, for
runs with and without edits: those change the decoder alone. What is said behind the prompts is
computed for all of them together; answers are the greedy ones, found by checking drafts in one
pass: the expected answer, or what was said before.
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
from torch.nn.functional import pad

from mmlens.answers import Answer, given_answer
from mmlens.branching import Recording
from mmlens.components import KeyValueCache
from mmlens.data import VisualQuestion, soft_accuracy
from mmlens.inputs import MultimodalInputs
from mmlens.model import HookedMultimodalTransformer
from mmlens.passes import size_limit
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
        drafts = [reply.tokens for reply in before] if before else [()] * len(questions)
        order = sorted(range(len(questions)), key=together(questions).__getitem__)
        replies: dict[int, Reply] = {}
        while order:
            prompts = self._run([questions[index] for index in order])
            members, order = order[: len(prompts)], order[len(prompts) :]
            asked = [questions[index] for index in members]
            found = self._replies(asked, prompts, [drafts[index] for index in members])
            replies.update(zip(members, found, strict=True))
        return [replies[index] for index in range(len(questions))]

    def _run(self, questions: Sequence[VisualQuestion]) -> list[Prompt]:
        """The first questions, as many as fit at once: one on each picture, then the others."""
        prepared: list[MultimodalInputs] = []
        longest = 0
        for question in questions:
            prepared.append(self.prepared(question))
            longest = max(longest, prepared[-1].n_pos)
            if (len(prepared) + 1) * longest > size_limit(self.model, longest):
                break
        numbers = together(questions[: len(prepared)])
        firsts = {number: row for row, number in reversed(list(enumerate(numbers)))}
        recorded = self._recorded({looks(questions[r]): prepared[r] for r in firsts.values()})
        return [
            Prompt.of(
                recorded[looks(question)]
                if firsts[number] == row
                else recorded[looks(question)].record(inputs)
            )
            for row, (number, question, inputs) in enumerate(
                zip(numbers, questions, prepared, strict=False)
            )
        ]

    def _recorded(self, prompts: dict[Hashable, MultimodalInputs]) -> dict[Hashable, Recording]:
        """Prompts by their pictures, run together; pictures that are remembered are not encoded."""
        known = [self._pictures.pop(look) for look in prompts if look in self._pictures]
        parts = [pictures for pictures in known if pictures is not None]
        inputs = list(prompts.values())
        found = Recording.of_each(self.model, inputs, Pictures.of_all(parts))
        for look, recording in zip(prompts, found, strict=True):
            self._pictures[look] = recording.pictures
        while len(self._pictures) > PICTURES_KEPT:
            self._pictures.popitem(last=False)
        return dict(zip(prompts, found, strict=True))

    def _replies(
        self,
        questions: Sequence[VisualQuestion],
        prompts: Sequence[Prompt],
        drafts: Sequence[tuple[int, ...]],
    ) -> list[Reply]:
        answers = [
            [given_answer(self.model, prompt.inputs, answer) for answer in question.expected]
            for question, prompt in zip(questions, prompts, strict=True)
        ]
        behind = Continuations(self.model, prompts)
        expected = [tuple(each[0].tokens.tolist()) if each else () for each in answers]
        logits = behind.follow(expected)
        lengths = [self._length(*each) for each in zip(questions, answers, strict=True)]
        replies = []
        for row, tokens in enumerate(behind.greedy(lengths, drafts)):
            probability, said = torch.nan, self.model.to_string(tokens)
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


@dataclass(frozen=True, eq=False)
class Prompt:
    """A prompt that was run: what is needed to go on behind it."""

    inputs: MultimodalInputs
    past: KeyValueCache
    logits: Float[Tensor, " d_vocab"]
    """Of the next token."""

    @classmethod
    def of(cls, recording: Recording) -> Prompt:
        """That of a recording."""
        logits = recording.logits()[0, 0]
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return cls(recording.inputs, recording.past, wide)


class Continuations:
    """What a model says behind some prompts, and behind what it is told to have said there."""

    def __init__(self, model: HookedMultimodalTransformer, prompts: Sequence[Prompt]) -> None:
        self.model, self.prompts = model, prompts
        self.best: list[dict[tuple[int, ...], int]] = [{} for _ in prompts]
        """The most probable token behind each continuation that was followed."""
        self.follow([()] * len(prompts))

    def follow(
        self, tokens: Sequence[tuple[int, ...]]
    ) -> list[Float[Tensor, "n_and_next d_vocab"]]:
        """Each prompt's logits, and those behind each of the tokens that follow it.

        In one pass of the prompts that something follows.
        """
        logits = [prompt.logits[None] for prompt in self.prompts]
        if rows := [row for row, told in enumerate(tokens) if told]:
            width = max(map(len, tokens))
            # What fills up the shorter ones comes behind them, where they do not look.
            filler = int(self.model.cfg.image_token_id == 0)
            filled = [[*tokens[row], *[filler] * (width - len(tokens[row]))] for row in rows]
            inputs = self.model.inputs_from_tokens(torch.tensor(filled))
            resid = self.model(
                inputs,
                past_kv_cache=side_by_side([self.prompts[row].past for row in rows]),
                stop_at_layer=self.model.cfg.n_layers,
            )
            new = self.model.unembed(self.model.ln_final(resid))
            for row, behind in zip(rows, new.to(logits[0]), strict=True):
                logits[row] = torch.cat([logits[row], behind[: len(tokens[row])]])
        placeholder = self.model.cfg.image_token_id
        for best, found, told in zip(self.best, logits, tokens, strict=True):
            words = found
            if placeholder is not None and placeholder < found.shape[-1]:
                words = found.clone()
                words[:, placeholder] = -torch.inf  # no word: generation never says it
            for n, token in enumerate(words.argmax(dim=-1).tolist()):
                best[told[:n]] = token
        return logits

    def greedy(
        self, lengths: Sequence[int], drafts: Sequence[tuple[int, ...]]
    ) -> list[tuple[int, ...]]:
        """At most so many tokens each, the most probable ones, without an end token.

        As `model.generate`; where a draft is right it takes one pass.
        """
        ends = self.model.cfg.eos_token_ids
        said: list[tuple[int, ...]] = [()] * len(self.prompts)
        while True:
            wanted: list[tuple[int, ...]] = [()] * len(said)
            for row, (n, draft) in enumerate(zip(lengths, drafts, strict=True)):
                tokens, best = said[row], self.best[row]
                while len(tokens) < n and tokens in best and best[tokens] not in ends:
                    tokens += (best[tokens],)
                said[row] = tokens
                if len(tokens) < n and tokens not in best:
                    guess = draft[: n - 1]
                    wanted[row] = guess if guess[: len(tokens)] == tokens else tokens
            if not any(wanted):
                return said
            self.follow(wanted)


def side_by_side(pasts: Sequence[KeyValueCache]) -> KeyValueCache:
    """The keys and values of several prompts as one frozen batch, padded on the left."""
    longest = max(map(len, pasts))

    def padded(tensor: Tensor) -> Tensor:
        return pad(tensor, (0, 0, 0, 0, longest - tensor.shape[1], 0))

    entries = []
    for layer in zip(*(past.entries for past in pasts), strict=True):
        keys, values = zip(*filter(None, layer), strict=True)
        entries.append((torch.cat([*map(padded, keys)]), torch.cat([*map(padded, values)])))
    device = entries[0][0].device
    lengths = torch.tensor([len(past) for past in pasts], device=device)
    mask = torch.arange(longest, device=device) >= longest - lengths[:, None]
    return KeyValueCache.holding(entries, mask)


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


def together(questions: Sequence[VisualQuestion]) -> list[int]:
    """A number for each question, the same for those about the same picture, in their order."""
    numbers: dict[Hashable, int] = {}
    return [numbers.setdefault(looks(question), len(numbers)) for question in questions]


def looks(question: VisualQuestion) -> Hashable:
    """What tells pictures apart: files by their paths, others by their pixels."""

    def key(image: Any) -> Hashable:
        return str(image) if isinstance(image, str | Path) else (image.size, image.tobytes())

    return tuple(map(key, question.images))
