"""A low-rank adapter as an editing method (LoRA, Hu et al. 2021), trained through peft."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mmlens.analyses.arguments import layers_of
from mmlens.editing.deltas import LowRank
from mmlens.editing.descent import DescentSettings, descend, replayed_to_layer, run_to_layer
from mmlens.editing.edit import Edit
from mmlens.editing.edit_check import Origin
from mmlens.editing.fine_tuning import module_names
from mmlens.editing.references import References
from mmlens.editing.request import EditRequest, as_requests, how_made
from mmlens.editing.value import frozen
from mmlens.inputs.multimodal_inputs import MultimodalInputs
from mmlens.utils.grad_mode import gradients
from mmlens.utils.temporary import Changes, temporary
from mmlens.utils.threads import on_free_cores

if TYPE_CHECKING:
    from mmlens.model.transformer import HookedMultimodalTransformer

__all__ = ["lora"]

ADAPTER = "edit"
"""peft's name of the adapter."""


@on_free_cores
def lora(
    model: HookedMultimodalTransformer,
    inputs: MultimodalInputs | EditRequest | Sequence[EditRequest],
    target: str | int | None = None,
    *,
    layer: int | Iterable[int] | None = None,
    modules: Sequence[str] = ("attn.qkv", "attn.o", "mlp.down"),
    rank: int = 8,
    alpha: float = 16.0,
    seed: int = 0,
    references: Any = None,
    **settings: Any,
) -> Edit:
    """Train a low-rank update of one, several or all layers until the targets are probable.

    peft's `LoraModel` is put around the model's linear layers for the time of the training.

    Args:
        inputs: as in `fine_tune`, and so are target and layer.
        modules: which of their matrices, as in `fine_tune`.
        rank: of each update.
        alpha: the update is alpha / rank * B @ A.
        seed: of the factor that does not start at zero.
        references: as in `fine_tune`.
        settings: of `DescentSettings`: lr, steps, stop_at.

    Raises:
        ImportError: peft is not installed.
        ValueError: no such layer or module, settings that make no sense.

    Example:
        >>> edit = lora(model, inputs, "Rome", rank=4)
    """
    requests = as_requests(inputs, target)
    chosen = DescentSettings(**settings)
    layers = layers_of(model, [layer] if isinstance(layer, int) else layer)
    names = module_names(model, layers, modules)
    prompts = run_to_layer(model, requests, min(layers))
    known = References.of(references, model)
    replayed = replayed_to_layer(model, requests, known, min(layers))

    def forward(resid: Tensor, inputs: MultimodalInputs) -> Tensor:
        return model(
            resid,
            start_at_layer=min(layers),
            stop_at_layer=model.cfg.n_layers,
            **model.resuming(inputs, min(layers)),
        )

    with frozen(model), adapted(model, names, rank, alpha, seed) as adapters:
        pairs = [(each.lora_A, each.lora_B) for each in adapters.values()]
        factors = [factor[ADAPTER].weight for pair in pairs for factor in pair]
        found = descend(model, prompts, factors, forward, chosen, replayed=replayed)
    deltas = {f"{name}.weight": update_of(adapter) for name, adapter in adapters.items()}
    used = asdict(chosen) | {"modules": list(modules), "rank": rank, "alpha": alpha, "seed": seed}
    used["references"] = len(replayed)
    return Edit.of(
        model,
        deltas,
        origin=Origin.of(model, requests, known),
        **how_made("lora", requests, layer if isinstance(layer, int) else layers, used),
        probability=found,
    )


def update_of(adapter: Any) -> LowRank:
    """What one of peft's layers adds to its weight."""
    a, b = (factor[ADAPTER].weight.detach() for factor in (adapter.lora_A, adapter.lora_B))
    return LowRank(adapter.scaling[ADAPTER] * b, a.clone())


@temporary
def adapted(
    model: HookedMultimodalTransformer, names: Sequence[str], rank: int, alpha: float, seed: int
) -> Changes[dict[str, Any]]:
    """The model with peft's adapters around some of its linear layers, by their names."""
    try:
        from peft import LoraConfig, LoraModel
    except ImportError as error:
        raise ImportError("lora needs peft: pip install 'mmlens[edit]'") from error
    config = LoraConfig(
        r=rank, lora_alpha=alpha, target_modules="|".join(re.escape(name) for name in names)
    )
    originals = {name: model.get_submodule(name) for name in names}

    def put_back() -> None:
        for name, module in originals.items():
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, module)
        model.__dict__.pop("peft_config", None)  # a note that peft leaves on the model

    yield model.exclusive()
    yield gradients(True)  # peft turns them off for a moment, which Ctrl-C could make for good
    yield put_back
    with seeded(seed):
        LoraModel(model, config, ADAPTER)
    return {name: model.get_submodule(name) for name in names}


@temporary
def seeded(seed: int) -> Changes[None]:
    """A block with random numbers of its own, after which torch's generators are as before."""
    yield partial(torch.set_rng_state, torch.get_rng_state())
    if torch.cuda.is_available():
        yield partial(torch.cuda.set_rng_state_all, torch.cuda.get_rng_state_all())
    torch.manual_seed(seed)
