"""MultEdit: a fact changed in the MLP of an early causal layer (Basu et al. 2024, section 5).

The key is the down projection's input at the last token of the constraint, the value its output
plus what makes the model give the target; the update of the weight that takes one to the other is
in closed form (`mmlens.editing.solve`) and needs no covariance of keys.

    edit = multedit(model, inputs, "Rome", layer=3)
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from mmlens.analyses.arguments import layers_of
from mmlens.data.edits import SAME_IMAGE
from mmlens.editing.applied import applied_to
from mmlens.editing.edit import Edit
from mmlens.editing.edit_check import Origin
from mmlens.editing.multedit_settings import MultEditSettings
from mmlens.editing.reference_keys import reference_keys
from mmlens.editing.references import References
from mmlens.editing.request import EditRequest, as_requests, how_made
from mmlens.editing.solve import LeastSquares, unlike
from mmlens.editing.value import (
    KeyPrompt,
    Neighbour,
    Shares,
    Value,
    find_value,
    record_neighbours,
    record_prompts,
    value_site,
)
from mmlens.inputs.checks import check_one_prompt
from mmlens.inputs.multimodal_inputs import MultimodalInputs
from mmlens.interventions.intervention import hook_name
from mmlens.utils.grad_mode import without_gradients
from mmlens.utils.texts import check_several
from mmlens.utils.threads import on_free_cores

if TYPE_CHECKING:
    from mmlens.branching.recording import Recording
    from mmlens.model.transformer import HookedMultimodalTransformer

__all__ = ["MultEditSettings", "keys_of", "multedit", "multedit_many"]

Keys = Float[Tensor, "d_mlp _"]
COSTS = ("prompts", "seconds", "bytes")


@on_free_cores
def multedit(
    model: HookedMultimodalTransformer,
    inputs: MultimodalInputs | EditRequest | Sequence[EditRequest],
    target: str | int | None = None,
    *,
    layer: int | None = None,
    references: Any = "auto",
    subject: str = "",
    kept: Keys | None = None,
    settings: MultEditSettings | None = None,
    **changes: Any,
) -> Edit:
    """Return the edit that makes a prompt be answered with the target; the model is not changed.

    By default it keeps the answers to references: its question about other images, other questions
    about its image, and questions and texts that have nothing to do with it. The keys of the first
    two kinds cost one pass of some 60 images for every new question; what is the same for all edits
    is computed once for a model, and kept on disk (`edit.metadata["references"]` says seconds and
    bytes). Edits that the model has keep their answers as well.

    Args:
        inputs: an image question, at best with a span "constraint"; or a request, in which further
            prompts, neighbours and another span may be named; or several, which are solved
            together.
        target: the new answer, where `inputs` are no requests.
        layer: whose down projection is edited; by default `settings.depth` says it.
        references: whose answers are to stay: "auto" for those that are shipped; a folder of
            images, a data set as `open_questions` names it, questions, images, or `References`;
            None for none.
        subject: what the image shows ("Italy"): then the question with this name in words, without
            the image, gets the new answer as well.
        kept: further keys that keep their values, from `keys_of`. They cost no rank.
        settings: all of them at once, such as `MultEditSettings.paper()`.
        changes: single settings of `MultEditSettings`: lam, lr, steps, ...

    Raises:
        ValueError: no such layer, settings that make no sense, references that cannot be made; or
            as `EditRequest`.
        TypeError: an unknown setting.

    Example:
        >>> inputs = model.prepare("The capital of this country is the city of", "flag.png",
        ...                        spans={"constraint": "this country"})
        >>> edit = multedit(model, inputs, "Rome")
        >>> edit.check().warning
        >>> with edit.applied(model):
        ...     model.generate(inputs)
    """
    chosen = replace(settings or MultEditSettings(), **changes)
    requests = as_requests(inputs, target, subject)
    layer = chosen.layer_of(model) if layer is None else one_layer(model, layer)
    at_end = chosen.positions == "answer"
    known = told(model, requests, layer, references if chosen.uses_references else None, at_end)
    each = [keyed(model, request, layer, chosen) for request in known.requests]
    edited = torch.cat([part.keys for part in each], dim=1)
    every = [(part.kept, 1.0) for part in each]
    every += [(part.near, chosen.neighbour_weight) for part in each]
    every += [(keys, 1.0) for keys in (*known.keys, *([] if kept is None else [kept]))]
    if chosen.keeps_edits:
        every += [(keys, chosen.weight) for keys in earlier_keys(model, layer)]
    # Keys of an equation's weight are longer by its root.
    every_kept = torch.cat([unlike(keys.to(edited), edited) * w**0.5 for keys, w in every], dim=1)
    lam = chosen.lam + chosen.ridge * float(edited.float().square().sum(dim=0).mean())
    systems = [LeastSquares(p.of_values, lam, every_kept, chosen.weight) for p in each]
    values = [value_of(model, *pair, layer, chosen) for pair in zip(each, systems, strict=True)]
    if len(each) > 1:
        keys = [key for part in each for key in part.of_values]
        systems = [LeastSquares(keys, lam, every_kept, chosen.weight)]
    delta = systems[0].update(torch.cat([value.delta for value in values]).T)
    return Edit.of(
        model,
        {down_weight(layer): delta},
        keys={down_weight(layer): edited},
        origin=Origin.of(model, requests, known.references),
        **how_made("multedit", requests, layer, asdict(chosen)),
        probability=[value.probability for value in values],
        steps=[value.steps for value in values],
        references=known.used,
    )


@dataclass(frozen=True, eq=False)
class Told:
    """Requests with what is known of references."""

    requests: list[EditRequest]
    references: References | None
    keys: list[Keys]
    used: dict[str, Any]
    """For the metadata."""


def told(
    model: HookedMultimodalTransformer,
    requests: Sequence[EditRequest],
    layer: int,
    references: Any,
    at_end: bool = False,
) -> Told:
    """Return requests with references as neighbours, the written question as a key prompt.

    `at_end` says that the keys of references are those at their last tokens alone.

    Without a tokenizer or the prompt's text there are no shipped references, and a warning says so.
    """
    if references is None:
        return Told(list(requests), None, [], {})
    for request in requests:
        missing = model.tokenizer is None or request.inputs.texts is None
        if missing and references == "auto":
            warnings.warn(
                "this prompt's text is not known, so there are no references: answers to other "
                "questions may change (references=None says that this is meant)",
                stacklevel=4,
            )
            return Told(list(requests), None, [], {})
    found = References.of(references, model)
    assert found is not None
    complete, keys = [], []
    for request in requests:
        written = request.written(model)
        about = found.kept.around(model, request, (SAME_IMAGE,))
        neighbours = (*request.neighbours, *(each.inputs for each in about))
        further = (*request.key_prompts, *([] if written is None else [written]))
        complete.append(replace(request, key_prompts=further, neighbours=neighbours))
        keys.append(reference_keys(model, request, found.kept, layer, at_end=at_end))
    used = {name: sum(each.metadata[name] for each in keys) for name in COSTS}
    n_keys = sum(each.keys.shape[1] for each in keys)
    return Told(
        complete, found, [each.keys for each in keys], {"name": found.name, "keys": n_keys, **used}
    )


def earlier_keys(model: HookedMultimodalTransformer, layer: int) -> list[Keys]:
    """Return the keys of edits of the layer that the model has now."""
    name = down_weight(layer)
    edits: list[Any] = [each.edit for each in applied_to(model)]
    return [edit.keys[name] for edit in edits if name in getattr(edit, "keys", {})]


def multedit_many(
    model: HookedMultimodalTransformer,
    requests: Sequence[EditRequest],
    *,
    layer: int | None = None,
    **settings: Any,
) -> Edit:
    """Many edits of one layer, solved together: an update of the rank of their keys' number.

    Each value is optimised on the model as it is. Edits of almost the same key would have to share
    a value, and get the mean of theirs.

    Args:
        requests: the edits.
        layer: as in `multedit`.
        settings: further arguments of `multedit`.

    Raises:
        ValueError: no requests; or as `multedit`.

    Example:
        >>> edit = multedit_many(model, [EditRequest(a, "Rome"), EditRequest(b, "Oslo")])
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


