"""Fine-tuning on the targets, free or within a bound: the baselines of editing.

The model's own weights are not touched: what is trained is added to them in every forward pass, in
float32, so that a small step is not lost in half precision.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from mmlens.analyses.arguments import layers_of
from mmlens.editing.applied import weight_of
from mmlens.editing.deltas import added
from mmlens.editing.descent import DescentSettings, descend, replayed_to_layer, run_to_layer
from mmlens.editing.edit import Edit
from mmlens.editing.edit_check import Origin
from mmlens.editing.references import References
from mmlens.editing.request import EditRequest, as_requests, how_made
from mmlens.editing.value import frozen
from mmlens.inputs.multimodal_inputs import MultimodalInputs
from mmlens.utils.temporary import Changes, temporary
from mmlens.utils.threads import on_free_cores

if TYPE_CHECKING:
    from mmlens.model.transformer import HookedMultimodalTransformer

__all__ = ["constrained_fine_tune", "fine_tune"]

GENTLE = {"lr": 1e-4, "steps": 60}
"""Of free fine-tuning: with larger steps much else goes, and all of it where all layers are tuned
(`docs/editing.md`)."""


def fine_tune(
    model: HookedMultimodalTransformer,
    inputs: MultimodalInputs | EditRequest | Sequence[EditRequest],
    target: str | int | None = None,
    *,
    layer: int | Iterable[int] | None = None,
    modules: Sequence[str] | None = None,
    references: Any = None,
    **settings: Any,
) -> Edit:
    """Train weights of one, several or all layers until the targets are probable.

    Args:
        inputs: as in `multedit`; several requests are trained on together.
        target: as in `multedit`.
        layer: which layers; None for all of the language model.
        modules: which of their matrices: "attn.qkv", "attn.o", "mlp.gate" (of gated MLPs),
            "mlp.up", "mlp.down"; all by default.
        references: whose answers are to stay, as in `multedit`; here by default none. The
            divergence of their next tokens is part of the loss.
        settings: of `DescentSettings`: lr (here 1e-4), steps (here 60), stop_at, kl_weight.

    Raises:
        ValueError: no such layer or module, settings that make no sense.

    Example:
        >>> edit = fine_tune(model, inputs, "Rome", layer=3)
    """
    return tuned(model, inputs, target, layer, modules, None, references, GENTLE | settings)


def constrained_fine_tune(
    model: HookedMultimodalTransformer,
    inputs: MultimodalInputs | EditRequest | Sequence[EditRequest],
    target: str | int | None = None,
    *,
    layer: int | Iterable[int] | None = None,
    modules: Sequence[str] | None = None,
    bound: float = 1e-3,
    references: Any = None,
    **settings: Any,
) -> Edit:
    """Fine-tuning in which no weight moves further than `bound` (Zhu et al. 2020, section 3).

    After each step the change is projected onto the ball |W - W0|_inf <= bound.

    Args:
        inputs: as in `fine_tune`, and so are the others.
        target: as in `multedit`.
        layer: which layers.
        modules: which of their matrices.
        bound: the most by which any single weight changes.
        references: as in `fine_tune`.
        settings: of `DescentSettings`.

    Raises:
        ValueError: as `fine_tune`; a bound that is not positive.

    Example:
        >>> edit = constrained_fine_tune(model, inputs, "Rome", layer=3, bound=1e-3)
    """
    if bound <= 0:
        raise ValueError(f"bound={bound}; it is the most that a weight changes, above 0")
    return tuned(model, inputs, target, layer, modules, bound, references, settings)


@on_free_cores
def tuned(
    model: HookedMultimodalTransformer,
    inputs: MultimodalInputs | EditRequest | Sequence[EditRequest],
    target: str | int | None,
    layer: int | Iterable[int] | None,
    modules: Sequence[str] | None,
    bound: float | None,
    references: Any,
    settings: dict[str, Any],
) -> Edit:
    """Both kinds of fine-tuning."""
    requests = as_requests(inputs, target)
    chosen = DescentSettings(**settings)
    layers = layers_of(model, [layer] if isinstance(layer, int) else layer)
    modules = matrices_of(model) if modules is None else modules
    names = [f"{name}.weight" for name in module_names(model, layers, modules)]
    prompts = run_to_layer(model, requests, min(layers))
    known = References.of(references, model)
    replayed = replayed_to_layer(model, requests, known, min(layers))
    weights = {name: weight_of(model, name).detach() for name in names}
    deltas = {
        name: torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
        for name, weight in weights.items()
    }

    def forward(resid: Tensor, inputs: MultimodalInputs) -> Tensor:
        changed = {name: added(weight, deltas[name]) for name, weight in weights.items()}
        options = {
            "start_at_layer": min(layers),
            "stop_at_layer": model.cfg.n_layers,
            **model.resuming(inputs, min(layers)),
        }
        return functional_call(model, changed, (resid,), options)

    def project() -> None:
        for delta in deltas.values():
            delta.clamp_(-bound, bound)  # type: ignore[operator]

    with frozen(model), own_weights(model, names):
        for delta in deltas.values():
            delta.requires_grad_(True)
        keep_bounds: Callable[[], None] | None = None if bound is None else project
        found = descend(
            model, prompts, list(deltas.values()), forward, chosen, keep_bounds, replayed
        )
    used = asdict(chosen) | {"modules": list(modules), "references": len(replayed)}
    if bound is not None:
        used["bound"] = bound
    method = "fine_tune" if bound is None else "constrained_fine_tune"
    return Edit.of(
        model,
        {name: delta.detach() for name, delta in deltas.items()},
        origin=Origin.of(model, requests, known),
        **how_made(method, requests, layer if isinstance(layer, int) else layers, used),
        probability=found,
    )


@temporary
def own_weights(model: HookedMultimodalTransformer, names: Sequence[str]) -> Changes[None]:
    """A block after which the model has its own parameters again.

    `functional_call` exchanges them, and leaves some exchanged where it is interrupted.
    """
    originals = {name: weight_of(model, name) for name in names}

    def put_back() -> None:
        for name, weight in originals.items():
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, weight)

    yield put_back


def matrices_of(model: HookedMultimodalTransformer) -> list[str]:
    """The linear modules of a layer, by their names in it."""
    modules = model.blocks[0].named_modules()
    return [name for name, module in modules if isinstance(module, nn.Linear)]


def module_names(
    model: HookedMultimodalTransformer, layers: Iterable[int], modules: Sequence[str]
) -> list[str]:
    """The names of some linear modules of some layers.

    Raises:
        ValueError: none, or a module that a layer does not have.
    """
    known = matrices_of(model)
    if not modules or set(modules) - set(known):
        raise ValueError(f"modules={list(modules)}; a layer has {', '.join(known)}")
    return [f"blocks.{layer}.{module}" for layer in layers for module in modules]
