"""The layer profile of the demo model: where do facts about a flag's country come from?

MultiModalCausalTrace (Basu et al. 2024) on the demo questions: the constraint ("this country") is
replaced, clean activations are put back at one layer, at the constraint or at the last token, and
the answer's probability is read. Beside it the same questions to the language model alone, which is
told the country's name ("The capital of France is ...") and has the name replaced.

    python examples/layer_profile.py --limit 60 --out docs/results/layer-profile

Questions are drawn at random from those that the demo model answers (naming aside); those that the
told language model does not answer, or in which the corruption changes little, are left out, and
counted in settings.json. Intervals are bootstrap percentiles
over questions (2,000 resamples).
"""

from __future__ import annotations

import argparse
import json
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from rich.progress import track

from mmlens import (
    CausalTrace,
    HookedMultimodalTransformer,
    MultimodalInputs,
    VisualQuestion,
    causal_trace,
    demo_questions,
    swap_span,
)
from mmlens.files import write_atomically
from mmlens.plots.profile import plot_layer_profile
from mmlens.plots.save import save_figure
from mmlens.spans import find_span

SEEING = "sees the flag"
TOLD = "language model alone, told the name"


@dataclass(frozen=True)
class Settings:
    """What is traced, and which questions count."""

    replacement: str = "Paris"
    window: int = 1
    minimum_gap: float = 0.05
    """Least clean - corrupted probability."""
    resamples: int = 2000
    seed: int = 0


def prompts(
    model: HookedMultimodalTransformer, question: VisualQuestion
) -> dict[str, MultimodalInputs]:
    """The question with the picture, and the question with the country's name instead."""
    constraint, name = question.visual_constraint, question.subject
    start, end = find_span(question.question, constraint)
    if question.question[start].isupper():
        name = name[0].upper() + name[1:]
    text = question.question[:start] + name + question.question[end:]
    return {
        SEEING: model.prepare(question.question, question.image, spans={"constraint": constraint}),
        TOLD: model.prepare(text, spans={"constraint": name}, template=None),
    }


def right(
    model: HookedMultimodalTransformer, inputs: MultimodalInputs, question: VisualQuestion
) -> bool:
    """Whether the greedy continuation begins with an accepted answer."""
    return question.is_right(str(model.generate(inputs, max_new_tokens=6)))


def trace(
    model: HookedMultimodalTransformer, inputs: MultimodalInputs, settings: Settings
) -> CausalTrace:
    """The constraint's positions together, and the last token."""
    return causal_trace(
        model,
        inputs,
        swap_span(model, inputs, "constraint", settings.replacement),
        window=settings.window,
        positions=[inputs.span("constraint"), inputs.span("last")],
    )


def all_effects(
    model: HookedMultimodalTransformer, limit: int, settings: Settings
) -> tuple[pd.DataFrame, dict[str, int]]:
    """One row per question, model, site, role and layer; and how many questions dropped out."""
    frames, counts = [], {"asked": 0, "not answered by both": 0, "gap too small": 0, "traced": 0}
    pool = [each for each in demo_questions(answered=True) if each.relation != "name"]
    random.Random(settings.seed).shuffle(pool)
    for number, question in enumerate(track(pool, description="tracing")):
        if counts["traced"] == limit:
            break
        counts["asked"] += 1
        both = prompts(model, question)
        if not all(right(model, inputs, question) for inputs in both.values()):
            counts["not answered by both"] += 1
            continue
        traces = {name: trace(model, inputs, settings) for name, inputs in both.items()}
        if min(each.clean - each.corrupted for each in traces.values()) < settings.minimum_gap:
            counts["gap too small"] += 1
            continue
        counts["traced"] += 1
        for name, each in traces.items():
            table = each.to_dataframe()
            table["role"] = table["group"].map({0: "constraint", 1: "last token"})
            table["clean"], table["corrupted"] = each.clean, each.corrupted
            frames.append(table.assign(model=name, question=number, relation=question.relation))
    return pd.concat(frames, ignore_index=True), counts


def profile(effects: pd.DataFrame, settings: Settings) -> pd.DataFrame:
    """Means over questions and bootstrap intervals (95 %), per model, site, role and layer."""
    generator = np.random.default_rng(settings.seed)
    questions = effects["question"].unique()
    draws = generator.integers(len(questions), size=(settings.resamples, len(questions)))
    rows = []
    keys = ["model", "site", "role", "layer"]
    for key, group in effects.groupby(keys, sort=False):
        values = group.set_index("question").loc[questions, "indirect_effect"].to_numpy()
        low, high = np.percentile(values[draws].mean(axis=1), [2.5, 97.5])
        rows.append(
            dict(zip(keys, key, strict=True)) | {"mean": values.mean(), "low": low, "high": high}
        )
    return pd.DataFrame(rows)


def main() -> None:
    """Trace, aggregate, write the tables, the settings and the figure."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--limit", type=int, default=60, help="how many questions to trace")
    parser.add_argument("--replacement", default=Settings.replacement)
    parser.add_argument("--window", type=int, default=Settings.window)
    parser.add_argument("--out", type=Path, default=Path("layer-profile"))
    options = parser.parse_args()
    settings = Settings(replacement=options.replacement, window=options.window)
    model = HookedMultimodalTransformer.from_pretrained("demo")
    effects, counts = all_effects(model, options.limit, settings)
    table = profile(effects, settings)
    options.out.mkdir(parents=True, exist_ok=True)
    base = effects.drop_duplicates(["model", "question"]).groupby("model")[["clean", "corrupted"]]
    summary = {"settings": vars(settings), "questions": counts, "mean": base.mean().to_dict()}
    write_atomically(options.out / "settings.json", json.dumps(summary, indent=2) + "\n")
    write_atomically(options.out / "profile.csv", table.round(5).to_csv(index=False))
    effects["positions"] = effects["positions"].map(str)
    write_atomically(options.out / "effects.parquet", effects.to_parquet(index=False))
    subtitle = (
        f"{counts['traced']} demo questions, 95 % bootstrap interval, window {settings.window}"
    )
    figure = plot_layer_profile(table, subtitle=subtitle)
    save_figure(figure, options.out / "profile.png")
    print(json.dumps(summary, indent=2))


if __name__ == "__main__":
    main()
