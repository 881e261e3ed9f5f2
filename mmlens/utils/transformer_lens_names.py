"""TransformerLens's names that are refused, each with a reason.

Whatever TransformerLens's bridge offers on a language model is here under the same name, or its
name stands in the table `REFUSALS` with a sentence that says why it is not, and what to do instead.
The sentence is what a user reads who tries the name; `docs/make_transformer_lens_table.py` writes
all of them into `docs/transformer-lens.md`.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from inspect import signature
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import nn

Kind = Literal["model", "cache", "config"]

WEIGHTS = (
    "weights are the checkpoint's, so that logits, hooks, edits and saved files agree with Hugging "
    "Face; "
)
NO_FOLDING = (
    WEIGHTS + "leave it out: apply_ln_to_stack and logit_attrs multiply by the norm's weights "
    "themselves"
)
NO_CENTRING = (
    WEIGHTS + "leave it out: a norm that centres does so in apply_ln_to_stack, and probabilities "
    "do not depend on the mean of the logits"
)
ROTARY = (
    "positions are rotary, and nothing is added to the residual stream for them; "
    "attn.hook_rot_q and attn.hook_rot_k are the rotated queries and keys"
)
ENCODER = (
    "it belongs to encoders; this model predicts the next token, and its tower is model.vision"
)
SHORTFORMER = (
    "it is for shortformer models, whose attention adds positions; with start_at_layer here give "
    "the residual stream alone, and for the loss take the logits and model.loss_fn"
)
NO_DATA = "no training data is known here; model.prepare(text, images) takes your own"
INSIDE = (
    "there is no transformers model inside, the weights are this model's own: load it with "
    "transformers where you need that one"
)
EVERY_KEY = (
    "hook_k and hook_v are what the model computes, one for each key-value head; "
    "k.repeat_interleave(n_heads // n_key_value_heads, dim=2) has one for each query head"
)
RANDOM = (
    "a model made from a config has torch's random weights; set others with torch.nn.init, and "
    "published ones with from_pretrained"
)

MODEL: dict[str, str] = {
    "W_pos": ROTARY,
    "W_E_pos": ROTARY,
    "boot_transformers": "use from_pretrained(name_or_path), which reads the published files",
    "boot_native": RANDOM,
    "boot_tl_legacy": "TransformerLens's own checkpoints (solu-1l, attn-only-2l, ...) have "
    "positions or activations that no model of these families has; load them with TransformerLens",
    "check_model_support": "from_pretrained(name) says at once whether a format is known, and "
    "`mmlens verify` compares a checkpoint with transformers",
    "list_supported_models": "formats, not names, are supported: docs/families.md lists them",
    "clear_hook_registry": "hook points are found once; after adding one call model.setup()",
    "close": "nothing is held open; del model frees its memory",
    "diffusion_generate": "these models predict the next token; use generate",
    "encoder_output": ENCODER,
    "predict_next_sentence": ENCODER,
    "to_sentence_pair_tokens": ENCODER,
    "enable_compatibility_mode": NO_FOLDING + ", and hooks have HookedTransformer's names already",
    "process_weights": NO_FOLDING,
    "process_weights_": NO_FOLDING,
    "load_and_process_state_dict": WEIGHTS + "use load_state_dict, or from_pretrained",
    "fill_missing_keys": WEIGHTS + "use load_state_dict(strict=False), or from_pretrained",
    "fold_layer_norm": NO_FOLDING,
    "fold_value_biases": NO_FOLDING,
    "center_writing_weights": NO_CENTRING,
    "center_unembed": NO_CENTRING,
    "refactor_factored_attn_matrices": WEIGHTS + "model.QK and model.OV are factored matrices, and "
    ".svd() of them gives their singular vectors",
    "hf_generate": INSIDE + "; generate has transformers' sampling options",
    "hook_aliases": "each activation has one name, see model.hook_dict; TransformerLens 4's second "
    "names are accepted where they mean the same, and else are errors that say what is meant",
    "init_weights": RANDOM,
    "original_model": INSIDE,
    "prepare_multimodal_inputs": "use prepare(text, images), which also names positions",
    "set_ungroup_grouped_query_attention": EVERY_KEY,
    "set_tokenizer": "assign model.tokenizer",
    "move_model_modules_to_device": 'use model.to(device), or from_pretrained(device_map="auto")',
    "get_pos_offset": ROTARY,
    "get_residual": ROTARY + "; input_embeddings(inputs) is the stream that enters layer 0",
    "load_sample_training_dataset": NO_DATA,
    "sample_datapoint": NO_DATA,
}

CACHE: dict[str, str] = {  # what the installed TransformerLens has, a cache has
    "logit_lens": "it came with TransformerLens 4; mmlens.logit_lens(model, inputs) gives the same",
}

ROPE = "see cfg.rope_parameters, Hugging Face's own description of the rotary embedding"
CONFIG: dict[str, str] = {
    "default_padding_side": "the tokenizer says it: model.tokenizer.padding_side",
    "from_dict": "use MultimodalConfig(**fields)",
    "unwrap": "use MultimodalConfig(**fields)",
    "init_mode": RANDOM,
    "init_weights": RANDOM,
    "initializer_range": RANDOM,
    "seed": RANDOM,
    "use_NTK_by_parts_rope": ROPE,
    "NTK_by_parts_factor": ROPE,
    "NTK_by_parts_low_freq_factor": ROPE,
    "NTK_by_parts_high_freq_factor": ROPE,
    "attn_implementation": "there is nothing to choose: attention runs fused unless something "
    "listens to its scores or pattern",
    "tokenizer_name": "see model.tokenizer.name_or_path",
    "tokenizer_prepends_bos": "the tokenizer itself decides, unless default_prepend_bos is set",
    "tokenizer_appends_eos": "prompts never end with an end token; append one with inputs.append",
    "ungroup_grouped_query_attention": EVERY_KEY,
    "split_attention_weights": "W_Q, W_K, W_V are always views of the fused weights",
}

REFUSALS: Mapping[Kind, Mapping[str, str]] = {"model": MODEL, "cache": CACHE, "config": CONFIG}
"""What TransformerLens's model, cache and config have and these have not: why, and what to do."""

