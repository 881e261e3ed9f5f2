"""From the vision tower's features to visual tokens."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn
from transformers.activations import ACT2FN

from mmlens.config import ProjectorConfig
from mmlens.hook_points import HookPoint


class Projector(nn.Module):
    """LLaVA's projector: Linear, GELU, Linear (Liu et al. 2023, "Improved baselines", 3.2)."""

    def __init__(self, cfg: ProjectorConfig) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(cfg.d_in, cfg.d_hidden, bias=cfg.bias)
        self.act = ACT2FN[cfg.act_fn]
        self.linear_2 = nn.Linear(cfg.d_hidden, cfg.d_out, bias=cfg.bias)
        self.hook_in = HookPoint()  # [image, visual_token, d_in]
        self.hook_pre = HookPoint()  # [image, visual_token, d_hidden]
        self.hook_post = HookPoint()  # [image, visual_token, d_hidden]
        self.hook_out = HookPoint()  # [image, visual_token, d_out]

    def forward(
        self, features: Float[Tensor, "image visual_token d_in"]
    ) -> Float[Tensor, "image visual_token d_out"]:
        """Visual tokens, in the language model's residual stream."""
        pre = self.hook_pre(self.linear_1(self.hook_in(features)))
        return self.hook_out(self.linear_2(self.hook_post(self.act(pre))))
