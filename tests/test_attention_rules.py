"""Who attends to whom: the rules of attention against transformers' masks, and what follows."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from small_models import IMAGE, KINDS, plain_run, small_inputs, small_model
from test_branching import assert_equal_to_plain_runs
from transformers import Gemma2Config, Gemma3TextConfig
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.models.gemma3.modeling_gemma3 import (
    create_masks_for_vision_model,
    get_block_sequence_ids_for_mask,
)

from mmlens import Intervention, attention_contribution, attention_knockout
from mmlens.inputs.attention_blocks import attention_blocks, before_blocks
from mmlens.inputs.common_prefix import common_prefix
from mmlens.interventions.functions import noise, scale
from mmlens.model.components.attention_rule import AttentionRule, Places

N_POS = 23


def random_rows(chance):
    """Which tokens of two left-padded rows are visual, and the mask: 0, 1 or 2 images each."""
    is_image = torch.zeros(2, N_POS, dtype=torch.bool)
    mask = torch.ones(2, N_POS, dtype=torch.bool)
    for row in range(2):
        start = chance.choice([0, 0, 4])
        mask[row, :start] = False
        for begin in chance.choice([[], [start + 1], [start, start + 9]]):
            is_image[row, begin : begin + chance.randint(1, 7)] = True
    return is_image, mask


def assert_seen(rule, mask, blocks, theirs):
    """The rule's mask is theirs, but for padding, which attends to itself here."""
    places = Places.of(mask, blocks)
    ours = rule.mask(places, places).expand(2, N_POS, N_POS)
    both = mask[:, :, None].expand_as(ours)
    assert torch.equal(ours[both], (theirs[:, 0] == 0)[both])
    assert (ours[~mask] == torch.eye(N_POS, dtype=torch.bool).expand_as(ours)[~mask]).all()


@pytest.mark.parametrize("window", [1, 3, 40])
def test_gemma_3(seed: int, window: int) -> None:
    chance = random.Random(seed)
    is_image, mask = random_rows(chance)
    config = Gemma3TextConfig(sliding_window=window, attn_implementation="eager")
    theirs = create_masks_for_vision_model(
        config,
        torch.zeros(2, N_POS, 4),
        mask.long(),
        None,
        torch.arange(N_POS)[None],
        get_block_sequence_ids_for_mask(is_image.long()),
    )
    blocks = attention_blocks("image", is_image, mask)
    for name, width in (("full_attention", None), ("sliding_attention", window)):
        assert_seen(AttentionRule(1.0, None, width, "image"), mask, blocks, theirs[name])


@pytest.mark.parametrize("window", [1, 3, 40])
def test_paligemma(seed: int, window: int) -> None:
    chance = random.Random(seed)
    is_image, mask = random_rows(chance)
    follows = torch.zeros_like(mask)
    follows[:, N_POS - chance.choice([0, 1, 5]) :] = True
    config = Gemma2Config(sliding_window=window, attn_implementation="eager")
    given = (config, torch.zeros(2, N_POS, 4), mask.long(), None, torch.arange(N_POS)[None])
    prefix = {"block_sequence_ids": torch.where(follows, -1, 0)}
    blocks = attention_blocks("prompt", is_image, mask, follows)
    for make, width in ((create_causal_mask, None), (create_sliding_window_causal_mask, window)):
        theirs = make(*given, **prefix)
        assert_seen(AttentionRule(1.0, None, width, "prompt"), mask, blocks, theirs)


def test_blocks_before_a_position() -> None:
    blocks = torch.tensor([[-1, 0, 0, 0, -1, 1, 1, -1], [0, 0, -1, 1, 1, 1, 1, -1]])
    assert [before_blocks(blocks, at) for at in range(9)] == [0, 0, 0, 0, 0, 0, 0, 7, 8]
    assert [before_blocks(blocks[:1], at) for at in range(9)] == [0, 1, 1, 1, 4, 5, 5, 7, 8]
    rule = AttentionRule(1.0, blocks="image")
    places = Places(torch.arange(8), None, blocks)
    assert [rule.first_affected(at, places) for at in range(8)] == [0, 0, 1, 1, 3, 3, 3, 7]
    causal = replace(rule, blocks=None)
    assert [causal.first_affected(at, places) for at in range(8)] == list(range(8))


