"""Which runs, and what of them, a scan puts in an ablated part's place."""

from __future__ import annotations

from collections.abc import Sequence

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


def visual_tokens(runs: Sequence[Recording]) -> dict[str, Tensor]:
    """Return what runs hold of their visual tokens, of all of them together, by hook point."""
    found: dict[str, Tensor] = {}
    for name in runs[0].cache:
        axis = runs[0].model.SITES.of(name)[0].position_axis
        parts = [
            run.cache[name].index_select(axis, run.inputs.is_image[0].nonzero().flatten())
            for run in runs
        ]
        found[name] = torch.cat(parts, dim=axis)
    return found
