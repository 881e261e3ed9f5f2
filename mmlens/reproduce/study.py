"""One model, one set of questions: which of them count, and their traces."""

from __future__ import annotations

import random
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from mmlens.aggregation import AggregatedTraces, aggregate_traces, role_positions
from mmlens.corruptions import replacement_tokens, swap_span
from mmlens.data import VisualQuestion, is_right
from mmlens.inputs import MultimodalInputs
from mmlens.model import HookedMultimodalTransformer
from mmlens.reproduce.settings import Settings, open_questions
from mmlens.resampling import bootstrap_mean
from mmlens.spans import SpanNotFoundError
from mmlens.tracing import causal_trace_many

if TYPE_CHECKING:
    from mmlens.reproduce.correctness import Answers

Kind = Literal["seen", "named"]


@dataclass(eq=False)
class Asked:
    """A question put to a model; what the model makes of it is computed when it is wanted."""

    model: HookedMultimodalTransformer
    question: VisualQuestion
    inputs: MultimodalInputs
    settings: Settings
    _gaps: dict[tuple[str, ...], float] = field(default_factory=dict)

    @property
    def cluster(self) -> str:
        """Questions about the same thing are resampled together."""
        return self.question.subject or str(self.question.images[:1])

    @cached_property
    def right(self) -> bool | None:
        """Whether the greedy continuation is an accepted answer; None where none is known."""
        if not self.question.answers:
            return None
        n_tokens = self.settings.max_new_tokens
        said = str(self.model.generate(self.inputs, max_new_tokens=n_tokens))
        return self.question.is_right(said)

    @cached_property
    def confidence(self) -> float:
        """The probability of the most probable next token."""
        return self._first[1]

    @cached_property
    def _first(self) -> tuple[int, float]:
        with torch.no_grad():
            most = self.model(self.inputs)[0, -1].float().softmax(-1).max(-1)
        return int(most.indices), float(most.values)

    def corrupted(self, spans: Sequence[str]) -> MultimodalInputs:
        """The inputs with spans swapped for the replacement."""
        inputs = self.inputs
        for span in spans:
            word = replacement_tokens(self.model, self.inputs, span, self.settings.replacement)[0]
            inputs = swap_span(self.model, inputs, span, word)
        return inputs

    def gap(self, spans: tuple[str, ...]) -> float:
        """What the corruption takes from the first token's probability."""
        if spans not in self._gaps:
            token, confidence = self._first
            with torch.no_grad():
                after = self.model(self.corrupted(spans))[0, -1].float().softmax(-1)[token]
            self._gaps[spans] = confidence - float(after)
        return self._gaps[spans]


