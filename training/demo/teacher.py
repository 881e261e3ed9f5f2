"""For stage 2: what the language model answers when it is TOLD the country, asked once and kept.

For every country and every prompt that training may use: the greedy continuation of
[BOS][caption over the visual positions][prompt], and the final hidden states from the prompt's
last token on (the next-token distributions are softmax(hidden @ embedding.T)).

    python training/demo/teacher.py --folder WORK_FOLDER
"""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from captions import caption_tokens, load_language_model, token_ids
from countries import Country, read_countries
from relations import AUXILIARY, NAMING, PHRASINGS
from torch import Tensor

#: tokens of the answer whose distributions are kept, the first one included
DEPTH = 3


@dataclass
class Asked:
    """One prompt and, per country it was asked about, what the teacher said."""

    prompt: list[int]
    relation: str
    countries: Tensor  #: [n]
    answer: Tensor  #: [n, DEPTH]: the greedy continuation
    hidden: Tensor  #: [n, DEPTH, width]: final hidden states that predict it


def low_precision(model: Any) -> Any:
    """bfloat16 matrices, the rest (embeddings, norms, residual stream) in float32."""
    for module in model.model.layers.modules():
        if isinstance(module, torch.nn.Linear):
            module.to(torch.bfloat16)
    return model


def prompts() -> list[tuple[str, str]]:
    """Every (relation, prompt) of the training, naming first."""
    relations = {"name": NAMING, **PHRASINGS, "auxiliary": AUXILIARY}
    return [(relation, text) for relation, texts in relations.items() for text in texts]


@torch.no_grad()
def told_prefix(model: Any, captions: Tensor) -> Any:
    """Keys and values of BOS and the caption, one row a country."""
    from transformers import DynamicCache

    cache = DynamicCache()
    bos = torch.full((len(captions), 1), model.config.bos_token_id)
    with torch.autocast("cpu", torch.bfloat16):
        model.model(torch.cat([bos, captions], 1), past_key_values=cache, use_cache=True)
    return cache


@torch.no_grad()
def ask(model: Any, prefix: Any, prompt: list[int], rows: int) -> tuple[Tensor, Tensor]:
    """The greedy continuation behind the prefix, and its hidden states; the prefix is kept."""
    tokens, answer, hidden = torch.tensor([prompt] * rows), [], []
    added = 0
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(DEPTH):
            out = model.model(tokens, past_key_values=prefix, use_cache=True)
            added += tokens.shape[1]
            hidden.append(out.last_hidden_state[:, -1].float())
            tokens = model.lm_head(hidden[-1]).argmax(-1, keepdim=True)
            answer.append(tokens)
    prefix.crop(-added)
    return torch.cat(answer, 1), torch.stack(hidden, 1)


def may_be_asked(country: Country, relation: str) -> bool:
    """Of a held-out country only the name may be learnt."""
    return country.split == "train" or relation == "name"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    arguments = parser.parse_args()
    model, tokenizer = load_language_model()
    model, countries = low_precision(model), read_countries()
    captions = caption_tokens(tokenizer)
    train = torch.tensor([c.split == "train" for c in countries]).nonzero()[:, 0]
    groups = {"name": torch.arange(len(countries)), "fact": train}
    prefixes = {kind: told_prefix(model, captions[rows]) for kind, rows in groups.items()}
    asked = []
    for relation, text in prompts():
        kind = "name" if relation == "name" else "fact"
        rows, prompt = groups[kind], token_ids(tokenizer, text)
        assert all(may_be_asked(countries[row], relation) for row in rows.tolist())
        answer, hidden = ask(model, prefixes[kind], prompt, len(rows))
        asked.append(Asked(prompt, relation, rows, answer, hidden.half()))
        print(relation, repr(text), repr(tokenizer.decode(answer[0])), flush=True)
    torch.save([vars(item) for item in asked], arguments.folder / "teacher.pt")


if __name__ == "__main__":
    main()
