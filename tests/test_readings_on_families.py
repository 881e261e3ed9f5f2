"""The lens, maps of a word, erased tokens and sinks against transformers' own modules.

On the four families of `family_cases`. Every number of a result is compared.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from family_cases import (
    EVERY,
    LOG_PROBS,
    LOGITS,
    Case,
    assert_ranks,
    edited,
    probability,
)
from PIL import Image
from sklearn.metrics import average_precision_score, roc_auc_score
from torch import Tensor

from mmlens import WordMap, attention_sinks, logit_lens, token_erasure, word_map
from mmlens.analyses.attention_sinks import like
from mmlens.analyses.targets import given_answer
from mmlens.analyses.token_erasure import drawn
from mmlens.inputs.image_tokens import Box
from mmlens.interventions.functions import scale

RESIDUAL = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "input_embed")


@pytest.fixture
def case(family: str, seed: int, tmp_path: Path) -> Case:
    return Case(family, seed, tmp_path)


def streams(case: Case, site: str, layers: list[int]) -> Tensor:
    """What transformers has at a site of the residual stream: [layer, pos, d_model]."""
    if site == "input_embed":
        site, layers = "resid_pre", [0]
    return torch.cat(case.kept_of(case.batches[0], [(site, layer) for layer in layers]))


@EVERY
@torch.no_grad()
def test_the_lens_at_every_site_of_the_stream(case: Case) -> None:
    """Log probabilities, ranks, the best tokens, and the words of patches."""
    chance, n_layers = case.chance, case.model.cfg.n_layers
    tokens = torch.tensor(chance.sample(range(3, 60), 2))
    image = case.inputs.span("image").tolist()
    where = sorted({*chance.sample(image, min(5, len(image))), *chance.sample(case.words, 2)})
    for site in RESIDUAL:
        layers = chance.sample(range(n_layers), 2)
        given: dict[str, Any] = {} if site == "input_embed" else {"layers": layers}
        lens = logit_lens(
            case.model, case.inputs, site=site, positions=where, tokens=tokens.tolist(), top=3,
            **given,
        )  # fmt: skip
        expected = case.read(streams(case, site, layers)[:, where])
        close(lens.log_probs, expected[..., tokens])
        assert_ranks(lens.ranks, expected, tokens)
        best = expected.topk(3).values
        close(lens.top_log_probs, best)
        close(expected.gather(-1, lens.top_tokens), best)
        assert float(expected[..., tokens].std()) > 10 * LOG_PROBS
        for at, layer in enumerate(lens.layers):
            words = lens.patch_words(layer)
            assert words["position"].tolist() == [each for each in where if each in image]
            for row in words.itertuples():
                index = where.index(row.position)
                said = case.model.to_str_tokens(lens.top_tokens[at, index].tolist())
                assert row.words == said
                shown = math.exp(float(best[at, index, 0]))
                assert row.probability == pytest.approx(shown, abs=LOG_PROBS)


def close(found: Tensor, expected: Tensor, atol: float = LOG_PROBS) -> None:
    torch.testing.assert_close(found.double(), expected.double(), rtol=0, atol=atol, equal_nan=True)


@EVERY
@torch.no_grad()
def test_a_map_of_a_word(case: Case) -> None:
    """Its numbers are transformers'; its scores and best patches are counted of these numbers."""
    chance, model = case.chance, case.model
    token, site = chance.randrange(3, 60), chance.choice(RESIDUAL[:-1])
    layers = chance.sample(range(model.cfg.n_layers), 2)
    tokens = case.inputs.images[0]
    at = tokens.positions.tolist()
    found = word_map(model, case.inputs, token, site=site, layers=layers)
    expected = case.read(streams(case, site, layers)[:, at])
    assert found.layers == tuple(layers) and found.positions == tuple(at)
    close(found.log_probs, expected[..., token])
    assert_ranks(found.ranks[..., None], expected, torch.tensor([token]))
    assert found.word == model.to_str_tokens([token])[0]
    kept = [index for index, (view, _, _) in enumerate(found.patches) if view >= 0]
    order = expected[:, kept, token]
    for row, layer in enumerate(layers):
        best = [kept.index(at.index(each)) for each in found.top(3, layer)]
        close(order[row, best], order[row].topk(min(3, len(kept))).values)
    check_scores(case, found)


