"""RMSNorm and LayerNorm, with the scale and the normalised activation as hook points.

Where hooks may edit these, the steps are those of torch's fused kernels: all in float32 (or wider),
and rounded once, to the model's dtype, after weight and bias.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from mmlens.config import ProjectorConfig, TransformerConfig
from mmlens.model.hook_points import HookPoint, has_listeners, left_alone
from mmlens.model.sites import Site

Activation = Float[Tensor, "*batch d_model"]


def float32_or_wider(x: Tensor) -> Tensor:
    """Half precision becomes float32, in which every model of these families normalises."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * w (Zhang and Sennrich 2019)."""

    SITES = (Site("scale", "batch pos 1"), Site("normalized", "batch pos d_model"))

    def __init__(self, d_model: int, eps: float) -> None:
        super().__init__()
        self.eps, self.width = eps, (d_model,)
        self._add_weights()
        self.hook_scale = HookPoint()
        self.hook_normalized = HookPoint()

    def _add_weights(self) -> None:
        self.w = nn.Parameter(torch.ones(self.width))

    def forward(self, x: Activation) -> Activation:
        """Normalise the last axis; through scale and quotient where hooks may edit these."""
        if has_listeners(self.hook_scale, self.hook_normalized):
            centred = self._centred(float32_or_wider(x))
            scale = self._scale(centred)
            seen = self.hook_scale(scale)
            quotient = centred * seen.reciprocal()  # as the fused kernels compute it
            edited = self.hook_normalized(quotient)
            alone = left_alone(self.hook_scale, scale, seen)
            if not (alone and left_alone(self.hook_normalized, quotient, edited)):
                return self._weighted(edited).to(x.dtype)
        return self.without_hooks(x)

    def without_hooks(self, x: Activation) -> Activation:
        """Normalise the last axis, whatever listens."""
        return F.rms_norm(x, self.width, self.w, self.eps)

    def _centred(self, x: Activation) -> Activation:
        return x

    def _scale(self, centred: Activation) -> Float[Tensor, "*batch 1"]:
        return (centred.pow(2).mean(-1, keepdim=True) + self.eps).sqrt()

    def _weighted(self, normalized: Activation) -> Activation:
        return normalized * self.w


class OffsetRMSNorm(RMSNorm):
    """x / sqrt(mean(x^2) + eps) * (offset + w'), with w' around 0 in the checkpoint (Gemma).

    The parameter is the checkpoint's: the sum has more digits than half precision, so it is made in
    float32 when it is needed. Source: transformers, `Gemma3RMSNorm` of `modeling_gemma3.py`.
    """

    def __init__(self, d_model: int, eps: float, offset: float) -> None:
        self.offset = offset
        super().__init__(d_model, eps)

    def _add_weights(self) -> None:
        self.w_less_offset = nn.Parameter(torch.zeros(self.width))

    @property
    def w(self) -> Float[Tensor, " d_model"]:  # type: ignore[override]  # no parameter here
        """What the quotient is multiplied by: a copy; edit `w_less_offset`."""
        return float32_or_wider(self.w_less_offset) + self.offset

    def without_hooks(self, x: Activation) -> Activation:
        """Normalise the last axis, whatever listens."""
        w = self.w
        return F.rms_norm(x.to(w.dtype), self.width, w, self.eps).to(x.dtype)


class LayerNorm(RMSNorm):
    """(x - mean(x)) / sqrt(var(x) + eps) * w + b (Ba et al. 2016)."""

    def __init__(self, d_model: int, eps: float) -> None:
        super().__init__(d_model, eps)
        self.b = nn.Parameter(torch.zeros(d_model))

    def without_hooks(self, x: Activation) -> Activation:
        """Normalise the last axis, whatever listens."""
        return F.layer_norm(x, self.w.shape, self.w, self.b, self.eps)

    def _centred(self, x: Activation) -> Activation:
        return x - x.mean(-1, keepdim=True)

    def _weighted(self, normalized: Activation) -> Activation:
        return super()._weighted(normalized) + self.b


class HeadsNorm(RMSNorm):
    """RMSNorm of all heads as one vector, which has a scale alone (InternVL's large tower).

    Each head has its own copy of the scale, so that hooks see the heads one by one.
    """

    def without_hooks(self, x: Float[Tensor, "*batch head d_head"]) -> Tensor:
        """Normalise the last two axes, whatever listens."""
        return F.rms_norm(x.flatten(-2), self.w.shape, self.w, self.eps).view_as(x)

    def _scale(self, centred: Tensor) -> Tensor:
        return super()._scale(centred.flatten(-2))[..., None].expand(*centred.shape[:-1], 1)

    def _weighted(self, normalized: Tensor) -> Tensor:
        return normalized * self.w.view(normalized.shape[-2:])


NORMS: dict[str, type[RMSNorm]] = {"RMS": RMSNorm, "LN": LayerNorm}


def make_norm(cfg: TransformerConfig | ProjectorConfig, width: int) -> RMSNorm:
    """Return the norm of this width that `cfg.normalization_type` names."""
    assert cfg.normalization_type is not None
    if cfg.norm_offset:
        return OffsetRMSNorm(width, cfg.eps, cfg.norm_offset)
    return NORMS[cfg.normalization_type](width, cfg.eps)
