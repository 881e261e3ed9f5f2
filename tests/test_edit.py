"""Edits: on and off to the last bit, several at once, in a file, for the right model only."""

import json
import random
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_models import hooked, random_llava
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_models import small_inputs, small_model
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from mmlens import Edit, HookedMultimodalTransformer
from mmlens.editing import LowRank
from mmlens.editing.fingerprints import fingerprint

SEEDS = st.integers(0, 2**31 - 1)
DTYPES = st.sampled_from([torch.bfloat16, torch.float16, torch.float32, torch.float64])
Model = HookedMultimodalTransformer


def matrices(model: Model) -> list[str]:
    return [name for name, weight in model.named_parameters() if weight.ndim == 2]


def random_edit(model: Model, names: list[str] | None = None, **metadata) -> Edit:
    """Of some matrices, by factors or dense."""
    names = random.sample(matrices(model), random.randint(1, 4)) if names is None else names
    deltas: dict[str, Tensor | LowRank] = {}
    for name in names:
        weight = model.get_parameter(name)
        (n_out, n_in), dtype = weight.shape, torch.promote_types(weight.dtype, torch.float32)
        if random.random() < 0.6:
            rank = random.randint(1, 3)
            deltas[name] = LowRank(
                torch.randn(n_out, rank, dtype=dtype), torch.randn(rank, n_in, dtype=dtype)
            )
        else:
            deltas[name] = torch.randn(n_out, n_in, dtype=dtype)
    return Edit.of(model, deltas, **metadata)


def weights(model: Model) -> dict[str, Tensor]:
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def assert_same_bits(model: Model, expected: dict[str, Tensor]) -> None:
    for name, weight in model.named_parameters():
        bits = [x.contiguous().view(torch.uint8) for x in (weight.detach(), expected[name])]
        assert torch.equal(*bits), name


def dense(delta: Tensor | LowRank, dtype: torch.dtype = torch.float32) -> Tensor:
    if isinstance(delta, Tensor):
        return delta.to(dtype)
    return delta.left.to(dtype) @ delta.right.to(dtype)


@settings(max_examples=12)
@given(SEEDS, DTYPES)
def test_an_edit_is_added_and_taken_off_bit_by_bit(seed, dtype):
    random.seed(seed)
    torch.manual_seed(seed)
    model = small_model(seed).to(dtype)
    with torch.no_grad():
        model.blocks[0].mlp.down.weight[0, 0] = -0.0  # a difference would make it 0.0
    before = weights(model)
    edit = random_edit(model)
    with edit.applied(model) as edited:
        assert edited is model and edit.is_applied(model)
        for name, weight in model.named_parameters():
            expected = before[name]
            if name in edit.deltas:
                wide = torch.promote_types(dtype, torch.float32)
                expected = (expected.to(wide) + dense(edit.deltas[name], wide)).to(dtype)
                assert not torch.equal(weight, before[name])
            assert torch.equal(weight, expected), name
    assert not edit.is_applied(model)
    assert_same_bits(model, before)


def test_an_exception_in_the_block_takes_the_edit_off(seed: int) -> None:
    model = small_model(seed)
    before, edit = weights(model), random_edit(model)
    with pytest.raises(KeyError, match="in the block"), edit.applied(model):
        raise KeyError("in the block")
    assert_same_bits(model, before)


def test_apply_and_revert(seed: int) -> None:
    model = small_model(seed)
    before, edit = weights(model), random_edit(model)
    inputs = small_inputs(model, seed)
    logits = model(inputs)
    edit.apply(model)
    assert edit.is_applied(model)
    edit.revert(model)
    assert torch.equal(model(inputs), logits)
    assert_same_bits(model, before)


@settings(max_examples=10)
@given(SEEDS)
def test_edits_add_up_and_come_off_in_the_opposite_order(seed):
    random.seed(seed)
    torch.manual_seed(seed)
    model = small_model(seed).to(torch.bfloat16)
    one, two = random.sample(matrices(model), 2)
    before = weights(model)
    first, second = random_edit(model, [one]), random_edit(model, [one, two])
    first.apply(model)
    between = weights(model)
    second.apply(model)
    with pytest.raises(ValueError, match="applied later .*revert that one first"):
        first.revert(model)
    second.revert(model)
    assert_same_bits(model, between)
    first.revert(model)
    assert_same_bits(model, before)


