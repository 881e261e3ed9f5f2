"""`causal_trace`: naive equals Hugging Face by hand, branch equals naive, and what it reports."""

from __future__ import annotations

import copy
import json
import random
import sys
from dataclasses import replace

import pytest
import torch
from hf_interventions import hf_logits, hf_trace
from hypothesis import given, settings
from hypothesis import strategies as st
from random_models import (
    N_SPECIAL,
    VOCABULARY,
    Prompts,
    Shape,
    hooked,
    random_llava,
    random_prompts,
)
from small_models import (
    D_VOCAB,
    language_model,
    picture,
    sites_of,
    small_inputs,
    small_model,
    worded_model,
)

from mmlens import CausalTrace, causal_trace, collate, noise_span, swap_span
from mmlens.analyses.trace_grid import first_difference
from mmlens.interventions.functions import HookFunction

TOLERANCE = 1e-5
SITES = ("resid_post", "attn_out", "mlp_out")


# By hand, on Hugging Face's own model


def most_changed(logits, others):
    """The token whose probability differs most: an answer for which there is something to trace."""
    return int((logits.softmax(-1) - others.softmax(-1)).abs().argmax())


@pytest.mark.parametrize(("n_images", "width"), [(1, 1), (2, 3), (1, 4)])
@torch.no_grad()
def test_naive_and_branch_equal_a_trace_by_hand(seed, tmp_path, n_images, width):
    shape = Shape(n_layers=random.randint(2, 4), grid=2)
    hf = random_llava(shape)
    model = hooked(hf, tmp_path)
    clean = random_prompts(hf.config, [n_images], words=[7], text_last=True)
    words = (clean.tokens[0] >= N_SPECIAL).nonzero().flatten().tolist()
    # The last word among them: it moves the answer whatever the others do.
    swapped = sorted([random.choice(words[:-1]), words[-1]])
    tokens = clean.tokens.clone()
    tokens[0, swapped] = (tokens[0, swapped] - N_SPECIAL + 5) % (VOCABULARY - N_SPECIAL) + N_SPECIAL
    corrupted = Prompts(tokens, clean.attention_mask, clean.pixel_values)
    both = hf_logits(hf, clean), hf_logits(hf, corrupted)
    answer = most_changed(*both)
    last = tokens.shape[1] - 1
    groups = [[swapped[0]], swapped, [last], [random.randrange(last)], list(range(last + 1))]
    expected = hf_trace(hf, clean, corrupted, SITES, groups, width).softmax(-1)[..., answer]
    assert expected.std() > 100 * TOLERANCE
    for method in ("naive", "branch"):
        trace = causal_trace(
            model,
            clean.for_mmlens(model),
            corrupted.for_mmlens(model),
            positions=groups,
            window=width,
            answer=answer,
            method=method,
        )
        assert trace.answer_tokens == (answer,)
        plain = [float(each.softmax(-1)[answer]) for each in both]
        assert [trace.clean, trace.corrupted] == pytest.approx(plain, abs=TOLERANCE)
        assert (trace.restored - expected).abs().max() <= TOLERANCE


# Branch against naive


def pair(model, seed, images=(1,), n_words=6):
    """Clean and corrupted inputs from tokens: two words in the middle are others."""
    clean = small_inputs(model, seed, images=images, words=(n_words,))
    words = clean.span("text").tolist()
    tokens = clean.tokens.clone()
    for position in words[1:3]:
        tokens[0, position] = 2 + (int(tokens[0, position]) + 7) % 57
    return clean, replace(clean, tokens=tokens)


def traces(model, clean, corrupted, **options):
    """By both methods, and the largest difference of P(answer) between them."""
    naive = causal_trace(model, clean, corrupted, method="naive", **options)
    branch = causal_trace(model, clean, corrupted, **options)
    difference = max(
        (naive.restored - branch.restored).abs().max().item(),
        abs(naive.clean - branch.clean),
        abs(naive.corrupted - branch.corrupted),
    )
    if difference > TOLERANCE:  # then naive itself must be as far from float64
        exact = causal_trace(
            copy.deepcopy(model).double(), clean, corrupted, method="naive", **options
        )
        difference /= 10 * float((naive.restored - exact.restored).abs().max()) / TOLERANCE
    assert naive.restored.isfinite().all()
    return naive, branch, difference


