"""Gradients are as they were before, however blocks end."""

from __future__ import annotations

import threading

import torch

from mmlens.utils.grad_mode import gradients, without_gradients


def test_blocks_nest_as_torchs_do():
    for outer in (True, False):
        for inner in (True, False):
            with gradients(outer):
                assert torch.is_grad_enabled() is outer
                with gradients(inner):
                    assert torch.is_grad_enabled() is inner
                assert torch.is_grad_enabled() is outer
            assert torch.is_grad_enabled()
    assert without_gradients(torch.is_grad_enabled)() is False
    assert torch.is_grad_enabled()


def test_a_block_that_ends_after_the_one_around_it_changes_nothing():
    outer, inner = gradients(False), gradients(True)
    outer.__enter__()
    inner.__enter__()
    outer.__exit__(None, None, None)
    assert torch.is_grad_enabled()
    torch.set_grad_enabled(False)
    inner.__exit__(None, None, None)
    assert not torch.is_grad_enabled()
    torch.set_grad_enabled(True)


def test_a_block_that_ends_in_another_thread_changes_nothing_there():
    block = gradients(False)
    block.__enter__()
    found = []

    def end() -> None:
        with torch.no_grad():
            block.__exit__(None, None, None)
            found.append(torch.is_grad_enabled())

    thread = threading.Thread(target=end)
    thread.start()
    thread.join()
    assert found == [False]
    torch.set_grad_enabled(True)
