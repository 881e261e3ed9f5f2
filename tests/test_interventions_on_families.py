"""Hook functions against torch's hooks on transformers' own models, of four families."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from family_cases import EVERY, LOGITS, Case
from torch import Tensor

from mmlens import Intervention, hook_name
from mmlens.interventions.functions import (
    add,
    clamp_along,
    freeze,
    knockout,
    mean,
    noise,
    project_out,
    replace,
    resample,
    restore,
    scale,
    transplant,
    zero,
)


@pytest.fixture
def case(family: str, seed: int, tmp_path: Path) -> Case:
    return Case(family, seed, tmp_path)


def functions(case: Case, site: str, layer: int, at: list[int]) -> dict[str, Any]:
    """Hook functions, and what each makes of an activation of transformers at some positions."""
    model, d_model = case.model, case.model.cfg.d_model
    own, others = case.kept(0, site, layer), case.kept(1, site, layer)
    recordings = [model.record(each, [(site, layer)]) for each in (case.inputs, case.other)]
    elsewhere = case.chance.randrange(own.shape[1])
    amount = case.chance.choice([-1, 1]) * case.chance.uniform(1, 2)
    found: dict[str, tuple[Any, Callable[[Tensor], Tensor]]] = {
        "restore": (restore(recordings[1].cache), lambda x: others[:, at]),
        "replace": (replace(amount), lambda x: torch.full_like(x, amount)),
        "add": (add(amount), lambda x: x + amount),
        # The final norm takes a positive factor back.
        "scale": (scale(-abs(amount)), lambda x: x * -abs(amount)),
        "zero": (zero(), torch.zeros_like),
        "mean": (
            mean(recordings),
            lambda x: torch.cat([own, others], 1).mean(1, keepdim=True).expand_as(x),
        ),
        "resample": (resample(recordings[1]), lambda x: others[:, at]),
        "resample elsewhere": (
            resample(recordings[1], among=[elsewhere]),
            lambda x: others[:, [elsewhere]].expand_as(x),
        ),
        "transplant": (
            transplant(recordings[1], site, layer, elsewhere),
            lambda x: others[:, [elsewhere]].expand_as(x),
        ),
    }
    if site == "resid_post":
        direction = torch.randn(d_model, dtype=torch.double)
        unit = direction / direction.norm()
        found |= {
            "project_out": (project_out(direction), lambda x: x - (x @ unit)[..., None] * unit),
            "clamp_along": (
                clamp_along(direction, amount),
                lambda x: x - (x @ unit)[..., None] * unit + amount * unit,
            ),
        }
    return found


@EVERY
@torch.no_grad()
def test_functions_at_a_site(case: Case) -> None:
    """In the stream, and at a site inside of a block: logits at every position."""
    plain = case.theirs([])
    n_pos, image = case.inputs.n_pos, case.inputs.span("image").tolist()
    for site in ("resid_post", case.chance.choice(["z", "post", "q", "v"])):
        layer = case.layer()
        at = sorted({case.chance.choice(image), *case.chance.sample(range(n_pos), 2)} | {n_pos - 1})
        place = case.place(site, layer)
        for name, (function, formula) in functions(case, site, layer, at).items():

            def edit(x: Tensor, formula: Any = formula, at: Any = at) -> Tensor:
                return x.index_copy(1, torch.tensor(at), formula(x[:, at]))

            expected = case.theirs([(*place, edit)])
            branch = [Intervention(site, layer, at, function)]
            ours = case.model.run_with_hooks(case.inputs, interventions=branch)[0]
            assert float((ours - expected).abs().max()) <= LOGITS, (site, name)
            recording = case.model.record(case.inputs)
            [branched] = recording.run([branch], lambda logits: logits[:, 0])
            assert float((branched[0] - expected[-1]).abs().max()) <= LOGITS, (site, name)
            if site == "resid_post":
                assert float((expected - plain).abs().max()) > 10 * LOGITS, name


@EVERY
@torch.no_grad()
def test_functions_of_several_places(case: Case) -> None:
    """Noise, a frozen component after a change, a state in another layer, attention that is cut."""
    model, n_pos, layer = case.model, case.inputs.n_pos, case.layer(1)
    at = torch.tensor(sorted(case.chance.sample(range(1, n_pos - 1), 2)))
    last = n_pos - 1

    def ours(*branch: Intervention) -> Tensor:
        [found] = model.record(case.inputs).run(
            [list(branch)], lambda logits: logits, positions=range(n_pos)
        )
        return found[0]

    # What noise adds is a draw of ours; that it is all that is added shows in transformers' run.
    noisy = Intervention("resid_post", 0, at, noise(0.8, seed=3))
    name = hook_name("resid_post", 0)
    drawn = [
        model.run_with_cache(case.inputs, names_filter=name, interventions=branch)[1][name]
        for branch in ([noisy], [])
    ]
    added = drawn[0] - drawn[1]
    assert float(added[:, at].std()) > 0.1
    stream = (0, "", False)
    moved = (*stream, lambda x: x + added)
    close = [(ours(noisy), case.theirs([moved]))]

    frozen = case.kept(0, "z", layer)
    recording = model.record(case.inputs, [("z", layer), ("resid_post", layer)])
    later = range(recording.first_affected(int(at.min())), n_pos)
    close.append(
        (
            ours(noisy, Intervention("z", layer, later, freeze(recording))),
            case.theirs([moved, (*case.place("z", layer), lambda x: frozen)]),
        )
    )

    state = case.kept(0, "resid_post", layer)[:, [last]]
    below = layer - 1
    looked = transplant(recording, "resid_post", layer, last)

    def look(x: Tensor) -> Tensor:
        return x.index_copy(1, at[:1], state)

    close.append(
        (
            ours(Intervention("resid_post", below, at[:1], looked)),
            case.theirs([(below, "", False, look)]),
        )
    )

    keys = case.chance.sample(range(1, n_pos - 1), 3)
    queries = [each for each in case.chance.sample(range(1, n_pos), 4) if each not in keys] + [last]
    queries = sorted(set(queries))
    cut = [Intervention("attn_scores", [0, layer], queries, knockout(keys))]
    close.append((ours(*cut), case.cut([0, layer], queries, keys)))
    for found, expected in close:
        assert float((found - expected).abs().max()) <= LOGITS
