"""Rotary position embedding (Su et al. 2021), with Hugging Face's rules for longer contexts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from mmlens.config import MultimodalConfig

# `dynamic` and `longrope` change the frequencies with the length of the input, so that a position
# would mean something else in a run that branches from another.
SUPPORTED = ("default", "linear", "llama3", "yarn")

CosSin = tuple[Float[Tensor, "some pos 1 rotary_dim"], Float[Tensor, "some pos 1 rotary_dim"]]
Angles = Mapping[str, CosSin]
"""Cosines and sines of all positions of a pass, by the kind of layer that rotates by them."""


class Rotary:
    """Rotates pairs (i, i + rotary_dim/2) of each head by an angle that grows with the position.

    Not a module: it holds no parameters, and computes its angles in float32 whatever the model's
    dtype, as Hugging Face does.
    """

    def __init__(self, cfg: MultimodalConfig, parameters: Mapping[str, Any]) -> None:
        self.rope_type = parameters.get("rope_type", "default")
        if self.rope_type not in SUPPORTED:
            raise ValueError(
                f"rope_type {self.rope_type!r} is not supported; these are: {', '.join(SUPPORTED)}"
            )
        self.rotary_dim = cfg.rotary_dim
        # A model may be built on the meta device; its angles are needed all the same.
        try:
            with torch.device("cpu"):
                self.inv_freq, self.attention_scaling = frequencies(cfg, parameters)
            finite = bool(self.inv_freq.isfinite().all()) and math.isfinite(self.attention_scaling)
        except (TypeError, KeyError, ArithmeticError, RuntimeError) as error:
            raise ValueError(f"rope_parameters {dict(parameters)}: {error!r}") from error
        if not finite:
            raise ValueError(f"rope_parameters {dict(parameters)} give no finite angles")
        with torch.device("cpu"):
            self.axes = axes_of(parameters, cfg.rotary_dim // 2)

    def cos_sin(self, positions: Int[Tensor, "*axis batch pos"], dtype: torch.dtype) -> CosSin:
        """Cosine and sine of every position's angles; once per forward pass, for all layers.

        Args:
            positions: on one axis, with or without it in the shape; or on three, of which each
                pair takes its own (M-RoPE).
            dtype: of what is returned.

        Raises:
            ValueError: three axes for a model whose positions have one.
        """
        self.inv_freq = self.inv_freq.to(positions.device)
        if positions.ndim == 3 and len(positions) == 1:
            positions = positions[0]
        if positions.ndim == 3:
            if self.axes is None or len(positions) != 3:
                raise ValueError(
                    f"rotary positions of {len(positions)} axes; this model's have "
                    f"{'one' if self.axes is None else 'one or three'}"
                )
            by_pair = positions[self.axes.to(positions.device)].movedim(0, -1)
        else:
            by_pair = positions[..., None]
        angles = by_pair.float() * self.inv_freq
        angles = torch.cat([angles, angles], dim=-1)[:, :, None, :]
        scale = self.attention_scaling
        return (angles.cos() * scale).to(dtype), (angles.sin() * scale).to(dtype)


def axes_of(rope: Mapping[str, Any], n_pairs: int) -> Int[Tensor, " pair"] | None:
    """Which axis (0 time, 1 row, 2 column) rotates each pair; None without M-RoPE.

    `mrope_section` says how many pairs each axis has: one after the other (Wang et al. 2024), or,
    with `mrope_interleaved`, in turns of three so long as an axis has some left, and the time's
    after that (Qwen3-VL).

    Raises:
        ValueError: sections that are not three counts of all pairs.
    """
    if (section := rope.get("mrope_section")) is None:
        return None
    counts = list(section) if isinstance(section, list | tuple) else []
    if (
        len(counts) != 3
        or any(type(n) is not int or n < 0 for n in counts)
        or sum(counts) != (n_pairs)
    ):
        raise ValueError(
            f"mrope_section is {section!r}; it must be three numbers of pairs (time, row, column) "
            f"whose sum is {n_pairs}"
        )
    if not rope.get("mrope_interleaved"):
        return torch.tensor([axis for axis, n in enumerate(counts) for _ in range(n)])
    axes = torch.zeros(n_pairs, dtype=torch.long)
    for axis in (1, 2):
        axes[axis : 3 * counts[axis] : 3] = axis
    return axes


def frequencies(
    cfg: MultimodalConfig, rope: Mapping[str, Any]
) -> tuple[Float[Tensor, " half_rotary_dim"], float]:
    """The angle per position of every rotated pair, and what cosine and sine are scaled by."""
    if rope.get("rope_type", "default") == "default":
        exponent = torch.arange(0, cfg.rotary_dim, 2).float() / cfg.rotary_dim
        return 1.0 / rope["rope_theta"] ** exponent, 1.0
    description = PreTrainedConfig(
        hidden_size=cfg.d_model,
        num_attention_heads=cfg.n_heads,
        head_dim=cfg.d_head,
        max_position_embeddings=cfg.n_ctx,
        rope_parameters=dict(rope),
    )
    return ROPE_INIT_FUNCTIONS[rope["rope_type"]](description, torch.device("cpu"))


def rotate(
    x: Float[Tensor, "batch pos head d_head"],
    cos: Float[Tensor, "rows pos 1 rotary_dim"],
    sin: Float[Tensor, "rows pos 1 rotary_dim"],
) -> Float[Tensor, "batch pos head d_head"]:
    """`x` with the first `rotary_dim` dimensions of each head rotated, the others as they are.

    Where cosine and sine are in float32 it is rotated so, and rounded once.
    """
    half = cos.shape[-1] // 2  # both halves have the same angles
    cos, sin = cos[..., :half], sin[..., :half]
    first, second, untouched = x.tensor_split([half, 2 * half], dim=-1)
    parts = [
        torch.addcmul(first * cos, second, sin, value=-1),
        torch.addcmul(second * cos, first, sin),
    ]
    rotated = torch.cat([*parts, untouched] if untouched.shape[-1] else parts, dim=-1)
    return rotated.to(x.dtype)


def grid_cos_sin(
    places: Int[Tensor, "pos 2"], d_head: int, base: float
) -> tuple[Float[Tensor, "1 pos 1 d_head"], Float[Tensor, "1 pos 1 d_head"]]:
    """Return cosine and sine of the angles of places on a grid, in float32.

    Of the pairs (i, i + d_head/2) that `rotate` turns, the first half is turned by the row and the
    second by the column (Wang et al. 2024, "Qwen2-VL", 2.1; transformers,
    `modeling_qwen2_vl.py`, `Qwen2VLVisionRotaryEmbedding`).

    Args:
        places: row and column.
    """
    half = d_head // 2
    exponent = torch.arange(0, half, 2, device=places.device).float() / half
    angles = (places[..., None].float() * (1.0 / base**exponent)).flatten(1)
    angles = torch.cat([angles, angles], dim=-1)[None, :, None]
    return angles.cos(), angles.sin()
