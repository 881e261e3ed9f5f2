# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
#   kernelspec: {display_name: Python 3, language: python, name: python3}
# ---

# %% [markdown]
# # Quick start
#
# The demo model sees a flag and completes a sentence about "this country". Where does the answer come
# from? Everything below runs on a laptop's CPU in about a minute.

# %%
from mmlens import HookedMultimodalTransformer, causal_trace, demo_questions, swap_span

model = HookedMultimodalTransformer.from_pretrained("demo")
question = next(q for q in demo_questions(relation="capital") if q.subject == "Italy")
question.open_images()[0]

# %% [markdown]
# `prepare` puts text and image together. Every visual token has a position of its own, and spans have
# names: nobody counts.

# %%
clean = model.prepare(question.prompt(), question.open_images(), spans=question.spans())
print(question.prompt(), "->", model.generate(clean, max_new_tokens=3))
for name in ("image", "constraint", "last"):
    positions = clean.span(name).tolist()
    print(f"{name}: positions {positions[0]} to {positions[-1]}")

# %% [markdown]
# ## What is inside
#
# `run_with_cache` keeps activations, under TransformerLens's names.

# %%
logits, cache = model.run_with_cache(clean, names_filter=["blocks.23.attn.hook_pattern"])
read_by_last = cache["pattern", 23][0, :, clean.span("last")[0], clean.span("image")]
print("attention of the last token to the image in layer 23, per head:")
print([round(weight, 2) for weight in read_by_last.sum(-1).tolist()])

# %% [markdown]
# ## Where the answer comes from
#
# The corrupted run has "Paris" in the place of "this country". Then clean activations are put back, one
# site, position and layer at a time. What that brings back of the answer's probability is the effect.

# %%
corrupted = swap_span(model, clean, "constraint", "Paris")
trace = causal_trace(model, clean, corrupted)
print(f"P({trace.answer}) = {trace.clean:.2f}, corrupted {trace.corrupted:.2f}")
trace.plot()

# %% [markdown]
# The same as a table; what counts most, without layer 0 (restoring its MLP nearly restores the word).

# %%
table = trace.to_dataframe()
table[table["layer"] > 0].nlargest(8, "indirect_effect")
