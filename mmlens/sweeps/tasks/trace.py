"""The task `trace`: causal traces, each role of positions restored as a whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, cast, get_args

import pyarrow as pa

from mmlens.analyses.causal_trace import causal_trace
from mmlens.analyses.corruptions import swap_span
from mmlens.analyses.metrics import MetricName, most_probable
from mmlens.analyses.trace_grid import SITES, layer_centres
from mmlens.analyses.trace_result import CausalTrace
from mmlens.branching.recording import Recording
from mmlens.data import ImagePair, open_pairs
from mmlens.inputs.multimodal_inputs import MultimodalInputs
from mmlens.inputs.processor import Processor
from mmlens.interventions.intervention import site_of
from mmlens.model.transformer import HookedMultimodalTransformer
from mmlens.sweeps.items import Item
from mmlens.sweeps.task import Asked, Carried, Columns, Task, UnreadableImage

ROLES = ("constraint", "constraint last", "after constraint", "last token", "text constraint")
PAIR_ROLES = ("image", "after image", "constraint", "constraint last", "last token")
"""Where the image changes, words in front of the constraint matter, too."""


@dataclass(frozen=True, kw_only=True)
class TraceTask(Task):
    """MultiModalCausalTrace of every question: `mmlens.causal_trace` at the roles of positions.

    What comes before the constraint is the same in both runs and cannot matter, so roles in front
    of it are not traced unless they are asked for.

    Of a pair of images the corrupted run has the counterfactual image, scaled to the clean one's
    size, and its words stay; by default its roles are `PAIR_ROLES`.
    """

    name: ClassVar[str] = "trace"
    columns: ClassVar[Columns] = {
        "n_positions": pa.int32(),
        "metric": pa.string(),
        "contrast": pa.string(),
        "restored": pa.float32(),
        "clean": pa.float32(),
        "corrupted": pa.float32(),
        "indirect_effect": pa.float32(),
    }
    measures: ClassVar[tuple[str, ...]] = ("indirect_effect",)

    sites: tuple[str, ...] = SITES
    """Activations that are restored, see `mmlens.causal_trace`."""
    windows: tuple[int, ...] = (1,)
    """How many adjacent layers are restored together, like 1,3,5."""
    layers: tuple[int, ...] | None = None
    """Centres of the windows; all by default."""
    roles: tuple[str, ...] = ROLES
    """Positions, like "constraint,last token" (see `mmlens.role_positions`); those that a question
    lacks are left out."""
    corrupt: tuple[str, ...] = ("constraint",)
    """Spans that are replaced in the corrupted run."""
    replacement: str = "Paris"
    """The word whose first token takes the constraint's place."""
    metric: str = "probability"
    """What is followed of the answer: probability, logit_diff, kl or loss."""
    contrast: str | None = None
    """The answer whose logit logit_diff subtracts; by default what the corrupted run says."""

    def __post_init__(self) -> None:
        self.check_roles(self.roles)
        if self.metric not in get_args(MetricName):
            raise ValueError(f"metric {self.metric!r}; there are {', '.join(get_args(MetricName))}")
        if self.contrast is not None and self.metric != "logit_diff":
            raise ValueError(f"a contrast is for the metric logit_diff, not for {self.metric}")
        for site in self.sites:
            if (places := site_of(site).positions) != "tokens":
                raise ValueError(
                    f"site {site!r}: roles are positions of the prompt, and its positions are "
                    f"{places}; causal_trace takes these"
                )
        if not (self.sites and self.roles and self.windows and min(self.windows) > 0):
            raise ValueError(
                f"sites {self.sites}, roles {self.roles} and windows {self.windows}: there must be "
                "some, and windows of at least 1 layer"
            )

    def open(
        self,
        data: str | Path,
        images: str | Path | None,
        annotations: tuple[str, str] | None,
        seed: int,
    ) -> Sequence[Item]:
        """Questions, or pairs of images ("pairs:FILE", "whats_up:FILE")."""
        pairs = open_pairs(data, images)
        return super().open(data, images, annotations, seed) if pairs is None else pairs

    def read(self, processor: Processor, item: Item) -> Asked:
        """Open the images and make inputs of them; of a pair, with each of its images."""
        if not isinstance(item, ImagePair):
            return super().read(processor, item)
        try:
            opened = [replace(each, image=each.open_image()) for each in item.questions]
        except (ValueError, TypeError, OSError) as error:
            raise UnreadableImage(str(error)) from error
        clean, corrupted = ImagePair(*opened).inputs(processor, fit=True, template=self.template)
        return Asked(item, clean.without_images(), corrupted.without_images())

    def check(self, model: HookedMultimodalTransformer) -> None:
        """Raise a ValueError where the model lacks what the settings name."""
        layer_centres(model, self.sites, self.layers)

    def rows(
        self, model: HookedMultimodalTransformer, asked: Asked, carried: Carried
    ) -> list[dict[str, Any]]:
        """One row per window, site, role and layer."""
        there = asked.roles()
        is_pair = asked.corrupted is not None
        wanted = PAIR_ROLES if is_pair and self.roles == ROLES else self.roles
        roles = {role: there[role] for role in wanted if role in there}
        if not roles:
            raise ValueError(f"the question has none of the roles {', '.join(wanted)}")
        corrupted = asked.inputs if asked.corrupted is None else asked.corrupted
        for span in () if is_pair else self.corrupt:
            corrupted = swap_span(model, corrupted, span, self.replacement)
        # A constraint of one token is its own last: the same positions are restored once.
        groups = {tuple(positions.tolist()): positions for positions in roles.values()}
        at = {role: list(groups).index(tuple(each.tolist())) for role, each in roles.items()}
        rows = []
        right = self.is_right(model, asked)
        contrast: str | int | None = self.contrast
        if self.metric == "logit_diff" and contrast is None:
            contrast = said_instead(model, asked.inputs, corrupted, carried.earlier)
        for window in self.windows:
            trace = causal_trace(
                model,
                asked.inputs,
                corrupted,
                sites=self.sites,
                layers=self.layers,
                window=window,
                positions=list(groups.values()),
                metric=cast(MetricName, self.metric),
                contrast=contrast,
                batch_rows=carried.batch_rows,
                earlier=carried.earlier,
            )
            rows += [row | {"is_right": right} for row in trace_rows(trace, at)]
        return rows


