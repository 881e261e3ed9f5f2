"""Every name of TransformerLens is here, or says why not; its names of hook points lead to ours.

With whichever version is installed: `make test-tl39` runs this with 3.9.
"""

from __future__ import annotations

import copy
import importlib.util
import pickle
from functools import partial
from importlib.metadata import version
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import torch
import transformer_lens
from random_models import SHAPES, hooked, random_language_model, random_llava, random_prompts
from small_models import language_model, small_inputs, small_model
from test_transformer_lens_parity import bridge_of
from transformer_lens.model_bridge import TransformerBridge

from mmlens import HookedMultimodalTransformer
from mmlens.model.hook_aliases import is_after_weights, our_name, related_name
from mmlens.utils.transformer_lens_names import ARGUMENTS, REFUSALS, RefusedError

DOCS = Path(__file__).parent.parent / "docs"
PAGE = DOCS / "transformer-lens.md"


def refused_now(kind: Any) -> set[str]:
    """What is refused with the installed TransformerLens, whose cache may have more."""
    inherited = dir(transformer_lens.ActivationCache) if kind == "cache" else ()
    return set(REFUSALS[kind]) - set(inherited)


@pytest.fixture(scope="module")
def tables() -> Any:
    """The script that makes the tables."""
    spec = importlib.util.spec_from_file_location("made", DOCS / "make_transformer_lens_table.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_no_name_is_unaccounted_for(tables: Any) -> None:
    assert {kind: names for kind, names in tables.unaccounted().items() if names} == {}


def test_nothing_is_refused_that_is_there(tables: Any) -> None:
    here = tables.ours()
    for kind in REFUSALS:
        assert not refused_now(kind) & here[kind], kind


def test_the_committed_tables_are_what_the_script_makes(tables: Any) -> None:
    page, installed = PAGE.read_text(encoding="utf-8"), version("transformer_lens")
    if f"Made with TransformerLens {installed}." not in page:
        pytest.skip(f"the page was made with another TransformerLens than {installed}")
    assert tables.with_tables(page) == page, "run docs/make_transformer_lens_table.py"


def test_a_refused_name_says_why(seed: int) -> None:
    model = small_model(seed, n_layers=1)
    _, cache = model.run_with_cache(small_inputs(model, seed))
    owners = {"model": [model, type(model)], "cache": [cache], "config": [model.cfg]}
    for kind, reasons in REFUSALS.items():
        for name in refused_now(kind):
            reason = reasons[name]
            for owner in owners[kind]:
                assert not hasattr(owner, name)
                assert getattr(owner, name, None) is None
                with pytest.raises(NotImplementedError) as caught:
                    getattr(owner, name)
                assert isinstance(caught.value, AttributeError)
                assert reason in str(caught.value) and name in str(caught.value)
    assert cache.ssm_layers() == []
    with pytest.raises(RuntimeError, match="No SSM mixer layers"):
        cache.compute_ssm_state()
    for owner in (model, type(model), cache, model.cfg):
        with pytest.raises(AttributeError, match="no attribute 'nonsense'") as plain:
            owner.nonsense  # noqa: B018
        assert not isinstance(plain.value, RefusedError)


def test_refusals_do_not_stand_in_the_way_of_copies(seed: int) -> None:
    model = small_model(seed, n_layers=1)
    inputs = small_inputs(model, seed)
    assert torch.equal(copy.deepcopy(model)(inputs), model(inputs))
    assert pickle.loads(pickle.dumps(model.cfg)) == model.cfg == copy.copy(model.cfg)
    _, cache = model.run_with_cache(inputs)
    assert torch.equal(copy.copy(cache)["resid_post", 0], cache["resid_post", 0])


def test_arguments_that_ask_for_nothing(seed: int, tmp_path: Path) -> None:
    """`fold_ln=False` is what is done; what is not is refused before anything is read."""
    hf = random_language_model(SHAPES["grouped queries"])
    harmless = {name: values[0] for name, (values, _) in ARGUMENTS["from_pretrained"].items()}
    model = hooked(hf, tmp_path, **harmless)
    assert torch.equal(model.W_E, hf.get_input_embeddings().weight)
    again = HookedMultimodalTransformer.from_pretrained_no_processing(tmp_path, device="cpu")
    assert torch.equal(again.W_U, model.W_U)
    tokens = torch.tensor([[5, 6, 7]])
    calls = {
        "from_pretrained": partial(HookedMultimodalTransformer.from_pretrained, "nowhere"),
        "forward": partial(model.run_with_hooks, tokens),
    }
    for function, call in calls.items():
        for name, (_, reason) in ARGUMENTS[function].items():
            with pytest.raises(NotImplementedError) as caught:
                call(**{name: 2})
            assert f"{name}=2" in str(caught.value) and reason in str(caught.value)
        with pytest.raises(TypeError, match="unexpected keyword argument 'fold_nl'"):
            call(fold_nl=True)
        with pytest.raises(TypeError, match="'nonsense'; it takes .*device|input, return_type"):
            call(nonsense=1)
    harmless = {name: values[0] for name, (values, _) in ARGUMENTS["forward"].items()}
    assert torch.equal(model.run_with_hooks(tokens, **harmless), model(tokens))


FORWARD_OF_39 = (
    "input return_type loss_per_token prepend_bos padding_side start_at_layer tokens "
    "shortformer_pos_embed attention_mask stop_at_layer past_kv_cache"
).split()
"""Parameters of `HookedTransformer.forward` in TransformerLens 3.9."""


def test_every_argument_of_forward_is_taken_or_refused(seed: int) -> None:
    """The first three in the order that 3.9 and 4 have them in."""
    theirs = [each for each in signature(TransformerBridge.forward).parameters if each != "self"]
    if (old := getattr(transformer_lens, "__dict__", {}).get("HookedTransformer")) is not None:
        assert list(signature(old.forward).parameters)[1:] == FORWARD_OF_39
    taken = list(signature(HookedMultimodalTransformer.forward).parameters)[1:]
    for names in (theirs, FORWARD_OF_39):
        assert set(names) - {"kwargs"} <= {*taken, *ARGUMENTS["forward"]}
        assert names[:3] == taken[:3]
    model = small_model(seed, n_layers=1)
    tokens = torch.tensor([[5, 6, 7]])
    _, loss = model(tokens, return_type="both", loss_per_token=True)
    for call in (model, model.forward, model.run_with_hooks):
        assert torch.equal(call(tokens, "loss", True), loss)
    assert torch.equal(model.run_with_cache(tokens, "loss", True)[0], loss)
    with pytest.raises(TypeError, match="'start_layer'; did you mean start_at_layer"):
        model(tokens, start_layer=0)
    model.forward = partial(model.forward)  # as accelerate puts one in its place
    with pytest.raises(NotImplementedError, match=r"forward\(tokens="):
        model(tokens, tokens=tokens)


# The config


def test_the_config_tells_what_tools_ask(seed: int) -> None:
    model = small_model(seed, gated_mlp=True)
    cfg = model.cfg
    matrices = [
        getattr(block.attn, name).numel() for block in model.blocks for name in ("W_Q", "W_O")
    ] * 2  # keys and values count as often as queries
    matrices += [
        getattr(block.mlp, name).numel()
        for block in model.blocks
        for name in ("W_in", "W_gate", "W_out")
    ]
    assert cfg.n_params == sum(matrices)
    assert model.n_params_total == sum(parameter.numel() for parameter in model.parameters())
    assert (cfg.d_vocab_out, cfg.head_dim, cfg.is_multimodal) == (cfg.d_vocab, cfg.d_head, True)
    tower = cfg.vision
    assert (cfg.vision_hidden_size, cfg.vision_num_layers) == (tower.d_model, tower.n_layers)
    assert cfg.vision_num_heads == tower.n_heads
    assert cfg.mm_tokens_per_image == tower.n_visual_tokens
    assert cfg.uses_rms_norm == (cfg.normalization_type == "RMS")
    assert cfg.attention_dir == "causal" and tower.attention_dir == "bidirectional"
    assert cfg.to_dict()["d_model"] == cfg.d_model
    alone = language_model(seed, attn_types=("local", "global"), n_layers=2, window_size=3).cfg
    assert alone.use_local_attn and not cfg.use_local_attn
    assert not alone.is_multimodal and alone.vision_num_layers is alone.mm_tokens_per_image is None


# Hook points


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (random_llava, "biases"),
        (random_language_model, "grouped queries"),
        (random_language_model, "phi"),
    ],
)
def test_names_of_the_bridge_lead_to_the_same_numbers(
    make: Any, name: str, seed: int, tmp_path: Path
) -> None:
    hf = make(SHAPES[name])
    model = hooked(hf, tmp_path)
    prompts = random_prompts(hf.config, images=[int(make is random_llava)], words=[5])
    given = prompts.for_hf()
    tokens = given.pop("input_ids")
    with torch.no_grad():
        _, theirs = bridge_of(copy.deepcopy(hf)).run_with_cache(tokens, **given)
        _, ours = model.run_with_cache(prompts.for_mmlens(model), names_filter=lambda name: True)
    compared = 0
    for bridges, value in theirs.items():
        known = model.hook_dict
        same, related = our_name(bridges, known), related_name(bridges, known)
        if bridges in known or (same or related) is None:
            continue
        if bridges.startswith("vision_encoder") and bridges.endswith("hook_attn_scores"):
            continue  # the bridge's are weights, not scores
        here = ours[same or related]
        if same is None and is_after_weights(bridges, related):
            norm = model.get_submodule(related.rsplit(".", 1)[0])
            here = here * norm.w + getattr(norm, "b", 0)
        assert here.shape == value.shape, bridges
        # Of one layer or two: rounding of float32 on activations of order 10.
        torch.testing.assert_close(here, value, atol=1e-3, rtol=1e-3, msg=bridges)
        compared += 1
    assert compared > 20


