"""Fields of a config.json count where transformers reads them, and nowhere else."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import internvl_models
import pytest
import qwen_models
import tiled_models
import torch
from checkpoint_folders import edit_config, load, merge_config, refused
from qwen_models import random_batch
from random_models import SHAPES, random_language_model, random_llava
from rounding import assert_same, rounded_otherwise
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, GraniteConfig

from mmlens import HookedMultimodalTransformer

ROPE = {"rope_type": "default", "rope_theta": 7000.0, "partial_rotary_factor": 0.4}
SAY_NOTHING: dict[str, tuple[str, dict[str, Any]]] = {
    "a window of llama": ("grouped queries", {"sliding_window": 6}),
    "a window of granite": ("granite", {"sliding_window": 6}),
    "biases of mistral": ("mistral", {"attention_bias": True, "mlp_bias": True}),
    "biases of qwen2": ("qwen2", {"attention_bias": True, "mlp_bias": True}),
    "biases of qwen3's MLP": ("qwen3", {"mlp_bias": True}),
    "a share of heads of llama": ("grouped queries", {"rope_parameters": ROPE}),
    "a share of heads of qwen3": ("qwen3", {"rope_parameters": ROPE}),
    "a share of heads of gemma": ("gemma", {"rope_parameters": ROPE}),
    "a share of heads of granite": ("granite", {"rope_parameters": ROPE}),
}
SAY_SOMETHING: dict[str, tuple[str, dict[str, Any]]] = {
    "the longest text of yarn": ("yarn rotary", {"original_max_position_embeddings": 120}),
    "the longest text of llama3": ("llama3 rotary", {"original_max_position_embeddings": 8}),
    "a window of mistral": ("mistral", {"sliding_window": 4}),
    "a share of heads of phi": ("phi", {"rope_parameters": ROPE | {"partial_rotary_factor": 0.8}}),
}


@torch.no_grad()
def check_logits(model: HookedMultimodalTransformer, hf: Any, **batch: Any) -> Tensor:
    """Assert that the logits equal transformers', and return them."""
    ours = model(**batch)
    assert_same(
        {"logits": ours},
        {"logits": hf(**batch).logits},
        lambda: {"logits": rounded_otherwise(hf)(**batch).logits},
    )
    return ours


@pytest.mark.parametrize("case", [*SAY_NOTHING, *SAY_SOMETHING])
def test_a_language_model(case: str, seed: int, tmp_path: Path) -> None:
    shape, fields = (SAY_NOTHING | SAY_SOMETHING)[case]
    random_language_model(SHAPES[shape]).save_pretrained(tmp_path)
    tokens = torch.randint(3, 40, (2, 17))
    before = load(tmp_path)(tokens)
    edit_config(tmp_path, **fields)
    hf = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    model = load(tmp_path)
    attention_mask = torch.ones_like(tokens)
    after = check_logits(model, hf, input_ids=tokens, attention_mask=attention_mask)
    assert (case in SAY_SOMETHING) == bool((after - before).abs().max() > 1e-2)


def test_a_share_of_heads_with_other_angles_is_refused(seed: int, tmp_path: Path) -> None:
    """transformers makes too few angles for whole heads there, and fails."""
    random_language_model(SHAPES["linear rotary"]).save_pretrained(tmp_path)
    rope = {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    edit_config(tmp_path, rope_parameters=rope)
    refused(tmp_path, "partial_rotary_factor is 0.5", "'linear'", "rotates whole heads")


@pytest.mark.parametrize("shape", ["qwen2", "gemma3", "phi"])
def test_an_encoder_of_texts_is_refused(shape: str, seed: int, tmp_path: Path) -> None:
    """With is_causal false transformers masks nothing."""
    random_language_model(SHAPES[shape]).save_pretrained(tmp_path)
    edit_config(tmp_path, is_causal=False)
    refused(tmp_path, "is_causal is False", "predict the next token")


@pytest.mark.parametrize("change", [{"is_causal": False}, {"text_config": {"is_causal": False}}])
def test_an_encoder_with_images_is_refused(
    change: dict[str, Any], seed: int, tmp_path: Path
) -> None:
    random_llava().save_pretrained(tmp_path)
    merge_config(tmp_path, change)
    refused(tmp_path, "is_causal is False", "predict the next token")


def test_a_window_of_qwen3_vl(seed: int, tmp_path: Path) -> None:
    """Its decoder reads no window, unlike Qwen3's alone."""
    chance = random.Random(seed)
    processor = qwen_models.write("qwen3", tmp_path, qwen_models.random_qwen("qwen3", chance))
    merge_config(tmp_path, {"text_config": {"sliding_window": 4, "use_sliding_window": False}})
    hf = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    check_logits(load(tmp_path), hf, **random_batch(processor, [1], chance))


@pytest.mark.parametrize("text", ["granite", "gemma2", "gemma"])
def test_decoders_inside_of_internvl(text: str, seed: int, tmp_path: Path) -> None:
    """Its class neither caps nor scales logits; of the two, Granite multiplies visual tokens."""
    family = replace(internvl_models.FAMILIES["Qwen2"], text=SHAPES[text])
    hf = internvl_models.random_internvl(family)
    processor = internvl_models.write(family, tmp_path, hf)
    hf.set_attn_implementation("eager")  # no other caps scores
    batch = internvl_models.random_batch(processor, [1, 2], random.Random(seed))
    positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    real, model = batch["attention_mask"].bool(), load(tmp_path)

    @torch.no_grad()
    def theirs(hf: Any) -> dict[str, Tensor]:
        return {"logits": hf(**batch, position_ids=positions).logits[real]}

    ours = {"logits": model(**batch)[real]}
    assert_same(ours, theirs(hf), lambda: theirs(rounded_otherwise(hf)))


def test_granite_inside_of_idefics3(seed: int, tmp_path: Path) -> None:
    family = tiled_models.FAMILIES["idefics3"]
    factors = {
        "embedding_multiplier": 1.7,
        "residual_multiplier": 0.6,
        "attention_multiplier": 0.4,
        "logits_scaling": 2.3,
    }
    hf = tiled_models.random_idefics(family, GraniteConfig, **factors)
    assert hf.config.text_config.model_type == "granite"
    processor = tiled_models.write(family, tmp_path, hf)
    batch = tiled_models.random_batch(processor, [1], random.Random(seed))
    check_logits(load(tmp_path), hf, **batch)


@pytest.mark.parametrize("ends", [7, [7, 9]], ids=str)
def test_end_tokens_of_the_whole_model_come_first(ends: Any, seed: int, tmp_path: Path) -> None:
    hf = random_llava()
    hf.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").unlink()
    merge_config(tmp_path, {"eos_token_id": ends, "text_config": {"eos_token_id": 2}})
    theirs = AutoModelForImageTextToText.from_pretrained(tmp_path).generation_config
    expected = theirs.eos_token_id
    expected = tuple(expected) if isinstance(expected, list) else (expected,)
    assert load(tmp_path).cfg.eos_token_ids == expected == tuple([ends] if ends == 7 else ends)
    edit_config(tmp_path, eos_token_id=None)
    assert load(tmp_path).cfg.eos_token_ids == (2,)
