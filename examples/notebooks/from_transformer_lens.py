# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
#   kernelspec: {display_name: Python 3, language: python, name: python3}
# ---

# %% [markdown]
# # From TransformerLens to mmlens
#
# `HookedMultimodalTransformer` is a `HookedRootModule` of TransformerLens, with its names of hooks, weights
# and methods. Everything below runs with TransformerLens 3.9 and with 4.3; each difference that the last
# table lists is measured in a cell before it.

# %%
from importlib.metadata import version

import torch
import transformer_lens
from transformer_lens import HookedRootModule, patching
from transformer_lens.utilities import test_prompt

from mmlens import HookedMultimodalTransformer, causal_trace, demo_questions, swap_span

model = HookedMultimodalTransformer.from_pretrained("demo")
assert isinstance(model, HookedRootModule)
print("TransformerLens", version("transformer_lens"))

# %% [markdown]
# ## The same
#
# Text alone, names of hooks, caches, weights.

# %%
tokens = model.to_tokens("The capital of Italy is the city of")
logits, cache = model.run_with_cache(tokens)
print(model.to_string(logits[0, -1].argmax().reshape(1)))
print(cache["resid_post", -1].shape, cache["pattern", 23].shape, model.W_Q.shape, model.OV.shape)

# %% [markdown]
# The parts of the residual stream, through the final norm, onto the direction of a token: they add up to its
# logit. (Without folded weights they do not in TransformerLens; see below.)

# %%
rome = model.to_single_token(" Rome")
parts, labels = cache.decompose_resid(return_labels=True, pos_slice=-1)
normalized = cache.apply_ln_to_stack(parts, pos_slice=-1)
by_part = normalized[:, 0] @ model.tokens_to_residual_directions(rome)
assert torch.allclose(by_part.sum(), logits[0, -1, rome], atol=1e-3)
print(f"logit {logits[0, -1, rome]:.3f}, sum of {len(parts)} parts {by_part.sum():.3f}")
sorted(zip(by_part.tolist(), labels, strict=True), reverse=True)[:5]


# %%
def no_heads(z, hook):
    return torch.zeros_like(z)


with model.hooks(fwd_hooks=[("blocks.23.attn.hook_z", no_heads)]):
    print(model.to_string(model(tokens)[0, -1].argmax().reshape(1)))

# %% [markdown]
# ## New: an image
#
# `prepare` takes the place of `to_tokens`. A visual token is a position like any other, so hooks and caches
# need no offsets.

# %%
question = next(q for q in demo_questions(relation="capital") if q.subject == "Italy")
inputs = model.prepare(question.prompt(), question.open_images(), spans=question.spans())
logits, cache = model.run_with_cache(inputs)
assert cache["resid_post", 0].shape[1] == inputs.n_pos
print(model.to_string(logits[0, -1].argmax().reshape(1)), inputs.labels()[-4:])

# %% [markdown]
# TransformerLens's own tools take such inputs in the place of tokens.

# %%
test_prompt(inputs, " Rome", model, top_k=3)

# %%
last = int(inputs.span("last")[0])
corrupted = swap_span(model, inputs, "constraint", "Paris")


def probability(logits):
    return logits[0, last].softmax(-1)[rome]


first = int(inputs.span("constraint")[0])
one_layer = patching.make_df_from_ranges([1, inputs.n_pos], ["layer", "pos"]).iloc[first:]
with torch.no_grad():
    by_tool = patching.get_act_patch_resid_pre(
        model, corrupted, cache, probability, index_axis_names=None, index_df=one_layer
    )
by_tool

# %% [markdown]
# ## New: patching that does not run the model again for each cell
#
# `patching.get_act_patch_*` runs the model once per cell. `causal_trace` computes the same numbers in one
# pass that shares what the cells have in common.

# %%
trace = causal_trace(
    model, inputs, corrupted, sites=("resid_pre", "attn_out", "mlp_out"), answer=rome
)
assert torch.allclose(trace.restored[0, :, 0], by_tool, atol=1e-5)
trace.indirect_effect.shape  # [site, position, layer]

# %% [markdown]
# ## Where they differ
#
# A random Llama, opened by mmlens, by TransformerLens's bridge and (in version 3) by its HookedTransformer.

# %%
import copy
import tempfile

