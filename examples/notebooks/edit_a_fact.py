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
# other words, of other images, and ask other things; take the change back.

# %%
from mmlens import HookedMultimodalTransformer, causal_trace, demo_questions, multedit, swap_span
from mmlens.editing import MultEditSettings

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
# With no further argument, `multedit` edits the place where the answer is computed, in a late layer, and
# keeps the answers to references: the same question about other flags, other questions about this one, unrelated
# questions. The keys of the references are computed once and kept on disk.

# %%
edit = multedit(model, inputs, "Madrid")
edit.metadata["layer"], edit.metadata["references"]

# %% [markdown]
# ## What else changed
#
# A third of the references is held out: the edit was not told of them. The check asks them before and after.

# %%
check = edit.check()
print(check.warning or "no warning")
check.summary()

# %%
check.to_dataframe().query("changed")

# %%
check.plot()

# %% [markdown]
# Ask something of your own:

# %%
asked = {
    "the question": inputs,
    "in other words": prepared("Italy", "capital", "This country's capital is the city of"),
    "another question": prepared("Italy", "language"),
    "another flag": prepared("Japan", "capital"),
}
before = {name: model.generate(each, max_new_tokens=3) for name, each in asked.items()}


def show(edit):
    with edit.applied(model):
        for name, each in asked.items():
            after = model.generate(each, max_new_tokens=3)
            print(f"{name:18} {before[name]!r:18} -> {after!r}")


show(edit)

# %% [markdown]
# ## The paper's setting
#
# One key, at the last word of the constraint in an early layer, and nothing else is kept. The key, read at the word
# "country", hardly depends on the flag, so what this edit adds reaches other flags as well.

# %%
paper = multedit(model, inputs, "Madrid", settings=MultEditSettings.paper())
show(paper)

# %% [markdown]
# ## Taken back
#
# After the `with` the weights are what they were, bit by bit. An edit is a small file, which only the model
# that it was made for accepts.

# %%
assert model.generate(inputs, max_new_tokens=3) == before["the question"]
edit.save("madrid.safetensors")
