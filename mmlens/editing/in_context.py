"""In-context editing: the new fact stands before every question, and no weight changes.

IKE (Zheng et al. 2023, arXiv 2305.12740, section 4) puts demonstrations before a question: of the
new fact, and of facts that stay. Here the latter are other questions about the image, with what the
model answers to them.

    edit = in_context(model, inputs, "Rome")
    with edit.applied(model):
        model.prepare("The capital of this country is", flag)     # begins with the demonstrations
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mmlens.data.edits import SAME_IMAGE
from mmlens.editing.edit import Edit
from mmlens.editing.edit_check import EditCheck, Origin, greedy_answers
from mmlens.editing.references import References, question_of
from mmlens.editing.request import EditRequest, as_requests, how_made
from mmlens.inputs.multimodal_inputs import MultimodalInputs
from mmlens.utils.temporary import Changes, temporary

if TYPE_CHECKING:
    from mmlens.model.transformer import HookedMultimodalTransformer

__all__ = ["InContextEdit", "in_context"]

N_TOKENS = 4
"""Of the answers of facts that stay."""


@dataclass(frozen=True, eq=False)
class InContextEdit(Edit):
    """Demonstrations that `model.prepare` puts before every question while the edit is applied.

    Prompts that were prepared before are not changed, and neither is a weight; it can be applied
    for a block, and not for good.
    """

    demonstrations: str = ""

    @temporary
    def applied(self, model: HookedMultimodalTransformer) -> Changes[HookedMultimodalTransformer]:
        """Let `model.prepare` begin every question with the demonstrations, for a `with` block."""
        plain: Callable[..., MultimodalInputs] = model.prepare

        def prepare(text: str | Sequence[str], image: Any = None, **options: Any) -> Any:
            moved = {**options, "spans": self.moved_rows(options.get("spans"))}
            if isinstance(text, str):
                return plain(self.demonstrations + text, image, **moved)
            return plain([self.demonstrations + each for each in text], image, **moved)

        yield model.exclusive()
        around = model.__dict__.get("prepare")  # that of an outer block
        yield lambda: put_back(model, around)
        model.__dict__["prepare"] = prepare
        return model

    def moved(self, spans: Mapping[str, Any]) -> dict[str, Any]:
        """Return spans of a question as they are after the demonstrations."""
        n = len(self.demonstrations)
        return {
            name: span if isinstance(span, str) else (span[0] + n, span[1] + n)
            for name, span in spans.items()
        }

    def moved_rows(self, spans: Any) -> Any:
        """Return the spans of one question, of all, or a list of each one's."""
        if isinstance(spans, list | tuple):
            return [self.moved_rows(row) for row in spans]
        return self.moved(spans) if spans else spans

    def apply(self, model: HookedMultimodalTransformer) -> None:
        """Refuse: there is no weight to change.

        Raises:
            ValueError: always.
        """
        raise ValueError("demonstrations are no weights: use `with edit.applied(model)`")

    def check(self, *given: Any, **options: Any) -> EditCheck:
        """Refuse: references are prompts that are ready, which this edit does not change.

        Raises:
            ValueError: always.
        """
        raise ValueError("this edit changes what model.prepare makes: use mmlens.editing.evaluate")


def put_back(model: HookedMultimodalTransformer, prepare: Any) -> None:
    """Let `model.prepare` be what it was before a block: an outer block's, or None, the class's."""
    model.__dict__.pop("prepare", None)
    if prepare is not None:
        model.__dict__["prepare"] = prepare


def in_context(
    model: HookedMultimodalTransformer,
    inputs: MultimodalInputs | EditRequest | Sequence[EditRequest],
    target: str | int | None = None,
    *,
    layer: Any = None,
    references: Any = None,
    n_stay: int = 4,
) -> InContextEdit:
    """Return the demonstrations that tell a model the new fact.

    Args:
        inputs: as in `multedit`; the prompt's text must be known.
        target: as in `multedit`; a text.
        layer: is not used: other methods have it.
        references: as in `multedit`: of those that an edit may be told of, other questions about
            the image are demonstrations of what stays.
        n_stay: how many of them.

    Raises:
        ValueError: as `multedit`, or a target that is a token id.

    Example:
        >>> edit = in_context(model, inputs, "Rome")
        >>> print(edit.demonstrations)
    """
    requests = as_requests(inputs, target)
    known = References.of(references, model)
    lines: list[str] = []
    for request in requests:
        if not isinstance(request.target, str):
            raise ValueError("a demonstration is a text, and so must the target be")
        question = question_of(request.inputs, model.cfg.image_text)
        fact = f"{question.strip()} {request.target.strip()}."
        stay = [] if known is None else known.kept.around(model, request, (SAME_IMAGE,))[:n_stay]
        prompts = [each.inputs for each in stay]
        said = greedy_answers(model, prompts, [N_TOKENS] * len(stay), [()] * len(stay))
        for each, tokens in zip(stay, said, strict=True):
            answer = str(model.to_string(list(tokens))).strip()
            lines.append(f"{each.question.strip()} {first_line(answer)}.")
        lines += [f"New fact: {fact}", fact]
    return InContextEdit(
        {},
        {},
        how_made("in_context", requests, None, {"n_stay": n_stay}),
        origin=Origin.of(model, requests, known),
        demonstrations="\n".join(lines) + "\n",
    )


def first_line(answer: str) -> str:
    """Return an answer up to its first full stop or line break."""
    return answer.split("\n")[0].split(".")[0].strip()