@settings(max_examples=15)
@given(st.integers(0, 2**31))
def test_branch_equals_naive(seed):
    chance = random.Random(seed)
    model = small_model(seed)
    clean, corrupted = pair(model, seed, images=(chance.choice([0, 1, 2]),))
    last = clean.n_pos - 1
    kind = chance.choice(
        ["words", "picture", "noise"] if clean.pixel_values is not None else ["words"]
    )
    if kind == "picture":
        corrupted = clean.with_pixels(-clean.pixel_values)
    elif kind == "noise":
        corrupted = noise_span(model, clean, ["image", "text"], multiple=0.5, samples=3, seed=seed)
    sites = sites_of(model)
    groups = [[last], chance.sample(range(clean.n_pos), 3), chance.randrange(clean.n_pos)]
    _, _, difference = traces(
        model,
        clean,
        corrupted,
        sites=chance.sample(sites, 3),
        window=chance.choice([1, 3, 6]),
        positions=chance.choice([groups, None]),
        layers=chance.choice([None, [0, 1], range(1, 2)]),
        answer=chance.choice([None, chance.randrange(D_VOCAB)]),
        batch_rows=chance.choice([1, 3, 64]),
    )
    assert difference <= TOLERANCE


def test_the_tower(seed):
    model = small_model(seed)
    clean = small_inputs(model, seed, images=(2,))
    corrupted = clean.with_pixels(-clean.pixel_values)
    options = {"sites": ("vision.resid_pre", "vision.mlp_out"), "positions": [0, [1, 2], [0, 1, 2]]}
    naive, branch, difference = traces(model, clean, corrupted, **options)
    assert difference <= TOLERANCE
    assert naive.restored.shape == (2, 3, 2)
    assert branch.group_labels[0] == "<cls *>"
    assert branch.group_labels[1].startswith("<patch *:0")
    whole = range(model.cfg.vision.n_patches + 1)
    everything = causal_trace(
        model, clean, corrupted, sites=("vision.resid_pre",), positions=[whole], layers=[0]
    )
    assert everything.restored.item() == pytest.approx(everything.clean, abs=TOLERANCE)
    for wrong in ({"positions": None}, {"positions": [len(whole)]}):
        with pytest.raises(ValueError, match="position"):
            causal_trace(model, clean, corrupted, sites=("vision.z",), **wrong)
    with pytest.raises(ValueError, match="one at a time"):
        causal_trace(model, clean, corrupted, sites=("vision.z", "z"), positions=[0])


@pytest.mark.parametrize("answer", ["the larger country", "Zagreb"])
def test_an_answer_of_several_tokens(seed, answer):
    model = worded_model(seed)
    question = "The capital of this country is the city of"
    clean = model.prepare(question, picture(1), spans={"c": "this country"}, template=None)
    corrupted = swap_span(model, clean, "c", "flag")
    tokens = model.tokenizer(" " + answer, add_special_tokens=False)["input_ids"]
    assert len(tokens) > 1
    naive, branch, difference = traces(model, clean, corrupted, answer=answer, window=3)
    assert difference <= TOLERANCE
    assert branch.answer == answer
    assert branch.answer_tokens == tuple(tokens)
    assert branch.groups[-1] == (clean.n_pos - 1,)  # the answer's own positions are not traced
    full = clean.append(torch.tensor(tokens))
    log_probs = model(full)[0].log_softmax(-1)
    start = clean.n_pos - 1
    joint = sum(log_probs[start + i, token] for i, token in enumerate(tokens)).exp()
    assert branch.clean == pytest.approx(float(joint), rel=1e-3)
    # Probabilities this small say little in absolute terms: compare them relatively as well.
    assert torch.allclose(naive.restored, branch.restored, rtol=1e-3, atol=0)


# What restoring must give


