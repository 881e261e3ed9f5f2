"""Running the model in parts, hooks that live and vanish, fused attention, writable weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from random_models import (
    PAD,
    SHAPES,
    Prompts,
    Shape,
    hooked,
    random_llama,
    random_llava,
    random_prompts,
)
from rounding import assert_same, rounded_otherwise
from slow_cases import some_fast
from torch import Tensor

from mmlens.inputs.multimodal_inputs import MultimodalInputs
from mmlens.model.components import MLP, KeyValueCache
from mmlens.model.hook_points import HookPoint
from mmlens.model.transformer import HookedMultimodalTransformer

TOLERANCE = 1e-9
"""Of a model in float64, which computes the same in two ways."""


class Case(NamedTuple):
    hf: Any
    model: Any
    prompts: Prompts
    inputs: MultimodalInputs
    logits: Tensor


@pytest.fixture
def hf_case(seed: int, tmp_path: Path) -> Case:
    """Two rows, one with two images, the other padded on the left."""
    hf = random_llava(Shape(n_layers=4))
    model = hooked(hf, tmp_path)
    prompts = random_prompts(hf.config, images=[2, 1], words=[7, 5])
    inputs = prompts.for_mmlens(model)
    with torch.no_grad():
        return Case(hf, model, prompts, inputs, model(inputs))


@pytest.fixture
def case(hf_case: Case) -> Case:
    """The same in float64; but for transformers' own model, whose norms are float32 always."""
    model, inputs = hf_case.model.double(), hf_case.inputs
    assert inputs.pixel_values is not None
    inputs = inputs.with_pixels(inputs.pixel_values.double())
    with torch.no_grad():
        return hf_case._replace(model=model, inputs=inputs, logits=model(inputs))


def far(a: Tensor, b: Tensor, real: Tensor | None = None) -> float:
    """The largest difference, over real positions where `real` is given."""
    assert a.shape == b.shape
    gap = (a - b).abs()
    return float((gap if real is None else gap[real]).max())


def assert_same_logits(ours: Tensor, hf: Any, prompts: Prompts) -> None:
    """They are transformers', at real positions."""
    given, real = prompts.for_hf(), prompts.real
    assert_same(
        ours[real],
        hf(**given).logits[real],
        lambda: rounded_otherwise(hf)(**given).logits[real],
    )


def no_hook_is_left(model: Any) -> bool:
    points = model.hook_dict.values()
    registered = any(p._forward_hooks or p._backward_hooks for p in points)
    return not registered and not model.list_hooks() and model.context_level == 0


# Every hook is alive


ALIVE = (
    "grouped queries",
    "one head",
    "biases",
    "tied",
    "several feature layers",
    "class token kept",
    "mistral, window",
    "qwen2, some windows",
    "phi, grouped queries",
    "siglip",
    "phi on siglip",
)


@some_fast(
    "name",
    {name: name for name in ALIVE},
    ["grouped queries", "biases", "qwen2, some windows", "phi, grouped queries", "siglip"],
)
def test_every_hook_is_alive(name: str, seed: int, tmp_path: Path) -> None:
    hf = random_llava(SHAPES[name])
    model = hooked(hf, tmp_path)
    inputs = random_prompts(hf.config, images=[1, 2]).for_mmlens(model)
    assert model.verify_hooks(inputs) == []
    assert no_hook_is_left(model)


def test_every_hook_of_a_language_model_is_alive(seed: int, tmp_path: Path) -> None:
    hf = random_llama()
    model = hooked(hf, tmp_path)
    inputs = random_prompts(hf.config, images=[0, 0]).for_mmlens(model)
    assert model.verify_hooks(inputs) == []


class MLPWithDeadHook(MLP):
    """Shows `hook_extra` something that nothing depends on."""

    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)
        self.hook_extra = HookPoint()

    def forward(self, x: Tensor) -> Tensor:
        self.hook_extra(x)
        return super().forward(x)


class WithDeadHooks(HookedMultimodalTransformer):
    """One hook that never fires, one whose activation is dropped, and one more inside a block."""

    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)
        self.hook_silent = HookPoint()
        self.hook_dropped = HookPoint()
        self.blocks[1].mlp = MLPWithDeadHook(cfg)
        self.setup()

    def input_embeddings(self, inputs: MultimodalInputs, visual: Tensor | None = None) -> Tensor:
        resid = super().input_embeddings(inputs, visual)
        self.hook_dropped(resid)
        return resid


