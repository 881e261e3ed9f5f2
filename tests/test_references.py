"""References: what they are around a request, their keys on disk, and the check of an edit."""

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_models import picture, worded_model

from mmlens import Edit, EditRequest, multedit
from mmlens.analyses.targets import given_answer
from mmlens.data import VisualQuestion
from mmlens.data.metrics import answer_alone
from mmlens.data.reference_pool import (
    DEMO_QUESTIONS,
    QUESTIONS,
    TEXTS,
    reference_flags,
    reference_photographs,
)
from mmlens.editing import EditCheck, LowRank, MultEditSettings, References
from mmlens.editing.edit_check import EDITED
from mmlens.editing.multedit import down_weight
from mmlens.editing.reference_keys import ReferenceKeys, keys_once, reference_keys
from mmlens.editing.references import KINDS, asked, question_of
from mmlens.interventions.intervention import hook_name
from mmlens.utils.grad_mode import without_gradients

TEMPLATE = "<image>\nQ: {question}\nA:"
QUESTION = "what is this one?"
BRIEF = {"steps": 2, "stop_at": 2.0}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No test reads what another one wrote."""
    monkeypatch.setenv("MMLENS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "reference-keys"


def a_request(model, seed: int, target: str = "an answer", **more) -> EditRequest:
    inputs = model.prepare(QUESTION, picture(seed), spans={"constraint": "this"}, template=TEMPLATE)
    return EditRequest(inputs, target, **more)


def some_references(seed: int, n: int = 6) -> References:
    images = tuple(picture(seed + 1 + i) for i in range(n))
    questions = ("how many?", "which colour?", "who?", "where is it?", "when?", "what for?")
    return References(images, questions, ("one and one is", "to be or", "the sky is"), "mine")


def test_two_of_three_are_kept_and_the_third_is_held_out(seed: int) -> None:
    whole = some_references(seed, n=random.randint(3, 8))
    kept, held_out = whole.kept, whole.held_out
    for name in ("images", "questions", "texts"):
        mine, theirs = getattr(kept, name), getattr(held_out, name)
        assert len(theirs) == len(getattr(whole, name)) // 3
        assert {map(id, mine)} != {map(id, theirs)} and not {*map(id, mine)} & {*map(id, theirs)}
        assert len(mine) + len(theirs) == len(getattr(whole, name))


def test_references_are_prompts_of_the_same_form(seed: int) -> None:
    """Each is what `model.prepare` makes of its question and image, with the same template."""
    model = worded_model(seed)
    request, references = a_request(model, seed), some_references(seed)
    found = references.around(model, request)
    assert {each.kind for each in found} == {*KINDS}
    images = {f"image {i}": image for i, image in enumerate(references.images)}
    for each in found:
        if each.kind == "text":
            expected = model.prepare(each.question, template=None)
        else:
            shown = images[each.image] if each.image else picture(seed)
            expected = model.prepare(each.question, shown, template=TEMPLATE)
            assert torch.equal(each.inputs.pixel_values, expected.pixel_values)
        assert torch.equal(each.inputs.tokens, expected.tokens)
        assert (each.kind == "same question") == (each.question == QUESTION)
        assert (each.kind in ("same image", "text")) == (each.image == "")
    assert sum(each.kind == "same question" for each in found) == len(references.images)
    assert sum(each.kind == "same image" for each in found) == len(references.questions)


def test_an_edit_is_no_reference_of_itself(seed: int) -> None:
    """Neither its own image nor its own question is."""
    model = worded_model(seed)
    request = a_request(model, seed)
    own = References((picture(seed), picture(seed + 1)), (QUESTION, "who?"), ())
    found = own.around(model, request)
    assert [each.question for each in found if each.kind == "same image"] == ["who?"]
    assert {each.image for each in found} == {"", "image 1"}


def test_what_is_taken_for_references(seed: int, tmp_path: Path) -> None:
    model = worded_model(seed)
    assert References.of(None, model) is None
    references = some_references(seed)
    assert References.of(references, model) is references
    for index in range(4):
        picture(seed + index).save(tmp_path / f"{index}.png")
    folder = References.of(tmp_path, model)
    assert folder.images == tuple(tmp_path / f"{i}.png" for i in range(4))
    assert folder.questions == QUESTIONS and folder.name == str(tmp_path)
    listed = References.of([tmp_path / "0.png", tmp_path / "1.png"], model)
    assert listed.images == folder.images[:2]
    questions = [
        VisualQuestion(f"question {i % 3}?", tmp_path / f"{i}.png", answers=("a",))
        for i in range(4)
    ]
    asked_of = References.of([*questions, VisualQuestion("in words", None)], model)
    assert asked_of.images == folder.images and asked_of.texts == ("in words",)
    assert asked_of.questions == ("question 0?", "question 1?", "question 2?")
    with pytest.raises(ValueError, match="no questions and no images"):
        References.of([], model)
    with pytest.raises((FileNotFoundError, ValueError)):
        References.of(str(tmp_path / "nothing.jsonl"), model)
    auto = References.of("auto", model)
    assert {*reference_photographs()} < {*auto.images} and auto.texts == TEXTS
    model.cfg.model_name = "demo"
    demo = References.of("auto", model)
    assert demo.questions == DEMO_QUESTIONS and {*demo.images} < {*reference_flags()}


def test_the_pool_is_whole() -> None:
    """Every image opens; no flag is of a country that measurements are about."""
    from mmlens.data import demo_questions
    from mmlens.inputs.images import load_image

    assert len(reference_photographs()) == 12
    for path in reference_photographs():
        assert min(load_image(path).size) >= 100
    held_out = {Path(question.image) for question in demo_questions(split="held_out")}
    assert len(reference_flags()) > 100 and not held_out & {*reference_flags()}


def test_what_is_asked_is_no_reference(seed: int) -> None:
    """Neither its images are, nor its questions about the edit's own image."""
    model = worded_model(seed)
    request, references = a_request(model, seed), some_references(seed)
    own = VisualQuestion(QUESTION, request.inputs.images[0].image)
    asked_of = [
        replace(own, question="who?"),
        VisualQuestion("how many?", references.images[2]),
        VisualQuestion("in words", None),
    ]
    left = references.without(asked_of, [own])
    assert left.images == (*references.images[:2], *references.images[3:])
    about = [r.question for r in left.around(model, request) if r.kind == "same image"]
    assert about == [each for each in references.questions if each != "who?"]


