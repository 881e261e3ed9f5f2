"""Runs use the cores that are free, layer by layer, and put the number of threads back."""

import random
import signal
import threading

import pytest
import torch
from small_models import language_model, small_inputs, small_model
from thread_cases import MOST, counting, pretended_free_cores  # noqa: F401 (a fixture)

from mmlens import (
    EditRequest,
    Intervention,
    attribution_patching,
    causal_trace,
    multedit,
)
from mmlens.analyses.corruptions import noise_span
from mmlens.editing import fine_tune
from mmlens.interventions.functions import zero
from mmlens.utils import threads
from mmlens.utils.threads import on_free_cores


def test_every_layer_follows_what_is_free(free, seed):
    model = small_model(seed, n_layers=4)
    inputs = small_inputs(model, seed)
    hooks, seen = counting(model)

    def busier(activation, hook):
        free.cores -= 1.0

    def quiet(activation, hook):
        free.cores = 8.0

    free.cores = 3.0
    changes = [("blocks.0.hook_mlp_out", busier), ("blocks.1.hook_mlp_out", busier)]
    model.run_with_hooks(inputs, fwd_hooks=[*hooks, *changes, ("blocks.2.hook_mlp_out", quiet)])
    assert seen == [3, 2, 1, 3]
    assert torch.get_num_threads() == MOST