@pytest.mark.parametrize("method", ["branch", "naive"])
def test_restoring_what_decides_everything_gives_clean(seed, method):
    model = small_model(seed)
    clean, corrupted = pair(model, seed)
    n_layers, last = model.cfg.n_layers, clean.n_pos - 1
    answer = most_changed(model(clean)[0, -1], model(corrupted)[0, -1])
    trace = causal_trace(
        model,
        clean,
        corrupted,
        positions=[last, range(clean.n_pos)],
        answer=answer,
        method=method,
    )
    gap = abs(trace.clean - trace.corrupted)
    assert gap > 10 * TOLERANCE
    resid = trace.sites.index("resid_post")
    assert trace.restored[resid, 0, n_layers - 1].item() == pytest.approx(trace.clean, abs=1e-6)
    for value in trace.restored[resid, 1].tolist():
        assert value == pytest.approx(trace.clean, abs=TOLERANCE)
    both = causal_trace(
        model,
        clean,
        corrupted,
        sites=("resid_pre",),
        layers=[0],
        window=2 * n_layers + 1,
        positions=[range(clean.n_pos)],
        answer=answer,
        method=method,
    )
    assert both.restored.item() == pytest.approx(trace.clean, abs=TOLERANCE)
    assert both.recovery.item() == pytest.approx(1.0, abs=TOLERANCE / gap)


def test_effect_and_recovery(seed):
    model = small_model(seed)
    trace = causal_trace(model, *pair(model, seed))
    assert torch.equal(trace.indirect_effect, trace.restored - trace.corrupted)
    assert torch.equal(trace.recovery, trace.indirect_effect / (trace.clean - trace.corrupted))


# What is traced


def test_positions_and_labels(seed):
    model = worded_model(seed)
    clean = model.prepare(
        "The capital of this country is", picture(0), spans={"c": "this country"}, template=None
    )
    corrupted = swap_span(model, clean, "c", "flag")
    first = int(clean.span("c")[0])
    trace = causal_trace(model, clean, corrupted, sites=("mlp_out",), layers=[1])
    assert trace.groups == tuple((position,) for position in range(first, clean.n_pos))
    assert trace.group_labels == tuple(clean.labels()[first:])
    assert trace.restored.shape == (1, clean.n_pos - first, 1)
    groups = [clean.span("c"), clean.span("last"), 2, clean.span("image"), [3, 1], range(9)]
    trace = causal_trace(model, clean, corrupted, sites=("z",), positions=groups)
    assert trace.groups[0] == tuple(clean.span("c").tolist())
    assert trace.groups[2:] == ((2,), tuple(clean.span("image").tolist()), (3, 1), tuple(range(9)))
    labels = clean.labels()
    assert trace.group_labels[0] == "".join(labels[p] for p in clean.span("c").tolist())
    assert trace.group_labels[1] == labels[-1]
    assert trace.group_labels[-1] == f"{labels[0]} ... {labels[8]} (9)"


@pytest.mark.parametrize("method", ["branch", "naive"])
def test_answers(seed, method):
    model = worded_model(seed)
    clean = model.prepare("The capital is", spans={"c": "capital"}, template=None)
    corrupted = swap_span(model, clean, "c", "flag")
    options = {"sites": ("mlp_out",), "layers": [0], "method": method}
    likely = int(model(clean)[0, -1].argmax())
    probabilities = model(clean)[0, -1].softmax(-1)
    trace = causal_trace(model, clean, corrupted, **options)
    assert trace.answer_tokens == (likely,)
    assert trace.answer == model.to_string([likely])
    assert trace.clean == pytest.approx(probabilities[likely].item(), abs=TOLERANCE)
    trace = causal_trace(model, clean, corrupted, answer=300, **options)
    assert (trace.answer_tokens, trace.answer) == ((300,), model.to_string([300]))
    assert trace.clean == pytest.approx(probabilities[300].item(), abs=TOLERANCE)
    flag = model.tokenizer(" the", add_special_tokens=False)["input_ids"]
    trace = causal_trace(model, clean, corrupted, answer="the", **options)
    assert trace.answer_tokens == tuple(flag)
    for wrong in (-1, model.cfg.d_vocab):
        with pytest.raises(ValueError, match="token ids are 0"):
            causal_trace(model, clean, corrupted, answer=wrong, **options)
    with pytest.raises(ValueError, match="empty"):
        causal_trace(model, clean, corrupted, answer=" ", **options)


