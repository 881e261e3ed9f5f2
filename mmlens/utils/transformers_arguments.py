"""transformers' arguments of `forward` and `generate`, for whoever changes one line of a script.

Values that ask for what is done anyway are taken; others are refused with what to do instead.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

Choices = Mapping[str, tuple[tuple[Any, ...], str]]

ACTIVATIONS = 'use run_with_cache: cache["pattern", layer], cache["resid_post", layer]'
CACHE = "use past_kv_cache=KeyValueCache(model.cfg.n_layers) of forward"
BOTH: Choices = {
    "output_attentions": ((None, False), ACTIVATIONS),
    "output_hidden_states": ((None, False), ACTIVATIONS),
    "past_key_values": ((None,), CACHE),
    "cache": ((None,), CACHE),  # what newer transformers calls them
    "mm_encoder_outputs": ((None,), 'set them with a hook on "projector.hook_out"'),
    "cache_position": ((None,), "positions are counted from the mask and the cache"),
    "image_hidden_states": ((None,), 'set them with a hook on "projector.hook_out"'),
    "vision_feature_layer": ((None,), "model.cfg.vision.feature_layers are the checkpoint's"),
    "vision_feature_select_strategy": ((None,), "model.cfg.vision.select is the checkpoint's"),
}
FORWARD: Choices = {
    **BOTH,
    "use_cache": (
        (None, False),
        "give past_kv_cache=KeyValueCache(model.cfg.n_layers), which the run fills",
    ),
    "return_dict": ((None, False), "it returns the logits as a tensor, without an object around"),
    "inputs_embeds": ((None,), "give them as the input, with start_at_layer=0"),
    "logits_to_keep": ((None, 0), "take the logits that you want: logits[:, -n:]"),
}
DECIDED = "how keys and values are cached is decided here; leave it out"
GENERATE: Choices = {
    **BOTH,
    "return_dict_in_generate": (
        (None, False),
        "output_logits=True returns transformers' GenerateDecoderOnlyOutput",
    ),
    "output_scores": ((None, False), "output_logits=True returns the logits of each step"),
    "inputs": ((None,), "give it as the first argument"),
    "inputs_embeds": ((None,), "give them as the first argument, without a name"),
    "generation_config": ((None,), "give its settings: generate(..., **config.to_diff_dict())"),
    "logits_processor": (
        (None,),
        "use settings such as suppress_tokens, or a hook on ln_final.hook_normalized",
    ),
    "prefix_allowed_tokens_fn": ((None,), "use suppress_tokens, or a stopping criterion"),
    "position_ids": ((None,), "positions are counted from the mask"),
    "streamer": ((None,), "use generate_stream, which yields the pieces"),
    "assistant_model": ((None,), "every token is the hooked model's own"),
    "assistant_tokenizer": ((None,), "every token is the hooked model's own"),
    "negative_prompt_ids": ((None,), "guidance needs another loop of decoding"),
    "negative_prompt_attention_mask": ((None,), "guidance needs another loop of decoding"),
    "custom_generate": ((None,), "every step goes through the hooked model"),
    "tokenizer": ((None,), "stop_strings are told by model.tokenizer: leave it out"),
    "synced_gpus": ((None, False), "a model runs in one process"),
    "use_model_defaults": ((None, True), "the checkpoint's generation_config.json counts"),
    "cache_implementation": ((None, "dynamic"), DECIDED),
    "cache_config": ((None,), DECIDED),
    "max_cache_len": ((None,), DECIDED),
    "prefill_chunk_size": ((None,), DECIDED),
    "low_memory": ((None, False), DECIDED),
    "compile_config": ((None,), "hooked models are not compiled; leave it out"),
    "disable_compile": ((None, False, True), ""),
    "continuous_batching_config": ((None,), "rows of a batch begin and end together"),
}
"""Values that ask for nothing, and why not others."""


def take_transformers_arguments(
    called: Literal["forward", "generate"], given: dict[str, Any]
) -> None:
    """Take transformers' arguments that ask for nothing out of others.

    Raises:
        NotImplementedError: one that asks for something, and what to do instead.
    """
    choices = FORWARD if called == "forward" else GENERATE
    for name in choices.keys() & given.keys():
        harmless, reason = choices[name]
        value = given.pop(name)
        # 0 is no False here, and a tensor equals nothing.
        if not any(type(value) is type(allowed) and value == allowed for allowed in harmless):
            said = repr(value) if isinstance(value, bool | int | float | str) else "..."
            raise NotImplementedError(f"{called}({name}={said}): {reason}.")
