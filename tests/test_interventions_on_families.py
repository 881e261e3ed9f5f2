"""Hook functions, scans, paths and the lens against torch's hooks on transformers' own models.

Of four families: one whose images are tiles, one with rotary positions of rows and columns, and two
that do not attend causally. In float64, but for norms, rotary angles and eager attention's softmax,
which transformers takes in float32: logits are held to what they are held to in float32.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from made_families import MADE, Made
from test_path_patch import compare_with_hf
from textbook_patching import PlainHooks
from torch import Tensor

from mmlens import (
    Intervention,
    ablation_scan,
    attention_knockout,
    attention_sinks,
    hook_name,
    logit_lens,
)
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

LOGITS = 1e-4
FAMILIES = ("LLaVA-NeXT", "Qwen2.5-VL", "Gemma 3", "PaliGemma")
EVERY = pytest.mark.parametrize("family", FAMILIES)

PLACES = {
    "resid_post": ("", False),
    "z": ("self_attn.o_proj", True),
    "post": ("mlp.down_proj", True),
    "q": ("self_attn.q_proj", False),
    "v": ("self_attn.v_proj", False),
}
"""Of sites: the module of transformers' block, and whether it is its input (heads side by side)."""


class Case:
    """One prompt with an image, the same with two words exchanged, and hooks on transformers."""

    def __init__(self, family: str, seed: int, folder: Path) -> None:
        made: Made = MADE[family](seed, folder, images=[1])
        self.hf, self.model = made.hf, made.model
        tokens = made.batch["input_ids"]
        self.inputs = made.inputs()
        ids = tokens[0].tolist()
        words = [at for at in self.inputs.span("text").tolist()[1:] if ids[at] >= 2]
        first, second = next(
            (a, b) for b in words[::-1] for a in words if a < b and ids[a] != ids[b]
        )
        self.words = [first, second]
        changed = tokens.clone()
        changed[0, [first, second]] = tokens[0, [second, first]]
        self.batches = [made.batch, {**made.batch, "input_ids": changed}]
        self.other = made.inputs(self.batches[1])
        self.hooks = PlainHooks(made.hf, "model.language_model", made.model.cfg.d_head)
        self.chance = random.Random(seed)

    def layer(self, least: int = 0) -> int:
        return self.chance.randrange(least, self.model.cfg.n_layers)

    def theirs(self, edits: Any) -> Tensor:
        """Transformers' logits [pos, d_vocab] of the prompt."""
        return self.hooks.run(self.batches[0], edits)[0]

    def kept(self, run: int, site: str, layer: int) -> Tensor:
        """An activation of transformers in one of the two prompts: [1, pos, width]."""
        place = (layer, *PLACES[site])
        return self.hooks.kept(self.batches[run], [place])[place]

    def cut(self, layers: list[int], queries: Any, keys: Any, heads: Any = None) -> Tensor:
        """Transformers' logits with attention cut in its mask."""
        n_heads = self.model.cfg.n_heads
        chosen = range(n_heads) if heads is None else heads

        def edit(module: Any, args: Any, kwargs: Any) -> Any:
            mask = kwargs["attention_mask"].expand(-1, n_heads, -1, -1).clone()
            for head in chosen:
                mask[0, head, torch.tensor(queries)[:, None], torch.tensor(keys)] = torch.finfo(
                    mask.dtype
                ).min
            return args, {**kwargs, "attention_mask": mask}

        self.hf.set_attn_implementation("eager")
        with ExitStack() as stack:
            for layer in layers:
                attention = self.hooks.module(layer, "self_attn")
                handle = attention.register_forward_pre_hook(edit, with_kwargs=True)
                stack.callback(handle.remove)
            found = self.theirs([])
        self.hf.set_attn_implementation("sdpa")
        return found


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
        place = (layer, *PLACES[site])
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
            case.theirs([moved, (layer, *PLACES["z"], lambda x: frozen)]),
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


def probability(logits: Tensor, token: int) -> float:
    return float(logits[-1].softmax(-1)[token])


@EVERY
@torch.no_grad()
def test_scans_knockout_sinks_and_the_lens(case: Case) -> None:
    """P changes by at most twice what logits may be off."""
    model, inputs, cfg = case.model, case.inputs, case.model.cfg
    token, last, layer = case.chance.randrange(5, 40), inputs.n_pos - 1, case.layer()
    image = inputs.span("image").tolist()
    scan = ablation_scan(model, inputs, positions="last", layers=[layer], answer=token)
    own = ablation_scan(
        model, inputs, "heads", knockout(image), site="attn_scores", positions="last",
        layers=[layer], answer=token,
    )  # fmt: skip
    for head in range(cfg.n_heads):
        units = slice(head * cfg.d_head, (head + 1) * cfg.d_head)

        def ablate(x: Tensor, units: Any = units) -> Tensor:
            x = x.clone()
            x[:, last, units] = 0.0
            return x

        expected = probability(case.theirs([(layer, *PLACES["z"], ablate)]), token)
        assert float(scan.values[0, head]) == pytest.approx(expected, abs=2 * LOGITS)
        expected = probability(case.cut([layer], [last], image, [head]), token)
        assert float(own.values[0, head]) == pytest.approx(expected, abs=2 * LOGITS)
    regions = {"one": image[:1], "all": image}
    erased = ablation_scan(model, inputs, "regions", regions=regions, answer=token)
    for positions, value in zip(regions.values(), erased.values.tolist(), strict=True):

        def erase(x: Tensor, positions: Any = positions) -> Tensor:
            return x.index_fill(1, torch.tensor(positions), 0.0)

        expected = probability(case.theirs([(0, "", True, erase)]), token)
        assert value == pytest.approx(expected, abs=2 * LOGITS)
    cut = attention_knockout(
        model, inputs, "image", "last", layers=[layer], window=3, answer=token, metric="loss"
    )
    window = [each for each in (layer - 1, layer, layer + 1) if 0 <= each < cfg.n_layers]
    loss = -case.cut(window, [last], image)[-1].log_softmax(-1)[token]
    assert float(cut.values[0]) == pytest.approx(float(loss), abs=2 * LOGITS)

    case.hf.set_attn_implementation("eager")
    run = case.hf(**case.batches[0], output_attentions=True)
    case.hf.set_attn_implementation("sdpa")
    sinks = attention_sinks(model, inputs, answer=token, draws=1)
    for each in range(cfg.n_layers):
        pattern = run.attentions[each][0].mean(dim=0)  # [query, key]
        there = (pattern > 0).fill_diagonal_(False)
        received = (pattern * there).sum(dim=0) / there.sum(dim=0)
        torch.testing.assert_close(
            sinks.received[each].double(), received.double(), rtol=0, atol=LOGITS, equal_nan=True
        )
        norms = case.kept(0, "v", each)[0].unflatten(-1, (cfg.n_kv_heads, -1)).norm(dim=-1)
        torch.testing.assert_close(sinks.value_norms[each], norms.mean(-1), rtol=0, atol=LOGITS)
    lens = logit_lens(model, inputs, positions="image", tokens=[token], layers=[layer])
    decoder: Any = case.hf.get_submodule("model.language_model")
    read = case.hf.lm_head(decoder.norm(case.kept(0, "resid_post", layer)))[0, image]
    expected = read.log_softmax(-1)[:, token]
    torch.testing.assert_close(
        lens.log_probs[0, :, 0].double(), expected.double(), rtol=0, atol=2 * LOGITS
    )


@pytest.mark.parametrize("family", FAMILIES[1:])
def test_paths(case: Case) -> None:
    compare_with_hf(case.model, case.hooks, case.inputs, case.other, case.batches)