@without_gradients
def keys_of(
    model: HookedMultimodalTransformer,
    prompts: Iterable[MultimodalInputs],
    layer: int,
    *,
    span: str | None = "constraint",
) -> Keys:
    """The keys of prompts, such as the questions that an edit is not about: `kept` in `multedit`.

    Keys of questions of one form are much alike whatever their images show, so an edit of one is
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
    check_several(prompts=prompts)
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
    """Of the same prompts, that keep theirs."""
    near: Keys
    """Of neighbours, that keep theirs."""

    @property
    def of_values(self) -> list[Keys]:
        """The keys of each value: one value for all of several prompts, or one for each key."""
        several = self.prompts[-1].values[1] > 1
        return list(self.keys.split(1, dim=1)) if several else [self.keys]


def keyed(
    model: HookedMultimodalTransformer,
    request: EditRequest,
    layer: int,
    settings: MultEditSettings,
) -> Keyed:
    """Run a request's prompts, and its neighbours where they are needed."""
    names = [hook_name("post", layer), hook_name(value_site(model), layer)]
    everywhere = None if settings.positions == "last" else settings.positions
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
        # Not after the prompt: what the target says there is not what is asked.
        kept += [prompt.keys(layer)[:, : prompt.answer.positions[0] + 1] for prompt in prompts]
    if settings.kl_weight or settings.preserve in ("neighbours", "both"):
        like = [prompt.recording for prompt in prompts]
        neighbours = record_neighbours(model, request, names, like)
    near = [edited[:, :0]]
    if settings.preserve in ("neighbours", "both"):
        begin = -1 if everywhere == "answer" else 0
        near += [each.cache[names[0]][0, begin:].T for each in neighbours]
    kept_keys, near_keys = (unlike(torch.cat(each, dim=1), keys) for each in (kept, near))
    return Keyed(prompts, neighbours, edited, kept_keys, near_keys)


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
    return find_value(model, part.prompts, value_site(model), layer, settings, neighbours, shares)
