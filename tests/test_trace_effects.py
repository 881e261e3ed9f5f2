"""Units of sites, sites without layers, regions of images, and the effects of a trace."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from small_models import D_VOCAB, small_inputs, small_model

from mmlens import CausalTrace, Intervention, causal_trace, causal_trace_many
from mmlens.analyses.aggregation import aggregate_traces
from mmlens.analyses.attribution_patching import attribution_patching
from mmlens.interventions.functions import add, zero
from mmlens.interventions.intervention import hook_name
from mmlens.model.sites import split_site

TOLERANCE = 1e-5


def words_swapped(inputs, seed):
    """The same prompt with another word at one position before the last."""
    chance = random.Random(seed)
    where = (~inputs.is_image[0]).nonzero().flatten().tolist()[1:-1]
    tokens = inputs.tokens.clone()
    position = chance.choice(where)
    tokens[0, position] = 2 + (tokens[0, position] - 1) % 57
    return replace(inputs, tokens=tokens)


def image_swapped(inputs):
    return inputs.with_pixels(torch.randn_like(inputs.pixel_values))


def probability(model, inputs, answer, hooks=()):
    return model.run_with_hooks(inputs, fwd_hooks=list(hooks))[0, -1].softmax(-1)[answer]


# Units


def test_sites_with_units():
    assert split_site("mlp_out") == ("mlp_out", None)
    assert split_site("vision.z[3]") == ("vision.z", (3,))
    assert split_site("post[7,0-2, 2]") == ("post", (0, 1, 2, 7))
    for wrong in ("z[]", "z[a]", "z[3", "z[4-2]", "z[1]x", "z[-1]"):
        with pytest.raises(ValueError, match="numbers and ranges"):
            split_site(wrong)
    with pytest.raises(ValueError, match="unknown site"):
        Intervention("nothing[3]", 0, None, zero())


@pytest.mark.parametrize("site", ["z", "q", "result", "attn_scores", "pattern", "post", "mlp_out"])
def test_only_the_units_are_edited(seed, site):
    model = small_model(seed)
    inputs = small_inputs(model, seed)
    layer, position = random.randrange(model.cfg.n_layers), random.randrange(inputs.n_pos)
    name = hook_name(site, layer)
    _, cache = model.run_with_cache(inputs, names_filter=[name])
    before = cache[name]
    # Scores and patterns count heads before the queries.
    heads_first = site in ("attn_scores", "pattern")
    n_units = before.shape[1 if heads_first else 2]
    unit = random.randrange(n_units)
    kept = {}

    def keep(activation, hook):
        kept[hook.name] = activation.clone()

    edit = Intervention(f"{site}[{unit}]", layer, position, add(1.0))
    model.run_with_hooks(inputs, fwd_hooks=[*edit.fwd_hooks(), (name, keep)])
    expected = before.clone()
    at = (slice(None), unit, position) if heads_first else (slice(None), position, unit)
    masked = before[at].isneginf()
    expected[at] = (expected[at] + 1.0).masked_fill(masked, -torch.inf)
    torch.testing.assert_close(kept[name], expected)


def test_an_edit_in_place_reaches_only_its_units(seed):
    model = small_model(seed, n_key_value_heads=1, n_heads=3)
    inputs = small_inputs(model, seed)

    def in_place(activation, hook):
        activation.zero_()

    for function in (in_place, zero()):
        edit = Intervention("z[1]", 0, None, function)
        found = model.run_with_hooks(inputs, fwd_hooks=edit.fwd_hooks())

        def by_hand(z, hook):
            z = z.clone()
            z[:, :, 1] = 0.0
            return z

        expected = model.run_with_hooks(inputs, fwd_hooks=[(hook_name("z", 0), by_hand)])
        torch.testing.assert_close(found, expected)


def test_units_that_are_not_there(seed):
    model = small_model(seed)
    n_heads = model.cfg.n_heads
    edit = Intervention(f"z[{n_heads}]", 0, None, zero())
    with pytest.raises(IndexError, match=f"no {n_heads}"):
        model.run_with_hooks(small_inputs(model, seed), fwd_hooks=edit.fwd_hooks())


def test_heads_are_traced_one_by_one(seed):
    """Against hooks by hand, which copy the clean z of one head."""
    model = small_model(seed, n_key_value_heads=2, n_heads=4).double()
    clean = small_inputs(model, seed)
    corrupted = words_swapped(clean, seed)
    group = [clean.n_pos - 1]
    answer = random.randrange(D_VOCAB)
    trace = causal_trace(
        model,
        clean,
        corrupted,
        sites=[f"z[{head}]" for head in range(4)],
        positions=[group],
        answer=answer,
    )
    _, cache = model.run_with_cache(clean)
    for head in range(4):
        for layer in range(model.cfg.n_layers):

            def copied(z, hook, head=head):
                z = z.clone()
                z[:, group, head] = cache[hook.name][:, group, head]
                return z

            expected = probability(model, corrupted, answer, [(hook_name("z", layer), copied)])
            assert abs(trace.restored[head, 0, layer] - expected) <= TOLERANCE


def test_all_units_together_are_the_site(seed):
    model = small_model(seed).double()
    clean = small_inputs(model, seed)
    corrupted = words_swapped(clean, seed)
    n_heads, d_mlp = model.cfg.n_heads, model.cfg.d_mlp
    sites = ("z", f"z[0-{n_heads - 1}]", "post", f"post[0-{d_mlp - 1}]")
    for method in ("branch", "naive"):
        whole = causal_trace(model, clean, corrupted, sites=sites, method=method, window=2).restored
        torch.testing.assert_close(whole[0], whole[1], atol=TOLERANCE, rtol=0)
        torch.testing.assert_close(whole[2], whole[3], atol=TOLERANCE, rtol=0)


def test_branch_equals_naive_for_units(seed):
    model = small_model(seed).double()
    clean = small_inputs(model, seed)
    corrupted = words_swapped(clean, seed)
    half = model.cfg.d_mlp // 2
    sites = ("z[0]", f"post[0-{half}]", "attn_scores[0]", "pattern[0]", "resid_post[0-4]")
    traces = [
        causal_trace(model, clean, corrupted, sites=sites, method=method)
        for method in ("branch", "naive")
    ]
    difference = traces[0].restored - traces[1].restored
    assert difference.abs().max() <= TOLERANCE
    assert set(traces[0].to_dataframe()["site"]) == set(sites)


# Sites without layers


@pytest.mark.parametrize(
    "site",
    "vision.patch_embed vision.embed vision.out projector.in projector.pre projector.out embed "
    "input_embed".split(),
)
def test_sites_without_layers_have_one_column(seed, site):
    model = small_model(seed).double()
    clean = small_inputs(model, seed)
    corrupted = image_swapped(clean) if "." in site else words_swapped(clean, seed)
    _, cache = model.run_with_cache(clean, names_filter=[hook_name(site)])
    n_pos = cache[hook_name(site)].shape[1]
    groups = [[random.randrange(n_pos)], list(range(n_pos))]
    answer = random.randrange(D_VOCAB)
    for method in ("branch", "naive"):
        trace = causal_trace(
            model,
            clean,
            corrupted,
            sites=(site,),
            positions=groups,
            answer=answer,
            method=method,
        )
        assert trace.restored.shape == (1, 2, 1)
        for index, group in enumerate(groups):

            def copied(activation, hook, group=group):
                activation = activation.clone()
                activation[:, group] = cache[hook.name][:, group]
                return activation

            expected = probability(model, corrupted, answer, [(hook_name(site), copied)])
            assert abs(trace.restored[0, index, 0] - expected) <= TOLERANCE
        # All of it restored is the clean run: nothing else differs.
        assert abs(trace.restored[0, 1, 0] - trace.clean) <= TOLERANCE


def test_what_cannot_be_traced_together(seed):
    model = small_model(seed)
    clean = small_inputs(model, seed)
    corrupted = image_swapped(clean)
    for options, message in (
        ({"sites": ("input_embed", "mlp_out")}, "trace them apart"),
        ({"sites": ("input_embed",), "layers": [0]}, "trace them apart"),
        ({"sites": ("input_embed",), "window": 3}, "no window of 3"),
        ({"sites": ("projector.out",)}, "positions of its own"),
        ({"sites": ("projector.out", "embed"), "positions": [[0]]}, "one at a time"),
        ({"sites": ("projector.out",), "positions": [[clean.n_pos]]}, "not among"),
    ):
        with pytest.raises(ValueError, match=message):
            causal_trace(model, clean, corrupted, **options)
    for options, message in (
        ({"sites": ("z", "z")}, "one of them is there twice"),
        ({"layers": [1, 0, 1]}, r"layers \[1, 0, 1\]: one of them is there twice"),
        ({"sites": ("input_embed", "input_embed")}, "one of them is there twice"),
    ):
        for analysis in (causal_trace, attribution_patching):
            with pytest.raises(ValueError, match=message):
                analysis(model, clean, corrupted, **options)
    with pytest.raises(ValueError, match="unknown site"):
        attribution_patching(model, clean, corrupted, sites=("z[0]",))


# Regions of the image


def test_tiles_cover_the_image(seed):
    model = small_model(seed)
    inputs = small_inputs(model, seed)
    height, width = inputs.images[0].grids[0]
    rows, columns = random.randint(1, height), random.randint(1, width)
    if model.cfg.vision.select == "default" or inputs.images[0].length >= height * width:
        tiles = inputs.tiles(rows, columns)
        assert len(tiles) == rows * columns
        together = torch.cat(tiles).sort().values
        assert torch.equal(together, inputs.block((0, 0, height, width)).sort().values)
        areas = [set(inputs.grid[0, tile][:, axis].tolist()) for tile in tiles for axis in (2, 3)]
        for sizes in (areas[::2], areas[1::2]):
            lengths = [len(each) for each in sizes]
            assert max(lengths) - min(lengths) <= 1
    with pytest.raises(ValueError, match="boxes of a grid"):
        inputs.tiles(height + 1, 1)


# Effects


@pytest.mark.parametrize("method", ["branch", "naive"])
def test_effects_are_their_formulas(seed, method, tmp_path):
    model = small_model(seed)
    clean = small_inputs(model, seed)
    corrupted = words_swapped(clean, seed)
    answer, contrast = random.sample(range(D_VOCAB), 2)
    trace = causal_trace(
        model,
        clean,
        corrupted,
        sites=("mlp_out",),
        positions=[[clean.n_pos - 1]],
        answer=answer,
        contrast=contrast,
        kl=True,
        method=method,
    )
    _, cache = model.run_with_cache(clean)

    def measured(logits):
        expected, found = (x[0, -1].double().log_softmax(-1) for x in (model(clean), logits))
        difference = found[answer] - found[contrast]
        return difference.item(), (expected.exp() * (expected - found)).sum().item()

    # Rounding of float32 logits, twice, and of sums over the vocabulary.
    close = {"abs": 2e-4, "rel": 1e-4}
    assert trace.clean_logit_difference == pytest.approx(measured(model(clean))[0], **close)
    expected = measured(model(corrupted))
    assert trace.corrupted_logit_difference == pytest.approx(expected[0], **close)
    assert trace.corrupted_kl == pytest.approx(expected[1], **close)
    for layer in range(model.cfg.n_layers):

        def copied(activation, hook):
            activation = activation.clone()
            activation[:, -1] = cache[hook.name][:, -1]
            return activation

        logits = model.run_with_hooks(corrupted, fwd_hooks=[(hook_name("mlp_out", layer), copied)])
        difference, kl = measured(logits)
        assert trace.logit_difference[0, 0, layer].item() == pytest.approx(difference, **close)
        assert trace.kl[0, 0, layer].item() == pytest.approx(kl, **close)
    torch.testing.assert_close(trace.kl_effect, trace.corrupted_kl - trace.kl)
    effect = trace.logit_difference - trace.corrupted_logit_difference
    torch.testing.assert_close(trace.logit_difference_effect, effect)
    assert {"kl", "logit_difference"} <= set(trace.to_dataframe().columns)
    loaded = CausalTrace.load(trace.save(tmp_path / "trace.safetensors"))
    torch.testing.assert_close(loaded.kl, trace.kl)
    torch.testing.assert_close(loaded.logit_difference, trace.logit_difference)
    assert loaded.contrast == trace.contrast == str(contrast)


def test_effects_that_were_not_asked_for(seed):
    model = small_model(seed)
    clean = small_inputs(model, seed)
    trace = causal_trace(model, clean, words_swapped(clean, seed), sites=("mlp_out",), layers=[0])
    assert trace.kl is trace.logit_difference is None
    assert "kl" not in trace.to_dataframe().columns
    with pytest.raises(ValueError, match="kl=True"):
        _ = trace.kl_effect
    with pytest.raises(ValueError, match="contrast"):
        _ = trace.logit_difference_effect


def test_many_traces_have_contrasts_of_their_own(seed):
    model = small_model(seed)
    prompts = [small_inputs(model, seed + number) for number in range(2)]
    pairs = [(clean, words_swapped(clean, seed)) for clean in prompts]
    options = {"sites": ("mlp_out",), "layers": [0]}
    traces = causal_trace_many(model, pairs, contrasts=[5, 7], **options)
    for (clean, corrupted), contrast, trace in zip(pairs, (5, 7), traces, strict=True):
        alone = causal_trace(model, clean, corrupted, contrast=contrast, **options)
        torch.testing.assert_close(
            trace.logit_difference, alone.logit_difference, atol=1e-4, rtol=1e-4
        )
    with pytest.raises(ValueError, match="1 answers for 2 pairs"):
        causal_trace_many(model, pairs, contrasts=[5])


# Filters


def test_filters_are_recorded(seed):
    model = small_model(seed)
    clean = small_inputs(model, seed)
    trace = causal_trace(model, clean, words_swapped(clean, seed), sites=("mlp_out",), layers=[0])
    gaps = [0.5, 0.01, 0.3, -0.2]
    traces = [replace(trace, clean=0.6, corrupted=0.6 - gap) for gap in gaps]
    roles = [{"last": torch.tensor([clean.n_pos - 1])}] * 4
    right = [True, True, False, True]
    found = aggregate_traces(traces, roles, clusters="abcd", right=right, minimum_gap=0.0)
    assert found.clusters == ("a", "b")
    assert found.metadata["filters"] == {
        "given": 4,
        "only right answers": True,
        "wrong": 1,
        "minimum gap": 0.0,
        "gap too small": 1,
    }
    assert aggregate_traces(traces, roles).metadata["filters"]["gap too small"] == 0
    with pytest.raises(ValueError, match="no trace passes"):
        aggregate_traces(traces, roles, minimum_gap=0.9)
    with pytest.raises(ValueError, match="3 answers for 4"):
        aggregate_traces(traces, roles, right=right[:3])
