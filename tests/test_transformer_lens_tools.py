"""TransformerLens's own tools drive the model, with images too: what they find equals formulas."""

from __future__ import annotations

from dataclasses import replace
from importlib.metadata import version
from typing import Any

import pytest
import torch
import transformer_lens
from small_models import language_model, picture, small_inputs, small_model, worded_model
from torch import Tensor
from transformer_lens import SVDInterpreter, patching
from transformer_lens.head_detector import detect_head
from transformer_lens.utilities import test_prompt

from mmlens import (
    HookedMultimodalTransformer,
    Intervention,
    MultimodalConfig,
    MultimodalInputs,
    causal_trace,
)
from mmlens.interventions.functions import restore
from mmlens.utils.transformer_lens_names import RefusedError

test_prompt.__test__ = False  # a function of theirs, no test


def small_language_model() -> HookedMultimodalTransformer:
    cfg = MultimodalConfig(
        n_layers=3,
        d_model=20,
        n_heads=5,
        n_key_value_heads=1,
        d_head=6,
        d_mlp=33,
        act_fn="silu",
        normalization_type="RMS",
        eps=1e-6,
        gated_mlp=True,
        d_vocab=47,
        n_ctx=64,
    )
    model = HookedMultimodalTransformer(cfg)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return model


def test_a_patching_sweep_of_transformer_lens_equals_a_naive_trace(seed: int) -> None:
    model = small_language_model()
    clean = torch.randint(1, 47, (1, 7))
    corrupted = clean.clone()
    corrupted[0, 2] = clean[0, 2] % 46 + 1  # another of 1 ... 46
    logits, cache = model.run_with_cache(clean)
    change = logits[0, -1].softmax(-1) - model(corrupted)[0, -1].softmax(-1)
    answer = int(change.abs().argmax())  # the token for which there is most to find

    def probability(logits: torch.Tensor) -> torch.Tensor:
        return logits[0, -1].softmax(-1)[answer]

    with torch.no_grad():
        theirs = patching.get_act_patch_resid_pre(model, corrupted, cache, probability)
    ours = causal_trace(
        model,
        model.inputs_from_tokens(clean),
        model.inputs_from_tokens(corrupted),
        sites=["resid_pre"],
        positions=list(range(7)),
        answer=answer,
        method="naive",
    )
    torch.testing.assert_close(ours.restored[0].T, theirs, atol=1e-6, rtol=0)
    assert theirs.std() > 1e-4  # the sweep has something to find


# With an image


def image_pair(seed: int, **choices: Any) -> tuple[Any, MultimodalInputs, MultimodalInputs, Any]:
    """A model, a prompt with an image, the same with another, and the first one's activations."""
    model = small_model(seed, n_layers=2, n_heads=2, n_key_value_heads=1, **choices)
    clean = small_inputs(model, seed, words=(3,))
    corrupted = clean.with_pixels(torch.randn_like(clean.pixel_values))
    _, cache = model.run_with_cache(clean)
    return model, clean, corrupted, cache


def metric(logits: Tensor) -> Tensor:
    """Of the last position, and far from constant."""
    return logits[0, -1, 7] - logits[0, -1, 9]


SWEEPS = {
    "resid_pre": ("resid_pre", False),
    "resid_mid": ("resid_mid", False),
    "attn_out": ("attn_out", False),
    "mlp_out": ("mlp_out", False),
    "attn_head_out_by_pos": ("z", True),
    "attn_head_q_by_pos": ("q", True),
    "attn_head_v_by_pos": ("v", True),
}


@pytest.mark.parametrize("sweep", SWEEPS)
@torch.no_grad()
def test_a_patching_sweep_with_an_image(sweep: str, seed: int) -> None:
    """Each cell is a run in which our own function copies the clean activation in."""
    model, clean, corrupted, cache = image_pair(seed)
    site, by_head = SWEEPS[sweep]
    found = getattr(patching, f"get_act_patch_{sweep}")(model, corrupted, cache, metric)
    heads = range(1 if site == "v" else model.cfg.n_heads) if by_head else [None]
    for layer in range(model.cfg.n_layers):
        for position in range(clean.n_pos):
            for head in heads:
                where = site if head is None else f"{site}[{head}]"
                cell = Intervention(where, layer, [position], restore(cache))
                expected = metric(model.run_with_hooks(corrupted, fwd_hooks=cell.fwd_hooks()))
                index = (layer, position) if head is None else (layer, position, head)
                torch.testing.assert_close(found[index], expected, atol=1e-4, rtol=1e-4)
    assert found.shape[:2] == (model.cfg.n_layers, clean.n_pos)


