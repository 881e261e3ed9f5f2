# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
#   kernelspec: {display_name: Python 3, language: python, name: python3}
# ---

# %% [markdown]
# # From TransformerLens to mmlens
#
# `HookedMultimodalTransformer` is a `HookedRootModule` of TransformerLens. What you know works as it did;
# this page shows that, and what is new.

# %%
import torch
from transformer_lens import HookedRootModule

from mmlens import HookedMultimodalTransformer, causal_trace, demo_questions, swap_span

model = HookedMultimodalTransformer.from_pretrained("demo")
assert isinstance(model, HookedRootModule)

# %% [markdown]
# ## The same
#
# Text alone, names of hooks, caches, weights.

# %%
tokens = model.to_tokens("The capital of Italy is the city of")
logits, cache = model.run_with_cache(tokens)
print(model.to_string(logits[0, -1].argmax().reshape(1)))
print(cache["resid_post", -1].shape, cache["pattern", 23].shape, model.W_Q.shape, model.W_U.shape)

# %%
directions = model.tokens_to_residual_directions(model.to_tokens(" Rome", prepend_bos=False)[0])
parts, labels = cache.decompose_resid(mode="all", return_labels=True, pos_slice=-1)
normalized = cache.apply_ln_to_stack(parts, pos_slice=-1)
by_part = (normalized[:, 0] @ directions.flatten()).tolist()
sorted(zip(by_part, labels, strict=True), reverse=True)[:5]


# %%
def no_heads(z, hook):
    return torch.zeros_like(z)


with model.hooks(fwd_hooks=[("blocks.23.attn.hook_z", no_heads)]):
    print(model.to_string(model(tokens)[0, -1].argmax().reshape(1)))

# %% [markdown]
# ## New: a picture
#
# `prepare` in the place of `to_tokens`. A visual token is a position like any other, so hooks and caches
# need no offsets, and sweeps do not lose the picture.

# %%
question = next(q for q in demo_questions(relation="capital") if q.subject == "Italy")
inputs = model.prepare(question.prompt(), question.open_images(), spans=question.spans())
logits, cache = model.run_with_cache(inputs)
assert cache["resid_post", 0].shape[1] == inputs.n_pos
print(model.to_string(logits[0, -1].argmax().reshape(1)), inputs.labels()[-4:])

# %% [markdown]
# ## New: patching that does not run the model again for each cell
#
# In TransformerLens, `patching.get_act_patch_*` runs the model once per cell. `causal_trace` computes the
# same numbers in one pass that shares what the cells have in common.

# %%
corrupted = swap_span(model, inputs, "constraint", "Paris")
trace = causal_trace(model, inputs, corrupted, sites=("resid_pre", "attn_out", "mlp_out"))
trace.indirect_effect.shape  # [site, position, layer]

# %% [markdown]
# ## Where they differ
#
# | TransformerLens | mmlens | why |
# |---|---|---|
# | weights are folded on loading (`fold_ln`, `center_writing_weights`) | as published | numbers equal Hugging Face's |
# | `model.W_K` has a copy of each group's keys per head | one per key/value head | as the model has it |
# | `run_with_cache` keeps all there is | all but `attn.hook_result` | it is as large as all the rest |
# | attention is always written down | only where something listens | speed |
# | a prompt is tokens | tokens, pixels and named spans | pictures |
