"""A whole model: the decoder, and what it sees with."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Bool
from torch import Tensor

from mmlens.config.blocks import TransformerConfig
from mmlens.config.checks import check_cap, check_sizes, is_finite
from mmlens.config.images import ProjectorConfig, VisionConfig


@dataclass(kw_only=True)
class MultimodalConfig(TransformerConfig):
    """A decoder and, unless it is a language model alone, what it sees with."""

    d_vocab: int
    n_ctx: int
    decoder_type: str = "llama"
    """transformers' `model_type`: by it `checkpoints.decoders` finds the names of a decoder."""
    rope_parameters: dict[str, Any] = field(default_factory=lambda: {"rope_theta": 10000.0})
    """Hugging Face's own description of the rotary embedding: `rope_theta`, `rope_type`, ..."""
    local_rope_parameters: dict[str, Any] | None = None
    """The same of "local" layers, where it is another one (Gemma 3)."""
    first_rope_position: int = 0
    """What rotary positions begin at (PaliGemma: 1)."""
    attention_blocks: Literal["image", "prompt"] | None = None
    """Which positions attend to each other in both directions: those of each image (Gemma 3), or
    the whole prompt (PaliGemma); see `mmlens.model.components.attention_rule`."""
    embed_scale: float = 1.0
    """What token embeddings are multiplied by (Gemma: the square root of `d_model`)."""
    logits_scale: float = 1.0
    """Logits are this many times the products with `W_U` (Granite)."""
    logits_softcap: float | None = None
    """Logits x are capped to c tanh(x / c) (Gemma 2)."""
    tie_word_embeddings: bool = False
    unembed_bias: bool = False
    image_token_id: int | None = None
    image_placeholder: str = "<image>"
    """What the checkpoint's chat template writes for an image."""
    image_text: str = "<image>"
    """What stands in a prompt for one image, with `<image>` for its visual tokens."""
    image_layout: Literal["one_grid", "anyres", "row_col", "any_grid", "thumbnail"] = "one_grid"
    """How an image becomes visual tokens; see `mmlens.inputs.layouts`."""
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None
    vision: VisionConfig | None = None
    projector: ProjectorConfig | None = None
    model_name: str = ""
    original_architecture: str = ""
    default_template: str | None = None
    """What `template="auto"` means; None leaves the choice to the tokenizer's chat template."""
    default_prepend_bos: bool | None = None
    """Whether prompts begin with BOS unless the caller says otherwise; None: if the tokenizer
    itself puts one there, as transformers' does."""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    """Where the model is, and below in which dtype: kept by the model itself."""
    dtype: torch.dtype = torch.float32

    @property
    def architecture(self) -> str:
        """The same as `original_architecture`."""
        return self.original_architecture

    @property
    def d_vocab_out(self) -> int:
        """How many logits a position has."""
        return self.d_vocab

    @property
    def rotary_base(self) -> float:
        """The base of the rotary angles' periods."""
        return self.rope_parameters.get("rope_theta", 10000.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sizes(self, "n_layers", "d_vocab", "n_ctx")
        ids = [self.image_token_id, self.bos_token_id, self.pad_token_id, *self.eos_token_ids]
        if not all(token is None or type(token) is int for token in ids):
            raise ValueError(f"token ids {ids} are not all whole numbers")
        if self.image_token_id is not None:
            check_sizes(self, "image_token_id", least=0)
            if self.image_token_id >= 2**32:  # as tokenizers number their tokens
                raise ValueError(f"image_token_id={self.image_token_id}; it must be below 2**32")
        check_cap("logits_softcap", self.logits_softcap)
        check_cap("logits_scale", self.logits_scale)
        if not is_finite(self.embed_scale):
            raise ValueError(f"embed_scale={self.embed_scale!r}; it must be a finite number")
        if self.attention_blocks not in (None, "image", "prompt"):
            raise ValueError(
                f"attention_blocks={self.attention_blocks!r}; it can be 'image', 'prompt' or None"
            )
        if self.n_deepstack > self.n_layers:
            raise ValueError(
                f"n_deepstack={self.n_deepstack}, but the decoder has n_layers={self.n_layers}: "
                "each of its first layers adds one, so there can be no more of them than layers"
            )
        for rope in (self.rope_parameters, self.local_rope_parameters or self.rope_parameters):
            theta: Any = rope.get("rope_theta")
            if not (is_finite(theta) and theta > 0):
                raise ValueError(f"rope_theta={theta!r}; it must be a finite number above 0")
        share: Any = self.rope_parameters.get("partial_rotary_factor", 1.0)
        if not (is_finite(share) and 0 < share <= 1):
            raise ValueError(f"partial_rotary_factor={share!r}; it must be above 0 and at most 1")
        if self.rotary_dim % 2 or not self.rotary_dim:
            raise ValueError(
                f"{self.rotary_dim} of {self.d_head} dimensions of a head are rotated; these must "
                "be pairs"
            )

    @property
    def rotary_dim(self) -> int:
        """How many dimensions of a head are rotated."""
        return int(self.d_head * self.rope_parameters.get("partial_rotary_factor", 1.0))

    @property
    def is_multimodal(self) -> bool:
        """Whether the model has a vision tower."""
        return self.vision is not None

    @property
    def n_deepstack(self) -> int:
        """In how many first blocks the images add something besides their visual tokens."""
        return self.projector.n_deepstack if self.projector else 0

    @property
    def vision_hidden_size(self) -> int | None:
        """The tower's `d_model`."""
        return self.vision.d_model if self.vision else None

    @property
    def vision_num_layers(self) -> int | None:
        """The tower's `n_layers`."""
        return self.vision.n_layers if self.vision else None

    @property
    def vision_num_heads(self) -> int | None:
        """The tower's `n_heads`."""
        return self.vision.n_heads if self.vision else None

    @property
    def mm_tokens_per_image(self) -> int | None:
        """How many visual tokens an image of the tower's size has; None where any size is."""
        if self.vision is None or self.vision.packed:
            return None
        merged = self.projector.merged**2 if self.projector else 1
        return self.vision.n_visual_tokens // merged

    @property
    def longest_input(self) -> int:
        """The most positions that a run may have: `n_ctx`, or what rotary scaling makes of it.

        With `linear` and `yarn` scaling, many checkpoints keep the length from before in
        `max_position_embeddings`; others write the longer one, and then `yarn` says from which.
        """
        rope = self.rope_parameters
        kind, factor = rope.get("rope_type", "default"), rope.get("factor") or 1.0
        if kind == "linear":
            return int(self.n_ctx * max(factor, 1.0))
        if kind == "yarn":
            before = rope.get("original_max_position_embeddings") or self.n_ctx
            return max(self.n_ctx, int(before * factor))
        return self.n_ctx

    def check_length(self, n_pos: int, mask: Bool[Tensor, "batch pos"] | None = None) -> None:
        """Look whether a run is no longer than the model was made for; before it takes memory.

        Args:
            n_pos: positions of a row, those in a cache of keys and values included.
            mask: False at padding, which does not count.

        Raises:
            ValueError: it is longer.
        """
        if n_pos > self.longest_input and mask is not None:
            n_pos = int(mask.sum(dim=1).max())
        if n_pos > self.longest_input:
            raise ValueError(
                f"a run of {n_pos:,} tokens, but this model was made for {self.longest_input:,}: "
                "shorten the prompt or the answer; or set model.cfg.n_ctx to the length that you "
                "want, if you know what the model does there"
            )
