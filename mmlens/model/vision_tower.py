"""The vision tower, as far as the projector needs it.

An image encoder of CLIP (Radford et al. 2021) or of SigLIP (Zhai et al. 2023), Idefics3's, or one
of Qwen2-VL, Qwen2.5-VL and Qwen3-VL, which takes images of any grid in one row.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from mmlens.config import VisionConfig
from mmlens.inputs.visual import Visual
from mmlens.model.components.attention_rule import AttentionRule
from mmlens.model.components.block import TransformerBlock
from mmlens.model.components.norm import RMSNorm, make_norm
from mmlens.model.components.packed_images import (
    Grids,
    SegmentedPast,
    Segments,
    grids_of,
    places,
    squares,
)
from mmlens.model.components.past import TowerPast
from mmlens.model.components.rotary import grid_cos_sin
from mmlens.model.components.tower_positions import interpolated, nearest_positions
from mmlens.model.hook_points import HookPoint, has_listeners
from mmlens.model.hooked_root_module import HookedRootModule
from mmlens.model.sites import Site, SiteTable, within
from mmlens.model.verify_hooks import is_alive
from mmlens.utils.threads import on_free_cores

Pixels = Float[Tensor, "tile channel height width"]
Patches = Float[Tensor, "run patch pixel"]
Residual = Float[Tensor, "tile pos d_model"]


class PatchEmbed(nn.Conv3d):
    """A convolution over patches that are cut out already: [..., pixel] to [..., d_model].

    A product of matrices, which takes a quarter of the convolution's time.
    """

    def forward(self, patches: Float[Tensor, "*batch pixel"]) -> Float[Tensor, "*batch d_model"]:
        """The embedding of every patch."""
        return F.linear(patches, self.weight.flatten(1), self.bias)


class HookedVisionTransformer(HookedRootModule):
    """Patches with learnt positions, then blocks that see everything.

    CLIP has a class token at position 0, so that patch (row, column) is position
    `1 + row * columns + column`, and a norm before the first block. SigLIP has neither; Idefics3's
    tower is like SigLIP's, with a norm after the last block.

    Where `cfg.packed`, the patches of all images lie in one row, each image's row by row and one
    image after the other, whatever order the family computes in; each image attends to itself.

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
        side = cfg.patch_size
        self.patch_embed = (
            PatchEmbed(
                cfg.n_channels,
                cfg.d_model,
                (cfg.temporal_patch_size, side, side),
                bias=cfg.patch_bias,
            )
            if cfg.packed
            else nn.Conv2d(cfg.n_channels, cfg.d_model, side, side, bias=cfg.patch_bias)
        )
        if cfg.class_token:
            self.class_embed = nn.Parameter(torch.empty(cfg.d_model).normal_(std=0.02))
        if cfg.positions != "none":
            positions = torch.empty(cfg.class_token + cfg.n_patches, cfg.d_model)
            self.W_pos = nn.Parameter(positions.normal_(std=0.02))
            self.hook_pos_embed = HookPoint()
        if cfg.pre_norm:
            self.ln_pre = make_norm(cfg, cfg.d_model)
        self.blocks = nn.ModuleList(
            TransformerBlock(
                cfg, rotary=cfg.rotary_base is not None, rule=AttentionRule.of_tower(cfg, layer)
            )
            for layer in range(cfg.n_layers)
        )
        if cfg.final_norm:
            self.ln_final = make_norm(cfg, cfg.d_model)
        self.hook_patch_embed = HookPoint()
        self.hook_embed = HookPoint()
        self.hook_out = HookPoint()
        self.setup()

    def of_images(self, visual: Visual, times: int = 1) -> Float[Tensor, "row feature d_features"]:
        """The features of images, one round of all after the other; packed, each round is a row."""
        pixels = visual["pixel_values"]
        if self.cfg.packed:
            return self(pixels.expand(times, -1, -1), grids=grids_of(visual))
        mask = visual.get("pixel_attention_mask")
        return self(
            pixels.repeat(times, 1, 1, 1), None if mask is None else mask.repeat(times, 1, 1)
        )

    @on_free_cores
    def forward(
        self,
        pixels: Pixels | Patches,
        pixel_mask: Bool[Tensor, "tile height width"] | None = None,
        *,
        grids: Grids | None = None,
    ) -> Float[Tensor, "row feature d_features"]:
        """The features of every patch (and of the class token), as the projector gets them.

        Images of another size than `cfg.image_size` get the positions that `cfg.positions` says.

        Args:
            pixels: tiles; where `cfg.packed`, patches in squares of `cfg.merge_size`, as
                transformers' processor gives them.
            pixel_mask: False where a tile is padded; no patch attends to one that is padding only.
            grids: rows and columns of each image's patches, where `cfg.packed`.

        Raises:
            ValueError: an image's sides are no multiples of the patch size; or other patches than
                `grids` has.
        """
        seen = None if pixel_mask is None else self.seen_patches(pixel_mask)
        if grids is None:
            resid = self.hook_embed(self.embed(pixels, seen))
        else:
            resid = self.hook_embed(self.embed_packed(pixels, grids))
        if self.cfg.pre_norm:
            resid = self.ln_pre(resid)
        context = self.attention_context(resid, seen, grids)
        streams = [resid]
        for layer, block in enumerate(self.blocks):
            resid = block(resid, layer=layer, **context)
            streams.append(resid)
        if self.cfg.final_norm:
            streams[-1] = self.ln_final(resid)
        features = torch.cat([streams[layer] for layer in self.cfg.feature_layers], dim=-1)
        if self.cfg.select == "default":
            features = features[:, 1:]
        return self.hook_out(features)

    def attention_context(
        self, resid: Residual, seen: Bool[Tensor, "tile row column"] | None, grids: Grids | None
    ) -> dict[str, Any]:
        """What all layers share: what each patch attends to, and rotary angles where it has any."""
        if grids is None:
            mask = None
            if seen is not None:
                mask = seen.flatten(1)[:, None, None].expand(-1, 1, resid.shape[1], -1)
            return {"past": TowerPast(mask)}
        device, window = resid.device, self.cfg.window_size
        images = Segments.of(grids, None, device)
        windows = images if window is None else Segments.of(grids, window, device)
        context: dict[str, Any] = {"past": SegmentedPast(images, windows)}
        if self.cfg.rotary_base is not None:
            rows_columns = places(grids)[:, 1:].to(device)
            context["cos_sin"] = grid_cos_sin(rows_columns, self.cfg.d_head, self.cfg.rotary_base)
        return context

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
        return self.with_positions(patches, [(height // patch, width // patch)], seen)

    def embed_packed(self, patches: Patches, grids: Grids) -> Residual:
        """Patches, row by row, with their positions added."""
        cfg, merge = self.cfg, self.cfg.merge_size
        n_patches = sum(rows * columns for rows, columns in grids)
        n_pixels = self.patch_embed.weight[0].numel()
        if patches.shape[1] != n_patches:
            raise ValueError(
                f"{patches.shape[1]} patches for images of {list(grids)} (rows, columns), which "
                f"have {n_patches}"
            )
        if odd := [grid for grid in grids if grid[0] % merge or grid[1] % merge]:
            raise ValueError(
                f"an image of {odd[0][0]} x {odd[0][1]} patches; they are put together by {merge} "
                f"x {merge}, so rows and columns must be multiples of that"
            )
        if patches.shape[-1] != n_pixels:
            raise ValueError(
                f"patches of {patches.shape[-1]} numbers, but this tower's have {n_pixels}: "
                f"{cfg.n_channels} channels, {cfg.temporal_patch_size} frames, {cfg.patch_size} x "
                f"{cfg.patch_size} pixels"
            )
        order = squares(grids, merge).flatten().argsort().to(patches.device)
        embedded = self.patch_embed(patches.to(self.patch_embed.weight.dtype))[:, order]
        return self.with_positions(self.hook_patch_embed(embedded), grids)

    def with_positions(
        self,
        patches: Residual,
        grids: Grids,
        seen: Bool[Tensor, "tile row column"] | None = None,
    ) -> Residual:
        """Patches with their learnt positions, where the tower has any."""
        if self.cfg.positions == "none":
            return patches
        found = [self.position_embeddings(rows, columns, seen) for rows, columns in grids]
        positions = torch.cat(found, dim=1) if len(found) > 1 else found[0]
        if has_listeners(self.hook_pos_embed):
            positions = positions.clone()  # a cache must not hold the weight itself
        return patches + self.hook_pos_embed(positions)

    def position_embeddings(
        self, rows: int, columns: int, seen: Bool[Tensor, "tile row column"] | None = None
    ) -> Float[Tensor, "some pos d_model"]:
        """The learnt positions; of another grid the nearest, or interpolated ones."""
        cfg = self.cfg
        if cfg.positions == "nearest":
            whole = torch.ones(1, rows, columns, dtype=torch.bool, device=self.W_pos.device)
            return self.W_pos[nearest_positions(whole if seen is None else seen, cfg.grid)]
        if (rows, columns) == cfg.grid:
            return self.W_pos[None]
        n_class = int(cfg.class_token)
        grid = interpolated(self.W_pos[n_class:], cfg.grid, (rows, columns), cfg.positions)
        return torch.cat([self.W_pos[:n_class], grid])[None]

    def verify_hooks(self, pixels: Pixels | Patches, **options: Any) -> list[str]:
        """The hook points of a tower alone that do not fire, or whose activation changes nothing.

        Perturbs each hook point in turn. An empty list means that every declared hook is live.

        Args:
            options: of `forward`.

        Raises:
            ValueError: the tower gives NaN or infinity without an edit.
        """
        return [name for name in self.hook_dict if not is_alive(self, name, pixels, **options)]
