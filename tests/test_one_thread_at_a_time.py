"""One model, any number of threads: what each computes is, bit for bit, what it computes alone."""

from __future__ import annotations

import copy
import io
import pickle
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from small_models import small_inputs, small_model
from test_edit import assert_same_bits, random_edit, weights

from mmlens import (
    Intervention,
    attention_contribution,
    attention_knockout,
    causal_trace,
    logit_lens,
    noise_span,
)
from mmlens.interventions.functions import scale
from mmlens.model import run_lock
from mmlens.model.run_lock import ModelInUse

WAIT = 60.0
"""Seconds after which a test gives up on threads that wait for each other."""


@pytest.fixture
def model(seed):
    return small_model(seed, n_layers=2)


def look(activation: Any, hook: Any) -> None:
    """A hook that changes nothing."""


def together(works: list[Callable[[], Any]]) -> list[Any]:
    """What each gives, all begun at once, each in a thread of its own."""
    start = threading.Barrier(len(works))
    found: list[Any] = [None] * len(works)

    def run(index: int) -> None:
        start.wait()
        try:
            found[index] = works[index]()
        except BaseException as error:
            found[index] = error

    threads = [threading.Thread(target=run, args=(i,), daemon=True) for i in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT)
    assert not any(thread.is_alive() for thread in threads), "threads wait for each other"
    for each in found:
        if isinstance(each, BaseException):
            raise each
    return found


def analyses(model: Any, seed: int) -> list[Callable[[], torch.Tensor]]:
    """What users do with a model, each on a prompt of its own."""
    clean = [small_inputs(model, seed + i) for i in range(8)]
    noisy = [noise_span(model, each, "text", seed=i) for i, each in enumerate(clean)]
    edit = random_edit(model)

    def traced(i: int, method: str) -> torch.Tensor:
        sites = ["mlp_out", "pattern"][i % 2 : i % 2 + 1]
        return causal_trace(model, clean[i], noisy[i], sites=sites, method=method).restored

    def edited() -> torch.Tensor:
        with edit.applied(model):
            return model(clean[4])

    def by_hand() -> torch.Tensor:
        with model.exclusive():
            edit.apply(model)
            found = model(clean[4])
            edit.revert(model)
        return found

    def in_a_block() -> torch.Tensor:
        with model.hooks(fwd_hooks=[("blocks.0.hook_attn_out", scale(3.0))]):
            time.sleep(0)  # lets others go on
            return model(clean[5])

    def branches() -> torch.Tensor:
        recording = model.record(clean[6])
        cells = [[Intervention("z", 1, 3, scale(2.0))], [Intervention("pattern", 0, 4, scale(0.5))]]
        return recording.run(cells, lambda logits: logits[:, -1])

    return [
        lambda: traced(0, "branch"),
        lambda: traced(1, "branch"),
        lambda: traced(2, "naive"),
        lambda: model(clean[3]),
        edited,
        by_hand,
        in_a_block,
        branches,
        lambda: model.generate(clean[3], 3, return_type="tokens"),
        lambda: model.run_with_cache(clean[7])[1]["blocks.1.attn.hook_pattern"],
        lambda: model.vision.run_with_cache(clean[7].pixel_values)[1]["vision.hook_embed"],
        lambda: logit_lens(model, clean[2]).log_probs,
        lambda: attention_contribution(model, clean[1], [1], [4]).values,
        lambda: attention_knockout(model, clean[0], [1], [4], window=1).probability,
    ]


@pytest.mark.parametrize("rounds", [1, pytest.param(20, marks=pytest.mark.slow)])
def test_each_gets_what_it_gets_alone(model, seed, rounds):
    works = analyses(model, seed)
    alone = [work() for work in works]
    before = weights(model)
    for _ in range(rounds):
        chosen = random.choices(range(len(works)), k=16)
        for index, found in zip(chosen, together([works[i] for i in chosen]), strict=True):
            assert torch.equal(found, alone[index]), index
    assert_same_bits(model, before)
    assert not model.list_hooks() and model.context_level == 0


def test_many_traces_in_many_threads(model, seed):
    pairs = []
    for i in range(4):
        clean = small_inputs(model, seed + i)
        pairs.append((clean, noise_span(model, clean, "text", seed=i)))
    alone = [causal_trace(model, *pair) for pair in pairs]

    def all_of_them(first: int) -> list[Any]:
        order = [(first + i) % len(pairs) for i in range(len(pairs))]
        return [(i, causal_trace(model, *pairs[i])) for i in order]

    for found in together([lambda first=i: all_of_them(first) for i in range(4)]):
        for i, trace in found:
            assert torch.equal(trace.restored, alone[i].restored)
            assert (trace.clean, trace.corrupted) == (alone[i].clean, alone[i].corrupted)


def test_hooks_of_one_thread_are_not_run_by_another(model, seed):
    """While a block is open, other threads that run the model or its tower wait."""
    inputs = small_inputs(model, seed)
    seen, inside = [], threading.Event()

    def note(activation: Any, hook: Any) -> None:
        seen.append(threading.current_thread())

    def in_a_block() -> None:
        with model.hooks(fwd_hooks=[("vision.hook_embed", note), ("ln_final.hook_scale", note)]):
            inside.set()
            time.sleep(0.05)
            model(inputs)

    def others(run: Callable[[], Any]) -> None:
        inside.wait()
        run()

    runs = [
        lambda: model(inputs),
        lambda: model.vision(inputs.pixel_values),
        lambda: model.vision.run_with_cache(inputs.pixel_values),
        lambda: model.reset_hooks(),
        lambda: noise_span(model, inputs, "image"),
    ]
    together([in_a_block, *(lambda run=run: others(run) for run in runs)])
    assert len(seen) == 2 and len(set(seen)) == 1