Arguments = dict[str, tuple[tuple[Any, ...], str]]

ARGUMENTS: dict[str, Arguments] = {
    "from_pretrained": {
        "fold_ln": ((False, None), NO_FOLDING),
        "fold_value_biases": ((False, None), NO_FOLDING),
        "center_writing_weights": ((False, None), NO_CENTRING),
        "center_unembed": ((False, None), NO_CENTRING),
        "refactor_factored_attn_matrices": (
            (False, None),
            MODEL["refactor_factored_attn_matrices"],
        ),
        "checkpoint_index": ((None,), "use revision=, a branch, tag or commit on the hub"),
        "checkpoint_value": ((None,), "use revision=, a branch, tag or commit on the hub"),
        "hf_model": (
            (None,),
            "files are read: name_or_path may be a folder that the model's save_pretrained wrote",
        ),
        "n_devices": ((1, None), 'use device_map="auto", which spreads the model over all GPUs'),
        "tokenizer": ((None,), "assign model.tokenizer after loading"),
        "move_to_device": ((True,), 'use device="cpu"'),
        "default_prepend_bos": ((None,), "assign model.cfg.default_prepend_bos after loading"),
        "default_padding_side": ((None,), "assign model.tokenizer.padding_side after loading"),
        "first_n_layers": ((None,), "run with stop_at_layer=n"),
    },
    "forward": {
        "labels": ((None,), "take the logits, and F.cross_entropy of those with your labels"),
        "input_values": ((None,), "it is sound, which this model does not take"),
        "tokens": ((None,), SHORTFORMER),
        "shortformer_pos_embed": ((None,), SHORTFORMER),
        "decoder_input": ((None,), ENCODER),
        "one_zero_attention_mask": ((None,), "use attention_mask, which takes ones and zeros too"),
        "past_key_values": ((None,), "use past_kv_cache=KeyValueCache(model.cfg.n_layers)"),
        "remove_batch_dim": ((False,), "hooks see the batch dimension: take activation[0] there"),
    },
}
"""TransformerLens's arguments of a function: values that ask for nothing, and why not others."""


NOT_NAMED = ("self", "others")
"""Parameters that are no arguments by name."""


class RefusedError(AttributeError, NotImplementedError):
    """A name of TransformerLens that is not offered; an AttributeError, so `hasattr` is right."""


