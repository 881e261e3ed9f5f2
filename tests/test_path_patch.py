"""Path patching equals the textbook procedure by plain hooks, and finds the planted paths alone."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from anyres_checkpoints import random_image, written
from hypothesis import given, settings
from hypothesis import strategies as st
from planted_cases import one_hop_case
from planted_models import PARIS
from random_models import (
    N_SPECIAL,
    SHAPES,
    hooked,
    random_language_model,
    random_llava,
    random_prompts,
)
from small_models import any_family, small_inputs
from textbook_patching import PlainHooks, path_logits
from torch import Tensor

from mmlens import Intervention, PathPatch, path_patch
from mmlens.analyses.path_patch import filled
from mmlens.interventions.functions import restore

TOLERANCE = 1e-5


def pair(seed: int, **choices: Any) -> tuple[Any, Any, Any]:
    """A model in float64, and a prompt with another word in it."""
    model = any_family(seed, n_layers=4, **choices).double()
    clean = small_inputs(model, seed)
    pixels = clean.pixel_values.double()
    words = (~clean.is_image[0]).nonzero().flatten()[1:]
    at = int(random.Random(seed).choice(words.tolist()))
    tokens = clean.tokens.clone()
    tokens[0, at] = 2 + (tokens[0, at] + 7) % 57
    return model, *(model.inputs_from_tokens(each, pixels) for each in (clean.tokens, tokens))


def last_probability(logits: Tensor, token: int) -> float:
    return float(logits[0, -1].softmax(-1)[token])


KINDS = {"z": "attn_out", "mlp_out": "mlp_out", "v": "attn_out", "attn_out": "attn_out"}


@settings(max_examples=12)
@given(st.integers(0, 2**31))
def test_the_textbook_procedure(seed: int) -> None:
    chance = random.Random(seed)
    torch.manual_seed(seed)
    model, clean, corrupted = pair(seed)
    n_layers, token = model.cfg.n_layers, chance.randrange(2, 57)
    heads, groups = model.cfg.n_heads, model.cfg.n_kv_heads
    senders: list[Any] = [
        (f"z[{chance.randrange(heads)}]", chance.randrange(n_layers)),
        ("mlp_out", chance.randrange(n_layers)),
        (f"v[{chance.randrange(groups)}]", chance.randrange(n_layers)),
        ("attn_out", 0),
    ]
    layer = chance.randrange(1, n_layers)
    possible: list[Any] = [
        [(f"q[{chance.randrange(heads)}]", layer)],
        [(f"k[{chance.randrange(groups)}]", layer), ("v", layer)],
        [("mlp_in", layer), (f"q[{heads - 1}]", chance.randrange(1, n_layers))],
        ["logits"],
        ["logits", (f"q[{chance.randrange(heads)}]", layer)],
        [("q[0]", layer), (f"q[{heads - 1}]", layer)] if heads > 1 else ["logits"],
    ]
    freeze = chance.choice([("attn_out", "mlp_out"), ("attn_out",), (), ("pattern", "mlp_out")])
    for receivers in chance.sample(possible, 2):
        found = path_patch(model, clean, corrupted, senders, receivers, freeze=freeze, answer=token)
        last = max([n_layers - 1 if each == "logits" else each[1] for each in receivers])
        for (site, at), value in zip(senders, found.values.tolist(), strict=True):
            own = KINDS[site.partition("[")[0]]

            def frozen(name: str, i: int, at: int = at, own: str = own, last: int = last) -> bool:
                part = "attn_out" if name == "pattern" else name
                return name in freeze and i <= last and (i > at or (i == at and part != own))

            logits = path_logits(model, clean, corrupted, (site, at), receivers, frozen)
            assert value == pytest.approx(last_probability(logits, token), abs=1e-8)
        plain = last_probability(model(clean), token)
        assert found.baseline == pytest.approx(plain, abs=1e-8)
        assert found.corrupted == pytest.approx(last_probability(model(corrupted), token), abs=1e-8)


def compare_with_hf(
    model: Any, hf: PlainHooks, clean: Any, corrupted: Any, batches: list[dict[str, Any]]
) -> None:
    """Every head of some layers, into queries, into keys, and straight to the logits."""
    n_layers, heads = model.cfg.n_layers, model.cfg.n_heads
    token = int(model(clean)[0, -1].argmax())
    last, group = n_layers - 1, random.randrange(model.cfg.n_kv_heads)
    senders = [(i, random.randrange(heads)) for i in range(n_layers - 1)]

    def both(logits: Tensor) -> Tensor:
        first = logits[:, 0]
        return torch.stack([first.softmax(-1)[:, token], first[:, token]], dim=-1)

    places = [(f"z[{head}]", layer) for layer, head in senders]
    queries = [("q", last, head) for head in range(heads)]
    for receivers in (queries, [("k", last, group)], []):
        given: Any = [(f"{which}[{head}]", layer) for which, layer, head in receivers] or "logits"
        found = path_patch(model, clean, corrupted, places, given, metric=both)
        for sender, value in zip(senders, found.values, strict=True):
            logits = hf.path_logits(*batches, sender, receivers)
            assert float(value[0]) == pytest.approx(last_probability(logits, token), abs=TOLERANCE)
            assert float(value[1]) == pytest.approx(float(logits[0, -1, token]), abs=1e-4)
    assert found.effect[:, 1].abs().max() > 1e-3  # or nothing is compared


def other_words(tokens: Tensor, words: list[int], seed: int) -> Tensor:
    """Other tokens at the last of these positions, and at one before."""
    changed = tokens.clone()
    for at in (words[-1], random.Random(seed).choice(words[:-1])):
        changed[0, at] = N_SPECIAL + (int(tokens[0, at]) + 9) % 60
    return changed


@pytest.mark.parametrize("shape", ["grouped queries", "qwen3", "gemma3", "gemma2"])
def test_equal_to_plain_hooks_on_transformers(shape: str, seed: int, tmp_path: Path) -> None:
    """LLaVA with an image; and decoders alone that normalise queries, or what heads add."""
    if shape == "grouped queries":
        made, decoder = random_llava(SHAPES[shape]), "model.language_model"
        row = random_prompts(made.config, [1], words=[7], text_last=True)
        tokens, visual = row.tokens, {"pixel_values": row.pixel_values}
        words = (tokens[0] >= N_SPECIAL).nonzero().flatten().tolist()
    else:
        made, decoder, visual = random_language_model(SHAPES[shape]), "model", {}
        tokens, words = torch.randint(N_SPECIAL, 60, (1, 9)), list(range(1, 9))
    model = hooked(made, tmp_path)
    both = [tokens, other_words(tokens, words, seed)]
    batches = [{"input_ids": each, **visual} for each in both]
    clean, corrupted = (model.inputs_from_tokens(each, visual.get("pixel_values")) for each in both)
    compare_with_hf(model, PlainHooks(made, decoder, model.cfg.d_head), clean, corrupted, batches)


def test_an_image_in_tiles(seed: int, tmp_path: Path) -> None:
    files = written("NeXT", tmp_path)
    text = "what is the capital of <image> this country ?"
    batch = dict(files.batch([text], [[random_image(31, 52)]]))
    del batch["attention_mask"]
    tokens = batch.pop("input_ids")
    words = (tokens[0] != files.model.cfg.image_token_id).nonzero().flatten().tolist()
    changed = tokens.clone()
    changed[0, words[-1]], changed[0, words[2]] = tokens[0, words[2]], tokens[0, words[-1]]
    both = (tokens, changed)
    clean, corrupted = (files.model.inputs_from_tokens(each, **batch) for each in both)
    hf = PlainHooks(files.hf, "model.language_model", files.model.cfg.d_head)
    batches = [{"input_ids": each, **batch} for each in both]
    compare_with_hf(files.model, hf, clean, corrupted, batches)


def test_planted_paths_and_no_others(seed: int) -> None:
    """The head that looks reaches the one that tells through the MLP that knows, and only so."""
    case = one_hop_case(seed)
    planted, model, corrupted = case.planted, case.planted.model, case.swapped(constraint=PARIS)
    steps = [planted.steps[name] for name in ("looks", "knows", "tells")]
    looks, knows, tells = steps
    n_layers, heads = model.cfg.n_layers, model.cfg.n_heads
    senders: list[Any] = [(f"z[{h}]", i) for i in range(n_layers) for h in range(heads)]
    senders += [("mlp_out", i) for i in range(n_layers)]

    def of(step: Any) -> int:
        return senders.index(
            ("mlp_out", step.layer) if step.head is None else (f"z[{step.head}]", step.layer)
        )

    values = range(model.cfg.n_kv_heads)
    expected = {
        "knows": ([("mlp_in", knows.layer)], [of(looks)]),
        "tells": ([(f"v[{group}]", tells.layer) for group in values], [of(knows)]),
        "logits": ("logits", [of(tells)]),
        "looks": ([(f"q[{h}]", looks.layer) for h in range(heads)], []),
    }
    for receivers, found in expected.values():
        paths = path_patch(model, case.inputs, corrupted, senders, receivers, answer=case.answer)
        assert paths.baseline >= planted.least
        for index, value in enumerate(paths.values.tolist()):
            if index in found:
                assert value <= planted.most
            else:
                assert value >= planted.least


def test_what_the_stream_carries_on_counts_once(seed: int) -> None:
    """Receivers on the residual stream, in several words for the same paths."""
    model, clean, corrupted = pair(seed)
    sender = [("attn_out", 0)]
    if model.cfg.parallel_attn_mlp:
        middle: list[Any] = []
    else:
        middle = [("resid_mid", 2)]  # what reaches it here came through the stream before
    n_pos, some = clean.n_pos, [clean.n_pos - 1, clean.n_pos - 2]
    d_model = model.cfg.d_model

    def values(receivers: Any, freeze: Any = ("attn_out", "mlp_out")) -> list[float]:
        found = path_patch(
            model, clean, corrupted, sender, receivers, answer=5, metric=both, freeze=freeze
        )
        return found.values[0].tolist()

    def both(logits: Tensor) -> Tensor:
        return logits[:, -1, [5, 7]]

    for same in (
        ["logits", ["logits"] * 2, ["logits", ("resid_post", 3)]],
        [
            [("resid_post", 1)],
            [("resid_pre", 2)],
            [("resid_post", 1), ("resid_pre", 2), *middle, "logits"],
            [("resid_post", 1), ("resid_post", 1, some)],
            [("resid_post", 1, some), ("resid_post", 1, range(n_pos - 1)), ("resid_pre", 3)],
            [(f"resid_post[0-{d_model - 2}]", 1), (f"resid_pre[1-{d_model - 1}]", 2)],
        ],
        [[("v", 1), ("resid_post", 1, some)], [("v", 1), ("resid_pre", 2, some)]],
    ):
        first = values(same[0])
        for other in same[1:]:
            assert values(other) == pytest.approx(first, abs=1e-9)
    # With all free between: the later place gets more than the stream has brought it.
    last, early = (model.SITES.hook_name("resid_post", layer) for layer in (3, 1))
    _, kept = model.run_with_cache(clean)
    sent = model.SITES.hook_name(*sender[0])
    _, other = model.run_with_cache(corrupted, names_filter=[sent])
    _, moved = model.run_with_cache(
        clean, interventions=[Intervention(*sender[0], None, restore(other))]
    )
    changes = {name: moved[name] - kept[name] for name in (early, last)}
    added = {early: changes[early], last: changes[last] - changes[early]}
    hooks = [(name, lambda x, hook: x + added[hook.name]) for name in added]
    logits = model.run_with_hooks(clean, fwd_hooks=hooks)
    assert values([("resid_post", 1), "logits"], freeze=()) == pytest.approx(
        both(logits)[0].tolist(), abs=1e-9
    )


def test_the_result(seed: int, tmp_path: Path) -> None:
    model, clean, corrupted = pair(seed)
    senders = [(f"z[{head}]", layer) for layer in (0, 2) for head in range(model.cfg.n_heads)]
    last = clean.span("last")
    seen: list[tuple[int, int]] = []
    paths = path_patch(
        model, clean, corrupted, senders, [("q", 3, last)], answer=5,
        progress=lambda *done: seen.append(done),
    )  # fmt: skip
    assert seen[-1] == (2 * len(senders), 2 * len(senders))
    assert paths.coordinates[0][0] == "z[0] 0"
    assert paths.receivers == (f"q 3 at {clean.n_pos - 1}",)
    grid = paths.by_head()
    assert grid.shape == (3, model.cfg.n_heads)
    assert bool(grid[1].isnan().all())
    assert torch.equal(grid[[0, 2]].flatten(), paths.effect.to(grid))
    saved = PathPatch.load(paths.save(tmp_path / "paths.safetensors"))
    assert torch.equal(saved.values, paths.values)
    assert saved.receivers == paths.receivers
    assert list(paths.to_dataframe().columns) == ["sender", "value", "effect"]


def test_a_head_at_two_positions_has_no_cell_of_its_own(seed: int) -> None:
    model, clean, corrupted = pair(seed)
    n = clean.n_pos
    senders = [("z[0]", 2, [n - 1]), ("z[0]", 1, [n - 1]), ("z[0]", 2, [n - 2])]
    paths = path_patch(model, clean, corrupted, senders, answer=5)
    with pytest.raises(ValueError, match=rf"head 0 of layer 2 .* 'z\[0\] 2 at {n - 2}'"):
        paths.by_head()
    grid = path_patch(model, clean, corrupted, senders[:2], answer=5).by_head()
    assert torch.allclose(grid[1:, 0], paths.effect[[1, 0]].to(grid), atol=1e-5)


def test_what_cannot_be_patched(seed: int) -> None:
    model, clean, corrupted = pair(seed)
    sender = [("z[0]", 0)]
    for arguments, says in [
        (([], "logits"), "no senders"),
        ((sender, []), "no receivers"),
        ((sender, [("attn_out", 2)]), "'attn_out' cannot receive; receivers are 'logits' and q"),
        ((sender, [("input_embed", None)]), "cannot receive"),
        (([("vision.z", 0, [0])], "logits"), "is not of the decoder"),
        (([("z[0]", 0, [clean.n_pos])], "logits"), "are not among 0"),
        (([("zz", 0)], "logits"), "unknown site"),
    ]:
        with pytest.raises(ValueError, match=says):
            path_patch(model, clean, corrupted, *arguments)
    # Tests check the signature of path_patch before it is said.
    with pytest.raises(ValueError, match="is no place"):
        filled(("z[0]",), range(3), clean.n_pos)
    with pytest.raises(ValueError, match="are the same"):
        path_patch(model, clean, clean, sender)
    with pytest.raises(ValueError, match="freeze='embed'"):
        path_patch(model, clean, corrupted, sender, freeze=("embed",))
