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
)
from mmlens.plots import overlay

model = HookedMultimodalTransformer.from_pretrained("demo")
question = next(q for q in demo_questions(relation="capital") if q.subject == "Japan")
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
overlay(grid.by_token(inputs), inputs, value_title="change of P(answer)")

# %% [markdown]
# ## An object
#
# An object is a box in pixels or a mask of the image's size: here the disc of the flag, as somebody's
# segmentation would give it. `control` are ten random sets of as many other visual tokens.

# %%
pixels = np.asarray(image.convert("RGB")).astype(int)
disc = (pixels[..., 0] > 150) & (pixels[..., 1:].max(-1) < 120)
for by in ("zero", "mean"):
    scan = ablation_scan(
        model, inputs, "regions", by, regions={"disc": disc}, answer=question.answers[0], control=10
    )
    drawn, effect = scan.control[0], float(scan.effect[0])
    n = len(scan.regions[0])
    print(
        f"{by}: {n} tokens of the disc {effect:+.3f}; others {drawn.min():+.3f} to {drawn.max():+.3f}"
    )

# %% [markdown]
# An object matters as far as its effect is below that of the others. Here it is not: the demo's visual tokens do
# not each hold their own part of the flag, and any twelve of them matter as much. Without the control the disc
# would have seemed to carry the answer.

# %% [markdown]
# ## Tokens that are read by everybody
#
# Some tokens receive attention for no content of theirs.

# %%
sinks = attention_sinks(model, inputs, answer=question.answers[0], draws=3)
print([sinks.labels[at] for at in sinks.sinks], "largest dimensions:", sinks.dimensions[:3])
print("P(answer) without attention to them:", round(float(sinks.values[2]), 2))
