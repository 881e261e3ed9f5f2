"""The analyses find a mechanism that is known to be there, and nothing where nothing is.

Weights are planted (`planted_models`): the answer takes one way, step by step, and everything else
in the model is busy with other things. Every bound follows from that construction, for every seed;
what is on the way has all of the effect (P(answer) from 1/27 to 0.999), what is not has none.
"""

from __future__ import annotations

import random
import runpy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from planted_cases import (
    NORMED,
    SITES,
    Case,
    asked,
    check,
    check_cut,
    everywhere,
    one_hop_case,
    shown_to,
)
from planted_configs import FAMILIES
from planted_models import AMPLITUDE, CONFIDENCE, N_ENTITIES, PARIS, SPEAKS
from planted_weights import STRENGTH

from mmlens import (
    Intervention,
    attention_contribution,
    attention_knockout,
    attribution_patching,
    causal_trace,
    direct_logit_attribution,
    logit_lens,
)

EVERY_FAMILY = pytest.mark.parametrize("family", FAMILIES)
EVERY_LAYER = [(n_layers, k) for n_layers in (3, 4, 6) for k in range(1, n_layers - 1)]


@pytest.mark.parametrize(("n_layers", "k"), EVERY_LAYER)
def test_a_trace_finds_the_fact_in_every_layer(seed, n_layers, k):
    layers = [random.randrange(k), k, random.randrange(k + 1, n_layers)]
    case = one_hop_case(seed, n_layers=n_layers, layers=layers)
    width = random.randint(1, 3)
    trace = causal_trace(
        case.planted.model,
        case.inputs,
        case.swapped(constraint=PARIS),
        positions=everywhere(case),
        window=width,
    )
    assert trace.answer_tokens == (case.answer,)
    check(case, trace, asked(case).cells(SITES, everywhere(case), width))


@EVERY_FAMILY
def test_every_site_has_its_part(seed, family):
    case = one_hop_case(seed, family=family)
    model, corrupted = case.planted.model, case.swapped(constraint=PARIS)
    sites = ("resid_pre", "z", "q", "rot_q", "k", "v", "pattern", "attn_scores", "post")
    sites += NORMED if model.cfg.qk_norm else ()
    trace = causal_trace(model, case.inputs, corrupted, sites=sites, positions=everywhere(case))
    check(case, trace, asked(case).cells(sites, everywhere(case)))


def test_the_plain_runs_find_the_same(seed):
    case = one_hop_case(seed)
    model, corrupted = case.planted.model, case.swapped(constraint=PARIS)
    groups = [case.inputs.span("constraint").tolist(), case.inputs.span("last").tolist()]
    trace = causal_trace(model, case.inputs, corrupted, positions=groups, method="naive")
    check(case, trace, asked(case).cells(SITES, groups))


def test_one_head_of_each_layer(seed):
    case = one_hop_case(seed, n_key_value_heads=2, n_heads=4)
    model, planted = case.planted.model, case.planted
    _, cache = model.run_with_cache(case.inputs, names_filter=lambda name: name.endswith("hook_z"))

    def restore_head(head):
        def hook(z, hook, positions):
            z[:, :, head] = cache[hook.name][:, positions, head]
            return z

        return hook

    steps = [planted.steps["looks"], planted.steps["tells"]]
    cells = [(i, head) for i in range(model.cfg.n_layers) for head in range(model.cfg.n_heads)]
    for step in steps:
        at = case.inputs.span(step.role)
        branches = [[Intervention("z", i, at, restore_head(head))] for i, head in cells]
        logits = model.record(case.swapped(constraint=PARIS)).run(branches, lambda logits: logits)
        found = logits[:, 0, -1].softmax(-1)[:, case.answer]
        for cell, probability in zip(cells, found.tolist(), strict=True):
            if cell == (step.layer, step.head):
                assert probability >= planted.least
            else:
                assert probability <= planted.most


# The image


@EVERY_FAMILY
def test_a_trace_finds_the_patches(seed, family):
    """Against an image of nothing every patch that shows the entity is enough by itself."""
    case = one_hop_case(seed, family=family)
    corrupted = case.with_image(None, seed + 1)
    trace = causal_trace(case.planted.model, case.inputs, corrupted, positions=everywhere(case))
    check(case, trace, shown_to(case).cells(SITES, everywhere(case)))


