"""What edits do: efficacy, generalisation, specificity, portability, drift, and what they cost.

    found = evaluate(model, lambda case: multedit(model, request_of(model, case), layer=3), cases,
                     unrelated={"okvqa": okvqa(...)})
    print(found.summary()); found.plot().show()

Everything is asked before and after an edit. Of each question it is seen how probable the expected
answer is, and whether the greedy answer is right: the paper's metrics (Basu et al. 2024, section 5)
in both versions. Efficacy, paraphrases and other images expect the target; neighbours,
portability and unrelated questions what their data says.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from mmlens.data import EditCase, VisualQuestion
from mmlens.editing.edit import Edit
from mmlens.editing.edit_evaluation import EditEvaluation
from mmlens.editing.examiner import Examiner, Reply
from mmlens.editing.request import EditRequest
from mmlens.editing.sequential import SequentialEditor
from mmlens.utils.memory import peak_memory
from mmlens.utils.progress import Progress

if TYPE_CHECKING:
    from mmlens.model.transformer import HookedMultimodalTransformer

__all__ = ["Examination", "Unrelated", "evaluate", "evaluate_sequence", "measured", "request_of"]


def request_of(
    model: HookedMultimodalTransformer,
    case: EditCase,
    *,
    n_key_questions: int = 0,
    n_kept: int = 0,
    span: str | None = None,
    target_end: str = "",
    template: str | None = "auto",
) -> EditRequest:
    """What an editing method is told about a case; never anything that is asked afterwards.

    Args:
        n_key_questions: how many of `case.key_questions` become `key_prompts`.
        n_kept: how many of `case.kept` become `neighbours`.
        span: whose last token is the key's place; by default the visual constraint, and without
            one the whole question. "last" is the last token of the prompt.
        target_end: what is to follow the target, such as ".": without it nothing says where the
            answer ends, and "leone" may become "leoneau".
        template: what stands around a question; see `model.prepare`.

    Raises:
        ValueError: a question that cannot be prepared.
        UnknownSpanError: (a KeyError) there is no such span.
    """
    prepared = Examiner(model, template=template).prepared
    inputs = prepared(case.question)
    if span is None:
        span = "constraint" if "constraint" in inputs.spans[0] else "question"
    return EditRequest(
        inputs,
        case.target + target_end,
        span=span,
        key_prompts=[prepared(each) for each in case.key_questions[:n_key_questions]],
        neighbours=[prepared(each) for each in case.kept[:n_kept]],
    )


class Unrelated:
    """Questions that no edit is about; each is asked once before all edits.

    Args:
        questions: by the name under which they are reported: "okvqa", "mmmu".
        n: of each, how many are drawn for one edit.
        seed: of the draws.
    """

    def __init__(
        self, questions: Mapping[str, Sequence[VisualQuestion]] | None, n: int, seed: int = 0
    ) -> None:
        self.questions = dict(questions or {})
        self.n, self.seed = n, seed
        self.before: dict[tuple[str, int], Reply] = {}

    def drawn(self, case: EditCase) -> list[tuple[str, int]]:
        """Set and row of the questions for one edit, none of them about its subject."""
        found = []
        for name, questions in self.questions.items():
            chance = random.Random(f"{self.seed} {name} {case.source}")
            rows = chance.sample(range(len(questions)), len(questions))
            about = case.question.subject
            chosen: list[int] = []
            for row in rows:
                if len(chosen) == self.n:
                    break
                if not about or questions[row].subject != about:
                    chosen.append(row)
            found += [(name, row) for row in chosen]
        return found


class Examination:
    """All that is asked about one case, before any edit and after some.

    Args:
        examiner: who asks.
        case: what is edited.
        unrelated: questions besides.

    Example:
        >>> examination = Examination(Examiner(model), case).begin()
        >>> with edit.applied(model):
        ...     found = examination.after()
    """

    def __init__(
        self, examiner: Examiner, case: EditCase, unrelated: Unrelated | None = None
    ) -> None:
        self.examiner, self.case = examiner, case
        self.unrelated = unrelated or Unrelated(None, 0)
        groups = case.groups()
        self._own = [each for group in groups.values() for each in group]
        self._drawn = self.unrelated.drawn(case)
        others = [self.unrelated.questions[name][row] for name, row in self._drawn]
        self.questions = [*self._own, *others]
        self.groups = [name for name, group in groups.items() for _ in group]
        self.groups += [f"unrelated: {name}" for name, _ in self._drawn]

    def begin(self) -> Examination:
        """Ask the model as it is now: before the edit."""
        _ = self.before
        return self

    @cached_property
    def before(self) -> list[Reply]:
        """The replies of the model without the edit."""
        known = self.unrelated.before
        new = [key for key in self._drawn if key not in known]
        rest = [self.unrelated.questions[name][row] for name, row in new]
        replies = self.examiner.ask([*self._own, *rest])
        known.update(zip(new, replies[len(self._own) :], strict=True))
        return [*replies[: len(self._own)], *(known[key] for key in self._drawn)]

    def after(self, *, seconds: float = 0.0, memory: int = 0, n_edits: int = 1) -> EditEvaluation:
        """What the model, edited by now, makes of the same questions.

        Args:
            seconds: what the edit took.
            memory: bytes that it needed at once.
            n_edits: how many edits the model has.
        """
        before = self.before
        after = self.examiner.ask(self.questions, before)
        pairs = list(zip(before, after, strict=True))
        return EditEvaluation(
            edit=torch.zeros(len(pairs), dtype=torch.long),
            group=tuple(self.groups),
            question=tuple(question.source for question in self.questions),
            said_before=tuple(reply.said for reply in before),
            said=tuple(reply.said for reply in after),
            probability=torch.tensor([[x.probability for x in pair] for pair in pairs]).double(),
            score=torch.tensor([[x.score for x in pair] for pair in pairs]).double(),
            unchanged=torch.tensor([old.tokens == new.tokens for old, new in pairs]),
            drift=torch.tensor([new.drift(old) for old, new in pairs]).double(),
            case=(self.case.source,),
            cluster=(self.case.cluster,),
            target=(self.case.target,),
            n_edits=torch.tensor([n_edits]),
            seconds=torch.tensor([seconds]).double(),
            memory=torch.tensor([memory]),
        )

    def of(self, make: Callable[[], Edit]) -> EditEvaluation:
        """Make an edit, measure what that takes, and ask the edited model.

        Where the edit cannot be made (a ValueError: it has diverged, say), the model is asked as it
        is. `metadata["failed"]` is the reason, and empty where it could be made.
        """
        self.begin()
        model, seconds, memory, failed = self.examiner.model, torch.nan, 0, ""
        applied: AbstractContextManager[Any] = nullcontext()
        try:
            edit, seconds, memory = measured(model, make)
            applied = edit.applied(model)
        except ValueError as error:
            failed = str(error) or type(error).__name__
        with applied:
            found = self.after(seconds=seconds, memory=memory)
        return replace(found, metadata={"failed": failed})


def measured(
    model: HookedMultimodalTransformer, make: Callable[[], Edit]
) -> tuple[Edit, float, int]:
    """An edit, the seconds that making it took, and the most bytes that it held at once."""
    with peak_memory(model.device) as peak:
        began = time.perf_counter()
        edit = make()
        if model.device.type == "cuda":
            torch.cuda.synchronize(model.device)
        taken = time.perf_counter() - began
    return edit, taken, peak.size


def evaluate(
    model: HookedMultimodalTransformer,
    edits: Callable[[EditCase], Edit] | Iterable[Edit],
    cases: Sequence[EditCase],
    *,
    unrelated: Mapping[str, Sequence[VisualQuestion]] | None = None,
    n_unrelated: int = 8,
    template: str | None = "auto",
    seed: int = 0,
    progress: Progress | None = None,
) -> EditEvaluation:
    """Evaluate edits one at a time, each on the unedited model.

    Args:
        edits: what makes the edit of a case (its time and memory are measured), or one ready edit
            for each case.
        cases: what is edited, and what is asked.
        unrelated: further questions by name (OK-VQA, MMMU), whose accuracy before and after says
            what an edit damages elsewhere.
        n_unrelated: how many of each are drawn for each edit, others for every edit.
        template: what stands around a question; see `model.prepare`.
        seed: of the draws.
        progress: called with the edits done and all.

    Raises:
        ValueError: no cases, another number of edits, or a question that cannot be prepared.

    Example:
        >>> found = evaluate(model, [Edit.load("rome.safetensors")], [case])
        >>> found.summary().query("group == 'efficacy'")
    """
    examiner = Examiner(model, template=template)
    others = Unrelated(unrelated, n_unrelated, seed)
    ready = None if callable(edits) else list(edits)
    if ready is not None and len(ready) != len(cases):
        raise ValueError(f"{len(ready)} edits for {len(cases)} cases")
    found = []
    for index, case in enumerate(cases):
        examination = Examination(examiner, case, others).begin()
        if callable(edits):
            edit, seconds, memory = measured(model, lambda: edits(case))  # noqa: B023
        else:
            edit, seconds, memory = ready[index], torch.nan, 0  # type: ignore[index]
        with edit.applied(model):
            found.append(examination.after(seconds=seconds, memory=memory))
        if progress is not None:
            progress(index + 1, len(cases))
    return EditEvaluation.joined(found)


def evaluate_sequence(
    editor: SequentialEditor,
    requests: Callable[[EditCase], EditRequest],
    cases: Sequence[EditCase],
    *,
    at: Sequence[int] = (1, 2, 5, 10, 20, 50, 100),
    unrelated: Unrelated | None = None,
    template: str | None = "auto",
    done: Mapping[int, EditEvaluation] | None = None,
    found: Callable[[int, EditEvaluation], None] | None = None,
    progress: Progress | None = None,
) -> EditEvaluation:
    """Edit one case after the other and ask, after some numbers of edits, about all so far.

    Args:
        editor: of the model, without edits yet; it is left with all of them.
        requests: what the editor is told about a case; see `request_of`.
        cases: in the order in which they are edited.
        at: after how many edits to ask; the number of cases always.
        unrelated: questions that no edit is about.
        template: as in `evaluate`.
        done: what an earlier run found at some of these numbers: it is not asked again.
        found: called with each number and what was found there.
        progress: called with the edits done and all.

    Returns:
        One entry for each number and each case edited by then; `n_edits` tells them apart.

    Raises:
        ValueError: no cases, an editor that has edits, or a question that cannot be prepared.
    """
    if editor.edits:
        raise ValueError(
            f"the editor has {len(editor.edits)} edits already; a sequence begins at 0"
        )
    examiner = Examiner(editor.model, template=template)
    examinations = [Examination(examiner, case, unrelated) for case in cases]
    results = dict(done or {})
    stops = sorted({n for n in (*at, len(cases)) if 0 < n <= len(cases)})
    n_needed = max((n for n in stops if n not in results), default=0)
    for examination in examinations[:n_needed]:
        examination.begin()
    costs: list[tuple[float, int]] = []
    for number, case in enumerate(cases[:n_needed], start=1):
        request = requests(case)
        _, taken, held = measured(editor.model, lambda: editor.add(request))  # noqa: B023
        costs.append((taken, held))
        if number in stops and number not in results:
            results[number] = EditEvaluation.joined(
                [
                    examination.after(seconds=seconds, memory=memory, n_edits=number)
                    for examination, (seconds, memory) in zip(examinations, costs, strict=False)
                ]
            )
            if found is not None:
                found(number, results[number])
        if progress is not None:
            progress(number, len(cases))
    return EditEvaluation.joined([results[number] for number in stops])