# Keys


@without_gradients
def plain_keys(model, inputs, layer: int) -> torch.Tensor:
    _, cache = model.run_with_cache(inputs, names_filter=hook_name("post", layer))
    return cache[hook_name("post", layer)][0]


def test_keys_are_those_of_plain_runs(seed: int) -> None:
    """At every word but BOS; at the visual tokens once per image. In float64, to rounding."""
    model = worded_model(seed).double()
    layer = random.randrange(model.cfg.n_layers)
    request, kept = a_request(model, seed), some_references(seed, n=3)
    expected = []
    for kinds in (("unrelated", "text"), ("same question",)):
        last = None
        for each in kept.around(model, request, kinds):
            inputs = each.inputs
            wanted = torch.ones(inputs.n_pos, dtype=torch.bool)
            wanted[inputs.spans[0].get("bos", [])] = False
            if each.image and each.image == last:
                wanted &= ~inputs.is_image[0]
            last = each.image
            expected.append(plain_keys(model, inputs, layer)[wanted])
    found = reference_keys(model, request, kept, layer)
    torch.testing.assert_close(found.keys, torch.cat(expected).T, rtol=1e-9, atol=1e-9)
    assert found.metadata["prompts"] == 3 * 4 + 3 + 3


def test_keys_are_computed_once(seed: int, own_cache: Path) -> None:
    """And anew for other weights below, another layer, a damaged or a foreign file."""
    model = worded_model(seed, n_layers=3)
    references = some_references(seed, n=2).around(model, a_request(model, seed))
    references = [each for each in references if each.image == "image 1"]
    first = keys_once(model, references, 1)
    [file] = own_cache.iterdir()
    assert first.metadata["seconds"] > 0 and first.metadata["bytes"] == file.stat().st_size
    again = keys_once(model, references, 1)
    assert again.metadata["seconds"] == 0 and torch.equal(again.keys, first.keys)

    for damage in (b"", b"no keys", file.read_bytes()[:-3]):
        file.write_bytes(damage)
        assert torch.equal(keys_once(model, references, 1).keys, first.keys)
        assert ReferenceKeys.load(file).is_whole
    whole = ReferenceKeys.load(file)
    replace(whole, keys=whole.keys + 1).save(file)
    assert torch.equal(keys_once(model, references, 1).keys, first.keys)

    with torch.no_grad():
        model.blocks[1].mlp.down.weight += 1  # no key of this layer depends on it
        model.blocks[2].mlp.up.weight += 1
    assert keys_once(model, references, 1).metadata["seconds"] == 0
    keys_once(model, references, 2)
    assert len([*own_cache.iterdir()]) == 2
    with torch.no_grad():
        down = model.blocks[0].mlp.down.weight
        down += torch.randn_like(down)
    changed = keys_once(model, references, 1)
    assert changed.metadata["seconds"] > 0 and not torch.allclose(changed.keys, first.keys)


# The edit


