"""Attention contributions: what a position receives from another through attention.

    c(j <- i) = | sum over heads of  A[j, i] (x_i W_V + b_V) W_O |

with A the pattern and x after the layer norm (Yuksekgonul et al. 2023, arXiv 2309.15098; Basu et
al. 2024, section on attention contributions). Per head, the norm is taken before the sum. In a
model that normalises what attention gives before it is added to the stream (Gemma 2 and 3), this is
what it gives: the vectors sum to `attn.hook_out`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils._pytree import tree_map

from mmlens.analyses.arguments import Where, layers_of, positions_of
from mmlens.analyses.result import SavedResult, description, long_table
from mmlens.inputs.checks import check_one_prompt
from mmlens.inputs.multimodal_inputs import MultimodalInputs
from mmlens.model.components.norm import float32_or_wider
from mmlens.utils.grad_mode import without_gradients
from mmlens.utils.threads import on_free_cores

if TYPE_CHECKING:
    import pandas as pd

    from mmlens.model.transformer import HookedMultimodalTransformer

Pattern = Float[Tensor, "row head destination source"]
Values = Float[Tensor, "row source head d_head"]
OutputWeights = Float[Tensor, "head d_head d_model"]

ELEMENTS_AT_ONCE = 2**25
"""Of the vectors [destination, source, d_model] whose norms are taken: 128 MiB in float32."""


@dataclass(frozen=True, eq=False)
class AttentionContribution(SavedResult):
    """Norms of what destinations receive from sources. In torch's functions it is its `values`.

    Example:
        >>> contribution.image_grid().mean(dim=1)   # [layer, row, column], over the destinations
        >>> contribution.cumulative_share()[0, :, 35]  # of the 36 largest sources, in layer 0
    """

    SIZES: ClassVar[dict[str, str]] = {
        "layers": "layer",
        "destination": "destination",
        "destination_labels": "destination",
        "source": "source",
        "source_labels": "source",
        "source_patches": "source",
    }

    values: Float[Tensor, "layer *head destination source"]
    layers: tuple[int, ...]
    source: tuple[int, ...]
    """Positions."""
    destination: tuple[int, ...]
    source_labels: tuple[str, ...]
    destination_labels: tuple[str, ...]
    source_patches: tuple[tuple[int, int, int, int], ...]
    """Image, view, row and column of every source; -1 where it is no patch."""
    grids: tuple[tuple[tuple[int, int], ...], ...]
    """Of each image, the rows and columns of its views."""
    metadata: dict[str, Any] = field(default_factory=dict)
    """Model and prompt."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Let torch's functions and operators work on `values`."""
        args, kwargs = tree_map(
            lambda x: x.values if isinstance(x, AttentionContribution) else x, (args, kwargs or {})
        )
        return func(*args, **kwargs)

    def __getitem__(self, index: Any) -> Tensor:
        return self.values[index]

    @property
    def shape(self) -> torch.Size:
        """[layer, (head,) destination, source]."""
        return self.values.shape

    @property
    def per_head(self) -> bool:
        """Whether heads are apart."""
        return self.values.ndim == 4

    def image_grid(
        self, image: int = 0, view: int = 0
    ) -> Float[Tensor, "layer *head destination row column"]:
        """The sources that are patches of an image, where they lie in it; NaN at the others.

        Args:
            image: which image of the prompt.
            view: which of its views; 0 shows all of it at once.

        Raises:
            ValueError: no source is a patch of that view.
        """
        of_image = [i for i, at in enumerate(self.source_patches) if at[:2] == (image, view)]
        if not of_image:
            raise ValueError(f"no source is a patch of image {image}, view {view}")
        rows, columns = torch.tensor([self.source_patches[i][2:] for i in of_image]).T
        size = self.grids[image][view]
        grid = self.values.new_full((*self.values.shape[:-1], *size), torch.nan)
        grid[..., rows, columns] = self.values[..., of_image]
        return grid

    def top(self, k: int) -> tuple[Tensor, Tensor]:
        """The `k` largest contributions of each destination, and the positions they come from.

        Returns:
            Contributions and positions, both [layer, (head,) destination, k].

        Raises:
            ValueError: k is not among 1 ... number of sources.
        """
        if not 1 <= k <= len(self.source):
            raise ValueError(f"k={k}; there are {len(self.source)} sources")
        largest = self.values.topk(k, dim=-1)
        return largest.values, torch.tensor(self.source)[largest.indices]

    def cumulative_share(self) -> Float[Tensor, "layer *head destination source"]:
        """Which share of the sum over sources the 1, 2, ... largest of them hold; ends at 1.

        NaN where a destination receives nothing.
        """
        ordered = self.values.sort(dim=-1, descending=True).values.cumsum(dim=-1)
        return ordered / ordered[..., -1:]

    def to_dataframe(self) -> pd.DataFrame:
        """One row per number: layer, (head,) destination, source, their labels, contribution."""
        axes: dict[str, Sequence[Any]] = {"layer": self.layers}
        if self.per_head:
            axes["head"] = range(self.values.shape[1])
        axes |= {"destination": self.destination, "source": self.source}
        table = long_table(axes, {"contribution": self.values})
        for name in ("destination", "source"):
            named = dict(zip(axes[name], getattr(self, f"{name}_labels"), strict=True))
            table[f"{name}_label"] = table[name].map(named)
        return table


