"""Errors of models in half precision, beside those of the reference in the same dtype."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from checkpoint_folders import load
from random_models import in_dtype
from torch import Tensor

from mmlens.model.transformer import HookedMultimodalTransformer


def rms_error(found: Tensor, exact: Tensor) -> float:
    """The root mean square error against a float64 result."""
    return float((found.double() - exact).pow(2).mean().sqrt())


def check_half_precision(ratios: Sequence[float], name: str = "error") -> None:
    """Assert that errors are at most 1.1 x those of the reference.

    Errors of single logits are noise, and so is the error of one model: a small change early on
    grows more in some models than in others, for both alike. So each model's root mean square error
    is divided by the reference's, and the statement is about the geometric mean of these ratios.
    """
    ratio = float(torch.tensor(ratios).log().mean().exp())
    print(f"{name} / the reference's: {ratio:.3f}, single models to {max(ratios):.2f}")
    assert ratio <= 1.1


@torch.no_grad()
def error_ratios(
    model: HookedMultimodalTransformer,
    hf: Any,
    batch: Mapping[str, Any],
    given: Mapping[str, Any],
    *,
    listening: bool,
    visual_tokens: Callable[[Any], Tensor] | None = None,
    eager: bool = False,
) -> dict[str, float]:
    """Divide a model's errors in half precision by transformers', both against a float64 run.

    Args:
        model: made of transformers' files, in half precision.
        hf: transformers' model in the same dtype. It is left in float64.
        batch: what the model is called with.
        given: what transformers' is called with.
        listening: whether all hooks listen; then transformers' attention is eager, too.
        visual_tokens: those in transformers' output, [visual_token, d_model].
        eager: whether transformers has no other attention than the eager one.

    Returns:
        The ratio for `"logits"`, and for `"visual tokens"` where they are given.
    """
    dtype, real = model.cfg.dtype, batch["attention_mask"].bool()
    assert dtype.itemsize == 2 and model.W_E.dtype == hf.dtype == dtype

    def theirs(given: Mapping[str, Any]) -> dict[str, Tensor]:
        output = hf(**given)
        found = {"logits": output.logits[real]}
        return found if visual_tokens is None else found | {"visual tokens": visual_tokens(output)}

    names = None if listening else ["projector.hook_out"]
    logits, cache = model.run_with_cache(**batch, names_filter=names)
    assert logits.dtype == dtype
    ours = {"logits": logits[real], "visual tokens": cache["projector.hook_out"][0]}
    hf.set_attn_implementation("eager" if eager or listening else "sdpa")
    others = theirs(given)
    rounded = batch["pixel_values"].to(dtype).double()  # both towers begin with this
    hf = in_dtype(hf, torch.float64)
    # Eager attention takes its softmax in float32.
    hf.set_attn_implementation("eager" if eager else "sdpa")
    exact = theirs({**given, "pixel_values": rounded})
    return {
        name: rms_error(ours[name], right) / rms_error(others[name], right)
        for name, right in exact.items()
    }


def check_towers_and_logits(
    families: Sequence[Any],
    written: Callable[[Any, Path, torch.dtype, random.Random], tuple[Any, Any, Any]],
    visual_tokens: Callable[[Any], Tensor],
    *,
    dtype: torch.dtype,
    listening: bool,
    seed: int,
    folder: Path,
    n: int = 36,
) -> None:
    """Check logits and visual tokens of random checkpoints in half precision.

    Args:
        families: which, one after the other.
        written: writes one of a family into a folder, and gives transformers' model in that dtype,
            the batch, and what transformers is called with.
        visual_tokens: as in `error_ratios`.
        dtype: of the weights.
        listening: as in `error_ratios`.
        seed: of the batches.
        folder: where checkpoints go.
        n: how many.
    """
    ratios = []
    for index in range(n):
        place = folder / str(index)
        hf, batch, given = written(
            families[index % len(families)], place, dtype, random.Random(seed + index)
        )
        ratios.append(
            error_ratios(
                load(place), hf, batch, given, listening=listening, visual_tokens=visual_tokens
            )
        )
    for name in ("logits", "visual tokens"):
        check_half_precision([each[name] for each in ratios], name)