from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=60, hidden_size=24, intermediate_size=40, num_hidden_layers=3,
    num_attention_heads=4, num_key_value_heads=2, head_dim=6, max_position_embeddings=64,
)  # fmt: skip
hf = LlamaForCausalLM(config).eval()
for name, weight in hf.named_parameters():
    torch.nn.init.normal_(weight, mean=float("norm" in name), std=0.4)
folder = tempfile.mkdtemp()
hf.save_pretrained(folder)
llama = HookedMultimodalTransformer.from_pretrained(folder, device="cpu")


def new_bridge():
    return build_bridge_from_module(copy.deepcopy(hf), "LlamaForCausalLM", hf_config=config)


def new_hooked_transformer(folded):
    """TransformerLens 3 alone."""
    from transformer_lens.pretrained.weight_conversions import convert_llama_weights

    cfg = transformer_lens.HookedTransformerConfig(
        n_layers=3, d_model=24, n_ctx=64, d_head=6, n_heads=4, n_key_value_heads=2, d_mlp=40,
        d_vocab=60, act_fn="silu", normalization_type="RMS", eps=config.rms_norm_eps,
        gated_mlp=True, positional_embedding_type="rotary", rotary_dim=6, final_rms=True,
        rotary_base=10000, rotary_adjacent_pairs=False,
    )  # fmt: skip
    made = transformer_lens.HookedTransformer(cfg)
    processing = dict.fromkeys(
        ("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases"), folded
    )
    made.load_and_process_state_dict(convert_llama_weights(hf, cfg), **processing)
    return made


bridge, folded_bridge = new_bridge(), new_bridge()
folded_bridge.enable_compatibility_mode(disable_warnings=True)
others = {"bridge": bridge, "bridge, folded": folded_bridge}
if version("transformer_lens").startswith("3."):
    others["HookedTransformer, not folded"] = new_hooked_transformer(False)
    others["HookedTransformer"] = new_hooked_transformer(True)
torch.set_grad_enabled(False)
prompt = torch.randint(1, 60, (1, 7))
runs = {name: other.run_with_cache(prompt) for name, other in others.items()}
logits, cache = llama.run_with_cache(prompt)

# %% [markdown]
# **Weights.** Folding moves every logit of a position by the same number, so probabilities stay.


# %%
def close(a, b):
    return torch.allclose(a, b, atol=1e-4)


for name, other in others.items():
    same = close(runs[name][0], logits)
    likely = close(runs[name][0].log_softmax(-1), logits.log_softmax(-1))
    print(f"{name}: same logits {same}, same probabilities {likely}, W_K {tuple(other.W_K.shape)}")
    folded = name in ("bridge, folded", "HookedTransformer")
    assert likely and same is not folded and close(other.W_U, llama.W_U) is not folded
    repeated = name.startswith("HookedTransformer")
    assert other.W_K.shape[1] == (4 if repeated else 2)
print("mmlens:", tuple(llama.W_K.shape))
assert llama.W_K.shape[1] == 2

# %% [markdown]
# **The usual idiom of logit attribution.** What the final norm's weights do must be somewhere: in `W_U` where
# they are folded, in `apply_ln_to_stack` in mmlens. With weights that are not folded TransformerLens has them
# nowhere, and the sum is not the logit.


# %%
def attributed(model, cache, token=5):
    parts = cache.apply_ln_to_stack(cache.decompose_resid(pos_slice=-1), pos_slice=-1)
    return (parts[:, 0] @ model.tokens_to_residual_directions(token)).sum()


for name, other in others.items():
    there, found = runs[name]
    total, logit = attributed(other, found), there[0, -1, 5]
    print(f"{name}: sum of the parts {total:.4f}, logit {logit:.4f}")
    assert close(total, logit) is (name in ("bridge, folded", "HookedTransformer"))
print(f"mmlens: sum of the parts {attributed(llama, cache):.4f}, logit {logits[0, -1, 5]:.4f}")
assert close(attributed(llama, cache), logits[0, -1, 5])

# %% [markdown]
# **What a cache holds, and under which names.**

# %%
for name, other in others.items():
    print(f"{name}: {len(other.hook_dict)} names, {len(runs[name][1].keys())} cached by default")
