"""Attention knockout: what is left of the answer when some positions cannot look at others.

Geva et al. 2023 (arXiv 2304.14767, section 4): within a window of layers the attention from the
destinations to the sources is cut before the softmax, and the change of the answer's probability
says how much had to flow there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from mmlens.answers import Answer, given_answer, make_answer, with_answer
from mmlens.attribution.where import Where, layers_of, positions_of
from mmlens.hooks import knockout
from mmlens.inputs import MultimodalInputs
from mmlens.interventions import Intervention, window
from mmlens.layout import check_one_prompt
from mmlens.results import SavedResult

if TYPE_CHECKING:
    import pandas as pd

    from mmlens.branching import Recording
    from mmlens.model import HookedMultimodalTransformer
    from mmlens.plots.figure import Figure


@dataclass(frozen=True, eq=False)
class AttentionKnockout(SavedResult):
    """P(answer) with attention cut, for every window of layers.

    Example:
        >>> cut.effect.argmin()        # the window that matters most
    """

    probability: Float[Tensor, " layer"]
    """P(answer) with the window around each layer cut."""
    clean: float
    """P(answer) with nothing cut."""
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

    @property
    def effect(self) -> Float[Tensor, " layer"]:
        """Probability - clean: negative where the cut attention served the answer."""
        return self.probability - self.clean

    @property
    def relative_effect(self) -> Float[Tensor, " layer"]:
        """Effect / clean, as Geva et al. plot it: -1 where nothing of the answer is left."""
        return self.effect / self.clean

    def to_dataframe(self) -> pd.DataFrame:
        """One row per window: layer, window, probability, effect, relative_effect."""
        import pandas as pd

        return pd.DataFrame(
            {
                "layer": self.layers,
                "window": self.window,
                "probability": self.probability.tolist(),
                "effect": self.effect.tolist(),
                "relative_effect": self.relative_effect.tolist(),
            }
        )

    def plot(self) -> Figure:
        """The probability by layer; see `mmlens.plots.knockout`."""
        from mmlens.plots.knockout import plot_knockout

        return plot_knockout(self)


@torch.no_grad()
def attention_knockout(
    model: HookedMultimodalTransformer,
    inputs: MultimodalInputs,
    source: Where,
    destination: Where,
    *,
    layers: Iterable[int] | None = None,
    window: int = 1,
    answer: str | int | None = None,
    batch_rows: int = 64,
    progress: Callable[[int, int], None] | None = None,
) -> AttentionKnockout:
    """Keep destinations from looking at sources, window by window.

    Args:
        inputs: one prompt (samples of noise are averaged over).
        source: a span or positions that are not looked at: "image".
        destination: a span or positions that do not look: "question", "last". The tokens of an
            answer of several tokens are not among them unless their positions are given.
        layers: centres of the windows; all layers by default.
        window: layers cut together around each centre, see `mmlens.window`. A window as wide as
            twice the model cuts everywhere.
        answer: a text, a token id, or None for the most probable next token.
        batch_rows: the most rows that are computed at once.
        progress: called with (windows done, windows in all).

    Raises:
        UnknownSpanError: (a KeyError) no span of that name.
        ValueError: a batch; positions or layers that are not there; sources that all come after
            the destinations, which never look at them; an answer without tokens.

    Example:
        >>> cut = attention_knockout(model, inputs, "image", "last", window=5)
    """
    check_one_prompt(len(inputs), "attention_knockout")
    centres = layers_of(model, layers)
    recording, target = record_with_answer(model, inputs, answer)
    sources = positions_of(recording.inputs, source)
    destinations = positions_of(recording.inputs, destination)
    if int(sources.min()) > int(destinations.max()):
        raise ValueError(
            f"destinations up to {int(destinations.max())} never look at sources from "
            f"{int(sources.min())} on: attention is causal"
        )
    branches = [
        [Intervention("attn_scores", layers_cut, destinations, knockout(sources))]
        for layers_cut in (windows(model, centre, window) for centre in centres)
    ]
    done = 0

    def advance(n: int) -> None:
        nonlocal done
        done += n
        if progress is not None:
            progress(done, len(branches))

    left = recording.run(
        branches,
        target.probability,
        positions=target.positions,
        batch_rows=batch_rows,
        progress=advance,
    )
    clean = target.probability(recording.logits(target.positions))
    return AttentionKnockout(
        probability=left.mean(dim=1).cpu(),
        clean=clean.mean().item(),
        layers=tuple(centres),
        window=window,
        source=tuple(sources.tolist()),
        destination=tuple(destinations.tolist()),
        answer=target.text,
        answer_tokens=tuple(target.tokens.tolist()),
        metadata={
            "model": model.cfg.model_name,
            "prompt": inputs.texts[0] if inputs.texts else "",
            "source": source if isinstance(source, str) else "",
            "destination": destination if isinstance(destination, str) else "",
        },
    )


def windows(model: HookedMultimodalTransformer, centre: int, width: int) -> range:
    """`mmlens.window`, under a name that the argument `window` does not hide."""
    return window("attn_scores", centre, width, model)


def record_with_answer(
    model: HookedMultimodalTransformer, inputs: MultimodalInputs, answer: str | int | None
) -> tuple[Recording, Answer]:
    """The prompt's run with the answer's tokens behind it, and the answer.

    None is the run's own most probable next token.
    """
    if answer is not None:
        target = given_answer(model, inputs, answer)
        return model.record(with_answer(inputs, target)), target
    recording = model.record(inputs)
    last = inputs.n_pos - 1
    said = recording.logits([last]).float().softmax(-1).mean(dim=0).argmax()
    return recording, make_answer(model, [int(said)], last)
