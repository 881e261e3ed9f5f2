"""Attention contributions and knockout.

References are float64 formulas on Hugging Face's eager attention, and Hugging Face runs with edited
masks.
"""

from __future__ import annotations

import random
from dataclasses import replace

import pandas as pd
import pytest
import torch
from hf_interventions import hf_knockout
from random_models import N_SPECIAL, SHAPES, VOCABULARY, Prompts, Shape, hooked, random_llava
from random_models import random_prompts as prompts_for
from small_models import KINDS, picture, small_inputs, small_model, worded_model

from mmlens import collate, noise_span
from mmlens.analyses import attention_contribution as contributions_module
from mmlens.analyses.attention_contribution import (
    AttentionContribution,
    attention_contribution,
    attention_vectors,
)
from mmlens.analyses.attention_knockout import AttentionKnockout, attention_knockout
from mmlens.interventions.functions import scale, zero

# As elsewhere: activations of order 1 in float32, against which any mistake is off by 0.1 or more.
TOLERANCE = 1e-4
PROBABILITY = 1e-5

CHOSEN = ["grouped queries", "one head", "one key-value head", "biases", "class token kept"]
CHOSEN += ["gemma2", "gemma3", "granite, biases"]


def hf_contributions(hf, prompts, dtype=torch.float64):
    """Vectors [layer, head, destination, source, d_model] by the paper's formula."""
    hf = hf.to(dtype)
    hf.set_attn_implementation("eager")
    given = prompts.for_hf()
    if "pixel_values" in given:
        given["pixel_values"] = given["pixel_values"].to(dtype)
    with torch.no_grad():
        out = hf(**given, output_attentions=True, output_hidden_states=True)
        layers = hf.model.language_model.layers
        found = []
        for block, resid, pattern in zip(layers, out.hidden_states, out.attentions, strict=False):
            attention = block.self_attn
            n_heads = pattern.shape[1]
            v = attention.v_proj(block.input_layernorm(resid))[0]
            v = v.unflatten(-1, (-1, attention.head_dim))
            v = v.repeat_interleave(n_heads // v.shape[1], dim=1)
            W_O = attention.o_proj.weight.unflatten(1, (n_heads, attention.head_dim))
            moved = torch.einsum("ihd, mhd -> him", v, W_O)
            found.append(pattern[0][..., None] * moved[:, None])
    return torch.stack(found)


def some_positions(inputs, n):
    return sorted(random.sample(range(inputs.n_pos), n))


@pytest.mark.parametrize("name", CHOSEN)
def test_contributions_equal_hugging_faces(seed, tmp_path, name):
    hf = random_llava(replace(SHAPES[name], grid=2))
    model = hooked(hf, tmp_path)
    prompts = prompts_for(hf.config, [random.randint(1, 2)])
    inputs = prompts.for_mmlens(model)
    expected = hf_contributions(hf, prompts)
    source, destination = some_positions(inputs, 4), some_positions(inputs, 3)
    expected = expected[:, :, destination][:, :, :, source]
    for per_head in (False, True):
        found = attention_contribution(model, inputs, source, destination, per_head=per_head)
        vectors = expected if per_head else expected.sum(dim=1)
        assert found.shape == vectors.shape[:-1]
        assert (found.values - vectors.norm(dim=-1)).abs().max() <= TOLERANCE
    vectors = attention_vectors(model, inputs, source, destination)
    assert (vectors[:, 0] - expected.sum(dim=1)).abs().max() <= TOLERANCE


def test_contributions_under_padding(seed, tmp_path):
    hf = random_llava(Shape(grid=2))
    model = hooked(hf, tmp_path)
    long = prompts_for(hf.config, [1, 1], words=[9, 5])
    short = Prompts(long.tokens[1:], long.attention_mask[1:], long.pixel_values[1:])
    inputs = short.for_mmlens(model)
    n_pad = int((~inputs.attention_mask).sum())
    assert n_pad == 4
    real = list(range(n_pad, inputs.n_pos))
    # In float64 transformers' padded queries are NaN.
    expected = (
        hf_contributions(hf, short, torch.float32)[:, :, real][:, :, :, real]
        .sum(dim=1)
        .norm(dim=-1)
    )
    found = attention_contribution(model, inputs, list(range(inputs.n_pos)), real)
    assert (found[..., n_pad:] - expected).abs().max() <= TOLERANCE
    assert found[..., :n_pad].eq(0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_vectors_sum_to_the_attention_output(seed, kind):
    model = small_model(seed, **KINDS[kind])
    inputs = small_inputs(model, seed)
    everywhere = list(range(inputs.n_pos))
    vectors = attention_vectors(model, inputs, everywhere, everywhere)
    _, cache = model.run_with_cache(inputs)
    for layer in range(model.cfg.n_layers):
        written = "attn.hook_out" if model.cfg.post_norms else "hook_attn_out"
        out = cache[f"blocks.{layer}.{written}"] - model.blocks[layer].attn.b_O
        # Float32 sums in another order: a few roundings of the largest term.
        bound = 1e-4 * (1 + vectors[layer].abs().max())
        assert (vectors[layer].sum(dim=2) - out).abs().max() <= bound
    found = attention_contribution(model, inputs, everywhere, everywhere)
    assert found.values.triu(diagonal=1).eq(0).all()
    assert torch.allclose(found.values, vectors[:, 0].norm(dim=-1), rtol=1e-4, atol=TOLERANCE)


def test_contributions_follow_the_hooks_on_the_model(seed):
    model = small_model(seed, o_bias=False)
    inputs = small_inputs(model, seed)
    plain = attention_contribution(model, inputs, "text", "last")
    with model.hooks(fwd_hooks=[("blocks.0.attn.hook_pattern", zero())]):
        cut = attention_contribution(model, inputs, "text", "last")
    assert cut[0].eq(0).all() and not cut[1].eq(0).all()
    assert torch.equal(plain[0], attention_contribution(model, inputs, "text", "last")[0])
    assert not any(point._forward_hooks for point in model.hook_dict.values())


def test_sources_in_pieces_are_the_same(seed, monkeypatch):
    model = small_model(seed)
    inputs = small_inputs(model, seed)
    for per_head in (False, True):
        options = {"per_head": per_head, "layers": [1, 0]}
        whole = attention_contribution(model, inputs, "text", "text", **options)
        with monkeypatch.context() as patched:
            patched.setattr(contributions_module, "ELEMENTS_AT_ONCE", 1)
            pieces = attention_contribution(model, inputs, "text", "text", **options)
        assert torch.allclose(whole.values, pieces.values, rtol=1e-4, atol=TOLERANCE)
        assert whole.layers == (1, 0)


def test_only_the_asked_layers_write_their_pattern_down(seed, monkeypatch):
    model = small_model(seed)
    inputs = small_inputs(model, seed)
    opened = []
    for layer, block in enumerate(model.blocks):
        pattern = block.attn.edited_pattern

        def counted(scores, mask, layer=layer, pattern=pattern):
            opened.append((layer, scores.shape[2]))
            return pattern(scores, mask)

        monkeypatch.setattr(block.attn, "edited_pattern", counted)
    attention_contribution(model, inputs, "image", "last", layers=[1])
    assert opened == [(1, 1)]  # one layer, one query


def test_noise_is_averaged_over(seed):
    model = small_model(seed)
    inputs = small_inputs(model, seed)
    noisy = noise_span(model, inputs, "text", samples=3)
    each = [
        attention_contribution(model, replace(inputs, noise=noisy.noise[i : i + 1]), "text", "last")
        for i in range(3)
    ]
    mean = torch.stack([one.values for one in each]).mean(dim=0)
    found = attention_contribution(model, noisy, "text", "last")
    assert torch.allclose(found.values, mean, rtol=1e-4, atol=TOLERANCE)


@pytest.fixture
def contribution(seed):
    model = worded_model(seed)
    inputs = model.prepare(
        "What is the capital of this country?",
        picture(seed),
        spans={"constraint": "this country"},
        template=None,
    )
    return model, inputs, attention_contribution(model, inputs, "image", "constraint")


class TestContributionResult:
    def test_it_is_its_values_in_torch(self, contribution):
        _, _, found = contribution
        assert torch.equal(torch.relu(found), found.values)
        assert torch.equal(found - found.values, torch.zeros_like(found.values))
        assert torch.allclose(found, found.values)

    def test_the_grid(self, contribution):
        model, inputs, found = contribution
        grid = found.image_grid()
        rows, columns = inputs.images[0].grids[0]
        assert grid.shape == (*found.shape[:2], rows, columns)
        for row in range(rows):
            for column in range(columns):
                at = found.source.index(inputs.patch(row, column))
                assert torch.equal(grid[..., row, column], found[..., at])
        some = attention_contribution(model, inputs, [inputs.patch(0, 0)], "last", per_head=True)
        assert some.image_grid().isfinite().sum() == some.values.numel()
        with pytest.raises(ValueError, match="patch of image 1"):
            found.image_grid(1)
        with pytest.raises(ValueError, match="patch of image 0"):
            attention_contribution(model, inputs, "constraint", "last").image_grid()

    def test_top_and_share(self, contribution):
        _, _, found = contribution
        values, positions = found.top(2)
        for layer in range(found.shape[0]):
            for j in range(found.shape[1]):
                order = sorted(range(found.shape[2]), key=lambda i: -found[layer, j, i])[:2]
                assert values[layer, j].tolist() == [float(found[layer, j, i]) for i in order]
                at = [found.source.index(position) for position in positions[layer, j].tolist()]
                assert found[layer, j, at].tolist() == values[layer, j].tolist()
        share = found.cumulative_share()
        assert share.diff(dim=-1).ge(0).all()
        assert torch.equal(share[..., -1], torch.ones_like(share[..., -1]))
        assert torch.allclose(share[..., 0], values[..., 0] / found.values.sum(dim=-1))
        with pytest.raises(ValueError, match="k=0"):
            found.top(0)

    def test_table_and_file(self, contribution, tmp_path):
        model, inputs, found = contribution
        heads = attention_contribution(model, inputs, "constraint", "last", per_head=True)
        for one in (found, heads):
            table = one.to_dataframe()
            assert len(table) == one.values.numel()
            assert table.contribution.tolist() == one.values.flatten().tolist()
            assert table.source_label[0] == inputs.labels()[one.source[0]]
            assert ("head" in table) == one.per_head
            again = AttentionContribution.load(one.save(tmp_path / "it.safetensors"))
            assert torch.equal(again.values, one.values)
            assert again.metadata == one.metadata and again.source == one.source
            assert again.source_patches == one.source_patches
            pd.testing.assert_frame_equal(again.to_dataframe(), table)
        with pytest.raises(ValueError, match="holds no AttentionKnockout"):
            AttentionKnockout.load(tmp_path / "it.safetensors")


def test_what_contributions_refuse(seed):
    model = small_model(seed)
    inputs = small_inputs(model, seed)
    n_pos, n_layers = inputs.n_pos, model.cfg.n_layers
    for source, why in (
        ([], "at least one"),
        ([n_pos], f"0 ... {n_pos - 1}"),
        ([1, 1], "twice"),
    ):
        with pytest.raises(ValueError, match=why):
            attention_contribution(model, inputs, source, "last")
    with pytest.raises(KeyError, match="subject"):
        attention_contribution(model, inputs, "subject", "last")
    for layers in ([], [n_layers], [0, 0]):
        with pytest.raises(ValueError, match=f"0 ... {n_layers - 1}"):
            attention_contribution(model, inputs, "text", "last", layers=layers)
    batch = collate([inputs, inputs], 0)
    for analysis in (attention_contribution, attention_knockout, attention_vectors):
        with pytest.raises(ValueError, match="batch has 2"):
            analysis(model, batch, "text", "last")


def test_scaled_attention_scales_contributions(seed):
    """A hook on z's weights: twice the values, twice the contribution of that layer."""
    model = small_model(seed, qkv_bias=False)
    inputs = small_inputs(model, seed)
    plain = attention_contribution(model, inputs, "text", "last", layers=[0])
    with model.hooks(fwd_hooks=[("blocks.0.attn.hook_v", scale(2.0))]):
        doubled = attention_contribution(model, inputs, "text", "last", layers=[0])
    assert torch.allclose(doubled.values, 2 * plain.values, rtol=1e-4, atol=TOLERANCE)


# Knockout


@pytest.mark.parametrize("width", [1, 2, 99])
def test_knockout_equals_an_edited_mask(seed, tmp_path, width):
    hf = random_llava(Shape(n_layers=random.randint(2, 4), grid=2))
    model = hooked(hf, tmp_path)
    prompts = prompts_for(hf.config, [1], words=[7])
    inputs = prompts.for_mmlens(model)
    answer = random.randrange(N_SPECIAL, VOCABULARY)
    # BOS stays visible: no query is left without a key.
    source = random.sample(range(1, inputs.n_pos - 1), 3)
    destination = [*random.sample(range(1, inputs.n_pos - 1), 2), inputs.n_pos - 1]
    found = attention_knockout(model, inputs, source, destination, window=width, answer=answer)
    plain = hf_knockout(hf, prompts, [], source, destination).softmax(-1)[answer]
    assert found.clean == pytest.approx(float(plain), abs=PROBABILITY)
    for layer, probability in zip(found.layers, found.probability.tolist(), strict=True):
        lowest = layer - width // 2
        cut = [i for i in range(lowest, lowest + width) if 0 <= i < model.cfg.n_layers]
        expected = hf_knockout(hf, prompts, cut, source, destination).softmax(-1)[answer]
        assert probability == pytest.approx(float(expected), abs=PROBABILITY)


def test_knockout_of_named_spans(seed, tmp_path):
    model = worded_model(seed)
    inputs = model.prepare("What is this?", picture(seed), spans={"constraint": "this"})
    found = attention_knockout(model, inputs, "image", "question", layers=[1], answer="the flag of")
    assert found.source == tuple(inputs.span("image").tolist())
    assert len(found.answer_tokens) > 1 and found.answer == "the flag of"
    assert found.metadata["source"] == "image" and found.metadata["destination"] == "question"
    assert torch.allclose(found.effect, found.probability - found.clean)
    table = found.to_dataframe()
    assert table.layer.tolist() == [1] and table.window.tolist() == [1]
    again = AttentionKnockout.load(found.save(tmp_path / "it.safetensors"))
    assert torch.equal(again.probability, found.probability) and again.layers == (1,)
    most_probable = attention_knockout(model, inputs, "image", "last")
    assert most_probable.answer_tokens == (int(model(inputs)[0, -1].argmax()),)


def test_knockout_of_what_is_never_looked_at(seed):
    model = small_model(seed)
    inputs = small_inputs(model, seed)
    with pytest.raises(ValueError, match="never attend to"):
        attention_knockout(model, inputs, "last", [0, 1])
    done = []
    found = attention_knockout(
        model, inputs, [inputs.n_pos - 1], [0, inputs.n_pos - 1], progress=lambda *n: done.append(n)
    )
    assert done[-1] == (model.cfg.n_layers, model.cfg.n_layers)
    assert found.probability.shape == (model.cfg.n_layers,)
