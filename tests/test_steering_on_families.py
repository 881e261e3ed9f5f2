"""Steering vectors of words and of images against transformers' activations, in float64.

On the four families of `family_cases`; the principal component is scikit-learn's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from family_cases import EVERY, LOGITS, Case, edited
from steering_formula import direction
from torch import Tensor

from mmlens import SteeringVector, VisualQuestion, steering_scores, steering_vector
from mmlens.sweeps.task import Asked, Carried
from mmlens.sweeps.tasks.steer import SteerTask

ROUNDING = 1e-5
"""Norms and rotary angles in float32, layer by layer, and the float32 of the result: some eps of
the activations."""
Batch = dict[str, Any]


@pytest.fixture
def case(family: str, seed: int, tmp_path: Path) -> Case:
    return Case(family, seed, tmp_path)


def pairs_of(case: Case, what: str, n: int) -> list[list[Batch]]:
    """Transformers' batches of positive and negative prompts: other words, or another image."""
    sides: list[list[Batch]] = [[], []]
    words = torch.tensor(case.words)
    for _ in range(n):
        for side in sides:
            batch = dict(case.batches[0])
            if what == "words":
                batch["input_ids"] = batch["input_ids"].clone()
                batch["input_ids"][0, words] = torch.randint(5, 60, (len(words),))
            else:
                batch["pixel_values"] = torch.randn_like(batch["pixel_values"])
            side.append(batch)
    return sides


def sharpness(differences: np.ndarray[Any, Any], method: str) -> float:
    """By how much less than itself the first component turns when activations are rounded."""
    if method == "mean_difference":
        return 1.0
    singular = np.append(np.linalg.svd(differences, compute_uv=False), 0.0)
    return float((singular[0] - singular[1]) / singular[0])


@EVERY
@pytest.mark.parametrize("method", ["mean_difference", "pca"])
@pytest.mark.parametrize("what", ["words", "images"])
@torch.no_grad()
def test_vectors(case: Case, what: str, method: str) -> None:
    """Vectors, norms, margins of pairs that are left out; and logits under the vector."""
    chance, n = case.chance, 5
    site = chance.choice(["resid_pre", "resid_post", "attn_out", "mlp_out", "z", "post", "q", "v"])
    where = chance.choice(["last", "text"])
    if what == "images":  # which windows of Gemma 3 may keep from the last token
        where = "image" if case.family == "Gemma 3" else chance.choice(["last", "image"])
    layers = chance.sample(range(1, case.model.cfg.n_layers), 2)
    sides = pairs_of(case, what, n)
    prompts = [[case.made.inputs(batch) for batch in side] for side in sides]
    found = steering_vector(
        case.model, *prompts, site=site, layers=layers, positions=where, method=method
    )
    at = case.inputs.span(where)
    activations = torch.stack(
        [
            torch.stack(
                [
                    torch.cat([x[:, at].double().mean(1) for x in kept])
                    for kept in (
                        case.kept_of(batch, [(site, layer) for layer in layers]) for batch in side
                    )
                ],
                dim=1,
            )
            for side in sides
        ]
    ).numpy()  # [side, layer, pair, d]
    for row in range(len(layers)):
        positive, negative = activations[:, row]
        differences = positive - negative
        norms = np.linalg.norm(activations[:, row], axis=-1)
        error = ROUNDING * norms.max()
        assert abs(float(found.activation_norms[row]) - norms.mean()) <= error
        sharp = sharpness(differences, method)
        if sharp > 0.02:
            vector = found.vectors[row].flatten().double().numpy()
            expected = direction(differences, method)
            assert np.abs(vector - expected).max() <= error / sharp
        assert np.abs(differences).max() > 10 * error
        for pair in range(n):
            rest = np.delete(differences, pair, axis=0)
            along = direction(rest, method)
            sharp, size = sharpness(rest, method), np.linalg.norm(along)
            if sharp < 0.02 or size < 0.02 * norms.max():
                continue
            margin = differences[pair] @ along / size
            # Its direction turns by the error over its own length.
            allowed = error * (1 + np.linalg.norm(differences[pair]) / (sharp * size))
            assert abs(float(found.margins[row, pair]) - margin) <= 2 * allowed
    assert torch.equal(found.held_out, (found.margins > 0).double().mean(1))
    check_steered(case, found)


