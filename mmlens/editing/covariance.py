"""The second moment of an MLP's keys over a corpus, which ROME and MEMIT need.

covariance = key_covariance(model, texts, layers=[3], cache="covariance.safetensors")
rome(model, request, layer=3, covariance=covariance)
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from mmlens.analyses.arguments import layers_of
from mmlens.analyses.result import SavedResult
from mmlens.editing.fingerprints import fingerprint
from mmlens.editing.reference_keys import weights_below
from mmlens.inputs.multimodal_inputs import MultimodalInputs
from mmlens.inputs.spans import PLACEHOLDER
from mmlens.interventions.intervention import hook_names
from mmlens.utils.grad_mode import without_gradients
from mmlens.utils.texts import check_several
from mmlens.utils.threads import on_free_cores

if TYPE_CHECKING:
    from mmlens.model.transformer import HookedMultimodalTransformer

__all__ = ["KeyCovariance", "key_covariance"]


@dataclass(frozen=True, eq=False)
class KeyCovariance(SavedResult):
    """E[k k^T] of the down projection's inputs, uncentred, layer by layer."""

    SIZES: ClassVar[dict[str, str]] = {"layers": "layer"}

    moments: Float[Tensor, "layer d_mlp d_mlp"]
    layers: tuple[int, ...]
    n_tokens: int
    """How many positions it was estimated from."""
    source: str
    """A hash of the layers, of the texts, and of the weights on which their keys depend."""
    digest: str = ""
    """A hash of the moments, by which a file that was changed since is known."""

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


@without_gradients
@on_free_cores
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
            inputs with or without images.
        layers: whose keys; one pass serves all of them.
        cache: a file: read if it holds the covariance of these texts, layers and weights, and
            else written. One that is damaged is written anew, with a warning.

    Raises:
        TypeError: a single text in the place of a list.
        ValueError: no texts, or layers that are not there.
    """
    check_several(texts=texts)
    chosen = layers_of(model, layers)
    prompts = [
        model.to_inputs(text if isinstance(text, MultimodalInputs) else cut(model, text))
        for text in texts
    ]
    if not prompts:
        raise ValueError("no texts to estimate the covariance of the keys from")
    source = hash_of(model, prompts, chosen)
    if cache is not None and Path(cache).is_file():
        known = cached(Path(cache))
        if known is not None and known.source == source:
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
        raise ValueError("the texts have no tokens but the first: there are no keys to average")
    moments /= n_tokens
    found = KeyCovariance(moments, tuple(chosen), n_tokens, source, fingerprint(moments))
    if cache is not None:
        found.save(cache)
    return found


def cached(file: Path) -> KeyCovariance | None:
    """Return what a file holds, or None, with a warning, if that is not what was written to it."""
    try:
        known = KeyCovariance.load(file)
        is_whole = fingerprint(known.moments) == known.digest
    except (ValueError, TypeError, OSError):  # what another program wrote, or half of it
        is_whole = False
    if is_whole:
        return known
    warnings.warn(f"{file} holds no whole covariance of keys: it is computed anew", stacklevel=3)
    return None


def add_moments(
    model: HookedMultimodalTransformer,
    inputs: MultimodalInputs,
    wanted: Tensor,
    layers: Sequence[int],
    moments: Float[Tensor, "layer d_mlp d_mlp"],
) -> None:
    """Add k k^T of every wanted position, for each layer, in place."""
    names = hook_names("post", layers)
    _, cache = model.run_with_cache(inputs, names_filter=names, stop_at_layer=max(layers) + 1)
    for name, total in zip(names, moments, strict=True):
        keys = cache[name][wanted].to(total)
        total.addmm_(keys.T, keys)


def cut(model: HookedMultimodalTransformer, text: str) -> Tensor:
    """A text's tokens, as many as the model's context holds; a text about "<image>" shows none."""
    return model.to_tokens(text.replace(PLACEHOLDER, "image"))[:, : model.cfg.n_ctx]


def hash_of(
    model: HookedMultimodalTransformer, prompts: Sequence[MultimodalInputs], layers: Sequence[int]
) -> str:
    """Return a hash of the prompts, and of the weights on which the keys depend."""
    digest = hashlib.sha256(str(list(layers)).encode())
    for inputs in prompts:
        digest.update(str((inputs.tokens.tolist(), inputs.attention_mask.tolist())).encode())
        if inputs.pixel_values is not None:
            digest.update(fingerprint(inputs.pixel_values).encode())
    # The keys of the last layer depend on all the weights that those of the others do.
    for name, weight in weights_below(model, max(layers)):
        digest.update(f"{name} {fingerprint(weight)}".encode())
    return digest.hexdigest()
