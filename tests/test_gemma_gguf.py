"""Gemma in GGUF files: what we make of one equals what was written, and transformers'."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_folders import load, refused
from gguf import GGUFWriter
from gguf_writing import NAMES, write_gguf
from random_models import enliven
from rounding import assert_same, rounded_otherwise
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    GemmaForCausalLM,
)

SANDWICH = NAMES | {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
}


def random_gemma(kind: str, n_layers: int) -> Any:
    """A model of the choices that a file does not say, which transformers then takes."""
    sizes: dict[str, Any] = {
        "vocab_size": 60,
        "hidden_size": 48,
        "intermediate_size": 41,
        "num_hidden_layers": n_layers,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "head_dim": 8,
        "max_position_embeddings": 64,
    }
    if kind == "gemma":
        return enliven(GemmaForCausalLM(GemmaConfig(**sizes)))
    sizes["sliding_window"] = 5
    if kind == "gemma2":
        return enliven(Gemma2ForCausalLM(Gemma2Config(**sizes)))
    return enliven(Gemma3ForCausalLM(Gemma3TextConfig(**sizes)))


def write_gemma(hf: Any, kind: str, path: Path, **more: Any) -> Path:
    """As llama.cpp writes it: norms are 1 + w."""

    def stored(name: str, tensor: torch.Tensor) -> torch.Tensor:
        return tensor + 1 if "norm" in name else tensor

    def fields(writer: GGUFWriter) -> None:
        writer.add_value_length(hf.config.head_dim)
        if kind != "gemma":
            writer.add_sliding_window(hf.config.sliding_window)
        for name, value in more.items():
            writer.add_float32(f"{kind}.{name}", value)

    return write_gguf(path, kind, hf, stored, NAMES if kind == "gemma" else SANDWICH, fields)


@pytest.mark.parametrize(("kind", "n_layers"), [("gemma", 2), ("gemma2", 3), ("gemma3", 7)])
@torch.no_grad()
def test_it_equals_transformers_own_reading(
    kind: str, n_layers: int, seed: int, tmp_path: Path
) -> None:
    hf = random_gemma(kind, n_layers)
    path = write_gemma(hf, kind, tmp_path / "tiny.gguf")
    references = [hf]
    if kind != "gemma":  # transformers alone reads none of Gemma 1
        arguments = {"gguf_file": path.name, "dtype": torch.float32}
        references.append(AutoModelForCausalLM.from_pretrained(tmp_path, **arguments))
    model = load(path)
    assert model.cfg.post_norms == model.cfg.use_local_attn == (kind != "gemma")
    assert model.cfg.tie_word_embeddings and model.cfg.norm_offset == 1
    tokens = torch.randint(3, hf.config.vocab_size, (2, 11))
    logits = model(tokens)
    assert logits.std() > 0.1
    for reference in references:
        reference.set_attn_implementation("eager")
        assert_same(
            logits,
            reference(tokens).logits,
            lambda: rounded_otherwise(reference)(tokens).logits,  # noqa: B023
        )


@pytest.mark.parametrize(
    ("kind", "n_layers", "more", "said"),
    [
        ("gemma", 2, {"final_logit_softcapping": 30.0}, "final_logit_softcapping = 30.0"),
        ("gemma", 2, {"rope.scaling.factor": 8.0}, "rope.scaling"),
        ("gemma2", 2, {"attn_logit_softcapping": 30.0}, "attn_logit_softcapping = 30.0"),
        ("gemma2", 46, {}, "46 layers"),
        ("gemma3", 2, {"rope.scaling.factor": 8.0}, "rope.scaling"),
    ],
)
def test_what_transformers_would_read_as_another_model(
    kind: str, n_layers: int, more: dict[str, float], said: str, seed: int, tmp_path: Path
) -> None:
    path = write_gemma(random_gemma(kind, n_layers), kind, tmp_path / "tiny.gguf", **more)
    refused(path, str(path), said)
