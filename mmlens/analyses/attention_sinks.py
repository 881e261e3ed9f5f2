"""Attention sinks: tokens that receive attention without content, and what cutting them does.

In language models the first token draws attention that has nowhere to go (Xiao et al. 2023, arXiv
2309.17453), with a few dimensions of its residual stream far larger than the others (Sun et al.
2024, arXiv 2402.17762) and values close to zero. Some visual tokens do the same, by the same
dimensions (Kang et al. 2025, arXiv 2503.03321). Here a position is a sink in a layer where it
receives `factor` times as much attention as positions do on average, and its values are shorter
than those of half of the positions; and a sink of the prompt where that holds in `share` of the
layers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmlens.analyses.arguments import check_single_run, layers_of
from mmlens.analyses.metrics import Metric, check_one_number, followed
from mmlens.analyses.patch import evaluated
from mmlens.analyses.result import SavedResult, description
from mmlens.branching.recording import Recording
from mmlens.inputs.multimodal_inputs import MultimodalInputs
from mmlens.interventions.functions import knockout
from mmlens.interventions.intervention import Intervention
from mmlens.model.components.norm import float32_or_wider
from mmlens.utils.grad_mode import without_gradients
from mmlens.utils.threads import on_free_cores

if TYPE_CHECKING:
    import pandas as pd

    from mmlens.model.transformer import HookedMultimodalTransformer


@dataclass(frozen=True, eq=False)
class AttentionSinks(SavedResult):
    """What every position receives and holds, which ones are sinks, and the answer without them.

    Example:
        >>> found.sinks, found.dimensions
        >>> found.values - found.baseline          # without attention to text sinks, visual ones
    """

    SIZES: ClassVar[dict[str, str]] = {"layers": "layer", "labels": "pos"}

    received: Float[Tensor, "layer pos"]
    """Attention that a position receives from another one that attends to it: the mean over those
    positions and the heads. NaN where no other position does (the last one)."""
    value_norms: Float[Tensor, "layer pos"]
    """Lengths of its values, the mean over heads."""
    massive: Float[Tensor, "layer pos"]
    """Its largest dimension, over the root mean square of all: the stream that enters the layer."""
    layers: tuple[int, ...]
    labels: tuple[str, ...]
    sinks: tuple[int, ...]
    """Positions."""
    visual: tuple[int, ...]
    """Which of the sinks are visual tokens."""
    dimensions: tuple[int, ...]
    """Dimensions of the residual stream that are the largest of sinks, the most frequent first."""
    values: Float[Tensor, " cut"]
    """The metric with attention to text sinks cut, to visual ones, and to all, in every layer; NaN
    where there are none."""
    control: Float[Tensor, "cut draw"]
    """The same for as many other positions, of text and image alike, drawn at random; for all of
    them where there are fewer."""
    baseline: float
    metric: str
    answer: str = ""
    metadata: dict[str, Any] = field(default_factory=dict)
    """Model, prompt, factor and share."""

    def to_dataframe(self) -> pd.DataFrame:
        """One row per position: label; received, value_norm, massive (means over layers); sink."""
        import pandas as pd

        means = {
            name: getattr(self, key).nanmean(dim=0).tolist()
            for name, key in (("received", "received"), ("value_norm", "value_norms"))
        }
        return pd.DataFrame(
            {
                "position": range(len(self.labels)),
                "label": self.labels,
                **means,
                "massive": self.massive.mean(dim=0).tolist(),
                "sink": [at in self.sinks for at in range(len(self.labels))],
            }
        )


@without_gradients
@on_free_cores
def attention_sinks(
    model: HookedMultimodalTransformer,
    inputs: MultimodalInputs,
    *,
    layers: Iterable[int] | None = None,
    factor: float = 3.0,
    share: float = 0.5,
    metric: Metric = "probability",
    answer: str | int | None = None,
    draws: int = 5,
    seed: int = 0,
    batch_rows: int | None = None,
) -> AttentionSinks:
    """Find the tokens that receive attention without content, and cut them.

    Args:
        inputs: one prompt.
        layers: where sinks are looked for; all by default. They are cut in every layer.
        factor: how many times the mean attention a sink receives in a layer.
        share: in which part of the layers, at least.
        metric: what is followed when they are cut; see `patch`.
        answer: which answer it follows; by default the most probable one.
        draws: how many random sets of other positions are cut for comparison.
        seed: of the draws.
        batch_rows: the most rows computed at once; None takes what fits into free memory.

    Raises:
        ValueError: a batch or samples of noise; layers that are not there; a `share` above 1, or
            not above 0; a metric of several numbers.

    Example:
        >>> found = attention_sinks(model, inputs, answer="Rome")
        >>> [found.labels[at] for at in found.sinks]
    """
    check_single_run(inputs, "attention_sinks")
    if not 0 < share <= 1:
        raise ValueError(f"share={share}; it is a part of the layers, above 0 and at most 1")
    if draws < 0:
        raise ValueError(f"draws={draws}; there can be none, or some")
    chosen = layers_of(model, layers)
    recording = model.record(inputs, sites=[("v", chosen), ("resid_pre", chosen)])
    received = torch.stack([attention_received(recording, layer) for layer in chosen])
    norms = torch.stack(
        [float32_or_wider(recording["v", i])[0].norm(dim=-1).mean(dim=-1).cpu() for i in chosen]
    )
    streams = [float32_or_wider(recording["resid_pre", layer])[0].cpu() for layer in chosen]
    massive = torch.stack(
        [x.abs().amax(dim=-1) / x.pow(2).mean(dim=-1).sqrt().clamp(min=1e-30) for x in streams]
    )
    often = received > factor * received.nanmean(dim=1, keepdim=True)
    real = inputs.attention_mask[0].cpu()
    quiet = (norms < norms[:, real].median(dim=1, keepdim=True).values) & real
    sinks = ((often & quiet).double().mean(dim=0) >= share).nonzero().flatten()
    largest = Counter(int(x[at].abs().argmax()) for x in streams for at in sinks.tolist())
    is_image = inputs.is_image[0].cpu()
    what = followed(recording, metric, answer)
    clean = what.function(what.recording.logits(what.positions))
    check_one_number(metric, clean, recording.n_rows)
    sets = [sinks[~is_image[sinks]], sinks[is_image[sinks]], sinks]
    values, control = cut_sets(what, sets, sinks, is_image, draws, seed, batch_rows)
    return AttentionSinks(
        received=received,
        value_norms=norms,
        massive=massive,
        layers=tuple(chosen),
        labels=tuple(inputs.labels()),
        sinks=tuple(sinks.tolist()),
        visual=tuple(sets[1].tolist()),
        dimensions=tuple(each for each, _ in largest.most_common()),
        values=values,
        control=control,
        baseline=float(clean.mean()),
        metric=what.name,
        answer="" if what.answer is None else what.answer.text,
        metadata=description(model, inputs) | {"factor": factor, "share": share, "seed": seed},
    )


def attention_received(recording: Recording, layer: int) -> Float[Tensor, " pos"]:
    """Return what each position receives from another that attends to it, on average."""
    everywhere = range(recording.inputs.n_pos)
    _, found = recording.run([[]], None, read=[("pattern", layer, everywhere)])
    pattern = float32_or_wider(found["pattern", layer][0, 0])
    rule = recording.model.rules[recording.model.cfg.kind(layer)]
    seen = rule.mask(recording.places, recording.places)[0].to(pattern.device).fill_diagonal_(False)
    real = recording.inputs.attention_mask[0].to(seen)  # padding neither gives nor receives
    seen = seen & real[:, None] & real
    given = pattern.mean(dim=0).masked_fill(~seen, 0.0).sum(dim=0)
    return (given / seen.sum(dim=0)).cpu()


def cut_sets(
    what: Any,
    sets: list[Int[Tensor, " _"]],
    sinks: Int[Tensor, " _"],
    is_image: Tensor,
    draws: int,
    seed: int,
    batch_rows: int | None,
) -> tuple[Float[Tensor, " cut"], Float[Tensor, "cut draw"]]:
    """Return the metric without attention to sets of positions, and to random sets like them."""
    recording = what.recording
    generator = torch.Generator().manual_seed(seed)
    chosen: list[Tensor] = []
    padding = (~recording.inputs.attention_mask[0]).nonzero().flatten().cpu()
    taken = torch.cat([sinks, padding])
    for each in sets:
        chosen.append(each)
        for _ in range(draws):
            drawn = [like(each, kind, taken, is_image, generator) for kind in (False, True)]
            chosen.append(torch.cat(drawn))
    branches = []
    for each in chosen:
        everywhere = torch.arange(recording.inputs.n_pos)
        begin = recording.inputs.n_pos
        if len(each):  # what comes before attends to none of them
            begin = recording.first_affected(int(each.min()))
        later = everywhere[(everywhere >= begin) & ~torch.isin(everywhere, each)]
        layers = range(recording.model.cfg.n_layers)
        cut = [Intervention("attn_scores", layers, later, knockout(each))] if len(later) else []
        branches.append(cut)
    found = evaluated(what, branches, batch_rows=batch_rows).view(len(sets), 1 + draws)
    empty = torch.tensor([not len(each) for each in sets])
    found = found.masked_fill(empty[:, None], torch.nan)
    return found[:, 0], found[:, 1:]


def like(
    positions: Int[Tensor, " _"],
    visual: bool,
    taken: Int[Tensor, " _"],
    is_image: Tensor,
    generator: torch.Generator,
) -> Int[Tensor, " _"]:
    """Return as many positions of the image, or of the text, as are given, none of them taken."""
    n = int((is_image[positions] == visual).sum())
    alike = (is_image == visual).nonzero().flatten()
    others = alike[~torch.isin(alike, taken)]
    return others[torch.randperm(len(others), generator=generator)[:n]]
