"""Texts that grow while hooks act, by plain runs and by `generate`; random places for hooks."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from small_models import small_inputs, small_model
from torch import Tensor

from mmlens.inputs.multimodal_inputs import MultimodalInputs
from mmlens.interventions.functions import add, noise, replace, scale, zero

N_NEW = 4

Hooks = list[tuple[str, Any]]


def grown_plainly(
    model: Any, inputs: MultimodalInputs, hooks_at: Callable[[int], Hooks]
) -> tuple[Tensor, Tensor]:
    """Greedy tokens [row, new] and their logits [row, new, d_vocab], of plain runs.

    `hooks_at(n)` gives the hooks of the run on the first n positions.
    """
    text, chosen = inputs, []
    for _ in range(N_NEW):
        logits = model.run_with_hooks(text, fwd_hooks=hooks_at(text.n_pos))[:, -1].float()
        chosen.append(logits)
        allowed = logits.clone()
        if model.cfg.image_token_id is not None:
            allowed[:, model.cfg.image_token_id] = -torch.inf
        text = text.append(allowed.argmax(-1)[:, None])
    return text.tokens[:, inputs.n_pos :], torch.stack(chosen, dim=1)


def generated(
    model: Any, inputs: MultimodalInputs, hooks: Hooks, cached: bool, **options: Any
) -> Any:
    """The same by `generate`."""
    with model.hooks(fwd_hooks=hooks):
        out = model.generate(
            inputs,
            N_NEW,
            do_sample=False,
            stop_at_eos=False,
            use_past_kv_cache=cached,
            output_logits=True,
            **options,
        )
    return out.sequences[:, inputs.n_pos :], torch.stack(out.logits, dim=1)


def assert_same(ours: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    """The same tokens. Logits are float32 of float64 ones that differ by some 1e-13 of themselves:
    at most one step of float32 apart, of the largest one."""
    assert torch.equal(ours[0], expected[0])
    step = torch.finfo(torch.float32).eps * float(expected[1].abs().max())
    assert float((ours[1] - expected[1]).abs().max()) <= step


SITES = (
    "resid_pre resid_mid resid_post attn_out mlp_out q k v rot_q rot_k attn_scores pattern z "
    "result pre post ln1.scale ln1.normalized"
).split()
UNLAYERED = ["embed", "input_embed", "ln_final.scale", "ln_final.normalized"]
SEEING = ["vision.resid_post", "vision.pattern", "vision.embed", "projector.out"]


def random_site(chance: random.Random, model: Any) -> tuple[str, list[int] | None]:
    """A site of the model and some of its layers."""
    kinds = [SITES, SITES, UNLAYERED, SEEING]
    site = chance.choice(chance.choice(kinds))
    if site in UNLAYERED or site in ("vision.embed", "projector.out"):
        return site, None
    if site.startswith("vision."):
        return site, [chance.randrange(model.cfg.vision.n_layers)]
    if site == "resid_mid" and model.cfg.parallel_attn_mlp:
        site = "resid_post"
    n = chance.randint(1, model.cfg.n_layers)
    units = "[0]" if site in ("z", "q", "post") and chance.random() < 0.3 else ""
    return site + units, chance.sample(range(model.cfg.n_layers), n)


def random_function(chance: random.Random, site: str) -> Any:
    """Something to do there that keeps masked scores masked and norms positive.

    And patterns causal: with a weight on later keys, an early position would change as they come.
    """
    if site.endswith("scale"):
        return chance.choice([scale(0.3), add(0.7), replace(0.4)])
    if site.endswith("pattern"):
        return chance.choice([scale(-1.5), scale(0.3), zero()])
    return chance.choice(
        [scale(chance.choice([-1.5, 0.3])), zero(), add(0.7), noise(0.6, seed=chance.randrange(99))]
        + [replace(0.4)] * (not site.endswith("scores"))
    )


def doubled(seed: int, images: tuple[int, ...] = (0, 1)) -> tuple[Any, MultimodalInputs]:
    """A model in float64 and inputs for it, with left padding."""
    model = small_model(seed).double()
    inputs = small_inputs(model, seed, images=images, words=(3,) + (5,) * (len(images) - 1))
    pixels = None if inputs.pixel_values is None else inputs.pixel_values.double()
    return model, model.inputs_from_tokens(
        inputs.tokens, pixels, attention_mask=inputs.attention_mask
    )
