"""A low-rank adapter as an editing method (LoRA, Hu et al. 2021), trained through peft."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mmlens.attribution.where import layers_of
from mmlens.editing.descent import DescentSettings, descend, run_to_layer
from mmlens.editing.edit import Edit, LowRank
from mmlens.editing.request import EditRequest, as_requests, how_made
from mmlens.editing.value import frozen
from mmlens.inputs import MultimodalInputs

if TYPE_CHECKING:
    from mmlens.model import HookedMultimodalTransformer

__all__ = ["lora"]

ADAPTED = ("attn.qkv", "attn.o", "mlp.down")
"""What peft can adapt. A gated MLP may read the two halves of `mlp.up` by themselves, and an
adapter around it would then be passed over."""

ADAPTER = "edit"
"""peft's name of the adapter."""


def lora(
    model: HookedMultimodalTransformer,
    inputs: MultimodalInputs | EditRequest | Sequence[EditRequest],
    target: str | int | None = None,
    *,
    layer: int | Iterable[int] | None = None,
    modules: Sequence[str] = ADAPTED,
    rank: int = 8,
    alpha: float = 16.0,
    seed: int = 0,
    **settings: Any,
) -> Edit:
    """Train a low-rank update of one, several or all layers until the targets are probable.

    peft's `LoraModel` is put around the model's linear layers for the time of the training.

    Args:
        inputs: as in `fine_tune`, and so are target and layer.
        modules: which of their matrices: "attn.qkv", "attn.o", "mlp.down".
        rank: of each update.
        alpha: the update is alpha / rank * B @ A.
        seed: of the factor that does not start at zero.
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
    if not modules or set(modules) - set(ADAPTED):
        raise ValueError(f"modules={list(modules)}; peft can adapt {', '.join(ADAPTED)}")
    names = [f"blocks.{each}.{module}" for each in layers for module in modules]
    prompts = run_to_layer(model, requests, min(layers))

    def forward(resid: Tensor, inputs: MultimodalInputs) -> Tensor:
        return model(
            resid,
            attention_mask=inputs.attention_mask,
            start_at_layer=min(layers),
            stop_at_layer=model.cfg.n_layers,
        )

    with frozen(model), adapted(model, names, rank, alpha, seed) as adapters:
        pairs = [(each.lora_A, each.lora_B) for each in adapters.values()]
        factors = [factor[ADAPTER].weight for pair in pairs for factor in pair]
        found = descend(model, prompts, factors, forward, chosen)
    deltas = {f"{name}.weight": update_of(adapter) for name, adapter in adapters.items()}
    used = asdict(chosen) | {"modules": list(modules), "rank": rank, "alpha": alpha, "seed": seed}
    return Edit.of(
        model,
        deltas,
        **how_made("lora", requests, layer if isinstance(layer, int) else layers, used),
        probability=found,
    )


def update_of(adapter: Any) -> LowRank:
    """What one of peft's layers adds to its weight."""
    a, b = (factor[ADAPTER].weight.detach() for factor in (adapter.lora_A, adapter.lora_B))
    return LowRank(adapter.scaling[ADAPTER] * b, a.clone())


@contextmanager
def adapted(
    model: HookedMultimodalTransformer, names: Sequence[str], rank: int, alpha: float, seed: int
) -> Iterator[dict[str, Any]]:
    """The model with peft's adapters around some of its linear layers, by their names."""
    try:
        from peft import LoraConfig, LoraModel
    except ImportError as error:
        raise ImportError("lora needs peft: pip install 'mmlens[edit]'") from error
    config = LoraConfig(
        r=rank, lora_alpha=alpha, target_modules="|".join(re.escape(name) for name in names)
    )
    originals = {name: model.get_submodule(name) for name in names}
    try:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            LoraModel(model, config, ADAPTER)
        yield {name: model.get_submodule(name) for name in names}
    finally:
        for name, module in originals.items():
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, module)
        if hasattr(model, "peft_config"):  # a note that peft leaves on the model
            del model.peft_config
