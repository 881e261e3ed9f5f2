"""Attention to a part of the keys, with what is needed to add the other parts.

Query heads that share keys and values (grouped-query attention) are folded into the query axis, so
that these are not repeated.

Where scores are written down they are what torch's fused kernels (flash, memory-efficient) have in
their registers: products of the model's own queries and keys, summed in float32 and scaled there.
In half precision the product itself would overflow (float16 ends at 65,504), or round scores of 16
to 1/8 (bfloat16), of which softmax makes 12 %. The product comes before the scale, as in the
kernels: then the factors are the model's own, and exact also in TF32.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.backends.cuda import (
    SDPAParams,
    can_use_efficient_attention,
    can_use_flash_attention,
)

from mmlens.model.components.attention_rule import AttentionRule
from mmlens.model.components.norm import float32_or_wider

Queries = Float[Tensor, "batch query head d_head"]
Keys = Float[Tensor, "rows key kv_head d_head"]


def fold(
    x: Float[Tensor, "batch query head width"], n_kv_heads: int
) -> Float[Tensor, "batch kv_head folded width"]:
    """The heads of a group after one another in the query axis."""
    return x.unflatten(2, (n_kv_heads, -1)).transpose(1, 2).flatten(2, 3)


def unfold(
    x: Float[Tensor, "batch kv_head folded width"], n_heads: int
) -> Float[Tensor, "batch query head width"]:
    """The inverse of `fold`."""
    return x.unflatten(2, (-1, n_heads // x.shape[1])).transpose(1, 2).flatten(2, 3)


def attention_scores(
    q: Queries, k: Keys, rule: AttentionRule
) -> Float[Tensor, "batch head query key"]:
    """Return the rule's scores, in float32 or wider, nothing masked."""
    grouped = q.transpose(1, 2).unflatten(1, (k.shape[2], -1))
    scores = scores_of(grouped.flatten(2, 3), k.transpose(1, 2), rule)
    return scores.unflatten(2, grouped.shape[2:4]).flatten(1, 2)


def weighted_values(
    pattern: Float[Tensor, "batch head query key"], v: Keys
) -> Float[Tensor, "batch query head d_head"]:
    """Return the values, weighted by a pattern, in float32 or wider."""
    grouped = float32_or_wider(pattern).unflatten(1, (v.shape[2], -1))
    z = grouped.flatten(2, 3) @ float32_or_wider(v).transpose(1, 2)
    return z.unflatten(2, grouped.shape[2:4]).flatten(1, 2).transpose(1, 2)


def scores_of(
    q: Float[Tensor, "*batch query d_head"],
    k: Float[Tensor, "*batch key d_head"],
    rule: AttentionRule,
) -> Float[Tensor, "*batch query key"]:
    """Return the scores of one head or a group, in float32 or wider."""
    return rule.scores(float32_or_wider(q) @ float32_or_wider(k).transpose(-1, -2))


def attend_part(
    q: Queries,
    k: Keys,
    v: Keys,
    mask: Bool[Tensor, "mask_rows query_or_1 key"] | None,
    rule: AttentionRule,
) -> tuple[Queries, Float[Tensor, "batch query head"]]:
    """Softmax attention to these keys, and the logarithm of its normaliser.

    A query that may attend to none of them has a normaliser of (almost) zero.

    On two CPU cores torch's flash kernel takes 11 ms for 1320 queries of 9 heads over 576 shared
    keys, and 2.3 ms for 22 keys of their own; products with the scores written down take 45 and
    2.6 ms, and prefix and own keys concatenated for every row 72 ms.

    Kernels give no gradient of the normaliser and cap no scores, and those of CUDA take no mask
    here: then the scores are written down.
    """
    n_heads, n_kv_heads = q.shape[2], k.shape[2]
    folded = fold(q, n_kv_heads)
    keys, values = (part.expand(len(q), *part.shape[1:]).transpose(1, 2) for part in (k, v))
    if mask is not None:
        mask = mask[:, None]
        if mask.shape[2] > 1:
            mask = mask.repeat_interleave(n_heads // n_kv_heads, dim=2)
    parts = (folded, keys, values, mask, rule)
    out, lse = run_kernel(*parts) or run_openly(*parts)
    if mask is not None:
        lse = lse.masked_fill(~mask.any(dim=-1), almost_nothing(lse))
    return unfold(out, n_heads), unfold(lse[..., None], n_heads)[..., 0]


def almost_nothing(x: Tensor) -> float:
    """A score whose exponential is zero. Minus infinity would have no gradient."""
    return torch.finfo(x.dtype).min / 4


def run_kernel(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, rule: AttentionRule
) -> tuple[Tensor, Tensor] | None:
    """A fused kernel that also returns the normaliser; None where there is none."""
    if rule.softcap is not None:
        return None
    if torch.is_grad_enabled() and any(part.requires_grad for part in (q, k, v)):
        return None
    if q.device.type == "cpu":
        bias = None
        if mask is not None:
            bias = torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, -torch.inf)
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, attn_mask=bias, scale=rule.scale
        )
    if q.device.type != "cuda" or mask is not None:
        return None
    choice = SDPAParams(q, k, v, None, 0.0, False, False)
    # torch pads heads of other sizes before it calls the flash kernel; this is the kernel itself.
    if can_use_flash_attention(choice) and q.shape[-1] % 8 == 0:
        out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, scale=rule.scale)
    elif can_use_efficient_attention(choice):
        out, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
            q, k, v, None, True, scale=rule.scale
        )
    else:
        return None
    return out, lse[..., : q.shape[2]]  # some kernels round the number of queries up


def run_openly(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, rule: AttentionRule
) -> tuple[Tensor, Tensor]:
    """The same by way of the scores, in float32 or wider."""
    scores = scores_of(q, k, rule)
    if mask is not None:
        scores = scores.masked_fill(~mask, almost_nothing(scores))
    lse = scores.logsumexp(dim=-1)
    return (scores - lse[..., None]).exp().to(q.dtype) @ v, lse
