"""The table of docs/families.md: which analysis is exact or linear in which family.

On checkpoints as the hub has them, with images, windows that are shorter than an image, and norms
of 1 + w; in float64, against plain runs and against sums over hooks.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gemma_models
import internvl_models
import pytest
import torch
from torch import Tensor

from mmlens import (
    attention_knockout,
    causal_trace,
    direct_logit_attribution,
    hook_name,
    logit_lens,
    path_patch,
    token_erasure,
)
from mmlens.analyses.attention_contribution import attention_vectors
from mmlens.inputs.multimodal_inputs import MultimodalInputs
from mmlens.model.transformer import HookedMultimodalTransformer

EXACT = 1e-9
Case = tuple[HookedMultimodalTransformer, MultimodalInputs]


def of_gemma(name: str, folder: Path, chance: random.Random) -> Any:
    family = gemma_models.FAMILIES[name]
    width = family.window and chance.choice([2, 5, 30])
    family = replace(family, tied=chance.random() < 0.5, window=width)
    processor = gemma_models.write(family, folder, gemma_models.random_gemma(family))
    return gemma_models.random_batch(family, processor, [2], chance)


def of_internvl(name: str, folder: Path, chance: random.Random) -> Any:
    family = internvl_models.FAMILIES[name]
    processor = internvl_models.write(family, folder, internvl_models.random_internvl(family))
    return internvl_models.random_batch(processor, [2], chance)


FAMILIES: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(gemma_models.FAMILIES, of_gemma),
    next(iter(internvl_models.FAMILIES)): of_internvl,
}


@pytest.fixture(params=FAMILIES)
def case(request: Any, seed: int, tmp_path: Path) -> Case:
    """A model in float64, and a prompt with two images."""
    batch = FAMILIES[request.param](request.param, tmp_path, random.Random(seed))
    given = {name: batch[name] for name in batch if name not in ("input_ids", "labels")}
    model = HookedMultimodalTransformer.from_pretrained(tmp_path, device="cpu").double()
    inputs = model.inputs_from_tokens(batch["input_ids"], **given)
    assert inputs.pixel_values is not None
    return model, inputs.with_pixels(inputs.pixel_values.double())


@torch.no_grad()
def test_parts_sum_to_the_whole(case: Case) -> None:
    """Contributions, decompositions and logit attribution; the lens ends with the model."""
    model, inputs = case
    logits, cache = model.run_with_cache(inputs)
    last = model.cfg.n_layers - 1
    everything = range(inputs.n_pos)
    moved = attention_vectors(model, inputs, everything, everything)
    written = "attn.out" if model.cfg.post_norms else "attn_out"
    for layer in range(last + 1):
        found = moved[layer].sum(dim=-2) + model.b_O[layer]
        assert (found - cache[hook_name(written, layer)]).abs().max() < EXACT
    for parts, whole in (
        (cache.decompose_resid(None, return_labels=False), cache["resid_post", last]),
        (cache.decompose_resid(1, mlp_input=True, return_labels=False), cache["resid_mid", 1]),
        (
            cache.get_full_resid_decomposition(expand_neurons=True, return_labels=False),
            cache["resid_post", last],
        ),
    ):
        assert (parts.sum(dim=0) - whole).abs().max() < EXACT
    token, other = random.sample(range(model.cfg.d_vocab), 2)
    raw = model.unembed.products(model.ln_final(cache["resid_post", last]))[0].double()
    for per_head in (False, True):
        values = direct_logit_attribution(
            model, inputs, token, contrast=other, per_head=per_head
        ).values
        assert (values.sum(dim=0) - raw[:, token] + raw[:, other]).abs().max() < EXACT
    lens = logit_lens(model, inputs, tokens=[token])
    said = logits[0].log_softmax(dim=-1)[:, token]
    assert (lens.log_probs[-1, :, 0] - said).abs().max() < EXACT


@torch.no_grad()
def test_traces_at_the_ends_of_an_image(case: Case) -> None:
    """At its first, middle and last position, right after it, at all of it; and the last token."""
    model, inputs = case
    image = random.choice(inputs.images).positions.tolist()
    assert inputs.pixel_values is not None
    corrupted = inputs.with_pixels(torch.randn_like(inputs.pixel_values))
    after = min(image[-1] + 1, inputs.n_pos - 1)
    places = [image[0], image[len(image) // 2], image[-1], after, image, inputs.n_pos - 1]
    sites = random.sample(["resid_post", "attn_out", "mlp_out", "q", "v", "z"], 2)
    if model.cfg.post_norms:
        sites.append(random.choice(["attn.out", "mlp.out", "ln2_post.scale"]))
    given: dict[str, Any] = {"sites": sites, "positions": places, "contrast": 5, "answer": 9}
    found, plain = (
        causal_trace(model, inputs, corrupted, method=method, **given)
        for method in ("branch", "naive")
    )
    assert (found.restored - plain.restored).abs().max() < EXACT
    assert found.logit_difference is not None and plain.logit_difference is not None
    assert (found.logit_difference - plain.logit_difference).abs().max() < EXACT
    assert (found.logit_difference - (found.corrupted_logit_difference or 0)).abs().max() > EXACT


@torch.no_grad()
def test_what_is_cut_erased_and_frozen(case: Case) -> None:
    """Knockout, erased tokens and paths, as plain hooks have it."""
    model, inputs = case
    image, last = inputs.images[-1].positions, inputs.n_pos - 1
    layers = range(model.cfg.n_layers)

    def probability(*hooks: Any, of: MultimodalInputs = inputs) -> float:
        return float(model.run_with_hooks(of, fwd_hooks=list(hooks))[0, -1].softmax(-1)[9])

    def masked(scores: Tensor, hook: Any) -> Tensor:
        changed = scores.clone()
        changed[:, :, last, image] = -torch.inf
        return changed

    def erased(embedded: Tensor, hook: Any) -> Tensor:
        every = torch.cat([each.positions for each in inputs.images])
        return embedded.index_copy(1, image[:1], embedded[:, every].mean(dim=1, keepdim=True))

    cut = attention_knockout(model, inputs, image, [last], layers=[0], window=99, answer=9)
    hooks = [(hook_name("attn_scores", layer), masked) for layer in layers]
    assert float(cut.probability[0]) == pytest.approx(probability(*hooks), abs=EXACT)
    gone = token_erasure(model, inputs, image[:1], answer=9, controls=1, max_new_tokens=0)
    expected = probability(("hook_input_embed", erased))
    assert gone.erased == pytest.approx(expected, abs=EXACT)
    assert inputs.pixel_values is not None
    corrupted = inputs.with_pixels(torch.randn_like(inputs.pixel_values))
    _, clean = model.run_with_cache(inputs)
    _, other = model.run_with_cache(corrupted, names_filter="hook_input_embed")
    moved = other["hook_input_embed"] - clean["hook_input_embed"]
    sent = ("input_embed", None)
    direct = path_patch(model, inputs, corrupted, [sent], answer=9).values
    stream = clean["resid_post", model.cfg.n_layers - 1] + moved
    expected = float(model.unembed(model.ln_final(stream))[0, -1].softmax(-1)[9])
    assert float(direct[0]) == pytest.approx(expected, abs=EXACT)
    every = path_patch(model, inputs, corrupted, [sent], answer=9, freeze=()).values
    assert float(every[0]) == pytest.approx(probability(of=corrupted), abs=EXACT)
