"""What an edit did to questions that it was not about, and was not told of.

check = edit.check()
check.summary()       # by kind: how many were asked, how many answers changed
check.to_dataframe()  # each question, with what was said before and after
check.warning         # a sentence where the edit did more than it was asked, or ""
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar
from weakref import ReferenceType, ref

import torch
from jaxtyping import Bool
from torch import Tensor

from mmlens.analyses.result import SavedResult
from mmlens.analyses.targets import given_answer
from mmlens.branching.passes import size_limit
from mmlens.branching.recording import Recording
from mmlens.data.metrics import answer_alone
from mmlens.editing.references import KINDS, Reference, References
from mmlens.editing.request import EditRequest
from mmlens.inputs.multimodal_inputs import MultimodalInputs
from mmlens.model.drafts import FinishedPrompt, GreedyContinuations
from mmlens.utils.grad_mode import without_gradients
from mmlens.utils.statistics import bootstrap_mean
from mmlens.utils.temporary import Changes, temporary

if TYPE_CHECKING:
    import pandas as pd

    from mmlens.editing.edit import Edit
    from mmlens.model.transformer import HookedMultimodalTransformer

__all__ = ["EditCheck", "Origin", "check_edit", "joined_origin"]

EDITED = "the edit"
N_TOKENS = 5
"""The most of each answer that are compared."""
MUCH = 0.1
"""The share of a kind's answers above which a change of them is warned of."""

Said = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Origin:
    """What an edit was made of."""

    model: ReferenceType[HookedMultimodalTransformer]
    requests: tuple[EditRequest, ...]
    references: References | None

    @classmethod
    def of(
        cls,
        model: HookedMultimodalTransformer,
        requests: Sequence[EditRequest],
        references: References | None = None,
    ) -> Origin:
        """Note a model, without keeping it alive."""
        return cls(ref(model), tuple(requests), references)


def joined_origin(one: Origin | None, other: Origin | None) -> Origin | None:
    """Return the origin of a sum of edits; None where one is unknown."""
    if one is None or other is None or one.model() is not other.model():
        return None
    requests = (*one.requests, *other.requests)
    return Origin(one.model, requests, one.references or other.references)


@dataclass(frozen=True, eq=False)
class EditCheck(SavedResult):
    """References that were held out, and what was said before and after an edit.

    A row with the kind "the edit" is a prompt that was to be answered with the target.

    Example:
        >>> check = edit.check()
        >>> check.to_dataframe().query("changed")
    """

    SIZES: ClassVar[dict[str, str]] = dict.fromkeys(
        ("kind", "question", "image", "before", "after", "target"), "row"
    )

    changed: Bool[Tensor, " row"]
    """Whether the greedy answer is another one, up to the end of its first sentence or line."""
    states_target: Bool[Tensor, " row"]
    """Whether the answer after the edit begins with the edit's target."""
    kind: tuple[str, ...]
    """"same question" (about another image), "same image" (another question), "unrelated", "text"
    (no image), or "the edit"."""
    question: tuple[str, ...]
    image: tuple[str, ...]
    """The image's name; "" for the edit's own, or none."""
    before: tuple[str, ...]
    """The greedy answer without the edit."""
    after: tuple[str, ...]
    """The greedy answer with it."""
    target: tuple[str, ...]
    """The new answer of the edit that the row is asked for."""
    metadata: dict[str, Any] = field(default_factory=dict)

    def to_dataframe(self) -> pd.DataFrame:
        """One row per question."""
        import pandas as pd

        return pd.DataFrame(
            {
                "kind": self.kind,
                "question": self.question,
                "image": self.image,
                "before": self.before,
                "after": self.after,
                "changed": self.changed.numpy(),
                "states_target": self.states_target.numpy(),
                "target": self.target,
            }
        )

    def summary(self) -> pd.DataFrame:
        """By kind: `asked`, `changed`, `to_target`, and the share unchanged with a 95 % interval.

        `to_target` counts the changed answers that are now the target.
        """
        import pandas as pd

        table, rows = self.to_dataframe(), []
        for kind, part in table.groupby("kind", sort=False):
            kept = 1.0 - torch.tensor(part["changed"].to_numpy(dtype=float))
            mean, low, high = bootstrap_mean(kept, [str(row) for row in range(len(kept))])
            rows.append(
                {
                    "kind": kind,
                    "asked": len(part),
                    "changed": int(part["changed"].sum()),
                    "to_target": int((part["changed"] & part["states_target"]).sum()),
                    "unchanged": float(mean),
                    "low": float(low),
                    "high": float(high),
                }
            )
        return pd.DataFrame(rows)

    @property
    def warning(self) -> str:
        """What the edit did beyond what it was asked, in plain words; "" where that is little."""
        said = []
        for row in self.summary().itertuples():
            if row.kind == EDITED:
                stated = self.states_target[torch.tensor([kind == EDITED for kind in self.kind])]
                if not bool(stated.all()):
                    said.append("the edited question is not answered with the target")
            elif row.to_target or row.changed > max(1, MUCH * row.asked):
                into = f", {row.to_target} of them to the target" if row.to_target else ""
                said.append(f"{row.changed} of {row.asked} answers ({row.kind}) changed{into}")
        if not said:
            return ""
        return "this edit did not do just what it was asked: " + "; ".join(said)