def test_edits_of_different_weights_come_off_in_any_order(seed: int) -> None:
    model = small_model(seed)
    one, two = random.sample(matrices(model), 2)
    before = weights(model)
    first, second = random_edit(model, [one]), random_edit(model, [two])
    first.apply(model)
    second.apply(model)
    first.revert(model)
    assert torch.equal(model.get_parameter(one), before[one])
    assert not torch.equal(model.get_parameter(two), before[two])
    second.revert(model)
    assert_same_bits(model, before)


def test_twice_on_or_never_on_is_an_error(seed: int) -> None:
    model = small_model(seed)
    model = small_model(seed)
    edit = random_edit(model)
    with pytest.raises(ValueError, match="not applied"):
        edit.revert(model)
    edit.apply(model)
    with pytest.raises(ValueError, match="applied to this model already"):
        edit.apply(model)
    edit.revert(model)
    with pytest.raises(ValueError, match="not applied"):
        edit.revert(model)


def test_two_models_with_the_same_weights_take_the_same_edit(seed: int) -> None:
    model, twin = small_model(seed), small_model(seed)
    edit = random_edit(model)
    with edit.applied(model):
        assert not edit.is_applied(twin)
        with edit.applied(twin):
            for name in edit.deltas:
                assert torch.equal(model.get_parameter(name), twin.get_parameter(name))


@settings(max_examples=10)
@given(SEEDS)
def test_the_sum_of_edits(seed):
    random.seed(seed)
    torch.manual_seed(seed)
    model = small_model(seed).double()
    name = random.choice(matrices(model))
    edits = [random_edit(model, [name], method="m", target=str(i)) for i in range(3)]
    edits.append(random_edit(model))
    whole = sum(edits)
    assert isinstance(whole, Edit)
    assert [part.get("target") for part in whole.parts] == ["0", "1", "2", None]
    before = weights(model)
    with whole.applied(model):
        together = weights(model)
    for edit in edits:
        edit.apply(model)
    for key, weight in model.named_parameters():
        torch.testing.assert_close(weight.detach(), together[key])
    for edit in reversed(edits):
        edit.revert(model)
    assert_same_bits(model, before)
    factors = (
        LowRank(torch.randn(4, 2), torch.randn(2, 3)),
        LowRank(torch.randn(4, 1), torch.randn(1, 3)),
    )
    joined = sum_of(model, *factors)
    assert isinstance(joined, LowRank) and joined.left.shape == (4, 3)


def sum_of(model: Model, one: LowRank, other: LowRank) -> Tensor | LowRank:
    """The sum of edits that were made for some weight of that shape."""
    edits = [Edit({"w": delta}, {"w": {"float32": "hash"}}) for delta in (one, other)]
    delta = (edits[0] + edits[1]).deltas["w"]
    torch.testing.assert_close(dense(delta), dense(one) + dense(other))
    return delta


@settings(max_examples=10)
@given(SEEDS, DTYPES)
def test_a_saved_edit_does_the_same(tmp_path_factory, seed, dtype):
    random.seed(seed)
    torch.manual_seed(seed)
    model = small_model(seed).to(dtype)
    edit = random_edit(model, method="multedit", target="Rom", settings={"lam": 0.25, "x": None})
    path = tmp_path_factory.mktemp("edit") / "edit.safetensors"
    assert edit.save(path) == path
    assert [each.name for each in path.parent.iterdir()] == [path.name]
    loaded = Edit.load(path, model)
    assert loaded.metadata == edit.metadata and loaded.base == edit.base
    with edit.applied(model):
        expected = weights(model)
    with loaded.applied(model):
        assert_same_bits(model, expected)


def test_an_edit_of_bfloat16_weights_fits_their_copy_in_float32(seed: int) -> None:
    model = small_model(seed).to(torch.bfloat16)
    edit = random_edit(model)
    with edit.applied(model.float()):
        pass
    weight = torch.randn(3, 4).bfloat16()
    assert fingerprint(weight) == fingerprint(weight.float()) == fingerprint(weight.T.clone().T)
    assert fingerprint(weight) != fingerprint(weight.view(4, 3))