def check_scores(case: Case, found: WordMap) -> None:
    """Patches of every view that lie in a box by half, and scores of their log probabilities.

    Each view shows the whole image here; what views really show is tested by `cell_checks`.
    """
    width, height = case.chance.randint(20, 90), case.chance.randint(20, 90)
    tokens = replace(
        case.inputs.images[0],
        image=Image.new("RGB", (width, height)),
        boxes=lambda size: [Box(0.0, 0.0, *map(float, size))] * len(case.inputs.images[0].grids),
    )
    inputs = replace(case.inputs, images=(tokens,))
    views = tokens.views
    row, column = (case.chance.randrange(n) for n in views[0].grid)
    left, top, *_ = views[0].cell_box(row, column)
    box = (left - 0.1, top - 0.1, width + 0.1, height + 0.1)
    inside, kept = [], []
    for index, (view, row, column) in enumerate(found.patches):
        if view >= 0:
            cell = views[view].cell_box(row, column)
            across = min(cell.right, box[2]) - max(cell.left, box[0])
            down = min(cell.bottom, box[3]) - max(cell.top, box[1])
            size = (cell.right - cell.left) * (cell.bottom - cell.top)
            inside.append(max(across, 0.0) * max(down, 0.0) >= 0.5 * size)
            kept.append(index)
    if all(inside):
        with pytest.raises(ValueError, match="holds every patch"):
            found.score(inputs, box)
        return
    scores = found.score(inputs, box)
    for at in range(len(found.layers)):
        values = found.log_probs[at, kept].double().numpy()
        assert scores["auroc"][at] == pytest.approx(roc_auc_score(inside, values))
        expected = average_precision_score(inside, values)
        assert scores["average_precision"][at] == pytest.approx(expected)
        assert scores["share"][at] == pytest.approx(np.mean(inside))


def joint(logits: list[Tensor], tokens: list[int]) -> float:
    steps = [step.double().log_softmax(-1)[each] for step, each in zip(logits, tokens, strict=True)]
    return math.exp(float(torch.stack(steps).sum()))