def check_steered(case: Case, vector: SteeringVector) -> None:
    """Logits of the prompt with the vector added at some positions."""
    chance, n_pos = case.chance, case.inputs.n_pos
    at = sorted({*chance.sample(range(n_pos), 2), n_pos - 1})
    # As long as the activations are, or longer.
    amount = chance.choice([-2.0, 1.5]) * float(
        (vector.activation_norms / vector.vectors.flatten(1).norm(dim=1)).min()
    )
    keep_norm = chance.random() < 0.5
    unit = vector.vectors.shape[1:]

    def moved(row: int) -> Any:
        def put(x: Tensor) -> Tensor:
            each = x.unflatten(-1, unit)
            after = each + amount * vector.vectors[row].double()
            if keep_norm:
                after = after * each.norm(dim=-1, keepdim=True) / after.norm(dim=-1, keepdim=True)
            return after.flatten(2)

        return edited(at, put)

    edits = [
        (*case.place(vector.site, layer), moved(row)) for row, layer in enumerate(vector.layers)
    ]
    expected = case.theirs(edits)
    steered = vector.at(amount, at, keep_norm=keep_norm)
    found = case.model.run_with_hooks(case.inputs, interventions=[steered])[0]
    assert float((found - expected).abs().max()) <= LOGITS
    if vector.site != "q":  # a query may matter less than rounding
        assert float((case.theirs([]) - expected).abs().max()) > 10 * LOGITS


@EVERY
@torch.no_grad()
def test_pairs_of_texts(case: Case) -> None:
    """Prompts given as texts, which transformers' tokenizer makes ids of."""
    texts = [["The flag is red", "Paris is the city"], ["The flag is white", "What is the flag"]]
    layer = case.layer()
    found = steering_vector(case.model, *texts, layer=layer)
    sides = [
        torch.cat(
            [
                case.kept_of(
                    {"input_ids": case.model.tokenizer(text, return_tensors="pt")["input_ids"]},
                    [("resid_post", layer)],
                )[0][:, -1]
                for text in side
            ]
        )
        for side in texts
    ]
    expected = (sides[0] - sides[1]).mean(0)
    error = ROUNDING * float(torch.cat(sides).norm(dim=-1).max())
    assert float((found.vectors[0] - expected).abs().max()) <= error


@EVERY
@torch.no_grad()
def test_what_a_steered_model_answers(case: Case, tmp_path: Path) -> None:
    """The rows of the task `steer` and their scores, against transformers' own generation."""
    layers = case.chance.sample(range(case.model.cfg.n_layers), 2)
    vector = SteeringVector(
        vectors=torch.randn(2, case.model.cfg.d_model),
        activation_norms=torch.ones(2),
        margins=torch.ones(2, 1),
        layers=tuple(layers),
        site="resid_post",
        method="mean_difference",
    )
    scales = (-2.0, 0.0, 3.0)
    file = vector.save(tmp_path / "vector.safetensors")
    task = SteerTask(vector=str(file), scales=scales, max_new_tokens=4)
    rows: list[dict[str, Any]] = []
    right: dict[tuple[int, float], list[bool]] = {}
    for run, inputs in enumerate((case.inputs, case.other)):
        plain, _ = case.continued(4, run=run)
        answer = case.model.tokenizer.decode(plain, skip_special_tokens=True)
        question = VisualQuestion("What is this?", None, answers=(answer,))
        found = task.rows(case.model, Asked(question, inputs), Carried())
        rows += [row | {"cluster": str(run)} for row in found]
        for row in found:
            added = row["scale"] * vector.vectors[layers.index(row["layer"])].double()

            def steer(x: Tensor, added: Tensor = added) -> Tensor:
                return torch.cat([x[:, :-1], x[:, -1:] + added], dim=1)

            place = case.place("resid_post", row["layer"])
            tokens, logits = case.continued(4, [(*place, steer)], of_every_pass=True, run=run)
            case.assert_said(row["said"], tokens, logits)
            is_right = question.is_right(row["said"])
            right.setdefault((row["layer"], row["scale"]), []).append(is_right)
    accuracy = steering_scores(pd.DataFrame(rows)).of("questions", "accuracy")
    for (layer, scale), each in right.items():
        at = sorted(layers).index(layer), scales.index(scale)
        assert float(accuracy[at]) == np.mean(each)