@EVERY_FAMILY
def test_a_trace_against_another_entity(seed, family):
    """All patches that show it together; the others, even together, have no part in it."""
    case = one_hop_case(seed, family=family)
    model = case.planted.model
    corrupted = case.with_image((case.entity + 1) % N_ENTITIES, seed)
    others = sorted(set(case.inputs.span("image").tolist()) - set(case.patches))
    groups = [case.patches, others, *(case.inputs.span(role).tolist() for role in ("asks", "last"))]
    trace = causal_trace(model, case.inputs, corrupted, positions=groups)
    check(case, trace, shown_to(case).cells(SITES, groups))


@EVERY_FAMILY
def test_a_trace_of_the_tower(seed, family):
    case = one_hop_case(seed, family=family)
    planted, cfg = case.planted, case.planted.model.cfg.vision
    rows, columns = (n * cfg.merge_size for n in planted.grid)
    places = [planted.showing(*place) for place in case.shown]
    shown = {cfg.class_token + row * columns + column for row, column in places}
    n_pos = cfg.class_token + rows * columns
    trace = causal_trace(
        case.planted.model,
        case.inputs,
        case.with_image(None, seed + 1),
        sites=("vision.resid_post", "vision.attn_out", "vision.mlp_out"),
        positions=range(n_pos),
    )
    expected = torch.zeros(3, n_pos, cfg.n_layers, dtype=torch.bool)
    expected[0, list(shown), : planted.vision_layers] = True
    expected[2, list(shown), case.planted.vision_layer] = True
    check(case, trace, expected)


@pytest.mark.parametrize("deepstack", [0, 1])
def test_a_trace_of_what_is_added_in_first_blocks(seed, deepstack):
    """Deepstack: the entity is in the stream of its patches from that block on, and not before."""
    layers = [2, *sorted(random.sample(range(3, 6), 2))]
    case = one_hop_case(seed, family="qwen3", n_layers=6, layers=layers, deepstack=deepstack)
    model, groups = case.planted.model, everywhere(case)
    assert case.planted.deepstack == deepstack
    corrupted = case.with_image(None, seed + 1)
    deep = range(model.cfg.n_deepstack)
    options = {"positions": groups, "window": 1}
    trace = causal_trace(
        model, case.inputs, corrupted, sites=("deepstack",), layers=deep, **options
    )
    expected = torch.zeros(1, len(groups), len(deep), dtype=torch.bool)
    expected[0, case.patches, deepstack] = True
    check(case, trace, expected)
    sites = ("resid_pre", *SITES)
    trace = causal_trace(model, case.inputs, corrupted, sites=sites, **options)
    check(case, trace, shown_to(case).cells(sites, groups))


# Attention


@EVERY_FAMILY
def test_contributions_are_those_of_the_steps(seed, family):
    """In no layer do distractors bring more than STRENGTH; a step brings AMPLITUDE, in parts."""
    case = one_hop_case(seed, family=family, n_key_value_heads=2, n_heads=4)
    planted, inputs = case.planted, case.inputs
    expected = {"looks": case.patches, "tells": inputs.span("asks").tolist()}
    before = list(range(inputs.n_pos))
    for name, sources in expected.items():
        step = planted.steps[name]
        brought = AMPLITUDE * (1 - planted.lost) - planted.error
        at = (step.layer, 0)
        whole = attention_contribution(planted.model, inputs, before, step.role)
        heads = attention_contribution(planted.model, inputs, before, step.role, per_head=True)
        assert brought / len(sources) > 1.1 * (STRENGTH + planted.error)
        for found, here in ((whole, at), (heads, (step.layer, step.head, 0))):
            on_the_way = torch.zeros_like(found.values, dtype=torch.bool)
            on_the_way[(*here, sources)] = True
            assert found.values[on_the_way].min() >= brought / len(sources)
            assert found.values[~on_the_way].max() <= STRENGTH + planted.error
            assert found.values[here][sources].sum() >= brought
        assert sorted(whole.top(len(sources))[1][at].tolist()) == sources
        share = whole.cumulative_share()[at][len(sources) - 1]
        assert share >= brought / (brought + STRENGTH + inputs.n_pos * planted.error)


