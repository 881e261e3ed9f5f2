"""Which layers of a decoder attend to a window, as transformers' `layer_types` says it."""

from __future__ import annotations

from collections.abc import Sequence

from mmlens.checkpoints.errors import CheckpointError

KINDS = {"sliding_attention": "local", "full_attention": "global"}


def attn_types(layer_types: Sequence[str]) -> tuple[str, ...]:
    """Return the kind of each layer in our terms.

    Raises:
        CheckpointError: layers of another kind.
    """
    if unknown := set(layer_types) - set(KINDS):
        raise CheckpointError(
            f"layer_types has {', '.join(sorted(unknown))}, which is not supported"
        )
    return tuple(KINDS[kind] for kind in layer_types)