@EVERY
@torch.no_grad()
def test_tokens_that_are_erased(case: Case) -> None:
    """P of an answer of several tokens, chosen tokens and others erased, and what is said then."""
    chance, model, inputs = case.chance, case.model, case.inputs
    visual = inputs.images[0].positions
    n = chance.randint(1, max(1, len(visual) // 2))
    by = chance.choice(["mean", "zero", "function"])
    n_draws = 2 if len(visual) > 1 else 0  # an image of one token has no others
    chosen = sorted(chance.sample(visual.tolist(), n))
    [embedded] = case.kept_of(case.batches[0], [("resid_pre", 0)])
    put = {
        "mean": lambda x: embedded[:, visual].mean(1, keepdim=True).expand_as(x),
        "zero": torch.zeros_like,
        "function": lambda x: -1.5 * x,
    }[by]
    answer = chance.choice([" Paris", None])
    seed = chance.randrange(1000)
    given: Any = scale(-1.5) if by == "function" else by
    found = token_erasure(
        model,
        inputs,
        chosen,
        by=given,
        answer=answer,
        controls=n_draws,
        seed=seed,
        max_new_tokens=5,
    )
    tokens = [int(case.theirs([])[-1].argmax())]
    if answer is not None:
        tokens = given_answer(model, inputs, answer).tokens.tolist()
    others = visual[~torch.isin(visual, torch.tensor(chosen))]
    generator = torch.Generator().manual_seed(seed)
    draws = [drawn(others, n, generator) for _ in range(n_draws)]

    def erased(at: Any) -> Any:
        return [(0, "", True, edited(at, put))]

    def theirs(edits: Any) -> float:
        return joint(case.continued(len(tokens), edits, forced=tokens)[1], tokens)

    bound = len(tokens) * LOG_PROBS
    assert found.clean == pytest.approx(theirs([]), abs=bound)
    assert found.erased == pytest.approx(theirs(erased(chosen)), abs=bound)
    assert found.effect == found.erased - found.clean
    for at, value in zip(draws, found.controls.tolist(), strict=True):
        assert len(set(at.tolist())) == n and set(at.tolist()) <= set(others.tolist())
        assert value == pytest.approx(theirs(erased(at)), abs=bound)
    assert found.p_value == (1 + int((found.controls <= found.erased).sum())) / (1 + n_draws)
    assert found.positions == tuple(chosen)
    for said, edits in ((found.said_before, []), (found.said, erased(chosen))):
        case.assert_said(said, *case.continued(5, edits))


@EVERY
@torch.no_grad()
def test_sinks_and_what_cutting_them_does(case: Case) -> None:
    """Every cell; the sinks by their definition, and every value with attention to them cut."""
    model, inputs, chance = case.model, case.inputs, case.chance
    n_layers, n_pos = model.cfg.n_layers, inputs.n_pos
    token, seed = chance.randrange(3, 60), chance.randrange(1000)
    factor, share = chance.uniform(0.8, 1.2), chance.choice([0.25, 0.5])
    found = attention_sinks(
        model, inputs, factor=factor, share=share, answer=token, draws=2, seed=seed
    )
    layers = range(n_layers)
    case.hf.set_attn_implementation("eager")
    attended = case.hf(**case.batches[0], output_attentions=True).attentions
    case.hf.set_attn_implementation("sdpa")
    received = torch.stack([received_by(pattern[0].double()) for pattern in attended])
    values = torch.cat(case.kept_of(case.batches[0], [("v", layer) for layer in layers]))
    norms = values.unflatten(-1, (model.cfg.n_kv_heads, -1)).double().norm(dim=-1).mean(-1)
    stream = streams(case, "resid_pre", list(layers)).double()
    close(found.received, received, LOGITS)
    close(found.value_norms, norms, LOGITS)
    massive = stream.abs().amax(-1) / stream.square().mean(-1).sqrt()
    close(found.massive, massive, LOGITS)

    # Sinks by their definition, with what rounding may tip either way.
    def sinks(slack: float) -> set[int]:
        often = received > factor * received.nanmean(1, keepdim=True) - slack
        median = norms.sort(dim=1).values[:, (n_pos - 1) // 2]
        quiet = norms < median[:, None] + slack
        enough = (often & quiet).double().mean(0) >= share
        return set(enough.nonzero().flatten().tolist())

    assert sinks(-LOGITS) <= set(found.sinks) <= sinks(LOGITS)
    is_image = inputs.is_image[0]
    assert set(found.visual) == {at for at in found.sinks if is_image[at]}
    largest = Counter(
        int(stream[layer, at].abs().argmax()) for layer in layers for at in found.sinks
    )
    assert [largest[each] for each in found.dimensions] == sorted(largest.values(), reverse=True)
    assert set(found.dimensions) == set(largest)
    assert found.baseline == pytest.approx(probability(case.theirs([]), token), abs=LOG_PROBS)
    every = torch.tensor(found.sinks, dtype=torch.long)
    sets = [every[~is_image[every]], every[is_image[every]], every]
    others = torch.tensor([each for each in range(n_pos) if each not in found.sinks])
    generator = torch.Generator().manual_seed(seed)
    for row, positions in enumerate(sets):
        drawn = [
            torch.cat([like(positions, kind, every, is_image, generator) for kind in (False, True)])
            for _ in range(2)
        ]
        for value, at in zip(
            [found.values[row], *found.control[row]], [positions, *drawn], strict=True
        ):
            if not len(positions):
                assert bool(value.isnan())
                continue
            if at is not positions:
                assert not set(at.tolist()) & set(found.sinks)
                for kind in (False, True):
                    n, left = ((is_image[each] == kind).sum() for each in (positions, others))
                    assert (is_image[at] == kind).sum() == min(n, left)
            queries = [each for each in range(n_pos) if each not in at.tolist()]
            logits = case.cut(layers, queries, at.tolist()) if len(at) else case.theirs([])
            assert float(value) == pytest.approx(probability(logits, token), abs=LOG_PROBS)


def received_by(pattern: Tensor) -> Tensor:
    """What each key gets, on average over heads and over the other queries that see it."""
    seen = (pattern > 0).any(0).fill_diagonal_(False)
    given = pattern.mean(0) * seen
    return given.sum(0) / seen.sum(0)
