"""One transformer layer: attention, then the MLP, each added to the residual stream."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mmlens.components.attention import Attention
from mmlens.components.mlp import MLP
from mmlens.components.norm import make_norm
from mmlens.config import TransformerConfig
from mmlens.hook_points import HookPoint

Residual = Float[Tensor, "batch pos d_model"]


class TransformerBlock(nn.Module):
    """A pre-norm block; the same in the decoder (causal, rotary) and the vision tower (neither).

    Where `cfg.parallel_attn_mlp`, attention and MLP share one norm and do not see each other: there
    is no `ln2`, and no stream between the two.
    """

    def __init__(
        self, cfg: TransformerConfig, *, causal: bool, rotary: bool, layer: int = 0
    ) -> None:
        super().__init__()
        self.parallel = cfg.parallel_attn_mlp
        self.ln1 = make_norm(cfg)
        self.attn = Attention(cfg, causal=causal, rotary=rotary, window=cfg.window(layer))
        self.mlp = MLP(cfg)
        self.layer_scale = cfg.layer_scale
        if cfg.layer_scale:
            self.ls_1 = nn.Parameter(torch.ones(cfg.d_model))
            self.ls_2 = nn.Parameter(torch.ones(cfg.d_model))
        self.hook_resid_pre = HookPoint()  # [batch, pos, d_model]
        self.hook_attn_out = HookPoint()  # [batch, pos, d_model]
        if not self.parallel:
            self.ln2 = make_norm(cfg)
            self.hook_resid_mid = HookPoint()  # [batch, pos, d_model]
        self.hook_mlp_out = HookPoint()  # [batch, pos, d_model]
        self.hook_resid_post = HookPoint()  # [batch, pos, d_model]

    def forward(
        self, resid: Residual, keep: Int[Tensor, " kept"] | None = None, **attention: Any
    ) -> Float[Tensor, "batch kept_or_pos d_model"]:
        """The residual stream behind this layer; `attention` is passed on to `Attention`.

        With `keep`, only at those positions: the others are there to be attended to.
        """
        resid = self.hook_resid_pre(resid)
        normalized = self.ln1(resid)
        attn_out = self.attn(normalized, keep=keep, **attention)
        attn_out = self.hook_attn_out(attn_out * self.ls_1 if self.layer_scale else attn_out)
        if keep is not None:
            resid, normalized = resid[:, keep], normalized[:, keep]
        if self.parallel:
            mlp_out = self.hook_mlp_out(self.mlp(normalized))
            return self.hook_resid_post(attn_out + mlp_out + resid)
        resid = self.hook_resid_mid(resid + attn_out)
        mlp_out = self.mlp(self.ln2(resid))
        mlp_out = self.hook_mlp_out(mlp_out * self.ls_2 if self.layer_scale else mlp_out)
        return self.hook_resid_post(resid + mlp_out)
