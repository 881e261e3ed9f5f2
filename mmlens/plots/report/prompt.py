"""`ReportedPrompt`: what a report shows of a prompt, and what results do not hold themselves."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import UInt8
from torch import Tensor

from mmlens.plots.geometry import picture_frame
from mmlens.plots.picture import encoded
from mmlens.results import SavedResult

if TYPE_CHECKING:
    from mmlens.inputs import MultimodalInputs
    from mmlens.model import HookedMultimodalTransformer


@dataclass(frozen=True, eq=False)
class ReportedPrompt(SavedResult):
    """A prompt with its picture and the answers to it.

    Example:
        >>> reported_prompt(model, clean, corrupted).save("prompt.safetensors")
    """

    picture: UInt8[Tensor, " byte"]
    """A PNG or JPEG file; empty where the prompt has no picture."""
    picture_kind: str
    """"png", "jpeg", or "" where there is none."""
    picture_size: tuple[int, int]
    """Width and height of the original, whose pixels `frame` is in."""
    frame: tuple[float, float, float, float] | None
    """Left, top, right and bottom of the patches; None where that is unknown."""
    grid_size: tuple[int, int] | None
    patches: tuple[tuple[int, int, int], ...]
    """Position, row and column of every visual token of the picture that is a patch."""
    labels: tuple[str, ...]
    """Of all positions."""
    text: str
    """The prompt, with `<image>` for the picture."""
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


@torch.no_grad()
def reported_prompt(
    model: HookedMultimodalTransformer,
    inputs: MultimodalInputs,
    corrupted: MultimodalInputs | None = None,
    *,
    corruption: str = "",
    image: int = 0,
    top: int = 8,
) -> ReportedPrompt:
    """What a report shows of a prompt. Costs a forward pass of each run.

    Args:
        inputs: one prompt, as `model.prepare` makes it; its span `constraint` is marked.
        corrupted: the corrupted run, for its probabilities.
        corruption: what it differs in, in words.
        image: which picture is shown.
        top: how many of the most probable next tokens.

    Raises:
        ValueError: several prompts, or no such picture.
    """
    if len(inputs) != 1:
        raise ValueError(f"a report shows one prompt, not {len(inputs)}")
    runs = [inputs] if corrupted is None else [inputs, corrupted]
    before, *after = (model(run)[:, -1].float().softmax(-1).mean(dim=0).cpu() for run in runs)
    best = before.topk(min(top, len(before))).indices.tolist()
    names = [str(token) for token in best] if model.tokenizer is None else model.to_str_tokens(best)
    content, kind, size, frame = b"", "", (0, 0), None
    if inputs.images:
        if not 0 <= image < len(inputs.images):
            raise ValueError(f"image {image} of {len(inputs.images)}, counted from 0")
        content, kind = encoded(inputs.images[image])
        size = inputs.images[image].size
        if model.image_processor is not None:
            frame = picture_frame(model, inputs, image)
    where = inputs.grid[0].tolist()
    return ReportedPrompt(
        picture=torch.tensor(list(content), dtype=torch.uint8),
        picture_kind=kind,
        picture_size=size,
        frame=frame,
        grid_size=inputs.grid_size,
        patches=tuple(
            (position, row, column)
            for position, (of, row, column) in enumerate(where)
            if of == image and row >= 0
        ),
        labels=tuple(inputs.labels()),
        spans={name: at.tolist() for name, at in inputs.spans[0].items()},
        text=inputs.texts[0] if inputs.texts else "",
        char_spans={name: list(ends) for name, ends in (inputs.char_spans or ({},))[0].items()},
        answers=tuple(
            (name, before[token].item(), after[0][token].item() if after else None)
            for name, token in zip(names, best, strict=True)
        ),
        corruption=corruption,
        metadata={"model": model.cfg.model_name},
    )
