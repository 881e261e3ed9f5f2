"""Gradient descent on the likelihood of targets, for the methods that train weights."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from mmlens.analyses.targets import Answer, given_answer, with_answer
from mmlens.editing.request import EditRequest
from mmlens.inputs.multimodal_inputs import MultimodalInputs
from mmlens.utils.divergence import divergence
from mmlens.utils.grad_mode import gradients, without_gradients

if TYPE_CHECKING:
    from mmlens.editing.references import References
    from mmlens.model.transformer import HookedMultimodalTransformer

REPLAYED = 12
"""The most references of each kind that are replayed."""
Forward = Callable[[Float[Tensor, "1 pos d_model"], MultimodalInputs], Tensor]
"""From what enters the first trained layer to the residual stream after the last one."""


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
    kl_weight: float = 1.0
    """Weight of KL(before || after) of references' next tokens, where there are references."""
    replayed: int = 8
    """How many references each step takes, in turn."""

    def __post_init__(self) -> None:
        if self.steps < 1 or self.lr <= 0:
            raise ValueError(f"steps={self.steps}, lr={self.lr}: both must be positive")
        if self.replayed < 1 or self.kl_weight < 0:
            raise ValueError(
                f"replayed={self.replayed}, kl_weight={self.kl_weight}: at least 1, and not "
                "negative"
            )


@dataclass(frozen=True, eq=False)
class Trained:
    """A prompt with its target after it, run as far as the first trained layer."""

    inputs: MultimodalInputs
    answer: Answer
    resid: Float[Tensor, "1 pos d_model"]


@dataclass(frozen=True, eq=False)
class Replayed:
    """A reference, run as far as the first trained layer."""

    inputs: MultimodalInputs
    resid: Float[Tensor, "1 pos d_model"]
    before: Float[Tensor, " d_vocab"]
    """Logarithms of the next token's probabilities without the edit."""


@without_gradients
def replayed_to_layer(
    model: HookedMultimodalTransformer,
    requests: Sequence[EditRequest],
    references: References | None,
    layer: int,
    seed: int = 0,
) -> list[Replayed]:
    """Some of the references that an edit may be told of, of every kind as many."""
    if references is None:
        return []
    found: list[Replayed] = []
    for request in requests:
        by_kind: dict[str, list[MultimodalInputs]] = {}
        for each in references.kept.around(model, request):
            by_kind.setdefault(each.kind, []).append(each.inputs)
        for kind, prompts in by_kind.items():
            chance = random.Random(f"{seed} {kind}")
            for inputs in chance.sample(prompts, min(REPLAYED, len(prompts))):
                resid = model(inputs, stop_at_layer=layer)
                resumed = model.resuming(inputs, layer)
                logits = model(resid, start_at_layer=layer, **resumed)[0, -1]
                found.append(Replayed(inputs, resid, logits.double().log_softmax(-1)))
    random.Random(seed).shuffle(found)
    return found


@without_gradients
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
    replayed: Sequence[Replayed] = (),
) -> list[float]:
    """Train until the targets are probable, or for `settings.steps`.

    Args:
        parameters: what is trained.
        forward: runs the layers with the parameters as they are.
        project: called after every step, to keep the parameters within bounds.
        replayed: references, whose answers are to stay.

    Returns:
        The probability of each prompt's target, at last.
    """
    optimiser = torch.optim.Adam(parameters, lr=settings.lr)
    n_replayed = min(settings.replayed, len(replayed)) if settings.kl_weight else 0
    with gradients(True):
        for step in range(settings.steps + 1):
            optimiser.zero_grad()
            probabilities = []
            for each in prompts:
                resid = forward(each.resid, each.inputs)
                logits = model.unembed(model.ln_final(resid[:, each.answer.positions]))
                log_probability = each.answer.log_probability(logits).mean()
                probabilities.append(float(log_probability.detach().exp()))
                if step < settings.steps:
                    # One prompt's activations at a time.
                    torch.autograd.backward(
                        -log_probability / len(prompts), inputs=list(parameters)
                    )
            if min(probabilities) >= settings.stop_at or step == settings.steps:
                break
            turn = [(step * settings.replayed + i) % len(replayed) for i in range(n_replayed)]
            for reference in (replayed[index] for index in turn):
                resid = forward(reference.resid, reference.inputs)
                logits = model.unembed(model.ln_final(resid[:, -1:]))[0, 0]
                after = logits.double().log_softmax(-1)
                loss = divergence(reference.before, after) * settings.kl_weight / n_replayed
                torch.autograd.backward(loss, inputs=list(parameters))
            optimiser.step()
            if project is not None:
                with gradients(False):
                    project()
    return probabilities