def test_the_first_difference(seed):
    model = small_model(seed)
    clean, corrupted = pair(model, seed, images=(2,))
    words = clean.span("text").tolist()
    assert first_difference(clean, corrupted) == words[1]
    noisy = torch.zeros(4, clean.n_pos, model.cfg.d_model)
    noisy[2, 3, 0] = 1e-3
    assert first_difference(clean, replace(clean, noise=noisy)) == 3
    for image in (0, 1):
        pixels = clean.pixel_values.clone()
        pixels[image, 0, 0, 0] += 1
        other = clean.with_pixels(pixels)
        assert first_difference(clean, other) == int(clean.span(f"image_{image}")[0])


def test_noise_is_averaged_over_its_samples(seed):
    model = small_model(seed)
    clean = small_inputs(model, seed, spans={"c": [2, 3]}, images=(0,))
    noisy = noise_span(model, clean, "c", samples=3)
    options = {"answer": 5, "positions": [3], "sites": ("mlp_out",)}
    together = causal_trace(model, clean, noisy, **options)
    alone = [
        causal_trace(model, clean, replace(noisy, noise=noisy.noise[i : i + 1]), **options)
        for i in range(3)
    ]
    mean = torch.stack([trace.restored for trace in alone]).mean(0)
    assert torch.allclose(together.restored, mean, atol=TOLERANCE)
    expected = sum(trace.corrupted for trace in alone) / 3
    assert together.corrupted == pytest.approx(expected, abs=TOLERANCE)
    assert together.metadata["samples"] == 3


def test_metadata_and_progress(seed):
    model = small_model(seed)
    model.cfg.model_name = "small"
    clean, corrupted = pair(model, seed)
    for method in ("branch", "naive"):
        calls = []
        trace = causal_trace(
            model,
            clean,
            corrupted,
            method=method,
            batch_rows=5,
            progress=lambda done, total: calls.append((done, total)),  # noqa: B023
        )
        total = trace.restored.numel()
        assert calls[-1] == (total, total)
        assert [done for done, _ in calls] == sorted({done for done, _ in calls})
        assert trace.method == method
        assert trace.layers == tuple(range(model.cfg.n_layers))
        assert trace.metadata["model"] == "small"
        assert trace.metadata["str_tokens"] == clean.labels()
        json.dumps(trace.metadata)


def test_what_cannot_be_traced(seed):
    model = small_model(seed, n_layers=3)
    clean, corrupted = pair(model, seed)
    longer = small_inputs(model, seed, words=(7,))
    batch = collate([clean, clean], 0)
    noisy = noise_span(model, clean, "text")
    for first, second, says in (
        (clean, clean, "the same"),
        (clean, longer, "must have the same positions"),
        (batch, batch, "takes one prompt"),
        (noisy, corrupted, "clean inputs have noise"),
    ):
        with pytest.raises(ValueError, match=says):
            causal_trace(model, first, second)
    for options, says in (
        ({"sites": ()}, "sites must be several names"),
        ({"sites": "mlp_out"}, "sites must be several names"),
        ({"sites": ("mlp",)}, "unknown site 'mlp'"),
        ({"sites": ("projector.out",)}, "positions of its own"),
        ({"layers": [3]}, "not among 0 ... 2"),
        ({"layers": [-1]}, "not among 0 ... 2"),
        ({"layers": []}, "not among 0 ... 2"),
        ({"window": 0}, "at least 1"),
        ({"positions": []}, "no positions"),
        ({"positions": [clean.n_pos]}, "not among 0"),
        ({"positions": [-1]}, "not among 0"),
        ({"positions": [[]]}, "at least one"),
        ({"answer": "Paris"}, "no tokenizer"),
    ):
        with pytest.raises(ValueError, match=says):
            causal_trace(model, clean, corrupted, **options)
    alone = language_model(seed)
    inputs = small_inputs(alone, seed, images=(0,))
    with pytest.raises(ValueError, match="no vision tower"):
        causal_trace(alone, inputs, inputs, sites=("vision.mlp_out",), positions=[0])
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("method", ["branch", "naive"])
def test_no_hook_is_left_behind(seed, monkeypatch, method):
    model = small_model(seed)
    clean, corrupted = pair(model, seed)
    plain = model(clean)

    def failing(cache) -> HookFunction:
        def fail(activation, hook):
            raise RuntimeError("in the hook")

        return fail

    monkeypatch.setattr(sys.modules["mmlens.analyses.causal_trace"], "restore", failing)
    with pytest.raises(RuntimeError, match="in the hook"):
        causal_trace(model, clean, corrupted, method=method)
    assert not any(module._forward_hooks for module in model.modules())
    assert torch.equal(model(clean), plain)


