"""The feed-forward layer, gated or not."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from transformers.activations import ACT2FN

from mmlens.config import TransformerConfig
from mmlens.hook_points import HookPoint

Residual = Float[Tensor, "*batch d_model"]


class MLP(nn.Module):
    """W_out act(W_in x), or W_out (act(W_gate x) * W_in x) where `cfg.gated_mlp` (Shazeer 2020).

    Gate and input share one fused projection, `up`. Weights are views in TransformerLens's shapes.
    """

    def __init__(self, cfg: TransformerConfig) -> None:
        super().__init__()
        self.cfg = cfg
        width = cfg.d_mlp * (2 if cfg.gated_mlp else 1)
        self.up = nn.Linear(cfg.d_model, width, bias=cfg.mlp_bias)
        self.down = nn.Linear(cfg.d_mlp, cfg.d_model, bias=cfg.mlp_bias)
        self.act = ACT2FN[cfg.act_fn]
        self.hook_pre = HookPoint()  # [batch, pos, d_mlp]
        if cfg.gated_mlp:
            self.hook_pre_linear = HookPoint()  # [batch, pos, d_mlp]
        self.hook_post = HookPoint()  # [batch, pos, d_mlp]

    def forward(self, x: Residual) -> Residual:
        """The layer's output at every position."""
        if not self.cfg.gated_mlp:
            return self.down(self.hook_post(self.act(self.hook_pre(self.up(x)))))
        if x.device.type == "cpu":
            # A CPU is no faster with one large product, and its activation function twice as fast
            # on a result that lies in one piece, and still in its caches.
            (w_gate, w_in), (b_gate, b_in) = self.up.weight.chunk(2), self._biases()
            post = self.act(self.hook_pre(F.linear(x, w_gate, b_gate)))
            linear = F.linear(x, w_in, b_in)
        else:
            gate, linear = self.up(x).chunk(2, dim=-1)
            post = self.act(self.hook_pre(gate))
        linear = self.hook_pre_linear(linear)
        # Nobody holds what the activation function returned; a gradient may need it, though.
        post = post * linear if torch.is_grad_enabled() else post.mul_(linear)
        return self.down(self.hook_post(post))

    def _biases(self) -> tuple[Tensor | None, Tensor | None]:
        if self.up.bias is None:
            return None, None
        gate, linear = self.up.bias.chunk(2)
        return gate, linear

    @property
    def W_gate(self) -> Float[Tensor, "d_model d_mlp"] | None:
        """A writable view of the gate's weights; None where the MLP has no gate."""
        return self.up.weight[: self.cfg.d_mlp].T if self.cfg.gated_mlp else None

    @property
    def W_in(self) -> Float[Tensor, "d_model d_mlp"]:
        """A writable view of the input weights."""
        return self.up.weight[-self.cfg.d_mlp :].T

    @property
    def W_out(self) -> Float[Tensor, "d_mlp d_model"]:
        """A writable view of the output weights."""
        return self.down.weight.T

    @property
    def b_in(self) -> Float[Tensor, " d_mlp"]:
        """Input bias; zeros where the model has none."""
        if self.up.bias is None:
            return self.up.weight.new_zeros(self.cfg.d_mlp)
        return self.up.bias[-self.cfg.d_mlp :]

    @property
    def b_out(self) -> Float[Tensor, " d_model"]:
        """Output bias; zeros where the model has none."""
        if self.down.bias is None:
            return torch.zeros_like(self.down.weight[:, 0])
        return self.down.bias
