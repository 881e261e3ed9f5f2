"""MultEdit: a fact changed in the MLP of an early causal layer (Basu et al. 2024, section 5).

The key is the down projection's input at the last token of the constraint, the value its output
plus what makes the model give the target; the update of the weight that takes one to the other is
in closed form (`mmlens.editing.solve`) and needs no covariance of keys.

    edit = multedit(model, inputs, "Rome", layer=3)
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from mmlens.attribution.where import layers_of
from mmlens.editing.edit import Edit
from mmlens.editing.request import EditRequest, as_requests, how_made
from mmlens.editing.solve import LeastSquares, unlike
from mmlens.editing.value import (
    KeyPrompt,
    Neighbour,
    Shares,
    Value,
    ValueSettings,
    find_value,
    record_neighbours,
    record_prompts,
)
from mmlens.inputs import MultimodalInputs
from mmlens.interventions import hook_name
from mmlens.layout import check_one_prompt

if TYPE_CHECKING:
    from mmlens.branching import Recording
    from mmlens.model import HookedMultimodalTransformer

__all__ = ["MultEditSettings", "keys_of", "multedit", "multedit_many"]

Keys = Float[Tensor, "d_mlp _"]


@dataclass(frozen=True)
class MultEditSettings(ValueSettings):
    """How the value is optimised, and how the weight is solved for."""

    lam: float = 0.01
    """Weight of |W - W0|^2."""
    weight: float = 1.0
    """Of an edited key beside a kept one. Where they are much alike, the edit's value is a
    compromise of both; the larger this is, the more of it the edit gets, and the others as well."""
    through_update: bool = False
    """Whether the search adds what the solved weight will add to every position, instead of the
    values at their keys: then what it finds is what the edited model gives. A step computes the
    whole prompt."""
    positions: Literal["last", "all"] = "last"
    """Where the keys are: at the last token of the request's span, as in the paper; or at every
    position of its only prompt but BOS, each with a value of its own: what has to be added is then
    spread over the picture and the words, and little of it is anywhere."""
    key: Literal["mean", "each"] = "each"
    """With several prompts: their mean is the key, or each is one and all get the value."""
    preserve: Literal["nothing", "prompts", "neighbours", "both"] = "both"
    """Keys that are to keep their values: those of the other positions of the request's prompts,
    those of its neighbours, or both. None of them costs rank."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lam < 0:
            raise ValueError(f"lam={self.lam}; it is 0 or more")
        if self.weight <= 0:
            raise ValueError(f"weight={self.weight}; it must be positive")
        if self.positions not in ("last", "all"):
            raise ValueError(f"positions={self.positions!r}; they are 'last' or 'all'")
        if self.key not in ("mean", "each"):
            raise ValueError(f"key={self.key!r}; it is 'mean' or 'each'")
        if self.preserve not in ("nothing", "prompts", "neighbours", "both"):
            raise ValueError(
                f"preserve={self.preserve!r}; it is 'nothing', 'prompts', 'neighbours' or 'both'"
            )


def multedit(
    model: HookedMultimodalTransformer,
    inputs: MultimodalInputs | EditRequest | Sequence[EditRequest],
    target: str | int | None = None,
    *,
    layer: int,
    kept: Keys | None = None,
    **settings: Any,
) -> Edit:
    """The edit that makes a prompt be answered with the target; the model stays as it is.

    Args:
        inputs: an image question with a span "constraint"; or a request, in which further prompts,
            neighbours and another span may be named; or several, which are solved together.
        target: the new answer, where `inputs` are no requests.
        layer: whose down projection is edited: an early causal one (`causal_trace`).
        kept: further keys that keep their values, from `keys_of`: of questions that the edit is
            not about, or of earlier edits (`SequentialEditor`). They cost no rank.
        settings: of `MultEditSettings`, all of the paper's parameters: lam, lr, steps, ...

    Raises:
        ValueError: no such layer, settings that make no sense, or as `EditRequest`.
        TypeError: an unknown setting.

    Example:
        >>> inputs = model.prepare("The capital of this country is the city of", "flag.png",
        ...                        spans={"constraint": "this country"})
        >>> edit = multedit(model, inputs, "Rome", layer=3)
        >>> with edit.applied(model):
        ...     model.generate(inputs)
    """
    requests = as_requests(inputs, target)
    chosen = MultEditSettings(**settings)
    layer = one_layer(model, layer)
    each = [keyed(model, request, layer, chosen) for request in requests]
    edited = torch.cat([part.keys for part in each], dim=1)
    every = [part.kept for part in each] + ([] if kept is None else [kept.to(edited)])
    every_kept = unlike(torch.cat(every, dim=1), edited)
    systems = [LeastSquares(p.of_values, chosen.lam, every_kept, chosen.weight) for p in each]
    values = [value_of(model, *pair, layer, chosen) for pair in zip(each, systems, strict=True)]
    if len(each) > 1:
        keys = [key for part in each for key in part.of_values]
        systems = [LeastSquares(keys, chosen.lam, every_kept, chosen.weight)]
    delta = systems[0].update(torch.cat([value.delta for value in values]).T)
    return Edit.of(
        model,
        {down_weight(layer): delta},
        **how_made("multedit", requests, layer, asdict(chosen)),
        probability=[value.probability for value in values],
        steps=[value.steps for value in values],
    )


