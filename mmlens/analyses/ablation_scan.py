"""Ablation: what is left of an answer without a head, a layer, some neurons or a part of the image.

Each part is ablated in a branch of its own, so all of them cost a few forward passes where they lie
after the image. This is `patch` over cells that anybody can write:

    {(layer, head): [Intervention(f"z[{head}]", layer, positions, zero())] for ...}
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor

from mmlens.analyses.arguments import Where, layers_of, positions_of
from mmlens.analyses.image_regions import RegionsGiven, named_regions, random_regions
from mmlens.analyses.metrics import Followed, Metric, followed
from mmlens.analyses.other_runs import check_no_padding, visual_tokens, without
from mmlens.analyses.patch import Coordinate, evaluated, on_axes
from mmlens.analyses.result import description
from mmlens.analyses.scan import Scan, in_numbers, mean_scan
from mmlens.branching.recording import Recording
from mmlens.inputs.checks import check_one_prompt
from mmlens.inputs.multimodal_inputs import MultimodalInputs
from mmlens.interventions.functions import HookFunction, mean, resample, zero
from mmlens.interventions.intervention import Intervention, SiteLayers, site_of, stack_config
from mmlens.utils.grad_mode import without_gradients
from mmlens.utils.progress import Progress
from mmlens.utils.texts import check_several
from mmlens.utils.threads import on_free_cores

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


@without_gradients
@on_free_cores
def ablation_scan(
    model: HookedMultimodalTransformer,
    inputs: MultimodalInputs | Sequence[MultimodalInputs],
    over: Over = "heads",
    by: By | HookFunction = "zero",
    *,
    site: str | None = None,
    layers: Iterable[int] | None = None,
    positions: Places | None = None,
    metric: Metric = "probability",
    answer: str | int | Sequence[str | int | None] | None = None,
    contrast: str | int | Sequence[str | int | None] | None = None,
    references: Sequence[MultimodalInputs] | None = None,
    regions: RegionsGiven | None = None,
    control: int = 0,
    size: int | None = None,
    clusters: Sequence[str | int] | None = None,
    level: float = 0.95,
    seed: int = 0,
    batch_rows: int | None = None,
    progress: Progress | None = None,
) -> Scan:
    """Ablate every part of a model, or of an image, one at a time, and follow an answer.

    Args:
        inputs: one prompt, or the prompts of a data set, whose means come with intervals.
        over: "heads" [layer, head]; "layers" [layer]: all that a layer adds; "neurons" [layer,
            group]; "regions" of the image [row, column], or [region].
        by: what takes an activation's place: "zero"; "mean", over the references' rows and
            positions (for regions, over all visual tokens); "resample", another prompt's activation
            at the same position, drawn at random (for regions, each token gets that of a visual
            token); or a hook function, such as `knockout(inputs.span("image"))` with
            `site="attn_scores"`.
        site: what is ablated; by default "z" of heads, "attn_out" and "mlp_out" of layers, "post"
            of neurons, "input_embed" of regions (the visual tokens, as the first layer gets them)
            with what images add in the first blocks ("deepstack"), where they do.
        layers: which ones; all by default. For regions only with a `site` that has layers.
        positions: where: a span or positions, all by default; some of them by role
            (`role_positions(inputs)`), which is then an axis, the first; or a function of the
            inputs that returns either, which a data set needs for what differs in its prompts.
            Fewer positions cost less: a head at the last token costs one position.
        metric: "probability", "logit_diff", "kl", "loss", or a function; see `patch`.
        answer: which answer the metric follows, or one for each prompt.
        contrast: the answer whose logit "logit_diff" subtracts, or one for each prompt.
        references: prompts that "mean" and "resample" take activations from; by default those of
            the data set, all of them (for regions, the prompt itself). A prompt is not resampled
            from itself.
        regions: a grid of (rows, columns), boxes in pixels, masks of objects (booleans of the
            image's height and width) or positions, in a list or by name; by default a grid of
            (4, 4). One prompt.
        control: for how many random sets of as many other visual tokens each region is compared.
        size: how many neurons are ablated together; by default 128.
        clusters: a label for each prompt; those of one label are resampled together.
        level: of the intervals.
        seed: of all draws.
        batch_rows: the most rows computed at once; None takes what fits into free memory.
        progress: called with (parts done, parts in all).

    Raises:
        UnknownSpanError: (a KeyError) no span of that name.
        ValueError: an unknown `over` or `by`; positions, layers or regions that are not there;
            "mean" or "resample" of a single prompt without references; arguments that such a scan
            has no use for.

    Example:
        >>> scan = ablation_scan(model, inputs, "heads", positions="last", answer="Rome")
        >>> scan.effect.flatten().argsort()[:5]
        >>> ablation_scan(model, inputs, "regions", "mean", regions={"flag": box}, control=20)
    """
    check_several(inputs=inputs, references=references)
    prompts = [inputs] if isinstance(inputs, MultimodalInputs) else list(inputs)
    check(prompts, over, by, regions, size, control)
    if over == "regions":
        check_one_prompt(len(prompts), "a scan over regions")
    sites = SITES[over] if site is None else (site,)
    if over == "regions" and site is None and model.cfg.n_deepstack:
        sites = (*sites, "deepstack")  # or the first blocks would be given the image again
    check_sites(sites, over, positions)
    check_used(
        len(prompts),
        over,
        by,
        None if site is not None and site_of(site).is_layered else layers,
        positions,
        references,
        control,
        clusters,
    )
    ablation = Ablation(
        model,
        over,
        sites,
        layers_of(model, layers, *sites),
        size or SIZE,
        zero() if isinstance(by, str) else by,
    )
    others: list[Recording] = []
    if isinstance(by, str) and by != "zero" and over != "regions":
        others = recorded_of(ablation, by, prompts if references is None else references)
    if by == "mean" and others:
        ablation = replace(ablation, function=mean(others))
    answers, contrasts = (each_of(given, len(prompts)) for given in (answer, contrast))
    common: dict[str, Any] = {
        "metric": metric if isinstance(metric, str) else getattr(metric, "__name__", "metric"),
        "over": over,
        "by": by if isinstance(by, str) else getattr(by, "__name__", "function"),
        "site": ", ".join(ablation.sites),
        "metadata": description(model, prompts[0]) | {"prompts": len(prompts), "seed": seed},
    }
    options: dict[str, Any] = {"batch_rows": batch_rows, "progress": progress}
    recorded: list[Recording] = []
    if over == "regions":
        what = followed(model.record(prompts[0]), metric, answers[0], contrasts[0])
        which = GRID if regions is None else regions
        found = scan_regions(ablation, what, by, references, (which, control, seed), options)
        return Scan(**found, **common, answer=answer_of(what))
    values, baselines, first = [], [], None
    for number, each in enumerate(prompts):
        recorded = Recording.of_all(model, [each], earlier=recorded)
        what = followed(recorded[0], metric, answers[number], contrasts[number])
        first = first or what
        roles = roles_of(each, positions)
        if by == "resample":
            runs = without(each, others)
            if site_of(sites[0]).stack == "decoder":
                check_no_padding(each, runs, roles.values())
            ablation = replace(ablation, function=resample(runs, seed))
        cells = ablation.cells(roles)
        values.append((list(cells), evaluated(what, list(cells.values()), **options)))
        baselines.append(what.baseline().cpu())
    keys = list(dict.fromkeys(key for some, _ in values for key in some))
    coordinates = [tuple(dict.fromkeys(axis)) for axis in zip(*keys, strict=True)]
    grids = [on_axes(found, some, coordinates) for some, found in values]
    there = [~on_axes(torch.ones(len(some)), some, coordinates).isnan() for some, _ in values]
    measured, clean, known = map(torch.stack, (grids, baselines, there))
    labels = None if clusters is None else list(clusters)
    names = AXES[over]
    return Scan(
        **mean_scan(measured, clean, known, labels, level),
        axes=("role", *names) if len(coordinates) > len(names) else names,
        coordinates=tuple(coordinates),
        answer=answer_of(first) if len(prompts) == 1 else "",
        **common,
    )


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


def each_of(given: Any, n: int) -> list[Any]:
    """Return one answer for each prompt."""
    if given is None or isinstance(given, str | int) or getattr(given, "ndim", 1) == 0:
        return [given] * n
    if len(given) != n:
        raise ValueError(f"{len(given)} answers for {n} prompts")
    return list(given)


def answer_of(what: Followed | None) -> str:
    """Return the text of the answer that is followed."""
    return "" if what is None or what.answer is None else what.answer.text


def roles_of(inputs: MultimodalInputs, positions: Places | None) -> dict[str, Tensor | None]:
    """Return positions by role; by an empty name where they have none."""
    given = positions(inputs) if callable(positions) else positions
    if given is None:
        return {"": None}
    if isinstance(given, Mapping):
        return {role: positions_of(inputs, each) for role, each in given.items()}
    return {"": positions_of(inputs, given)}


def recorded_of(
    ablation: Ablation, by: str, prompts: Sequence[MultimodalInputs]
) -> list[Recording]:
    """Return other prompts' runs, with the activations that are put in."""
    prompts = list(prompts)
    if len(prompts) < 2 and ablation.over != "regions":
        raise ValueError(
            f"by={by!r} takes activations from other prompts: give references=[...], at least two"
        )
    sites: list[SiteLayers] = [
        (name, ablation.layers) if site_of(name).is_layered else name for name in ablation.sites
    ]
    return ablation.model.record_many(prompts, sites=sites)


def scan_regions(
    ablation: Ablation,
    what: Followed,
    by: By | HookFunction,
    references: Sequence[MultimodalInputs] | None,
    given: tuple[RegionsGiven, int, int],
    options: dict[str, Any],
) -> dict[str, Any]:
    """Return the fields of a scan over regions."""
    inputs = what.recording.inputs
    regions, n_draws, seed = given
    names, found = named_regions(inputs, regions)
    others = random_regions(inputs, found, n_draws, seed)
    if isinstance(by, str) and by != "zero":
        runs = recorded_of(ablation, by, [inputs] if references is None else references)
        if not any(run.inputs.images for run in runs):
            raise ValueError("none of the references has an image")
        pool, n_tokens = visual_tokens(runs), sum(int(run.inputs.is_image.sum()) for run in runs)
        put = mean(pool) if by == "mean" else resample(pool, seed, among=range(n_tokens))
        ablation = replace(ablation, function=put)
    branches = ablation.of_regions([*found, *others])
    values = evaluated(what, branches, **options)
    baseline = what.baseline().cpu()
    is_grid = len(names) == 2
    axes = ("row", "column") if is_grid else ("region",)
    shape = [len(axis) for axis in names]
    effects = (values[len(found) :] - baseline).view(len(found), n_draws, *values.shape[1:])
    return {
        "values": values[: len(found)].view(*shape, *values.shape[1:]),
        "baseline": in_numbers(baseline),
        "axes": axes,
        "coordinates": tuple(map(tuple, names)),
        "regions": tuple(tuple(region.tolist()) for region in found),
        "control": effects if n_draws else None,
    }
