"""Gradient descent on the likelihood of targets, for the methods that train weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from mmlens.answers import Answer, given_answer, with_answer
from mmlens.editing.request import EditRequest
from mmlens.inputs import MultimodalInputs

if TYPE_CHECKING:
    from mmlens.model import HookedMultimodalTransformer

Forward = Callable[[Float[Tensor, "1 pos d_model"], MultimodalInputs], Tensor]
"""From what enters the first trained layer to the residual stream behind the last one."""


@dataclass(frozen=True)
class DescentSettings:
    """How weights are trained.

    Raises:
        ValueError: a number of steps or a learning rate that makes no sense.
    """

    lr: float = 1e-3
    """Learning rate of Adam."""
    steps: int = 30
    """The most steps, each over all requests."""
    stop_at: float = 0.98
    """The least probability of any target at which training ends."""

    def __post_init__(self) -> None:
        if self.steps < 1 or self.lr <= 0:
            raise ValueError(f"steps={self.steps}, lr={self.lr}: both must be positive")


@dataclass(frozen=True, eq=False)
class Trained:
    """A prompt with its target behind it, run as far as the first trained layer."""

    inputs: MultimodalInputs
    answer: Answer
    resid: Float[Tensor, "1 pos d_model"]


@torch.no_grad()
def run_to_layer(
    model: HookedMultimodalTransformer, requests: Sequence[EditRequest], layer: int
) -> list[Trained]:
    """All prompts of the requests, as far as what training does not change."""
    found = []
    for request in requests:
        for prompt in request.prompts:
            given = model.to_inputs(prompt)
            answer = given_answer(model, given, request.target)
            inputs = with_answer(given, answer)
            found.append(Trained(inputs, answer, model(inputs, stop_at_layer=layer)))
    return found


def descend(
    model: HookedMultimodalTransformer,
    prompts: Sequence[Trained],
    parameters: Sequence[Tensor],
    forward: Forward,
    settings: DescentSettings,
    project: Callable[[], None] | None = None,
) -> list[float]:
    """Train until the targets are probable, or for `settings.steps`.

    Args:
        parameters: what is trained.
        forward: runs the layers with the parameters as they are.
        project: called behind every step, to keep the parameters within bounds.

    Returns:
        The probability of each prompt's target, at last.
    """
    optimiser = torch.optim.Adam(parameters, lr=settings.lr)
    for step in range(settings.steps + 1):
        optimiser.zero_grad()
        probabilities = []
        for each in prompts:
            with torch.enable_grad():
                resid = forward(each.resid, each.inputs)
                logits = model.unembed(model.ln_final(resid[:, each.answer.positions]))
                log_probability = each.answer.log_probability(logits).mean()
            probabilities.append(float(log_probability.detach().exp()))
            if step < settings.steps:
                # One prompt's activations at a time.
                torch.autograd.backward(-log_probability / len(prompts), inputs=list(parameters))
        if min(probabilities) >= settings.stop_at or step == settings.steps:
            break
        optimiser.step()
        if project is not None:
            with torch.no_grad():
                project()
    return probabilities
