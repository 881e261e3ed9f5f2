"""Ablation: what is left of an answer without a head, a layer, some neurons or a part of the image.

Each part is ablated in a branch of its own, so all of them cost a few forward passes where they lie
after the image. This is `patch` over cells that anybody can write:

    {(layer, head): [Intervention(f"z[{head}]", layer, positions, zero())] for ...}
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mmlens.analyses.ablation import (
    AXES,
    GRID,
    SITES,
    SIZE,
    Ablation,
    By,
    Over,
    Places,
    check,
    check_sites,
    check_used,
)
from mmlens.analyses.arguments import layers_of, positions_of
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
from mmlens.interventions.intervention import SiteLayers, site_of
from mmlens.utils.grad_mode import without_gradients
from mmlens.utils.progress import Progress
from mmlens.utils.texts import check_several
from mmlens.utils.threads import on_free_cores

if TYPE_CHECKING:
    from mmlens.model.transformer import HookedMultimodalTransformer


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
    if over == "regions":
        what = followed(model.record(prompts[0]), metric, answers[0], contrasts[0])
        which = GRID if regions is None else regions
        found = scan_regions(ablation, what, by, references, (which, control, seed), options)
        return Scan(**found, **common, answer=answer_of(what))
    asked = [(metric, *pair) for pair in zip(answers, contrasts, strict=True)]
    resampled = (others, seed) if by == "resample" else None
    keys, cells, baselines, answered = scan_prompts(
        ablation, prompts, asked, positions, resampled, options
    )
    coordinates = [tuple(dict.fromkeys(axis)) for axis in zip(*chain(*keys), strict=True)]
    values = torch.stack(list(map(on_axes, cells, keys, [coordinates] * len(keys))))
    ones = (torch.ones(len(some)) for some in keys)
    known = ~torch.stack(list(map(on_axes, ones, keys, [coordinates] * len(keys)))).isnan()
    labels = None if clusters is None else list(clusters)
    return Scan(
        **mean_scan(values, torch.stack(baselines), known, labels, level),
        axes=("role", *AXES[over]) if len(coordinates) > len(AXES[over]) else AXES[over],
        coordinates=tuple(coordinates),
        answer=answered if len(prompts) == 1 else "",
        **common,
    )


def each_of(given: Any, n: int) -> list[Any]:
    """Return one answer for each prompt."""
    if given is None or isinstance(given, str | int) or getattr(given, "ndim", 1) == 0:
        return [given] * n
    if len(given) != n:
        raise ValueError(f"{len(given)} answers for {n} prompts")
    return list(given)


def answer_of(what: Followed) -> str:
    """Return the text of the answer that is followed."""
    return "" if what.answer is None else what.answer.text


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


def scan_prompts(
    ablation: Ablation,
    prompts: Sequence[MultimodalInputs],
    asked: Sequence[tuple[Metric, Any, Any]],
    positions: Places | None,
    resampled: tuple[Sequence[Recording], int] | None,
    options: dict[str, Any],
) -> tuple[list[list[tuple[Coordinate, ...]]], list[Tensor], list[Tensor], str]:
    """Return each prompt's coordinates, what is measured there, and its baseline; the first answer.

    Args:
        ablation: what is ablated.
        prompts: of one row each.
        asked: metric, answer and contrast of each prompt.
        positions: which of its positions.
        resampled: the runs whose activations are put in, and the seed of the draws.
        options: of `evaluated`.
    """
    recorded: list[Recording] = []
    keys, values, baselines, answers = [], [], [], []
    for each, (metric, answer, contrast) in zip(prompts, asked, strict=True):
        recorded = Recording.of_all(ablation.model, [each], earlier=recorded)
        what = followed(recorded[0], metric, answer, contrast)
        roles = roles_of(each, positions)
        if resampled is not None:
            runs = without(each, resampled[0])
            if site_of(ablation.sites[0]).stack == "decoder":
                check_no_padding(each, runs, roles.values())
            ablation = replace(ablation, function=resample(runs, resampled[1]))
        cells = ablation.cells(roles)
        keys.append(list(cells))
        values.append(evaluated(what, list(cells.values()), **options))
        baselines.append(what.baseline().cpu())
        answers.append(answer_of(what))
    return keys, values, baselines, answers[0]


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