@pytest.mark.parametrize("positions", ["answer", "words"])
def test_references_keep_what_the_layer_gives(seed: int, positions: str) -> None:
    """An edit that knows them moves their layer's output far less than one that does not."""
    model = worded_model(seed, n_layers=3, d_mlp=397)
    request, references = a_request(model, seed), some_references(seed, n=3)
    told = references.kept.around(model, request)
    brief = {**BRIEF, "layer": 1, "positions": positions}
    begin, moved = (-1 if positions == "answer" else 1), []
    for given in (references, None):
        edit = multedit(model, request, references=given, lam=1e-6, ridge=0.0, **brief)
        [delta] = edit.deltas.values()
        keys = torch.cat([plain_keys(model, each.inputs, 1)[begin:] for each in told])
        own = plain_keys(model, request.inputs, 1)[1:]
        apart = torch.cdist(keys, own).min(dim=1).values > 0.1 * own.norm(dim=1).max()
        moved.append(float((delta.dense() @ keys[apart].T).norm()))
        assert float((delta.dense() @ own.T).norm()) > 0
    assert moved[0] <= 0.2 * moved[1]
    used = multedit(model, request, references=references, **brief).metadata["references"]
    assert used["name"] == "mine" and used["seconds"] == 0
    assert used["keys"] == used["prompts"] if positions == "answer" else used["keys"] > 20


def test_without_the_prompt_s_text_a_warning_says_what_is_missing(seed: int) -> None:
    model = worded_model(seed)
    known = a_request(model, seed).inputs
    inputs = model.inputs_from_tokens(known.tokens, known.pixel_values)
    with pytest.warns(UserWarning, match="no references"):
        edit = multedit(model, inputs, "yes", layer=0, **BRIEF)
    assert edit.metadata["references"] == {}
    with pytest.raises(ValueError, match="text of this prompt is not known"):
        multedit(model, inputs, "yes", layer=0, references=some_references(seed), **BRIEF)


def test_an_edit_on_an_edit_keeps_the_first(seed: int, tmp_path: Path) -> None:
    """What the layer gives at the first one's keys stays, also when the first is from a file."""
    model = worded_model(seed, n_layers=3, d_mlp=397).double()
    first = a_request(model, seed)
    asked_next = model.prepare("who?", picture(seed + 9), spans={"constraint": "who"})
    second = EditRequest(asked_next, "nobody")
    brief = {**BRIEF, "layer": 1, "references": None, "lam": 1e-9}
    made = multedit(model, first, **brief)
    name, others = down_weight(1), []
    weight = model.blocks[1].mlp.down.weight
    for edit in (made, Edit.load(made.save(tmp_path / "first.safetensors"), model)):
        assert torch.equal(edit.keys[name], made.keys[name])
        for keeps_edits in (True, False):
            with edit.applied(model):
                others.append(multedit(model, second, keeps_edits=keeps_edits, **brief))
    for kept, other in (others[:2], others[2:]):
        before, keys, delta = made.keys[name], kept.keys[name], kept.deltas[name]
        assert isinstance(delta, LowRank)
        # No update has a lower weighted error than the one that is made: also not the one that
        # keeps the first edit's keys exactly, which costs the ridge alone.
        settings = MultEditSettings(**kept.metadata["settings"])
        ridge = settings.lam + settings.ridge * float(keys.square().sum(0).mean())
        wanted = torch.cat([delta.left.expand(-1, keys.shape[1]), 0 * (weight @ before)], 1)
        exact = wanted @ torch.linalg.pinv(torch.cat([keys, before], dim=1))
        bound = float(exact.norm()) * (ridge / settings.weight) ** 0.5
        moved = (delta.dense() @ before, other.deltas[name].dense() @ before)
        assert moved[0].norm() <= bound * (1 + 1e-6) and moved[0].norm() < 0.1 * moved[1].norm()
    both = made + other
    n_keys = made.keys[name].shape[1] + other.keys[name].shape[1]
    assert both.keys[name].shape == (397, n_keys)


def test_the_written_question_is_a_key_prompt(seed: int) -> None:
    """The subject stands where the constraint stood, without the image; it gets the answer, too."""
    model = worded_model(seed, n_layers=3)
    request = a_request(model, seed, subject="the moon")
    written = request.written(model)
    expected = model.prepare("what is the moon one?", template=TEMPLATE.removeprefix("<image>\n"))
    assert torch.equal(written.tokens, expected.tokens) and written.pixel_values is None
    assert a_request(model, seed).written(model) is None
    given = some_references(seed)
    plain = multedit(model, a_request(model, seed), layer=1, references=given, **BRIEF)
    both = multedit(model, request, layer=1, references=given, **BRIEF)
    n_tokens = len(given_answer(model, written, request.target).tokens)
    ranks = [edit.deltas[down_weight(1)].left.shape[1] for edit in (plain, both)]
    assert ranks == [n_tokens, 2 * n_tokens]