def test_another_model_is_refused(seed: int, tmp_path: Path) -> None:
    model, other = small_model(seed), small_model(seed)
    names = random.sample(matrices(model), 2)
    edit = random_edit(model, names, method="rome", target="Oslo")
    path = edit.save(tmp_path / "edit.safetensors")
    with torch.no_grad():
        other.get_parameter(names[-1]).view(-1)[random.randrange(3)] += 1e-3
    before = weights(other)
    for refused in (lambda: edit.apply(other), lambda: Edit.load(path, other)):
        with pytest.raises(ValueError, match=r"rome to 'Oslo'.*made for another model"):
            refused()
    with pytest.raises(ValueError, match="different models"):
        _ = edit + random_edit(other, names)
    assert_same_bits(other, before)
    assert Edit.load(path).base == edit.base  # without a model there is nothing to compare with


@settings(max_examples=12)
@given(SEEDS, DTYPES, DTYPES)
def test_the_same_weights_in_another_dtype(tmp_path_factory, seed, made_in, applied_to):
    """One checkpoint in two dtypes: what is added is the same, rounded to the model's own dtype."""
    random.seed(seed)
    torch.manual_seed(seed)
    checkpoint = small_model(seed).state_dict()
    model, other = small_model(seed).to(made_in), small_model(seed).to(applied_to)
    for each in (model, other):
        each.load_state_dict(checkpoint)  # rounded from float32, as a loader does it
    edit = random_edit(model)
    loaded = Edit.load(edit.save(tmp_path_factory.mktemp("edit") / "it.safetensors"))
    halves = {torch.bfloat16, torch.float16}
    if {made_in, applied_to} == halves:
        # Neither is the other's rounding: nobody can tell whether they were one checkpoint's.
        with pytest.raises(ValueError, match=r"made for another model: .* is b?float16 there and"):
            loaded.apply(other)
        return
    before = weights(other)
    with loaded.applied(other):
        for name, delta in edit.deltas.items():
            wide = torch.promote_types(applied_to, torch.float32)
            expected = (before[name].to(wide) + dense(delta, wide)).to(applied_to)
            # Both are rounded once, from sums that differ by float32's or float64's rounding.
            torch.testing.assert_close(other.get_parameter(name).detach(), expected)
            assert not torch.equal(other.get_parameter(name), before[name])
    assert_same_bits(other, before)
    both = loaded + random_edit(other, list(edit.deltas))
    both.check_weights(model)
    both.check_weights(other)


def test_a_bfloat16_checkpoint_is_known_in_float32_and_float16(seed: int) -> None:
    """Whose values are bfloat16's in each of them."""
    model = small_model(seed).to(torch.bfloat16)
    edit = random_edit(model)
    for dtype in (torch.float32, torch.float16):
        edit.check_weights(small_model(seed).to(torch.bfloat16).to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_other_weights_are_refused_in_any_dtype(seed: int, dtype: torch.dtype) -> None:
    model, other = small_model(seed), small_model(seed)
    edit = random_edit(model)
    name = random.choice(list(edit.deltas))
    with torch.no_grad():
        changed = other.get_parameter(name).view(-1)
        index = int(changed.abs().argmax())
        changed[index] *= 1 + 2**-6  # twice the distance between neighbours in bfloat16
    with pytest.raises(ValueError, match="made for another model") as error:
        edit.apply(other.to(dtype))
    shown = str(dtype).removeprefix("torch.")
    assert dtype == torch.float32 or f"float32 there and {shown} here" in str(error.value)
    with pytest.raises(ValueError, match=rf"different models: .* \({shown}\)"):
        _ = edit + random_edit(other, [name])


def test_less_than_the_coarser_dtype_can_tell_is_refused_in_the_finer(seed: int) -> None:
    """What bfloat16 rounds away is a difference between two float32 models all the same."""
    model, other = small_model(seed), small_model(seed)
    with torch.no_grad():
        for each in other.parameters():
            each.copy_(each.bfloat16())
    edit = random_edit(model)
    edit.check_weights(other.to(torch.bfloat16))
    with pytest.raises(ValueError, match="made for another model"):
        edit.check_weights(other.float())
    with pytest.raises(ValueError, match="different models"):
        _ = edit + random_edit(other, list(edit.deltas))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_file_that_is_not_finite_is_refused(seed: int, tmp_path: Path, bad: float) -> None:
    model = small_model(seed)
    edit = random_edit(model)
    delta = edit.deltas[random.choice(list(edit.deltas))]
    parts = [delta.left, delta.right] if isinstance(delta, LowRank) else [delta]
    random.choice(parts).view(-1)[0] = bad
    path = edit.save(tmp_path / "edit.safetensors")
    with pytest.raises(ValueError, match=r"edit\.safetensors: the edit of .* is not finite"):
        Edit.load(path)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda rest, tensors: rest.pop("base"), "its fields are not base and metadata"),
        (lambda rest, tensors: rest.update(more=1), "its fields are not base and metadata"),
        (lambda rest, tensors: rest.update(metadata=[]), "its fields are not base and metadata"),
        (lambda rest, tensors: rest.update(base={"w": "h"}), "its fields are not"),
        (lambda rest, tensors: rest["base"].update(w={"float32": "h"}), "w has no factors"),
        (lambda rest, tensors: rest["base"].update(w={}), "w has no hash"),
        (lambda rest, tensors: rest["base"].update(w={"abacus": "h"}), "w has no hash of a dtype"),
        (lambda rest, tensors: tensors.update(w=torch.ones(2)), "w belong to no weight"),
        (lambda rest, tensors: tensors.pop(min(tensors)), "no factors that fit"),
    ],
)
def test_files_that_hold_no_edit(seed: int, tmp_path: Path, change, why: str) -> None:
    model = small_model(seed)
    edit = random_edit(model)
    path = edit.save(tmp_path / "edit.safetensors")
    with safe_open(path, framework="pt") as file:
        rest, tensors = json.loads(file.metadata()["Edit"]), load_file(path)
    change(rest, tensors)
    save_file(tensors, path, {"Edit": json.dumps(rest)})
    with pytest.raises(ValueError, match=rf"edit\.safetensors holds no Edit: .*{why}"):
        Edit.load(path)


