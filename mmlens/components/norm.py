"""RMSNorm and LayerNorm, with the scale and the normalised activation as hook points."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from mmlens.config import TransformerConfig
from mmlens.hook_points import HookPoint, has_listeners

Activation = Float[Tensor, "*batch d_model"]


def float32_or_wider(x: Tensor) -> Tensor:
    """Half precision becomes float32, in which every model of these families normalises."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * w (Zhang and Sennrich 2019)."""

    def __init__(self, d_model: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.w = nn.Parameter(torch.ones(d_model))
        self.hook_scale = HookPoint()  # [batch, pos, 1]
        self.hook_normalized = HookPoint()  # [batch, pos, d_model]

    def forward(self, x: Activation) -> Activation:
        """Normalise the last axis; fused unless something listens."""
        if not has_listeners(self.hook_scale, self.hook_normalized):
            return F.rms_norm(x, self.w.shape, self.w, self.eps)
        wide = float32_or_wider(x)
        scale = self.hook_scale((wide.pow(2).mean(-1, keepdim=True) + self.eps).sqrt())
        return (self.hook_normalized(wide / scale) * self.w).to(x.dtype)


class LayerNorm(nn.Module):
    """(x - mean(x)) / sqrt(var(x) + eps) * w + b (Ba et al. 2016)."""

    def __init__(self, d_model: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.w = nn.Parameter(torch.ones(d_model))
        self.b = nn.Parameter(torch.zeros(d_model))
        self.hook_scale = HookPoint()  # [batch, pos, 1]
        self.hook_normalized = HookPoint()  # [batch, pos, d_model]

    def forward(self, x: Activation) -> Activation:
        """Normalise the last axis; fused unless something listens."""
        if not has_listeners(self.hook_scale, self.hook_normalized):
            return F.layer_norm(x, self.w.shape, self.w, self.b, self.eps)
        wide = float32_or_wider(x)
        centred = wide - wide.mean(-1, keepdim=True)
        scale = self.hook_scale((centred.pow(2).mean(-1, keepdim=True) + self.eps).sqrt())
        return (self.hook_normalized(centred / scale) * self.w + self.b).to(x.dtype)


def make_norm(cfg: TransformerConfig) -> RMSNorm | LayerNorm:
    """The norm that `cfg.normalization_type` names."""
    kind = RMSNorm if cfg.normalization_type == "RMS" else LayerNorm
    return kind(cfg.d_model, cfg.eps)
