"""How layer 23 of the demo model reads the flag: which heads, and which way (docs/findings.md).

    python examples/how_layer_23_reads.py            # 12 questions

Ablation: every head at the last token gets its mean over the questions, and (apart) is kept from
attending to the image. Path patching: the residual stream that enters layer 16 has its value of
another country's flag, at the visual tokens, at "this country" or at the last token, and reaches
the queries, keys or values of layer 23 with everything between kept at the clean run.
"""

from __future__ import annotations

import sys

import torch

from mmlens import (
    HookedMultimodalTransformer,
    ablation_scan,
    demo_questions,
    path_patch,
    swap_image,
)
from mmlens.interventions.functions import knockout
from mmlens.utils.statistics import bootstrap_mean

LAYER, BELOW = 23, 16


def line(name: str, values: torch.Tensor, clusters: list[str]) -> str:
    """A mean over questions with its interval."""
    mean, low, high = (float(x) for x in bootstrap_mean(values[:, None], clusters))
    return f"{name}: {mean:+.3f} ({low:+.3f} to {high:+.3f})"


def main(n: int = 12) -> None:
    """Print the tables."""
    model = HookedMultimodalTransformer.from_pretrained("demo")
    asked = demo_questions(relation="capital", answered=True)[:n]
    countries = [question.subject for question in asked]
    prompts = [model.prepare(q.prompt(), q.open_images(), spans=q.spans()) for q in asked]
    answers = [question.answers[0] for question in asked]
    options = {"answer": answers, "clusters": countries}

    scan = ablation_scan(model, prompts, "heads", "mean", positions="last", **options)
    print(f"{n} questions, P(answer) {scan.baseline:.2f}; heads at the last token by their means:")
    print(scan.to_dataframe().nsmallest(8, "effect").to_string(index=False))
    image = prompts[0].span("image")
    assert all(torch.equal(each.span("image"), image) for each in prompts)
    cut = ablation_scan(model, prompts, "heads", knockout(image), site="attn_scores",
                        positions="last", **options)  # fmt: skip
    print("without attention from the last token to the image:")
    print(cut.to_dataframe().nsmallest(8, "effect").to_string(index=False))
    print("layer 23, head by head:")
    print(cut.to_dataframe().query(f"layer == {LAYER}").to_string(index=False))

    effects: dict[str, list[float]] = {}
    for index, (clean, question) in enumerate(zip(prompts, asked, strict=True)):
        other = asked[(index + 1) % n]
        corrupted = swap_image(model, clean, other.open_images()[0])
        spans = {"image": image, "constraint": clean.span("constraint"), "last": clean.span("last")}
        senders = [("resid_pre", BELOW, positions) for positions in spans.values()]
        pair = {"answer": question.answers[0], "contrast": other.answers[0]}
        ways = {
            "v": [("v", LAYER, image)],
            "k": [("k", LAYER, image)],
            "q": [("q", LAYER, spans["last"])],
            "all": [("v", LAYER), ("k", LAYER), ("q", LAYER)],
            "logits": ["logits"],
        }
        for way, receivers in ways.items():
            paths = path_patch(
                model, clean, corrupted, senders, receivers, metric="logit_diff", **pair
            )
            for span, effect in zip(spans, paths.effect.tolist(), strict=True):
                effects.setdefault(f"{span} -> {way}", []).append(effect)
        effects.setdefault("everything", []).append(float(paths.corrupted) - float(paths.baseline))
    print("logit difference (answer - the other flag's answer), change by path:")
    for name, values in effects.items():
        print(line(name, torch.tensor(values), countries))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