def check_edit(
    edit: Edit,
    model: HookedMultimodalTransformer | None,
    inputs: MultimodalInputs | EditRequest | None,
    references: Any,
) -> EditCheck:
    """See `Edit.check`."""
    origin = edit.origin
    if model is None and origin is not None:
        model = origin.model()
    if model is None:
        raise ValueError("which model is this edit for? Give it: edit.check(model, inputs)")
    requests = origin.requests if origin else ()
    if inputs is not None:
        requests = (as_request(edit, inputs),)
    if not requests:
        raise ValueError("what is this edit about? Give its prompt: edit.check(model, inputs)")
    if references == "auto" and origin and origin.references:
        references = origin.references
    given = References.of(references, model)
    if given is None:
        raise ValueError("references=None: there is nothing to ask")
    rows: list[tuple[Reference, EditRequest]] = []
    for request in requests:
        own = [Reference(EDITED, model.to_inputs(each), "", "") for each in request.prompts[:1]]
        rows += [(each, request) for each in own]
        asked = given.held_out.around(model, request)
        rows += [(each, request) for each in sorted(asked, key=lambda one: KINDS.index(one.kind))]
    return asked_about(edit, model, rows)


def as_request(edit: Edit, inputs: MultimodalInputs | EditRequest) -> EditRequest:
    """Return what an edit from a file was to do, with the prompt that the user gives."""
    if isinstance(inputs, EditRequest):
        return inputs
    target = edit.metadata.get("target", "")
    if not isinstance(target, str | int) or target == "":
        raise ValueError("this edit has several targets, or none: give an EditRequest")
    span = "constraint" if "constraint" in inputs.spans[0] else "last"
    return EditRequest(inputs, target, span=span)


def asked_about(
    edit: Edit,
    model: HookedMultimodalTransformer,
    rows: Sequence[tuple[Reference, EditRequest]],
) -> EditCheck:
    """Ask before and after."""
    prompts = [reference.inputs for reference, _ in rows]
    answers = [given_answer(model, each.inputs, each.target) for _, each in rows]
    targets = [tuple(answer.tokens.tolist()) for answer in answers]
    n_tokens = [max(N_TOKENS, len(target)) for target in targets]
    with lifted(edit, model):
        before = greedy_answers(model, prompts, n_tokens, [()] * len(prompts))
    was_on = edit.is_applied(model)
    on: AbstractContextManager[Any] = nullcontext() if was_on else edit.applied(model)
    with on:
        drafts = [
            target if reference.kind == EDITED else old
            for (reference, _), target, old in zip(rows, targets, before, strict=True)
        ]
        after = greedy_answers(model, prompts, n_tokens, drafts)

    def text(said: Said) -> str:
        if model.tokenizer is None:
            return " ".join(map(str, said))
        return str(model.to_string(list(said), skip_special_tokens=True)).strip()

    pairs = [(text(old), text(new)) for old, new in zip(before, after, strict=True)]
    stated = [new[: len(to)] == to for new, to in zip(after, targets, strict=True)]
    return EditCheck(
        changed=torch.tensor([answer_alone(old) != answer_alone(new) for old, new in pairs]),
        states_target=torch.tensor(stated),
        kind=tuple(reference.kind for reference, _ in rows),
        question=tuple(reference.question for reference, _ in rows),
        image=tuple(reference.image for reference, _ in rows),
        before=tuple(old for old, _ in pairs),
        after=tuple(new for _, new in pairs),
        target=tuple(str(request.target) for _, request in rows),
        metadata={"edit": {k: v for k, v in edit.metadata.items() if k in ("method", "target")}},
    )


@temporary
def lifted(edit: Edit, model: HookedMultimodalTransformer) -> Changes[None]:
    """A block in which the model is without the edit."""
    yield model.exclusive()
    if edit.is_applied(model):

        def put_on() -> None:
            if not edit.is_applied(model):
                edit.apply(model)

        yield put_on
        edit.revert(model)


@without_gradients
def greedy_answers(
    model: HookedMultimodalTransformer,
    prompts: Sequence[MultimodalInputs],
    n_tokens: Sequence[int],
    drafts: Sequence[Said],
) -> list[Said]:
    """Return the first tokens of the greedy answers; prompts with a common beginning share it."""
    said: list[Said] = []
    recorded: list[Recording] = []

    def finish() -> None:
        rows = range(len(said), len(said) + len(recorded))
        after = GreedyContinuations(model, [FinishedPrompt.of(each) for each in recorded])
        said.extend(after.greedy([n_tokens[i] for i in rows], [drafts[i] for i in rows]))
        recorded.clear()

    for inputs in prompts:
        recorded += Recording.of_all(model, [inputs], earlier=recorded)
        if (len(recorded) + 1) * inputs.n_pos > size_limit(model, inputs.n_pos):
            finish()
    if recorded:
        finish()
    return said