def begin(inputs, kind, position):
    """The first position that an edit at one can change: images side by side are one block."""
    if kind == "prompt":
        return 0
    while inputs.is_image[0, position] and position and inputs.is_image[0, position - 1]:
        position -= 1
    return position


def sees_both_ways(seed, kind, **choices):
    """A model whose images, or prompts, attend to themselves in both directions."""
    options = KINDS["sandwich"] | {
        "attention_blocks": kind,
        "n_layers": 4,
        "attn_types": ("local", "global", "local", "global"),
        "window_size": 3,
        "scores_softcap": random.Random(seed).choice([None, 3.0]),
    }
    return small_model(seed, **options | choices)


@pytest.mark.parametrize("kind", ["image", "prompt"])
@torch.no_grad()
def test_branches_within_and_after_images(seed: int, kind: str) -> None:
    chance = random.Random(seed)
    model = sees_both_ways(seed, kind)
    inputs = small_inputs(model, seed, images=(2, 1), words=(5, 9))
    assert inputs.blocks is not None
    places = set()
    for image in inputs.images:
        at = image.positions.tolist()
        places |= {at[0], at[len(at) // 2], at[-1], min(at[-1] + 1, inputs.n_pos - 1)}
    branches = [
        [Intervention(site, [layer], [at], chance.choice([scale(-1.4), noise(0.7, seed=at)]))]
        for at in sorted(places | {0, inputs.n_pos - 1})
        for site in chance.sample(("mlp_out", "k", "z", "resid_pre"), 2)
        for layer in (0, 3)
    ]
    assert_equal_to_plain_runs(model, inputs, branches, chance)
    for part in ("pattern", "attn_scores"):  # listened to: scores over the whole past
        watched = [[*branch, Intervention(part, [1], None, scale(0.5))] for branch in branches[::5]]
        assert_equal_to_plain_runs(model, inputs, watched, chance)


@pytest.mark.parametrize("kind", ["image", "prompt"])
@torch.no_grad()
def test_an_edit_changes_what_comes_before(seed: int, kind: str) -> None:
    """At a later position of an image, which its first one attends to; and nothing before it."""
    model = sees_both_ways(seed, kind, image_token_id=IMAGE).double()
    inputs = small_inputs(model, seed, images=(2,), words=(6,))
    second = inputs.images[1].positions.tolist()
    edit = [Intervention("resid_pre", [0], [second[-1]], noise(5.0))]
    moved = (plain_run(model, inputs, edit) - model(inputs)).abs().amax(dim=-1)[0]
    first = begin(inputs, kind, second[-1])
    assert (moved[first:] > 1e-9).all() and (moved[:first] == 0).all()
    recording = model.record(inputs)
    assert recording.first_affected(second[-1]) == first
    assert recording.first_affected(inputs.n_pos - 1) == (
        0 if kind == "prompt" else inputs.n_pos - 1
    )


@pytest.mark.parametrize("kind", ["image", "prompt"])
@torch.no_grad()
def test_prompts_that_begin_alike(seed: int, kind: str) -> None:
    chance = random.Random(seed)
    model = sees_both_ways(seed, kind).double()
    inputs = small_inputs(model, seed, images=(2,), words=(7,))
    other = replace(inputs, tokens=inputs.tokens.clone())
    text = (~inputs.is_image[0]).nonzero().flatten().tolist()
    at = chance.choice(text[1:])
    other.tokens[0, at] = (other.tokens[0, at] + 1) % 50
    assert common_prefix(inputs, other) == (0 if kind == "prompt" else at)
    answered = inputs.append(torch.tensor([3, 7, 5]))
    assert common_prefix(inputs, answered) == common_prefix(answered, inputs) == inputs.n_pos
    longer = model.inputs_from_tokens(answered.tokens, inputs.pixel_values)
    assert common_prefix(longer, inputs) == (0 if kind == "prompt" else inputs.n_pos)
    blurred = inputs.with_pixels(inputs.pixel_values * 0.5)
    noisy = torch.zeros(1, inputs.n_pos, model.cfg.d_model, dtype=torch.float64)
    noisy[0, inputs.images[1].positions[-1]] = 0.3
    start = begin(inputs, kind, int(inputs.images[1].positions[-1]))
    assert common_prefix(inputs, replace(inputs, noise=noisy)) == start
    recording = model.record(inputs)
    for each in (other, answered, longer, blurred, replace(inputs, noise=noisy)):
        found = recording.record(each).logits(range(each.n_pos))
        assert (found - model(each)).abs().max() <= 1e-9
    edit = [Intervention("mlp_out", [0], [int(inputs.images[0].positions[0])], scale(-2.0))]
    after = recording.record(answered).run([edit], lambda logits: logits)
    assert (after[0, 0, 0] - plain_run(model, answered, edit)[0, -1]).abs().max() <= 1e-9


@pytest.mark.parametrize("kind", ["image", "prompt"])
@torch.no_grad()
def test_text_is_generated_causally(seed: int, kind: str) -> None:
    """With and without the cache; the prompt's own logits are those of a run on it alone."""
    model = sees_both_ways(seed, kind).double()
    inputs = small_inputs(model, seed, images=(1, 1), words=(5, 8))
    options = {"max_new_tokens": 6, "stop_at_eos": False, "return_type": "tokens"}
    options |= {"output_logits": True, "do_sample": False}
    cached, whole = (
        model.generate(inputs, use_past_kv_cache=use, **options) for use in (True, False)
    )
    assert torch.equal(cached.sequences, whole.sequences)
    if (
        kind == "prompt"
    ):  # embeddings are a prompt as well; in which places images are, they don't say
        given = {"attention_mask": inputs.attention_mask, **options}
        embedded = model.generate(model.input_embeddings(inputs), **given)
        assert torch.equal(embedded.sequences, cached.sequences[:, inputs.n_pos :])
    grown = inputs.append(cached.sequences[:, inputs.n_pos :])
    real = inputs.attention_mask
    longer, alone = model(grown)[:, : inputs.n_pos], model(inputs)
    assert (longer - alone)[real].abs().max() <= 1e-9


@pytest.mark.parametrize("kind", ["image", "prompt", None])
@torch.no_grad()
def test_who_can_be_cut_off(seed: int, kind: str | None) -> None:
    model = sees_both_ways(seed, kind)
    inputs = small_inputs(model, seed, images=(1,), words=(6,))
    image = inputs.images[0].positions.tolist()
    asked = (image[-1:], image[:1])
    if kind is None and len(image) > 1:
        with pytest.raises(ValueError, match="never attend to"):
            attention_knockout(model, inputs, *asked)
        assert not attention_contribution(model, inputs, *asked).values.any()
    else:
        cut = attention_knockout(model, inputs, *asked, window=9, layers=[0])
        hooks = [Intervention("attn_scores", range(4), asked[1], knocked_out(asked[0]))]
        expected = plain_run(model, inputs, hooks)[0, -1].softmax(-1)[cut.answer_tokens[0]]
        assert abs(float(cut.probability[0] - expected)) <= 1e-5
        assert attention_contribution(model, inputs, *asked).values.min() > 0


def knocked_out(sources):
    """Scores for these keys become -inf."""
    return lambda scores, hook: scores.index_fill(-1, torch.tensor(sources), -torch.inf)


@pytest.mark.parametrize("site", ["attn_scores", "pattern"])
@pytest.mark.parametrize("kind", ["image", "prompt"])
@torch.no_grad()
def test_noise_is_added_to_all_that_is_attended_to(seed: int, kind: str, site: str) -> None:
    """To keys that come later, too, and to none that is masked; the same in runs that go on."""
    model = sees_both_ways(seed, kind, image_token_id=IMAGE).double()
    inputs = small_inputs(model, seed, images=(2,), words=(7,))
    layer, name = seed % 4, f"blocks.{seed % 4}.attn.hook_{site}"
    edit = Intervention(site, [layer], None, noise(1.0, seed=seed))

    def added(inputs):
        runs = [
            model.run_with_cache(inputs, names_filter=name, interventions=some)[1][name]
            for some in ([], [edit])
        ]
        return runs[1] - runs[0]

    places = Places.of(inputs.attention_mask, inputs.blocks)
    seen = model.rules[model.cfg.kind(layer)].mask(places, places)[0]
    found, n_pos = added(inputs), inputs.n_pos
    later = torch.ones(n_pos, n_pos, dtype=torch.bool).triu(1)
    assert (found[:, :, seen] != 0).all() and not found[:, :, later & ~seen].nan_to_num().any()
    longer = added(inputs.append(torch.tensor([3, 7])))[:, :, :n_pos, :n_pos]
    assert (longer - found)[:, :, seen].abs().max() < 1e-9
