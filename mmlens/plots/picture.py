"""Numbers of visual tokens over the picture they were made from.

The picture is shown as it was given, but pale, so that the colours are those of the numbers;
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
from jaxtyping import Float
from PIL import Image, ImageEnhance
from plotly import graph_objects as go
from torch import Tensor

from mmlens.plots.figure import Figure
from mmlens.plots.geometry import Frame, picture_frame, picture_of
from mmlens.plots.style import NEGLIGIBLE, SLIDER_PIXELS, color_bar, layout

if TYPE_CHECKING:
    from mmlens.attribution import AttentionContribution
    from mmlens.inputs import MultimodalInputs
    from mmlens.model import HookedMultimodalTransformer

#: pictures are shown with at most so many pixels on a side
MAX_SIDE = 1024
#: and as large as this on the screen
SHOWN = 520
#: how much of the picture's darkness is left under the numbers
PALE = 0.4
#: and how much of its colours
COLOURED = 0.35
POSITIVE, NEGATIVE = "5,48,140", "179,78,6"


def overlay(
    values: AttentionContribution | Float[Tensor, "*layers_and_heads patch"],
    inputs: MultimodalInputs,
    model: HookedMultimodalTransformer | None = None,
    *,
    image: int = 0,
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    frame: Frame | None = None,
    value_title: str = "",
    title: str | None = None,
) -> Figure:
    """Draw a quantity of visual tokens over the picture, with sliders over layers and heads.

    Every layer and head has its own colour scale, which the colour bar shows. A file of pixels
    shows the strongest layer and head.

    Args:
        values: [patch], [layer, patch] or [layer, head, patch], patches in the order of the visual
            tokens (`inputs.span("image_0")`); or a contribution, of which the mean over
            destinations is shown.
        inputs: with the picture, as `model.prepare` makes them; one prompt.
        model: whose image processor tells where the patches lie in the picture.
        image: which picture, in reading order.
        layers: names of the layers; 0, 1, ... by default, or the contribution's own.
        heads: names of the heads.
        frame: where the patches lie, if there is no model.
        value_title: what the values are.
        title: above the picture.

    Raises:
        ValueError: another number of values than of visual tokens, more than three dimensions,
            names of another number, no picture, neither model nor frame.

    Example:
        >>> seen = attention_contribution(model, inputs, "image", "constraint", per_head=True)
        >>> overlay(seen, inputs, model).save("seen.html")
        >>> overlay(norms, inputs, model, layers=[3])    # [1, patch]: norms of one layer
    """
    picture = picture_of(inputs, image)
    if frame is None:
        if model is None:
            raise ValueError("give the model, or frame= to say where the patches lie")
        frame = picture_frame(model, inputs, image)
    if isinstance(values, Tensor):
        grids = patch_grids(values, inputs, image)
        value_title = value_title or "value"
    else:
        of_image = values.image_grid(image).float()
        grids = (of_image if values.per_head else of_image[:, None]).mean(dim=2).numpy()
        layers = values.layers if layers is None else layers
        value_title = value_title or "norm of what is received"
    names = [
        list(range(n)) if given is None else list(given)
        for n, given in zip(grids.shape[:2], (layers, heads), strict=True)
    ]
    if grids.shape[:2] != (len(names[0]), len(names[1])):
        raise ValueError(
            f"{grids.shape[0]} layers and {grids.shape[1]} heads, but {len(names[0])} and "
            f"{len(names[1])} names for them"
        )
    drawn = _Overlay(grids, frame, picture, names[0], names[1], value_title)
    return drawn.figure(title)


def patch_grids(
    values: Float[Tensor, "*layers_and_heads patch"], inputs: MultimodalInputs, image: int
) -> Float[np.ndarray, "layer head row column"]:
    """Values of the visual tokens of an image where they lie in it; NaN where there is none."""
    n, size = inputs.n_visual_tokens, inputs.grid_size or (0, 0)
    if values.ndim not in (1, 2, 3) or values.shape[-1] != n:
        raise ValueError(
            f"values of shape {tuple(values.shape)}: they must be [patch], [layer, patch] or "
            f"[layer, head, patch], with {n} visual tokens"
        )
    array = values.detach().float().cpu().numpy()
    array = array.reshape((1,) * (3 - array.ndim) + array.shape) if array.ndim < 2 else array
    array = array[:, None] if array.ndim == 2 else array
    row = inputs.grid[0].cpu().numpy()
    cells = row[row[:, 0] == image][:, 1:]
    grids = np.full((*array.shape[:2], *size), np.nan, dtype=np.float32)
    real = cells[:, 0] >= 0
    grids[..., cells[real, 0], cells[real, 1]] = array[..., real]
    return grids


@dataclass(frozen=True, eq=False)
class _Overlay:
    """What is drawn, and the pieces it is drawn from."""

    grids: Float[np.ndarray, "layer head row column"]
    frame: Frame
    picture: Image.Image
    layers: list[int]
    heads: list[int]
    value_title: str

    def figure(self, title: str | None) -> Figure:
        """The strongest layer and head, and sliders to the others."""
        sums = np.nansum(np.abs(self.grids), axis=(2, 3))
        layer, head = (int(i) for i in np.unravel_index(sums.argmax(), sums.shape))
        traces = [self._patches(layer, other, other == head) for other in range(len(self.heads))]
        figure = Figure(traces)
        sliders = self._sliders(layer, head)
        self._lay_out(figure, SLIDER_PIXELS * len(sliders))
        figure.update_layout(sliders=sliders, title_text=title)
        return figure

    def _patches(self, layer: int, head: int, shown: bool) -> go.Heatmap:
        n_rows, n_columns = self.grids.shape[2:]
        cells = np.indices((n_rows, n_columns)).transpose(1, 2, 0)
        return go.Heatmap(
            x=self.frame.columns(n_columns),
            y=self.frame.rows(n_rows),
            customdata=cells,
            visible=shown,
            hovertemplate="row %{customdata[0]}, column %{customdata[1]}<br>%{z:.4g}"
            "<extra></extra>",
            colorbar=color_bar(self.value_title),
            **self._numbers(layer, head),
        )

    def _numbers(self, layer: int, head: int) -> dict[str, Any]:
        """What differs between layers and heads."""
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
        """The numbers of one layer, a list of heads for each property.

        All heads change together; which of them is seen is for the other slider to say.
        """
        numbers = [self._numbers(layer, head) for head in range(len(self.heads))]
        return {name: [each[name] for each in numbers] for name in numbers[0]}

    def _sliders(self, layer: int, head: int) -> list[dict[str, Any]]:
        of_layers = [
            {"label": str(name), "method": "restyle", "args": [self._moment(index)]}
            for index, name in enumerate(self.layers)
        ]
        of_heads = [
            {
                "label": str(name),
                "method": "restyle",
                "args": [{"visible": [other == index for other in range(len(self.heads))]}],
            }
            for index, name in enumerate(self.heads)
        ]
        shown = [("layer ", of_layers, layer), ("head ", of_heads, head)]
        several = [each for each in shown if len(each[1]) > 1]
        return [
            {
                "active": active,
                "steps": steps,
                "currentvalue": {"prefix": prefix, "font": {"size": 12}},
                "pad": {"t": 12 + SLIDER_PIXELS * index},
                "font": {"size": 10},
                "ticklen": 3,
            }
            for index, (prefix, steps, active) in enumerate(several)
        ]

    def _lay_out(self, figure: Figure, below: int) -> None:
        """The picture under the patches, in its own pixels, whole with its padding."""
        width, height = self.picture.size
        frame = self.frame
        x = (min(0.0, frame.left), max(float(width), frame.right))
        y = (max(float(height), frame.bottom), min(0.0, frame.top))
        scale = SHOWN / max(x[1] - x[0], y[0] - y[1])
        hidden = {"visible": False, "showgrid": False, "zeroline": False}
        figure.update_xaxes(range=x, constrain="domain", **hidden)
        figure.update_yaxes(range=y, scaleanchor="x", constrain="domain", **hidden)
        figure.add_layout_image(
            source=data_uri(pale(self.picture)),
            x=0,
            y=0,
            sizex=width,
            sizey=height,
            xref="x",
            yref="y",
            sizing="stretch",
            layer="below",
        )
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


def pale(picture: Image.Image) -> Image.Image:
    """The picture, light and nearly without colours, which are those of the numbers."""
    dull = ImageEnhance.Color(picture).enhance(COLOURED)
    return dull.point(lambda level: round(255 - PALE * (255 - level)))


def data_uri(picture: Image.Image) -> str:
    """The picture inside a page, with at most `MAX_SIDE` pixels on a side."""
    content, kind = encoded(picture)
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def encoded(picture: Image.Image) -> tuple[bytes, str]:
    """A picture as PNG, or as JPEG where that is smaller; and which."""
    small = picture.copy()
    small.thumbnail((MAX_SIDE, MAX_SIDE))
    files = {}
    for kind, options in (("png", {"optimize": True}), ("jpeg", {"quality": 88})):
        buffer = io.BytesIO()
        small.save(buffer, kind, **options)
        files[kind] = buffer.getvalue()
    kind = min(files, key=lambda name: len(files[name]))
    return files[kind], kind
