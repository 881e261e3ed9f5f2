"""Moving tensors to the device where they are needed."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(made: Tensor, device: torch.device) -> Tensor:
    """Move a small tensor, which was just made in main memory, to a device without waiting for it.

    The tensor must not be written to again. A GPU continues with its queue, and copies the tensor
    in its turn; a plain `.to(device)` returns only when the queue is empty. (Only CUDA promises
    that pageable memory has been read when the call returns.)
    """
    return made.to(device, non_blocking=device.type == "cuda")