class Study:
    """The questions of some settings, shuffled by their seed, and who is asked.

    Example:
        >>> study = Study.open(Settings(limit=20))
        >>> chosen, counts = study.choose(["seen", "named"])
        >>> study.trace([each["seen"] for each in chosen], sites=("mlp_out",))
    """

    def __init__(
        self,
        settings: Settings,
        model: HookedMultimodalTransformer,
        questions: Sequence[VisualQuestion],
        language_model: HookedMultimodalTransformer | None = None,
    ) -> None:
        self.settings = settings
        self.models = {"seen": model, "named": language_model or model}
        self.questions = list(questions)
        random.Random(settings.seed).shuffle(self.questions)
        self._asked: dict[tuple[int, str], Asked] = {}
        self.answers: Answers | None = None
        """Of `mmlens.reproduce.correctness`, once they are there."""

    @classmethod
    def open(cls, settings: Settings, **options: object) -> Study:
        """Load models (with `options` of `from_pretrained`) and questions."""
        questions = open_questions(settings)
        names = [settings.model, *([settings.language_model] if settings.language_model else [])]
        load = HookedMultimodalTransformer.from_pretrained
        models = [load(name, **options) for name in names]  # type: ignore[arg-type]
        return cls(settings, models[0], questions, *models[1:])

    @property
    def model(self) -> HookedMultimodalTransformer:
        """The one that sees."""
        return self.models["seen"]

    def ask(self, index: int, kind: Kind) -> Asked:
        """A question with its picture, or in words alone; the same object each time.

        Raises:
            ValueError: it cannot be put: no such constraint, no picture, no subject to name.
        """
        if (index, kind) not in self._asked:
            question = self.questions[index]
            question = question.named() if kind == "named" else question
            inputs = self.models[kind].prepare(
                question.prompt(),
                question.open_images() or None,
                spans=question.spans(),
                template=self.settings.template,
            )
            self._asked[index, kind] = Asked(self.models[kind], question, inputs, self.settings)
        return self._asked[index, kind]

    def choose(
        self,
        kinds: Sequence[Kind] = ("seen",),
        suits: Callable[[VisualQuestion], bool] = lambda question: True,
        *,
        limit: int | None = None,
        corruptions: Sequence[tuple[str, ...]] = (("constraint",),),
        only_right: bool = True,
    ) -> tuple[list[dict[str, Asked]], dict[str, int]]:
        """The first questions that pass every filter, and how many fell to which.

        Args:
            kinds: every question is asked in each of these ways, and must pass in each.
            suits: other questions are not looked at.
            limit: how many; by default the settings'.
            corruptions: spans that are swapped together; each must take `minimum_gap` from the
                answer's probability.
            only_right: leave out wrong answers (where answers are known).

        Raises:
            ValueError: none passes.
        """
        limit = self.settings.limit if limit is None else limit
        dropped: Counter[str] = Counter()
        chosen: list[dict[str, Asked]] = []
        considered = 0
        with tqdm(total=limit, desc="choosing", unit="question", disable=not is_terminal()) as bar:
            for index in range(len(self.questions)):
                if len(chosen) == limit:
                    break
                if not suits(self.questions[index]):
                    continue
                considered += 1
                asked, reason = self._filtered(index, kinds, corruptions, only_right)
                if reason:
                    dropped[reason] += 1
                    continue
                chosen.append(asked)
                bar.update()
        counts = {"considered": considered, **dropped, "used": len(chosen)}
        if not chosen:
            raise ValueError(f"none of {len(self.questions)} questions can be used: {counts}")
        return chosen, counts

    def _filtered(
        self,
        index: int,
        kinds: Sequence[Kind],
        corruptions: Sequence[tuple[str, ...]],
        only_right: bool,
    ) -> tuple[dict[str, Asked], str]:
        """A question in all its ways, and why it does not count (empty if it does)."""
        question = self.questions[index]
        if not question.visual_constraint:
            return {}, "no visual constraint"
        if question.subject and is_right(question.subject, question.answers):
            return {}, "asks for the name of what is seen"
        try:
            asked: dict[str, Asked] = {kind: self.ask(index, kind) for kind in kinds}
        except SpanNotFoundError:
            return {}, "constraint not found"
        except ValueError:
            return {}, "no picture, or no subject"
        for kind, each in asked.items():
            if only_right and each.right is False:
                return {}, f"answered wrongly ({kind})"
        for kind, each in asked.items():
            if any(each.gap(spans) < self.settings.minimum_gap for spans in corruptions):
                return {}, f"gap too small ({kind})"
        return asked, ""

    def trace(
        self,
        asked: Sequence[Asked],
        *,
        sites: Sequence[str] = ("resid_post", "attn_out", "mlp_out"),
        roles: Sequence[str] = ("constraint", "last token"),
        window: int = 1,
        corrupt: Sequence[str] = ("constraint",),
    ) -> AggregatedTraces:
        """The first token's trace for every question, at these roles, aggregated."""

        def positions(inputs: MultimodalInputs) -> list[Int[Tensor, " _"]]:
            return list(roles_of(inputs, roles).values())

        traces = causal_trace_many(
            asked[0].model,
            [(each.inputs, each.corrupted(corrupt)) for each in asked],
            positions=positions,
            sites=sites,
            window=window,
            progress=is_terminal(),
        )
        return aggregate_traces(
            traces,
            [roles_of(each.inputs, roles) for each in asked],
            clusters=[each.cluster for each in asked],
            samples=self.settings.samples,
            level=self.settings.level,
            seed=self.settings.seed,
        )

    def bootstrap(
        self, values: Float[Tensor, "question ..."], clusters: Sequence[str]
    ) -> dict[str, Float[Tensor, "*cell"]]:
        """`mean`, `low` and `high` over questions, with the settings' resamples and level."""
        chosen = self.settings
        found = bootstrap_mean(
            values, clusters, samples=chosen.samples, level=chosen.level, seed=chosen.seed
        )
        return dict(zip(("mean", "low", "high"), found, strict=True))

    def describe(self, n_questions: int | str, *more: str) -> str:
        """A subtitle: how many questions, which interval, and what else there is to say."""
        interval = f"{self.settings.level:.0%} bootstrap interval"
        return ", ".join((f"{n_questions} questions", interval, *more))

    def progress(self, asked: Sequence[Asked], what: str) -> Iterable[Asked]:
        """The same, behind a progress bar."""
        return tqdm(asked, desc=what, unit="question", disable=not is_terminal())


def roles_of(inputs: MultimodalInputs, names: Sequence[str]) -> dict[str, Int[Tensor, " _"]]:
    """The positions of some roles, those of the text constraint among them."""
    roles = dict(role_positions(inputs))
    if "text_constraint" in inputs.spans[0]:
        roles["text constraint"] = inputs.span("text_constraint").cpu()
    return {name: roles[name] for name in names if name in roles}


def is_terminal() -> bool:
    """Whether somebody sees progress bars."""
    return sys.stderr.isatty()
