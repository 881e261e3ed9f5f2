"""The analyses find a mechanism of two constraints, of the image and of the text, and nothing else.

As `test_planted_circuits.py`; see there for the bounds.
"""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from planted_cases import SITES, asked, check, check_cut, everywhere, two_hop_case
from planted_configs import FAMILIES
from planted_models import BERLIN, PARIS

from mmlens import attention_contribution, causal_trace

EVERY_FAMILY = pytest.mark.parametrize("family", FAMILIES)


@EVERY_FAMILY
@pytest.mark.parametrize("which", ["constraint", "relation", "both"])
def test_a_trace_of_two_hops(seed, which, family):
    case = two_hop_case(seed, family=family)
    model, steps = case.planted.model, list(case.planted.steps.values())
    relation = case.inputs.span("relation").tolist()
    joins = case.planted.steps["joins"].layer
    trails = {
        "constraint": asked(case),
        # The relation's word looks at the constraint itself, as long as it is back in time.
        "relation": replace(asked(case), origin=relation, steps=steps[3:]),
        # Neither the fact nor the relation is enough; both have met when the first has arrived.
        "both": replace(asked(case), origin=relation, since=joins, steps=steps[3:]),
    }
    swaps = {"constraint": PARIS, "relation": BERLIN}
    swapped = swaps if which == "both" else {which: swaps[which]}
    width = random.randint(1, 3)
    corrupted = case.swapped(**swapped)
    trace = causal_trace(model, case.inputs, corrupted, positions=everywhere(case), window=width)
    check(case, trace, trails[which].cells(SITES, everywhere(case), width))


@EVERY_FAMILY
def test_attention_of_two_hops(seed, family):
    case = two_hop_case(seed, family=family)
    planted, layer = case.planted, {name: s.layer for name, s in case.planted.steps.items()}
    for source, destination, layers in (
        ("image", "constraint", {layer["looks"]}),
        ("constraint", "relation", {layer["joins"]}),
        ("relation", "last", {layer["tells"]}),
        ("image", "relation", set()),
        ("constraint", "last", set()),
        ("image", "last", set()),
    ):
        check_cut(case, source, destination, layers, random.randint(1, 2))
    for source, name in (("asks", "joins"), ("relation", "tells")):
        step = planted.steps[name]
        found = attention_contribution(
            planted.model, case.inputs, source, step.role, per_head=True
        ).values[:, :, 0, 0]
        assert divmod(int(found.argmax()), found.shape[1]) == (step.layer, step.head)
