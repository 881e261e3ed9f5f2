"""What tests of threads share: a pretended number of free cores, and what layers see of it."""

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

from mmlens.utils import threads
from mmlens.utils.threads import FreeCores

MOST = 3


@pytest.fixture(name="free")
def pretended_free_cores(monkeypatch) -> Iterator[SimpleNamespace]:
    """`free.cores` is what is free; torch is set to `MOST` threads, as if nobody had chosen that.

    Work of any size is worth all threads.
    """
    found = SimpleNamespace(cores=1.0)
    before = torch.get_num_threads()
    torch.set_num_threads(MOST)
    for name in (threads.VARIABLE, *threads.CHOSEN_BY):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(threads, "DEFAULT", MOST)
    monkeypatch.setattr(threads, "REPAID", 1)
    monkeypatch.setattr(threads, "mkl_threads", lambda: None)  # which gives away the call above
    monkeypatch.setattr(FreeCores, "look", lambda self, threads: found.cores)
    yield found
    torch.set_num_threads(before)


def counting(model, layers=None):
    """Hooks that write down the number of threads in each layer, and the list."""
    seen = []

    def note(activation, hook):
        seen.append(torch.get_num_threads())

    layers = range(model.cfg.n_layers) if layers is None else layers
    return [(f"blocks.{layer}.hook_resid_post", note) for layer in layers], seen
