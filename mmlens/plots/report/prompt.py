"""`ReportedPrompt`: what a report shows of a prompt, and what results do not hold themselves."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import UInt8
from torch import Tensor

from mmlens.analyses.arguments import token_names
from mmlens.analyses.result import SavedResult
from mmlens.inputs.image_tokens import Box
from mmlens.plots.overlay import encoded, image_of
from mmlens.utils.grad_mode import without_gradients

if TYPE_CHECKING:
    from mmlens.inputs.multimodal_inputs import MultimodalInputs
    from mmlens.model.transformer import HookedMultimodalTransformer


@dataclass(frozen=True, eq=False)
class ReportedPrompt(SavedResult):
    """A prompt with its image and the answers to it.

    Example:
        >>> reported_prompt(model, clean, corrupted).save("prompt.safetensors")
    """

    image_file: UInt8[Tensor, " byte"]
    """A PNG or JPEG file; empty where the prompt has no image."""
    image_kind: str
    """"png", "jpeg", or "" where there is none."""
    image_size: tuple[int, int]
    """Width and height of the original, whose pixels `frames` are in."""
    frames: tuple[tuple[float, float, float, float], ...]
    """Left, top, right and bottom of each view's patches; empty where that is unknown."""
    grids: tuple[tuple[int, int], ...]
    """Rows and columns of patches of each view."""
    patches: tuple[tuple[int, int, int, int], ...]
    """Position, view, row and column of every visual token of the image that is a patch."""
    labels: tuple[str, ...]
    """Of all positions."""
    text: str
    """The prompt, with `<image>` for the image."""
    spans: dict[str, list[int]]
    """Positions of named spans: `constraint`, `question`, `last`, ..."""
    char_spans: dict[str, list[int]]
    """Where those that were found in the text begin and end in it."""
    answers: tuple[tuple[str, float, float | None], ...]
    """The clean run's most probable next tokens: text, probability, that of the corrupted run."""
    corruption: str = ""
    """What the corrupted run differs in, in words."""
    metadata: dict[str, Any] = field(default_factory=dict)
    """Model."""


@without_gradients
def reported_prompt(
    model: HookedMultimodalTransformer,
    inputs: MultimodalInputs,
    corrupted: MultimodalInputs | None = None,
    *,
    corruption: str = "",
    image: int = 0,
    top: int = 8,
) -> ReportedPrompt:
    """Collect what a report shows of a prompt, with a forward pass of each run.

    Args:
        inputs: one prompt, as `model.prepare` makes it; its span `constraint` is marked.
        corrupted: the corrupted run, for its probabilities.
        corruption: what it differs in, in words.
        image: which image is shown.
        top: how many of the most probable next tokens.

    Raises:
        ValueError: several prompts, or no such image.
    """
    if len(inputs) != 1:
        raise ValueError(f"a report shows one prompt, not {len(inputs)}")
    runs = [inputs] if corrupted is None else [inputs, corrupted]
    before, *after = (model(run)[:, -1].float().softmax(-1).mean(dim=0).cpu() for run in runs)
    best = before.topk(min(top, len(before))).indices.tolist()
    names = token_names(model, best)
    content, kind, size = b"", "", (0, 0)
    frames: tuple[Box, ...] = ()
    if inputs.images and inputs.images[0].image is not None:
        shown = image_of(inputs, image)
        content, kind = encoded(shown)
        size = shown.size
        frames = tuple(view.box for view in inputs.images[image].views if view.box is not None)
    where = inputs.grid[0].tolist()
    return ReportedPrompt(
        image_file=torch.tensor(list(content), dtype=torch.uint8),
        image_kind=kind,
        image_size=size,
        frames=frames,
        grids=inputs.images[image].grids if inputs.images else (),
        patches=tuple(
            (position, view, row, column)
            for position, (of, view, row, column) in enumerate(where)
            if of == image and view >= 0
        ),
        labels=tuple(inputs.labels()),
        spans={name: at.tolist() for name, at in inputs.spans[0].items()},
        text=inputs.texts[0] if inputs.texts else "",
        char_spans={name: list(ends) for name, ends in (inputs.char_spans or ({},))[0].items()},
        answers=tuple(
            (names[str(token)], before[token].item(), after[0][token].item() if after else None)
            for token in best
        ),
        corruption=corruption,
        metadata={"model": model.cfg.model_name},
    )
