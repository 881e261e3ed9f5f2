"""Files of results: what is not as it should be in them is one sentence with the path."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_report_page import contribution_of, prompt_of, trace_of

from mmlens.analyses.aggregation import AggregatedTraces
from mmlens.analyses.attention_knockout import AttentionKnockout
from mmlens.analyses.attention_sinks import AttentionSinks
from mmlens.analyses.attribution_patching import AttributionPatching
from mmlens.analyses.direct_logit_attribution import DirectLogitAttribution
from mmlens.analyses.logit_lens import LogitLens
from mmlens.analyses.patch import Patched
from mmlens.analyses.path_patch import PathPatch
from mmlens.analyses.result import SavedResult
from mmlens.analyses.scan import Scan
from mmlens.analyses.steering_scores import SteeringScores
from mmlens.analyses.steering_vector import SteeringVector
from mmlens.analyses.token_erasure import TokenErasure
from mmlens.analyses.word_map import WordMap
from mmlens.editing.covariance import KeyCovariance
from mmlens.editing.edit_check import EditCheck
from mmlens.editing.edit_evaluation import EditEvaluation
from mmlens.editing.reference_keys import ReferenceKeys

WORDS = ("a", "b", "c")


def made() -> list[SavedResult]:
    """One of every kind."""
    prompt = prompt_of()
    trace = trace_of(prompt)
    return [
        prompt,
        trace,
        contribution_of(prompt),
        AttributionPatching(
            torch.rand(1, 2, 3), 0.5, 0.25, ("mlp_out",), (0, 1, 2), ((4,), (5, 6)), ("a", "b"),
            " Rome", (7,),
        ),
        AttentionKnockout(torch.rand(2), 0.5, (0, 1), 1, (1, 2), (5,), " Rome", (7,)),
        DirectLogitAttribution(
            torch.rand(3, 2), torch.rand(2), ("embed", "0.attn_out", "bias"), (0, 1), ("a", "b"),
            "Rome", "",
        ),
        LogitLens(
            torch.rand(2, 3, 1), torch.ones(2, 3, 1).long(), torch.ones(2, 3, 4).long(),
            torch.rand(2, 3, 4), (0, 1), (5, 6, 7), WORDS, (9,), {"9": "Rome"},
        ),
        SteeringVector(
            torch.rand(2, 5), torch.rand(2), torch.rand(2, 3), (3, 7), "resid_post", "pca"
        ),
        SteeringScores(
            torch.rand(3, 2, 4), torch.ones(3, 2, 4).long(), WORDS, WORDS, (3, 7),
            (-1.0, 0.0, 1.0, 2.0),
        ),
        TokenErasure(0.5, 0.25, torch.rand(4), (5, 6), ("a", "b"), " Rome", "Rome", "Paris"),
        WordMap(
            torch.rand(2, 3), torch.ones(2, 3).long(), (3, 7), (5, 6, 7),
            ((0, 0, 0), (0, 0, 1), (-1, -1, -1)), " dog", 0, "resid_post",
        ),
        KeyCovariance(torch.rand(2, 5, 5), (0, 1), 100, "hash"),
        ReferenceKeys(torch.rand(5, 3), "hash", {"prompts": 3}),
        AggregatedTraces(
            torch.rand(2, 1, 3, 4), ("mlp_out",), WORDS, (0, 1, 2, 3), 1, "recovery", ("a", 2), 10,
            0.95, 0,
        ),
        EditEvaluation(
            edit=torch.zeros(3).long(), group=WORDS, question=WORDS, said_before=WORDS, said=WORDS,
            probability=torch.rand(3, 2), score=torch.rand(3, 2), unchanged=torch.rand(3) < 0.5,
            drift=torch.rand(3), case=("a",), cluster=("a",), target=("b",),
            n_edits=torch.ones(1).long(), seconds=torch.rand(1), memory=torch.ones(1).long(),
        ),
        EditCheck(
            torch.rand(3) < 0.5, torch.rand(3) < 0.5, ("the edit", "unrelated", "text"), WORDS,
            ("", "it.png", ""), WORDS, WORDS, WORDS, {"edit": "multedit"},
        ),
        Patched(
            torch.rand(2, 3), 0.5, ("layer", "head"), ((3, 7), (0, 1, 2)), "probability", " Rome"
        ),
        Scan(
            torch.rand(2, 3), 0.5, ("layer", "head"), ((3, 7), (0, 1, 2)), "probability", " Rome",
            {"prompts": 4}, "heads", "zero", "z", torch.rand(4, 2, 3), torch.rand(2, 3),
            torch.rand(2, 3),
        ),
        PathPatch(
            torch.rand(2), 0.5, ("sender",), (("z[3] 9", "z[4] 9"),), "probability", " Rome", {},
            ("logits",), 0.25,
        ),
        AttentionSinks(
            torch.rand(2, 3), torch.rand(2, 3), torch.rand(2, 3), (3, 7), WORDS, (0, 2), (2,), (5,),
            torch.rand(3), torch.rand(3, 4), 0.5, "probability", " Rome",
        ),
    ]  # fmt: skip


KINDS = [type(each) for each in made()]


def of_kind(kind: type[SavedResult]) -> SavedResult:
    return next(each for each in made() if type(each) is kind)


def changed(path: Path, kind: type, change: Callable[[dict, dict], Any]) -> Path:
    """The file with something else in it."""
    with safe_open(path, framework="pt") as file:
        rest = json.loads(file.metadata()[kind.__name__])
    tensors = load_file(path)
    change(rest, tensors)
    save_file(tensors, path, {kind.__name__: json.dumps(rest)})
    return path


def test_there_is_one_of_every_kind():
    def kinds(base: type) -> set[type]:
        return {each for sub in base.__subclasses__() for each in ({sub} | kinds(sub))}

    assert {each for each in kinds(SavedResult) if each.__module__.startswith("mmlens")} == set(
        KINDS
    )


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_saved_comes_back(tmp_path, seed, kind):
    result = of_kind(kind)
    again = kind.load(result.save(tmp_path / "it.safetensors"))
    for each in fields(kind):
        one, other = getattr(result, each.name), getattr(again, each.name)
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


@pytest.mark.parametrize("kind", KINDS)
def test_a_field_too_few_or_too_many(tmp_path, seed, kind):
    path = of_kind(kind).save(tmp_path / "it.safetensors")
    content = path.read_bytes()
    needed = [each.name for each in fields(kind) if each.name in vars(of_kind(kind))]
    required = [n for n in needed if n not in optional(kind)]
    for name in random.sample(required, min(3, len(required))):
        path.write_bytes(content)
        changed(path, kind, lambda rest, tensors, n=name: (rest.pop(n, 0), tensors.pop(n, 0)))
        with pytest.raises(
            ValueError, match=rf"it\.safetensors holds no {kind.__name__}: {name} is"
        ):
            kind.load(path)
    for change in (
        lambda rest, tensors: rest.update(more=1),
        lambda rest, tensors: tensors.update(more=torch.ones(1)),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"it\.safetensors .* no field more"):
            kind.load(changed(path, kind, change))


def optional(kind: type) -> set[str]:
    """Fields that have a default."""
    from dataclasses import MISSING

    return {
        each.name
        for each in fields(kind)
        if each.default is not MISSING or each.default_factory is not MISSING
    }


@pytest.mark.parametrize("kind", KINDS)
def test_fields_of_another_kind(tmp_path, seed, kind):
    path = of_kind(kind).save(tmp_path / "it.safetensors")
    content = path.read_bytes()
    for each in fields(kind):
        if each.name in optional(kind):
            continue
        path.write_bytes(content)
        wrong = random.choice([[[[["x"]]]], True])
        changed(path, kind, lambda rest, tensors, n=each.name, w=wrong: (
            tensors.pop(n, 0), rest.update({n: w})
        ))  # fmt: skip
        with pytest.raises(ValueError, match=f"holds no {kind.__name__}: {each.name} must be"):
            kind.load(path)


@pytest.mark.parametrize("kind", [each for each in KINDS if each.SIZES])
def test_lengths_that_do_not_fit(tmp_path, seed, kind):
    """A tuple or a tensor that is longer than the dimension that it belongs to."""
    path = of_kind(kind).save(tmp_path / "it.safetensors")
    content = path.read_bytes()
    for name in kind.SIZES:
        path.write_bytes(content)
        changed(path, kind, lambda rest, tensors, n=name: rest[n].append(rest[n][0]))
        with pytest.raises(ValueError, match=f"holds no {kind.__name__}: .* {name} for .* along"):
            kind.load(path)
    path.write_bytes(content)
    name = random.choice(list(load_file(path)))
    changed(path, kind, lambda rest, tensors: tensors.update(
        {name: torch.cat([tensors[name], tensors[name]])}
    ))  # fmt: skip
    # "must be" where tests check shapes themselves, and have seen the dimension before.
    with pytest.raises(ValueError, match=f"holds no {kind.__name__}: .* (along|must be)"):
        kind.load(path)


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files(tmp_path, seed, kind):
    path = of_kind(kind).save(tmp_path / "it.safetensors")
    content = path.read_bytes()
    for bad in (b"", b"no file of this kind", content[: random.randrange(len(content))]):
        path.write_bytes(bad)
        with pytest.raises(ValueError, match=rf"it\.safetensors holds no {kind.__name__}"):
            kind.load(path)
    for rest in ("[]", "{", "[" * 100_000, "null"):
        save_file({"x": torch.ones(1)}, path, {kind.__name__: rest})
        with pytest.raises(ValueError, match=rf"it\.safetensors holds no {kind.__name__}"):
            kind.load(path)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        kind.load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="it is no file"):
        kind.load(tmp_path)
