"""Ask the language model every demo question behind given visual tokens: quick, for development.

`evaluate.py` measures the shipped model through mmlens; this one shares each picture's keys and
values between its questions and takes weights from a checkpoint.

    python training/demo/measure.py --folder WORK_FOLDER --checkpoint WORK_FOLDER/stage_a.pt
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from captions import caption_tokens, load_language_model, token_ids
from countries import read_countries
from loop import load_average
from student import UNSEEN, Pictures, Student
from teacher import low_precision
from torch import Tensor

from mmlens.data import VisualQuestion, demo_questions

NEW_TOKENS = 6


@torch.no_grad()
@torch.autocast("cpu", torch.bfloat16)
def answer_all(model: Any, tokenizer: Any, visual: Tensor) -> dict[str, str]:
    """Greedy continuations of every demo question, by its source; one visual row per country."""
    from transformers import DynamicCache

    embed = model.get_input_embeddings()
    bos = embed(torch.full((len(visual), 1), model.config.bos_token_id))
    rows = {country.code: row for row, country in enumerate(read_countries())}
    prefix = DynamicCache()
    model.model(inputs_embeds=torch.cat([bos, visual], 1), past_key_values=prefix, use_cache=True)
    by_text: dict[str, list[VisualQuestion]] = defaultdict(list)
    for question in demo_questions():
        by_text[question.question].append(question)
    answers = {}
    for text, questions in by_text.items():
        tokens, said, added = torch.tensor([token_ids(tokenizer, text)] * len(rows)), [], 0
        for _ in range(NEW_TOKENS):
            out = model(tokens, past_key_values=prefix, use_cache=True, logits_to_keep=1)
            added += tokens.shape[1]
            tokens = out.logits[:, -1].argmax(-1, keepdim=True)
            said.append(tokens)
        prefix.crop(-added)
        texts = tokenizer.batch_decode(torch.cat(said, 1))
        for question in questions:
            answers[question.source] = texts[rows[question.source.split("/")[1]]]
    return answers


def table(told: dict[str, str], seen: dict[str, str]) -> str:
    """Per relation: the ceiling, and what is seen rightly where told is right, by split."""
    lines = ["relation      told   train seen|told      held-out seen|told   all seen"]
    counts: dict[str, dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))
    for question in demo_questions():
        by_name = question.is_right(told[question.source])
        by_sight = question.is_right(seen[question.source])
        for name in (question.relation, "ALL"):
            counts[name]["told"].append(by_name)
            counts[name]["seen"].append(by_sight)
            if by_name:
                counts[name][question.split].append(by_sight)
    for name, group in counts.items():
        cells = [f"{name:13s} {share(group['told'])}"]
        cells += [f"{share(group[key])} n={len(group[key]):4d}" for key in ("train", "held_out")]
        lines.append("   ".join([*cells, share(group["seen"])]))
    return "\n".join(lines)


def share(values: list[bool]) -> str:
    return f"{sum(values) / len(values):.3f}" if values else "  -  "


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--rendering", default=UNSEEN)
    arguments = parser.parse_args()
    model, tokenizer = load_language_model()
    model = low_precision(model)
    told_file = arguments.folder / "told.json"
    if not told_file.exists():
        embed = model.get_input_embeddings()
        told = answer_all(model, tokenizer, embed(caption_tokens(tokenizer)))
        told_file.write_text(json.dumps(told, indent=0))
    told = json.loads(told_file.read_text())
    pictures = Pictures.load(arguments.folder)
    student = Student(len(pictures.codes))
    average = torch.load(arguments.checkpoint)["average"]
    load_average(student, {name: value.half().float() for name, value in average.items()})
    student.eval()
    with torch.no_grad():
        visual, logits = student(pictures.clean(arguments.rendering))
    named = (logits.argmax(-1) == torch.arange(len(logits))).float().mean()
    seen = answer_all(model, tokenizer, visual)
    (arguments.folder / "seen.json").write_text(json.dumps(seen, indent=0))
    print(arguments.checkpoint, arguments.rendering, f"tower names {named:.3f}")
    print(table(told, seen))


if __name__ == "__main__":
    main()