@EVERY_FAMILY
def test_knockout_of_spans(seed, family):
    case = one_hop_case(seed, family=family)
    looks, tells = (case.planted.steps[name].layer for name in ("looks", "tells"))
    others = sorted(set(case.inputs.span("image").tolist()) - set(case.patches))
    width = random.randint(1, 3)
    for source, destination, layers in (
        ("image", "constraint", {looks}),
        ("image", "asks", {looks}),
        (case.patches, "text", {looks}),
        (others, "text", set()),
        ("image", "last", set()),
        ("constraint", "last", {tells}),
        ("asks", "text", {tells}),
    ):
        check_cut(case, source, destination, layers, width)


def test_knockout_of_every_pair_of_positions(seed):
    """BOS stays: where nothing is to be seen, heads look there."""
    case = one_hop_case(seed, n_layers=3)
    (asks,), last = case.inputs.span("asks").tolist(), case.inputs.n_pos - 1
    ways = {(asks, last): {case.planted.steps["tells"].layer}}
    if len(case.patches) == 1:  # of several, the others still show the entity
        ways[case.patches[0], asks] = {case.planted.steps["looks"].layer}
    for destination in (asks, last, random.randrange(1, last)):
        for source in range(1, destination + 1):
            check_cut(case, [source], [destination], ways.get((source, destination), set()))


# Logits


@EVERY_FAMILY
def test_logit_attribution_and_lens(seed, family):
    case = one_hop_case(seed, family=family)
    planted, at = case.planted, [int(case.inputs.span("asks")), case.inputs.n_pos - 1]
    knows, tells = planted.steps["knows"], planted.steps["tells"]
    for per_head in (False, True):
        found = direct_logit_attribution(
            planted.model, case.inputs, case.answer, positions=at, per_head=per_head
        )
        teller = f"{tells.layer}.head_{tells.head}" if per_head else f"{tells.layer}.attn_out"
        writers = [f"{knows.layer}.mlp_out", teller]
        for column, writer in enumerate(writers):
            largest = found.components.index(writer)
            values = found.values[:, column]
            assert abs(values[largest] - CONFIDENCE) <= CONFIDENCE * planted.lost + planted.slack
            rest = torch.cat([values[:largest], values[largest + 1 :]])
            assert rest.abs().max() <= planted.slack
    lens = logit_lens(planted.model, case.inputs, tokens=[case.answer])
    probability = lens.log_probs[..., 0].exp()
    known = torch.zeros_like(probability, dtype=torch.bool)
    known[knows.layer :, at[0]] = True
    known[tells.layer :, at[1]] = True
    assert probability[known].min() >= planted.least
    assert probability[~known].max() <= planted.most
    assert lens.ranks[known].eq(0).all()


@EVERY_FAMILY
def test_attribution_patching_follows_the_gradient(seed, family):
    """It finds every step, with the size of the exact effect on the logit.

    What it misses is that the word that asks would look elsewhere: the head is sure of looking at
    BOS, its softmax has no slope there.
    """
    layers = [random.randint(1, 2), 3, random.randint(4, 5)]
    case = one_hop_case(seed, family=family, n_layers=6, layers=layers)
    model, corrupted = case.planted.model, case.swapped(constraint=PARIS)
    options = {"positions": everywhere(case), "answer": case.answer}

    def logit(logits):
        return logits[:, 0, case.answer]

    estimate = attribution_patching(model, case.inputs, corrupted, metric=logit, **options)
    trail = asked(case)
    exact = trail.cells(SITES, everywhere(case))
    felt = replace(trail, since=layers[0]).cells(SITES, everywhere(case))
    slack = case.planted.estimate_slack
    off = CONFIDENCE * case.planted.lost + slack
    assert off < CONFIDENCE / 4
    assert (estimate.indirect_effect[felt] - CONFIDENCE).abs().max() <= off
    assert estimate.indirect_effect[~felt].abs().max() <= slack
    missed = exact & ~felt
    assert missed.sum() == layers[0]
    trace = causal_trace(model, case.inputs, corrupted, **options)
    error = attribution_patching(model, case.inputs, corrupted, **options).error(trace)
    assert error.largest >= case.planted.least - case.planted.most - slack


