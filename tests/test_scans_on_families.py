"""Scans, knockout and paths against torch's hooks on transformers' own models, of four families."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from family_cases import EVERY, FAMILIES, LOG_PROBS, LOGITS, Case, edited, probability
from test_path_patch import TOLERANCE, compare_with_hf
from torch import Tensor

from mmlens import ablation_scan, attention_knockout, path_patch
from mmlens.analyses.image_regions import random_regions
from mmlens.interventions.functions import knockout, scale
from mmlens.model.sites import split_site

PARTS = {"heads": ("z",), "layers": ("attn_out", "mlp_out"), "neurons": ("post",)}
SIZE = 11
"""Neurons of a group; the last one has fewer."""


@pytest.fixture
def case(family: str, seed: int, tmp_path: Path) -> Case:
    return Case(family, seed, tmp_path)


def units_of(case: Case, over: str, number: int) -> slice:
    """Which units of its sites a part of a scan is."""
    if over == "layers":
        return slice(None)
    width = case.model.cfg.d_head if over == "heads" else SIZE
    return slice(number * width, (number + 1) * width)


def ablated(
    case: Case,
    over: str,
    layer: int,
    number: int,
    at: list[int],
    put: Callable[[str, Tensor], Tensor],
    run: int = 0,
) -> Tensor:
    """Transformers' logits with the units of a part as `put(site, x)` has them at positions."""
    units = units_of(case, over, number)

    def edit(site: str) -> Any:
        def some(x: Tensor) -> Tensor:
            x = x.clone()
            x[..., units] = put(site, x)[..., units]
            return x

        return edited(at, some)

    edits = [(*case.place(site, layer), edit(site)) for site in PARTS[over]]
    return case.theirs(edits, case.batches[run])


