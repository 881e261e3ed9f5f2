"""Keys of prompts, and the value that a key is to get.

    z = z0 + delta,   delta = argmin of -log P(target | delta added at the key's position)

Every position may be a key's, and then each gets a delta of its own.

The prompt is run once; each step of the optimisation is a branch of that recording, which computes
the positions from the key on and the layers from the edited one on. So a step on a prompt of 576
visual tokens costs a few positions of text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from mmlens.analyses.targets import Answer, given_answer, with_answer
from mmlens.branching.recording import Recording
from mmlens.editing.request import EditRequest
from mmlens.inputs.multimodal_inputs import MultimodalInputs
from mmlens.interventions.functions import add
from mmlens.interventions.intervention import Intervention, hook_name
from mmlens.utils.divergence import divergence
from mmlens.utils.grad_mode import gradients, without_gradients
from mmlens.utils.temporary import Changes, temporary

if TYPE_CHECKING:
    from mmlens.model.transformer import HookedMultimodalTransformer

SCALE_ERROR = 1 / 32
"""Of the smallest part of delta that is enough."""

Objective = Callable[[Float[Tensor, "key d_model"]], tuple[Float[Tensor, ""], float]]


@dataclass(frozen=True)
class ValueSettings:
    """How the value is optimised. How the defaults were chosen is in `docs/editing.md`.

    Raises:
        ValueError: a number of steps or another setting that makes no sense.
    """

    lr: float = 0.5
    """Learning rate of Adam; where several positions get a value it is divided by the root of their
    number, so that a step is as long. With `unit="stream"`, the length of a step in that unit."""
    steps: int = 40
    """The most steps."""
    stop_at: float = 0.98
    """Probability of the target at which the optimisation ends (mean over the prompts)."""
    weight_decay: float = 1e-3
    """Weight of |delta| / unit^2 in the loss."""
    clamp: float | None = 8.0
    """|delta| is at most this many units; None for no limit."""
    unit: Literal["value", "stream"] = "value"
    """|z0|, as in the papers; or the length of the residual stream to which delta is added, which
    says how much it takes to be heard, also where the layer itself says next to nothing. (Where a
    norm stands between the two it is |z0|.)"""
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
        if self.unit not in ("value", "stream"):
            raise ValueError(f"unit={self.unit!r}; it is 'value' or 'stream'")


@dataclass(frozen=True, eq=False)
class KeyPrompt:
    """A prompt with its target after it, run once."""

    recording: Recording
    answer: Answer
    positions: list[int]
    """Of the keys: one, or all that get a value of their own."""
    values: tuple[int, int] = (0, 1)
    """Which of all values its keys get: from the first number up to the second."""
    first: int = 0
    """The first position at which what is added counts."""

    def keys(self, layer: int) -> Float[Tensor, "d_mlp pos"]:
        """The down projection's input at every position of the prompt and the target."""
        return self.recording.cache[hook_name("post", layer)][0].T

    def at_positions(self, site: str, layer: int) -> Float[Tensor, "key width"]:
        """An activation at the keys' positions."""
        return self.recording.cache[hook_name(site, layer)][0, self.positions]

    def stream_before(self, layer: int) -> Float[Tensor, "key d_model"]:
        """The residual stream that enters a layer, at the keys' positions."""
        first = min(self.positions)
        stream = self.recording.resid_from(layer, first)[0]
        return stream[[position - first for position in self.positions]]


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


def value_site(model: HookedMultimodalTransformer) -> str:
    """Return the site of what the down projection gives, which a closed form solves for.

    Where a norm or a factor comes after the MLP (Gemma 2 and 3, Granite) it is not what is added to
    the stream: then the value is searched before that, and the search goes through it.
    """
    return "mlp.out" if model.cfg.changes_outputs else "mlp_out"


def record_prompts(
    model: HookedMultimodalTransformer,
    request: EditRequest,
    names: Sequence[str],
    *,
    first_token_only: bool = False,
    everywhere: Literal["answer", "words", "all"] | None = None,
) -> list[KeyPrompt]:
    """Run a request's prompts, what they have in common once.

    Args:
        names: hook points whose activations are kept.
        everywhere: whether every position but BOS is a key's, or every word, or those at which the
            answer's tokens are computed.
    """
    found: list[KeyPrompt] = []
    n_values = 0
    for given in request.prompts:
        inputs = model.to_inputs(given)
        answer = given_answer(model, inputs, request.target)
        if first_token_only:
            answer = replace(answer, tokens=answer.tokens[:1], positions=answer.positions[:1])
        earlier = [each.recording for each in found]
        [recording] = Recording.of_all(model, [with_answer(inputs, answer)], names, earlier)
        keys, own, first = [request.position(inputs)], (0, 1), 0
        if everywhere is not None:
            keys = key_positions(inputs, words=everywhere != "all")
            if everywhere != "all":
                first = min(keys)
            if everywhere == "answer":
                keys = answer.positions.tolist()
            own = (n_values, n_values + len(keys))
        n_values = own[1]
        found.append(KeyPrompt(recording, answer, keys, own, first))
    return found


