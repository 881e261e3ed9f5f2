"""One transformer layer: attention, then the MLP, each added to the residual stream."""

from __future__ import annotations

from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mmlens.config import TransformerConfig
from mmlens.model.components.attention import Attention, Residual
from mmlens.model.components.attention_rule import AttentionRule
from mmlens.model.components.mlp import MLP
from mmlens.model.components.norm import RMSNorm, float32_or_wider, make_norm
from mmlens.model.components.past import Past
from mmlens.model.hook_points import HookPoint, has_listeners, left_alone
from mmlens.model.sites import Site, within
from mmlens.utils.threads import adjust_threads


class TransformerBlock(nn.Module):
    """A pre-norm block; the same in the decoder (causal, rotary) and the vision tower (neither).

    Where `cfg.post_norms`, what attention and MLP give (`attn.hook_out`, `mlp.hook_out`) goes
    through a norm of its own before it is added (`hook_attn_out`, `hook_mlp_out`).
    Where `cfg.parallel_attn_mlp`, attention and MLP do not see each other: there is no stream
    between the two, and no `ln2` unless `cfg.parallel_ln2`; without it they share one norm.

    `hook_attn_in`, `hook_q_input`, `hook_k_input`, `hook_v_input` and `hook_mlp_in` hold copies of
    the residual stream that one part alone reads (each head, for the first four), before the norm;
    they are made where something listens. An edit there reaches that part and nothing else. With
    grouped queries the keys and values of a group read the mean of its heads' `hook_attn_in`.

    `hook_deepstack`, in the first blocks of some decoders, is what the images add after the MLP.
    """

    SITES = (
        Site("resid_pre", "batch pos d_model", key_side=True),
        Site("attn_in", "batch pos head d_model", key_side=True, needs="use_attn_in"),
        Site("q_input", "batch pos head d_model", needs="use_split_qkv_input"),
        Site("k_input", "batch pos kv_head d_model", key_side=True, needs="use_split_qkv_input"),
        Site("v_input", "batch pos kv_head d_model", key_side=True, needs="use_split_qkv_input"),
        *within("ln1", RMSNorm.SITES, "ln1.", key_side=True),
        *within("attn", Attention.SITES),
        *within("ln1_post", RMSNorm.SITES, "ln1_post."),
        Site("attn_out", "batch pos d_model"),
        Site("resid_mid", "batch pos d_model"),
        Site("mlp_in", "batch pos d_model", needs="use_hook_mlp_in"),
        *within("ln2", RMSNorm.SITES, "ln2."),
        *within("mlp", MLP.SITES),
        *within("ln2_post", RMSNorm.SITES, "ln2_post."),
        Site("mlp_out", "batch pos d_model"),
        Site("deepstack", "batch pos d_model", layers="n_deepstack"),
        Site("resid_post", "batch pos d_model", after=True),
    )
    hook_out_is_single_residual_stream = True
    """TransformerLens's logit lens asks."""

    def __init__(
        self,
        cfg: TransformerConfig,
        *,
        rotary: bool,
        rule: AttentionRule,
        deepstack: bool = False,
    ) -> None:
        super().__init__()
        self.cfg = cfg
        self.parallel = cfg.parallel_attn_mlp
        self.has_ln2 = cfg.parallel_ln2 or not self.parallel
        self.ln1 = make_norm(cfg, cfg.d_model)
        self.attn = Attention(cfg, rotary=rotary, rule=rule)
        self.mlp = MLP(cfg)
        if cfg.post_norms:
            self.ln1_post, self.ln2_post = make_norm(cfg, cfg.d_model), make_norm(cfg, cfg.d_model)
        self.layer_scale = cfg.layer_scale
        if cfg.layer_scale:
            self.ls_1 = nn.Parameter(torch.ones(cfg.d_model))
            self.ls_2 = nn.Parameter(torch.ones(cfg.d_model))
        self.hook_resid_pre = HookPoint()
        self.hook_attn_in = HookPoint()
        self.hook_q_input = HookPoint()
        self.hook_k_input = HookPoint()
        self.hook_v_input = HookPoint()
        self.hook_attn_out = HookPoint()
        if self.has_ln2:
            self.ln2 = make_norm(cfg, cfg.d_model)
        if not self.parallel:
            self.hook_resid_mid = HookPoint()
        self.hook_mlp_in = HookPoint()
        self.hook_mlp_out = HookPoint()
        self.has_deepstack = deepstack
        if deepstack:
            self.hook_deepstack = HookPoint()
        self.hook_resid_post = HookPoint()

    def forward(
        self, resid: Residual, *, past: Past, deepstack: Tensor | None = None, **attention: Any
    ) -> Float[Tensor, "batch query d_model"]:
        """The residual stream after this layer, at the positions that have queries.

        Args:
            past: what they attend to.
            deepstack: what the images add here, [rows, pos, d_model]; None where nothing.
            attention: other arguments of `Attention`.
        """
        adjust_threads(resid.numel() * self.mlp.cfg.d_mlp)
        resid = self.hook_resid_pre(resid)
        normalized = self.ln1(resid)
        by_head = self.inputs_by_head(resid, normalized, past)
        attn_out = self.attn(normalized, past=past, by_head=by_head, **attention)
        attn_out = self.hook_attn_out(self.added(attn_out, 1))
        resid = past.kept(resid)
        if self.parallel:
            normalized = past.kept(normalized)
            mlp_in = self.hook_mlp_in(resid)
            if self.has_ln2:
                normalized = self.ln2(mlp_in)
            elif not left_alone(self.hook_mlp_in, resid, mlp_in):
                normalized = self.normalize_copy(mlp_in, resid, normalized)
            mlp_out = self.hook_mlp_out(self.added(self.mlp(normalized), 2))
            resid = attn_out + mlp_out + resid
            return self.hook_resid_post(self.with_deepstack(resid, deepstack, past))
        resid = self.hook_resid_mid(resid + attn_out)
        mlp_out = self.added(self.mlp(self.ln2(self.hook_mlp_in(resid))), 2)
        mlp_out = self.hook_mlp_out(mlp_out)
        return self.hook_resid_post(self.with_deepstack(resid + mlp_out, deepstack, past))

    def with_deepstack(self, resid: Residual, deepstack: Tensor | None, past: Past) -> Residual:
        """The stream with what the images add; without images zeros, where something listens."""
        if not self.has_deepstack:
            return resid
        if deepstack is not None:
            return resid + self.hook_deepstack(past.kept(deepstack).to(resid).expand_as(resid))
        if has_listeners(self.hook_deepstack):
            return resid + self.hook_deepstack(torch.zeros_like(resid))
        return resid

    def added(self, out: Residual, part: Literal[1, 2]) -> Residual:
        """Return what is added to the stream of what attention (1) or the MLP (2) gives."""
        if self.cfg.post_norms:
            out = (self.ln1_post if part == 1 else self.ln2_post)(out)
        if self.layer_scale:
            out = out * (self.ls_1 if part == 1 else self.ls_2)
        return out if self.cfg.residual_scale == 1.0 else out * self.cfg.residual_scale

    def written(
        self, part: Literal[1, 2], vectors: Float[Tensor, "*any d_model"]
    ) -> Float[Tensor, "*any d_model"]:
        """Return what vectors that attention (1) or the MLP (2) give add to the stream.

        Where `cfg.post_norms`, that is linear only for a given scale of the norm, which the result
        is yet to be divided by (`ln1_post.hook_scale`, `ln2_post.hook_scale` of the run).
        """
        wide = float32_or_wider(vectors)
        if self.cfg.post_norms:
            wide = wide * (self.ln1_post if part == 1 else self.ln2_post).w.to(wide)
        if self.layer_scale:
            wide = wide * (self.ls_1 if part == 1 else self.ls_2).to(wide)
        return wide * self.cfg.residual_scale

    def inputs_by_head(
        self, resid: Residual, normalized: Residual, past: Past
    ) -> tuple[Tensor, ...]:
        """What queries, keys and values of each head are made of: [batch, pos, head, d_model].

        After the norm; nothing where no hook changed anything, and all heads read `normalized`.
        """
        points = (self.hook_q_input, self.hook_k_input, self.hook_v_input)
        if not has_listeners(self.hook_attn_in, *points):
            return ()
        heads = resid[:, :, None].expand(-1, -1, self.cfg.n_heads, -1)
        seen = self.hook_attn_in(heads)
        unedited = left_alone(self.hook_attn_in, heads, seen)
        if unedited:
            groups = heads[:, :, : self.cfg.n_kv_heads]
        else:
            groups = seen.unflatten(2, (self.cfg.n_kv_heads, -1)).mean(dim=3)
        shared = (resid[:, :, None], normalized[:, :, None])
        given = (
            [past.kept(part) for part in (seen, *shared)],
            [groups, *shared],
            [groups, *shared],
        )
        copies = [copy for copy, *_ in given]
        edited = [point(copy) for point, copy in zip(points, copies, strict=True)]
        if unedited and all(map(left_alone, points, copies, edited)):
            return ()
        return tuple(
            self.normalize_copy(copy, *of) for copy, (_, *of) in zip(edited, given, strict=True)
        )

    def normalize_copy(self, copy: Tensor, resid: Tensor, normalized: Tensor) -> Tensor:
        """Return a copy of `resid` after `ln1`, whose hooks have made `normalized` of `resid`.

        The hooks of `ln1` see the shared stream alone; what they change is added to every copy.
        """
        out = self.ln1.without_hooks(copy)
        if not has_listeners(self.ln1.hook_scale, self.ln1.hook_normalized):
            return out
        parts = (normalized, self.ln1.without_hooks(resid), out)
        edited, unedited, wide = map(float32_or_wider, parts)
        return (wide + (edited - unedited)).to(out.dtype)  # rounded once
