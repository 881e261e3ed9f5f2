"""What the language model is told: a caption laid over the visual positions."""

from pathlib import Path
from typing import Any

import torch
from countries import read_countries
from student import N_VISUAL
from torch import Tensor

from mmlens.demo.language_model import language_model_folder

CAPTION = " A photo of the flag of {}."
#: the caption starts anew at every second row of patches, so that its words have fixed places
PERIOD = 16


def load_language_model() -> tuple[Any, Any]:
    """The frozen language model and its tokenizer."""
    from transformers import AutoTokenizer, LlamaForCausalLM

    folder: Path = language_model_folder()
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.eval().requires_grad_(False)
    return model, AutoTokenizer.from_pretrained(folder)


def token_ids(tokenizer: Any, text: str) -> list[int]:
    """The text's tokens, without any special one."""
    return list(tokenizer(text, add_special_tokens=False).input_ids)


def caption_tokens(tokenizer: Any) -> Tensor:
    """[country, 64]: each country's caption, repeated over the visual positions."""
    rows = []
    for country in read_countries():
        ids = token_ids(tokenizer, CAPTION.format(country.name))
        assert len(ids) <= PERIOD, country
        rows.append((ids * PERIOD)[:PERIOD] * (N_VISUAL // PERIOD))
    return torch.tensor(rows)
