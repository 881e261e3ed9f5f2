"""The second moment of an MLP's keys over a corpus, which ROME and MEMIT need.

covariance = key_covariance(model, texts, layers=[3], cache="covariance.safetensors")
rome(model, request, layer=3, covariance=covariance)
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from mmlens.attribution.where import layers_of
from mmlens.editing.edit import fingerprint
from mmlens.hook_points import HookPoint
from mmlens.hooks import HookFunction
from mmlens.inputs import MultimodalInputs
from mmlens.interventions import hook_name
from mmlens.results import SavedResult
from mmlens.spans import PLACEHOLDER

if TYPE_CHECKING:
    from mmlens.model import HookedMultimodalTransformer

__all__ = ["KeyCovariance", "key_covariance"]


@dataclass(frozen=True, eq=False)
class KeyCovariance(SavedResult):
    """E[k k^T] of the down projection's inputs, uncentred, layer by layer."""

    moments: Float[Tensor, "layer d_mlp d_mlp"]
    layers: tuple[int, ...]
    n_tokens: int
    """How many positions it was estimated from."""
    source: str
    """A hash of the model's MLPs in these layers and of the texts."""

    def at(self, layer: int) -> Float[Tensor, "d_mlp d_mlp"]:
        """That of one layer.

        Raises:
            ValueError: it was not estimated for this layer.
        """
        if layer not in self.layers:
            raise ValueError(
                f"the covariance is of layers {list(self.layers)}, not of {layer}: estimate it "
                f"with key_covariance(model, texts, layers=[{layer}])"
            )
        return self.moments[self.layers.index(layer)]


@torch.no_grad()
def key_covariance(
    model: HookedMultimodalTransformer,
    texts: Iterable[str | MultimodalInputs],
    layers: Sequence[int],
    *,
    cache: str | Path | None = None,
) -> KeyCovariance:
    """Estimate E[k k^T] from texts, over all their positions but BOS and padding.

    Args:
        texts: plain texts (cut to the model's context; a "<image>" in one is a word), or prepared
            inputs with or without pictures.
        layers: whose keys; one pass serves all of them.
        cache: a file: read if it holds the covariance of these texts, layers and weights, and
            else written.

    Raises:
        ValueError: no texts, or layers that are not there.
    """
    chosen = layers_of(model, layers)
    prompts = [
        model.to_inputs(text if isinstance(text, MultimodalInputs) else cut(model, text))
        for text in texts
    ]
    if not prompts:
        raise ValueError("no texts to estimate the covariance of the keys from")
    source = hash_of(model, prompts, chosen)
    if cache is not None and Path(cache).is_file():
        known = KeyCovariance.load(cache)
        if known.source == source:
            return known
    sizes = (len(chosen), model.cfg.d_mlp, model.cfg.d_mlp)
    moments = torch.zeros(sizes, device=model.device)
    n_tokens = 0
    for inputs in prompts:
        wanted = inputs.attention_mask.clone()
        for row, spans in enumerate(inputs.spans):
            wanted[row, spans.get("bos", [])] = False
        n_tokens += int(wanted.sum())
        add_moments(model, inputs, wanted, chosen, moments)
    if not n_tokens:
        raise ValueError("the texts have no tokens but the first: there are no keys to look at")
    found = KeyCovariance(moments / n_tokens, tuple(chosen), n_tokens, source)
    if cache is not None:
        found.save(cache)
    return found


def add_moments(
    model: HookedMultimodalTransformer,
    inputs: MultimodalInputs,
    wanted: Tensor,
    layers: Sequence[int],
    moments: Float[Tensor, "layer d_mlp d_mlp"],
) -> None:
    """Add k k^T of every wanted position, for each layer, in place."""

    def add_to(total: Tensor) -> HookFunction:
        def hook_function(activation: Tensor, hook: HookPoint) -> None:
            keys = activation[wanted].to(total)
            total.addmm_(keys.T, keys)

        return hook_function

    hooks = [
        (hook_name("post", layer), add_to(total))
        for layer, total in zip(layers, moments, strict=True)
    ]
    with model.hooks(fwd_hooks=hooks):
        model(inputs, stop_at_layer=max(layers) + 1)


def cut(model: HookedMultimodalTransformer, text: str) -> Tensor:
    """A text's tokens, as many as the model's context holds; a text about "<image>" shows none."""
    return model.to_tokens(text.replace(PLACEHOLDER, "image"))[:, : model.cfg.n_ctx]


def hash_of(
    model: HookedMultimodalTransformer, prompts: Sequence[MultimodalInputs], layers: Sequence[int]
) -> str:
    """Of the prompts, and of the weights that make the keys."""
    digest = hashlib.sha256(str(list(layers)).encode())
    for inputs in prompts:
        digest.update(str(inputs.tokens.tolist()).encode())
        if inputs.pixel_values is not None:
            digest.update(fingerprint(inputs.pixel_values).encode())
    for layer in layers:
        digest.update(fingerprint(model.get_parameter(f"blocks.{layer}.mlp.up.weight")).encode())
    return digest.hexdigest()
