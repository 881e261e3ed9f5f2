"""From the vision tower's features to visual tokens."""

from __future__ import annotations

from math import isqrt

from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from mmlens.config import ProjectorConfig
from mmlens.inputs.visual import Visual
from mmlens.model.components.activations import activation
from mmlens.model.components.line_ends import LineEnds
from mmlens.model.hook_points import HookPoint
from mmlens.model.sites import Site


class Projector(nn.Module):
    """LLaVA's projector: Linear, GELU, Linear (Liu et al. 2023, "Improved baselines", 3.2).

    A projector of one layer is a linear map, without `hook_pre` and `hook_post`; after the second
    layer of a deeper one come `hook_pre_2` and `hook_post_2`, and so on.
    """

    SITES = (
        Site("in", "tile feature d_in"),
        Site("pre", "tile feature d_hidden"),
        Site("post", "tile feature d_hidden"),
        Site("later_pre", "tile feature d_hidden", "hook_pre_{layer}"),
        Site("later_post", "tile feature d_hidden", "hook_post_{layer}"),
        Site("out", "all visual_token d_out"),
    )

    def __init__(self, cfg: ProjectorConfig) -> None:
        super().__init__()
        self.n_layers, self.pixel_shuffle = cfg.n_layers, cfg.pixel_shuffle
        widths = [cfg.d_in * cfg.pixel_shuffle**2, *[cfg.d_hidden] * (cfg.n_layers - 1), cfg.d_out]
        self.act = activation(cfg.act_fn)
        self.hook_in = HookPoint()
        for layer in range(1, cfg.n_layers + 1):
            linear = nn.Linear(widths[layer - 1], widths[layer], bias=cfg.bias)
            self.add_module(f"linear_{layer}", linear)
            if layer < cfg.n_layers:
                self.add_module(numbered("hook_pre", layer), HookPoint())
                self.add_module(numbered("hook_post", layer), HookPoint())
        self.line_ends = LineEnds(cfg.anyres, cfg.d_out) if cfg.anyres else None
        self.hook_out = HookPoint()

    def forward(
        self, features: Float[Tensor, "tile feature d_in"], visual: Visual
    ) -> Float[Tensor, "run visual_token d_out"]:
        """Visual tokens of all images one after the other, in the model's residual stream.

        Args:
            features: of all tiles, as the tower returns them; of several runs one after the
                other.
            visual: the images of one run.
        """
        x = self.hook_in(features)
        if self.pixel_shuffle > 1:
            x = shuffled(x, self.pixel_shuffle)
        for layer in range(1, self.n_layers):
            pre = self.get_submodule(f"linear_{layer}")(x)
            post = self.act(self.get_submodule(numbered("hook_pre", layer))(pre))
            x = self.get_submodule(numbered("hook_post", layer))(post)
        x = self.get_submodule(f"linear_{self.n_layers}")(x)
        by_run = x.unflatten(0, (-1, len(visual["pixel_values"])))
        if self.line_ends is not None:
            return self.hook_out(self.line_ends(by_run, visual))
        return self.hook_out(by_run.flatten(1, 2))


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


def numbered(name: str, layer: int) -> str:
    """Return the name of a hook point; from the second layer on it carries the layer's number."""
    return name if layer == 1 else f"{name}_{layer}"