def key_positions(inputs: MultimodalInputs, *, words: bool) -> list[int]:
    """Return every position of a prompt but BOS and padding, or those of its words alone.

    BOS is not always the first: there may be padding before it, or an image (PaliGemma).
    """
    chosen = inputs.attention_mask[0].clone()
    if words:
        chosen = chosen & ~inputs.is_image[0]
    chosen[inputs.spans[0].get("bos", [])] = False
    return chosen.nonzero()[:, 0].tolist()


def record_neighbours(
    model: HookedMultimodalTransformer,
    request: EditRequest,
    names: Sequence[str],
    like: Sequence[Recording],
) -> list[Recording]:
    """Run a request's neighbours, from where they differ from other prompts."""
    return Recording.of_all(model, request.neighbours, names, like)


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
        prompts: with the values that their keys get, of their own or shared.
        site: of `value_site`, or "resid_post".
        neighbours: of which the divergence counts, where `settings.kl_weight` is not zero.
        shares: for each prompt, what is added instead: at every position, its shares of the values.
    """
    z0 = torch.cat([prompt.at_positions(site, layer) for prompt in prompts])
    z0 = z0.to(torch.promote_types(z0.dtype, torch.float32))
    in_stream = settings.unit == "stream" and site in ("mlp_out", "resid_post")
    scale = torch.cat([each.stream_before(layer) for each in prompts]).to(z0) if in_stream else z0
    size = scale.norm(dim=-1).mean().clamp(min=torch.finfo(z0.dtype).tiny)
    objective = value_objective(prompts, site, layer, settings, neighbours, size, shares)
    limit = None if settings.clamp is None else settings.clamp * size
    n_values = max(prompt.values[1] for prompt in prompts)
    delta = torch.zeros_like(z0[:n_values], requires_grad=True)
    # A step of Adam is about `lr` long in each dimension.
    rate = settings.lr * float(size) / z0.shape[-1] ** 0.5 if in_stream else settings.lr
    optimiser = torch.optim.Adam([delta], lr=rate / len(delta) ** 0.5)
    with frozen(model), gradients(True):
        for step in range(settings.steps + 1):
            loss, probability = objective(delta)
            if probability >= settings.stop_at or step == settings.steps:
                break
            [delta.grad] = torch.autograd.grad(loss, [delta])
            optimiser.step()
            if limit is not None:
                with gradients(False):
                    lengths = delta.norm(dim=-1, keepdim=True)
                    delta *= (limit / lengths.clamp(min=limit)).clamp(max=1.0)
    found = Value(delta.detach(), probability, step)
    return smallest(found, objective, settings.stop_at) if in_stream else found


@without_gradients
def smallest(found: Value, objective: Objective, stop_at: float) -> Value:
    """Return a value with the smallest part of delta that makes the target probable enough.

    A step may go far beyond, and what is more than enough changes other answers all the same.
    """
    low, high, probability = 0.0, 1.0, found.probability
    if probability < stop_at:
        return found
    while high - low > SCALE_ERROR:
        middle = (low + high) / 2
        _, reached = objective(found.delta * middle)
        if reached >= stop_at:
            high, probability = middle, reached
        else:
            low = middle
    return Value(found.delta * high, probability, found.steps)


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
        size: the unit of the weight decay.
        shares: as in `find_value`.
    """
    with gradients(False):
        before = [last_log_softmax(each.recording.logits())[0] for each in neighbours]

    def objective(delta: Float[Tensor, "key d_model"]) -> tuple[Float[Tensor, ""], float]:
        found = []
        for index, prompt in enumerate(prompts):
            if shares is None:
                own = delta[slice(*prompt.values)]
                branch = [Intervention(site, layer, prompt.positions, add(own))]
            else:
                branch = [moved(shares[index], site, layer, delta, prompt.first)]
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
                moved_by = divergence(expected, after[0, 0])
                loss = loss + settings.kl_weight * moved_by / len(neighbours)
        return loss, float(log_probability.detach().exp().mean())

    return objective


def moved(shares: Shares, site: str, layer: int, delta: Tensor, first: int = 0) -> Intervention:
    """What the edit does to a prompt: every position from the first on gets its shares of delta."""
    positions = range(first, len(shares)) if first else None
    return Intervention(site, layer, positions, add(shares[first:] @ delta))


def last_log_softmax(logits: Float[Tensor, "row 1 d_vocab"]) -> Float[Tensor, "row d_vocab"]:
    """Logarithms of the next token's probabilities, in float64."""
    return logits[:, 0].double().log_softmax(-1)


@temporary
def frozen(model: HookedMultimodalTransformer) -> Changes[None]:
    """The model without gradients of its own, which would keep every activation for them."""
    yield model.exclusive()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    yield lambda: [parameter.requires_grad_(True) for parameter in trained]
    for parameter in trained:
        parameter.requires_grad_(False)
