"""Nothing that should not survives an interruption: hooks, edited weights, parameters in exchange.

Each body leaves the model as it found it. It is stopped before every line that it executes in the
modules which hold what must not survive (many lines: at some of them, drawn anew in every run), and
at random moments by a signal, as Ctrl-C sends it.
"""

from __future__ import annotations

import random
import sys
from typing import Any

import pytest
import torch
import transformer_lens.hook_points
from interruptions import every_line, interrupted_at_random
from small_models import small_inputs, small_model
from test_edit import assert_same_bits, random_edit, weights
from test_edit_baselines import moment, request_for

from mmlens import (
    Intervention,
    attention_contribution,
    causal_trace,
    noise_span,
)
from mmlens.branching import joined
from mmlens.editing import (
    KeyCovariance,
    applied,
    edit,
    fine_tune,
    fine_tuning,
    lora,
    memit,
    rome,
    sequential,
    value,
)
from mmlens.editing.sequential import SequentialEditor
from mmlens.interventions.functions import zero
from mmlens.model import hook_points, hooked_root_module, run_lock, run_positions
from mmlens.utils import grad_mode, temporary

HOOKS = (
    hook_points,
    hooked_root_module,
    temporary,
    run_lock,
    run_positions,
    grad_mode,
    torch.autograd.grad_mode,
    transformer_lens.hook_points,
    sys.modules["transformer_lens.HookedRootModule"],  # its class has the same name
)
EDITS = (
    edit,
    applied,
    hooked_root_module,
    temporary,
    run_lock,
    grad_mode,
    torch.autograd.grad_mode,
)
OWN_WEIGHTS = (
    temporary,
    fine_tuning,
    value,
    grad_mode,
    torch.autograd.grad_mode,
    torch.nn.utils.stateless,
    torch.nn.utils._named_member_accessor,
)


@pytest.fixture
def model(seed):
    return small_model(seed, n_layers=2, tie_word_embeddings=False)


@pytest.fixture
def inputs(model, seed):
    return small_inputs(model, seed)


