"""Attention knockout: what is left of the answer when some positions cannot attend to others.

Geva et al. 2023 (arXiv 2304.14767, section 4): within a window of layers the attention from the
destinations to the sources is cut before the softmax, and the change of the answer's probability
(or of another metric) says how much had to flow there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from jaxtyping import Float
from torch import Tensor

from mmlens.analyses.arguments import Where, layers_of, positions_of
from mmlens.analyses.metrics import Metric, check_metric, check_one_number, metric_of, name_of
from mmlens.analyses.patch import patch
from mmlens.analyses.result import SavedResult, description, long_table
from mmlens.analyses.targets import given_answer, record_with_answer
from mmlens.inputs.checks import check_one_prompt
from mmlens.inputs.multimodal_inputs import MultimodalInputs
from mmlens.interventions.functions import knockout
from mmlens.interventions.intervention import Intervention
from mmlens.interventions.intervention import window as layers_around
from mmlens.utils.grad_mode import without_gradients
from mmlens.utils.progress import Progress
from mmlens.utils.tensors import listed_numbers
from mmlens.utils.threads import on_free_cores

if TYPE_CHECKING:
    import pandas as pd

    from mmlens.model.transformer import HookedMultimodalTransformer


@dataclass(frozen=True, eq=False)
class AttentionKnockout(SavedResult):
    """A metric with attention cut, for every window of layers: P(answer), or another one.

    Example:
        >>> cut.effect.argmin()        # the window that matters most
    """

    SIZES: ClassVar[dict[str, str]] = {"layers": "layer"}

    values: Float[Tensor, " layer"]
    """The metric with the window around each layer cut."""
    clean: float
    """The metric with nothing cut."""
    layers: tuple[int, ...]
    """Centres of the windows."""
    window: int
    """Layers cut together."""
    source: tuple[int, ...]
    destination: tuple[int, ...]
    answer: str
    answer_tokens: tuple[int, ...]
    metadata: dict[str, Any] = field(default_factory=dict)
    """Model, prompt, and the names of the two spans where they had some."""
    metric: str = "probability"
    """What was measured: a name of `mmlens.analyses.metrics`, or a function's."""
    contrast: str = ""
    """The answer whose logit "logit_diff" subtracts."""

    @property
    def probability(self) -> Float[Tensor, " layer"]:
        """P(answer) with the window around each layer cut.

        Raises:
            ValueError: another metric was followed.
        """
        if self.metric != "probability":
            raise ValueError(f"the values are {self.metric!r}, not probabilities: see .values")
        return self.values

    @property
    def effect(self) -> Float[Tensor, " layer"]:
        """Values - clean: a probability's is negative where the cut attention served the answer."""
        return self.values - self.clean

    @property
    def relative_effect(self) -> Float[Tensor, " layer"]:
        """Effect / clean, as Geva et al. plot it: -1 where nothing of the answer is left."""
        return self.effect / self.clean

    def to_dataframe(self) -> pd.DataFrame:
        """One row per window: layer, window, probability (or value), effect, relative_effect."""
        column = "probability" if self.metric == "probability" else "value"
        columns = {column: self.values, "effect": self.effect}
        columns["relative_effect"] = self.relative_effect
        table = long_table({"layer": self.layers}, columns)
        table.insert(1, "window", self.window)
        return table


