"""circuitsvis for prompts with images: attention patterns and coloured tokens.

circuitsvis draws a row and a column per token, so 576 visual tokens would leave no room for words:
they are one token here, unless asked for. Its notebook output asks the network for JavaScript when
there is one; a `HtmlView` always holds the JavaScript that comes with the package.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float
from torch import Tensor

from mmlens.plots.folding import Folding, Visual, folding_index, foldings
from mmlens.plots.labels import visible
from mmlens.plots.policy import content_policy
from mmlens.utils.files import write_atomically

if TYPE_CHECKING:
    from mmlens.inputs.multimodal_inputs import MultimodalInputs
    from mmlens.model.activation_cache import ActivationCache

#: a pattern of more tokens than this would make a page that no browser draws
MAX_TOKENS = 400
VIEW_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">{policy}<title>mmlens</title>
<style>body {{ font-family: sans-serif; margin: 1.5rem; }}</style></head>
<body>{view}</body></html>
"""


@dataclass(frozen=True)
class HtmlView:
    """HTML that needs nothing from outside; the last line of a notebook's cell shows it.

    Example:
        >>> attention(cache, 3).save("layer3.html")
    """

    html: str

    def _repr_html_(self) -> str:
        return self.html

    def __repr__(self) -> str:
        return f"HtmlView({len(self.html):,} characters)"

    def save(self, path: str | Path) -> Path:
        """Write a page that opens from the disk, and whose policy lets no other script run.

        Raises:
            ValueError: a path that does not end in .html.
        """
        if Path(path).suffix.lower() != ".html":
            raise ValueError(f"a view is saved as .html, not as {Path(path).name!r}")
        # One script: no text in it has angle brackets, so none can end it (`visible`).
        _, _, rest = self.html.partition("<script")
        script = rest.partition(">")[2].rpartition("</script>")[0]
        # Its tensor library compiles WebAssembly.
        policy = content_policy([script], "'wasm-unsafe-eval'")
        return write_atomically(path, VIEW_PAGE.format(view=self.html, policy=policy))


def attention(
    cache: ActivationCache | Mapping[tuple[str, int], Tensor],
    layer: int,
    inputs: MultimodalInputs | None = None,
    *,
    visual: Visual = "folded",
    batch: int = 0,
) -> HtmlView:
    """Draw the attention patterns of a layer's heads with circuitsvis.

    Where the tokens of an image are shown as one, its column is the sum of the attention to them,
    and its row is the mean of theirs, so that rows still sum to 1.

    Args:
        cache: with the layer's pattern: `model.run_with_cache(inputs)`.
        layer: of the decoder.
        inputs: what was run; by default what the cache was made from.
        visual: the image as one token ("folded"), its "rows", or every patch ("tokens").
        batch: the row of the batch.

    Raises:
        ValueError: more tokens than a browser can draw, or a cache that does not know its inputs.
        KeyError: the cache does not hold the pattern.

    Example:
        >>> _, cache = model.run_with_cache(inputs, names_filter="blocks.3.attn.hook_pattern")
        >>> attention(cache, 3)
    """
    from circuitsvis.attention import attention_heads

    inputs = getattr(cache, "inputs", None) if inputs is None else inputs
    if inputs is None:
        raise ValueError(
            "this cache does not know which words its positions are: give attention(cache, layer, "
            "inputs), or run the model on what model.prepare(...) or model.to_inputs(...) returns"
        )
    real = inputs.attention_mask[batch].cpu().numpy()
    pattern = cache["pattern", layer][batch].detach().float().cpu().numpy()
    pattern = pattern[:, real][:, :, real]
    view = _view(inputs, visual, batch)
    folded, _ = view.fold(pattern, "mean")  # destinations
    folded, _ = view.fold(folded.transpose(0, 2, 1), "sum")  # sources
    heads = attention_heads(
        np.round(folded.transpose(0, 2, 1), 5),
        [row.label for row in view.rows],
        attention_head_names=[f"L{layer}H{head}" for head in range(len(pattern))],
    )
    return HtmlView(heads.local_src)


def tokens(
    values: Float[Tensor, " pos"] | Float[Tensor, "pos k"],
    inputs: MultimodalInputs,
    *,
    names: Sequence[str] | None = None,
    visual: Visual = "folded",
    batch: int = 0,
) -> HtmlView:
    """Draw the prompt's tokens with circuitsvis, coloured by numbers.

    Args:
        values: a number for each position, or several, between which the reader chooses.
        inputs: the prompt.
        names: of the several.
        visual: the image as one token, which has the number of largest size ("folded"), its
            "rows", or every patch ("tokens").
        batch: the row of the batch.

    Raises:
        ValueError: another number of values than of positions, or of names.

    Example:
        >>> tokens(cache["resid_post", 5][0].norm(dim=-1), inputs)
    """
    from circuitsvis.tokens import colored_tokens, colored_tokens_multi

    if len(values) != inputs.n_pos:
        raise ValueError(f"{len(values)} values for {inputs.n_pos} positions")
    several = values.ndim == 2
    if names is not None and len(names) != (values.shape[1] if several else 1):
        raise ValueError(f"{len(names)} names for values of shape {tuple(values.shape)}")
    real = inputs.attention_mask[batch].cpu()
    array = values.detach().float().cpu()[real].reshape(int(real.sum()), -1).numpy()
    view = _view(inputs, visual, batch)
    folded, _ = view.fold(array, "peak")
    labels = [row.label for row in view.rows]
    if not several:
        return HtmlView(colored_tokens(labels, folded[:, 0]).local_src)
    named = [str(k) for k in range(folded.shape[1])] if names is None else list(names)
    shown = [visible(name) for name in named]
    return HtmlView(colored_tokens_multi(labels, Tensor(folded), shown).local_src)


def _view(inputs: MultimodalInputs, visual: Visual, batch: int) -> Folding:
    """Return the tokens of a row of the batch, without its padding."""
    real = inputs.attention_mask[batch].tolist()
    labels = [label for label, kept in zip(inputs.labels(batch), real, strict=True) if kept]
    found = foldings(labels)
    view = found[folding_index(found, visual)]
    if len(view.rows) > MAX_TOKENS:
        raise ValueError(
            f"{len(view.rows)} tokens are too many for circuitsvis (at most {MAX_TOKENS}): "
            "visual='folded' shows the image as one of them, 'rows' each of its rows as one"
        )
    return view
