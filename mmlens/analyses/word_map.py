"""Where in an image its visual tokens say a word, and whether that is where the object is.

The residual stream at visual tokens, read by the logit lens (Neo et al. 2024, Jiang et al. 2024).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmlens.analyses.logit_lens import logit_lens
from mmlens.analyses.result import SavedResult, long_table
from mmlens.inputs.multimodal_inputs import MultimodalInputs

if TYPE_CHECKING:
    import pandas as pd

    from mmlens.model.transformer import HookedMultimodalTransformer


@dataclass(frozen=True, eq=False)
class WordMap(SavedResult):
    """How probable a word is at each visual token of an image, layer by layer.

    Example:
        >>> found.score(inputs, (40, 20, 90, 60)).sort_values("auroc").tail(1)
        >>> found.plot(inputs).save("dog.html")
    """

    SIZES: ClassVar[dict[str, str]] = {
        "layers": "layer",
        "positions": "visual_token",
        "patches": "visual_token",
    }

    log_probs: Float[Tensor, "layer visual_token"]
    """In nats, of the word's first token."""
    ranks: Int[Tensor, "layer visual_token"]
    """How many tokens are more probable there."""
    layers: tuple[int, ...]
    positions: tuple[int, ...]
    """Of the image's visual tokens, in order."""
    patches: tuple[tuple[int, int, int], ...]
    """(view, row, column) of each; -1 of a visual token that is no patch."""
    word: str
    """The text of the token."""
    image: int
    site: str
    metadata: dict[str, Any] = field(default_factory=dict)

    def top(self, n: int, layer: int) -> tuple[int, ...]:
        """Return the positions of the n patches that say the word most in a layer, best first.

        Raises:
            ValueError: no such layer in the map.
        """
        patches = self._are_patches.nonzero().flatten()
        values = self.log_probs[self.layers.index(layer), patches]
        best = patches[values.topk(min(n, len(patches))).indices]
        return tuple(self.positions[i] for i in best.tolist())

    @property
    def _are_patches(self) -> Tensor:
        return torch.tensor([view >= 0 for view, _, _ in self.patches])

    def score(self, inputs: MultimodalInputs, box: Sequence[float]) -> pd.DataFrame:
        """Return how well the map finds a box, without a threshold: a row per layer.

        The columns are layer, auroc, the probability that a patch inside says the word more than
        one outside, average_precision, and for comparison share, the share of patches inside, which
        is the average precision of a random order.

        Args:
            inputs: the prompt that the map is of, with its image.
            box: (left, top, right, bottom) in the image's pixels. A patch is inside if at least
                half of it is, in whichever view.

        Raises:
            ValueError: a box that holds no patch or every patch; other inputs.
        """
        import pandas as pd
        from sklearn.metrics import average_precision_score, roc_auc_score

        tokens = inputs.images[self.image]
        if tuple(tokens.positions.tolist()) != self.positions:
            raise ValueError(
                "visual tokens at other positions: these inputs are not those of the map"
            )
        kept = self._are_patches
        positions = torch.tensor(self.positions)[kept]
        inside = torch.isin(positions, tokens.inside(box)).numpy()
        if inside.all():
            raise ValueError(f"the box {tuple(box)} holds every patch, none is outside")
        rows = []
        for layer, values in zip(
            self.layers, self.log_probs[:, kept].double().numpy(), strict=True
        ):
            scores = {
                "auroc": roc_auc_score(inside, values),
                "average_precision": average_precision_score(inside, values),
            }
            rows.append({"layer": layer, **scores, "share": float(inside.mean())})
        return pd.DataFrame(rows)

    def to_dataframe(self) -> pd.DataFrame:
        """One row per layer and visual token: its patch, the word's log probability and rank."""
        axes = {"layer": self.layers, "position": self.positions}
        table = long_table(axes, {"log_prob": self.log_probs, "rank": self.ranks})
        for at, name in enumerate(("view", "row", "column"), start=2):
            table.insert(at, name, [patch[at - 2] for patch in self.patches] * len(self.layers))
        return table


def word_map(
    model: HookedMultimodalTransformer,
    inputs: MultimodalInputs,
    word: str | int,
    *,
    site: str = "resid_post",
    layers: Iterable[int] | None = None,
    image: int = 0,
) -> WordMap:
    """Read a word's probability at every visual token of an image with the logit lens.

    Args:
        inputs: one prompt.
        word: a text, whose first token counts, as it would follow the prompt (" dog"); or an id.
        site: what is read, as in `logit_lens`.
        layers: which; all by default.
        image: which image of the prompt.

    Raises:
        ValueError: no such image; or as `logit_lens`.

    Example:
        >>> word_map(model, inputs, "dog", layers=range(16, 24)).score(inputs, box)
    """
    if not 0 <= image < len(inputs.images):
        raise ValueError(f"image {image} of {len(inputs.images)}, counted from 0")
    positions = inputs.images[image].positions
    lens = logit_lens(
        model, inputs, site=site, layers=layers, positions=positions, tokens=[word], top=1
    )
    return WordMap(
        log_probs=lens.log_probs[..., 0],
        ranks=lens.ranks[..., 0],
        layers=lens.layers,
        positions=lens.positions,
        patches=tuple(patch[1:] for patch in lens.patches),
        word=lens.names[str(lens.tokens[0])],
        image=image,
        site=site,
        metadata=lens.metadata,
    )