def test_a_later_edit_knows_the_weights_below_the_applied_ones(seed: int) -> None:
    """So that edits made one on top of the other add up."""
    model = small_model(seed)
    name = random.choice(matrices(model))
    first = random_edit(model, [name])
    with first.applied(model):
        second = random_edit(model, [name])
        with second.applied(model):
            expected = model.get_parameter(name).detach().clone()
    assert first.base == second.base
    with (first + second).applied(model):
        torch.testing.assert_close(model.get_parameter(name).detach(), expected)


def test_wrong_names_shapes_and_values(seed: int, tmp_path: Path) -> None:
    model = small_model(seed)
    with pytest.raises(KeyError, match=r"no weight 'blocks.0.mlp.W_out'.*named_parameters"):
        Edit.of(model, {"blocks.0.mlp.W_out": torch.zeros(1)})
    name = matrices(model)[0]
    with pytest.raises(ValueError, match=r"is \[2, 2\], the weight"):
        Edit.of(model, {name: torch.zeros(2, 2)})
    with pytest.raises(ValueError, match="not finite"):
        Edit.of(model, {name: torch.full_like(model.get_parameter(name), torch.nan)})
    (tmp_path / "no.safetensors").write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match="holds no Edit"):
        Edit.load(tmp_path / "no.safetensors")
    with pytest.raises(FileNotFoundError):
        Edit.load(tmp_path / "nowhere.safetensors")


def test_a_merged_edit_is_saved_with_the_model(seed: int, tmp_path: Path) -> None:
    model = hooked(random_llava(), tmp_path / "model")
    before = weights(model)
    name = "blocks.1.mlp.down.weight"
    edit = random_edit(model, [name])
    edit.merge(model)
    assert not edit.is_applied(model)
    merged = weights(model)
    assert not torch.equal(merged[name], before[name])
    model.save_pretrained(tmp_path / "edited")
    reference = LlavaForConditionalGeneration.from_pretrained(tmp_path / "edited")
    theirs = reference.get_parameter("model.language_model.layers.1.mlp.down_proj.weight")
    assert torch.equal(theirs, merged[name])
    stored = load_file(tmp_path / "edited" / "model.safetensors")
    original = load_file(tmp_path / "model" / "model.safetensors")
    changed = [key for key, weight in stored.items() if not torch.equal(weight, original[key])]
    assert len(changed) == 1 and changed[0].endswith("layers.1.mlp.down_proj.weight")
    with pytest.raises(ValueError, match="made for another model"):
        edit.apply(model)


def test_merging_while_edits_are_applied(seed: int) -> None:
    model = small_model(seed)
    name = matrices(model)[1]
    first, second = random_edit(model, [name]), random_edit(model, [name])
    first.apply(model)
    with pytest.raises(ValueError, match="another edit .* is applied"):
        second.merge(model)
    edited = weights(model)
    first.merge(model)
    assert_same_bits(model, edited)
    with pytest.raises(ValueError, match="not applied"):
        first.revert(model)
