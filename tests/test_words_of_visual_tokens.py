"""The lens on visual tokens: against plain runs, and scores that are counted here."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from made_families import qwen
from sklearn.metrics import average_precision_score
from small_models import picture, small_inputs, small_model, worded_model
from small_tiled_models import noise_picture, tiled_model
from torch import Tensor

from mmlens import (
    Intervention,
    LogitLens,
    WordMap,
    ablation_scan,
    hook_name,
    logit_lens,
    token_erasure,
    word_map,
)
from mmlens.analyses.targets import given_answer
from mmlens.analyses.token_erasure import TokenErasure, drawn
from mmlens.inputs.multimodal_inputs import MultimodalInputs
from mmlens.interventions.functions import scale, zero
from mmlens.interventions.intervention import hook_names
from mmlens.plots.words import plot_patch_words

HOOKS = {
    "resid_pre": "blocks.{}.hook_resid_pre",
    "resid_mid": "blocks.{}.hook_resid_mid",
    "resid_post": "blocks.{}.hook_resid_post",
    "attn_out": "blocks.{}.hook_attn_out",
    "mlp_out": "blocks.{}.hook_mlp_out",
    "input_embed": "hook_input_embed",
    "embed": "hook_embed",
}


@pytest.mark.parametrize("site", HOOKS)
def test_any_residual_site_is_read(seed: int, site: str) -> None:
    model = small_model(seed)
    inputs = small_inputs(model, seed)
    token = random.randrange(2, 60)
    lens = logit_lens(model, inputs, site=site, tokens=[token], top=3)
    _, cache = model.run_with_cache(inputs)
    assert lens.site == site
    assert lens.layers == (tuple(range(model.cfg.n_layers)) if "{}" in HOOKS[site] else (0,))
    for at, layer in enumerate(lens.layers):
        resid = cache[HOOKS[site].format(layer)]
        logits = (model.ln_final(resid) @ model.W_U + model.b_U)[0].double().log_softmax(-1)
        assert float((lens.log_probs[at, :, 0] - logits[:, token]).abs().max()) <= 1e-4
        assert float((lens.top_log_probs[at] - logits.topk(3).values).abs().max()) <= 1e-4


def test_the_lens_before_the_first_layer_is_that_of_the_embeddings(seed: int) -> None:
    model = small_model(seed)
    inputs = small_inputs(model, seed)
    before = logit_lens(model, inputs, site="resid_pre", tokens=[5], layers=[0])
    entering = logit_lens(model, inputs, site="input_embed", tokens=[5])
    assert torch.equal(before.log_probs, entering.log_probs)


def test_other_sites_are_refused(seed: int) -> None:
    model = small_model(seed, parallel_attn_mlp=True, normalization_type="LN")
    inputs = small_inputs(model, seed)
    inside = ("ln1.normalized", "ln_final.normalized", "attn.out", "mlp.out", "ln1_post.normalized")
    others = ("z", "pattern", "post", "vision.resid_post", "projector.out", "ln1.scale")
    for site in (*inside, *others):
        with pytest.raises(ValueError, match="the lens reads vectors of the residual stream"):
            logit_lens(model, inputs, site=site)
    with pytest.raises(ValueError, match=r"this model has no blocks.0.hook_resid_mid"):
        logit_lens(model, inputs, site="resid_mid")
    with pytest.raises(ValueError, match="has no layers; leave them out"):
        logit_lens(model, inputs, site="embed", layers=[0])
    with pytest.raises(ValueError, match="image 1 of 1"):
        word_map(model, inputs, 5, image=1)


def test_words_of_patches(seed: int, tmp_path: Any) -> None:
    model = tiled_model(seed)
    inputs = model.prepare("What is this?", noise_picture(seed, 37, 21))
    lens = logit_lens(model, inputs, layers=[1], top=2)
    table = lens.patch_words(1)
    tokens = inputs.images[0]
    assert table["position"].tolist() == tokens.positions.tolist()
    cells = tokens.cells[tokens.is_visual].tolist()
    assert table[["view", "row", "column"]].to_numpy().tolist() == cells
    for words, position in zip(table["words"], table["position"], strict=True):
        assert words == lens.top_strings(1, position)
    with pytest.raises(ValueError, match="visual token of image 1"):
        lens.patch_words(1, image=1)
    again = LogitLens.load(lens.save(tmp_path / "lens.safetensors"))
    assert again.patch_words(1).equals(table)
    rows, columns = tokens.grids[1]
    figure = plot_patch_words(lens, 1, view=1)
    assert np.shape(figure.data[0].z) == (rows, columns)
    first = table[(table["view"] == 1) & (table["row"] == 0) & (table["column"] == 1)]
    assert figure.data[0].customdata[0][1].startswith(first["words"].iloc[0][0].strip()[:1])
    with pytest.raises(ValueError, match="patch of view 99"):
        plot_patch_words(lens, 1, view=99)


@pytest.mark.parametrize("tiled", [False, True])
def test_a_map_of_a_word_and_its_scores(seed: int, tiled: bool, tmp_path: Any) -> None:
    """Scores are counted pair by pair here."""
    chance = random.Random(seed)
    model = tiled_model(seed) if tiled else worded_model(seed)
    width, height = chance.randint(20, 60), chance.randint(20, 60)
    inputs = model.prepare("What is this?", noise_picture(seed, width, height))
    found = word_map(model, inputs, " flag", layers=[0, 1])
    lens = logit_lens(model, inputs, layers=[0, 1], positions="image", tokens=[" flag"])
    assert torch.equal(found.log_probs, lens.log_probs[..., 0])
    assert torch.equal(found.ranks, lens.ranks[..., 0])
    patches = [i for i, patch in enumerate(found.patches) if patch[0] >= 0]
    view = inputs.images[0].views[0]
    box = view.cell_box(0, 0)
    scores = found.score(inputs, box)
    inside = [found.positions[i] in inputs.patches(box).tolist() for i in patches]
    assert 0 < sum(inside) < len(inside)
    for at in range(2):
        values = found.log_probs[at, patches].double()
        pairs = [
            1.0 if a > b else 0.5 if a == b else 0.0
            for a, its in zip(values, inside, strict=True)
            for b, other in zip(values, inside, strict=True)
            if its and not other
        ]
        assert scores["auroc"][at] == pytest.approx(np.mean(pairs))
        expected = average_precision_score(inside, values.numpy())
        assert scores["average_precision"][at] == pytest.approx(expected)
        assert scores["share"][at] == pytest.approx(np.mean(inside))
        best = found.top(3, layer=at)
        order = sorted(patches, key=lambda i: -float(found.log_probs[at, i]))
        assert len(best) == min(3, len(patches))
        for position, expected in zip(best, order, strict=False):
            value = found.log_probs[at, found.positions.index(position)]
            assert value == found.log_probs[at, expected]
    assert WordMap.load(found.save(tmp_path / "map.safetensors")).patches == found.patches
    assert len(found.to_dataframe()) == 2 * len(found.positions)
    figure = found.plot(inputs)
    assert len(figure.layout.sliders) == 1
    with pytest.raises(ValueError, match="holds every patch"):
        found.score(inputs, (-999, -999, 9999, 9999))
    other = model.prepare("And now, what is this?", noise_picture(seed, width, height))
    other_map = word_map(model, other, " flag", layers=[0])
    if other_map.positions != found.positions:
        with pytest.raises(ValueError, match="not those of the map"):
            found.score(other, box)


def test_scores_of_a_planted_map(seed: int) -> None:
    """A map that says the word in the box alone is perfect; its reverse finds it last."""
    model = worded_model(seed)
    inputs = model.prepare("What is this?", picture(seed))
    positions = inputs.images[0].positions.tolist()
    cells = tuple(map(tuple, inputs.images[0].cells[inputs.images[0].is_visual].tolist()))
    is_patch = [cell[0] >= 0 for cell in cells]
    first = is_patch.index(True)
    values = torch.full((2, len(positions)), -2.0)
    values[0, first], values[1, first] = -1.0, -3.0
    planted = WordMap(
        log_probs=values,
        ranks=torch.zeros_like(values, dtype=torch.long),
        layers=(0, 1),
        positions=tuple(positions),
        patches=cells,
        word=" dog",
        image=0,
        site="resid_post",
    )
    scores = planted.score(inputs, inputs.images[0].views[0].cell_box(0, 0))
    assert scores["auroc"].tolist() == [1.0, 0.0]
    assert scores["average_precision"][0] == 1.0
    assert planted.top(1, layer=0) == (positions[first],)


def plainly(model: Any, inputs: MultimodalInputs, where: Any, put: Any, tokens: list[int]) -> float:
    """P(tokens) of a whole run with the embeddings at some positions edited."""
    longer = inputs.append(torch.tensor(tokens[:-1])) if len(tokens) > 1 else inputs

    def edit(resid: Tensor, hook: Any) -> Tensor:
        resid = resid.clone()
        resid[:, where] = put(resid[:, where])
        return resid

    logits = model.run_with_hooks(longer, fwd_hooks=[("hook_input_embed", edit)])[0].double()
    last = inputs.n_pos - 1
    log_probs = logits.log_softmax(-1)
    return float(sum(log_probs[last + i, token] for i, token in enumerate(tokens)).exp())


@pytest.mark.parametrize("by", ["mean", "zero", "function"])
def test_erasing_tokens_equals_whole_runs(seed: int, by: str, tmp_path: Any) -> None:
    chance = random.Random(seed)
    model = tiled_model(seed)
    inputs = model.prepare("What is this?", noise_picture(seed, 33, 18))
    visual = inputs.images[0].positions
    n = chance.randint(1, len(visual) // 2)
    chosen = sorted(chance.sample(visual.tolist(), n))
    embeddings = model.input_embeddings(inputs)[0, visual]
    put = {
        "mean": lambda x: embeddings.mean(dim=0).expand_as(x),
        "zero": torch.zeros_like,
        "function": lambda x: 0.5 * x,
    }[by]
    given: Any = scale(0.5) if by == "function" else by
    found = token_erasure(model, inputs, chosen, by=given, answer=" Paris", controls=3, seed=seed)
    tokens = given_answer(model, inputs, " Paris").tokens.tolist()
    assert found.answer == " Paris"
    assert abs(found.clean - plainly(model, inputs, [], lambda x: x, tokens)) <= 1e-5
    assert abs(found.erased - plainly(model, inputs, chosen, put, tokens)) <= 1e-5
    assert found.effect == found.erased - found.clean
    assert len(found.controls) == 3 and found.positions == tuple(chosen)
    table = found.to_dataframe()
    assert table["erased"].tolist() == ["chosen", *["others"] * 3]
    assert found.said_before == model.generate(inputs, 12, do_sample=False)
    again = TokenErasure.load(found.save(tmp_path / "it.safetensors"))
    assert torch.equal(again.controls, found.controls) and again.said == found.said
    found.plot()


def test_controls_are_other_tokens(seed: int) -> None:
    model = worded_model(seed)
    inputs = model.prepare("What is this?", picture(seed))
    visual = inputs.images[0].positions.tolist()
    one = visual[0]
    found = token_erasure(model, inputs, [one], controls=40, seed=seed, max_new_tokens=0)
    assert found.said == found.said_before == ""
    mean = model.input_embeddings(inputs)[0, visual].mean(dim=0)
    token = [int(model(inputs)[0, -1].argmax())]
    each = [
        plainly(model, inputs, [other], lambda x: mean.expand_as(x), token) for other in visual[1:]
    ]
    for value in found.controls.tolist():
        assert min(abs(value - other) for other in each) <= 1e-5
    as_low = int((found.controls <= found.erased).sum())
    assert found.p_value == (1 + as_low) / 41


@pytest.mark.parametrize("by", ["zero", "mean", "function"])
def test_erasing_what_first_blocks_are_given(seed: int, by: str, tmp_path: Path) -> None:
    """Qwen3-VL adds more of an image in its first blocks (deepstack)."""
    made = qwen("qwen3")(seed, tmp_path, (1,))
    model, batch = made.model, dict(made.batch)
    inputs = model.inputs_from_tokens(batch.pop("input_ids"), **batch)
    visual = torch.cat([image.positions for image in inputs.images])
    names = [hook_name("input_embed"), *hook_names("deepstack", range(model.cfg.n_deepstack))]
    _, cache = model.run_with_cache(inputs, names_filter=names)

    def edit(x: Tensor, hook: Any) -> Tensor:
        own = cache[hook.name][:, visual]
        put = {"zero": 0 * own, "mean": own.mean(1, keepdim=True).expand_as(own)}
        return x.index_copy(1, visual, put.get(by, -1.5 * own))

    logits = model.run_with_hooks(inputs, fwd_hooks=[(name, edit) for name in names])
    expected = float(logits[0, -1].softmax(-1)[5])
    given: Any = scale(-1.5) if by == "function" else by
    found = token_erasure(model, inputs, visual, by=given, answer=5, controls=0, max_new_tokens=0)
    scan = ablation_scan(model, inputs, "regions", given, regions=[visual], answer=5)
    assert found.erased == pytest.approx(expected, abs=1e-9)
    assert float(scan.values[0]) == pytest.approx(expected, abs=1e-9)
    if by == "zero":  # nothing of the image is left
        other = inputs.with_pixels(torch.randn_like(inputs.pixel_values))
        gone = token_erasure(model, other, visual, by=by, answer=5, controls=0, max_new_tokens=0)
        assert gone.erased == pytest.approx(found.erased, abs=1e-9)


def test_other_seeds_draw_other_controls() -> None:
    """Seeds 0 and 1 shared all draws but one."""
    positions, draws = torch.arange(100), []
    for seed in (0, 1):
        generator = torch.Generator().manual_seed(seed)
        draws.append({tuple(drawn(positions, 9, generator).tolist()) for _ in range(5)})
    assert not draws[0] & draws[1] and len(draws[0]) == len(draws[1]) == 5


def test_what_cannot_be_erased_is_refused(seed: int) -> None:
    model = worded_model(seed)
    inputs = model.prepare("What is this?", picture(seed))
    last = inputs.n_pos - 1
    with pytest.raises(ValueError, match=rf"positions \[{last}\] are no visual tokens"):
        token_erasure(model, inputs, "last")
    with pytest.raises(ValueError, match="give controls=0"):
        token_erasure(model, inputs, "image")
    with pytest.raises(ValueError, match="by='blur'"):
        token_erasure(model, inputs, "image", by="blur", controls=0)
    whole = token_erasure(model, inputs, "image", by="zero", controls=0, max_new_tokens=0)
    assert whole.p_value == 1.0
    branch = [Intervention("input_embed", None, inputs.span("image"), zero())]
    hooks = [pair for part in branch for pair in part.fwd_hooks()]
    logits = model.run_with_hooks(inputs, fwd_hooks=hooks)[0, -1].double()
    token = int(model(inputs)[0, -1].argmax())
    assert abs(whole.erased - float(logits.softmax(-1)[token])) <= 1e-5
