"""Multi-head attention with grouped keys and values, for the decoder and the vision tower.

Queries, keys and values come from one fused projection, `qkv`; `W_Q`, `W_K`, `W_V`, `W_O` are views
of the weights in TransformerLens's shapes, so that writing into them edits the model. Adapters
around `qkv` and `o` count, but for what is computed by head, with these views: where hooks edit
`hook_result`, or the heads' own inputs (`hook_attn_in`, `hook_q_input` and so on).

Attention itself runs fused (`scaled_dot_product_attention`). Scores and pattern are computed only
where something listens to `hook_attn_scores` or `hook_pattern` of this layer; attention goes on
with them only where a hook may have edited them.
"""

from __future__ import annotations

from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mmlens.config import TransformerConfig
from mmlens.model.components.attention_rule import AttentionRule
from mmlens.model.components.norm import HeadsNorm, RMSNorm, float32_or_wider, make_norm
from mmlens.model.components.past import Mask, Past
from mmlens.model.components.rotary import CosSin, rotate
from mmlens.model.hook_points import HookPoint, has_listeners, left_alone
from mmlens.model.sites import Site

Residual = Float[Tensor, "batch pos d_model"]
Heads = Float[Tensor, "batch pos head d_head"]
Scores = Float[Tensor, "batch head query key"]
ByHead = Float[Tensor, "batch pos head d_model"]


def in_weight(which: int, attention: Attention) -> Float[Tensor, "head d_model d_head"]:
    """A writable view of the query (0), key (1) or value (2) weights, by head."""
    rows = attention.qkv.weight.split(attention.widths)[which]
    return rows.unflatten(0, (-1, attention.cfg.d_head)).transpose(1, 2)


def in_bias(which: int, attention: Attention) -> Float[Tensor, "head d_head"]:
    """The biases of these; zeros where the model has none."""
    bias, width = attention.qkv.bias, attention.widths[which]
    if bias is None:
        return attention.qkv.weight.new_zeros(width).unflatten(0, (-1, attention.cfg.d_head))
    return bias.split(attention.widths)[which].unflatten(0, (-1, attention.cfg.d_head))


def heads_norm(cfg: TransformerConfig, n_heads: int) -> RMSNorm:
    """The norm of queries or keys [batch, pos, head, d_head]."""
    if cfg.joint_qk_norm:
        return HeadsNorm(n_heads * cfg.d_head, cfg.eps)
    return make_norm(cfg, cfg.d_head)