def said_instead(
    model: HookedMultimodalTransformer,
    clean: MultimodalInputs,
    corrupted: MultimodalInputs,
    earlier: list[Recording],
) -> int:
    """Return the token that is most probable in the corrupted run, and not in the clean one.

    Raises:
        ValueError: it is the same in both.
    """
    runs = Recording.of_all(model, [clean, corrupted], earlier=earlier)
    earlier[:] = runs[:1]
    said = [most_probable(each) for each in runs]
    answer, other = (int(each.tokens[0]) for each in said)
    if answer == other:  # by id: several tokens may read the same
        raise ValueError(
            f"both runs say {said[0].text!r}, so its logit has nothing to be compared with: give a "
            "contrast, or follow another metric"
        )
    return other


def trace_rows(trace: CausalTrace, at: dict[str, int]) -> list[dict[str, Any]]:
    """A row per cell of a trace; `at` says which group a role's positions are."""
    restored = trace.restored.tolist()
    return [
        {
            "answer": trace.answer,
            "site": site,
            "role": role,
            "layer": layer,
            "window": trace.window,
            "n_positions": len(trace.groups[group]),
            "metric": trace.metric,
            "contrast": trace.contrast or None,
            "restored": restored[s][group][i],
            "clean": trace.clean,
            "corrupted": trace.corrupted,
            "indirect_effect": restored[s][group][i] - trace.corrupted,
        }
        for s, site in enumerate(trace.sites)
        for role, group in at.items()
        for i, layer in enumerate(trace.layers)
    ]