def test_hooks_of_the_user_act_in_every_run(seed):
    model = small_model(seed)
    clean, corrupted = pair(model, seed)

    def turn(activation, hook):
        activation = activation.clone()
        # Counts positions from the beginning. (A norm would undo a mere change of size.)
        activation[:, clean.n_pos - 1] = activation[:, clean.n_pos - 1].flip(-1)
        return activation

    with model.hooks(fwd_hooks=[("blocks.1.hook_resid_pre", turn)]):
        _, branch, difference = traces(model, clean, corrupted, answer=5)
    assert difference <= TOLERANCE
    without = causal_trace(model, clean, corrupted, answer=5)
    assert (branch.restored / without.restored - 1).abs().max() > 1e-3


# Results


def test_saving_and_loading(seed, tmp_path):
    model = worded_model(seed)
    clean = model.prepare("The flag of this nation", picture(2), spans={"c": "nation"})
    corrupted = swap_span(model, clean, "c", "flag")
    trace = causal_trace(model, clean, corrupted, positions=[clean.span("c"), 2], window=3)
    path = tmp_path / "trace.safetensors"
    path.write_text("an older file")
    assert trace.save(path) == path
    assert [file.name for file in tmp_path.iterdir()] == [path.name]  # no scratch is left
    loaded = CausalTrace.load(path)
    assert torch.equal(loaded.restored, trace.restored)
    for name in vars(trace):
        if name != "restored":
            assert getattr(loaded, name) == getattr(trace, name), name
    assert CausalTrace.load(str(path)).recovery.equal(trace.recovery)


def test_loading_something_else(tmp_path):
    from safetensors.torch import save_file

    other = tmp_path / "other.safetensors"
    save_file({"restored": torch.zeros(1)}, other)
    text = tmp_path / "text.safetensors"
    text.write_text("nothing of the kind")
    for path in (other, text):
        with pytest.raises(ValueError, match="holds no CausalTrace"):
            CausalTrace.load(path)
    with pytest.raises(FileNotFoundError):
        CausalTrace.load(tmp_path / "none.safetensors")


def test_a_failed_save_leaves_the_older_file(seed, tmp_path, monkeypatch):
    model = small_model(seed)
    trace = causal_trace(model, *pair(model, seed), sites=("z",), layers=[0])
    path = trace.save(tmp_path / "trace.safetensors")
    before = path.read_bytes()
    monkeypatch.setattr("os.replace", lambda *args: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        replace(trace, clean=0.5).save(path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_dataframe(seed):
    model = small_model(seed)
    clean, corrupted = pair(model, seed)
    trace = causal_trace(model, clean, corrupted, positions=[1, [2, 4]], window=3)
    frame = trace.to_dataframe()
    assert list(frame.columns) == [
        *("site", "group", "label", "positions", "layer", "window"),
        *("restored", "indirect_effect", "recovery"),
    ]
    assert len(frame) == trace.restored.numel()
    for row in frame.itertuples():
        cell = trace.sites.index(row.site), row.group, trace.layers.index(row.layer)
        assert row.restored == pytest.approx(float(trace.restored[cell]))
        assert row.recovery == pytest.approx(float(trace.recovery[cell]))
        assert row.positions == list(trace.groups[row.group])
        assert row.label == trace.group_labels[row.group]
    assert set(frame.window) == {3}