def multedit_many(
    model: HookedMultimodalTransformer,
    requests: Sequence[EditRequest],
    *,
    layer: int,
    **settings: Any,
) -> Edit:
    """Many edits of one layer, solved together: an update of the rank of their number.

    Each value is optimised on the model as it is. Edits of almost the same key would have to share
    a value, and get the mean of theirs.

    Args:
        requests: the edits.
        layer: as in `multedit`.
        settings: as in `multedit`.

    Raises:
        ValueError: no requests; or as `multedit`.

    Example:
        >>> edit = multedit_many(model, [EditRequest(a, "Rome"), EditRequest(b, "Oslo")], layer=3)
    """
    return multedit(model, list(requests), layer=layer, **settings)


def one_layer(model: HookedMultimodalTransformer, layer: Any) -> int:
    """The layer that is edited.

    Raises:
        ValueError: several, or one that is not there.
    """
    if not isinstance(layer, int):
        raise ValueError(f"layer={layer}: this method edits one layer (memit edits several)")
    return layers_of(model, [layer])[0]


@torch.no_grad()
def keys_of(
    model: HookedMultimodalTransformer,
    prompts: Iterable[MultimodalInputs],
    layer: int,
    *,
    span: str | None = "constraint",
) -> Keys:
    """The keys of prompts, such as the questions that an edit is not about: `kept` in `multedit`.

    Keys of questions of one form are much alike whatever their pictures show, so an edit of one is
    one of all, unless it is told what to keep.

    Args:
        prompts: each a single one; they are run up to the layer.
        layer: whose MLP.
        span: whose last token is the key's position; None takes every position.

    Raises:
        UnknownSpanError: (a KeyError) a prompt without the span.
        ValueError: no prompts, a batch, no such layer.

    Example:
        >>> kept = keys_of(model, [prepared(question) for question in others], layer=8)
        >>> edit = multedit(model, request, layer=8, kept=kept)
    """
    name, found = hook_name("post", one_layer(model, layer)), []
    for inputs in prompts:
        check_one_prompt(len(inputs), "keys_of")
        _, cache = model.run_with_cache(inputs, names_filter=name, stop_at_layer=layer + 1)
        keys = cache[name][0]
        found.append(keys if span is None else keys[[max(inputs.span(span).tolist())]])
    if not found:
        raise ValueError("no prompts to take keys from")
    return torch.cat(found).T


def down_weight(layer: int) -> str:
    """The name of the weight that is edited."""
    return f"blocks.{layer}.mlp.down.weight"


@dataclass(frozen=True, eq=False)
class Keyed:
    """A request whose prompts were run."""

    prompts: list[KeyPrompt]
    neighbours: list[Recording]
    keys: Keys
    """That get new values."""
    kept: Keys
    """That keep theirs."""

    @property
    def of_values(self) -> list[Keys]:
        """The keys of each value: one value for all of several prompts, or one for each key."""
        several = len(self.prompts[0].positions) > 1
        return list(self.keys.split(1, dim=1)) if several else [self.keys]


def keyed(
    model: HookedMultimodalTransformer,
    request: EditRequest,
    layer: int,
    settings: MultEditSettings,
) -> Keyed:
    """Run a request's prompts, and its neighbours where they are needed."""
    names = [hook_name("post", layer), hook_name("mlp_out", layer)]
    everywhere = settings.positions == "all"
    if everywhere and len(request.prompts) > 1:
        raise ValueError(
            f"positions='all' is for one prompt, and this request has {len(request.prompts)}: "
            "leave its key_prompts out"
        )
    prompts = record_prompts(
        model,
        request,
        names,
        first_token_only=settings.first_token_only,
        everywhere=everywhere,
    )
    keys = torch.cat([prompt.at_positions("post", layer) for prompt in prompts]).T
    edited = keys.mean(dim=1, keepdim=True) if settings.key == "mean" else keys
    kept, neighbours = [edited[:, :0]], []
    if settings.preserve in ("prompts", "both"):
        # Not behind the prompt: what the target says there is not what is asked.
        kept += [prompt.keys(layer)[:, : prompt.answer.positions[0] + 1] for prompt in prompts]
    if settings.kl_weight or settings.preserve in ("neighbours", "both"):
        like = [prompt.recording for prompt in prompts]
        neighbours = record_neighbours(model, request, names, like)
    if settings.preserve in ("neighbours", "both"):
        kept += [each.cache[names[0]][0].T for each in neighbours]
    return Keyed(prompts, neighbours, edited, unlike(torch.cat(kept, dim=1), keys))


def value_of(
    model: HookedMultimodalTransformer,
    part: Keyed,
    system: LeastSquares,
    layer: int,
    settings: MultEditSettings,
) -> Value:
    """The values of a request's keys.

    Args:
        system: of the request alone: what it gives to its prompts and neighbours counts.
    """
    neighbours: list[Neighbour] = []
    shares = None

    def shares_of(recording: Recording) -> Shares:
        return recording.cache[hook_name("post", layer)][0].to(system.rows) @ system.rows.T

    if settings.kl_weight:
        neighbours = [Neighbour(each, shares_of(each)) for each in part.neighbours]
    if settings.through_update:
        shares = [shares_of(prompt.recording) for prompt in part.prompts]
    return find_value(model, part.prompts, "mlp_out", layer, settings, neighbours, shares)
