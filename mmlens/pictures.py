"""Pictures on their way to visual tokens: each distinct one is encoded once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from mmlens.hook_points import HookPoint, listens
from mmlens.hooks import HookFunction
from mmlens.inputs import MultimodalInputs
from mmlens.interventions import Intervention

if TYPE_CHECKING:
    from mmlens.model import HookedMultimodalTransformer


@dataclass(frozen=True, eq=False)
class Pictures:
    """The pictures of some inputs, in reading order, and what the model makes of them."""

    pixels: Float[Tensor, "image channel height width"]
    features: Float[Tensor, "image visual_token d_features"]
    """What the tower hands to the projector."""
    visual: Float[Tensor, "image visual_token d_model"]

    @classmethod
    def encoded(
        cls,
        model: HookedMultimodalTransformer,
        inputs: MultimodalInputs,
        known: Pictures | None = None,
    ) -> Pictures | None:
        """The pictures of the inputs; those that are among the known ones are taken from there.

        None where there are none. While hooks are on the model all are encoded, for the hooks to
        see.
        """
        if inputs.pixel_values is None or model.vision is None or model.projector is None:
            return None
        if listens(model):
            features = model.vision(inputs.pixel_values)
            return cls(inputs.pixel_values, features, model.projector(features))
        seen = list(known.pixels) if known else []
        n_known, index = len(seen), []
        for picture in inputs.pixel_values:
            same = (i for i, other in enumerate(seen) if torch.equal(picture, other))
            index.append(next(same, len(seen)))
            if index[-1] == len(seen):
                seen.append(picture)
        features, visual = ([known.features], [known.visual]) if known else ([], [])
        if len(seen) > n_known:
            features.append(model.vision(torch.stack(seen[n_known:])))
            visual.append(model.projector(features[-1]))
        return cls(inputs.pixel_values, torch.cat(features)[index], torch.cat(visual)[index])

    @classmethod
    def of_all(cls, parts: Sequence[Pictures]) -> Pictures | None:
        """Several as one; None where there are none."""
        if not parts:
            return None
        named = ("pixels", "features", "visual")
        return cls(*(torch.cat([getattr(part, name) for part in parts]) for name in named))

    def part(self, first: int, end: int) -> Pictures:
        """Some of the pictures."""
        return Pictures(self.pixels[first:end], self.features[first:end], self.visual[first:end])

    def edited(
        self, model: HookedMultimodalTransformer, edits: Sequence[Sequence[Intervention]]
    ) -> list[Float[Tensor, "image visual_token d_model"]]:
        """The visual tokens of runs that edit the tower or the projector.

        All pictures of all runs are one batch. The tower works only for runs that touch it.
        """
        towers = [any(part.site.startswith("vision.") for part in parts) for parts in edits]
        order = sorted(range(len(edits)), key=lambda run: not towers[run])
        n_towers, n_images = sum(towers), len(self.pixels)
        tower, projector = model.vision, model.projector
        assert tower is not None and projector is not None  # where there are pictures
        hooks = dispatch([edits[run] for run in order], n_images)
        with model.hooks(fwd_hooks=hooks):
            features = [self.features.repeat(len(edits) - n_towers, 1, 1)]
            if n_towers:
                features.insert(0, tower(self.pixels.repeat(n_towers, 1, 1, 1)))
            visual = projector(torch.cat(features)).split(n_images)
        return [visual[order.index(run)] for run in range(len(edits))]


def dispatch(
    runs: Sequence[Sequence[Intervention]], n_images: int
) -> list[tuple[str, HookFunction]]:
    """Hook functions that give each run's pictures to its interventions."""
    edits: dict[str, list[tuple[int, Intervention]]] = defaultdict(list)
    for run, parts in enumerate(runs):
        for part in parts:
            for name in part.hook_names():
                edits[name].append((run * n_images, part))

    def edit_pictures(
        activation: Tensor, hook: HookPoint, edits: list[tuple[int, Intervention]], n_rows: int
    ) -> Tensor:
        shared = len(activation) == 1 < n_rows  # the learnt positions: one row for all pictures
        edited = activation.expand(n_rows, *activation.shape[1:]).clone()
        changed: dict[int, Tensor] = {}
        for row, part in edits:
            own = activation if shared else activation[row : row + n_images]
            changed[row] = part.edit(changed.get(row, own).clone(), hook)
            edited[row : row + n_images] = changed[row]
        return edited

    n_towers = sum(any(part.site.startswith("vision.") for part in parts) for parts in runs)
    return [
        (
            name,
            partial(
                edit_pictures,
                edits=each,
                n_rows=n_images * (n_towers if name.startswith("vision.") else len(runs)),
            ),
        )
        for name, each in edits.items()
    ]