def test_dead_hooks_are_found(case: Case) -> None:
    model = WithDeadHooks(case.model.cfg)
    model.load_state_dict(case.model.state_dict())
    dead = ["blocks.1.mlp.hook_extra", "hook_dropped", "hook_silent"]
    assert sorted(model.verify_hooks(case.inputs)) == dead


@pytest.mark.parametrize("where", ["last norm", "block", "tower"])
def test_hooks_of_a_model_that_gives_nan_are_not_called_live(where: str, case: Case) -> None:
    """NaN differs from itself, so that every edit would seem to change something."""
    model = case.model
    weights = {
        "last norm": model.ln_final.w,
        "block": model.blocks[1].mlp.W_out,
        "tower": model.vision.blocks[0].mlp.W_out,
    }
    weight = weights[where].data  # a view of the parameter
    weight[(0,) * weight.ndim] = torch.nan
    with pytest.raises(ValueError, match="are NaN or infinite without any edit"):
        model.verify_hooks(case.inputs)


def test_hooks_of_images_are_dead_without_images(case: Case) -> None:
    text = case.model.inputs_from_tokens(torch.tensor([[1, 8, 9, 10]]))
    dead = case.model.verify_hooks(text)
    assert dead and all(name.startswith(("vision.", "projector.")) for name in dead)


# Hooks vanish


def fail(activation: Tensor, hook: Any) -> None:
    raise RuntimeError("a user's mistake")


def nothing(activation: Tensor, hook: Any) -> None:
    return None


@pytest.mark.parametrize("name", ["blocks.1.hook_mlp_out", "vision.blocks.0.attn.hook_pattern"])
def test_an_exception_leaves_no_hook_behind(name: str, case: Case) -> None:
    model = case.model
    with pytest.raises(RuntimeError, match="a user's mistake"):
        model.run_with_hooks(case.inputs, fwd_hooks=[("hook_embed", nothing), (name, fail)])
    assert no_hook_is_left(model)
    with (
        pytest.raises(RuntimeError, match="a user's mistake"),
        model.hooks(fwd_hooks=[(name, fail)]),
    ):
        model.run_with_cache(case.inputs)
    assert no_hook_is_left(model)
    with (
        pytest.raises(RuntimeError, match="a user's mistake"),
        model.hooks(fwd_hooks=[(name, fail)]),
    ):
        model.generate(case.inputs, 3, return_type="tokens")
    assert no_hook_is_left(model)
    assert torch.equal(model(case.inputs), case.logits)


def test_an_unknown_name_leaves_no_hook_behind(case: Case) -> None:
    pairs = [("blocks.0.hook_mlp_out", nothing), ("blocks.0.hook_mpl_out", nothing)]
    with pytest.raises(KeyError):
        case.model.run_with_hooks(case.inputs, fwd_hooks=pairs)
    assert no_hook_is_left(case.model)
    with pytest.raises(KeyError):
        case.model.run_with_cache(case.inputs, names_filter=[name for name, _ in pairs])
    assert no_hook_is_left(case.model)


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("blocks.0.hook_mpl_out", "blocks.0.hook_mlp_out"),
        ("blocks.99.attn.hook_q", "blocks.0.attn.hook_q"),
        ("vision.hook_patch", "vision.hook_patch_embed"),
        ("blocks.1.attn", "blocks.1.attn.hook_"),  # a module, and no hook point
    ],
)
def test_unknown_names_raise_and_suggest(wrong: str, right: str, case: Case) -> None:
    model, inputs = case.model, case.inputs
    for attempt in (
        lambda: model.run_with_hooks(inputs, fwd_hooks=[(wrong, nothing)]),
        lambda: model.add_hook(wrong, nothing),
        lambda: model.run_with_cache(inputs, names_filter=wrong),
        lambda: model.run_with_cache(inputs, names_filter=["hook_embed", wrong]),
    ):
        with pytest.raises(KeyError) as error:
            attempt()
        assert wrong in str(error.value) and right.split(".")[-1] in str(error.value)


def test_hooks_stay_until_they_are_reset(case: Case) -> None:
    model = case.model
    model.add_hook("blocks.0.hook_mlp_out", lambda x, hook: torch.zeros_like(x))
    assert far(model(case.inputs), case.logits, case.prompts.real) > 0.01
    model.reset_hooks()
    assert no_hook_is_left(model)
    assert torch.equal(model(case.inputs), case.logits)


# Fused unless a hook may edit