def refused(kind: Kind, owner: Any, name: str) -> AttributeError:
    """Return the error of a missing attribute, with the reason where there is one."""
    cls = owner if isinstance(owner, type) else type(owner)
    reason = REFUSALS[kind].get(name)
    if reason is None:
        return AttributeError(f"{cls.__name__!r} has no attribute {name!r}", name=name, obj=owner)
    return RefusedError(f"{cls.__name__} has no {name}: {reason}.")


class RefusingClass(type):
    """The class of `Refusing`: what is refused on a model is refused on its class."""

    def __getattr__(cls, name: str) -> Any:
        raise refused("model", cls, name)


class Refusing(nn.Module, metaclass=RefusingClass):
    """A module whose missing attributes say what to do, where TransformerLens has them."""

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            raise refused("model", self, name) from None


def refuse_arguments(called: str, function: Callable[..., Any], given: Mapping[str, Any]) -> None:
    """Raise an error about arguments of TransformerLens that ask for something, or are unknown.

    `called` is the name of the function, which accelerate may have wrapped in another.
    """
    for name, value in given.items():
        if name not in ARGUMENTS[called]:
            taken = [each for each in signature(function).parameters if each not in NOT_NAMED]
            near = difflib.get_close_matches(name, [*taken, *ARGUMENTS[called]], n=3)
            hint = f"did you mean {' or '.join(near)}?" if near else f"it takes {', '.join(taken)}"
            raise TypeError(f"{called}() got an unexpected keyword argument {name!r}; {hint}")
        harmless, reason = ARGUMENTS[called][name]
        if not any(value is allowed for allowed in harmless):
            said = "..." if isinstance(value, torch.Tensor) else repr(value)
            raise NotImplementedError(f"{called}({name}={said}): {reason}.")


class SameForAll:
    """Choices that all models of these families share, under TransformerLens's names.

    Its cache and its tools ask for them.
    """

    attention_dir: ClassVar[str] = "causal"
    attn_only: ClassVar[bool] = False
    checkpoint_index: ClassVar[int | None] = None
    checkpoint_label_type: ClassVar[str | None] = None
    checkpoint_value: ClassVar[int | None] = None
    decoder_start_token_id: ClassVar[int | None] = None
    experts_per_token: ClassVar[int | None] = None
    final_rms: ClassVar[bool] = False
    from_checkpoint: ClassVar[bool] = False
    is_audio_model: ClassVar[bool] = False
    is_stateful: ClassVar[bool] = False
    is_visual_model: ClassVar[bool] = False
    layer_norm_folding: ClassVar[bool] = False
    load_in_4bit: ClassVar[bool] = False
    n_devices: ClassVar[int] = 1
    num_experts: ClassVar[int | None] = None
    per_layer_head_dim: ClassVar[list | None] = None
    per_layer_num_key_value_heads: ClassVar[list | None] = None
    positional_embedding_type: ClassVar[str] = "rotary"
    post_embedding_ln: ClassVar[bool] = False
    qk_norm_after_rope: ClassVar[bool] = False
    relative_attention_max_distance: ClassVar[int | None] = None
    relative_attention_num_buckets: ClassVar[int | None] = None
    rmsnorm_uses_offset: ClassVar[bool] = False  # a norm's `w` holds Gemma's 1; see `norm_offset`
    rotary_adjacent_pairs: ClassVar[bool] = False
    rotary_interleaved_cos_sin: ClassVar[bool] = False
    scale_attn_by_inverse_layer_idx: ClassVar[bool] = False
    trust_remote_code: ClassVar[bool] = False
    use_attn_scale: ClassVar[bool] = True
    use_hook_tokens: ClassVar[bool] = False

    if TYPE_CHECKING:  # fields of `TransformerConfig`
        scores_softcap: float | None
        post_norms: bool

    @property
    def attn_scores_soft_cap(self) -> float:
        """The same as `scores_softcap`; -1 where scores are not capped."""
        return -1.0 if self.scores_softcap is None else self.scores_softcap

    @property
    def output_logits_soft_cap(self) -> float:
        """The same as `logits_softcap`; -1 where logits are not capped, or there are none."""
        return vars(self).get("logits_softcap") or -1.0

    @property
    def scale_embedding(self) -> bool | None:
        """Whether token embeddings are scaled; None where they are not."""
        return True if vars(self).get("embed_scale", 1.0) != 1.0 else None

    @property
    def use_normalization_before_and_after(self) -> bool:
        """The same as `post_norms`."""
        return self.post_norms
