"""Images on their way to visual tokens: each distinct one is encoded once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from mmlens.inputs.multimodal_inputs import MultimodalInputs
from mmlens.inputs.visual import Visual
from mmlens.interventions.functions import HookFunction
from mmlens.interventions.intervention import Intervention
from mmlens.model.hook_points import HookPoint, listens

if TYPE_CHECKING:
    from mmlens.model.transformer import HookedMultimodalTransformer


@dataclass(frozen=True, eq=False)
class EncodedImages:
    """The images of some inputs, in reading order, and what the model makes of them."""

    images: Visual
    """What the tower takes."""
    features: Float[Tensor, "row feature d_features"]
    """What the tower hands to the connector: a row for each tile, or one of all patches."""
    visual: Float[Tensor, "1 visual_token d_model"]
    """What the connector makes of it: the visual tokens of all images."""
    lengths: tuple[int, ...]
    """How many visual tokens each image has."""

    @classmethod
    def encoded(
        cls,
        model: HookedMultimodalTransformer,
        inputs: MultimodalInputs,
        known: EncodedImages | None = None,
    ) -> EncodedImages | None:
        """The images of the inputs; those that are among the known ones are taken from there.

        While hooks are on the model all are encoded, for the hooks to see.
        """
        if inputs.visual is None or model.vision is None or model.projector is None:
            return None
        images, lengths = inputs.visual, [len(image.positions) for image in inputs.images]
        if listens(model):
            features = model.vision.of_images(images)
            return cls(images, features, model.projector(features, images), tuple(lengths))
        seen = [] if known is None else [(known.images, i) for i in range(known.images.n_images)]
        n_known, index, new = len(seen), [], []
        for image in range(images.n_images):
            same = (i for i, other in enumerate(seen) if images.same(image, *other))
            index.append(next(same, len(seen)))
            if index[-1] == len(seen):
                seen.append((images, image))
                new.append(image)
        parts = [] if known is None else [known.part(image) for image in range(n_known)]
        if new:
            chosen = images.of(new)
            features = model.vision.of_images(chosen)
            visual = model.projector(features, chosen)
            found = cls(chosen, features, visual, tuple(lengths[image] for image in new))
            parts += [found.part(image) for image in range(len(new))]
        return cls.of_all([parts[image] for image in index])

    @classmethod
    def of_all(cls, parts: Sequence[EncodedImages]) -> EncodedImages | None:
        """Several as one; None where there are none."""
        images = Visual.joined([part.images for part in parts])
        if images is None:
            return None
        return cls(
            images,
            torch.cat([part.features for part in parts], dim=images.axis),
            torch.cat([part.visual for part in parts], dim=1),
            sum((part.lengths for part in parts), ()),
        )

    def part(self, first: int, end: int | None = None) -> EncodedImages:
        """The images from `first` to before `end`; one by default."""
        chosen = range(first, first + 1 if end is None else end)
        rows = self.images.rows_of("pixel_values", chosen)
        features = self.features.narrow(self.images.axis, min(rows, default=0), len(rows))
        begin = sum(self.lengths[:first])
        visual = self.visual[:, begin : begin + sum(self.lengths[i] for i in chosen)]
        lengths = tuple(self.lengths[image] for image in chosen)
        return EncodedImages(self.images.of(chosen), features, visual, lengths)

    def edited(
        self,
        model: HookedMultimodalTransformer,
        edits: Sequence[Sequence[Intervention]],
        numbers: Sequence[int],
    ) -> list[Float[Tensor, "1 visual_token d_model"]]:
        """The visual tokens of runs that edit the tower or the connector.

        All images of all runs are one batch. The tower works only for runs that touch it. `numbers`
        are what `batched` functions are told that the runs are called.
        """
        towers = [any(map(in_tower, parts)) for parts in edits]
        order = sorted(range(len(edits)), key=lambda run: not towers[run])
        n_towers, tower, projector = sum(towers), model.vision, model.projector
        assert tower is not None and projector is not None  # where there are images
        n_rows = len(self.features)
        in_order = [edits[run] for run in order], [numbers[run] for run in order]
        with model.hooks(fwd_hooks=image_hooks(*in_order, n_rows)):
            features = [self.features.repeat(len(edits) - n_towers, 1, 1)]
            if n_towers:
                features.insert(0, tower.of_images(self.images, times=n_towers))
            visual = projector(torch.cat(features), self.images).split(1)
        return [visual[order.index(run)] for run in range(len(edits))]


def image_hooks(
    runs: Sequence[Sequence[Intervention]], numbers: Sequence[int], n_rows: int
) -> list[tuple[str, HookFunction]]:
    """Hook functions that give each run's images to its interventions.

    Args:
        runs: what each run edits; those that edit the tower come first.
        numbers: what a `batched` function is told that each run is called.
        n_rows: of the tower, in one run: its tiles, or 1 where patches are packed.
    """
    edits: dict[str, list[tuple[int, Intervention]]] = defaultdict(list)
    for run, parts in enumerate(runs):
        for part in parts:
            for name in part.hook_names():
                edits[name].append((run, part))

    def edit_images(
        activation: Tensor, hook: HookPoint, edits: list[tuple[int, Intervention]], n_runs: int
    ) -> Tensor:
        # The learnt positions: one row for all tiles, unless masks tell them apart.
        shared = hook.site.rows == "1" and len(activation) == 1
        per_run = n_rows if shared else len(activation) // n_runs
        edited = activation.expand(n_runs * per_run, *activation.shape[1:]).clone()
        changed: dict[int, Tensor] = {}
        for run, part in edits:
            rows = slice(run * per_run, (run + 1) * per_run)
            own = activation if shared else activation[rows]
            changed[run] = part.edit(changed.get(run, own).clone(), hook, branch=numbers[run])
            edited[rows] = changed[run]
        return edited

    n_towers = sum(any(map(in_tower, parts)) for parts in runs)
    return [
        (
            name,
            partial(
                edit_images, edits=each, n_runs=n_towers if in_tower(each[0][1]) else len(runs)
            ),
        )
        for name, each in edits.items()
    ]


def in_tower(part: Intervention) -> bool:
    """Whether an intervention acts on the vision tower."""
    return part.where.stack == "tower"
