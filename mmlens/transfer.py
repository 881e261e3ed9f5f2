"""Moving what was made in main memory to where it is needed."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(made: Tensor, device: torch.device) -> Tensor:
    """A small tensor that was just made in main memory, and is not written to again, on a device.

    A GPU is not waited for: it goes on with what it has been given, and gets this in its turn.
    A plain `.to(device)` returns only when it has done everything before. (Only CUDA promises that
    pageable memory has been read when the call returns.)
    """
    return made.to(device, non_blocking=device.type == "cuda")