@pytest.mark.parametrize(
    "sweep",
    [
        "attn_head_out_all_pos",
        "attn_head_pattern_all_pos",
        "attn_head_pattern_by_pos",
        "attn_head_k_all_pos",
        "block_every",
        "attn_head_all_pos_every",
    ],
)
@torch.no_grad()
def test_other_patching_sweeps_with_an_image(sweep: str, seed: int) -> None:
    """They run, and patching a run's own activations changes nothing."""
    model, _, corrupted, cache = image_pair(seed)
    function = getattr(patching, f"get_act_patch_{sweep}")
    assert function(model, corrupted, cache, metric).isfinite().all()
    logits, own = model.run_with_cache(corrupted)
    found = function(model, corrupted, own, metric)
    queries = found[:, :, 0] if sweep.endswith("every") and found.ndim == 3 else found
    padded = queries[queries != 0]  # of keys and values, which have fewer heads
    torch.testing.assert_close(padded, metric(logits).expand_as(padded), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("norm", ["RMS", "LN"])
@torch.no_grad()
def test_direct_paths(norm: str, seed: int) -> None:
    """From one head to the queries of later ones: what it writes is added to what these read."""
    sweep = getattr(patching, "get_act_patch_direct_path", None)
    if sweep is None:
        pytest.skip("it came with TransformerLens 4")
    model, _, corrupted, clean_cache = image_pair(seed, normalization_type=norm)
    _, own = model.run_with_cache(corrupted)
    found = sweep(model, corrupted, clean_cache, own, metric, 0, 1, verbose=False)
    z = clean_cache["z", 0] - own["z", 0]
    written = z[:, :, 1] @ model.blocks[0].attn.W_O[1]
    for head in range(model.cfg.n_heads):
        read = own["resid_pre", 1] + written
        block = model.blocks[1]
        wide = read - read.mean(-1, keepdim=True) if norm == "LN" else read
        scale = (wide.pow(2).mean(-1, keepdim=True) + block.ln1.eps).sqrt()
        normalized = wide / scale * block.ln1.w + (block.ln1.b if norm == "LN" else 0)
        queries = normalized @ block.attn.W_Q[head] + block.attn.b_Q[head]

        def replaced(q: Tensor, hook: Any, queries: Tensor = queries, head: int = head) -> Tensor:
            edited = q.clone()
            edited[:, :, head] = queries
            return edited

        pairs = [("blocks.1.attn.hook_q", replaced)]
        expected = metric(model.run_with_hooks(corrupted, fwd_hooks=pairs))
        torch.testing.assert_close(found[1, head], expected, atol=1e-4, rtol=1e-4)
    assert not model.cfg.use_split_qkv_input and not found[0].any()


def test_a_prompt_with_an_image_is_tried(seed: int, capsys: Any) -> None:
    model = worded_model(seed, n_layers=2)
    inputs = model.prepare("What is the capital?", picture(seed), spans={"what": "capital"})
    test_prompt(inputs, "the", model, prepend_space_to_answer=False, top_k=3)
    printed = capsys.readouterr().out
    answer = model.tokenizer("the", add_special_tokens=False)["input_ids"]
    logits = model(inputs.append(torch.tensor(answer)))[0, inputs.n_pos - 1 : -1]
    words = [model.tokenizer.decode(token) for token in answer]
    ranks = [int((row > row[token]).sum()) for row, token in zip(logits, answer, strict=True)]
    assert f"Ranks of the answer tokens: {list(zip(words, ranks, strict=True))}" in printed
    assert "Top 2th token" in printed and "<img 0,0>" in printed
    test_prompt(inputs, ["the", "is"], model, prepend_space_to_answer=False)
    assert "Performance on answer tokens" in capsys.readouterr().out


# Of inputs that stand for token ids


def test_inputs_in_the_place_of_tokens(seed: int) -> None:
    model = small_model(seed, n_layers=2)
    inputs = small_inputs(model, seed, images=(2, 0, 1))
    assert inputs.shape == inputs.tokens.shape
    assert torch.equal(inputs[1], inputs.tokens[1])
    assert torch.equal(inputs[:, -1], inputs.tokens[:, -1])
    assert inputs[1:].n_images == (0, 1) and torch.equal(inputs[1:].tokens, inputs.tokens[1:])
    assert inputs[1:2].ndim == 2 and torch.equal(inputs.cpu().tokens, inputs.tokens)
    with pytest.raises(AttributeError, match=r"mmlens.attribution_patching takes images"):
        inputs.ndim  # noqa: B018
    assert model.to_tokens(inputs) is inputs
    twice = inputs.repeat(2, 1)
    assert torch.equal(twice.tokens, inputs.tokens.repeat(2, 1)) and twice.n_images == (2, 0, 1) * 2
    logits = model(inputs)
    torch.testing.assert_close(model(twice), logits.repeat(2, 1, 1), atol=1e-4, rtol=1e-4)
    chosen = inputs.rows([2, 0, 2])
    torch.testing.assert_close(model(chosen), logits[[2, 0, 2]], atol=1e-4, rtol=1e-4)
    assert chosen.spans[0] == inputs.spans[2] or chosen.spans[0].keys() == inputs.spans[2].keys()
    assert inputs.rows([1]).pixel_values is None
    more = torch.tensor([[5, 6], [7, 8], [9, 10]])
    longer = torch.cat((inputs, more), dim=1)
    assert torch.equal(longer.tokens, torch.cat([inputs.tokens, more], dim=1))
    for wrong in (
        lambda: torch.cat((inputs, more), dim=0),
        lambda: torch.cat((more, inputs), dim=1),
        lambda: torch.stack((inputs, inputs)),
    ):
        with pytest.raises(TypeError, match=r"for all else take inputs.tokens"):
            wrong()
    with pytest.raises(IndexError, match=r"row 3.*3 row"):
        inputs.rows([0, 3])
    with pytest.raises(ValueError, match="positions cannot"):
        inputs.repeat(1, 2)
    single = small_inputs(model, seed)
    noisy = replace(single, noise=torch.randn(2, single.n_pos, model.cfg.d_model))
    with pytest.raises(ValueError, match="2 samples of noise"):
        noisy.rows([0])


def test_attribution_of_words_by_nodes(seed: int) -> None:
    """Of inputs as of their ids: a difference of activations times a gradient, row by row."""
    analysis = pytest.importorskip("transformer_lens.tools.analysis")
    model = small_model(seed, n_layers=2).requires_grad_()
    clean = small_inputs(model, seed, images=(0, 0), words=(5, 5))
    corrupted = small_inputs(model, seed + 1, images=(0, 0), words=(5, 5))

    def metric(logits: Tensor) -> Tensor:
        return logits[0, -1, 7] - logits[0, -1, 9]

    with torch.enable_grad():
        found, of_ids = (
            analysis.attribution_patch(model, *pair, metric).node_scores
            for pair in ((clean, corrupted), (clean.tokens, corrupted.tokens))
        )
    assert found == of_ids
    effects = []
    for row in range(2):
        _, before = model.run_with_cache(clean.tokens[[row]])
        delta = torch.zeros(1, clean.n_pos, model.cfg.d_model, requires_grad=True)
        with torch.enable_grad():
            logits = model.run_with_hooks(
                corrupted.tokens[[row]],
                fwd_hooks=[("blocks.1.hook_mlp_out", lambda mlp_out, hook, d=delta: mlp_out + d)],
            )
            (gradient,) = torch.autograd.grad(metric(logits), [delta])
        _, after = model.run_with_cache(corrupted.tokens[[row]])
        effects.append(((before["mlp_out", 1] - after["mlp_out", 1]) * gradient)[0].sum(-1))
    for position, expected in enumerate((effects[0] + effects[1]) / 2):
        node = next(n for n in found if (n.kind, n.layer, n.position) == ("mlp_out", 1, position))
        assert found[node] == pytest.approx(float(expected), abs=1e-4, rel=1e-4)


# Weights and lenses


@pytest.mark.parametrize(
    "choices",
    [
        {},
        {"parallel_attn_mlp": True},
        {"normalization_type": "RMS", "norm_offset": 1.0},
        {"normalization_type": "RMS", "norm_offset": 1.0, "post_norms": True},
    ],
)
def test_singular_vectors(choices: Any, seed: int) -> None:
    """Of what the MLP reads of the residual stream, so with the norm's factors (Gemma's: 1 + w).

    TransformerLens 3.9 computes in float32, where a singular vector moves by eps |A| / gap.
    """
    model = language_model(
        seed, n_layers=2, d_model=18, n_heads=6, n_key_value_heads=2, d_head=4,
        **choices,
    ).double()  # fmt: skip
    block, W_U = model.blocks[1], model.W_U
    norm = block.ln1 if model.cfg.parallel_attn_mlp else block.ln2
    matrices = {
        "w_in": block.mlp.W_in.T * norm.w,
        "w_out": block.mlp.W_out,
        "OV": block.attn.W_V[1] @ block.attn.W_O[5],  # the second group's last head
    }
    single = version("transformer_lens").startswith("3.")
    interpreter = SVDInterpreter(model.float() if single else model)
    for kind, matrix in matrices.items():
        head = 5 if kind == "OV" else None
        found = interpreter.get_singular_vectors(kind, 1, num_vectors=3, head_index=head)
        _, sizes, directions = torch.linalg.svd(matrix)
        expected = W_U.T @ directions[:3].T
        gap = (sizes[:3] - sizes[1:4]).min()
        eps = torch.finfo(found.dtype).eps
        atol = float(len(matrix) * eps * (sizes[0] / gap + 1) * W_U.norm(dim=0).max())
        torch.testing.assert_close(
            found[:, 0].abs().to(expected), expected.abs(), atol=atol, rtol=0
        )


@pytest.mark.parametrize("n_images", [0, 1])
def test_heads_are_detected(n_images: int, seed: int) -> None:
    model = small_model(seed, n_layers=2)
    inputs = small_inputs(model, seed, images=(n_images,))
    previous = torch.eye(inputs.n_pos - 1)
    wanted = torch.zeros(inputs.n_pos, inputs.n_pos)
    wanted[1:, :-1] = previous
    found = detect_head(model, inputs, wanted)
    assert torch.equal(detect_head(model, inputs, "previous_token_head"), found)
    _, cache = model.run_with_cache(inputs)
    for layer in range(2):
        patterns = cache["pattern", layer][0]
        expected = (patterns * wanted).sum((-1, -2)) / inputs.n_pos
        torch.testing.assert_close(found[layer], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("norm", ["RMS", "LN"])
def test_the_caches_own_logit_lens(norm: str, seed: int) -> None:
    model = small_model(seed, n_layers=3, normalization_type=norm, unembed_bias=True)
    inputs = small_inputs(model, seed)
    logits, cache = model.run_with_cache(inputs)
    if not hasattr(transformer_lens.ActivationCache, "logit_lens"):
        assert not hasattr(cache, "logit_lens")
        with pytest.raises(RefusedError, match=r"mmlens.logit_lens\(model, inputs\)"):
            cache.logit_lens()
        return
    lens = cache.logit_lens(targets=[7, 9], positions=None)
    assert lens.labels == ["0_pre", "1_pre", "2_pre", "final_post"]
    for layer in range(3):
        expected = model.unembed(model.ln_final(cache["resid_pre", layer]))[..., [7, 9]]
        found = lens.readout.values[layer]
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(lens.readout.values[-1], logits[..., [7, 9]], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("choices", [{"logits_scale": 0.4}, {"logits_softcap": 1.7}, {}])
def test_the_logit_lenses_scale_and_cap_as_the_model(choices: Any, seed: int) -> None:
    """Granite scales its logits, Gemma 2 caps them; a cache alone cannot be compared with them."""
    analysis = pytest.importorskip("transformer_lens.tools.analysis.logit_lens")
    model = small_model(seed, n_layers=2, normalization_type="RMS", unembed_bias=True, **choices)
    inputs = small_inputs(model, seed)
    logits, cache = model.run_with_cache(inputs)
    stream = cache["resid_pre", 1]
    normed = stream / (stream.pow(2).mean(-1, keepdim=True) + model.cfg.eps).sqrt()
    expected = normed * model.ln_final.w @ model.W_U + model.b_U
    expected = expected * choices.get("logits_scale", 1.0)
    if cap := choices.get("logits_softcap"):
        expected = cap * torch.tanh(expected / cap)
    by_cache = cache.logit_lens(positions=None)
    by_run = analysis.logit_lens(model, inputs, positions=None)
    for lens in (by_cache, by_run):
        assert lens.readout.applied_output_transform
        torch.testing.assert_close(lens.readout.values[1], expected, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(lens.readout.values[-1], logits, atol=1e-4, rtol=1e-4)
    read = analysis.logit_readout(model, stream).values
    torch.testing.assert_close(read, expected, atol=1e-4, rtol=1e-4)
