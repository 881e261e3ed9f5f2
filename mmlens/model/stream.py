"""How a model's residual stream begins, with its images in it, and goes through the blocks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from mmlens.inputs.multimodal_inputs import MultimodalInputs
from mmlens.model.components.attention import Residual
from mmlens.model.components.norm import float32_or_wider
from mmlens.model.components.past import Past
from mmlens.model.components.rotary import Angles
from mmlens.model.hooked_root_module import exclusively
from mmlens.model.run_positions import computing

if TYPE_CHECKING:
    from mmlens.config import MultimodalConfig

Visual = Float[Tensor, "1 visual_token d_visual"]


def added(
    x: Float[Tensor, "row pos d_model"], noise: Float[Tensor, "sample pos d_model"]
) -> Float[Tensor, "rows pos d_model"]:
    """Return `x` with noise, rounded once: of x + (y - x) in half precision y comes back."""
    wide = float32_or_wider(x)
    return (wide + noise.to(wide)).to(x.dtype)


def check_stream(resid: Any, d_model: int, name: str) -> None:
    """Raise an error unless this is a residual stream.

    Args:
        resid: what was given for one.
        d_model: the width that the model needs.
        name: what it was given for, for the message.

    Raises:
        TypeError: no tensor, or one of whole numbers, such as token ids.
        ValueError: another shape than `[batch, pos, d_model]`.
    """
    is_tensor = isinstance(resid, Tensor)
    if not is_tensor or not resid.is_floating_point():
        kind = f"a tensor of {resid.dtype}" if is_tensor else type(resid).__name__
        raise TypeError(f"{name} takes a residual stream [batch, pos, {d_model}], not {kind}")
    if resid.ndim != 3 or resid.shape[-1] != d_model or not resid.numel():
        raise ValueError(
            f"{name} takes a residual stream [batch, pos, {d_model}], not {tuple(resid.shape)}"
        )


class StreamMethods:
    """Visual tokens take their places among the words; deepstack adds to them in first blocks."""

    cfg: MultimodalConfig
    blocks: Any
    vision: Any
    projector: Any
    embed: Any
    hook_embed: Any
    hook_input_embed: Any

    @exclusively
    def visual_tokens(self, inputs: MultimodalInputs) -> Visual | None:
        """Return the visual tokens of all images, as the projector gives them; None without images.

        Where there is deepstack, what block 0, 1, ... gets comes after, along the last axis.
        """
        if inputs.visual is None or not (self.vision and self.projector):
            return None
        with computing():  # the tower has positions of its own
            return self.projector(self.vision.of_images(inputs.visual), inputs.visual)

    @exclusively
    def input_embeddings(self, inputs: MultimodalInputs, visual: Visual | None = None) -> Residual:
        """The residual stream that enters block 0: token embeddings with the visual tokens in.

        Args:
            visual: the visual tokens, where the images are encoded already.
        """
        visual = self.visual_tokens(inputs) if visual is None else visual
        is_image = inputs.is_image
        # The image token and the padding token may have no row in the embedding.
        tokens = inputs.tokens.masked_fill(inputs.tokens >= self.cfg.d_vocab, 0)
        resid = self.hook_embed(self.embed(tokens))
        if visual is not None:
            if visual.shape[1] != int(is_image.sum()):
                raise ValueError(
                    f"{int(is_image.sum())} image tokens, but {visual.shape[1]} visual tokens"
                )
            spliced = visual[..., : self.cfg.d_model].to(resid)
            resid = resid.masked_scatter(is_image[..., None], spliced)
        if inputs.noise is not None:
            resid = added(resid, inputs.noise[..., : self.cfg.d_model])
        return self.hook_input_embed(resid)

    def deepstack(
        self, inputs: MultimodalInputs, visual: Visual | None
    ) -> tuple[Float[Tensor, "row pos d_model"], ...]:
        """Return what the images add in block 0, 1, ...: zero at text; () where they add nothing.

        Meng et al. 2024, "DeepStack"; transformers, `_deepstack_process` of `modeling_qwen3_vl.py`.

        Args:
            visual: of `visual_tokens`.
        """
        if visual is None:
            return ()
        where = inputs.is_image[..., None].to(visual.device)
        zeros = torch.zeros(*inputs.tokens.shape, self.cfg.d_model).to(visual)
        _, *parts = visual.split(self.cfg.d_model, dim=-1)
        adds = [zeros.masked_scatter(where, part) for part in parts]
        noise = () if inputs.noise is None else inputs.noise.split(self.cfg.d_model, dim=-1)[1:]
        for layer, part in enumerate(noise):
            adds[layer] = added(adds[layer], part)
        return tuple(adds)

    def all_embeddings(self, inputs: MultimodalInputs) -> Float[Tensor, "row pos d_visual"]:
        """Return what enters block 0, and along the last axis what images add in block 0, 1, ..."""
        visual = self.visual_tokens(inputs)
        entering = self.input_embeddings(inputs, visual)
        return torch.cat([entering, *self.deepstack(inputs, visual)], dim=-1)

    def run_blocks(
        self,
        resid: Residual,
        layers: Iterable[int],
        past: Past,
        angles: Angles,
        deepstack: Sequence[Tensor],
    ) -> Float[Tensor, "batch query d_model"]:
        """Return the residual stream after some layers, at the positions that still have queries.

        Args:
            past: what the queries attend to.
            angles: of rotary embeddings, by the kind of layer.
            deepstack: what images add in layer 0, 1, ..., at the positions of `resid`.
        """
        for layer in layers:
            resid = self.blocks[layer](
                resid,
                past=past,
                cos_sin=angles[self.cfg.kind(layer)],
                layer=layer,
                deepstack=deepstack[layer] if layer < len(deepstack) else None,
            )
        return resid