@without_gradients
@on_free_cores
def attention_contribution(
    model: HookedMultimodalTransformer,
    inputs: MultimodalInputs,
    source: Where,
    destination: Where,
    *,
    layers: Iterable[int] | None = None,
    per_head: bool = False,
) -> AttentionContribution:
    """How much destinations receive from sources through attention (PAPER: attention contribution).

    Costs one forward pass, and one over the positions from the first destination on, in which the
    asked layers write their pattern down, one at a time.

    Args:
        inputs: one prompt (samples of noise are averaged over).
        source: a span ("image", "constraint") or positions.
        destination: a span ("constraint", "last") or positions.
        layers: of the decoder; all by default.
        per_head: every head's own norm instead of the norm of the sum over heads.

    Returns:
        [layer, (head,) destination, source]; zero where the destination does
        not attend to the source, as where that comes after it.

    Raises:
        UnknownSpanError: (a KeyError) no span of that name.
        ValueError: a batch; positions or layers that are not there.

    Example:
        >>> inputs = model.prepare(question, image, spans={"constraint": "this country"})
        >>> seen = attention_contribution(model, inputs, "image", "constraint", layers=[0])
        >>> spoken = attention_contribution(model, inputs, "constraint", "last")
    """
    check_one_prompt(len(inputs), "attention_contribution")
    chosen = layers_of(model, layers)
    sources, destinations = positions_of(inputs, source), positions_of(inputs, destination)
    values = read_attention(
        model, inputs, sources, destinations, chosen, partial(norms, per_head=per_head)
    )
    labels = inputs.labels()
    return AttentionContribution(
        values=values.cpu(),
        layers=tuple(chosen),
        source=tuple(sources.tolist()),
        destination=tuple(destinations.tolist()),
        source_labels=tuple(labels[position] for position in sources.tolist()),
        destination_labels=tuple(labels[position] for position in destinations.tolist()),
        source_patches=tuple(map(tuple, inputs.grid[0].cpu()[sources].tolist())),
        grids=tuple(image.grids for image in inputs.images),
        metadata=description(model, inputs),
    )


@without_gradients
def attention_vectors(
    model: HookedMultimodalTransformer,
    inputs: MultimodalInputs,
    source: Where,
    destination: Where,
    *,
    layers: Iterable[int] | None = None,
) -> Float[Tensor, "layer row destination source d_model"]:
    """What destinations receive from sources, as vectors.

    Summed over all positions as sources they are `attn_out` without `b_O`; in a model with a norm
    after attention (`cfg.post_norms`), `attn.hook_out` without `b_O`, before that norm. Arguments
    and errors as in `attention_contribution`, whose values are the norms of these.
    """
    check_one_prompt(len(inputs), "attention_vectors")
    sources, destinations = positions_of(inputs, source), positions_of(inputs, destination)
    return read_attention(model, inputs, sources, destinations, layers_of(model, layers), vectors)


def read_attention(
    model: HookedMultimodalTransformer,
    inputs: MultimodalInputs,
    source: Int[Tensor, " source"],
    destination: Int[Tensor, " destination"],
    layers: list[int],
    reduce: Callable[[Pattern, Values, OutputWeights], Tensor],
) -> Float[Tensor, "layer ..."]:
    """`reduce` of the pattern, the values at the sources and W_O of each layer, stacked.

    The patterns of some layers at a time are read of a branch that changes nothing.
    """
    recording = model.record(inputs, sites=[("v", layers)])
    per_layer = recording.n_rows * model.cfg.n_heads * len(destination) * inputs.n_pos
    n_at_once = max(1, ELEMENTS_AT_ONCE // per_layer)
    found: list[Tensor] = []
    for begin in range(0, len(layers), n_at_once):
        some = layers[begin : begin + n_at_once]
        read = [("pattern", layer, destination) for layer in some]
        _, patterns = recording.run([[]], None, read=read)
        for layer in some:
            pattern = patterns["pattern", layer][0]
            v = recording["v", layer][:, source.to(pattern.device)].to(pattern.device)
            v = v.repeat_interleave(model.cfg.n_heads // model.cfg.n_kv_heads, dim=2)
            weights: Any = model.blocks[layer].attn
            seen = pattern[..., source.to(pattern.device)]
            found.append(reduce(*map(float32_or_wider, (seen, v, weights.W_O))).to(model.device))
    return torch.stack(found)


def vectors(
    pattern: Pattern, values: Values, W_O: OutputWeights
) -> Float[Tensor, "row destination source d_model"]:
    """What each destination receives from each source, summed over heads."""
    return torch.einsum("bhji, bihd, hdm -> bjim", pattern, values, W_O)


def norms(
    pattern: Pattern, values: Values, W_O: OutputWeights, per_head: bool
) -> Float[Tensor, "*head destination source"]:
    """The norms of these vectors, or of every head's own; means over the rows.

    Over some sources at a time, since the vectors of all may not fit.
    """
    n_rows, n_heads, n_destinations, n_sources = pattern.shape
    of_each = n_rows * W_O.shape[-1] * (n_heads + (0 if per_head else n_destinations))
    size = max(1, ELEMENTS_AT_ONCE // of_each)
    parts = []
    for begin in range(0, n_sources, size):
        seen = pattern[..., begin : begin + size]
        moved = torch.einsum("bihd, hdm -> bhim", values[:, begin : begin + size], W_O)
        if per_head:
            parts.append(seen * moved.norm(dim=-1)[:, :, None])
        else:
            parts.append(torch.einsum("bhji, bhim -> bjim", seen, moved).norm(dim=-1))
    return torch.cat(parts, dim=-1).mean(dim=0)
