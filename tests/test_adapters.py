"""An adapter around any linear module of a block counts as its merged weight, in every run.

In float64; the reference is a plain run of a copy whose weight has the update added to it.
"""

from __future__ import annotations

import copy
import random

import pytest
import torch
from small_models import KINDS, plain_run, small_inputs, small_model
from test_branching import decoder_edit, sites_of
from torch import Tensor, nn

from mmlens import KeyValueCache
from mmlens.interventions.functions import scale
from mmlens.interventions.intervention import Intervention

TOLERANCE = 1e-9
BY_HEAD = {"result", "attn_in", "q_input", "k_input", "v_input"}
"""Sites of what is computed by head, with the weights themselves."""


class Adapted(nn.Module):
    """A linear module and a low-rank update, as peft puts it around one."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.a = nn.Parameter(torch.randn(2, base.in_features, dtype=torch.float64))
        self.b = nn.Parameter(torch.randn(base.out_features, 2, dtype=torch.float64) / 5)

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.a.T @ self.b.T


@torch.no_grad()
def adapted(model: nn.Module, name: str) -> nn.Module:
    """Put an adapter around a module; return a copy of the model in which it is merged."""
    merged = copy.deepcopy(model)
    parent, _, child = name.rpartition(".")
    adapter = Adapted(model.get_submodule(name))
    setattr(model.get_submodule(parent), child, adapter)
    merged.get_submodule(name).weight += adapter.b @ adapter.a
    return merged


@torch.no_grad()
@pytest.mark.parametrize("last", [False, True], ids=["a layer", "the last layer"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_counts_in_every_run(seed: int, kind: str, last: bool) -> None:
    chance = random.Random(seed)
    original = small_model(seed, **{"n_layers": 3} | KINDS[kind]).double()
    inputs = small_inputs(original, seed, images=(1,))
    layer = 2 if last else chance.randrange(2)
    blocks = {f"blocks.{layer}": original.blocks[layer]}
    if not last:
        blocks["vision.blocks.0"] = original.vision.blocks[0]
    linear = [
        f"{block}.{name}"
        for block, module in blocks.items()
        for name, part in module.named_modules()
        if isinstance(part, nn.Linear)
    ]
    assert len(linear) >= 4 * len(blocks)
    for name in linear:
        model = copy.deepcopy(original)
        merged = adapted(model, name)
        expected = merged(inputs)
        assert (expected - original(inputs)).abs().max() > 1000 * TOLERANCE, name
        found = {"plain": model(inputs)}
        found["recorded"] = model.record(inputs).logits(range(inputs.n_pos))
        found["cached"] = model.run_with_cache(inputs)[0]
        cache = KeyValueCache(3)
        at = inputs.n_pos - 2
        resid = model.input_embeddings(inputs)
        parts = [
            model(each, start_at_layer=0, past_kv_cache=cache)
            for each in (resid[:, :at], resid[:, at:])
        ]
        found["after a cache"] = torch.cat(parts, dim=1)
        for run, logits in found.items():
            assert torch.allclose(logits, expected, atol=TOLERANCE), (name, run)

        sites = [site for site in sites_of(model) if site not in BY_HEAD]
        edits = [decoder_edit(model, inputs, chance, chance.choice(sites)) for _ in range(4)]
        edits += [Intervention("resid_pre", 0, [1], scale(1.5))]  # through every layer
        branches = [[each] for each in edits]
        runs = torch.stack([plain_run(merged, inputs, branch)[:, -1:] for branch in branches])
        of_branches = model.record(inputs).run(branches, lambda logits: logits)
        assert torch.allclose(of_branches, runs, atol=TOLERANCE), name
