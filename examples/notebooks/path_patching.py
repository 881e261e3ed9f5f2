# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
#   kernelspec: {display_name: Python 3, language: python, name: python3}
# ---

# %% [markdown]
# # Path patching: which way the flag takes to the answer
#
# A trace says *where* the answer is, and path patching says *which way* it goes: a sender has its activation
# of another run, everything else between it and the receivers is kept, and the receivers pass on what they get.

# %%
from mmlens import HookedMultimodalTransformer, demo_questions, path_patch, swap_image
from mmlens.plots import heatmap

model = HookedMultimodalTransformer.from_pretrained("demo")
capitals = demo_questions(relation="capital", answered=True)
question, other = (next(q for q in capitals if q.subject == name) for name in ("Italy", "Japan"))
clean = model.prepare(question.prompt(), question.open_images(), spans=question.spans())
corrupted = swap_image(model, clean, other.open_images()[0])
for name, inputs in (("Italy", clean), ("Japan", corrupted)):
    print(f"{name}'s flag: {question.prompt()} -> {model.generate(inputs, 2)}")

# %% [markdown]
# ## Straight to the answer
#
# Every head of the last twelve layers at the last token, one at a time, with the value that it has for the other
# flag. What is after it is frozen, so only what it writes to the residual stream itself reaches the logits.

# %%
heads = [(f"z[{head}]", layer, clean.span("last")) for layer in range(18, 30) for head in range(9)]
pair = {"answer": question.answers[0], "contrast": other.answers[0], "metric": "logit_diff"}
direct = path_patch(model, clean, corrupted, heads, "logits", **pair)
print(f"logit difference: {direct.baseline:.1f} clean, {direct.corrupted:.1f} with the other flag")
direct.to_dataframe().nsmallest(6, "effect")

# %% [markdown]
# ## Into the heads of layer 23
#
# Layer 23 reads the flag: is it by its values, at the visual tokens, or by its queries, at the last token?
# The sender is the residual stream that enters layer 16; all of it at some positions.

# %%
image, last = clean.span("image"), clean.span("last")
senders = [
    ("resid_pre", 16, image),
    ("resid_pre", 16, clean.span("constraint")),
    ("resid_pre", 16, last),
]
for receivers in ("v", "k", "q"):
    where = last if receivers == "q" else image
    paths = path_patch(model, clean, corrupted, senders, [(receivers, 23, where)], **pair)
    effects = [round(effect, 2) for effect in paths.effect.tolist()]
    print(f"into {receivers} of layer 23, from image, constraint, last token: {effects}")

# %% [markdown]
# The same with everything free between sender and receivers (`freeze=()`): all ways into layer 23, not only the
# one along the residual stream.

# %%
free = path_patch(model, clean, corrupted, senders, [("v", 23, image)], freeze=(), **pair)
free.to_dataframe().round(2)

# %%
heatmap(
    direct.by_head()[18:],
    rows=[f"layer {layer}" for layer in range(18, 30)],
    columns=range(9),
    column_title="head",
    value_title="logit difference, change",
    title="Heads that write the answer themselves",
)
