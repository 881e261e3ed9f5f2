"""What is trained: an open_clip image tower and a LLaVA projector, and the pictures they see."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from augment import Augmentation, augment
from prepare import IMAGE_SIZE, MEAN, STD, TRAINED, UNSEEN
from safetensors.torch import load_file
from torch import Tensor, nn

PACKAGE = Path(__file__).parents[2] / "mmlens" / "demo"
VISION_CONFIG = {
    "image_size": IMAGE_SIZE,
    "patch_size": 16,
    "width": 192,
    "layers": 6,
    "head_width": 32,
    "mlp_ratio": 4.0,
}
EMBED_DIM = 192
LM_WIDTH = 576
N_VISUAL = 64
#: how often each rendering is drawn: circles show only a part of the flag
RENDERING_WEIGHTS = (0.36, 0.28, 0.26, 0.10)
PLAIN_SHARE = 0.25


class Projector(nn.Module):
    """The projector of Hugging Face's LLaVA."""

    def __init__(self) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(VISION_CONFIG["width"], LM_WIDTH)
        self.act = nn.GELU()
        self.linear_2 = nn.Linear(LM_WIDTH, LM_WIDTH)

    def hidden(self, features: Tensor) -> Tensor:
        return self.act(self.linear_1(features))

    def forward(self, features: Tensor) -> Tensor:
        return self.linear_2(self.hidden(features))


class Student(nn.Module):
    """Picture -> visual tokens for the language model, and a CLIP-like image embedding."""

    def __init__(self, n_countries: int) -> None:
        super().__init__()
        from open_clip.transformer import VisionTransformer

        settings: dict[str, Any] = dict(VISION_CONFIG)
        settings["heads"] = settings["width"] // settings.pop("head_width")
        self.visual = VisionTransformer(**settings, output_dim=EMBED_DIM)
        self.projector = Projector()
        self.country_embeddings = nn.Parameter(torch.randn(n_countries, EMBED_DIM))

    @classmethod
    def shipped(cls) -> "Student":
        """With the weights that are in the package."""
        weights = load_file(PACKAGE / "vision.safetensors")
        weights |= load_file(PACKAGE / "country_embeddings.safetensors")
        projector = load_file(PACKAGE / "projector.safetensors")
        weights |= {f"projector.{name}": tensor for name, tensor in projector.items()}
        student = cls(len(weights["country_embeddings"]))
        student.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
        return student.eval()

    def features(self, pixels: Tensor) -> Tensor:
        """[batch, 64, 192]: the patch tokens after the last block."""
        return self.visual.transformer(self.visual._embeds(pixels))[:, 1:]

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Visual tokens [batch, 64, 576] and country logits [batch, country]."""
        hidden = self.visual._embeds(pixels)
        hidden = self.visual.transformer(hidden)
        pooled = self.visual.ln_post(hidden[:, 0]) @ self.visual.proj
        image = nn.functional.normalize(pooled.float(), dim=-1)
        countries = nn.functional.normalize(self.country_embeddings, dim=-1)
        return self.projector(hidden[:, 1:]), 20 * image @ countries.T


@dataclass
class Pictures:
    """The drawn flags as tensors, and batches of them as the tower wants them."""

    codes: list[str]
    flat: Tensor
    plain: Tensor
    present: Tensor

    @classmethod
    def load(cls, folder: Path) -> "Pictures":
        """Read what `prepare.py` wrote."""
        data = np.load(folder / "pictures.npz")
        assert tuple(data["renderings"]) == (*TRAINED, UNSEEN)
        tensors = (torch.from_numpy(data[name]) for name in ("flat", "plain", "present"))
        return cls([str(code) for code in data["codes"]], *tensors)

    def training_batch(
        self, countries: Tensor, settings: Augmentation, rng: torch.Generator
    ) -> Tensor:
        """Normalised pixels of the countries, in trained renderings only, mostly augmented."""
        weights = self.present[countries, : len(TRAINED)] * torch.tensor(RENDERING_WEIGHTS)
        rendering = torch.multinomial(weights, 1, generator=rng)[:, 0]
        plain = torch.rand(len(countries), generator=rng) < PLAIN_SHARE
        pixels = torch.empty(len(countries), 3, IMAGE_SIZE, IMAGE_SIZE)
        pixels[plain] = bytes_to_pixels(self.plain[countries[plain], rendering[plain]])
        flags = self.flat[countries[~plain], rendering[~plain]]
        pixels[~plain] = augment(flags, settings, rng)
        return normalise(pixels)

    def clean(self, rendering: str, countries: Tensor | None = None) -> Tensor:
        """Normalised pixels of the plain pictures (a missing one is left out by `countries`)."""
        column = (*TRAINED, UNSEEN).index(rendering)
        pictures = self.plain[:, column]
        return normalise(bytes_to_pixels(pictures if countries is None else pictures[countries]))


def bytes_to_pixels(pictures: Tensor) -> Tensor:
    """[n, h, w, 3] bytes -> [n, 3, h, w] in 0..1."""
    return pictures.permute(0, 3, 1, 2).float() / 255


def normalise(pixels: Tensor) -> Tensor:
    """CLIP's normalisation."""
    return (pixels - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
