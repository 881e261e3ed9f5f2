"""Which runs, and what of them, a scan puts in an ablated part's place."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from mmlens.branching.recording import Recording
from mmlens.inputs.common_prefix import common_prefix
from mmlens.inputs.multimodal_inputs import MultimodalInputs


def without(prompt: MultimodalInputs, runs: Sequence[Recording]) -> list[Recording]:
    """Return runs of other prompts: resampled from itself a part would seem to do nothing."""
    found = [
        run
        for run in runs
        if run.inputs is not prompt
        and (
            not torch.equal(run.inputs.tokens, prompt.tokens)
            or common_prefix(run.inputs, prompt) < prompt.n_pos
        )
    ]
    if not found:
        raise ValueError("by='resample', but all references are the prompt itself")
    return found


def check_no_padding(
    prompt: MultimodalInputs, runs: Sequence[Recording], places: Iterable[Tensor | None]
) -> None:
    """Raise a ValueError where a prompt would be given activations of padding.

    Args:
        places: the positions that are ablated; None stands for all.
    """
    real = prompt.attention_mask[0].cpu()
    asked = torch.zeros_like(real)
    for positions in places:
        asked[slice(None) if positions is None else positions] = True
    for run in runs:
        padding = ~run.inputs.attention_mask.cpu()
        n = min(len(real), padding.shape[1])
        if found := (padding[:, :n].any(dim=0) & (real & asked)[:n]).nonzero().flatten().tolist():
            raise ValueError(
                f"by='resample' takes activations at the same position, and positions "
                f"{found[:8]} are padding in one of the references: give references without "
                "padding, or other positions"
            )


def visual_tokens(runs: Sequence[Recording]) -> dict[str, Tensor]:
    """Return what runs hold of their visual tokens, of all rows together as one, by hook point."""
    found: dict[str, Tensor] = {}
    for name in runs[0].cache:
        axis = runs[0].model.SITES.of(name)[0].position_axis
        parts = []
        for run in runs:
            by_position = run.cache[name].movedim(axis, 1)
            is_image = run.inputs.is_image.expand(len(by_position), -1)
            parts.append(by_position[is_image.to(by_position.device)])
        found[name] = torch.cat(parts)[None].movedim(1, axis)
    return found
