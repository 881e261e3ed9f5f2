"""Layer profiles of your own: traces of many questions, aligned by role, with intervals.

    python examples/layer_profile.py --relation capital --limit 20 --out layer-profile

Every position of the question is restored by itself; the profile averages them by what they are:
before the constraint ("this country"), its first and last token, after it, the last token. The same
questions with the country named, to the language model alone, are the second line.
`mmlens reproduce layers` makes the paper's figure of it, with more filters.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd

from mmlens import HookedMultimodalTransformer, causal_trace_many, demo_questions, swap_span
from mmlens.analyses.aggregation import AggregatedTraces, aggregate_traces, role_positions
from mmlens.data import VisualQuestion
from mmlens.plots.layer_profile import plot_layer_profile
from mmlens.plots.save import save_figure


def profile(
    model: HookedMultimodalTransformer, questions: list[VisualQuestion]
) -> AggregatedTraces:
    """The questions' traces, aggregated; questions about one country are resampled together."""
    prompts = [
        model.prepare(each.prompt(), each.open_images() or None, spans=each.spans())
        for each in questions
    ]
    pairs = [(clean, swap_span(model, clean, "constraint", "Paris")) for clean in prompts]
    traces = causal_trace_many(model, pairs, sites=("attn_out", "mlp_out"))
    roles = [role_positions(clean) for clean in prompts]
    return aggregate_traces(traces, roles, clusters=[each.subject for each in questions])


def main() -> None:
    """Trace, aggregate, write the profiles and the figure."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--relation", default="capital")
    parser.add_argument("--limit", type=int, default=20, help="how many questions to trace")
    parser.add_argument("--out", type=Path, default=Path("layer-profile"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    model = HookedMultimodalTransformer.from_pretrained("demo")
    questions = demo_questions(relation=options.relation, answered=True)[: options.limit]
    profiles = {
        "sees the flag": profile(model, questions),
        "told the name": profile(model, [question.named() for question in questions]),
    }
    for name, each in profiles.items():
        each.save(options.out / f"{name}.safetensors")
        print(name, each.compare("mlp_out", "constraint last", range(4), range(4, 30)))
    table = pd.concat([each.to_dataframe(name) for name, each in profiles.items()])
    save_figure(plot_layer_profile(table), options.out / "profile.html")


if __name__ == "__main__":
    main()