@without_gradients
@on_free_cores
def attention_knockout(
    model: HookedMultimodalTransformer,
    inputs: MultimodalInputs,
    source: Where,
    destination: Where,
    *,
    layers: Iterable[int] | None = None,
    window: int = 1,
    heads: Sequence[int] | Mapping[int, Sequence[int]] | None = None,
    answer: str | int | None = None,
    metric: Metric = "probability",
    contrast: str | int | None = None,
    batch_rows: int | None = None,
    progress: Progress | None = None,
) -> AttentionKnockout:
    """Keep destinations from attending to sources, window by window.

    Args:
        inputs: one prompt (samples of noise are averaged over).
        source: a span or positions that are not attended to: "image".
        destination: a span or positions that do not attend to them: "question", "last". The tokens
            of an answer of several tokens are not among them unless their positions are given.
        layers: centres of the windows; all layers by default.
        window: layers cut together around each centre, see `mmlens.window`. A window as wide as
            twice the model cuts everywhere.
        heads: which heads are cut, in every layer of the window, or by layer (in the layers that
            it does not name, none is); all by default. `ablation_scan(model, inputs, "heads",
            knockout(sources), site="attn_scores", positions=...)` cuts each head alone.
        answer: a text, a token id, or None for the most probable next token.
        metric: "probability" of the answer, "logit_diff", "kl" (of the next token, from the run
            with nothing cut), "loss", or a function of the logits [row, n, d_vocab] that predict
            the answer's tokens, which returns a number for each row.
        contrast: the answer whose logit "logit_diff" subtracts.
        batch_rows: the most rows that are computed at once; None takes what fits into free memory.
        progress: called with (windows done, windows in all).

    Raises:
        UnknownSpanError: (a KeyError) no span of that name.
        ValueError: a batch; positions or layers that are not there; sources that no destination
            attends to in any layer that is cut: later ones, or ones that are further back than a
            window; no head in any layer that is cut; an answer without tokens; a metric that lacks
            its contrast, a contrast for another one, or several numbers for a row.

    Example:
        >>> cut = attention_knockout(model, inputs, "image", "last", window=5)
    """
    check_one_prompt(len(inputs), "attention_knockout")
    check_metric(metric, contrast)
    centres = layers_of(model, layers)
    recording, target = record_with_answer(model, inputs, answer)
    sources = positions_of(recording.inputs, source)
    destinations = positions_of(recording.inputs, destination)
    windows = [layers_around("attn_scores", at, window, model) for at in centres]
    places = recording.places
    rules = {model.rules[model.cfg.kind(layer)] for cut in windows for layer in cut}
    seen = (rule.mask(places[destinations], places[sources]) for rule in rules)
    if not any(bool(each.any()) for each in seen):
        asked, cut = (f"{int(at.min())} ... {int(at.max())}" for at in (destinations, sources))
        raise ValueError(
            f"destinations {asked} never attend to sources {cut} in the layers that are cut: these "
            "come later, or are further back than a window"
        )
    if isinstance(heads, Mapping):
        heads = {int(layer): some for layer, some in heads.items()}
    named = heads if isinstance(heads, Mapping) else {}
    if outside := [layer for layer in named if not 0 <= layer < model.cfg.n_layers]:
        raise ValueError(
            f"heads names layers {outside}, which are not among 0 ... {model.cfg.n_layers - 1}"
        )
    cells = {
        centre: [
            Intervention(f"attn_scores{units}", some, destinations, knockout(sources))
            for some, units in heads_in(layers_cut, heads)
        ]
        for centre, layers_cut in zip(centres, windows, strict=True)
    }
    if not any(cells.values()):
        there = sorted({layer for each in windows for layer in each})
        raise ValueError(f"heads={heads!r} names no head in the layers that are cut: {there}")
    other = None if contrast is None else given_answer(model, inputs, contrast)
    function = metric_of(metric, target, other, recording)
    clean = function(recording.logits(target.positions))
    check_one_number(metric, clean, recording.n_rows)
    left = patch(
        recording,
        cells,
        function,
        positions=target.positions,
        batch_rows=batch_rows,
        progress=progress,
    )
    return AttentionKnockout(
        values=left.values,
        clean=clean.mean().item(),
        layers=tuple(centres),
        window=window,
        source=tuple(sources.tolist()),
        destination=tuple(destinations.tolist()),
        answer=target.text,
        answer_tokens=tuple(target.tokens.tolist()),
        metadata=description(model, inputs)
        | {
            "source": source if isinstance(source, str) else "",
            "destination": destination if isinstance(destination, str) else "",
            "heads": shown_heads(heads),
        },
        metric=name_of(metric),
        contrast="" if other is None else other.text,
    )


def heads_in(
    layers: Iterable[int], heads: Sequence[int] | Mapping[int, Sequence[int]] | None
) -> list[tuple[list[int], str]]:
    """Return some layers, and which heads are cut in them, as units of a site."""
    if heads is None:
        return [(list(layers), "")]
    by_layer = heads if isinstance(heads, Mapping) else dict.fromkeys(layers, heads)
    some = {layer: listed_numbers(by_layer.get(layer, ()), "heads") for layer in layers}
    return [([layer], f"[{','.join(map(str, cut))}]") for layer, cut in some.items() if cut]


def shown_heads(
    heads: Sequence[int] | Mapping[int, Sequence[int]] | None,
) -> list[int] | dict[str, list[int]] | None:
    """Return the heads as JSON holds them."""
    if isinstance(heads, Mapping):
        return {str(layer): listed_numbers(some) for layer, some in heads.items()}
    return None if heads is None else listed_numbers(heads)