def test_small_work_has_one_thread(free, monkeypatch, seed):
    """Its size is that of a layer's largest product: positions times the widths of the MLP."""
    free.cores = 8.0
    model = small_model(seed)
    inputs = small_inputs(model, seed)
    work = inputs.n_pos * model.cfg.d_model * model.cfg.d_mlp
    for repaid, expected in ((work + 1, 1), (work // 2, 2), (work // 10, MOST)):
        monkeypatch.setattr(threads, "REPAID", repaid)
        hooks, seen = counting(model)
        model.run_with_hooks(inputs, fwd_hooks=hooks)
        assert set(seen) == {expected}
    assert torch.get_num_threads() == MOST


def spied(monkeypatch, model) -> list[int]:
    """The number of threads at each layer from now on, whatever runs it."""
    seen: list[int] = []
    block = type(model.blocks[0])
    forward = block.forward

    def noting(self, *args, **kwargs):
        out = forward(self, *args, **kwargs)
        seen.append(torch.get_num_threads())
        return out

    monkeypatch.setattr(block, "forward", noting)
    return seen


RUNS = {
    "forward": lambda model, clean, corrupted: model(clean),
    "loss and cache": lambda model, clean, _: model.run_with_cache(clean, return_type="loss"),
    "vision": lambda model, clean, _: model.vision(clean.pixel_values),
    "generate": lambda model, clean, _: model.generate(clean, 3, return_type="tokens"),
    "record": lambda model, clean, corrupted: model.record(clean).record(corrupted),
    "branches": lambda model, clean, _: model.record(clean).run(
        [[Intervention("mlp_out", 1, 2, zero())]], lambda logits: logits[:, -1, 0]
    ),
    "causal_trace": lambda model, clean, corrupted: causal_trace(model, clean, corrupted),
    "attribution_patching": lambda model, clean, corrupted: attribution_patching(
        model, clean, corrupted
    ),
    "multedit": lambda model, clean, _: multedit(
        model, EditRequest(clean, 5), layer=1, steps=2, references=None
    ),
    "fine_tune": lambda model, clean, _: fine_tune(model, EditRequest(clean, 5), steps=2),
}


def prompts(model, seed):
    """A prompt with an image and a constraint, and the same with noise there."""
    clean = small_inputs(model, seed, spans={"constraint": [2]})
    return clean, noise_span(model, clean, "constraint", samples=1, seed=seed)


@pytest.mark.parametrize("name", RUNS)
def test_runs_use_free_cores_and_put_the_number_back(free, monkeypatch, seed, name):
    model = small_model(seed, n_layers=3)
    clean, corrupted = prompts(model, seed)
    seen = spied(monkeypatch, model)
    RUNS[name](model, clean, corrupted)
    assert seen and set(seen) == {1}
    assert torch.get_num_threads() == MOST


@pytest.mark.parametrize("name", ["multedit", "fine_tune", "attribution_patching"])
def test_backward_passes_use_free_cores(free, monkeypatch, seed, name):
    """They come after the forward pass, outside of it."""
    seen: list[int] = []
    for function in ("grad", "backward"):
        real = getattr(torch.autograd, function)

        def noting(*args, real=real, **kwargs):
            seen.append(torch.get_num_threads())
            return real(*args, **kwargs)

        monkeypatch.setattr(torch.autograd, function, noting)
    model = small_model(seed, n_layers=3)
    RUNS[name](model, *prompts(model, seed))
    assert seen and set(seen) == {1}


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_the_number_is_put_back_after_an_error(free, seed, error):
    model = small_model(seed)

    def fail(activation, hook):
        assert torch.get_num_threads() == 1
        raise error

    with pytest.raises(error):
        model.run_with_hooks(small_inputs(model, seed), fwd_hooks=[("hook_embed", fail)])
    assert torch.get_num_threads() == MOST
    model.reset_hooks()
    hooks, seen = counting(model)
    free.cores = 2.0
    model.run_with_hooks(small_inputs(model, seed), fwd_hooks=hooks)  # and the next run chooses
    assert set(seen) == {2} and torch.get_num_threads() == MOST


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs a timer that sends signals")
def test_the_number_is_put_back_after_signals_at_any_moment(free, seed):
    class Stopped(BaseException):
        pass

    def stop(number, frame):
        raise Stopped

    @on_free_cores
    def run(model):
        free.cores = chance.choice([1.0, 2.0, 3.0])
        threads.adjust_threads()
        return sum(range(chance.randrange(300)))

    model, chance = torch.nn.Linear(2, 2), random.Random(seed)
    before = signal.signal(signal.SIGALRM, stop)
    n_stopped = 0
    try:
        for _ in range(300):
            try:
                signal.setitimer(signal.ITIMER_REAL, chance.uniform(2e-5, 5e-4))
                while True:
                    run(model)
            except Stopped:
                n_stopped += 1
            assert torch.get_num_threads() == MOST
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert n_stopped == 300


def test_each_thread_has_its_own_number(free, monkeypatch, seed):
    """While one runs on one thread, another, new or not, has all; and all have them at the end."""
    model = small_model(seed)
    inputs = small_inputs(model, seed)
    inside, go_on, seen = threading.Event(), threading.Event(), {}

    def wait(activation, hook):
        seen["in the run"] = torch.get_num_threads()
        inside.set()
        assert go_on.wait(30)

    def work():
        seen["before"] = torch.get_num_threads()
        model.run_with_hooks(inputs, fwd_hooks=[("blocks.0.hook_resid_post", wait)])
        seen["after"] = torch.get_num_threads()

    def look():
        seen["new"] = torch.get_num_threads()

    worker = threading.Thread(target=work)
    worker.start()
    assert inside.wait(30)
    seen["main"] = torch.get_num_threads()
    new = threading.Thread(target=look)
    new.start()
    new.join(30)
    go_on.set()
    worker.join(30)
    others = dict.fromkeys(("before", "after", "new", "main"), MOST)
    assert seen == {"in the run": 1, **others}


def test_models_on_a_gpu_keep_the_number(free, seed):
    """Here on the meta device, where nothing is computed."""
    model = language_model(seed).to("meta")
    hooks, seen = counting(model)
    resid = torch.zeros(1, 5, model.cfg.d_model, device="meta")
    model.run_with_hooks(resid, start_at_layer=0, fwd_hooks=hooks)
    assert set(seen) == {MOST}


def test_results_are_the_same_on_any_number_of_threads(free, monkeypatch, seed):
    """In float64, where a sum of n terms in another order moves by about n * 1e-16 of its size.

    The sums here have some 500 terms; 20 layers of arithmetic in a row may each amplify that, but
    by 1e4 in all at the most: 1e-9. A part that was left out or done twice would show in the first
    digits. The sizes are such that products and elementwise operations are divided.
    """
    model = language_model(
        seed, n_layers=2, d_model=96, n_heads=6, n_key_value_heads=3, d_head=16, d_mlp=500
    )
    model.double()
    for parameter in model.parameters():
        parameter.data.mul_(0.2)
    tokens = torch.randint(2, 60, (3, 80))
    span = [{"constraint": [7]}]
    one = model.inputs_from_tokens(tokens[:1], spans=span)
    found = []
    for number in (1, 2, 3):
        monkeypatch.setenv("MMLENS_THREADS", str(number))
        hooks, seen = counting(model)
        logits = model.run_with_hooks(tokens, fwd_hooks=hooks)
        assert set(seen) == {number}
        edit = multedit(model, one, 5, layer=0, steps=3, references=None)
        [delta] = edit.deltas.values()
        found.append((logits, delta.dense()))
    for logits, delta in found[1:]:
        for mine, first in zip((logits, delta), found[0], strict=True):
            assert float((mine - first).abs().max()) <= 1e-9 * float(first.abs().max())