def test_a_hook_may_run_the_model(model, seed):
    inputs, found = small_inputs(model, seed), []

    def run_again(activation: Any, hook: Any) -> None:
        if not found:
            found.append(None)
            found.append(model(inputs))

    with model.hooks(fwd_hooks=[("blocks.0.hook_mlp_out", run_again)]):
        assert torch.equal(model(inputs), found[1])


def test_a_tower_has_the_contexts_of_its_model(model, seed):
    """Leaving an inner context removes its own hooks alone, whichever of the two it is of."""
    point = model.vision.hook_embed
    with model.hooks(fwd_hooks=[("vision.hook_embed", look)]):
        with model.vision.hooks(fwd_hooks=[("hook_embed", look)]):
            assert len(point.fwd_hooks) == 2 and model.context_level == 2
        with copy.copy(model).hooks(fwd_hooks=[("vision.hook_embed", look)]):
            assert len(point.fwd_hooks) == 2
        assert len(point.fwd_hooks) == 1
    assert not point.fwd_hooks and model.vision.context_level == 0


def test_copies(model, seed):
    """A copy has a lock of its own, a shallow one that of its model: they have the same hooks."""
    inputs = small_inputs(model, seed)
    expected, buffer = model(inputs), io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    with model.hooks(fwd_hooks=[("blocks.0.hook_mlp_out", look)]):
        shallow, deep = copy.copy(model), copy.deepcopy(model)
    others = [
        deep,
        pickle.loads(pickle.dumps(model)),
        torch.load(buffer, weights_only=False),
    ]
    assert shallow.run_lock is model.run_lock
    for other in others:
        assert other.run_lock is not model.run_lock
        assert other.vision.run_lock is other.run_lock and other.context_level == 0
    with model.exclusive():  # keeps nobody but the model's own threads
        for found in together([lambda m=m: m(inputs) for m in others]):
            assert torch.equal(found, expected)


def test_threads_take_turns_in_the_order_in_which_they_asked(model):
    order: list[int] = []
    threads = []

    def use(index: int) -> None:
        with model.exclusive():
            order.append(index)

    with model.exclusive():
        for index in range(5):
            threads.append(threading.Thread(target=use, args=(index,), daemon=True))
            threads[-1].start()
            while len(model.run_lock._waiting) <= index:
                time.sleep(0.001)
        with model.exclusive():  # again, before all who wait
            assert not order
    for thread in threads:
        thread.join(WAIT)
    assert order == list(range(5))


def test_a_block_may_end_in_another_thread(model, seed):
    """As one in a generator does that a server goes through from thread to thread."""
    inputs = small_inputs(model, seed)

    def answers():
        with model.hooks(fwd_hooks=[("blocks.0.hook_mlp_out", scale(2.0))]):
            yield model(inputs)

    plain, generator = model(inputs), answers()
    [first] = together([lambda: next(generator)])
    assert not torch.equal(first, plain)
    assert model.hook_dict["blocks.0.hook_mlp_out"].fwd_hooks  # the block is open
    assert len(together([lambda: list(generator)])) == 1
    assert not model.list_hooks() and model.context_level == 0
    assert torch.equal(together([lambda: model(inputs)])[0], plain)


def test_a_thread_that_has_ended_keeps_nobody_waiting(model, seed):
    inputs = small_inputs(model, seed)
    blocks: list[Any] = []

    def begins() -> None:
        blocks.append(model.exclusive())
        blocks[0].__enter__()

    together([begins])
    together([lambda: model(inputs)])
    blocks[0].__exit__(None, None, None)
    assert not model.run_lock._inside


def test_a_block_that_is_forgotten_in_another_thread(model, seed):
    inputs = small_inputs(model, seed)

    def numbers():
        with model.hooks(fwd_hooks=[("blocks.0.hook_mlp_out", look)]):
            yield 1

    generators = [numbers()]
    next(generators[0])
    together([generators.clear])
    assert not model.list_hooks()
    together([lambda: model(inputs)])


def test_a_block_that_waits_for_a_thread_that_waits_for_the_block(model, seed, monkeypatch):
    monkeypatch.setattr(run_lock, "PATIENCE", 0.3)
    inputs = small_inputs(model, seed)
    with ThreadPoolExecutor(2) as pool:
        refused = pytest.raises(ModelInUse, match="thread MainThread keeps.*run the model in")
        with refused, random_edit(model).applied(model):
            list(pool.map(model, [inputs, inputs]))
        assert len(list(pool.map(model, [inputs, inputs]))) == 2


def test_a_long_run_is_waited_for(model, seed, monkeypatch):
    """However long; and so are blocks in which something runs now and then."""
    monkeypatch.setattr(run_lock, "PATIENCE", 0.3)
    inputs, inside = small_inputs(model, seed), threading.Event()

    def takes_long(activation: Any, hook: Any) -> None:
        inside.set()
        time.sleep(0.8)

    def runs_long() -> None:
        with model.hooks(fwd_hooks=[("hook_embed", takes_long)]):
            model(inputs)
        with model.exclusive():
            for _ in range(4):
                time.sleep(0.1)
                model(inputs)

    def waits() -> Any:
        inside.wait(WAIT)
        return model(inputs)

    together([runs_long, waits, waits])
