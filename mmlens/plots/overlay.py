"""Numbers of visual tokens over the image they were made from.

The image is shown as it was given, but pale, so that the colours are those of the numbers;
patches lie where they really are, beyond its edge where it was padded, and what was cropped stays
bare.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image, ImageEnhance
from plotly import graph_objects as go
from torch import Tensor

from mmlens.inputs.image_tokens import Box, ImageTokens
from mmlens.plots.contributions import VALUE_TITLE
from mmlens.plots.figure import Figure
from mmlens.plots.image_mesh import ImageMesh, ShownView
from mmlens.plots.style import NEGLIGIBLE, SLIDER_PIXELS, layout

if TYPE_CHECKING:
    from mmlens.analyses.attention_contribution import AttentionContribution
    from mmlens.inputs.multimodal_inputs import MultimodalInputs

#: images are shown with at most so many pixels on a side
MAX_SIDE = 1024
#: and as large as this on the screen
SCREEN_PIXELS = 520
#: how much of the image's darkness is left under the numbers
PALE = 0.4
#: and how much of its colours
COLOURED = 0.35
POSITIVE, NEGATIVE = "5,48,140", "179,78,6"


def overlay(
    values: AttentionContribution
    | Float[Tensor, "*layers_and_heads patch"]
    | Float[np.ndarray, "*layers_and_heads patch"],
    inputs: MultimodalInputs,
    *,
    image: int = 0,
    view: ShownView = 0,
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    frame: Box | None = None,
    value_title: str = "",
    title: str | None = None,
) -> Figure:
    """Draw a quantity of visual tokens over the image, with sliders over layers and heads.

    Every layer and head has its own colour scale, which the colour bar shows. A file of pixels
    shows the strongest layer and head.

    A model may see an image several times, whole and in tiles. With `view="all"` an area has the
    mean of the cells that show it, one of each view: no view hides another, and what two tokens of
    different size say is both seen. Such a mean is no token's own value; under the pointer stand
    the cells that it is made of, and `view=0`, `1`, ... shows the values themselves.

    Args:
        values: [patch], [layer, patch] or [layer, head, patch], patches in the order of the visual
            tokens (`inputs.span("image_0")`); or a contribution, of which the mean over
            destinations is shown.
        inputs: with the image, as `model.prepare` makes them; one prompt.
        image: which image, in reading order.
        view: which of its views, of which 0 shows all of the image at once; or "all" of them.
        layers: names of the layers; 0, 1, ... by default, or the contribution's own.
        heads: names of the heads.
        frame: where the patches of one view lie in the image; by default what the view says.
        value_title: what the values are.
        title: above the image.

    Raises:
        ValueError: another number of values than of visual tokens, more than three dimensions,
            names of another number, no image or view, or no telling where its patches lie; a
            contribution whose sources are not in what is shown.

    Example:
        >>> seen = attention_contribution(model, inputs, "image", "constraint", per_head=True)
        >>> overlay(seen, inputs).save("seen.html")
        >>> overlay(norms, inputs, layers=[3])    # [1, patch]: norms of one layer
        >>> overlay(seen, inputs, view="all")     # the whole image and its tiles together
    """
    if isinstance(values, np.ndarray):
        values = torch.tensor(values)
    shown, tokens = image_of(inputs, image), inputs.images[image]
    mesh = ImageMesh.of(tokens, view, frame)
    if isinstance(values, Tensor):
        of_tokens = token_values(values, tokens)
        value_title = value_title or "value"
    else:
        of_tokens = received_values(values, tokens, image)
        layers = values.layers if layers is None else layers
        value_title = value_title or VALUE_TITLE
    grids = mesh.mean(of_tokens)
    if not isinstance(values, Tensor) and np.isnan(grids).all():
        raise ValueError(f"no source of the contribution is a patch of image {image}, view {view}")
    names = [
        list(range(n)) if given is None else list(given)
        for n, given in zip(grids.shape[:2], (layers, heads), strict=True)
    ]
    if grids.shape[:2] != (len(names[0]), len(names[1])):
        raise ValueError(
            f"{grids.shape[0]} layers and {grids.shape[1]} heads, but {len(names[0])} and "
            f"{len(names[1])} names for them"
        )
    drawn = _Overlay(grids, mesh, shown, names[0], names[1], value_title)
    return drawn.figure(title)


def image_of(inputs: MultimodalInputs, image: int) -> Image.Image:
    """Return an image as it was given.

    Raises:
        ValueError: the inputs hold no such image.
    """
    if not inputs.images or inputs.images[0].image is None:
        raise ValueError("these inputs hold no image: model.prepare keeps it, tokens alone do not")
    if not 0 <= image < len(inputs.images):
        raise ValueError(f"image {image} of {len(inputs.images)}, counted from 0")
    found = inputs.images[image].image
    assert found is not None  # a prompt has all its images, or none
    return found


def token_values(
    values: Float[Tensor, "*layers_and_heads patch"], image: ImageTokens
) -> Float[np.ndarray, "layer head visual_token"]:
    """Return values of an image's visual tokens, with axes for layers and heads.

    Raises:
        ValueError: another number of values, or of axes.
    """
    n = len(image.positions)
    if values.ndim not in (1, 2, 3) or values.shape[-1] != n:
        raise ValueError(
            f"values of shape {tuple(values.shape)}: they must be [patch], [layer, patch] or "
            f"[layer, head, patch], with {n} visual tokens"
        )
    array = values.detach().float().cpu().numpy()
    array = array[None] if array.ndim < 2 else array
    return array[:, None] if array.ndim == 2 else array


def received_values(
    contribution: AttentionContribution, image: ImageTokens, number: int
) -> Float[np.ndarray, "layer head visual_token"]:
    """Return the mean over destinations of what comes from each visual token; NaN if it is unknown.

    Raises:
        ValueError: the contribution is that of an image with other patches.
    """
    if contribution.grids[number : number + 1] != (image.grids,):
        raise ValueError(
            f"the contribution is one of images with {contribution.grids} patches, but image "
            f"{number} of these inputs has {image.grids}"
        )
    means = contribution.values.float().mean(dim=-2)
    means = means if contribution.per_head else means[:, None]
    of_cell = {tuple(cell): i for i, cell in enumerate(image.cells[image.is_visual].tolist())}
    chosen = [
        (source, of_cell[patch[1:]])
        for source, patch in enumerate(contribution.source_patches)
        if patch[0] == number and patch[1] >= 0
    ]
    found = np.full((*means.shape[:-1], len(image.positions)), np.nan, dtype=np.float32)
    for source, token in chosen:
        found[..., token] = means[..., source]
    return found


@dataclass(frozen=True, eq=False)
class _Overlay:
    """What is drawn, and the pieces it is drawn from."""

    grids: Float[np.ndarray, "layer head row column"]
    mesh: ImageMesh
    background: Image.Image
    layers: list[int]
    heads: list[int]
    value_title: str

    def figure(self, title: str | None) -> Figure:
        """Draw the strongest layer and head, and sliders to the others."""
        sums = np.nansum(np.abs(self.grids), axis=(2, 3))
        layer, head = (int(i) for i in np.unravel_index(sums.argmax(), sums.shape))
        traces = [self._patches(layer, other, other == head) for other in range(len(self.heads))]
        figure = Figure(traces)
        sliders = self._sliders(layer, head)
        self._lay_out(figure, SLIDER_PIXELS * len(sliders))
        figure.update_layout(sliders=sliders, title_text=title)
        return figure

    def _patches(self, layer: int, head: int, shown: bool) -> go.Heatmap:
        return go.Heatmap(
            x=self.mesh.x,
            y=self.mesh.y,
            customdata=self.mesh.said(),
            visible=shown,
            hovertemplate="%{customdata}<br>%{z:.4g}<extra></extra>",
            colorbar={
                "title": {"text": self.value_title, "side": "right", "font": {"size": 12}},
                "thickness": 12,
                "outlinewidth": 0,
                "exponentformat": "power",
            },
            **self._numbers(layer, head),
        )

    def _numbers(self, layer: int, head: int) -> dict[str, Any]:
        """Return what differs between layers and heads."""
        grid = self.grids[layer, head]
        low, high = float(np.nan_to_num(grid).min()), float(np.nan_to_num(grid).max())
        unit = max(high, -low, 1e-6)
        signed = low < -NEGLIGIBLE * unit
        scale = [(0.0, f"rgba({POSITIVE},0)"), (1.0, f"rgba({POSITIVE},0.85)")]
        if signed:
            scale = [(0.5 + 0.5 * at, color) for at, color in scale]
            scale.insert(0, (0.0, f"rgba({NEGATIVE},0.85)"))
        return {"z": grid, "zmin": -unit if signed else 0.0, "zmax": unit, "colorscale": scale}

    def _moment(self, layer: int) -> dict[str, list[Any]]:
        """Return the numbers of one layer, of all heads; the other slider chooses which is seen."""
        numbers = [self._numbers(layer, head) for head in range(len(self.heads))]
        return {name: [each[name] for each in numbers] for name in numbers[0]}

    def _sliders(self, layer: int, head: int) -> list[dict[str, Any]]:
        def seen(head: int) -> dict[str, list[Any]]:
            return {"visible": [other == head for other in range(len(self.heads))]}

        both = [
            ("layer ", self.layers, layer, self._moment),
            ("head ", self.heads, head, seen),
        ]
        several = [each for each in both if len(each[1]) > 1]
        return [
            {
                "active": active,
                "steps": [
                    {"label": str(name), "method": "restyle", "args": [changes(at)]}
                    for at, name in enumerate(names)
                ],
                "currentvalue": {"prefix": prefix, "font": {"size": 12}},
                "pad": {"t": 12 + SLIDER_PIXELS * index},
                "font": {"size": 10},
                "ticklen": 3,
            }
            for index, (prefix, names, active, changes) in enumerate(several)
        ]

    def _lay_out(self, figure: Figure, below: int) -> None:
        """Put the image under the patches, in its own pixels, whole with its padding."""
        width, height = self.background.size
        frames = self.mesh.frames
        x = (min(0.0, *(f.left for f in frames)), max(float(width), *(f.right for f in frames)))
        y = (max(float(height), *(f.bottom for f in frames)), min(0.0, *(f.top for f in frames)))
        scale = SCREEN_PIXELS / max(x[1] - x[0], y[0] - y[1])
        hidden = {"visible": False, "showgrid": False, "zeroline": False}
        figure.update_xaxes(range=x, constrain="domain", **hidden)
        figure.update_yaxes(range=y, scaleanchor="x", constrain="domain", **hidden)
        content, kind = encoded(pale(self.background))
        figure.add_layout_image(
            source=f"data:image/{kind};base64,{base64.b64encode(content).decode()}",
            x=0,
            y=0,
            sizex=width,
            sizey=height,
            xref="x",
            yref="y",
            sizing="stretch",
            layer="below",
        )
        for frame in frames:
            figure.add_shape(
                type="rect",
                x0=frame.left,
                y0=frame.top,
                x1=frame.right,
                y1=frame.bottom,
                line={"color": "#777777", "width": 1},
            )
        margin = {"l": 20, "r": 110, "t": 70, "b": 20 + below}
        figure.update_layout(
            layout(
                width=round((x[1] - x[0]) * scale) + margin["l"] + margin["r"],
                height=round((y[0] - y[1]) * scale) + margin["t"] + margin["b"],
                margin=margin,
            )
        )


def pale(image: Image.Image) -> Image.Image:
    """Return the image, light and nearly grey, so that the numbers' colours stand out."""
    dull = ImageEnhance.Color(image).enhance(COLOURED)
    return dull.point(lambda level: round(255 - PALE * (255 - level)))


def encoded(image: Image.Image) -> tuple[bytes, str]:
    """Return an image, `MAX_SIDE` pixels a side at most, as PNG or the smaller JPEG, and which."""
    small = image.copy()
    small.thumbnail((MAX_SIDE, MAX_SIDE))
    files = {}
    for kind, options in (("png", {"optimize": True}), ("jpeg", {"quality": 88})):
        buffer = io.BytesIO()
        small.save(buffer, kind, **options)
        files[kind] = buffer.getvalue()
    kind = min(files, key=lambda name: len(files[name]))
    return files[kind], kind
