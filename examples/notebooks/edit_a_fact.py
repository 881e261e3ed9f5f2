# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
#   kernelspec: {display_name: Python 3, language: python, name: python3}
# ---

# %% [markdown]
# # Edit a fact, and check what else changed
#
# Trace where a fact is read; change it there in the weights (MultEdit, Basu et al. 2024); ask the same in
# other words, of other pictures, and ask other things; take the change back.

# %%

from mmlens import HookedMultimodalTransformer, causal_trace, demo_questions, multedit, swap_span

model = HookedMultimodalTransformer.from_pretrained("demo")
questions = {(q.subject, q.relation): q for q in demo_questions(answered=True)}


def prepared(subject, relation, text=None):
    question = questions[subject, relation]
    return model.prepare(text or question.prompt(), question.open_images(), spans=question.spans())


inputs = prepared("Italy", "capital")
print(model.generate(inputs, max_new_tokens=3))

# %% [markdown]
# ## Where
#
# An early layer whose MLP has an effect at the constraint (layer 0 aside: it restores the word itself).

# %%
corrupted = swap_span(model, inputs, "constraint", "Paris")
trace = causal_trace(
    model, inputs, corrupted, sites=("mlp_out",), positions=[inputs.span("constraint")], window=3
)
trace.plot()

# %% [markdown]
# ## The edit
#
# The key is what the MLP's down projection reads at the last word of the constraint; the value is optimised
# through branches of one recording; the weight's update has rank one.

# %%
edit = multedit(model, inputs, "Madrid", layer=2)
edit.metadata["target"], {name: tuple(delta.shape) for name, delta in edit.deltas.items()}

# %% [markdown]
# ## What else changed

# %%
asked = {
    "the question": inputs,
    "in other words": prepared("Italy", "capital", "This country's capital is the city of"),
    "another question": prepared("Italy", "language"),
    "another flag": prepared("Japan", "capital"),
}
before = {name: model.generate(each, max_new_tokens=3) for name, each in asked.items()}
with edit.applied(model):
    after = {name: model.generate(each, max_new_tokens=3) for name, each in asked.items()}
for name in asked:
    print(f"{name:18} {before[name]!r:18} -> {after[name]!r}")

# %% [markdown]
# The edit is not specific: the key, read at the word "country", hardly depends on the flag, so other countries
# get the new answer too. `docs/editing.md` has the measurements, and what helps: keeping the values at the keys
# of other questions (`kept=keys_of(...)`).

# %% [markdown]
# ## Taken back
#
# Behind the `with` the weights are what they were, bit by bit. An edit is a small file, which only the model
# that it was made for accepts.

# %%
assert model.generate(inputs, max_new_tokens=3) == before["the question"]
edit.save("madrid.safetensors")
