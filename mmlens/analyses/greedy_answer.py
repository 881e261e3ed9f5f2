"""Whether what a model says is right."""

from __future__ import annotations

from mmlens.analyses.targets import given_answer
from mmlens.data import VisualQuestion
from mmlens.inputs.multimodal_inputs import MultimodalInputs
from mmlens.model.drafts import FinishedPrompt, GreedyContinuations
from mmlens.model.hooked_root_module import exclusively
from mmlens.model.transformer import HookedMultimodalTransformer
from mmlens.utils.grad_mode import without_gradients
from mmlens.utils.threads import on_free_cores


@exclusively
@without_gradients
@on_free_cores
def answers_rightly(
    model: HookedMultimodalTransformer,
    question: VisualQuestion,
    inputs: MultimodalInputs,
    max_new_tokens: int,
) -> bool | None:
    """Return whether the greedy continuation is an accepted answer; None where none is known."""
    if not question.answers or not max_new_tokens:
        return None
    expected = [each for each in question.expected[:1] if each.strip()]
    drafts = [tuple(given_answer(model, inputs, each).tokens.tolist()) for each in expected]
    after = GreedyContinuations(model, [FinishedPrompt.of(model.record(inputs))])
    [tokens] = after.greedy([max_new_tokens], drafts or [()])
    return question.is_right(model.to_string(tokens, skip_special_tokens=True))