def registered(model: Any) -> dict[str, Any]:
    """Everything that says which hooks the model has, of TransformerLens and of torch."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        kinds = ("forward_hooks", "forward_pre_hooks", "backward_hooks", "backward_pre_hooks")
        found[name] = [list(getattr(module, f"_{kind}")) for kind in kinds]
    for name, point in model.hook_dict.items():
        found[f"{name} noted"] = [
            (each.hook.id, each.context_level, each.is_permanent)
            for each in (*point.fwd_hooks, *point.bwd_hooks)
        ]
    return found


def free(model: Any) -> bool:
    """Whether no context or pass is open, any thread may have the model, and gradients are on."""
    lock, here = model.run_lock, run_positions.current_pass()
    idle = here is run_positions.WHOLE and model.context_level == 0
    return idle and not lock._inside and not lock._waiting and torch.is_grad_enabled()


def look(activation: Any, hook: Any) -> None:
    """A hook that changes nothing."""


def usual_runs(model: Any, inputs: Any) -> dict[str, Any]:
    """What leaves no hook, by name."""
    names = random.sample(list(model.hook_dict), 4)
    backward = [("blocks.1.hook_resid_pre", look)]
    trained = small_inputs(model, 3)

    def in_a_block() -> None:
        with model.hooks(fwd_hooks=[(name, look) for name in names], bwd_hooks=backward):
            model(inputs, stop_at_layer=1)

    def nested() -> None:
        with (
            model.hooks(fwd_hooks=[(names[0], look)], clear_contexts=True),
            model.vision.hooks(fwd_hooks=[("hook_embed", look)]),
            model.exclusive(),
        ):
            model(inputs, stop_at_layer=0)

    def added() -> None:
        try:
            model.add_hook(lambda name: name in names, look)
        finally:
            model.reset_hooks()

    def with_gradients() -> None:
        with torch.enable_grad():
            model.run_with_cache(
                trained, names_filter=["hook_embed", *names], incl_bwd=True, return_type="loss"
            )

    return {
        "hooks": in_a_block,
        "nested hooks": nested,
        "add_hook": added,
        "run_with_hooks": lambda: model.run_with_hooks(
            inputs, fwd_hooks=[(name, look) for name in names], stop_at_layer=1
        ),
        "run_with_cache": lambda: model.run_with_cache(inputs, names_filter=names),
        "gradients": with_gradients,
        "generate": lambda: model.generate(inputs, 2, return_type="tokens"),
        "branches": lambda: model.record(inputs).run(
            [[Intervention("mlp_out", 0, 2, zero())], [Intervention("embed", None, 1, zero())]],
            lambda logits: logits[:, -1],
        ),
        "causal_trace": lambda: traced(model, inputs),
        "contributions": lambda: attention_contribution(model, inputs, [1], [3]),
    }


def traced(model: Any, inputs: Any) -> Any:
    noisy = noise_span(model, inputs, "text", seed=1)
    return causal_trace(model, inputs, noisy, sites=["mlp_out"], positions=[[2], [3]])


RUNS = (
    "hooks",
    "nested hooks",
    "add_hook",
    "run_with_hooks",
    "run_with_cache",
    "gradients",
    "generate",
    "branches",
    "causal_trace",
    "contributions",
)
LONG_RUNS = {"causal_trace", "contributions"}


@pytest.mark.parametrize(
    "run", [pytest.param(run, marks=[pytest.mark.slow] * (run in LONG_RUNS)) for run in RUNS]
)
@pytest.mark.parametrize("most", [60, pytest.param(1000, marks=pytest.mark.slow)])
def test_no_hook_survives(model, inputs, run, most):
    model.requires_grad_(run == "gradients")
    body = usual_runs(model, inputs)[run]
    model.add_hook("blocks.0.hook_mlp_out", look, is_permanent=True)
    if run != "add_hook":
        model.add_hook("blocks.1.hook_mlp_out", look)
    before = registered(model)
    error = random.choice([KeyboardInterrupt, MemoryError])
    for stop in every_line(body, *HOOKS, joined, error=error, most=most):
        if run == "add_hook":  # interrupted while it cleans up, the user cleans up once more
            model.reset_hooks()
        assert registered(model) == before, stop.line
        assert free(model), stop.line


@pytest.mark.parametrize("run", ["hooks", "run_with_cache", "branches"])
def test_no_hook_survives_two_interruptions(model, inputs, run):
    body = usual_runs(model, inputs)[run]
    before = registered(model)
    for stop in every_line(body, *HOOKS, most=80, twice=True):
        line = stop.line
        del stop  # nobody holds the traceback any more
        assert registered(model) == before, line
        assert free(model), line


def test_hooks_that_are_to_stay_do(model, inputs):
    """`reset_hooks_end=False` keeps hooks for a backward pass; not half of them."""
    names = random.sample(list(model.hook_dict), 3)
    hooks = [(name, look) for name in names]
    complete: list[bool] = []

    def run() -> None:
        complete.clear()
        model.run_with_hooks(inputs, bwd_hooks=hooks, reset_hooks_end=False, stop_at_layer=0)
        assert all(model.hook_dict[name].bwd_hooks for name in names)
        complete.append(True)
        model.reset_hooks()

    for stop in every_line(run, *HOOKS, most=80):
        there = {bool(model.hook_dict[name].bwd_hooks) for name in names}
        assert complete or len(there) == 1, stop.line
        model.reset_hooks()
        assert not model.list_hooks() and free(model), stop.line


@pytest.fixture
def some_edit(model):
    names = random.sample([n for n, w in model.named_parameters() if w.ndim == 2], 3)
    return random_edit(model, names)


def edit_bodies(model: Any, one: Any) -> dict[str, Any]:
    other = random_edit(model, list(one.deltas))

    def in_a_block() -> None:
        with one.applied(model):
            assert one.is_applied(model)

    def nested() -> None:
        with one.applied(model), other.applied(model):
            pass

    def by_hand() -> None:
        one.apply(model)
        one.revert(model)

    return {"applied": in_a_block, "nested": nested, "by hand": by_hand}


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize("use", ["applied", "nested", "by hand"])
def test_weights_are_as_before(model, some_edit, use, error):
    before = weights(model)
    most = 120 if use == "nested" else None
    for stop in every_line(edit_bodies(model, some_edit)[use], *EDITS, error=error, most=most):
        if use == "by hand" and some_edit.is_applied(model):
            some_edit.revert(model)
        assert not some_edit.is_applied(model) and free(model), stop.line
        assert_same_bits(model, before)


def test_an_edit_that_is_interrupted_twice_can_be_reverted(model, some_edit):
    before = weights(model)
    for use, body in edit_bodies(model, some_edit).items():
        for stop in every_line(body, *EDITS, most=80, twice=True):
            line = stop.line
            del stop
            if use == "by hand" and some_edit.is_applied(model):
                some_edit.revert(model)
            assert not some_edit.is_applied(model) and free(model), line
            assert_same_bits(model, before)


def test_an_error_in_the_block_is_what_comes_out_of_it(model, some_edit):
    """Even where the block leaves another edit on, which cannot stay on what it was added to."""
    before, other = weights(model), random_edit(model, list(some_edit.deltas), method="rome")
    with pytest.raises(ZeroDivisionError) as caught, some_edit.applied(model):
        other.apply(model)
        raise ZeroDivisionError
    assert any("rome" in note for note in caught.value.__notes__)
    assert_same_bits(model, before)
    with pytest.raises(ValueError, match="rome.*were still on"), some_edit.applied(model):
        other.apply(model)
    assert_same_bits(model, before)
    assert not other.is_applied(model)


def test_a_block_leaves_an_edit_that_was_there_before(model, some_edit):
    some_edit.apply(model)
    edited = weights(model)
    refused = pytest.raises(ValueError, match="applied to this model already")
    with refused, some_edit.applied(model):
        raise AssertionError("the block must not begin")
    assert some_edit.is_applied(model)
    assert_same_bits(model, edited)


def test_reverting_by_hand_in_the_block(model, some_edit):
    before = weights(model)
    with some_edit.applied(model):
        some_edit.revert(model)
    assert_same_bits(model, before)


def methods(model: Any, seed: int) -> dict[str, Any]:
    """Editing methods that change the model for a while."""
    first, second = (request_for(model, seed + i) for i in range(2))
    generator = torch.Generator().manual_seed(seed)
    moments = torch.stack([moment(model.cfg.d_mlp, generator) for _ in range(2)])
    known = KeyCovariance(moments, (0, 1), 99, "made")
    given = {"covariance": known, "steps": 1}

    def in_sequence() -> None:
        with SequentialEditor(model, layer=0, steps=1, references=None) as editor:
            editor.add(first)
            editor.add(second)

    return {
        "fine_tune": lambda: fine_tune(model, first, layer=[0], steps=1),
        "lora": lambda: lora(model, first, layer=[1], steps=1, rank=2),
        "rome": lambda: rome(model, [first, second], layer=0, **given),
        "memit": lambda: memit(model, [first, second], layer=[0, 1], **given),
        "sequence": in_sequence,
    }


@pytest.mark.parametrize("method", ["fine_tune", "lora", "rome", "memit", "sequence"])
@pytest.mark.parametrize("most", [12, pytest.param(400, marks=pytest.mark.slow)])
def test_methods_leave_the_model_alone(model, seed, method, most):
    body = methods(model, seed)[method]
    model.requires_grad_(True)
    for stop in every_line(body, *OWN_WEIGHTS, applied, edit, sequential, most=most):
        line = stop.line
        assert_as_made(model, seed, line)


def assert_as_made(model: Any, seed: int, line: str) -> None:
    """Parameters, modules, gradients and random numbers are those of a new model."""
    fresh = small_model(seed, n_layers=2, tie_word_embeddings=False)
    expected = dict(fresh.named_parameters())
    now = dict(model.named_parameters())
    assert now.keys() == expected.keys(), line
    for name, parameter in now.items():
        assert isinstance(parameter, torch.nn.Parameter) and parameter.requires_grad, (line, name)
        assert torch.equal(parameter, expected[name]), (line, name)
    kinds = [type(module) for module in model.modules()]
    assert kinds == [type(module) for module in fresh.modules()], line
    assert not hasattr(model, "peft_config") and not model.list_hooks() and free(model), line


def test_random_numbers_are_as_before(model, seed):
    body = methods(model, seed)["lora"]
    body()
    state = torch.get_rng_state()
    for stop in every_line(body, temporary, sys.modules["mmlens.editing.lora"], most=40):
        assert torch.equal(torch.get_rng_state(), state), stop.line


@pytest.mark.parametrize("times", [60, pytest.param(1500, marks=pytest.mark.slow)])
def test_signals_at_random_moments(model, inputs, some_edit, times):
    model.requires_grad_(True)
    before, hooks = weights(model), registered(model)
    bodies = [*usual_runs(model, inputs).values(), *edit_bodies(model, some_edit).values()]
    interrupted = 0
    for _ in range(times):
        interrupted += interrupted_at_random(random.choice(bodies))
        if some_edit.is_applied(model):  # by hand, without a block
            some_edit.revert(model)
        model.reset_hooks()  # of `add_hook`
        assert_same_bits(model, before)
        assert registered(model) == hooks
        assert free(model)
    assert interrupted
