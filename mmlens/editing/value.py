"""Keys of prompts, and the value that a key is to get.

    z = z0 + delta,   delta = argmin of -log P(target | delta added at the key's position)

Every position may be a key's, and then each gets a delta of its own.

The prompt is run once; each step of the optimisation is a branch of that recording, which computes
the positions from the key on and the layers from the edited one on. So a step on a prompt of 576
visual tokens costs a few positions of text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mmlens.answers import Answer, given_answer, with_answer
from mmlens.beginnings import record_like
from mmlens.branching import Recording
from mmlens.editing.request import EditRequest
from mmlens.hooks import add
from mmlens.interventions import Intervention, hook_name

if TYPE_CHECKING:
    from mmlens.model import HookedMultimodalTransformer

Objective = Callable[[Float[Tensor, "key d_model"]], tuple[Float[Tensor, ""], float]]


@dataclass(frozen=True)
class ValueSettings:
    """How the value is optimised. How the defaults were chosen is in `docs/editing.md`.

    Raises:
        ValueError: a number of steps or another setting that makes no sense.
    """

    lr: float = 0.5
    """Learning rate of Adam; where several positions get a value it is divided by the root of their
    number, so that a step is as long."""
    steps: int = 40
    """The most steps."""
    stop_at: float = 0.98
    """Probability of the target at which the optimisation ends (mean over the prompts)."""
    weight_decay: float = 1e-3
    """Weight of |delta| / |z0|^2 in the loss."""
    clamp: float | None = 8.0
    """|delta| is at most this times |z0|; None for no limit."""
    first_token_only: bool = False
    """Whether only the target's first token counts, as in the paper's script; else their joint
    likelihood."""
    kl_weight: float = 0.0
    """Weight of KL(before || after) of the neighbours' next token."""

    def __post_init__(self) -> None:
        if self.steps < 1 or self.lr <= 0:
            raise ValueError(f"steps={self.steps}, lr={self.lr}: both must be positive")
        if self.clamp is not None and self.clamp <= 0:
            raise ValueError(f"clamp={self.clamp}: nothing would be left of the edit")


@dataclass(frozen=True, eq=False)
class KeyPrompt:
    """A prompt with its target behind it, run once."""

    recording: Recording
    answer: Answer
    positions: list[int]
    """Of the keys: one, or all that get a value of their own."""

    def keys(self, layer: int) -> Float[Tensor, "d_mlp pos"]:
        """The down projection's input at every position of the prompt and the target."""
        return self.recording.cache[hook_name("post", layer)][0].T

    def at_positions(self, site: str, layer: int) -> Float[Tensor, "key width"]:
        """An activation at the keys' positions."""
        return self.recording.cache[hook_name(site, layer)][0, self.positions]


Shares = Float[Tensor, "_ key"]
"""How much of each delta the positions of a prompt get from the solved update."""


@dataclass(frozen=True, eq=False)
class Neighbour:
    """A prompt that is to keep its next token."""

    recording: Recording
    shares: Shares


@dataclass(frozen=True, eq=False)
class Value:
    """What is added to the keys' values."""

    delta: Float[Tensor, "key d_model"]
    probability: float
    """Of the target where delta is added, mean over the prompts."""
    steps: int


def record_prompts(
    model: HookedMultimodalTransformer,
    request: EditRequest,
    names: Sequence[str],
    *,
    first_token_only: bool = False,
    everywhere: bool = False,
) -> list[KeyPrompt]:
    """Run a request's prompts, what they have in common once.

    Args:
        names: hook points whose activations are kept.
        everywhere: whether every position but BOS is a key's.
    """
    found: list[KeyPrompt] = []
    for given in request.prompts:
        inputs = model.to_inputs(given)
        answer = given_answer(model, inputs, request.target)
        if first_token_only:
            answer = replace(answer, tokens=answer.tokens[:1], positions=answer.positions[:1])
        earlier = [each.recording for each in found]
        recording = record_like(model, with_answer(inputs, answer), earlier, names)
        begin = len(inputs.spans[0].get("bos", ()))
        keys = range(begin, inputs.n_pos) if everywhere else [request.position(inputs)]
        found.append(KeyPrompt(recording, answer, list(keys)))
    return found


