"""GGUF files: what we make of one equals what transformers makes of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from checkpoint_folders import load, refused
from gguf import GGUFWriter, TokenType
from random_models import Shape, random_llama
from rounding import assert_same, rounded_otherwise
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from mmlens.checkpoints import CheckpointError

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
WORDS = ["<unk>", "<s>", "</s>", "▁the", "▁capital", "▁of", "▁country", "▁is", "▁Paris", "▁"]


def gguf_name(name: str) -> str:
    """llama.cpp's name of a tensor of transformers' Llama."""
    ends = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    stem = name.removesuffix(".weight")
    if stem in ends:
        return f"{ends[stem]}.weight"
    _, _, layer, part = stem.split(".", 3)
    return f"blk.{layer}.{NAMES[part]}.weight"


def interleaved(weight: torch.Tensor, n_heads: int) -> torch.Tensor:
    """Rows of queries and keys in llama.cpp's order: rotated pairs side by side."""
    halves = weight.view(n_heads, 2, -1, weight.shape[-1])
    return halves.transpose(1, 2).reshape(weight.shape)


def write_gguf(hf: LlamaForCausalLM, path: Path, half: bool = False) -> Path:
    """The model with a small tokenizer, in 16 bits (all but norms) or 32."""
    config = hf.config
    writer = GGUFWriter(str(path), "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    words = WORDS + [f"▁word{i}" for i in range(config.vocab_size - len(WORDS))]
    kinds = [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(words)
    writer.add_token_scores([-float(i) for i in range(len(words))])
    writer.add_token_types(kinds + [TokenType.NORMAL] * (len(words) - len(kinds)))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    for name, tensor in hf.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if "q_proj" in name:
            tensor = interleaved(tensor, config.num_attention_heads)
        if "k_proj" in name:
            tensor = interleaved(tensor, config.num_key_value_heads)
        stored = tensor.half() if half and tensor.ndim > 1 else tensor
        writer.add_tensor(gguf_name(name), stored.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("half", [False, True], ids=["F32", "F16"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@torch.no_grad()
def test_it_equals_transformers_own_reading(
    tied: bool, half: bool, seed: int, tmp_path: Path
) -> None:
    hf = random_llama(Shape(d_head=8, d_model=48, tied=tied))
    path = write_gguf(hf, tmp_path / "tiny.gguf", half)
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=path.name, dtype=torch.float32
    )
    model = load(path)
    assert model.vision is None and model.cfg.tie_word_embeddings == tied
    assert model.cfg.model_name == str(path)
    tokens = torch.randint(0, hf.config.vocab_size, (2, 11))
    logits = model(tokens)
    # Not half, also what was written: the file is a real one.
    for reference in (theirs,) if half else (theirs, hf):
        assert_same(
            logits,
            reference(tokens).logits,
            lambda: rounded_otherwise(reference)(tokens).logits,  # noqa: B023
        )
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
    text = "the capital of the country"
    assert model.to_tokens(text)[0].tolist()[-5:] == tokenizer(text)["input_ids"][-5:]
    with pytest.raises(CheckpointError, match="no checkpoint folder"):
        model.save_pretrained(tmp_path / "saved")


def test_a_damaged_file(seed: int, tmp_path: Path) -> None:
    path = write_gguf(random_llama(Shape(d_head=8, d_model=48)), tmp_path / "tiny.gguf")
    content = path.read_bytes()
    for share in (0.0, 0.001, 0.5, 0.9):
        path.write_bytes(content[: int(share * len(content))])
        refused(path, "transformers cannot read", str(path))
    path.write_bytes(b"GGUF" + bytes(100))
    refused(path, "transformers cannot read", str(path))


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    refused(tmp_path / "no.gguf", "no.gguf", "not a folder")
