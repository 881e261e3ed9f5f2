"""Aggregated traces: alignment by hand; intervals and p values against scipy and by hand."""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats
from small_models import picture, small_inputs, small_model, worded_model

from mmlens import CausalTrace, causal_trace, swap_span
from mmlens.analyses.aggregation import AggregatedTraces, aggregate_traces, role_positions
from mmlens.interventions.in_tile import InTile
from mmlens.sweeps.tasks.trace import TraceTask
from mmlens.utils.statistics import bootstrap_mean, sign_flip_test


def made_trace(groups, n_layers=3, sites=("attn_out", "mlp_out"), window=1):
    return CausalTrace(
        restored=torch.rand(len(sites), len(groups), n_layers),
        clean=0.9,
        corrupted=0.1,
        sites=sites,
        layers=tuple(range(n_layers)),
        window=window,
        groups=tuple(map(tuple, groups)),
        group_labels=tuple(map(str, groups)),
        answer="x",
        answer_tokens=(1,),
        method="branch",
    )


def positions(*each):
    return torch.tensor(each)


# Roles


@pytest.mark.parametrize("with_image", [True, False])
def test_roles_cover_the_prompt_and_meet_only_in_the_constraint(seed, with_image):
    model = worded_model(seed)
    pictures = picture(seed) if with_image else None
    text = random.choice(["the capital of this place is", "this place has", "who made this place"])
    inputs = model.prepare(text, pictures, spans={"constraint": "this place"}, template=None)
    roles = role_positions(inputs)
    assert ("image" in roles) == with_image
    assert torch.equal(roles["constraint"], inputs.span("constraint"))
    assert roles["constraint first"].tolist() == roles["constraint"][:1].tolist()
    assert roles["constraint last"].tolist() == roles["constraint"][-1:].tolist()
    assert roles["last token"].tolist() == [inputs.n_pos - 1]
    apart = [
        roles[name] for name in ("image", "before constraint", "after constraint") if name in roles
    ]
    covered = torch.cat([*apart, roles["constraint"], roles["last token"]]).unique()
    missing = set(range(inputs.n_pos)) - set(covered.tolist())
    assert missing == set(inputs.span("bos").tolist())
    assert sum(map(len, apart)) == len(torch.cat(apart).unique())
    if "before constraint" in roles:
        assert roles["before constraint"].max() < roles["constraint"].min()
    if "after constraint" in roles:
        assert roles["after constraint"].min() > roles["constraint"].max()


def test_roles_need_one_prompt_and_the_span(seed):
    model = small_model(seed)
    with pytest.raises(KeyError, match="constraint"):
        role_positions(small_inputs(model, seed))
    with pytest.raises(ValueError, match="one prompt"):
        role_positions(small_inputs(model, seed, images=(1, 1)))


# Alignment


