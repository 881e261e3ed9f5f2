"""The vision tower, as far as the projector needs it.

An image encoder of CLIP (Radford et al. 2021) or of SigLIP (Zhai et al. 2023).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from mmlens.components.block import TransformerBlock
from mmlens.components.norm import make_norm
from mmlens.config import VisionConfig
from mmlens.hook_points import HookedRootModule, HookPoint

Pixels = Float[Tensor, "image channel height width"]
Residual = Float[Tensor, "image pos d_model"]


class HookedVisionTransformer(HookedRootModule):
    """Patches with learnt positions, then blocks that see everything.

    CLIP has a class token at position 0, so that patch (row, column) is position
    `1 + row * columns + column`, and a norm before the first block. SigLIP has neither.

    Example:
        >>> tower = HookedVisionTransformer.from_open_clip("ViT-L-14-336", "openai")
        >>> pixels = tower.image_processor(Image.open("flag.png").convert("RGB"))
        >>> features, cache = tower.run_with_cache(pixels[None])
        >>> cache["blocks.3.attn.hook_pattern"]
    """

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
            TransformerBlock(cfg, causal=False, rotary=False) for _ in range(cfg.n_layers)
        )
        self.hook_patch_embed = HookPoint()  # [image, patch, d_model]
        self.hook_pos_embed = HookPoint()  # [1, pos, d_model]
        self.hook_embed = HookPoint()  # [image, pos, d_model]
        self.hook_out = HookPoint()  # [image, visual_token, d_features]
        self.setup()

    @classmethod
    def from_open_clip(
        cls,
        name_or_path: str | Path,
        pretrained: str | Path | None = None,
        *,
        feature_layer: int | Sequence[int] = -1,
        select: Literal["default", "full"] = "full",
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> HookedVisionTransformer:
        """The image tower of an open_clip CLIP or SigLIP, with `image_processor`, its transform.

        Args:
            name_or_path: open_clip's name of the model; or a folder with open_clip_config.json, or
                "hf-hub:" and the name of one on the hub.
            pretrained: which weights of a named model: one of open_clip's tags, or a file. As in
                open_clip, a file says nothing of its activation: for OpenAI's weights take the
                model whose name ends in "-quickgelu".
            feature_layer: whose output is returned: 0 is the input of the first block, -1 the
                output of the last. A list is concatenated. What lies behind is not built.
            select: "full" returns every position, "default" leaves out the first (the class token).
            device: where to put it; by default the GPU if there is one.
            dtype: by default float32, as in open_clip.

        Raises:
            CheckpointError: not found, no plain vision transformer, or names and shapes do not fit.

        Example:
            >>> HookedVisionTransformer.from_open_clip("ViT-SO400M-14-SigLIP-384", "webli")
        """
        from mmlens.checkpoints.open_clip import load_tower

        return load_tower(
            name_or_path,
            pretrained,
            feature_layer=feature_layer,
            select=select,
            device=device,
            dtype=dtype,
        )

    def forward(self, pixels: Pixels) -> Float[Tensor, "image visual_token d_features"]:
        """The features of every visual token, as the projector gets them.

        Pictures of another size than `cfg.image_size` get interpolated positions (bicubic, as
        Hugging Face's `interpolate_pos_encoding`).

        Raises:
            ValueError: a picture's sides are no multiples of the patch size.
        """
        resid = self.hook_embed(self.embed(pixels))
        if self.cfg.pre_norm:
            resid = self.ln_pre(resid)
        streams = [resid]
        for block in self.blocks:
            resid = block(resid)
            streams.append(resid)
        features = torch.cat([streams[layer] for layer in self.cfg.feature_layers], dim=-1)
        if self.cfg.select == "default":
            features = features[:, 1:]
        return self.hook_out(features)

    def embed(self, pixels: Pixels) -> Residual:
        """Patches (behind the class token, if there is one), with their positions added."""
        height, width = pixels.shape[-2:]
        patch = self.cfg.patch_size
        # At its own size, SigLIP leaves a strip at the right and bottom out (384 = 27 x 14 + 6).
        if (height, width) != self.cfg.image_size and (height % patch or width % patch):
            raise ValueError(
                f"pictures of {height} x {width} pixels do not divide into patches of "
                f"{patch} x {patch}"
            )
        patches = self.patch_embed(pixels.to(self.patch_embed.weight.dtype))
        patches = self.hook_patch_embed(patches.flatten(2).transpose(1, 2))
        if self.cfg.class_token:
            patches = torch.cat([self.class_embed.expand(len(pixels), 1, -1), patches], dim=1)
        positions = self.position_embeddings(height // patch, width // patch)
        return patches + self.hook_pos_embed(positions)

    def position_embeddings(self, rows: int, columns: int) -> Float[Tensor, "1 pos d_model"]:
        """The learnt positions, interpolated where the picture has another grid."""
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
        from mmlens.verification import is_alive

        return [name for name in self.hook_dict if not is_alive(self, name, pixels)]