def test_names_of_the_bridge_are_accepted(seed: int) -> None:
    model = small_model(seed, n_layers=2, gated_mlp=True)
    inputs = small_inputs(model, seed)
    _, cache = model.run_with_cache(inputs)
    for theirs, ours in [
        ("blocks.1.hook_in", "blocks.1.hook_resid_pre"),
        ("blocks.0.hook_out", "blocks.0.hook_resid_post"),
        ("blocks.1.attn.v.hook_out", "blocks.1.attn.hook_v"),
        ("blocks.1.attn.o.hook_in", "blocks.1.attn.hook_z"),
        ("blocks.1.mlp.gate.hook_out", "blocks.1.mlp.hook_pre"),
        ("blocks.1.mlp.in.hook_out", "blocks.1.mlp.hook_pre_linear"),
        ("blocks.1.mlp.out.hook_in", "blocks.1.mlp.hook_post"),
        ("blocks.1.attn.hook_q_input", "blocks.1.hook_q_input"),
        ("embed.hook_out", "hook_embed"),
        ("vision_encoder.encoder_layers.1.hook_in", "vision.blocks.1.hook_resid_pre"),
    ]:
        fired: list[str] = []

        def empty(activation: Any, hook: Any, fired: list[str] = fired) -> Any:
            fired.append(hook.name)
            return torch.zeros_like(activation)

        for name in (theirs, ours):
            pairs = [(name, empty)]
            edited = model.run_with_hooks(inputs, fwd_hooks=pairs)
            with model.hooks(fwd_hooks=pairs):
                assert torch.equal(model(inputs), edited)
            model.add_hook(*pairs[0])
            assert torch.equal(model(inputs), edited)
            model.reset_hooks()
        assert set(fired) == {ours}
        _, one = model.run_with_cache(inputs, names_filter=[theirs])
        assert list(one.keys()) == [ours]
        torch.testing.assert_close(one[theirs], one[ours])
        if not ours.endswith("hook_q_input"):
            assert cache[theirs] is cache[ours]
        assert model.get_hook_point(theirs) is model.get_hook_point(ours) is model.hook_dict[ours]
    plain = small_model(seed, n_layers=2, gated_mlp=False)
    assert plain.get_hook_point("blocks.0.mlp.in.hook_out") is plain.blocks[0].mlp.hook_pre
    assert plain.get_hook_point("blocks.0.mlp.hook_in") is None