def test_single_positions_are_averaged_over_a_role(seed):
    traces = [made_trace([[2], [3], [4], [6]]), made_trace([[5], [7]])]
    roles = [
        {"constraint": positions(2, 3), "last": positions(6), "image": positions(0, 1)},
        {"constraint": positions(5), "last": positions(7)},
    ]
    found = aggregate_traces(traces, roles)
    assert found.roles == ("constraint", "last")  # nothing was restored within the image
    effects = [trace.restored.double() - 0.1 for trace in traces]
    expected = torch.stack(
        [
            torch.stack([effects[0][:, :2].mean(dim=1), effects[0][:, 3]], dim=1),
            torch.stack([effects[1][:, 0], effects[1][:, 1]], dim=1),
        ]
    )
    torch.testing.assert_close(found.values, expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(found.mean, expected.mean(dim=0), atol=1e-6, rtol=0)


def test_a_group_that_is_the_role_stands_for_it(seed):
    trace = made_trace([[2, 3], [2], [3]])
    roles = {"constraint": positions(2, 3), "constraint first": positions(2)}
    found = aggregate_traces([trace, trace], [roles, roles], effect="restored")
    torch.testing.assert_close(found.values[0], trace.restored[:, :2].double())


def test_a_role_that_a_question_lacks_does_not_count(seed):
    traces = [made_trace([[1], [2]]), made_trace([[2]]), made_trace([[1], [2]])]
    both = {"text constraint": positions(1), "last": positions(2)}
    found = aggregate_traces(traces, [both, {"last": positions(2)}, both], effect="restored")
    assert found.values[1, :, 0].isnan().all()
    expected = (traces[0].restored[:, 0] + traces[2].restored[:, 0]).double() / 2
    torch.testing.assert_close(found.mean[:, 0], expected)
    table = found.to_dataframe("tiny")
    assert table.query("role == 'text constraint'")["n"].unique().tolist() == [2]
    assert table.query("role == 'last'")["n"].unique().tolist() == [3]
    assert set(table["model"]) == {"tiny"}


def test_real_traces_align_and_survive_a_file(seed, tmp_path):
    model = worded_model(seed)
    words = ("who made this place", "the name of this place is known")
    prompts = [
        model.prepare(text, picture(seed), spans={"constraint": "this place"}, template=None)
        for text in words
    ]
    traces = [
        causal_trace(model, clean, swap_span(model, clean, "constraint", 5), sites=("mlp_out",))
        for clean in prompts
    ]
    roles = [role_positions(clean) for clean in prompts]
    found = aggregate_traces(traces, roles, clusters=["one", "other"], seed=seed % 1000)
    for question, (trace, each) in enumerate(zip(traces, roles, strict=True)):
        at = [trace.groups.index((p,)) for p in each["constraint"].tolist()]
        expected = trace.indirect_effect[0, at].double().mean(dim=0)
        role = found.roles.index("constraint")
        torch.testing.assert_close(found.values[question, 0, role], expected)
    loaded = AggregatedTraces.load(found.save(tmp_path / "profile.safetensors"))
    torch.testing.assert_close(loaded.values, found.values, equal_nan=True)
    torch.testing.assert_close(loaded.low, found.low, equal_nan=True)
    assert (loaded.roles, loaded.clusters) == (found.roles, found.clusters)
    assert len(found.plot().data) > 0


def test_traces_that_do_not_fit_are_refused(seed):
    trace, roles = made_trace([[1]]), {"last": positions(1)}
    for others, each, message in (
        ([], [], "some"),
        ([trace, made_trace([[1]], n_layers=2)], [roles] * 2, "other layers"),
        ([trace, made_trace([[1]], window=3)], [roles] * 2, "other window"),
        ([trace], [{"last": positions(4)}], "no trace"),
        ([trace], [roles, roles], "2 roles for 1"),
    ):
        with pytest.raises(ValueError, match=message):
            aggregate_traces(others, each)
    with pytest.raises(ValueError, match="3 clusters for 1"):
        aggregate_traces([trace], [roles], clusters=[1, 2, 3])
    with pytest.raises(ValueError, match=r"right\[1\] is nan, which is neither right nor wrong"):
        aggregate_traces([trace, trace], [roles] * 2, right=[1.0, math.nan])


def test_a_trace_that_broke_is_no_trace_without_the_role(seed):
    """Its NaN was left out of the mean without a word."""
    roles = [{"last": positions(1)}] * 3
    traces = [made_trace([[1]]) for _ in range(3)]
    broken = random.choice(traces)
    broken.restored[0, 0, random.randrange(3)] = math.nan
    with pytest.raises(ValueError, match="indirect_effect of a trace .* is NaN: its run broke"):
        aggregate_traces(traces, roles)
    same = replace(made_trace([[1]]), clean=0.5, corrupted=0.5)
    same.restored[:] = 0.5
    with pytest.raises(ValueError, match="recovery of a trace .* is NaN"):
        aggregate_traces([made_trace([[1]]), same], roles[:2], effect="recovery")
    kept = aggregate_traces([made_trace([[1]]), same], roles[:2], minimum_gap=0.1)
    assert len(kept.values) == 1


def test_the_towers_positions_are_no_words(seed):
    """Its position 1 was taken for the prompt's: the class token's effect for the constraint's."""
    model = small_model(seed, n_layers=2)
    clean = small_inputs(model, seed)
    spans = ({**clean.spans[0], "constraint": clean.span("text")[:1]},)
    clean = replace(clean, spans=spans)
    other = clean.with_pixels(clean.pixel_values + 1)
    options = {"sites": ("vision.mlp_out",), "answer": 5}
    trace = causal_trace(model, clean, other, positions=[0, 1], **options)
    with pytest.raises(ValueError, match="are positions of the prompt, and those of vision.mlp"):
        aggregate_traces([trace], [role_positions(clean)])
    own = aggregate_traces([trace], [{"patch": positions(1)}])
    assert torch.equal(own.values[0, 0, 0], trace.indirect_effect[0, 1].double())
    tiles = causal_trace(model, clean, other, positions=[InTile(0, [0])], **options)
    with pytest.raises(ValueError, match="a trace of single tiles"):
        aggregate_traces([tiles], [{"patch": positions(0)}])
    with pytest.raises(ValueError, match=r"site 'vision.mlp_out': roles are positions of the pro"):
        TraceTask(sites=("vision.mlp_out",))


# Intervals


def test_intervals_are_scipys(seed):
    values = torch.randn(random.randint(3, 20), 2, 3, dtype=torch.float64)
    mean, low, high = bootstrap_mean(values, samples=200, level=0.9, seed=seed)
    expected = stats.bootstrap(
        (values.flatten(1).numpy(),),
        np.mean,
        axis=0,
        n_resamples=200,
        confidence_level=0.9,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    np.testing.assert_allclose(mean, values.mean(dim=0), atol=1e-12)
    np.testing.assert_allclose(low.flatten(), expected.low, atol=1e-12)
    np.testing.assert_allclose(high.flatten(), expected.high, atol=1e-12)


def test_clusters_are_drawn_whole(seed):
    """Against a plain loop: whole clusters drawn with numpy, means over all of their questions."""
    n_questions, n_clusters = random.randint(6, 15), random.randint(2, 5)
    labels = [*range(n_clusters), *random.choices(range(n_clusters), k=n_questions - n_clusters)]
    values = torch.randn(n_questions, dtype=torch.float64)
    values[random.randrange(n_clusters, n_questions)] = torch.nan
    mean, low, high = bootstrap_mean(values, labels, samples=100, seed=seed)
    means = []
    for drawn in np.random.default_rng(seed).integers(n_clusters, size=(100, n_clusters)):
        members = [values[[label == each for label in labels]] for each in drawn]
        means.append(torch.cat(members).nanmean().item())
    assert mean.item() == pytest.approx(values.nanmean().item(), abs=1e-12)
    expected = np.percentile(means, [2.5, 97.5])
    np.testing.assert_allclose([low.item(), high.item()], expected, atol=1e-12)


def test_equal_clusters_have_an_interval_of_no_width(seed):
    of_each = torch.randn(3, 2)
    mean, low, high = bootstrap_mean(of_each.repeat(4, 1), [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3])
    torch.testing.assert_close(low, mean)
    torch.testing.assert_close(high, mean)


def test_one_cluster_has_a_mean_and_no_interval(seed):
    mean, low, high = bootstrap_mean(torch.tensor([1.0, 3.0]), ["a", "a"])
    assert mean.item() == 2.0 and low.isnan() and high.isnan()
    with pytest.raises(ValueError, match="some"):
        bootstrap_mean(torch.empty(0, 2))


# The permutation test


def test_p_values_count_sign_changes(seed):
    """All sign changes of at most 8 questions, by hand."""
    n = random.randint(2, 8)
    differences = torch.randint(-(2**20), 2**20, (n,)).double() / 2**20  # whose sums are exact
    found = sign_flip_test(differences)
    signs = np.array(list(itertools.product([1, -1], repeat=len(differences))))
    sums = signs @ differences.numpy()
    at_least = (sums >= differences.sum().item()).mean()
    assert found == pytest.approx(at_least, abs=1e-12)


def test_clusters_change_sign_together(seed):
    labels = [0, 0, 1, 1, 2]
    differences = torch.randn(5, dtype=torch.float64)
    sums = torch.stack([differences[:2].sum(), differences[2:4].sum(), differences[4]])
    assert sign_flip_test(differences, labels) == sign_flip_test(sums)


def test_compare_finds_the_layer_that_was_made_larger(seed):
    n_questions, n_layers, large = 12, 4, random.randrange(4)
    trace_values = torch.rand(n_questions, 1, 1, n_layers)
    trace_values[..., large] += 1.0  # larger than any other value, in every question
    traces = []
    for row in trace_values:
        trace = made_trace([[1]], n_layers=n_layers, sites=("mlp_out",))
        trace.restored.copy_(row)
        traces.append(trace)
    profile = aggregate_traces(traces, [{"last": positions(1)}] * n_questions, samples=100)
    others = [layer for layer in range(n_layers) if layer != large]
    found = profile.compare("mlp_out", "last", [large], others)
    assert found.p_value == 2.0**-n_questions  # all differences positive: only no change is as good
    assert 0 < found.low <= found.difference <= found.high or found.low > 0
    assert profile.compare("mlp_out", "last", others, [large]).p_value == 1.0
    assert found.n_questions == n_questions
    alone = aggregate_traces(traces, [{"last": positions(1)}] * n_questions, clusters=["a"] * 12)
    one = alone.compare("mlp_out", "last", [large], others)
    assert one.difference == pytest.approx(found.difference)
    assert math.isnan(one.p_value) and math.isnan(one.low) and math.isnan(one.high)
    with pytest.raises(ValueError, match="'z' is not among mlp_out"):
        profile.compare("z", "last", [0], [1])
    with pytest.raises(ValueError, match="9 is not among 0, 1, 2, 3"):
        profile.compare("mlp_out", "last", [9], [1])
