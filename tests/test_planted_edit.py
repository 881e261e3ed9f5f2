"""Edits of a model whose facts are known to be in one layer's MLP, at one word."""

import torch
from planted_cases import Case, one_hop_case
from planted_models import ASKS, FIRST_ANSWER, N_ANSWERS, N_ENTITIES

from mmlens import EditRequest, multedit

LOOKS, KNOWS, TELLS, N_LAYERS = 1, 2, 3, 5


@torch.no_grad()
def planted_case(seed: int) -> Case:
    """The last word looks at the one that asks, whatever small thing is added to that.

    What it looks for there has length 1, and what Adam adds by chance in that direction may be of
    this size; then it would look away, for good. So it gets length 9.
    """
    case = one_hop_case(seed, layers=[LOOKS, KNOWS, TELLS], n_layers=N_LAYERS)
    model = case.planted.model
    tells, block = case.planted.steps["tells"], model.blocks[TELLS]
    group = tells.head // (model.cfg.n_heads // model.cfg.n_kv_heads)
    looked_for = block.attn.W_K[group][:, model.cfg.rotary_dim] * block.ln1.w
    model.embed.W_E[ASKS] += 8 * looked_for / looked_for.norm()
    return case


def probabilities(case: Case) -> torch.Tensor:
    """[entity, token]: what the model says of each entity's picture."""
    pictures = [case.with_picture(entity, 7) for entity in range(N_ENTITIES)]
    return torch.stack([case.planted.model(inputs)[0, -1].softmax(-1) for inputs in pictures])


def new_answer(case: Case) -> int:
    """One that is no entity's."""
    facts = {case.planted.facts[entity, 0] for entity in range(N_ENTITIES)}
    return next(a for a in range(FIRST_ANSWER, FIRST_ANSWER + N_ANSWERS) if a not in facts)


def test_the_fact_is_edited_where_it_is(seed: int) -> None:
    """There it changes and no other does; in other layers it does not change."""
    case = planted_case(seed)
    target = new_answer(case)
    others = [entity for entity in range(N_ENTITIES) if entity != case.entity]
    right = [case.planted.facts[entity, 0] for entity in others]
    before = probabilities(case)
    assert before[others, right].min() >= 0.99 and before[case.entity, target] <= 0.01
    for layer in range(N_LAYERS):
        request = EditRequest(case.inputs, target, span="asks")
        edit = multedit(case.planted.model, request, layer=layer, lr=0.1, steps=40, clamp=4.0)
        with edit.applied(case.planted.model):
            after = probabilities(case)
        if layer == KNOWS:
            assert after[case.entity, target] >= 0.9
            assert after[others, right].min() >= 0.9
        else:
            assert after[case.entity, target] <= 0.5