@pytest.mark.parametrize(
    ("name", "says"),
    [
        (
            "blocks.0.mlp.hook_out",
            "what TransformerLens 4 calls so is 'blocks.0.hook_mlp_out' here",
        ),
        ("blocks.0.attn.hook_out", "'blocks.0.hook_attn_out' here"),
        ("blocks.1.ln2.hook_in", "'blocks.1.hook_resid_mid' here"),
        ("blocks.1.mlp.hook_in", "'blocks.1.ln2.hook_normalized' times the norm's weights"),
        ("ln_final.hook_out", "'ln_final.hook_normalized' times the norm's weights"),
        ("vision_encoder.encoder_layers.0.hook_attn_out", "'vision.blocks.0.hook_attn_out' here"),
        ("vision_projector.hook_out", "'projector.hook_out' here"),
        ("hook_pos_embed", "positions are rotary"),
        ("rotary_emb.hook_cos", "positions are rotary"),
        ("hook_tokens", "tokens have no hook point"),
        ("unembed.hook_out", "the run returns them"),
        ("blocks.0.hook_resid_pots", "nearest are blocks.0.hook_resid_post"),
        ("blocks.7.hook_in", "nearest are"),
        ("mlp.hook_out", "block is missing: 'blocks.0.hook_mlp_out'"),
        ("hook_resid_pre", "block is missing: 'blocks.0.hook_resid_pre'"),
    ],
)
def test_other_names_say_what_is_meant(name: str, says: str, seed: int) -> None:
    model = small_model(seed, n_layers=2, parallel_attn_mlp=False)
    inputs = small_inputs(model, seed)
    for use in (
        lambda: model.run_with_hooks(inputs, fwd_hooks=[(name, lambda x, hook: None)]),
        lambda: model.run_with_cache(inputs, names_filter=name),
        lambda: model.add_hook(name, lambda x, hook: None),
    ):
        with pytest.raises(KeyError) as caught:
            use()
        assert says in str(caught.value) and repr(name) in str(caught.value)
    assert not model.list_hooks() and model.get_hook_point(name) is None
