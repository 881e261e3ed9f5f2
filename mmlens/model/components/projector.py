"""From the vision tower's features to visual tokens."""

from __future__ import annotations

from dataclasses import replace
from math import isqrt

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from mmlens.config import ProjectorConfig
from mmlens.inputs.visual import Visual
from mmlens.model.components.activations import activation
from mmlens.model.components.line_ends import LineEnds
from mmlens.model.components.norm import make_norm
from mmlens.model.components.packed_images import grids_of, squares
from mmlens.model.hook_points import HookPoint
from mmlens.model.sites import Site, within


class Projector(nn.Module):
    """LLaVA's projector: Linear, GELU, Linear (Liu et al. 2023, "Improved baselines", 3.2).

    A projector of one layer is a linear map, without `hook_pre` and `hook_post`; after the second
    layer of a deeper one come `hook_pre_2` and `hook_post_2`, and so on.

    Gemma 3's takes the mean of squares of features before, and normalises it. Idefics3's,
    InternVL's and Qwen-VL's put squares together; InternVL's normalises them, Qwen-VL's the
    features ("patch merger"; Wang et al. 2024, 2.1). Qwen3-VL has one such projector for the visual
    tokens and others, `deepstack`, for what first blocks of the decoder get of earlier layers'
    features.
    """

    SITES = (
        Site("in", "tile feature d_in"),
        Site("ln.scale", "tile normed 1", "ln.hook_scale"),
        Site("ln.normalized", "tile normed d_normed", "ln.hook_normalized"),
        Site("pre", "tile square d_hidden"),
        Site("post", "tile square d_hidden"),
        Site("later_pre", "tile square d_hidden", "hook_pre_{layer}"),
        Site("later_post", "tile square d_hidden", "hook_post_{layer}"),
        Site("out", "all visual_token d_out"),
        *within(
            "deepstack.{layer}",
            (
                Site("in", "tile feature d_in"),
                Site("ln.scale", "tile square 1", "ln.hook_scale"),
                Site("ln.normalized", "tile square d_square", "ln.hook_normalized"),
                Site("pre", "tile square d_hidden"),
                Site("post", "tile square d_hidden"),
                Site("out", "all visual_token d_out"),
            ),
            "deepstack.",
            layers="n_deepstack",
        ),
    )

    def __init__(self, cfg: ProjectorConfig) -> None:
        super().__init__()
        self.cfg = cfg
        d_square = cfg.d_in * cfg.pixel_shuffle**2
        widths = [d_square, *[cfg.d_hidden] * (cfg.n_layers - 1), cfg.d_out]
        self.act = activation(cfg.act_fn)
        self.hook_in = HookPoint()
        if cfg.normalization_type is not None:
            self.ln = make_norm(cfg, d_square if cfg.norm_merged else cfg.d_in)
        for layer in range(1, cfg.n_layers + 1):
            linear = nn.Linear(widths[layer - 1], widths[layer], bias=cfg.bias)
            self.add_module(f"linear_{layer}", linear)
            if layer < cfg.n_layers:
                self.add_module(numbered("hook_pre", layer), HookPoint())
                self.add_module(numbered("hook_post", layer), HookPoint())
        self.line_ends = LineEnds(cfg.anyres, cfg.d_out) if cfg.anyres else None
        self.hook_out = HookPoint()
        deeper = replace(cfg, n_deepstack=0, norm_merged=True)
        self.deepstack = nn.ModuleList(Projector(deeper) for _ in range(cfg.n_deepstack))

    def forward(
        self, features: Float[Tensor, "row feature d_features"], visual: Visual
    ) -> Float[Tensor, "run visual_token d_out_all"]:
        """Visual tokens of all images one after the other, in the model's residual stream.

        Where there is deepstack, what block 0, 1, ... gets comes after them, along the last axis.

        Args:
            features: of all tiles, as the tower returns them; of several runs one after the
                other.
            visual: the images of one run.
        """
        first, *deeper = features.split(self.cfg.d_in, dim=-1)
        tokens = self.visual_tokens(first, visual)
        if not self.deepstack:
            return tokens
        pairs = zip(self.deepstack, deeper, strict=True)
        return torch.cat([tokens, *(part(x, visual) for part, x in pairs)], dim=-1)

    def visual_tokens(
        self, features: Float[Tensor, "row feature d_in"], visual: Visual
    ) -> Float[Tensor, "run visual_token d_out"]:
        """What the features become, without deepstack."""
        cfg = self.cfg
        x = self.hook_in(features)
        if cfg.normalization_type is not None and not cfg.norm_merged:
            x = self.ln(x)
        if cfg.pixel_shuffle > 1:
            x = self.put_together(x, visual)
        if cfg.average_pool > 1:
            x = pooled(x, cfg.average_pool)
        if cfg.normalization_type is not None and cfg.norm_merged:
            x = self.ln(x)
        for layer in range(1, cfg.n_layers):
            pre = self.get_submodule(f"linear_{layer}")(x)
            post = self.act(self.get_submodule(numbered("hook_pre", layer))(pre))
            x = self.get_submodule(numbered("hook_post", layer))(post)
        x = self.get_submodule(f"linear_{cfg.n_layers}")(x)
        if visual.axis == 0:  # else a run is one row
            by_run = x.unflatten(0, (-1, len(visual["pixel_values"])))
            if self.line_ends is not None:
                x = self.line_ends(by_run, visual)
            else:
                x = by_run.flatten(1, 2)
        return self.hook_out(x if cfg.out_scale == 1.0 else x * cfg.out_scale)

    def put_together(
        self, features: Float[Tensor, "row feature d_in"], visual: Visual
    ) -> Float[Tensor, "row square d_square"]:
        """Squares of features as one each, in reading order."""
        side = self.cfg.pixel_shuffle
        if visual.axis == 0:
            return shuffled(features, side)
        index = squares(grids_of(visual), side).to(features.device)
        return features[:, index].flatten(2)


def shuffled(
    features: Float[Tensor, "tile feature d_in"], factor: int
) -> Float[Tensor, "tile token d_token"]:
    """Return one token for each square of factor x factor features: those after one another.

    Called pixel shuffle (Laurençon et al. 2024, "Building and better understanding", 4.2).

    Args:
        features: of square tiles, row by row.
        factor: rows and columns of a square.
    """
    return rearrange(
        features,
        "tile (row y col x) d -> tile (row col) (y x d)",
        row=isqrt(features.shape[1]) // factor,
        y=factor,
        x=factor,
    )


def pooled(
    features: Float[Tensor, "tile feature d_in"], factor: int
) -> Float[Tensor, "tile token d_in"]:
    """Return the mean of each square of factor x factor features.

    Source: transformers, `Gemma3MultiModalProjector` of `modeling_gemma3.py`.

    Args:
        features: of square tiles, row by row.
        factor: rows and columns of a square.
    """
    side = isqrt(features.shape[1])
    grid = rearrange(features, "tile (row col) d -> tile d row col", row=side)
    return F.avg_pool2d(grid, factor).flatten(2).transpose(1, 2)


def numbered(name: str, layer: int) -> str:
    """Return the name of a hook point; from the second layer on it carries the layer's number."""
    return name if layer == 1 else f"{name}_{layer}"