@pytest.fixture
def fused_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each call of fused attention: the number of its queries."""
    calls: list[int] = []
    fused = torch.nn.functional.scaled_dot_product_attention

    def counted(query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        calls.append(query.shape[2])
        return fused(query, *args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
    return calls


def calls_of_a_run(model: Any, inputs: Any, calls: list[int], **hooks: Any) -> int:
    calls.clear()
    model.run_with_hooks(inputs, **hooks)
    return len(calls)


def test_attention_is_fused_unless_a_hook_may_edit(case: Case, fused_calls: list[int]) -> None:
    model, inputs = case.model, case.inputs
    everywhere = model.cfg.n_layers + model.cfg.vision.n_layers
    elsewhere = [
        (name, nothing)
        for name in model.hook_dict
        if not name.endswith(("hook_attn_scores", "hook_pattern"))
    ]

    def count(*names: str) -> int:
        pairs = [(name, nothing) for name in names]
        return calls_of_a_run(model, inputs, fused_calls, fwd_hooks=pairs)

    assert count() == everywhere
    assert count("blocks.2.attn.hook_pattern") == everywhere - 1
    assert count("blocks.2.attn.hook_pattern", "blocks.2.attn.hook_attn_scores") == everywhere - 1
    assert count("blocks.0.attn.hook_attn_scores", "vision.blocks.1.attn.hook_pattern") == (
        everywhere - 2
    )
    assert calls_of_a_run(model, inputs, fused_calls, fwd_hooks=elsewhere) == everywhere
    assert count() == everywhere, "and fused again when nobody listens any more"
    fused_calls.clear()
    model.run_with_cache(inputs)
    assert len(fused_calls) == everywhere, "a cache only reads"
    backward = [("blocks.1.attn.hook_pattern", nothing)]
    assert calls_of_a_run(model, inputs, fused_calls, bwd_hooks=backward) == everywhere - 1


def test_listening_changes_nothing(case: Case) -> None:
    logits, _ = case.model.run_with_cache(case.inputs, names_filter=lambda name: True)
    assert torch.equal(logits, case.logits)
    pairs = [(lambda name: True, nothing)]
    logits = case.model.run_with_hooks(case.inputs, fwd_hooks=pairs)
    assert far(logits, case.logits, case.prompts.real) < TOLERANCE


def test_a_query_cut_off_from_everything_attends_to_nothing(case: Case) -> None:
    pairs = [("blocks.1.attn.hook_attn_scores", lambda x, hook: torch.full_like(x, -torch.inf))]
    with case.model.hooks(fwd_hooks=pairs):
        _, cache = case.model.run_with_cache(case.inputs)
    assert not cache["pattern", 1].any() and not cache["z", 1].any()
    assert cache["resid_post", -1].isfinite().all()


# Some of the layers


def test_start_and_stop(case: Case) -> None:
    model, inputs, n = case.model, case.inputs, case.model.cfg.n_layers
    _, cache = model.run_with_cache(inputs, names_filter=lambda name: "resid" in name)
    entering = [*(cache["resid_pre", layer] for layer in range(n)), cache["resid_post", -1]]
    for layer in range(n + 1):
        stopped = model(inputs, stop_at_layer=layer)
        assert far(stopped, entering[layer], case.prompts.real) < TOLERANCE
        if layer < n:
            assert torch.equal(model(inputs, stop_at_layer=layer - n), stopped)
        resumed = model(stopped, start_at_layer=layer, attention_mask=inputs.attention_mask)
        assert far(resumed, case.logits, case.prompts.real) < TOLERANCE
    between = model(
        entering[1], start_at_layer=1, stop_at_layer=-1, attention_mask=inputs.attention_mask
    )
    assert far(between, entering[n - 1], case.prompts.real) < TOLERANCE
    assert torch.equal(
        model(entering[n - 1], start_at_layer=-1, attention_mask=inputs.attention_mask),
        model(entering[n - 1], start_at_layer=n - 1, attention_mask=inputs.attention_mask),
    )


def test_only_the_layers_between_run(case: Case) -> None:
    seen: list[str] = []

    def note(activation: Tensor, hook: Any) -> None:
        seen.append(hook.name)

    resid = case.model(case.inputs, stop_at_layer=1)
    everything = [(lambda name: name.endswith("hook_resid_pre"), note)]
    case.model.run_with_hooks(resid, fwd_hooks=everything, start_at_layer=1, stop_at_layer=3)
    assert seen == ["blocks.1.hook_resid_pre", "blocks.2.hook_resid_pre"]


def test_what_cannot_be_run_is_refused(case: Case) -> None:
    model, inputs = case.model, case.inputs
    resid = model(inputs, stop_at_layer=1)
    for name in ("start_at_layer", "stop_at_layer"):
        for layer in (5, -5):
            with pytest.raises(ValueError, match=rf"{name}={layer}.*4 layers"):
                model(resid if "start" in name else inputs, **{name: layer})
    with pytest.raises(ValueError, match="loss"):
        model(resid, start_at_layer=1, return_type="loss")
    with pytest.raises(ValueError, match="their own"):
        model(inputs, pixel_values=inputs.pixel_values)
    assert model(inputs, return_type=None) is None


@torch.no_grad()
def test_positions_can_be_given(hf_case: Case) -> None:
    """Any ascending ones, as transformers takes them; a common shift changes nothing."""
    model, prompts, real = hf_case.model, hf_case.prompts, hf_case.prompts.real
    steps = torch.randint(1, 3, hf_case.inputs.tokens.shape)
    positions = steps.cumsum(1)
    given = {**prompts.for_hf(), "position_ids": positions}
    logits = model(hf_case.inputs, position_ids=positions)
    assert far(logits, hf_case.logits, real) > 0.01
    assert_same(
        logits[real],
        hf_case.hf(**given).logits[real],
        lambda: rounded_otherwise(hf_case.hf)(**given).logits[real],
    )
    assert_same(
        model(hf_case.inputs, position_ids=prompts.position_ids + 11)[real],
        hf_case.logits[real],
        lambda: rounded_otherwise(model)(hf_case.inputs)[real],
    )


# Some of the positions


@pytest.mark.parametrize("listening", [False, True], ids=["fused", "patterns listened to"])
def test_chunks_equal_the_whole(listening: bool, case: Case) -> None:
    """Chunks of any size, the first of which may hold nothing but padding."""
    model, mask, n_pos = case.model, case.inputs.attention_mask, case.inputs.n_pos
    resid = model.input_embeddings(case.inputs)
    cuts = sorted(torch.randperm(n_pos - 2)[:3].add(1).tolist())
    cache = KeyValueCache(model.cfg.n_layers)
    parts = []
    hooks = [(lambda name: name.endswith("hook_pattern"), nothing)] if listening else []
    for start, stop in zip([0, *cuts], [*cuts, n_pos], strict=True):
        parts.append(
            model.run_with_hooks(
                resid[:, start:stop],
                start_at_layer=0,
                attention_mask=mask[:, start:stop],
                past_kv_cache=cache,
                fwd_hooks=hooks,
            )
        )
        assert len(cache) == stop
    assert far(torch.cat(parts, dim=1), case.logits, case.prompts.real) < TOLERANCE


def test_tokens_after_a_prompt_with_images(case: Case) -> None:
    model = case.model
    cache = KeyValueCache(model.cfg.n_layers)
    more = torch.randint(4, 60, (2, 5))
    whole = model(case.inputs.append(more))
    first = model(case.inputs, past_kv_cache=cache)
    second = model(more[:, :1], past_kv_cache=cache)
    third = model(more[:, 1:], past_kv_cache=cache)
    parts = torch.cat([first, second, third], dim=1)
    real = torch.nn.functional.pad(case.prompts.real, (0, 5), value=True)
    assert far(parts, whole, real) < TOLERANCE
    assert len(cache) == case.inputs.n_pos + 5


@pytest.mark.parametrize("masked", [True, False], ids=["mask given", "no mask"])
@pytest.mark.parametrize("times", [1, 3])
def test_a_frozen_prefix_serves_many_rows(masked: bool, times: int, case: Case) -> None:
    model, inputs = case.model, case.inputs
    cache = KeyValueCache(model.cfg.n_layers)
    model(inputs, past_kv_cache=cache)
    n_padded = int((~inputs.attention_mask).sum(1).max())
    split = n_padded + (inputs.n_pos - n_padded) // 2
    prefix = cache.prefix(split)
    resid = model.input_embeddings(inputs)[:, split:].repeat(times, 1, 1)
    mask = inputs.attention_mask[:, split:].repeat(times, 1) if masked else None
    for _ in range(2):  # the second time finds the prefix as it was
        logits = model(resid, start_at_layer=0, attention_mask=mask, past_kv_cache=prefix)
        expected = case.logits[:, split:].repeat(times, 1, 1)
        assert far(logits, expected) < TOLERANCE
    assert len(prefix) == split and len(cache) == inputs.n_pos
    from_layer_2 = model(
        model(inputs, stop_at_layer=2)[:, split:],
        start_at_layer=2,
        attention_mask=inputs.attention_mask[:, split:],
        past_kv_cache=prefix,
    )
    assert far(from_layer_2, case.logits[:, split:]) < TOLERANCE


def test_a_prefix_that_does_not_fit_is_refused(case: Case) -> None:
    model = case.model
    cache = KeyValueCache(model.cfg.n_layers)
    model(case.inputs, past_kv_cache=cache)
    with pytest.raises(ValueError, match=r"2 rows.*3"):
        model(torch.tensor([[5], [6], [7]]), past_kv_cache=cache.prefix(20))
    with pytest.raises(ValueError, match="prefix of 999"):
        cache.prefix(999)


def test_rows_that_share_a_prefix_of_one_row(seed: int, tmp_path: Path) -> None:
    """One padded prompt, several continuations."""
    hf = random_llama()
    model = hooked(hf, tmp_path).double()
    tokens = torch.tensor([[PAD, PAD, 1, 9, 12, 30]])
    mask = tokens != PAD
    cache = KeyValueCache(model.cfg.n_layers)
    model(tokens, attention_mask=mask, past_kv_cache=cache)
    ends = torch.randint(4, 60, (3, 4))
    together = model(ends, past_kv_cache=cache.prefix(6))
    alone = model(torch.cat([tokens[:, 2:].expand(3, -1), ends], dim=1))[:, -4:]
    assert far(together, alone) < TOLERANCE


# Weights


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("attn.W_Q", "self_attn.q_proj.weight"),
        ("attn.W_K", "self_attn.k_proj.weight"),
        ("attn.W_V", "self_attn.v_proj.weight"),
        ("attn.W_O", "self_attn.o_proj.weight"),
        ("attn.b_Q", "self_attn.q_proj.bias"),
        ("attn.b_K", "self_attn.k_proj.bias"),
        ("attn.b_V", "self_attn.v_proj.bias"),
        ("attn.b_O", "self_attn.o_proj.bias"),
        ("mlp.W_in", "mlp.up_proj.weight"),
        ("mlp.W_gate", "mlp.gate_proj.weight"),
        ("mlp.W_out", "mlp.down_proj.weight"),
        ("mlp.b_in", "mlp.up_proj.bias"),
        ("mlp.b_out", "mlp.down_proj.bias"),
    ],
)
@torch.no_grad()
def test_writing_into_a_weight_edits_the_model(
    ours: str, theirs: str, seed: int, tmp_path: Path
) -> None:
    """The same edit, made to transformers' model, gives the same logits."""
    hf = random_llava(Shape(attention_bias=True, mlp_bias=True))
    model = hooked(hf, tmp_path)
    prompts = random_prompts(hf.config, images=[1])
    before = model(prompts.for_mmlens(model))
    part, name = ours.split(".")
    view = getattr(getattr(model.blocks[1], part), name)
    view.mul_(-1.5)  # in place: negative, and of another size
    hf.model.language_model.layers[1].get_parameter(theirs).mul_(-1.5)
    after = model(prompts.for_mmlens(model))
    assert far(before, after) > 1e-3
    assert_same_logits(after, hf, prompts)
    assert torch.equal(getattr(model, name)[1], view)


@torch.no_grad()
def test_writing_into_one_head(hf_case: Case) -> None:
    """Head 4 of 6 shares the keys of heads 4 and 5 with d_head 10."""
    hf, model, prompts, inputs, before = hf_case
    model.blocks[2].attn.W_Q[4].zero_()
    model.blocks[2].attn.W_O[1, :, 3] = 2.0
    attention = hf.model.language_model.layers[2].self_attn
    attention.q_proj.weight[40:50].zero_()
    attention.o_proj.weight[3, 10:20] = 2.0
    after = model(inputs)
    assert far(before, after, prompts.real) > 1e-3
    assert_same_logits(after, hf, prompts)


@torch.no_grad()
def test_tied_embeddings_stay_tied(seed: int, tmp_path: Path) -> None:
    hf = random_llava(tied=True)
    model = hooked(hf, tmp_path)
    assert model.W_E.data_ptr() == model.W_U.data_ptr()
    model.W_U[:, 9] = 1.0
    hf.lm_head.weight[9] = 1.0
    prompts = random_prompts(hf.config, images=[1])
    assert_same_logits(model(prompts.for_mmlens(model)), hf, prompts)
    assert sum(p.numel() for p in model.parameters()) < sum(p.numel() for p in hf.parameters())
