"""Tokenizer files that somebody else made: a short text fills no memory."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from checkpoint_folders import load
from limits import time_limit
from tiny_checkpoint import write_tiny_llava
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from mmlens.checkpoints.errors import CheckpointError
from mmlens.checkpoints.json_files import growth

REGEX, SPACE = {"Regex": "."}, {"String": " "}


def rule(pattern: dict[str, str], content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


def with_rules(folder: Path, part: str, *rules: Any) -> Path:
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {part: sequence(part, rules)}))
    return path


def sequence(part: str, rules: Any) -> dict[str, Any]:
    return {"type": "Sequence", f"{part}s": list(rules)}


@pytest.mark.parametrize("part", ["normalizer", "decoder"])
@pytest.mark.parametrize(
    "rules",
    [
        [rule(REGEX, "a" * 1000)] * 2,
        [rule({"Regex": "(?=q)"}, "q")] * 40,
        [rule(SPACE, " " * 20)] * 5,
        [sequence("normalizer", [rule({"String": "ab"}, "ab" * 100)])] * 3,
    ],
    ids=["long", "doubled", "spaces", "within"],
)
def test_rules_that_fill_any_memory(part: str, rules: Any, seed: int, tmp_path: Path) -> None:
    folder = write_tiny_llava(tmp_path, seed)
    path = with_rules(folder, part, *json.loads(json.dumps(rules).replace("normalizer", part)))
    with time_limit(), pytest.raises(CheckpointError) as error:
        load(folder)
    text = str(error.value)
    assert str(path) in text and f"its {part} replaces" in text and "\n" not in text


def test_rules_of_published_tokenizers(seed: int, tmp_path: Path) -> None:
    """Those of Llama and Gemma, and a normaliser of white space, are taken."""
    folder = write_tiny_llava(tmp_path, seed)
    before = load(folder).to_tokens("the  capital")
    marks = [rule(SPACE, "▁"), rule({"String": "▁"}, " "), rule({"Regex": " {2,}"}, "  ")]
    with_rules(folder, "normalizer", *marks)
    assert load(folder).to_tokens("the  capital").tolist() == before.tolist()


def test_no_text_grows_more(seed: int) -> None:
    """Than the bound says; by the tokenizers library itself."""
    chance = random.Random(seed)
    patterns = [{"Regex": each} for each in (".", "", "a*", "(?=a)", "[ab]", r"\s|$")]
    patterns += [{"String": each} for each in ("a", "ab", " ")]
    for _ in range(40):
        pattern, content = chance.choice(patterns), "ab"[: chance.randint(0, 2)] * 3
        described = json.loads(Tokenizer(WordLevel({"a": 0}, "a")).to_str())
        described["normalizer"] = rule(pattern, content)
        normalizer: Any = Tokenizer.from_str(json.dumps(described)).normalizer
        text = "".join(chance.choices("ab ", k=chance.randint(1, 30)))
        longest = growth(pattern, content) * len(text) + len(content)
        assert len(normalizer.normalize_str(text)) <= longest, (pattern, content, text)
