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
import random

from mmlens import HookedMultimodalTransformer, causal_trace, demo_questions, multedit, swap_span
from mmlens.editing import keys_of

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


def show(edit):
    with edit.applied(model):
        for name, each in asked.items():
            after = model.generate(each, max_new_tokens=3)
            print(f"{name:18} {before[name]!r:18} -> {after!r}")


show(edit)

# %% [markdown]
# The edit is not specific: the key, read at the word "country", hardly depends on the flag, so other countries
# get the new answer too.
#
# ## A more specific one
#
# The keys of other questions can be told to keep their values. And instead of one large value at one word, every
# position of the prompt can get a small one of its own: only together do they make the new answer. Layer 17 is
# where this was tried; `docs/editing.md` has the numbers.

# %%
others = [key for key in questions if key[0] not in ("Italy", "Japan")]
others = [prepared(*key) for key in random.Random(0).sample(others, 20)]
kept = keys_of(model, others, layer=17, span=None)
edit = multedit(model, inputs, "Madrid", layer=17, positions="all", kept=kept)
show(edit)

# %% [markdown]
# ## Taken back
#
# Behind the `with` the weights are what they were, bit by bit. An edit is a small file, which only the model
# that it was made for accepts.

# %%
assert model.generate(inputs, max_new_tokens=3) == before["the question"]
edit.save("madrid.safetensors")