@EVERY_FAMILY
def test_attribution_patching_against_another_entity(seed, family):
    """Where the head looks already, the gradient misses nothing of what it would see there.

    Here the other answer is on its way, and what is put back changes the norms that it passes: by
    at most four times what a norm takes of it, since differences are up to two radii.
    """
    case = one_hop_case(seed, family=family)
    other = (case.entity + 1) % N_ENTITIES
    others = sorted(set(case.inputs.span("image").tolist()) - set(case.patches))
    groups = [case.patches, others, *([i] for i in range(max(case.patches) + 1, case.inputs.n_pos))]

    def difference(logits):
        return logits[:, 0, case.answer] - logits[:, 0, case.planted.facts[other, 0]]

    found = attribution_patching(
        case.planted.model,
        case.inputs,
        case.with_image(other, seed),
        positions=groups,
        answer=case.answer,
        metric=difference,
    ).indirect_effect
    expected = shown_to(case).cells(SITES, groups)
    slack = 2 * (4 * CONFIDENCE * case.planted.lost + case.planted.estimate_slack)
    assert slack < CONFIDENCE
    off = (found[expected] - 2 * CONFIDENCE).abs().max()
    assert off <= 2 * CONFIDENCE * case.planted.lost + slack
    assert found[~expected].abs().max() <= slack


# Nothing where nothing is


def check_nothing(case: Case, least: float, most: float) -> None:
    """No analysis finds anything: P(answer) stays between `least` and `most` whatever is done."""
    model, answer = case.planted.model, case.answer
    corruptions = [case.swapped(constraint=PARIS), case.with_image(None, 1)]
    for corrupted in corruptions:
        trace = causal_trace(
            model, case.inputs, corrupted, positions=everywhere(case), answer=answer, window=2
        )
        assert least <= trace.clean <= most and least <= trace.corrupted <= most
        assert trace.restored.min() >= least and trace.restored.max() <= most
    for source, destination in (("image", "text"), ("constraint", "last")):
        cut = attention_knockout(model, case.inputs, source, destination, answer=answer)
        assert cut.probability.min() >= least and cut.probability.max() <= most


@EVERY_FAMILY
@pytest.mark.parametrize("name", ["looks", "knows", "tells"])
def test_nothing_is_found_where_the_way_is_cut(seed, name, family):
    case = one_hop_case(seed, family=family)
    planted = case.planted
    planted.cut(name)
    check_nothing(case, planted.most - planted.nothing, planted.most)
    found = direct_logit_attribution(planted.model, case.inputs, case.answer, positions="last")
    assert found.values.abs().max() <= planted.slack
    seen = attention_contribution(planted.model, case.inputs, "image", "constraint")
    told = attention_contribution(planted.model, case.inputs, "constraint", "last")
    limit = STRENGTH + planted.error
    assert (seen.values.max() <= limit) == (name == "looks")
    assert told.values.max() <= limit


def test_an_answer_that_depends_on_the_last_word_alone(seed):
    """The whole circuit is there but for its last step, and the last word says something itself."""
    case = one_hop_case(seed)
    planted = case.planted
    planted.cut("tells")
    case.answer = planted.say(SPEAKS)
    check_nothing(case, planted.least, 1.0)
    found = direct_logit_attribution(planted.model, case.inputs, positions="last")
    assert found.components[found.values[:, 0].argmax()] == "embed"


def test_the_rest_of_the_model_is_busy(seed):
    """Distractors write, in every layer: what is found is not found for want of anything else."""
    case = one_hop_case(seed)
    _, cache = case.planted.model.run_with_cache(case.inputs)
    steps = {(step.site, step.layer) for step in case.planted.steps.values()}
    for layer in range(case.planted.model.cfg.n_layers):
        for site in ("attn_out", "mlp_out"):
            if (site, layer) not in steps:
                assert cache[site, layer].norm(dim=-1).min() > 0


def test_the_example(capsys):
    """The circuit of examples/planted_circuit.py is where its text says."""
    folder = Path(__file__).parents[1] / "examples"
    example = runpy.run_path(str(folder / "planted_circuit.py"))
    example["main"]()
    printed = capsys.readouterr().out.splitlines()
    effects = [line.split()[-1] for line in printed if line.strip().startswith(("att", "MLP"))]
    assert effects[:3] == [str(example[name]) for name in ("LOOKS", "KNOWS", "TELLS")]
