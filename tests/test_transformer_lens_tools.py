"""TransformerLens's own tools drive the model: its patching sweeps equal ours."""

import torch
from transformer_lens import patching

from mmlens import HookedMultimodalTransformer, MultimodalConfig, causal_trace


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