print(f"mmlens: {len(llama.hook_dict)} names, {len(cache.keys())} cached by default")
assert "blocks.0.hook_in" in bridge.hook_dict and "blocks.0.hook_in" not in llama.hook_dict
assert cache["blocks.0.hook_in"] is cache["resid_pre", 0]  # the bridge's name is understood
assert not any(name.endswith("hook_result") for name in cache)
llama.set_use_attn_result(True)
assert "blocks.0.attn.hook_result" in llama.run_with_cache(prompt)[1]
llama.set_use_attn_result(False)

# %% [markdown]
# **Hooks on what is large.** The bridge wants to be told first; HookedTransformer runs, and the hook does
# not fire. Here a hook always does.

# %%
hooks = [("blocks.1.attn.hook_result", lambda result, hook: torch.zeros_like(result))]
for name, other in others.items():
    try:
        unchanged = close(other.run_with_hooks(prompt, fwd_hooks=hooks), runs[name][0])
        print(f"{name}: the hook {'does nothing' if unchanged else 'works'}")
        assert unchanged and name.startswith("HookedTransformer")
    except (ValueError, AssertionError) as error:
        print(f"{name}: {error}")
assert not close(llama.run_with_hooks(prompt, fwd_hooks=hooks), logits)

# %% [markdown]
# **`hook_resid_mid`.** In the bridge it is another name of `ln2.hook_in`: an edit changes what the MLP reads,
# and not the residual stream. Here, as in HookedTransformer, it is the stream; what the MLP alone reads is
# `hook_mlp_in`.

# %%
hooks = [("blocks.1.hook_resid_mid", lambda resid, hook: resid * 0.5)]
edited = llama.run_with_hooks(prompt, fwd_hooks=hooks)
for name, other in others.items():
    there = other.run_with_hooks(prompt, fwd_hooks=hooks)
    agree = close(there.log_softmax(-1), edited.log_softmax(-1))
    print(f"{name}: as in mmlens {agree}")
    assert agree is name.startswith("HookedTransformer")

# %% [markdown]
# **Masked scores.** Minus infinity here, in HookedTransformer and in a folded bridge.

# %%
for name, (_, found) in runs.items():
    print(f"{name}: {found['attn_scores', 0][0, 0, 0, -1]}")
print(f"mmlens: {cache['attn_scores', 0][0, 0, 0, -1]}")
assert cache["attn_scores", 0][0, 0, 0, -1].isneginf()

# %% [markdown]
# **Biases that a model has not.** Zeros here and in HookedTransformer, an error in the bridge.

# %%
assert not llama.b_Q.any()
for name, other in others.items():
    try:
        print(f"{name}: b_Q is {'zero' if not other.b_Q.any() else 'not zero'}")
    except (AttributeError, TypeError) as error:
        print(f"{name}: {error}")
        assert name.startswith("bridge")

# %% [markdown]
# **A name that is not here** says why, and what to do; [a page](../../docs/transformer-lens.md) lists them all.

# %%
for name in ("enable_compatibility_mode", "W_pos", "original_model"):
    assert not hasattr(llama, name)
    try:
        getattr(llama, name)
    except AttributeError as error:
        print(error)
try:
    HookedMultimodalTransformer.from_pretrained(folder, fold_ln=True)
except NotImplementedError as error:
    print(error)

# %% [markdown]
# | | HookedTransformer 3.9 | bridge of 3.9 and 4.3 | mmlens |
# |---|---|---|---|
# | weights | folded and centred unless told otherwise | as published; `enable_compatibility_mode()` folds | as published, always |
# | the idiom of logit attribution gives the logit | if folded | if folded | yes |
# | `W_K`, `W_V` | one for each query head | one for each key-value head | one for each key-value head |
# | `tl_parameters()["...W_K"]`, `QK`, `OV` | one for each query head | one for each query head | one for each query head |
# | names of an activation | one | two for many | one; the bridge's second names are understood where they mean the same |
# | `attn.hook_result` and heads' inputs | after `set_use_...(True)`; before, hooks on them are ignored | after `set_use_...(True)`; before, an error | always; cached where named, or after `set_use_...(True)` |
# | an edit of `hook_resid_mid` | changes the residual stream | changes what the MLP reads | changes the residual stream |
# | masked scores | minus infinity | the lowest number of the type; folded, minus infinity | minus infinity |
# | biases that the model has not | zeros | an error | zeros |
# | attention is written down | always | always | where something listens to it |
# | a prompt | tokens | tokens | tokens, pixels and named spans |
