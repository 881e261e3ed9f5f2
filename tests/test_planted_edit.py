"""Edits of a model whose facts are known to be in one layer's MLP, at one word."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from planted_cases import Case, one_hop_case
from planted_edits import PlantedEdits
from planted_models import ASKS, FIRST_ANSWER, N_ANSWERS, N_ENTITIES, Planted

from mmlens import EditRequest, HookedMultimodalTransformer, multedit
from mmlens.editing import MultEditSettings, References, evaluate

LOOKS, KNOWS, TELLS, N_LAYERS = 1, 2, 3, 5


@torch.no_grad()
def behind_norms(case: Case) -> Case:
    """The same model with a norm after each attention and MLP, of which the fact's saturates.

    The others' are the identity, to rounding. That of the fact's layer leaves the fact as it is,
    and makes what is larger smaller: an MLP that writes twice as much adds 1.26 times as much.
    """
    old, at = case.planted.model, case.inputs.span("asks").tolist()
    name = f"blocks.{KNOWS}.hook_mlp_out"
    fact = old.run_with_cache(case.inputs, names_filter=name)[1][name][0, at]
    model = HookedMultimodalTransformer(replace(old.cfg, post_norms=True))
    missing, unexpected = model.load_state_dict(old.state_dict(), strict=False)
    assert not unexpected and all("_post" in each for each in missing)
    for layer, block in enumerate(model.blocks):
        for norm in (block.ln1_post, block.ln2_post):
            norm.eps = 1e8
            if layer == KNOWS and norm is block.ln2_post:
                norm.eps = float(fact.pow(2).mean())
            norm.w.fill_((norm.eps * (2 if norm.eps < 1e8 else 1)) ** 0.5)
    return replace(case, planted=replace(case.planted, model=model.requires_grad_(False)))


@torch.no_grad()
def planted_case(seed: int, **choices: Any) -> Case:
    """The last word looks at the one that asks, whatever small thing is added to that.

    What it looks for there has length 1, and what Adam adds by chance in that direction may be of
    this size; then it would look away, for good. So it gets length 9.
    """
    case = one_hop_case(seed, layers=[LOOKS, KNOWS, TELLS], n_layers=N_LAYERS, **choices)
    hold(case.planted, TELLS)
    return case


@torch.no_grad()
def hold(planted: Planted, layer: int) -> None:
    """Let the last word attend to the one that asks whatever is added to that."""
    model = planted.model
    tells, block = planted.steps["tells"], model.blocks[layer]
    group = tells.head // (model.cfg.n_heads // model.cfg.n_kv_heads)
    looked_for = block.attn.W_K[group][:, model.cfg.rotary_dim] * block.ln1.w
    model.embed.W_E[ASKS] += 8 * looked_for / looked_for.norm()


def probabilities(case: Case) -> torch.Tensor:
    """[entity, token]: what the model says of each entity's image."""
    pictures = [case.with_image(entity, 7) for entity in range(N_ENTITIES)]
    return torch.stack([case.planted.model(inputs)[0, -1].softmax(-1) for inputs in pictures])


def new_answer(case: Case) -> int:
    """One that is no entity's."""
    facts = {case.planted.facts[entity, 0] for entity in range(N_ENTITIES)}
    return next(a for a in range(FIRST_ANSWER, FIRST_ANSWER + N_ANSWERS) if a not in facts)


@pytest.mark.parametrize("normed", [False, True], ids=["plain", "behind norms"])
def test_the_fact_is_edited_where_it_is(seed: int, normed: bool) -> None:
    """There it changes and no other does; in other layers it does not change."""
    if normed:
        case = behind_norms(planted_case(seed, normalization_type="RMS", parallel_attn_mlp=False))
    else:
        case = planted_case(seed)
    target = new_answer(case)
    others = [entity for entity in range(N_ENTITIES) if entity != case.entity]
    right = [case.planted.facts[entity, 0] for entity in others]
    before = probabilities(case)
    assert before[others, right].min() >= 0.99 and before[case.entity, target] <= 0.01
    for layer in range(N_LAYERS):
        request = EditRequest(case.inputs, target, span="asks")
        settings = MultEditSettings.paper(steps=40, clamp=4.0, preserve="both")
        edit = multedit(case.planted.model, request, layer=layer, settings=settings)
        with edit.applied(case.planted.model):
            after = probabilities(case)
        if layer == KNOWS:
            assert after[case.entity, target] >= 0.9
            assert after[others, right].min() >= 0.9
        else:
            assert after[case.entity, target] <= 0.5


def first_words(answers: list[str]) -> list[str]:
    """The answers; what these models say after them is by chance."""
    return [answer.split()[0] for answer in answers]


def test_the_default_edit_changes_that_fact_alone(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other images and words get it, and no other entity's does."""
    monkeypatch.setenv("MMLENS_CACHE", str(tmp_path))
    world = PlantedEdits(seed)
    hold(world.planted, world.planted.steps["tells"].layer)
    model, entity = world.model, world.chance.randrange(N_ENTITIES)
    others = [each for each in range(N_ENTITIES) if each != entity]
    case = world.case(entity)
    # Of three images of each entity two are kept; the third is asked by the check.
    images = tuple(world.picture(other) for _ in range(8) for other in others for _ in range(3))
    references = References(images)
    asked = case.question
    inputs = model.prepare(asked.question, asked.image, spans=asked.spans())
    edit = multedit(model, inputs, case.target, references=references)
    check = edit.check().to_dataframe()
    about_others = check[check["image"] != ""]
    assert len(about_others) == 8 * len(others)
    assert first_words(about_others["before"]) == first_words(about_others["after"])
    assert check["states_target"][0]
    found = evaluate(model, [edit], [case]).to_dataframe()
    about = found["group"].isin(["efficacy", "paraphrases", "other images"])
    assert (found["probability"][about] >= 0.9).all()
    # With more than one half an answer is the one that is given, as it was before.
    assert (found["probability"][~about] > 0.5).all()
