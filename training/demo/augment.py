"""Fast augmentation of a batch of flags on the CPU: one grid_sample for all the geometry.

A flag is photographed: turned, tilted, waved by wind, shaded, tinted, blurred, partly hidden, in
front of something. It is never flipped (Monaco is not Poland).
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

Grid = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Augmentation:
    """The strength of everything."""

    size: int = 128
    turn: float = 0.2  #: radians, standard deviation / 2
    stretch: float = 0.15
    shear: float = 0.1
    tilt: float = 0.18
    zoom: tuple[float, float] = (0.62, 1.12)  #: long side of the flag / side of the picture
    wave: float = 0.06
    shade: float = 0.35
    tint: float = 0.12
    shades: float = 0.0  #: how far the colours of a drawing differ from those of another
    noise: float = 0.05


def uniform(shape: tuple[int, ...], low: float, high: float, rng: torch.Generator) -> Tensor:
    """Uniform random numbers."""
    return torch.rand(shape, generator=rng) * (high - low) + low


def chosen(batch: int, probability: float, rng: torch.Generator) -> Tensor:
    """[batch, 1, 1, 1] zeros and ones."""
    return (torch.rand((batch, 1, 1, 1), generator=rng) < probability).float()


def _photograph(batch: int, settings: Augmentation, rng: torch.Generator) -> Grid:
    """For every pixel of the picture, the point of the flag that it shows."""
    line = (torch.arange(settings.size) + 0.5) / settings.size * 2 - 1
    y, x = torch.meshgrid(line, line, indexing="ij")
    column = (batch, 1, 1)
    shift = uniform((2, *column), -0.1, 0.1, rng)
    angle = uniform(column, -settings.turn, settings.turn, rng)
    size = uniform(column, *settings.zoom, rng)
    stretch = torch.exp(uniform(column, -settings.stretch, settings.stretch, rng) / 2)
    shear = uniform((2, *column), -settings.shear, settings.shear, rng)
    tilt = uniform((2, *column), -settings.tilt, settings.tilt, rng)
    u = (torch.cos(angle) * x - torch.sin(angle) * y) - shift[0]
    v = (torch.sin(angle) * x + torch.cos(angle) * y) - shift[1]
    u, v = u + shear[0] * v, v + shear[1] * u
    depth = 1 + tilt[0] * u + tilt[1] * v
    return u / (depth * size * stretch), v * stretch / (depth * size)


def _wave(
    u: Tensor, v: Tensor, settings: Augmentation, rng: torch.Generator
) -> tuple[Grid, Tensor]:
    """Cloth: a wave that runs over the flag, with light and shadow on its slopes."""
    column = (u.shape[0], 1, 1)
    waved = (torch.rand(column, generator=rng) < 0.5).float()
    height = uniform(column, 0, settings.wave, rng) * waved
    angle, start = uniform((2, *column), -math.pi, math.pi, rng)
    frequency = uniform(column, 1.5, 6.0, rng)
    phase = frequency * (torch.cos(angle / 3) * u + torch.sin(angle / 3) * v) + start
    light = 1 + waved * uniform(column, 0, settings.shade, rng) * torch.cos(phase)
    swing = height * torch.sin(phase)
    return (u + 0.5 * swing * torch.sin(angle), v + swing), light


def _background(batch: int, settings: Augmentation, rng: torch.Generator) -> Tensor:
    """Grey as in the letterbox, one colour, or coloured blobs at one of three scales."""
    size = (settings.size, settings.size)
    colour = torch.rand((batch, 3, 1, 1), generator=rng)
    blobs = torch.zeros(batch, 3, *size)
    which = torch.randint(3, (batch,), generator=rng)
    for kind, cells in enumerate((2, 6, 24)):
        rows = (which == kind).nonzero()[:, 0]
        if len(rows):
            coarse = torch.rand((len(rows), 3, cells, cells), generator=rng)
            blobs[rows] = F.interpolate(coarse, size, mode="bilinear")
    plain, busy = chosen(batch, 0.4, rng), chosen(batch, 0.6, rng)
    mixed = busy * (0.3 * colour + 0.7 * blobs) + (1 - busy) * colour
    return plain * (127 / 255) + (1 - plain) * mixed


def _tint(picture: Tensor, settings: Augmentation, rng: torch.Generator) -> Tensor:
    """Brightness, contrast, saturation and the colour of the light."""
    batch, column = picture.shape[0], (picture.shape[0], 1, 1, 1)
    amount = settings.tint * (1 - chosen(batch, 0.2, rng))
    mixing = torch.eye(3) + settings.shades * torch.randn((batch, 3, 3), generator=rng)
    picture = (mixing @ picture.flatten(2)).view_as(picture).clamp(0, 1)
    picture = picture ** torch.exp(3 * settings.shades * uniform(column, -1, 1, rng))
    gain = 1 + amount * uniform((batch, 3, 1, 1), -1, 1, rng)
    bright = 1 + 2 * amount * uniform(column, -1, 1, rng)
    contrast = 1 + 2.5 * amount * uniform(column, -1, 1, rng)
    saturation = 1 + 3.5 * amount * uniform(column, -1, 1, rng)
    grey = picture.mean(1, keepdim=True)
    picture = grey + (picture - grey) * saturation
    middle = grey.mean((2, 3), keepdim=True)
    return ((picture - middle) * contrast + middle) * gain * bright


def _blur(picture: Tensor, rng: torch.Generator) -> Tensor:
    """A third of the pictures loses detail: shrunk and drawn large again."""
    size = picture.shape[-1]
    group = torch.randint(9, (picture.shape[0],), generator=rng)
    for kind, small in enumerate((40, 56, 80)):
        rows = (group == kind).nonzero()[:, 0]
        if len(rows):
            shrunk = F.interpolate(picture[rows], (small, small), mode="area")
            picture[rows] = F.interpolate(shrunk, (size, size), mode="bilinear")
    return picture


def _hide(picture: Tensor, rng: torch.Generator) -> Tensor:
    """A quarter of the pictures has a rectangle of up to a third of the side hidden."""
    batch, size = picture.shape[0], picture.shape[-1]
    line = torch.arange(size) / size
    corner = uniform((2, batch, 1), -0.1, 0.9, rng)
    side = uniform((2, batch, 1), 0.08, 0.33, rng)
    down, along = ((line >= corner) & (line < corner + side)).float()
    hidden = down[:, None, :, None] * along[:, None, None, :] * chosen(batch, 0.25, rng)
    return picture * (1 - hidden) + hidden * torch.rand((batch, 3, 1, 1), generator=rng)


def augment(flags: Tensor, settings: Augmentation, rng: torch.Generator) -> Tensor:
    """[batch, 192, 192, 4] bytes -> [batch, 3, size, size] in 0..1."""
    batch = flags.shape[0]
    rgba = flags.permute(0, 3, 1, 2).float() / 255
    alpha = rgba[:, 3:]
    rgba = torch.cat([rgba[:, :3] * alpha, alpha], 1)
    (u, v), light = _wave(*_photograph(batch, settings, rng), settings, rng)
    seen = F.grid_sample(rgba, torch.stack([u, v], -1), align_corners=False)
    colour, alpha = seen[:, :3] * light[:, None], seen[:, 3:]
    picture = colour + (1 - alpha) * _background(batch, settings, rng)
    picture = _hide(_blur(_tint(picture, settings, rng), rng), rng)
    grain = settings.noise * torch.rand((batch, 1, 1, 1), generator=rng)
    picture = picture + grain * torch.randn(picture.shape, generator=rng)
    return picture.clamp(0, 1)
