"""One model, one set of questions: which of them count, and their traces."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeVar

from jaxtyping import Float, Int
from torch import Tensor

from mmlens.analyses.aggregation import AggregatedTraces, aggregate_traces
from mmlens.analyses.causal_trace import causal_trace
from mmlens.analyses.corruptions import replacement_tokens, swap_span
from mmlens.analyses.greedy_answer import answers_rightly
from mmlens.analyses.trace_result import CausalTrace
from mmlens.branching.recording import Recording
from mmlens.data import VisualQuestion, is_right, open_questions
from mmlens.inputs.multimodal_inputs import MultimodalInputs
from mmlens.inputs.spans import SpanNotFoundError
from mmlens.model.transformer import HookedMultimodalTransformer
from mmlens.plots.figure_folder import stamp as figure_stamp
from mmlens.reproduce.settings import Settings
from mmlens.sweeps.items import content
from mmlens.sweeps.task import roles_of
from mmlens.utils.grad_mode import gradients
from mmlens.utils.progress import progress_bar
from mmlens.utils.resumable import ResultFile, Resumable, as_json, hashed
from mmlens.utils.statistics import bootstrap_mean

Kind = Literal["seen", "named"]
Result = TypeVar("Result")


@dataclass(eq=False)
class StudyQuestion:
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
        n_tokens = self.settings.max_new_tokens
        return answers_rightly(self.model, self.question, self.inputs, n_tokens)

    @cached_property
    def confidence(self) -> float:
        """The probability of the most probable next token."""
        return self._first[1]

    @cached_property
    def _first(self) -> tuple[int, float]:
        with gradients(False):
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
            with gradients(False):
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
        self.n_refused = len(getattr(questions, "refused", ()))
        """Rows of the data set that could not be used."""
        self.questions = list(questions)
        random.Random(settings.seed).shuffle(self.questions)
        chosen = {"samples": settings.samples, "level": settings.level, "seed": settings.seed}
        self.resampling: dict[str, Any] = chosen
        """How intervals are made."""
        self._asked: dict[tuple[int, str], StudyQuestion] = {}
        self.unfinished: Path | None = None
        """Where results of single questions are kept until a figure is complete; or nowhere."""
        self.shared: dict[str, Any] = {}
        """What several figures need, once it is there."""

    @classmethod
    def open(cls, settings: Settings, **options: object) -> Study:
        """Load models (with `options` of `from_pretrained`) and questions."""
        chosen = settings.data, settings.images, settings.annotations
        questions = open_questions(*chosen, seed=settings.seed)
        bounds = {"min_pixels": settings.min_pixels, "max_pixels": settings.max_pixels}
        chosen_models = [(settings.model, bounds)]
        if settings.language_model:  # it is told the name in words, and sees no image
            chosen_models.append((settings.language_model, {}))
        load = HookedMultimodalTransformer.from_pretrained
        models = [load(name, **options, **own) for name, own in chosen_models]  # type: ignore[arg-type]
        return cls(settings, models[0], questions, *models[1:])

    @property
    def model(self) -> HookedMultimodalTransformer:
        """The one that sees."""
        return self.models["seen"]

    def ask(self, index: int, kind: Kind) -> StudyQuestion:
        """A question with its image, or in words alone; the same object each time.

        Raises:
            ValueError: it cannot be put: no such constraint, no image, no subject to name.
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
            self._asked[index, kind] = StudyQuestion(
                self.models[kind], question, inputs, self.settings
            )
        return self._asked[index, kind]

    def choose(
        self,
        kinds: Sequence[Kind] = ("seen",),
        suits: Callable[[VisualQuestion], bool] = lambda question: True,
        *,
        limit: int | None = None,
        corruptions: Sequence[tuple[str, ...]] = (("constraint",),),
        only_right: bool = True,
    ) -> tuple[list[dict[str, StudyQuestion]], dict[str, int]]:
        """The first questions that pass every filter, and how many fell to which.

        Args:
            kinds: every question is asked in each of these ways, and must pass in each.
            suits: other questions are not considered.
            limit: how many; by default the settings'.
            corruptions: spans that are swapped together; each must take `minimum_gap` from the
                answer's probability.
            only_right: leave out wrong answers (where answers are known).

        Raises:
            ValueError: none passes.
        """
        limit = self.settings.limit if limit is None else limit
        dropped: Counter[str] = Counter()
        chosen: list[dict[str, StudyQuestion]] = []
        considered = 0
        with progress_bar("choosing questions") as moved:
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
                moved(len(chosen), limit)
        counts = {"considered": considered, **dropped, "used": len(chosen)}
        if self.n_refused:
            counts["rows that could not be used"] = self.n_refused
        if not chosen:
            raise ValueError(f"none of {len(self.questions)} questions can be used: {counts}")
        return chosen, counts

    def _filtered(
        self,
        index: int,
        kinds: Sequence[Kind],
        corruptions: Sequence[tuple[str, ...]],
        only_right: bool,
    ) -> tuple[dict[str, StudyQuestion], str]:
        """A question in all its ways, and why it does not count (empty if it does)."""
        question = self.questions[index]
        if not question.visual_constraint:
            return {}, "no visual constraint"
        if question.subject and is_right(question.subject, question.answers):
            return {}, "asks for the name of what is seen"
        try:
            asked: dict[str, StudyQuestion] = {kind: self.ask(index, kind) for kind in kinds}
        except SpanNotFoundError:
            return {}, "constraint not found"
        except ValueError:
            return {}, "no image, or no subject"
        for kind, each in asked.items():
            if only_right and each.right is False:
                return {}, f"answered wrongly ({kind})"
        for kind, each in asked.items():
            if any(each.gap(spans) < self.settings.minimum_gap for spans in corruptions):
                return {}, f"gap too small ({kind})"
        return asked, ""

    def trace(
        self,
        asked: Sequence[StudyQuestion],
        *,
        sites: Sequence[str] = ("resid_post", "attn_out", "mlp_out"),
        roles: Sequence[str] = ("constraint", "last token"),
        window: int = 1,
        corrupt: Sequence[str] = ("constraint",),
    ) -> AggregatedTraces:
        """The first token's trace for every question, at these roles, aggregated."""
        earlier: list[Recording] = []

        def positions_of(each: StudyQuestion) -> dict[str, Int[Tensor, " _"]]:
            there = roles_of(each.inputs)
            return {name: there[name] for name in roles if name in there}

        def traced(each: StudyQuestion) -> CausalTrace:
            return causal_trace(
                each.model,
                each.inputs,
                each.corrupted(corrupt),
                positions=list(positions_of(each).values()),
                sites=sites,
                window=window,
                earlier=earlier,
            )

        what = ["trace", sites, roles, window, corrupt]
        return aggregate_traces(
            self.of_each(asked, what, CausalTrace, traced),
            list(map(positions_of, asked)),
            clusters=[each.cluster for each in asked],
            **self.resampling,
        )

    def bootstrap(
        self, values: Float[Tensor, "question ..."], clusters: Sequence[str]
    ) -> dict[str, Float[Tensor, "*cell"]]:
        """`mean`, `low` and `high` over questions, with the settings' resamples and level."""
        return bootstrap_mean(values, clusters, **self.resampling)._asdict()

    def describe(self, n_questions: int | str, *more: str) -> str:
        """A subtitle: how many questions, which interval, and what else there is to say."""
        interval = f"{self.settings.level:.0%} bootstrap interval"
        return ", ".join((f"{n_questions} questions", interval, *more))

    def of_each(
        self,
        asked: Sequence[StudyQuestion],
        what: Sequence[Any],
        kind: type[Result],
        make: Callable[[StudyQuestion], Result],
    ) -> list[Result]:
        """Return a result for every question; what an earlier run has left is read.

        Args:
            what: the kind of result in words, and whatever else it depends on beside the settings.
        """

        def file(each: StudyQuestion) -> ResultFile[Result] | None:
            if self.unfinished is None:
                return None
            about = [*what, content(each.question), str(each.model.W_E.dtype)]
            stamp = figure_stamp(str(what[0]), self.settings) | {"question": as_json(about)}
            path = self.unfinished / f"{hashed(stamp)}.safetensors"
            return ResultFile(kind, path, {"made for": stamp})

        with progress_bar(str(what[0])) as moved:
            run = Resumable({each: file(each) for each in asked}, moved)
            return list(run.each(make).values())
