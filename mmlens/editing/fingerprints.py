"""By which weights are known: hashes of their values, as they are and rounded to other dtypes."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["disagreement", "fingerprint", "fingerprints", "first_hash", "in_common"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""What a model may be loaded as."""
SHOWN = 12
"""Characters of a hash in a message."""


def fingerprint(weight: Float[Tensor, "*shape"]) -> str:
    """Return a hash of shape and values: the same for bfloat16 weights and their float32 copy."""
    wide = weight.detach().to("cpu", torch.promote_types(weight.dtype, torch.float32)).contiguous()
    digest = hashlib.sha256(str(tuple(wide.shape)).encode())
    digest.update(wide.flatten().numpy().data)
    return digest.hexdigest()


def fingerprints(weight: Float[Tensor, "*shape"]) -> dict[str, str]:
    """Return `fingerprint` by dtype: of the weight as it is, first, then of its roundings.

    A weight is rounded to the dtypes that are not wider than its own, so that the same checkpoint,
    loaded in another dtype, is known again (`disagreement`).
    """
    rounded = [dtype for dtype in DTYPES if dtype.itemsize <= weight.dtype.itemsize]
    kinds = dict.fromkeys([weight.dtype, *rounded])
    return {name_of(dtype): fingerprint(weight.detach().to(dtype)) for dtype in kinds}


def disagreement(weight: Float[Tensor, "*shape"], expected: Mapping[str, str]) -> str:
    """Return how a weight differs from the one that fingerprints are of; nothing if it does not.

    They are compared in the coarser of both dtypes: a float32 weight and its bfloat16 copy are the
    same weight.
    """
    here, there = name_of(weight.dtype), next(iter(expected))
    compared = here if here in expected else there
    found = fingerprint(weight.detach().to(getattr(torch, compared)))
    if found == expected[compared]:
        return ""
    was = f"{there} there and {here} here, " if here != there else ""
    hashes = f"{found[:SHOWN]} here and was {expected[compared][:SHOWN]} there"
    return f"is {was}and its hash as {compared} is {hashes}" if was else f"has the hash {hashes}"


def in_common(one: Mapping[str, str], other: Mapping[str, str]) -> dict[str, str]:
    """Return the fingerprints that two weights share; none if they are different weights.

    As in `disagreement`, the coarser of both dtypes decides.
    """
    mine, theirs = next(iter(one)), next(iter(other))
    compared = mine if mine in other else theirs
    if one.get(compared) != other[compared]:
        return {}
    return {dtype: found for dtype, found in one.items() if other.get(dtype) == found}


def first_hash(hashes: Mapping[str, str]) -> str:
    """Return the first fingerprint and its dtype, for error messages."""
    dtype, found = next(iter(hashes.items()))
    return f"{found[:SHOWN]} ({dtype})"


def name_of(dtype: torch.dtype) -> str:
    """Return the name that torch has for a dtype."""
    return str(dtype).removeprefix("torch.")
