"""Restored activations and cut attention by hand, by torch's hooks on transformers' own LLaVA."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor


def hf_modules(hf: Any, site: str) -> list[Any]:
    """The module of each layer whose output the site is."""
    layers = hf.model.language_model.layers
    return {
        "resid_post": list(layers),
        "attn_out": [layer.self_attn for layer in layers],
        "mlp_out": [layer.mlp for layer in layers],
    }[site]


@torch.no_grad()
def hf_logits(hf: Any, prompts: Any, hooks: Iterable[tuple[Any, Any]] = ()) -> Tensor:
    """Logits of the next token [d_vocab], with forward hooks on modules."""
    with ExitStack() as stack:
        for module, hook in hooks:
            stack.callback(module.register_forward_hook(hook).remove)
        return hf(**prompts.for_hf()).logits[0, -1]


def hf_trace(
    hf: Any,
    clean: Any,
    corrupted: Any,
    sites: Sequence[str],
    groups: Sequence[list[int]],
    width: int,
) -> Tensor:
    """Logits of the next token [site, group, layer, d_vocab], one forward pass per cell."""
    n_layers = len(hf.model.language_model.layers)
    found = []
    for site in sites:
        modules = hf_modules(hf, site)
        kept: dict[Any, Tensor] = {}

        def keep(module: Any, args: Any, output: Any, kept: Any = kept) -> None:
            kept[module] = (output[0] if isinstance(output, tuple) else output).clone()

        hf_logits(hf, clean, [(module, keep) for module in modules])
        for group in groups:

            def put_back(
                module: Any, args: Any, output: Any, kept: Any = kept, group: Any = group
            ) -> Any:
                first = (output[0] if isinstance(output, tuple) else output).clone()
                first[:, group] = kept[module][:, group]
                return (first, *output[1:]) if isinstance(output, tuple) else first

            for layer in range(n_layers):
                lowest = layer - width // 2
                window = [modules[i] for i in range(lowest, lowest + width) if 0 <= i < n_layers]
                found.append(hf_logits(hf, corrupted, [(module, put_back) for module in window]))
    return torch.stack(found).view(len(sites), len(groups), n_layers, -1)


def hf_knockout(
    hf: Any, prompts: Any, layers: Sequence[int], source: list[int], destination: list[int]
) -> Tensor:
    """Logits of the next token [d_vocab] of a run whose mask is edited in these layers."""

    def cut(module: Any, args: Any, kwargs: Any) -> Any:
        mask = kwargs["attention_mask"].clone()
        rows = torch.tensor(destination)[:, None]
        mask[:, :, rows, torch.tensor(source)] = torch.finfo(mask.dtype).min
        return args, {**kwargs, "attention_mask": mask}

    hf.set_attn_implementation("eager")
    with ExitStack() as stack:
        for layer in layers:
            attention = hf.model.language_model.layers[layer].self_attn
            handle = attention.register_forward_pre_hook(cut, with_kwargs=True)
            stack.callback(handle.remove)
        return hf_logits(hf, prompts)
