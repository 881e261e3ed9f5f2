"""`ImageLayout`: how the images of a family become visual tokens, and what all layouts share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from PIL import Image
from torch import Tensor

from mmlens.inputs.checks import image_positions, shortened
from mmlens.inputs.image_tokens import Grid, ImageTokens
from mmlens.inputs.visual import Visual

if TYPE_CHECKING:
    from mmlens.config import MultimodalConfig
else:
    MultimodalConfig = Any  # anything with image_token_id and vision will do

BATCH_KEYS = (
    *("pixel_values", "image_sizes", "batch_num_images", "pixel_attention_mask"),
    *("image_grid_thw", "pixel_values_videos", "video_grid_thw", "image_sizes_videos"),
    "token_type_ids",
)
"""What transformers' processors return of images and videos; a layout refuses what is not its."""
NO_LABEL = -100
"""In transformers' labels, what stands where no token is to be predicted."""


def drop_what_is_known(batch: dict[str, Any]) -> None:
    """Take out of a processor's batch what says nothing more about its tokens and images.

    These are `mm_token_type_ids` (which ids are image tokens is known), and `labels` of no token,
    as PaliGemma's processor makes them of every prompt.
    """
    batch.pop("mm_token_type_ids", None)
    labels = batch.get("labels")
    if isinstance(labels, Tensor) and bool((labels == NO_LABEL).all()):
        batch.pop("labels")


@dataclass(frozen=True, eq=False)
class ProcessedImage:
    """One image, ready for a prompt."""

    visual: Mapping[str, Tensor]
    """What the tower takes, one image's."""
    ids: Sequence[int]
    """The token ids that stand where the prompt has `<image>`."""
    tokens: ImageTokens
    """Where its cells are, with `start` 0."""


@runtime_checkable
class ImageLayout(Protocol):
    """How images of one family become visual tokens."""

    def processed(
        self, image_processor: Any, tokenizer: Any, images: Sequence[Image.Image]
    ) -> list[ProcessedImage]:
        """Return the images of one prompt as the model takes them.

        Raises:
            ValueError: the image processor gives what the model does not take.
        """
        ...

    def random_image(self, generator: torch.Generator, *, small: bool = False) -> ProcessedImage:
        """Return an image of random pixels, of the size that the tower is made for.

        Args:
            generator: what they are drawn from.
            small: of few visual tokens, for what holds for every size.
        """
        ...

    def description(self) -> str:
        """How many visual tokens an image has, in words."""
        ...

    def located(
        self, tokens: Tensor, mask: Tensor, tokenizer: Any, batch: Mapping[str, Tensor]
    ) -> tuple[Visual | None, tuple[ImageTokens, ...]]:
        """Return what the tower takes, and the images of ready token ids [batch, pos].

        Args:
            mask: False at padding.
            batch: what transformers' processor returns beside the ids and the mask.

        Raises:
            ValueError: image tokens and pixels do not fit, or tensors that the model does not take.
        """
        ...


def placed_blocks(
    tokens: Tensor, image_token_id: int | None, lengths: Sequence[int]
) -> list[tuple[int, int]]:
    """Return the row and the first position of images whose visual tokens stand without a gap.

    Args:
        tokens: [batch, pos].
        image_token_id: the id of every visual token.
        lengths: how many visual tokens each image has, in reading order.

    Raises:
        ValueError: other numbers of image tokens, or an image that is not in one piece.
    """
    visual = image_positions(tokens, image_token_id).cpu()
    if int(visual.sum()) != sum(lengths):
        raise ValueError(
            f"tokens hold {int(visual.sum())} image tokens (id {image_token_id}), but the "
            f"{len(lengths)} image(s) have {' + '.join(map(str, lengths)) or 0} visual tokens; "
            "`tokens` must hold one entry for each, as transformers' processors write them"
        )
    found, waiting = [], list(lengths)
    for number, row in enumerate(visual):
        left = row.nonzero().flatten()
        while len(left):
            n = waiting.pop(0)
            block, left = left[:n], left[n:]
            if len(block) < n or int(block[-1] - block[0]) != n - 1:
                raise ValueError(
                    f"an image of row {number} has {n} visual tokens, but the image tokens there "
                    f"are {shortened(block)}: each image must be in one piece"
                )
            found.append((number, int(block[0])))
    return found


def check_known(batch: Mapping[str, Any], known: Sequence[str]) -> None:
    """Raise a ValueError for tensors that a model does not take."""
    if unknown := [name for name in batch if name not in known]:
        what = " (this model takes no videos)" if any("video" in name for name in unknown) else ""
        raise ValueError(
            f"this model's images are {', '.join(known)}; it does not take "
            f"{', '.join(unknown)}{what}"
        )


def check_pixels(pixel_values: Tensor, cfg: MultimodalConfig, any_size: bool = False) -> Grid:
    """Return rows and columns of patches; another size than the config's only where it is allowed.

    The tower interpolates its positions for another size, so whole patches are all it needs.

    Raises:
        ValueError: a model that sees no images, another shape, or integers.
    """
    if cfg.vision is None:
        raise ValueError("pixel values for a language model that sees none (cfg.vision is None)")
    patch = cfg.vision.patch_size
    channels, height, width = (getattr(cfg.vision, "n_channels", 3), *cfg.vision.image_size)
    shape = tuple(pixel_values.shape)
    whole = len(shape) == 4 and shape[2] % patch == 0 and shape[3] % patch == 0
    fits = shape[1:] == (channels, height, width) or (any_size and whole and shape[1] == channels)
    if len(shape) != 4 or not fits:
        others = f", or other sides that are multiples of {patch}" if any_size else ""
        raise ValueError(
            f"pixel values have shape {shape}, but this model takes [image, {channels}, {height}, "
            f"{width}] (image, channel, height, width){others}"
        )
    if not pixel_values.is_floating_point():
        raise ValueError(
            f"pixel values are {pixel_values.dtype}: give the floats that the image processor makes"
        )
    return shape[2] // patch, shape[3] // patch
