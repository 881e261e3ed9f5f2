"""A stack of transformer blocks, in TransformerLens's names, for decoder and vision tower."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from mmlens.config.checks import check_cap, check_sizes, is_finite
from mmlens.utils.transformer_lens_names import SameForAll, refused


@dataclass(kw_only=True)
class TransformerConfig(SameForAll):
    """A stack of transformer blocks, whichever way it is used."""

    n_layers: int
    d_model: int
    n_heads: int
    d_head: int
    d_mlp: int
    act_fn: str
    normalization_type: Literal["RMS", "LN"]
    eps: float
    gated_mlp: bool = False
    n_key_value_heads: int | None = None
    """Heads of keys and values under grouped-query attention; None means `n_heads`."""
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    """Queries and keys are normalised head by head, before they are rotated (Qwen3, Gemma 3; Henry
    et al. 2020)."""
    joint_qk_norm: bool = False
    """Where `qk_norm`: those of all heads are one vector, which an RMSNorm scales (InternVL)."""
    parallel_attn_mlp: bool = False
    """Attention and MLP read the same stream side by side, through one norm (Phi)."""
    parallel_ln2: bool = False
    """In parallel blocks the MLP reads through a norm of its own, `ln2` (GPT-NeoX)."""
    layer_scale: bool = False
    """What attention and MLP add is multiplied by a learnt factor per dimension (a few towers of
    open_clip's; Touvron et al. 2021)."""
    post_norms: bool = False
    """What attention and MLP give is normalised once more before it is added to the stream
    ("sandwich norms"; Gemma 2 and 3)."""
    residual_scale: float = 1.0
    """What is added to the stream is this many times what attention and MLP give (Granite)."""
    norm_offset: float = 0.0
    """What norms add to their weights: 1 where the checkpoint has weights around 0 (Gemma)."""
    window_size: int | None = None
    """How many positions a query of a "local" layer attends to, its own included."""
    attn_types: tuple[Literal["global", "local"], ...] | None = None
    """Per layer; None means every layer is "global"."""
    attn_scale: float = 0.0
    """What attention scores are divided by; 0 stands for the square root of `d_head`."""
    scores_softcap: float | None = None
    """Attention scores s are capped to c tanh(s / c) before the mask (Gemma 2)."""
    use_attn_result: bool = False
    """Whether caches hold `attn.hook_result` without being asked by name; as those below."""
    use_attn_in: bool = False
    use_split_qkv_input: bool = False
    use_hook_mlp_in: bool = False

    def __post_init__(self) -> None:
        check_sizes(self, "d_model", "n_heads", "n_kv_heads", "d_head", "d_mlp")
        check_sizes(self, "n_layers", least=0)  # of a tower whose patch embeddings are taken
        if self.normalization_type not in ("RMS", "LN"):
            raise ValueError(
                f"normalization_type is {self.normalization_type!r}; it can be 'RMS' or 'LN'"
            )
        if not is_finite(self.eps) or self.eps < 0:
            raise ValueError(f"eps={self.eps!r}; it must be a finite number, 0 or more")
        if not is_finite(self.attn_scale) or self.attn_scale < 0:
            raise ValueError(f"attn_scale={self.attn_scale!r}; it must be finite, 0 or more")
        self.attn_scale = self.attn_scale or self.d_head**0.5
        check_cap("scores_softcap", self.scores_softcap)
        check_cap("residual_scale", self.residual_scale)
        if (self.post_norms or self.norm_offset) and self.normalization_type != "RMS":
            raise ValueError("post_norms and norm_offset are of models with RMSNorms")
        if self.post_norms and self.parallel_attn_mlp:
            raise ValueError("blocks with post_norms are not parallel")
        if self.n_heads % self.n_kv_heads:
            raise ValueError(
                f"n_heads={self.n_heads} is no multiple of n_key_value_heads={self.n_kv_heads}"
            )
        types = self.attn_types or ()
        if types and len(types) != self.n_layers:
            raise ValueError(f"attn_types has {len(types)} entries for {self.n_layers} layers")
        if unknown := set(types) - {"global", "local"}:
            raise ValueError(f"attn_types has {unknown}; it can have 'global' and 'local'")
        if "local" in types and self.window_size is None:
            raise ValueError("local attention needs a window_size, not None")
        if self.window_size is not None:
            check_sizes(self, "window_size")

    @property
    def changes_outputs(self) -> bool:
        """Whether what attention and MLP give is not what is added to the residual stream."""
        return self.post_norms or self.residual_scale != 1.0

    @property
    def n_kv_heads(self) -> int:
        """Heads of keys and values, with or without grouped-query attention."""
        return self.n_heads if self.n_key_value_heads is None else self.n_key_value_heads

    @property
    def n_deepstack(self) -> int:
        """In how many first blocks images add something: in a decoder that has deepstack."""
        return 0

    @property
    def n_params(self) -> int:
        """How many weights the matrices of attention and MLPs have (as Kaplan et al. 2020 count).

        Keys and values are counted once for each query head, as in TransformerLens.
        """
        attention = 4 * self.d_model * self.d_head * self.n_heads
        return self.n_layers * (attention + self.d_model * self.d_mlp * (2 + self.gated_mlp))

    @property
    def uses_rms_norm(self) -> bool:
        """Whether norms are RMSNorms."""
        return self.normalization_type == "RMS"

    @property
    def use_local_attn(self) -> bool:
        """Whether some layers attend to a few positions back only."""
        return "local" in (self.attn_types or ())

    @property
    def use_qk_norm(self) -> bool:
        """The same as `qk_norm`, in TransformerLens's words."""
        return self.qk_norm

    @property
    def head_dim(self) -> int:
        """The same as `d_head`, in transformers' words."""
        return self.d_head

    def to_dict(self) -> dict[str, Any]:
        """The fields by their names."""
        return dict(vars(self))

    def __getattr__(self, name: str) -> Any:
        raise refused("config", self, name)

    def kind(self, layer: int) -> Literal["global", "local"]:
        """The kind of a layer: "local" where its attention has a window."""
        return self.attn_types[layer] if self.attn_types else "global"

    def window(self, layer: int) -> int | None:
        """The window of a layer's attention; None where it sees everything before it."""
        return self.window_size if self.kind(layer) == "local" else None
