"""From the vision tower's features to visual tokens."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn
from transformers.activations import ACT2FN

from mmlens.config import ProjectorConfig
from mmlens.hook_points import HookPoint


class Projector(nn.Module):
    """LLaVA's projector: Linear, GELU, Linear (Liu et al. 2023, "Improved baselines", 3.2).

    A projector of one layer is a linear map, without `hook_pre` and `hook_post`; behind the second
    layer of a deeper one come `hook_pre_2` and `hook_post_2`, and so on.
    """

    def __init__(self, cfg: ProjectorConfig) -> None:
        super().__init__()
        self.n_layers = cfg.n_layers
        widths = [cfg.d_in, *[cfg.d_hidden] * (cfg.n_layers - 1), cfg.d_out]
        self.act = ACT2FN[cfg.act_fn]
        self.hook_in = HookPoint()  # [image, visual_token, d_in]
        for layer in range(1, cfg.n_layers + 1):
            linear = nn.Linear(widths[layer - 1], widths[layer], bias=cfg.bias)
            self.add_module(f"linear_{layer}", linear)
            if layer < cfg.n_layers:  # [image, visual_token, d_hidden]
                self.add_module(hook_name("pre", layer), HookPoint())
                self.add_module(hook_name("post", layer), HookPoint())
        self.hook_out = HookPoint()  # [image, visual_token, d_out]

    def forward(
        self, features: Float[Tensor, "image visual_token d_in"]
    ) -> Float[Tensor, "image visual_token d_out"]:
        """Visual tokens, in the language model's residual stream."""
        x = self.hook_in(features)
        for layer in range(1, self.n_layers):
            pre = self.get_submodule(f"linear_{layer}")(x)
            post = self.act(self.get_submodule(hook_name("pre", layer))(pre))
            x = self.get_submodule(hook_name("post", layer))(post)
        return self.hook_out(self.get_submodule(f"linear_{self.n_layers}")(x))


def hook_name(kind: str, layer: int) -> str:
    """`hook_pre` and `hook_post` of the first layer; those of later ones carry its number."""
    return f"hook_{kind}" if layer == 1 else f"hook_{kind}_{layer}"
