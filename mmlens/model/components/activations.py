"""Activation functions, by the names that transformers has for them."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.activations import ACT2FN


def is_activation(name: Any) -> bool:
    """Return whether transformers has an activation function of that name."""
    return isinstance(name, str) and name in ACT2FN


def activation(name: Any) -> nn.Module:
    """Return the activation function of that name.

    Raises:
        ValueError: transformers has none; the message names those that it has.
    """
    if not is_activation(name):
        raise ValueError(f"act_fn={name!r}; known are {', '.join(sorted(ACT2FN))}")
    return ACT2FN[name]
