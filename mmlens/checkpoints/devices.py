"""Where a model's parameters lie: on one device, or spread over several GPUs through accelerate."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from mmlens.checkpoints.errors import CheckpointError
from mmlens.utils.temporary import Changes, temporary

DeviceMap = str | Mapping[str, Any]
"""Module names to devices, or one of accelerate's own plans ("auto", "balanced", "sequential")."""

PLANS = ("auto", "balanced", "balanced_low_0", "sequential")
# A block's residual stream stays on one device; so do the tower and the projector.
KEPT_WHOLE = ["TransformerBlock", "HookedVisionTransformer", "Projector", "Embed", "Unembed"]


def allocate(model: nn.Module, device: torch.device, device_map: DeviceMap | None) -> None:
    """Give a model that was built on the meta device its (unfilled) parameters.

    Without a `device_map` all of them go to `device`. A map is refused if it leaves some out, or
    puts some where hooks could not edit them (offloaded to CPU or disk).
    """
    if device_map is None:
        model.to_empty(device=device)
        return
    if isinstance(device_map, str):
        device_map = planned(model, device_map)
    places = {torch.device(place) for place in device_map.values() if place != "disk"}
    if "disk" in device_map.values() or (len(places) > 1 and torch.device("cpu") in places):
        away = [name for name, place in device_map.items() if str(place) in ("cpu", "disk")]
        raise CheckpointError(
            f"device_map puts {', '.join(map(repr, away[:5]))} where their weights are not at "
            "hand (offloaded): the model does not fit these GPUs. Use a smaller dtype "
            "(dtype=torch.bfloat16), more GPUs, or device='cpu'"
        )
    spread(model, device_map)


def planned(
    model: nn.Module, plan: str, max_memory: dict[int | str, int | str] | None = None
) -> dict[str, Any]:
    """Return the device map of one of accelerate's `PLANS` for this model.

    Args:
        max_memory: bytes (or "20GiB") per GPU number; by default what is free.
    """
    from accelerate import infer_auto_device_map
    from accelerate.utils import get_balanced_memory

    if plan not in PLANS:
        raise CheckpointError(
            f"device_map={plan!r}; it is one of {', '.join(PLANS)}, or names of modules with "
            "their devices"
        )
    with untied(model) as was_tied:
        if plan != "sequential":
            max_memory = get_balanced_memory(
                model,
                max_memory=max_memory,
                no_split_module_classes=KEPT_WHOLE,
                low_zero=plan == "balanced_low_0",
            )
        found = infer_auto_device_map(model, max_memory, no_split_module_classes=KEPT_WHOLE)
    if was_tied and "unembed" in found:
        found["unembed"] = found["embed"]
    return found


@temporary
def untied(model: nn.Module) -> Changes[bool]:
    """The model with an output layer of its own for a while; yields whether it was tied.

    accelerate looks for one module's name inside another's, and `embed` is inside `unembed`.
    """
    unembed, weight = model.get_submodule("unembed"), model.get_parameter("unembed.weight")
    was_tied = weight is model.get_parameter("embed.W_E")
    yield partial(setattr, unembed, "weight", weight)
    if was_tied:
        unembed.weight = nn.Parameter(torch.empty_like(weight))
    return was_tied


def spread(model: nn.Module, device_map: Mapping[str, Any]) -> None:
    """Allocate each module where the map says, and let activations follow."""
    from accelerate import dispatch_model

    parameters = dict(model.named_parameters())
    for name, place in device_map.items():
        if name in parameters:
            owner, _, leaf = name.rpartition(".")
            new = torch.empty_like(parameters[name], device=torch.device(place))
            setattr(model.get_submodule(owner), leaf, nn.Parameter(new))
        else:
            model.get_submodule(name).to_empty(device=torch.device(place))
    left = [name for name, part in model.named_parameters() if part.is_meta]
    if left:
        raise CheckpointError(
            f"device_map leaves {len(left)} parameters out: {', '.join(left[:5])}"
        )
    dispatch_model(model, dict(device_map), force_hooks=True)
