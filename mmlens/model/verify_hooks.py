"""Are all hooks alive? Perturb each, and look whether the output changes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmlens.inputs.multimodal_inputs import MultimodalInputs
from mmlens.model.hooked_root_module import HookedRootModule
from mmlens.utils.grad_mode import without_gradients


@without_gradients
def dead_hooks(model: Any, inputs: MultimodalInputs) -> list[str]:
    """Names of hook points that do not fire or do not change the logits when they are edited.

    Every activation is edited by noise of its own size, at all positions. So that a deep model
    takes minutes rather than hours, only what an edit passes through first is run: a hook inside a
    decoder block is looked for in that block's output, this (`hook_resid_post`) in that of the next
    block, tower and projector in what enters block 0 (after the blocks to which images add), and
    that (`hook_input_embed`) and the last block's output in the logits.

    Raises:
        ValueError: NaN or infinity without an edit, which would change with none or with any.
    """
    entering = [model.SITES.hook_name("resid_pre", layer) for layer in range(model.cfg.n_layers)]
    _, cache = model.run_with_cache(inputs, names_filter=entering)
    resuming = [model.resuming(inputs, layer) for layer in range(model.cfg.n_layers)]
    dead = []
    for name in model.hook_dict:
        input: Any = inputs
        options: dict[str, Any] = {}
        site, layer = model.SITES.of(name)
        if site.stack != "decoder":
            options = {"stop_at_layer": model.cfg.n_deepstack}
        elif layer is not None:
            input = cache[entering[layer]]
            options = {"start_at_layer": layer, **resuming[layer]}
            stop = layer + site.after + 1
            if stop <= model.cfg.n_layers:
                options["stop_at_layer"] = stop
        if not is_alive(model, name, input, **options):
            dead.append(name)
    return dead


@without_gradients
def is_alive(model: HookedRootModule, name: str, *args: Any, **kwargs: Any) -> bool:
    """Whether a hook point fires, and the output of `model(*args, **kwargs)` depends on it.

    Raises:
        ValueError: the output is not finite without an edit.
    """
    # Listening alone may choose another kernel, so the unedited run listens as well.
    unedited, edited = (
        model.run_with_hooks(*args, fwd_hooks=[(name, hook)], **kwargs)
        for hook in (lambda activation, hook: None, perturb)
    )
    if not bool(unedited.isfinite().all()):
        n_bad = int((~unedited.isfinite()).sum())
        raise ValueError(
            f"{n_bad} of {unedited.numel()} numbers that depend on {name} are NaN or infinite "
            "without any edit, so it cannot be seen what an edit changes: look for NaN in the "
            "weights, or run in float32"
        )
    return not torch.equal(unedited, edited)


def perturb(activation: Tensor, hook: Any) -> Tensor:
    """The activation with noise of its own size; what is masked (-inf) stays masked."""
    generator = torch.Generator(activation.device).manual_seed(0)
    noise = torch.randn(activation.shape, generator=generator, device=activation.device)
    size = activation[activation.isfinite()].float().std().nan_to_num(1.0).clamp(min=0.1)
    return activation + (noise * size).to(activation.dtype)
