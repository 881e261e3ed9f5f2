"""Tensors on the device where they are needed, and positions in any form as one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor


def to_device(made: Tensor, device: torch.device) -> Tensor:
    """Move a small tensor, which was just made in main memory, to a device without waiting for it.

    The tensor must not be written to again. A GPU continues with its queue, and copies the tensor
    in its turn; a plain `.to(device)` returns only when the queue is empty. (Only CUDA promises
    that pageable memory has been read when the call returns.)
    """
    return made.to(device, non_blocking=device.type == "cuda")


def flat_positions(given: Any, what: str = "positions") -> Int[Tensor, " n"]:
    """Return positions, given as numbers in any form, one after the other and on the CPU.

    Raises:
        TypeError: a mask, floats or a text. As whole numbers they would be other positions: a mask
            would be positions 0 and 1.

    Example:
        >>> flat_positions(range(3, 6)), flat_positions(inputs.span("last"))
    """
    if isinstance(given, str):
        raise TypeError(
            f"positions are numbers, not {given!r}; those of a span are inputs.span({given!r})"
        )
    if isinstance(given, Iterable) and not isinstance(given, Tensor | np.ndarray | Sequence):
        given = list(given)
    found = torch.as_tensor(given)
    if not found.numel():  # an empty list is one of floats
        return torch.zeros(0, dtype=torch.long)
    if found.dtype == torch.bool or found.is_floating_point() or found.is_complex():
        mask = "; for a mask, mask.nonzero()" if found.dtype == torch.bool else ""
        raise TypeError(f"{what} are integers, not {found.dtype}{mask}")
    return found.flatten().long().cpu()


def listed_numbers(given: Any, what: str = "layers") -> list[int]:
    """Return one number or several (also numpy's or torch's, or those of a generator) as a list.

    Raises:
        TypeError: as `flat_positions`.
    """
    return [given] if type(given) is int else flat_positions(given, what).tolist()
