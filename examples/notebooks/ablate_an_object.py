# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
#   kernelspec: {display_name: Python 3, language: python, name: python3}
# ---

# %% [markdown]
# # Ablating an object
#
# Which part of an image does the answer need? A region's visual tokens get the mean of the others' embeddings,
# and random sets of as many tokens say how much of that any loss of tokens does.

# %%
import numpy as np

from mmlens import (
    HookedMultimodalTransformer,
    ablation_scan,
    attention_sinks,
    demo_questions,
    plots,
)

model = HookedMultimodalTransformer.from_pretrained("demo")
question = next(q for q in demo_questions(relation="capital") if q.subject == "Italy")
inputs = model.prepare(question.prompt(), question.open_images(), spans=question.spans())
image = inputs.images[0].image
image

# %% [markdown]
# ## A grid

# %%
grid = ablation_scan(model, inputs, "regions", "mean", regions=(4, 4), answer=question.answers[0])
print(
    f"P({grid.answer.strip()}) = {grid.baseline:.2f}; the worst loss is {float(grid.effect.min()):.2f}"
)
plots.overlay(grid.by_token(inputs), inputs, value_title="change of P(answer)")

# %% [markdown]
# ## Objects
#
# An object is a box in pixels or a mask of the image's size: here two stripes of the flag, as somebody's
# segmentation would give them.

# %%
pixels = np.asarray(image.convert("RGB")).astype(int)
red = (pixels[..., 0] > 150) & (pixels[..., 1:].max(-1) < 110)
green = (pixels[..., 1] > 90) & (pixels[..., 0] < 90)
masks = {"red stripe": red, "green stripe": green}
objects = ablation_scan(
    model, inputs, "regions", "mean", regions=masks, answer=question.answers[0], control=10, seed=1
)
table = objects.to_dataframe()
table["tokens"] = [len(region) for region in objects.regions]
table

# %% [markdown]
# `control` is the mean effect of ten random sets of as many other visual tokens. An object matters as far as its
# effect is below theirs.

# %%
for name, effect, drawn in zip(masks, objects.effect.tolist(), objects.control, strict=True):
    print(f"{name}: {effect:+.3f}; random tokens {drawn.min():+.3f} to {drawn.max():+.3f}")

# %% [markdown]
# ## Tokens that are read by everybody
#
# Some tokens receive attention for no content of theirs.

# %%
sinks = attention_sinks(model, inputs, answer=question.answers[0], draws=3)
print([sinks.labels[at] for at in sinks.sinks], "largest dimensions:", sinks.dimensions[:3])
print("P(answer) without attention to them:", round(float(sinks.values[2]), 2))