def test_the_paper_s_edit_is_rank_one(seed: int) -> None:
    """(z - W0 k) k^T / (lam + k.k) at the constraint's last token, and nothing is kept."""
    model = worded_model(seed, n_layers=3).double()
    request = a_request(model, seed)
    edit = multedit(model, request, settings=MultEditSettings.paper())
    [(name, delta)] = edit.deltas.items()
    layer = int(name.split(".")[1])
    assert layer == 1 and edit.metadata["settings"]["lam"] == 0.01
    k = plain_keys(model, request.inputs, layer)[request.position(request.inputs)]
    z = delta.left[:, 0]
    expected = torch.outer(z, k) / (0.01 + k @ k)
    torch.testing.assert_close(delta.dense(), expected, rtol=1e-9, atol=1e-12)
    assert edit.metadata["steps"] == [10] and edit.metadata["references"] == {}


# The check


def test_the_check_asks_what_was_held_out(seed: int) -> None:
    """Answers are those of `generate`; those whose first sentence is another have changed."""
    model = worded_model(seed, n_layers=3)
    request, references = a_request(model, seed), some_references(seed)
    edit = multedit(model, request, layer=2, references=references, lr=0.5, steps=4)
    edit.apply(model)
    check = edit.check()
    assert edit.is_applied(model)
    edit.revert(model)
    rows = references.held_out.around(model, request)
    assert sorted(check.kind) == sorted([EDITED, *(each.kind for each in rows)])
    by_name = {(each.kind, each.question, each.image): each.inputs for each in rows}
    for index, row in enumerate(check.to_dataframe().itertuples()):
        inputs = by_name.get((row.kind, row.question, row.image), request.inputs)
        before = said(model, inputs, row.before)
        with edit.applied(model):
            after = said(model, inputs, row.after)
        assert before and after
        assert bool(check.changed[index]) == (answer_alone(row.before) != answer_alone(row.after))
    counts = check.summary().set_index("kind")
    assert counts["asked"].sum() == len(check.kind)
    assert counts["changed"].sum() == int(check.changed.sum())


def said(model, inputs, text: str) -> bool:
    """Whether the greedy answer begins with a text."""
    whole = str(model.generate(inputs, 12, do_sample=False, num_beams=1)).strip()
    return whole.startswith(text.rstrip("\N{REPLACEMENT CHARACTER}"))


def test_an_edit_that_changes_everything_is_warned_of(seed: int, tmp_path: Path) -> None:
    model = worded_model(seed, n_layers=2)
    request, references = a_request(model, seed), some_references(seed)
    name = down_weight(1)
    shape = model.get_parameter(name).shape
    nothing = Edit.of(model, {name: torch.zeros(shape)}, method="none", target="an answer")
    quiet = nothing.check(model, request, references=references)
    assert not quiet.changed.any()
    assert quiet.warning.endswith("the edited question is not answered with the target")
    # All that the model says after one of the two may be what it said before, but not after both.
    noise = 50 * torch.randn(shape)
    checks = [
        Edit.of(model, {name: each}, method="noise", target="an answer").check(
            model, request, references=references
        )
        for each in (noise, -noise)
    ]
    check = max(checks, key=lambda each: int(each.changed.sum()))
    changed = check.summary().query(f"kind != '{EDITED}'")
    if changed["changed"].sum() > len(changed):
        assert "changed" in check.warning
    assert check.changed.float().mean() >= 0.5
    again = EditCheck.load(check.save(tmp_path / "check.safetensors"))
    assert again.to_dataframe().equals(check.to_dataframe()) and again.warning == check.warning
    assert check.plot() is not None


def test_what_cannot_be_checked_is_said(seed: int) -> None:
    model = worded_model(seed)
    request = a_request(model, seed)
    name = down_weight(0)
    delta = LowRank(torch.zeros(model.cfg.d_model, 1), torch.zeros(1, model.cfg.d_mlp))
    edit = Edit.of(model, {name: delta}, method="none")
    with pytest.raises(ValueError, match="which model"):
        edit.check()
    with pytest.raises(ValueError, match="what is this edit about"):
        edit.check(model)
    with pytest.raises(ValueError, match="several targets, or none"):
        edit.check(model, request.inputs)
    with pytest.raises(ValueError, match="nothing to ask"):
        edit.check(model, request, references=None)


def test_prompts_keep_their_form(seed: int) -> None:
    """The same question asked again is the same prompt, with and without a template."""
    model = worded_model(seed)
    for template in (TEMPLATE, None, "auto"):
        inputs = model.prepare(QUESTION, picture(seed), template=template)
        assert question_of(inputs) == QUESTION
        again = asked(model, inputs, QUESTION)
        assert torch.equal(again.tokens, inputs.tokens)
        assert torch.equal(again.pixel_values, inputs.pixel_values)
