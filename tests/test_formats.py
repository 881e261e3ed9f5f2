"""Formats and decoders that a user adds."""

import json
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from mmlens import HookedMultimodalTransformer
from mmlens.checkpoints.decoders import DECODERS, Decoder, llama
from mmlens.checkpoints.formats import FORMATS, Format, language_model, register
from mmlens.checkpoints.names import under
from mmlens.config import MultimodalConfig

DOUBLE: Any = {"device": "cpu", "dtype": torch.float64}
NAME = "everything under another name"


def config(folder: Path, tower: None = None) -> MultimodalConfig:
    return replace(language_model.config(folder), original_architecture="Another")


def names(cfg: MultimodalConfig) -> dict[str, str]:
    return under("body.", llama.NAMES) | {"lm_head": "unembed"}


@pytest.fixture
def another() -> Iterator[Format]:
    yield register(Format(NAME, lambda config: "body" in config, config, names))
    del FORMATS[NAME]


def written(folder: Path) -> LlamaForCausalLM:
    heads = random.choice([2, 4])
    theirs = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=8 * heads, intermediate_size=20, num_hidden_layers=random.randint(2, 12),
            num_attention_heads=heads, num_key_value_heads=2, vocab_size=40,
            tie_word_embeddings=False,
        )
    ).eval()  # fmt: skip
    theirs.save_pretrained(folder)
    return theirs


@torch.no_grad()
def test_a_registered_format_is_opened_and_saved(
    another: Format, seed: int, tmp_path: Path
) -> None:
    theirs = written(tmp_path / "one")
    file, settings = tmp_path / "one" / "model.safetensors", tmp_path / "one" / "config.json"
    tensors = {name.replace("model.", "body."): each for name, each in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"body": 1}))
    model = HookedMultimodalTransformer.from_pretrained(tmp_path / "one", **DOUBLE)
    assert model.cfg.original_architecture == "Another"
    tokens = torch.randint(40, (2, 7))
    torch.testing.assert_close(model(tokens), theirs.double()(tokens).logits)
    model.save_pretrained(tmp_path / "two")
    again = load_file(tmp_path / "two" / "model.safetensors")
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[name].float(), tensors[name]) for name in tensors)


def test_two_formats_of_one_name_are_refused(another: Format) -> None:
    with pytest.raises(ValueError, match=f"a format '{NAME}' already"):
        register(another)


@torch.no_grad()
def test_a_decoder_with_names_of_its_own(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = written(tmp_path)
    file = tmp_path / "model.safetensors"

    def renamed(name: str) -> str:
        return name.replace("model.", "trunk.").replace("self_attn", "mixer").replace("lm_", "")

    tensors = {renamed(name): each for name, each in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    table = {there.replace("self_attn", "mixer"): here for there, here in llama.NAMES.items()}
    decoder = Decoder(table, llama.choices, prefix="trunk.", head="head")
    monkeypatch.setitem(DECODERS, "llama", decoder)
    model = HookedMultimodalTransformer.from_pretrained(tmp_path, **DOUBLE)
    tokens = torch.randint(40, (1, 9))
    torch.testing.assert_close(model(tokens), theirs.double()(tokens).logits)