class Attention(nn.Module):
    """softmax(Q K^T / `cfg.attn_scale`) V, summed over heads through W_O.

    Where `cfg.qk_norm`, each head's query and key are normalised (`q_norm`, `k_norm`) before they
    are rotated, or those of all heads as one vector; `hook_q` and `hook_k` come before that.
    """

    SITES = (
        Site("q", "batch pos head d_head"),
        Site("k", "batch pos kv_head d_head", key_side=True),
        Site("v", "batch pos kv_head d_head", key_side=True),
        Site("q_norm.scale", "batch pos head 1", "q_norm.hook_scale"),
        Site("q_norm.normalized", "batch pos head d_head", "q_norm.hook_normalized"),
        Site("k_norm.scale", "batch pos kv_head 1", "k_norm.hook_scale", key_side=True),
        Site(
            "k_norm.normalized", "batch pos kv_head d_head", "k_norm.hook_normalized", key_side=True
        ),
        Site("rot_q", "batch pos head d_head"),
        Site("rot_k", "batch pos kv_head d_head", key_side=True),
        Site("attn_scores", "batch head query key", masked=-torch.inf),
        Site("pattern", "batch head query key", masked=0.0),
        Site("z", "batch pos head d_head"),
        Site("result", "batch pos head d_model", needs="use_attn_result"),
        Site("attn.out", "batch pos d_model", "hook_out"),
    )

    def __init__(self, cfg: TransformerConfig, *, rotary: bool, rule: AttentionRule) -> None:
        super().__init__()
        self.cfg = cfg
        self.rule = rule
        width_q, width_kv = cfg.n_heads * cfg.d_head, cfg.n_kv_heads * cfg.d_head
        self.widths = [width_q, width_kv, width_kv]
        self.qkv = nn.Linear(cfg.d_model, sum(self.widths), bias=cfg.qkv_bias)
        self.o = nn.Linear(width_q, cfg.d_model, bias=cfg.o_bias)
        self.hook_q = HookPoint()
        self.hook_k = HookPoint()
        self.hook_v = HookPoint()
        if cfg.qk_norm:
            self.q_norm = heads_norm(cfg, cfg.n_heads)
            self.k_norm = heads_norm(cfg, cfg.n_kv_heads)
        if rotary:
            self.hook_rot_q = HookPoint()
            self.hook_rot_k = HookPoint()
        self.hook_attn_scores = HookPoint()
        self.hook_pattern = HookPoint()
        self.hook_z = HookPoint()
        self.hook_result = HookPoint()
        if cfg.changes_outputs:
            self.hook_out = HookPoint()

    def forward(
        self,
        x: Residual,
        *,
        past: Past,
        cos_sin: CosSin | None = None,
        layer: int = 0,
        by_head: tuple[Tensor, ...] = (),
    ) -> Float[Tensor, "batch query d_model"]:
        """Return attention's output at every position that has a query.

        Args:
            past: what the queries attend to, and which positions of `x` have any.
            cos_sin: the positions' rotary angles, for a decoder.
            layer: which layer's past.
            by_head: what queries (where there are any), keys and values are made of, each
                [batch, pos, head, d_model], where each head has its own input.
        """
        if by_head:
            q, k, v = map(self.project_each, range(3), by_head)
        else:
            q, k, v = self.qkv(x).split(self.widths, dim=-1)
            q = past.kept(q)
        q = self.hook_q(q.unflatten(-1, (self.cfg.n_heads, self.cfg.d_head)))
        k = self.hook_k(k.unflatten(-1, (self.cfg.n_kv_heads, self.cfg.d_head)))
        v = self.hook_v(v.unflatten(-1, (self.cfg.n_kv_heads, self.cfg.d_head)))
        if self.cfg.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if cos_sin is not None:
            q = self.hook_rot_q(rotate(q, *map(past.kept, cos_sin)))
            k = self.hook_rot_k(rotate(k, *cos_sin))
        listened = has_listeners(self.hook_attn_scores, self.hook_pattern)
        weigh = self.edited_pattern if listened else None
        out = self.project(self.hook_z(past.attend(layer, q, k, v, self.rule, weigh)))
        return self.hook_out(out) if self.cfg.changes_outputs else out

    def project_each(self, which: int, x: ByHead) -> Float[Tensor, "batch pos width"]:
        """Queries (0), keys (1) or values (2), of an input that each head has for itself."""
        parts = (x, in_weight(which, self), in_bias(which, self))
        wide_x, weight, bias = map(float32_or_wider, parts)
        heads = torch.einsum("bphm, hmd -> bphd", wide_x, weight) + bias
        return heads.to(x.dtype).flatten(2)  # rounded once, as those of the fused projection

    def edited_pattern(self, scores: Scores, mask: Mask | None) -> Scores | None:
        """Return attention weights after the two hook points; None where both left all as it was.

        Scores and weights are in float32 or wider, as in the fused kernels; `scores` are masked in
        place.
        """
        if mask is not None:
            scores.masked_fill_(~mask, -torch.inf)
        seen = self.hook_attn_scores(scores)
        unedited = left_alone(self.hook_attn_scores, scores, seen)
        if unedited:
            pattern = scores.softmax(dim=-1)
        else:
            # As in torch's own attention, a query that is left with no key attends to nothing;
            # scores that are no numbers stay so.
            pattern = torch.ops.aten._safe_softmax(float32_or_wider(seen), -1)
        weights = self.hook_pattern(pattern)
        alone = unedited and left_alone(self.hook_pattern, pattern, weights)
        return None if alone else weights

    def project(self, z: Heads) -> Residual:
        """Return the heads' outputs times `W_O`, by head where hooks may edit the parts."""
        if has_listeners(self.hook_result):
            # One part may be out of float16's range where the sum is not.
            wide_z, W_O, b_O = (float32_or_wider(part) for part in (z, self.W_O, self.b_O))
            result = torch.einsum("bqhd, hdm -> bqhm", wide_z, W_O)
            edited = self.hook_result(result)
            if not left_alone(self.hook_result, result, edited):
                return (edited.sum(dim=2) + b_O).to(z.dtype)
        return self.o(z.flatten(2))

    # Writable views of the weights, and biases (zeros where the model has none), by head.
    W_Q, W_K, W_V = (property(partial(in_weight, which)) for which in range(3))
    b_Q, b_K, b_V = (property(partial(in_bias, which)) for which in range(3))

    @property
    def W_O(self) -> Float[Tensor, "head d_head d_model"]:
        """A writable view of the output weights."""
        return self.o.weight.unflatten(1, (self.cfg.n_heads, self.cfg.d_head)).permute(1, 2, 0)

    @property
    def b_O(self) -> Float[Tensor, " d_model"]:
        """Output bias; zeros where the model has none."""
        return self.o.weight.new_zeros(self.cfg.d_model) if self.o.bias is None else self.o.bias
