"""GGUF files of small models, as llama.cpp writes them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from gguf import GGUFWriter, TokenType
from torch import Tensor

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
"""llama.cpp's names of the parts of a block, by transformers'."""
ENDS = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
WORDS = ["<unk>", "<s>", "</s>", "▁the", "▁capital", "▁of", "▁country", "▁is", "▁Paris", "▁"]


def write_gguf(
    path: Path,
    kind: str,
    hf: Any,
    stored: Callable[[str, Tensor], Tensor],
    names: Mapping[str, str] = NAMES,
    fields: Callable[[GGUFWriter], None] = lambda writer: None,
) -> Path:
    """Write a model with a small tokenizer.

    Args:
        path: of the file.
        kind: llama.cpp's name of the family.
        hf: transformers' model.
        stored: the tensor that the file has for one of transformers', by its name.
        names: of the parts of a block.
        fields: adds what the family has besides.
    """
    config = hf.config
    writer = GGUFWriter(str(path), kind)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope.get("full_attention", rope)["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    fields(writer)
    add_tokenizer(writer, config.vocab_size)
    for name, tensor in hf.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        writer.add_tensor(gguf_name(name, names), stored(name, tensor).numpy())
    return finished(writer, path)


def gguf_name(name: str, names: Mapping[str, str]) -> str:
    """llama.cpp's name of a tensor of transformers'."""
    stem = name.removesuffix(".weight")
    if stem in ENDS:
        return f"{ENDS[stem]}.weight"
    _, _, layer, part = stem.split(".", 3)
    return f"blk.{layer}.{names[part]}.weight"


def add_tokenizer(writer: GGUFWriter, n_words: int) -> None:
    """Add a tokenizer of so many words, the first three of them special."""
    words = WORDS + [f"▁word{i}" for i in range(n_words - len(WORDS))]
    kinds = [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(words)
    writer.add_token_scores([-float(i) for i in range(len(words))])
    writer.add_token_types(kinds + [TokenType.NORMAL] * (len(words) - len(kinds)))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)


def finished(writer: GGUFWriter, path: Path) -> Path:
    """Write what was added, and return the path."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
