"""What an ablation scan ablates: parts of a model, or of an image, and what cannot be ablated."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from torch import Tensor

from mmlens.analyses.arguments import Where
from mmlens.analyses.patch import Coordinate
from mmlens.inputs.checks import check_one_prompt
from mmlens.inputs.multimodal_inputs import MultimodalInputs
from mmlens.interventions.functions import HookFunction
from mmlens.interventions.intervention import Intervention, site_of, stack_config

if TYPE_CHECKING:
    from mmlens.model.transformer import HookedMultimodalTransformer

Over = Literal["heads", "layers", "neurons", "regions"]
By = Literal["zero", "mean", "resample"]
Places = Where | Mapping[str, Any] | Callable[[MultimodalInputs], Any]
"""A span or positions; some of them by role; or a function of the inputs that returns either."""
Cells = dict[tuple[Coordinate, ...], list[Intervention]]

SITES = {
    "heads": ("z",),
    "layers": ("attn_out", "mlp_out"),
    "neurons": ("post",),
    "regions": ("input_embed",),
}
"""What is ablated by default."""
GRID = (4, 4)
"""Regions by default, in rows and columns."""
SIZE = 128
"""Neurons of a group by default."""
AXES = {
    "heads": ("layer", "head"),
    "layers": ("layer",),
    "neurons": ("layer", "neurons"),
}


@dataclass(frozen=True, eq=False)
class Ablation:
    """What a scan ablates, of any prompt."""

    model: HookedMultimodalTransformer
    over: Over
    sites: tuple[str, ...]
    layers: list[int]
    size: int
    """Neurons of a group."""
    function: HookFunction

    def parts(self) -> dict[tuple[Coordinate, ...], list[tuple[str, int]]]:
        """Return the sites, with layers, of each part but the image's, by its coordinates."""
        layers = self.layers
        if self.over == "layers":
            return {(layer,): [(site, layer) for site in self.sites] for layer in layers}
        [site] = self.sites
        cfg, axis = stack_config(site, self.model), site_of(site).axes[site_of(site).unit_axis]
        if self.over == "heads":
            n = cfg.n_kv_heads if axis == "kv_head" else cfg.n_heads
            return {(i, head): [(f"{site}[{head}]", i)] for i in layers for head in range(n)}
        n = cfg.d_mlp if axis == "d_mlp" else cfg.d_model
        groups = [(begin, min(begin + self.size, n) - 1) for begin in range(0, n, self.size)]
        return {
            (layer, f"{begin}-{end}"): [(f"{site}[{begin}-{end}]", layer)]
            for layer in layers
            for begin, end in groups
        }

    def cells(self, roles: Mapping[str, Tensor | None]) -> Cells:
        """Return the interventions of each part, at each role's positions."""
        return {
            (*([role] if role else []), *key): [
                Intervention(site, layer, positions, self.function) for site, layer in part
            ]
            for role, positions in roles.items()
            for key, part in self.parts().items()
        }

    def of_regions(self, regions: Sequence[Tensor]) -> list[list[Intervention]]:
        """Return the interventions of each region of an image."""
        where: list[tuple[str, Any]] = [
            (site, self.layers if site_of(site).is_layered else None) for site in self.sites
        ]
        return [
            [Intervention(site, layers, region, self.function) for site, layers in where]
            for region in regions
        ]


def check(
    prompts: Sequence[MultimodalInputs], over: str, by: Any, regions: Any, size: Any, control: int
) -> None:
    """Raise a ValueError for what cannot be scanned."""
    if (size is not None and size < 1) or control < 0:
        raise ValueError(f"size={size} must be at least 1, and control={control} at least 0")
    if not prompts:
        raise ValueError("no prompts to scan")
    for each in prompts:
        check_one_prompt(len(each), "ablation_scan")
    if over not in get_args(Over):
        raise ValueError(f"over={over!r}; it is {', '.join(map(repr, get_args(Over)))}")
    if isinstance(by, str) and by not in get_args(By):
        raise ValueError(f"by={by!r}; it is {', '.join(map(repr, get_args(By)))} or a function")
    for name, given, use in (("regions", regions, "regions"), ("size", size, "neurons")):
        if given is not None and over != use:
            raise ValueError(f"{name}={given} is for over={use!r}, not for {over!r}")


def check_used(
    n_prompts: int,
    over: Over,
    by: Any,
    layers: Any,
    positions: Any,
    references: Any,
    control: int,
    clusters: Any,
) -> None:
    """Raise a ValueError for arguments that a scan would ignore."""
    if over == "regions" and positions is not None:
        raise ValueError("positions are for other scans; over='regions' ablates regions=...")
    if over == "regions" and layers is not None:
        raise ValueError(
            "layers are not for over='regions', where the image enters the model; name a site that "
            "has layers, such as site='resid_post'"
        )
    if over != "regions" and control:
        raise ValueError(f"control={control} is for over='regions', not for {over!r}")
    if references is not None and by not in ("mean", "resample"):
        raise ValueError(f"references are for 'mean' and 'resample'; by={by!r} has no use for them")
    if clusters is not None and len(clusters) != n_prompts:
        raise ValueError(f"{len(clusters)} clusters for {n_prompts} prompts")


def check_sites(sites: Sequence[str], over: Over, positions: Places | None) -> None:
    """Raise a ValueError for sites that do not have the parts or the positions that are meant."""
    for name in sites:
        site = site_of(name)
        is_heads = site.units == "heads"
        if over != "regions" and (not site.is_layered or site.stack == "connector"):
            raise ValueError(
                f"site={name!r} is of no layer of the decoder or the tower, which over={over!r} "
                "goes through"
            )
        if over == "heads" and not is_heads:
            raise ValueError(f"site={name!r} has {site.units}, and no heads")
        if over == "neurons" and is_heads:
            raise ValueError(f"site={name!r} has heads: scan them with over='heads'")
        if site.stack != "decoder" and (over == "regions" or positions is not None):
            raise ValueError(
                f"positions and regions are those of the prompt, but site={name!r} has "
                f"{site.positions} of the {site.stack}: scan all of them, without positions"
            )
