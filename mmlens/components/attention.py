"""Multi-head attention with grouped keys and values, for the decoder and the vision tower.

Queries, keys and values come from one fused projection, `qkv`; `W_Q`, `W_K`, `W_V`, `W_O` are views
of the weights in TransformerLens's shapes, so that writing into them edits the model.

Attention itself runs fused (`scaled_dot_product_attention`) unless something listens to
`hook_attn_scores` or `hook_pattern` of this layer.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from mmlens.components.key_value_cache import KeyValueCache
from mmlens.components.masks import causal_mask, window_mask
from mmlens.components.norm import float32_or_wider
from mmlens.components.rotary import rotate
from mmlens.components.shared_past import SharedPast
from mmlens.config import TransformerConfig
from mmlens.hook_points import HookPoint, has_listeners

Residual = Float[Tensor, "batch pos d_model"]
Heads = Float[Tensor, "batch pos head d_head"]
Scores = Float[Tensor, "batch head query key"]
Mask = Bool[Tensor, "rows 1 query key"]
CosSin = tuple[Tensor, Tensor]


class Attention(nn.Module):
    """softmax(Q K^T / sqrt(d_head)) V, summed over heads through W_O."""

    def __init__(
        self, cfg: TransformerConfig, *, causal: bool, rotary: bool, window: int | None = None
    ) -> None:
        super().__init__()
        self.cfg = cfg
        self.causal = causal
        self.window = window
        width_q, width_kv = cfg.n_heads * cfg.d_head, cfg.n_kv_heads * cfg.d_head
        self.widths = [width_q, width_kv, width_kv]
        self.qkv = nn.Linear(cfg.d_model, sum(self.widths), bias=cfg.qkv_bias)
        self.o = nn.Linear(width_q, cfg.d_model, bias=cfg.o_bias)
        self.hook_q = HookPoint()  # [batch, pos, head, d_head]
        self.hook_k = HookPoint()  # [batch, pos, kv_head, d_head]
        self.hook_v = HookPoint()  # [batch, pos, kv_head, d_head]
        if rotary:
            self.hook_rot_q = HookPoint()  # [batch, pos, head, d_head]
            self.hook_rot_k = HookPoint()  # [batch, pos, kv_head, d_head]
        self.hook_attn_scores = HookPoint()  # [batch, head, query, key]
        self.hook_pattern = HookPoint()  # [batch, head, query, key]
        self.hook_z = HookPoint()  # [batch, pos, head, d_head]
        self.hook_result = HookPoint()  # [batch, pos, head, d_model]

    def forward(
        self,
        x: Residual,
        *,
        cos_sin: CosSin | None = None,
        mask: Mask | None = None,
        cache: KeyValueCache | SharedPast | None = None,
        layer: int = 0,
        keep: Int[Tensor, " kept"] | None = None,
    ) -> Float[Tensor, "batch kept_or_pos d_model"]:
        """Attention's output at every position of `x`.

        Args:
            cos_sin: the positions' rotary angles, for a decoder.
            mask: True where a query may look. None means everywhere, or, for a causal model,
                every key up to the query's own position.
            cache: keys and values of earlier positions, to attend to and (unless it is frozen)
                to extend; or those of a run that packed continuations share.
            layer: which entry of the cache is this layer's.
            keep: which positions of `x` have queries; all by default.
        """
        q, k, v = self.project_in(x, keep)
        q = self.hook_q(q.unflatten(-1, (self.cfg.n_heads, self.cfg.d_head)))
        k = self.hook_k(k.unflatten(-1, (self.cfg.n_kv_heads, self.cfg.d_head)))
        v = self.hook_v(v.unflatten(-1, (self.cfg.n_kv_heads, self.cfg.d_head)))
        if cos_sin is not None:
            at_queries = cos_sin if keep is None else tuple(part[:, keep] for part in cos_sin)
            q = self.hook_rot_q(rotate(q, *at_queries))
            k = self.hook_rot_k(rotate(k, *cos_sin))
        openly = has_listeners(self.hook_attn_scores, self.hook_pattern)
        if isinstance(cache, SharedPast):
            attend_shared = self.attend_shared_openly if openly else self.attend_shared
            z = attend_shared(q, k, v, cache, layer)
        else:
            if cache is not None:
                k, v = cache.extend(layer, k, v)
            mask = self.within_window(mask, q, k)
            z = (self.attend_openly if openly else self.attend_fused)(q, k, v, mask)
        return self.project(self.hook_z(z))

    def project_in(
        self, x: Residual, keep: Int[Tensor, " kept"] | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (at the positions `keep`, or all), keys and values; heads not yet apart."""
        if keep is None:
            q, k, v = self.qkv(x).split(self.widths, dim=-1)
            return q, k, v
        n, weight, bias = self.widths[0], self.qkv.weight, self.qkv.bias
        k, v = F.linear(x, weight[n:], None if bias is None else bias[n:]).chunk(2, dim=-1)
        return F.linear(x[:, keep], weight[:n], None if bias is None else bias[:n]), k, v

    def within_window(self, mask: Mask | None, q: Heads, k: Tensor) -> Mask | None:
        """The mask without the keys that lie further back than this layer sees."""
        n_queries, n_keys = q.shape[1], k.shape[1]
        if self.window is None or n_keys <= self.window:
            return mask
        if mask is None:
            mask = causal_mask(n_queries, n_keys, q.device)[None, None]
        return mask & window_mask(n_queries, n_keys, self.window, q.device)

    def attend_fused(self, q: Heads, k: Tensor, v: Tensor, mask: Mask | None) -> Heads:
        """Heads' outputs `z`, without the pattern ever being written down."""
        n_queries, n_keys = q.shape[1], k.shape[1]
        is_causal = self.causal and mask is None and n_queries > 1
        if is_causal and n_queries < n_keys:  # the kernel would align the triangle top left
            mask, is_causal = causal_mask(n_queries, n_keys, q.device)[None, None], False
        z = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            attn_mask=mask,
            is_causal=is_causal,
            enable_gqa=self.cfg.n_kv_heads < self.cfg.n_heads,
        )
        return z.transpose(1, 2)

    def attend_openly(self, q: Heads, k: Tensor, v: Tensor, mask: Mask | None) -> Heads:
        """Heads' outputs `z` by way of scores and pattern, which hooks may read and edit."""
        if self.causal and mask is None:
            mask = causal_mask(q.shape[1], k.shape[1], q.device)[None, None]
        grouped = q.unflatten(2, (self.cfg.n_kv_heads, -1))
        scores = torch.einsum("bqngd, bknd -> bngqk", grouped, k).flatten(1, 2)
        pattern = self.pattern(scores, mask).unflatten(1, (self.cfg.n_kv_heads, -1))
        return torch.einsum("bngqk, bknd -> bqngd", pattern, v).flatten(2, 3)

    def attend_shared(self, q: Heads, k: Tensor, v: Tensor, past: SharedPast, layer: int) -> Heads:
        """Heads' outputs `z` of packed continuations of one past."""
        return past.attend(layer, q, k, v, self.window)

    def attend_shared_openly(
        self, q: Heads, k: Tensor, v: Tensor, past: SharedPast, layer: int
    ) -> Heads:
        """The same by way of scores and pattern, which have a key for every position."""
        pattern = self.pattern(past.scores(layer, q, k), past.mask(self.window, q.device))
        return past.weighted(layer, pattern, v)

    def pattern(self, scores: Scores, mask: Mask | None) -> Scores:
        """Products of queries and keys to attention weights, by way of the two hook points."""
        scores = scores / self.cfg.attn_scale
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        scores = self.hook_attn_scores(scores)
        pattern = float32_or_wider(scores).softmax(dim=-1).to(scores.dtype)
        # A query that a hook has cut off from every key attends to nothing.
        return self.hook_pattern(pattern.nan_to_num())

    def project(self, z: Heads) -> Residual:
        """Heads to the residual stream; by head only if something listens to `hook_result`."""
        if not has_listeners(self.hook_result):
            return self.o(z.flatten(2))
        result = self.hook_result(torch.einsum("bqhd, hdm -> bqhm", z, self.W_O))
        out = result.sum(dim=2)
        return out if self.o.bias is None else out + self.o.bias

    def _in_weight(self, which: int) -> Tensor:
        rows = self.qkv.weight.split(self.widths)[which]
        return rows.unflatten(0, (-1, self.cfg.d_head)).transpose(1, 2)

    def _in_bias(self, which: int) -> Tensor:
        if self.qkv.bias is None:
            n_heads = self.widths[which] // self.cfg.d_head
            return self.qkv.weight.new_zeros(n_heads, self.cfg.d_head)
        return self.qkv.bias.split(self.widths)[which].unflatten(0, (-1, self.cfg.d_head))

    @property
    def W_Q(self) -> Float[Tensor, "head d_model d_head"]:
        """A writable view of the query weights."""
        return self._in_weight(0)

    @property
    def W_K(self) -> Float[Tensor, "kv_head d_model d_head"]:
        """A writable view of the key weights, one entry per key-value head."""
        return self._in_weight(1)

    @property
    def W_V(self) -> Float[Tensor, "kv_head d_model d_head"]:
        """A writable view of the value weights, one entry per key-value head."""
        return self._in_weight(2)

    @property
    def W_O(self) -> Float[Tensor, "head d_head d_model"]:
        """A writable view of the output weights."""
        return self.o.weight.unflatten(1, (self.cfg.n_heads, self.cfg.d_head)).permute(1, 2, 0)

    @property
    def b_Q(self) -> Float[Tensor, "head d_head"]:
        """Query biases; zeros where the model has none."""
        return self._in_bias(0)

    @property
    def b_K(self) -> Float[Tensor, "kv_head d_head"]:
        """Key biases; zeros where the model has none."""
        return self._in_bias(1)

    @property
    def b_V(self) -> Float[Tensor, "kv_head d_head"]:
        """Value biases; zeros where the model has none."""
        return self._in_bias(2)

    @property
    def b_O(self) -> Float[Tensor, " d_model"]:
        """Output bias; zeros where the model has none."""
        return self.o.weight.new_zeros(self.cfg.d_model) if self.o.bias is None else self.o.bias
