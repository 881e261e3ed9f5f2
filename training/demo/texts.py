"""For stage 2: texts without pictures, and what the language model makes of them, asked once.

Half of them begin with a question that names a training country ("The capital of France is the
city of"), half with nothing; the language model itself goes on, sampled at temperature 0.8.
`texts.safetensors` holds `tokens` [text, LENGTH], BOS included, and the final hidden states
`hidden` [text, LENGTH, width] (the next-token distributions are softmax(hidden @ embedding.T)).

    python training/demo/texts.py --folder WORK_FOLDER
"""

import argparse
import random
from pathlib import Path
from typing import Any

import torch
from captions import load_language_model
from countries import read_countries
from distillation import hidden_states
from relations import AUXILIARY, PHRASINGS, with_name
from safetensors.torch import save_file
from teacher import low_precision
from torch import Tensor

LENGTH = 48
BATCH = 100


def openings(count: int, chance: random.Random) -> list[str]:
    """Named questions about training countries and empty texts, in turn."""
    names = [country.name for country in read_countries() if country.split == "train"]
    prompts = [text for texts in PHRASINGS.values() for text in texts] + list(AUXILIARY)
    return [
        with_name(chance.choice(prompts), chance.choice(names)) if row % 2 else ""
        for row in range(count)
    ]


@torch.no_grad()
def continued(model: Any, tokenizer: Any, texts: list[str]) -> Tensor:
    """[text, LENGTH]: each behind BOS, and as the language model goes on."""
    texts = [tokenizer.bos_token + text for text in texts]
    inputs = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left")
    with torch.autocast("cpu", torch.bfloat16):
        rows = model.generate(
            **inputs, do_sample=True, temperature=0.8, top_k=0, max_new_tokens=LENGTH - 1
        )
    begin = (1 - inputs.attention_mask).sum(1)
    return rows[torch.arange(len(rows))[:, None], begin[:, None] + torch.arange(LENGTH)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--count", type=int, default=1000)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    model, tokenizer = load_language_model()
    model = low_precision(model)
    model.generation_config.eos_token_id = None  # another turn begins
    texts = openings(arguments.count, random.Random(0))
    tokens, hidden = [], []
    for start in range(0, len(texts), BATCH):
        tokens.append(continued(model, tokenizer, texts[start : start + BATCH]))
        with torch.no_grad():
            hidden.append(hidden_states(model, input_ids=tokens[-1]).half())
        print(start, repr(tokenizer.decode(tokens[-1][0])), repr(tokenizer.decode(tokens[-1][1])))
    found = {"tokens": torch.cat(tokens), "hidden": torch.cat(hidden)}
    save_file(found, arguments.folder / "texts.safetensors")


if __name__ == "__main__":
    main()