@EVERY
@torch.no_grad()
@pytest.mark.parametrize("over", PARTS)
def test_scans_of_one_prompt(case: Case, over: Any) -> None:
    """Zeros, means and other prompts' activations, and a function; at the last position or all."""
    model, inputs, cfg = case.model, case.inputs, case.model.cfg
    token, layer = case.chance.randrange(5, 40), case.layer()
    n_parts = {"heads": cfg.n_heads, "layers": 1, "neurons": -(-cfg.d_mlp // SIZE)}[over]
    held = {
        site: [case.kept(run, site, layer) for run in (0, 1)] for site in PARTS[over]
    }  # [1, pos, width] of both prompts

    def mean(site: str, x: Tensor) -> Tensor:
        return torch.cat(held[site], 1).mean(1, keepdim=True).expand_as(x)

    everywhere = list(range(inputs.n_pos))
    at = case.chance.choice([[inputs.n_pos - 1], everywhere])
    puts: dict[Any, list[Callable[[str, Tensor], Tensor]]] = {
        "zero": [lambda site, x: torch.zeros_like(x)],
        "mean": [mean],
        # Which prompt is drawn is random, at each site by itself.
        "resample": [
            lambda site, x, runs=runs: held[site][runs[site]][:, at]
            for runs in (
                dict(zip(held, each, strict=True)) for each in product((0, 1), repeat=len(held))
            )
        ],
        scale(-1.5): [lambda site, x: -1.5 * x],
    }
    for by, possible in puts.items():
        scan = ablation_scan(
            model, inputs, over, by, positions=at, layers=[layer], answer=token,
            size=SIZE if over == "neurons" else None,
            references=[inputs, case.other] if by in ("mean", "resample") else None,
        )  # fmt: skip
        found = scan.values.flatten().tolist()
        assert len(found) == n_parts
        for number, value in enumerate(found):
            expected = [
                probability(ablated(case, over, layer, number, at, put), token) for put in possible
            ]
            assert min(abs(value - each) for each in expected) <= LOG_PROBS
        assert scan.baseline == pytest.approx(probability(case.theirs([]), token), abs=LOG_PROBS)


@EVERY
@torch.no_grad()
def test_a_scan_of_a_data_set_by_role(case: Case) -> None:
    """Effects in each prompt, their means, and the intervals of two prompts."""
    layer, token = case.layer(), case.chance.randrange(5, 40)
    last = case.inputs.n_pos - 1
    image = case.inputs.span("image").tolist()
    roles = {"image": image, "last": [last]}
    scan = ablation_scan(
        case.model, [case.inputs, case.other], "heads", positions=roles, layers=[layer],
        metric="loss", answer=token,
    )  # fmt: skip
    assert scan.axes == ("role", "layer", "head") and scan.effects is not None

    def loss(logits: Tensor) -> float:
        return -float(logits[-1].log_softmax(-1)[token])

    plain = [loss(case.theirs([], batch)) for batch in case.batches]
    for row, at in enumerate(roles.values()):
        for head in range(case.model.cfg.n_heads):
            effects = [
                loss(ablated(case, "heads", layer, head, at, lambda _, x: 0 * x, run)) - plain[run]
                for run in (0, 1)
            ]
            close = {"abs": 2 * LOG_PROBS}
            assert scan.effects[:, row, 0, head].tolist() == pytest.approx(effects, **close)
            mean = sum(effects) / 2
            assert float(scan.effect[row, 0, head]) == pytest.approx(mean, **close)
            # A quarter of the resamples has one prompt twice.
            assert scan.low is not None and scan.high is not None
            assert float(scan.low[row, 0, head]) == pytest.approx(min(effects), **close)
            assert float(scan.high[row, 0, head]) == pytest.approx(max(effects), **close)


@EVERY
@torch.no_grad()
def test_regions(case: Case) -> None:
    """Visual tokens as the first layer gets them, and as many others."""
    model, inputs, chance = case.model, case.inputs, case.chance
    image = inputs.span("image").tolist()
    token, seed = chance.randrange(5, 40), chance.randrange(1000)
    [embedded] = case.kept_of(case.batches[0], [("resid_pre", 0)])
    half = sorted(chance.sample(image, max(1, len(image) // 2)))
    regions = {"one": image[:1], "some": half}
    n_draws = 2 if len(image) > 1 else 0  # an image of one token has no others
    given = [torch.tensor(each) for each in regions.values()]
    controls = random_regions(inputs, given, n_draws, seed)
    puts: dict[Any, Callable[[Tensor], Tensor]] = {
        "zero": torch.zeros_like,
        "mean": lambda x: embedded[:, image].mean(1, keepdim=True).expand_as(x),
        scale(-1.5): lambda x: -1.5 * x,
    }
    plain = probability(case.theirs([]), token)
    for by, put in puts.items():
        scan = ablation_scan(
            model, inputs, "regions", by, regions=regions, answer=token, control=n_draws, seed=seed
        )
        found = scan.values.tolist()
        if scan.control is not None:
            found += (scan.control.flatten() + scan.baseline).tolist()
        sets = [*regions.values(), *(each.tolist() for each in controls)]
        for value, at in zip(found, sets, strict=True):
            expected = probability(case.theirs([(0, "", True, edited(at, put))]), token)
            assert value == pytest.approx(expected, abs=2 * LOG_PROBS)
        assert scan.baseline == pytest.approx(plain, abs=LOG_PROBS)
        for region, at in enumerate(regions.values()):
            for other in sets[2 + 2 * region :][:n_draws]:
                assert len(other) == len(at) and not set(other) & set(at)
                assert set(other) <= set(image)


@EVERY
@torch.no_grad()
def test_attention_that_is_cut(case: Case) -> None:
    """In each head alone, in a window of layers, in some heads, and in other heads by layer."""
    model, inputs, chance, cfg = case.model, case.inputs, case.chance, case.model.cfg
    token, last, layer = chance.randrange(5, 40), inputs.n_pos - 1, case.layer()
    image = inputs.span("image").tolist()
    one_by_one = ablation_scan(
        model, inputs, "heads", knockout(image), site="attn_scores", positions="last",
        layers=[layer], answer=token,
    )  # fmt: skip
    for head in range(cfg.n_heads):
        expected = probability(case.cut([layer], [last], image, [head]), token)
        assert float(one_by_one.values[0, head]) == pytest.approx(expected, abs=LOG_PROBS)
    window = [each for each in (layer - 1, layer, layer + 1) if 0 <= each < cfg.n_layers]
    some = sorted(chance.sample(range(cfg.n_heads), 2))
    by_layer = {window[0]: some[:1], window[-1]: some[1:]}
    queries = sorted({*chance.sample(case.words, 2), last})
    for destination in ([last], queries):
        for heads in (None, some, by_layer):
            found = attention_knockout(
                model, inputs, "image", destination, layers=[layer], window=3, heads=heads,
                answer=token, metric="loss",
            )  # fmt: skip
            log_probs = case.cut(window, destination, image, heads)[-1].log_softmax(-1)
            assert float(found.values[0]) == pytest.approx(-float(log_probs[token]), abs=LOG_PROBS)


def own_slice(case: Case, site: str) -> tuple[str, slice]:
    """A site without its head, and that head's numbers in transformers' activation."""
    name, units = split_site(site)
    if units is None:
        return name, slice(None)
    width = case.model.cfg.d_head
    return name, slice(units[0] * width, (units[-1] + 1) * width)


def path_logits(
    case: Case, sender: Sequence[Any], receivers: Sequence[Any], frozen: Sequence[str]
) -> Tensor:
    """Logits of the clean run with what receivers get of a sender: two whole runs of transformers.

    Args:
        sender: site, layer and positions.
        receivers: likewise; or "logits".
        frozen: of "attn_out" and "mlp_out".
    """
    n_layers, everywhere = case.model.cfg.n_layers, range(case.inputs.n_pos)
    site, layer, *rest = sender
    at = rest[0] if rest else everywhere
    name, units = own_slice(case, site)
    sent = case.place("resid_pre", 0) if layer is None else case.place(name, layer)
    end = case.place("resid_post", n_layers - 1)
    first = -1 if layer is None else layer
    fixed = [
        case.place(part, i)
        for part in frozen
        for i in range(n_layers)
        if i > first or (i == first and part == "mlp_out" and name != "mlp_out")
    ]
    clean, other = (
        case.hooks.kept(batch, places)
        for batch, places in zip(case.batches, ([*fixed, end], [sent]), strict=True)
    )

    def put(values: Tensor, units: slice, at: Any) -> Any:
        def some(x: Tensor) -> Tensor:
            x = x.clone()
            x[:, list(at), units] = values[:, list(at), units]
            return x

        return some

    edits: list[Any] = [(*sent, put(other[sent], units, at))]
    edits += [(*each, lambda x, each=each: clean[each]) for each in fixed]
    received: dict[Any, Tensor] = {}
    places = [each for each in receivers if each != "logits"]
    into = [case.place(own_slice(case, each[0])[0], each[1]) for each in places]
    for each in {*into, end}:
        edits.append((*each, lambda x, each=each: received.update({each: x.clone()})))
    direct = case.theirs(edits)
    if not places:
        return direct
    second: list[Any] = [
        (
            *there,
            put(received[there], own_slice(case, each[0])[1], (each[2:] and each[2]) or everywhere),
        )
        for each, there in zip(places, into, strict=True)
    ]
    if "logits" in receivers:
        second.append((*end, lambda x: x + received[end] - clean[end]))
    return case.theirs(second)


@EVERY
@torch.no_grad()
def test_paths_of_every_kind(case: Case) -> None:
    """From a head, an MLP and words, to values, keys, an MLP, positions and the logits."""
    cfg, chance, inputs = case.model.cfg, case.chance, case.inputs
    token, last = int(case.theirs([])[-1].argmax()), cfg.n_layers - 1
    head, group = chance.randrange(cfg.n_heads), chance.randrange(cfg.n_kv_heads)
    at = sorted({*chance.sample(case.words, 2), inputs.n_pos - 1})
    senders: list[Any] = [
        (f"z[{chance.randrange(cfg.n_heads)}]", 0),
        ("mlp_out", chance.randrange(last)),
        ("attn_out", 0, case.exchanged),
        ("input_embed", None, case.exchanged[:1]),
    ]
    every: list[list[Any]] = [
        [(f"v[{group}]", last)],
        [("mlp_in", last)],
        [("resid_pre", last, at)],
        [(f"q[{head}]", last, at), ("mlp_in", last - 1)],
        [(f"k[{group}]", last), (f"v[{group}]", last - 1)],
        ["logits", (f"q[{head}]", last)],
        ["logits"],
    ]

    def both(logits: Tensor) -> Tensor:
        first = logits[:, 0]
        return torch.stack([first.softmax(-1)[:, token], first[:, token]], dim=-1)

    largest = 0.0
    for receivers in chance.sample(every, 4):
        frozen = chance.choice([("attn_out", "mlp_out"), ("attn_out",), ()])
        found = path_patch(
            case.model, inputs, case.other, senders, receivers, metric=both, freeze=frozen
        )
        for sender, value in zip(senders, found.values, strict=True):
            logits = path_logits(case, sender, receivers, frozen)
            assert float(value[0]) == pytest.approx(probability(logits, token), abs=TOLERANCE)
            assert float(value[1]) == pytest.approx(float(logits[-1, token]), abs=LOGITS)
        largest = max(largest, float(found.effect[:, 1].abs().max()))
    assert largest > 10 * LOGITS


@pytest.mark.parametrize("family", FAMILIES[1:])
def test_paths_of_heads(case: Case) -> None:
    compare_with_hf(case.model, case.hooks, case.inputs, case.other, case.batches)
