"""The vision tower, as far as the projector needs it.

An image encoder of CLIP (Radford et al. 2021) or of SigLIP (Zhai et al. 2023), or Idefics3's.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from mmlens.config import VisionConfig
from mmlens.inputs.visual import Visual
from mmlens.model.components.block import TransformerBlock
from mmlens.model.components.norm import RMSNorm, make_norm
from mmlens.model.components.past import PlainPast
from mmlens.model.hook_points import HookPoint, has_listeners
from mmlens.model.hooked_root_module import HookedRootModule
from mmlens.model.sites import Site, SiteTable, within
from mmlens.model.verify_hooks import is_alive
from mmlens.utils.threads import on_free_cores

Pixels = Float[Tensor, "tile channel height width"]
Residual = Float[Tensor, "tile pos d_model"]


class HookedVisionTransformer(HookedRootModule):
    """Patches with learnt positions, then blocks that see everything.

    CLIP has a class token at position 0, so that patch (row, column) is position
    `1 + row * columns + column`, and a norm before the first block. SigLIP has neither; Idefics3's
    tower is like SigLIP's, with a norm after the last block.

    Example:
        >>> from mmlens.checkpoints.towers.open_clip import load_tower
        >>> tower = load_tower("ViT-L-14-336", "openai")
        >>> pixels = tower.image_processor(Image.open("flag.png").convert("RGB"))
        >>> features, cache = tower.run_with_cache(pixels[None])
        >>> cache["blocks.3.attn.hook_pattern"]
    """

    SITES = SiteTable(
        *(
            replace(site, stack="tower", shape=site.shape.replace("batch", "tile"))
            for site in (
                Site("patch_embed", "batch patch d_model"),
                Site("pos_embed", "1 pos d_model"),  # a row a tile where a mask tells tiles apart
                Site("embed", "batch pos d_model"),
                *within("ln_pre", RMSNorm.SITES, "ln_pre."),
                *within("blocks.{layer}", TransformerBlock.SITES),
                *within("ln_final", RMSNorm.SITES, "ln_final.", after=True),
                Site("out", "batch feature d_features", after=True),
            )
        )
    )
    stack = "tower"

    def __init__(self, cfg: VisionConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.image_processor: Any = None  # of a tower alone
        self.patch_embed = nn.Conv2d(
            cfg.n_channels, cfg.d_model, cfg.patch_size, cfg.patch_size, bias=cfg.patch_bias
        )
        if cfg.class_token:
            self.class_embed = nn.Parameter(torch.empty(cfg.d_model).normal_(std=0.02))
        positions = torch.empty(cfg.class_token + cfg.n_patches, cfg.d_model)
        self.W_pos = nn.Parameter(positions.normal_(std=0.02))
        if cfg.pre_norm:
            self.ln_pre = make_norm(cfg)
        self.blocks = nn.ModuleList(
            TransformerBlock(cfg, rotary=False) for _ in range(cfg.n_layers)
        )
        if cfg.final_norm:
            self.ln_final = make_norm(cfg)
        self.hook_patch_embed = HookPoint()
        self.hook_pos_embed = HookPoint()
        self.hook_embed = HookPoint()
        self.hook_out = HookPoint()
        self.setup()

    def of_images(self, visual: Visual, times: int = 1) -> Float[Tensor, "tile feature d_features"]:
        """The features of images, one round of all after the other."""
        mask = visual.get("pixel_attention_mask")
        return self(
            visual["pixel_values"].repeat(times, 1, 1, 1),
            None if mask is None else mask.repeat(times, 1, 1),
        )

    @on_free_cores
    def forward(
        self, pixels: Pixels, pixel_mask: Bool[Tensor, "tile height width"] | None = None
    ) -> Float[Tensor, "tile feature d_features"]:
        """The features of every patch (and of the class token), as the projector gets them.

        Images of another size than `cfg.image_size` get interpolated positions (bicubic, as
        Hugging Face's `interpolate_pos_encoding`), or the nearest (`cfg.bucketed_positions`).

        Args:
            pixel_mask: False where a tile is padded; no patch attends to one that is padding only.

        Raises:
            ValueError: an image's sides are no multiples of the patch size.
        """
        seen = None if pixel_mask is None else self.seen_patches(pixel_mask)
        resid = self.hook_embed(self.embed(pixels, seen))
        if self.cfg.pre_norm:
            resid = self.ln_pre(resid)
        mask = (
            None
            if seen is None
            else seen.flatten(1)[:, None, None].expand(-1, 1, resid.shape[1], -1)
        )
        streams, past = [resid], PlainPast(mask, causal=False)
        for block in self.blocks:
            resid = block(resid, past=past)
            streams.append(resid)
        if self.cfg.final_norm:
            streams[-1] = self.ln_final(resid)
        features = torch.cat([streams[layer] for layer in self.cfg.feature_layers], dim=-1)
        if self.cfg.select == "default":
            features = features[:, 1:]
        return self.hook_out(features)

    def seen_patches(
        self, pixel_mask: Bool[Tensor, "tile height width"]
    ) -> Bool[Tensor, "tile row column"] | None:
        """Which patches are not padding only; None where all are."""
        patch = self.cfg.patch_size
        seen = pixel_mask.unfold(1, patch, patch).unfold(2, patch, patch).flatten(3).any(dim=3)
        return None if bool(seen.all()) else seen

    def embed(
        self, pixels: Pixels, seen: Bool[Tensor, "tile row column"] | None = None
    ) -> Residual:
        """Patches (after the class token, if there is one), with their positions added."""
        height, width = pixels.shape[-2:]
        patch = self.cfg.patch_size
        # At its own size, SigLIP leaves a strip at the right and bottom out (384 = 27 x 14 + 6).
        if (height, width) != self.cfg.image_size and (height % patch or width % patch):
            raise ValueError(
                f"images of {height} x {width} pixels do not divide into patches of "
                f"{patch} x {patch}"
            )
        patches = self.patch_embed(pixels.to(self.patch_embed.weight.dtype))
        patches = self.hook_patch_embed(patches.flatten(2).transpose(1, 2))
        if self.cfg.class_token:
            patches = torch.cat([self.class_embed.expand(len(pixels), 1, -1), patches], dim=1)
        positions = self.position_embeddings(height // patch, width // patch, seen)
        if has_listeners(self.hook_pos_embed):
            positions = positions.clone()  # a cache must not hold the weight itself
        return patches + self.hook_pos_embed(positions)

    def position_embeddings(
        self, rows: int, columns: int, seen: Bool[Tensor, "tile row column"] | None = None
    ) -> Float[Tensor, "some pos d_model"]:
        """The learnt positions; of another grid the nearest, or interpolated ones."""
        if self.cfg.bucketed_positions:
            whole = torch.ones(1, rows, columns, dtype=torch.bool, device=self.W_pos.device)
            return self.W_pos[nearest_positions(whole if seen is None else seen, self.cfg.grid)]
        if (rows, columns) == self.cfg.grid:
            return self.W_pos[None]
        n_class = int(self.cfg.class_token)
        grid = self.W_pos[n_class:].unflatten(0, self.cfg.grid).permute(2, 0, 1)[None]
        grid = F.interpolate(grid, size=(rows, columns), mode="bicubic", align_corners=False)
        return torch.cat([self.W_pos[None, :n_class], grid.flatten(2).transpose(1, 2)], dim=1)

    def verify_hooks(self, pixels: Pixels) -> list[str]:
        """The hook points of a tower alone that do not fire, or whose activation changes nothing.

        Perturbs each hook point in turn. An empty list means that every declared hook is live.
        """
        return [name for name in self.hook_dict if not is_alive(self, name, pixels)]


def nearest_positions(
    seen: Bool[Tensor, "tile row column"], grid: tuple[int, int]
) -> Int[Tensor, "tile pos"]:
    """Return which learnt position each patch has: the one at its place in the image.

    In float32 and by transformers' own steps, since rounding decides at the edges: even of an image
    of the tower's own grid it moves patches by one, where that has 25 rows, say.

    Args:
        seen: False at patches that are padding, which have position 0.
        grid: rows and columns of learnt positions.
    """
    index = []
    for axis, n_learnt in zip((1, 2), grid, strict=True):
        n_seen = seen.select(3 - axis, 0).sum(dim=1)
        places = torch.arange(seen.shape[axis], dtype=torch.float32, device=seen.device)
        shares = (places[None] * (1.0 / n_seen)[:, None]).clamp(max=1.0 - 1e-6)
        edges = torch.arange(
            1 / n_learnt, 1.0, 1 / n_learnt, dtype=torch.float32, device=seen.device
        )
        index.append(torch.bucketize(shares, edges, right=True))
    positions = index[0][:, :, None] * grid[1] + index[1][:, None, :]
    return positions.masked_fill(~seen, 0).flatten(1)