def record_neighbours(
    model: HookedMultimodalTransformer,
    request: EditRequest,
    names: Sequence[str],
    like: Sequence[Recording],
) -> list[Recording]:
    """Run a request's neighbours, from where they differ from other prompts."""
    found: list[Recording] = []
    for inputs in request.neighbours:
        found.append(record_like(model, model.to_inputs(inputs), [*like, *found], names))
    return found


def find_value(
    model: HookedMultimodalTransformer,
    prompts: Sequence[KeyPrompt],
    site: str,
    layer: int,
    settings: ValueSettings,
    neighbours: Sequence[Neighbour] = (),
    shares: Sequence[Shares] | None = None,
) -> Value:
    """Optimise what is added at `site` of a layer, at the keys of every prompt.

    Args:
        prompts: with as many keys each; they share the values.
        site: "mlp_out" or "resid_post".
        neighbours: of which the divergence counts, where `settings.kl_weight` is not zero.
        shares: for each prompt, what is added instead: at every position, its shares of the values.
    """
    z0 = torch.stack([prompt.at_positions(site, layer) for prompt in prompts])
    z0 = z0.to(torch.promote_types(z0.dtype, torch.float32))
    size = z0.norm(dim=-1).mean().clamp(min=torch.finfo(z0.dtype).tiny)
    objective = value_objective(prompts, site, layer, settings, neighbours, size, shares)
    limit = None if settings.clamp is None else settings.clamp * size
    delta = torch.zeros_like(z0[0], requires_grad=True)
    optimiser = torch.optim.Adam([delta], lr=settings.lr / len(delta) ** 0.5)
    with frozen(model):
        for step in range(settings.steps + 1):
            with torch.enable_grad():
                loss, probability = objective(delta)
            if probability >= settings.stop_at or step == settings.steps:
                break
            [delta.grad] = torch.autograd.grad(loss, [delta])
            optimiser.step()
            if limit is not None:
                with torch.no_grad():
                    lengths = delta.norm(dim=-1, keepdim=True)
                    delta *= (limit / lengths.clamp(min=limit)).clamp(max=1.0)
    return Value(delta.detach(), probability, step)


def value_objective(
    prompts: Sequence[KeyPrompt],
    site: str,
    layer: int,
    settings: ValueSettings,
    neighbours: Sequence[Neighbour],
    size: Float[Tensor, ""],
    shares: Sequence[Shares] | None = None,
) -> Objective:
    """From delta to the loss, and the target's mean probability.

    Args:
        size: |z0|, mean over the keys, in whose units the weight decay is.
        shares: as in `find_value`.
    """
    with torch.no_grad():
        before = [last_log_softmax(each.recording.logits())[0] for each in neighbours]

    def objective(delta: Float[Tensor, "key d_model"]) -> tuple[Float[Tensor, ""], float]:
        found = []
        for index, prompt in enumerate(prompts):
            if shares is None:
                branch = [Intervention(site, layer, prompt.positions, add(delta))]
            else:
                branch = [moved(shares[index], site, layer, delta)]
            logits = prompt.answer.log_probability
            found.append(prompt.recording.run([branch], logits, positions=prompt.answer.positions))
        log_probability = torch.stack(found)
        loss = -log_probability.mean()
        if settings.weight_decay and bool(delta.any()):  # the norm has no gradient at zero
            loss = loss + settings.weight_decay * delta.norm(dim=-1).sum() / size**2
        if settings.kl_weight:
            for each, expected in zip(neighbours, before, strict=True):
                branch = [moved(each.shares, site, layer, delta)]
                after = each.recording.run([branch], last_log_softmax)
                divergence = (expected.exp() * (expected - after[0, 0])).nan_to_num().sum()
                loss = loss + settings.kl_weight * divergence / len(neighbours)
        return loss, float(log_probability.detach().exp().mean())

    return objective


def moved(shares: Shares, site: str, layer: int, delta: Tensor) -> Intervention:
    """What the edit does to a prompt: every position gets its shares of delta."""
    return Intervention(site, layer, None, add(shares @ delta))


def last_log_softmax(logits: Float[Tensor, "row 1 d_vocab"]) -> Float[Tensor, "row d_vocab"]:
    """Logarithms of the next token's probabilities, in float64."""
    return logits[:, 0].double().log_softmax(-1)


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """The model without gradients of its own, which would keep every activation for them."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
