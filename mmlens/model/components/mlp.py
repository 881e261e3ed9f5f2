"""The feed-forward layer, gated or not."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mmlens.config import TransformerConfig
from mmlens.model.components.activations import activation
from mmlens.model.hook_points import HookPoint
from mmlens.model.sites import Site

Residual = Float[Tensor, "*batch d_model"]


class MLP(nn.Module):
    """W_out act(W_in x), or W_out (act(W_gate x) * W_in x) where `cfg.gated_mlp` (Shazeer 2020).

    `W_in`, `W_gate` and `W_out` are views of its modules' weights in TransformerLens's shapes.
    """

    SITES = (
        *(Site(name, "batch pos d_mlp") for name in ("pre", "pre_linear", "post")),
        Site("mlp.out", "batch pos d_model", "hook_out"),
    )

    def __init__(self, cfg: TransformerConfig) -> None:
        super().__init__()
        self.cfg = cfg
        if cfg.gated_mlp:
            self.gate = nn.Linear(cfg.d_model, cfg.d_mlp, bias=cfg.mlp_bias)
        self.up = nn.Linear(cfg.d_model, cfg.d_mlp, bias=cfg.mlp_bias)
        self.down = nn.Linear(cfg.d_mlp, cfg.d_model, bias=cfg.mlp_bias)
        self.act = activation(cfg.act_fn)
        self.hook_pre = HookPoint()
        if cfg.gated_mlp:
            self.hook_pre_linear = HookPoint()
        self.hook_post = HookPoint()
        if cfg.changes_outputs:
            self.hook_out = HookPoint()

    def forward(self, x: Residual) -> Residual:
        """The layer's output at every position."""
        out = self.down(self.neurons(x))
        return self.hook_out(out) if self.cfg.changes_outputs else out

    def neurons(self, x: Residual) -> Float[Tensor, "*batch d_mlp"]:
        """Return what the output weights are multiplied by."""
        if not self.cfg.gated_mlp:
            return self.hook_post(self.act(self.hook_pre(self.up(x))))
        gate = self.hook_pre(self.gate(x))
        post = self.act(gate)  # now, while a CPU has `gate` in its caches
        linear = self.hook_pre_linear(self.up(x))
        # Nobody holds what the activation function returned, unless that is the identity; a
        # gradient may need it, though.
        in_place = post is not gate and not torch.is_grad_enabled()
        post = post.mul_(linear) if in_place else post * linear
        return self.hook_post(post)

    @property
    def W_gate(self) -> Float[Tensor, "d_model d_mlp"] | None:
        """A writable view of the gate's weights; None where the MLP has no gate."""
        return self.gate.weight.T if self.cfg.gated_mlp else None

    @property
    def W_in(self) -> Float[Tensor, "d_model d_mlp"]:
        """A writable view of the input weights."""
        return self.up.weight.T

    @property
    def W_out(self) -> Float[Tensor, "d_mlp d_model"]:
        """A writable view of the output weights."""
        return self.down.weight.T

    @property
    def b_in(self) -> Float[Tensor, " d_mlp"]:
        """Input bias; zeros where the model has none."""
        return self.up.weight.new_zeros(self.cfg.d_mlp) if self.up.bias is None else self.up.bias

    @property
    def b_gate(self) -> Float[Tensor, " d_mlp"] | None:
        """Bias of the gate; None where the MLP has no gate, or no biases."""
        return self.gate.bias if self.cfg.gated_mlp else None

    @property
    def b_out(self) -> Float[Tensor, " d_model"]:
        """Output bias; zeros where the model has none."""
        bias = self.down.bias
        return self.down.weight.new_zeros(self.cfg.d_model) if bias is None else bias
