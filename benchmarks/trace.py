"""What a causal trace costs: Hugging Face with forward hooks, mmlens naive, mmlens branching.

One question about one flag, the demo model, one run, one device: every layer at three sites, at one
position (the last of the constraint) or at every text position. Times are given as forward-pass
equivalents: time / time of one Hugging Face SDPA forward of the same prompt's embeddings.

    python benchmarks/trace.py [--map] [--repeats 3]      (nothing else should run meanwhile)

The reference is transformers' `LlamaForCausalLM` with the same weights, given the embeddings with
the visual tokens in, one forward pass per cell with a torch forward hook, as one would write it by
hand. Differences are between probabilities of the answer. Writes benchmarks/results/trace-*.md.
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from mmlens import CausalTrace, HookedMultimodalTransformer, causal_trace, demo_questions, swap_span
from mmlens.demo.language_model import language_model_folder
from mmlens.files import write_atomically
from mmlens.inputs import MultimodalInputs

SITES = ("resid_post", "attn_out", "mlp_out")
RESULTS = Path(__file__).parent / "results"


def seconds(run: Callable[[], Any], repeats: int) -> tuple[float, Any]:
    """The shortest of several runs, after one that warms up, and its result."""
    run()
    best, result = float("inf"), None
    for _ in range(repeats):
        began = time.perf_counter()
        result = run()
        best = min(best, time.perf_counter() - began)
    return best, result


def hf_module(lm: LlamaForCausalLM, site: str, layer: int) -> torch.nn.Module:
    """The module whose output is the site's activation."""
    block = lm.model.layers[layer]
    return {"resid_post": block, "attn_out": block.self_attn, "mlp_out": block.mlp}[site]


def first(output: Any) -> Tensor:
    """A module's hidden states, of a tuple or alone."""
    return output[0] if isinstance(output, tuple) else output


def keep(kept: dict, key: tuple[str, int]) -> Callable[..., None]:
    """A forward hook that stores the activation."""

    def hook(module: Any, args: Any, output: Any) -> None:
        kept[key] = first(output)

    return hook


def put_back(clean: Tensor, position: int) -> Callable[..., Any]:
    """A forward hook that restores one position."""

    def hook(module: Any, args: Any, output: Any) -> Any:
        hidden = first(output).clone()
        hidden[:, position] = clean[:, position]
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    return hook


@torch.no_grad()
def trace_by_hand(
    lm: LlamaForCausalLM, clean: Tensor, corrupted: Tensor, positions: list[int], answer: int
) -> Tensor:
    """P(answer) [site, position, layer], one hooked forward pass per cell."""
    kept: dict[tuple[str, int], Tensor] = {}
    layers = range(len(lm.model.layers))
    keys = [(site, layer) for site in SITES for layer in layers]
    handles = [hf_module(lm, *key).register_forward_hook(keep(kept, key)) for key in keys]
    lm(inputs_embeds=clean, logits_to_keep=1)
    for handle in handles:
        handle.remove()
    cells = torch.empty(len(SITES), len(positions), len(layers))
    for site, layer in keys:
        for p, position in enumerate(positions):
            hook = put_back(kept[site, layer], position)
            handle = hf_module(lm, site, layer).register_forward_hook(hook)
            logits = lm(inputs_embeds=corrupted, logits_to_keep=1).logits
            handle.remove()
            cells[SITES.index(site), p, layer] = logits[0, -1].softmax(-1)[answer]
    return cells


def embeddings(model: HookedMultimodalTransformer, inputs: MultimodalInputs) -> Tensor:
    """The residual stream that enters block 0."""
    with torch.no_grad():
        return model.input_embeddings(inputs)


def main() -> None:
    """Measure, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--map", action="store_true", help="every text position from the constraint"
    )
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    model = HookedMultimodalTransformer.from_pretrained("demo")
    lm = LlamaForCausalLM.from_pretrained(language_model_folder()).to(model.device).eval()
    question = demo_questions(relation="capital")[0]
    clean = model.prepare(
        question.question, question.image, spans={"constraint": question.visual_constraint}
    )
    corrupted = swap_span(model, clean, "constraint", "Paris")
    start = int(clean.span("constraint")[0])
    positions = list(range(start, clean.n_pos)) if options.map else [start + 1]
    x, y = embeddings(model, clean), embeddings(model, corrupted)
    with torch.no_grad():
        one, _ = seconds(lambda: lm(inputs_embeds=x, logits_to_keep=1), 10)

    def traced(method: Any) -> CausalTrace:
        return causal_trace(
            model, clean, corrupted, sites=SITES, positions=positions, method=method
        )

    few = 1 if options.map else options.repeats
    by_branch, branch = seconds(lambda: traced("branch"), options.repeats)
    by_naive, naive = seconds(lambda: traced("naive"), few)
    answer = branch.answer_tokens[0]
    by_hand, hand = seconds(lambda: trace_by_hand(lm, x, y, positions, answer), few)
    rows = [
        ("Hugging Face, forward hooks, one cell a pass", by_hand, 0.0),
        ("mmlens, method='naive'", by_naive, float((naive.restored - hand).abs().max())),
        ("mmlens, method='branch'", by_branch, float((branch.restored - hand).abs().max())),
    ]
    name = torch.cuda.get_device_name() if model.device.type == "cuda" else platform.machine()
    threads = "" if model.device.type == "cuda" else f", {torch.get_num_threads()} threads"
    lines = [
        f"# One causal trace of the demo model ({'map' if options.map else 'one position'})",
        "",
        f"Device: {name}{threads}; torch {torch.__version__}; {clean.n_pos} positions, "
        f"{len(positions)} traced, {len(SITES)} sites, {model.cfg.n_layers} layers = "
        f"{branch.restored.numel()} cells; one Hugging Face forward: {one * 1e3:.1f} ms.",
        "",
        "| | seconds | forward-pass equivalents | times faster than by hand | max difference |",
        "|---|---|---|---|---|",
    ]
    for label, time_, difference in rows:
        lines.append(
            f"| {label} | {time_:.2f} | {time_ / one:.1f} | {by_hand / time_:.1f} | "
            f"{difference:.1e} |"
        )
    text = "\n".join(lines) + "\n"
    print(text)
    RESULTS.mkdir(exist_ok=True)
    kind = "map" if options.map else "one-position"
    write_atomically(RESULTS / f"trace-{kind}-{model.device.type}.md", text)


if __name__ == "__main__":
    main()
