# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
#   kernelspec: {display_name: Python 3, language: python, name: python3}
# ---

# %% [markdown]
# # Vision tower and projector
#
# The tower and the projector have the same hook points as the language model, under `vision.` and
# `projector.`, and all of them are live.

# %%
import torch

from mmlens import (
    HookedMultimodalTransformer,
    Intervention,
    causal_trace,
    demo_questions,
    swap_image,
)
from mmlens.interventions.functions import zero
from mmlens.plots import overlay

model = HookedMultimodalTransformer.from_pretrained("demo")
by_country = {q.subject: q for q in demo_questions(relation="capital")}
question, other = by_country["Italy"], by_country["France"]
clean = model.prepare(question.prompt(), question.open_images(), spans=question.spans())
names = [name for name in model.hook_dict if name.startswith(("vision.", "projector."))]
print(len(names), "hook points, for example", names[:3], names[-2:])

# %% [markdown]
# ## What the tower attends to
#
# Attention of the class token in its last block, averaged over heads, over the image.

# %%
_, cache = model.run_with_cache(clean, names_filter=lambda name: "vision" in name or "proj" in name)
last = model.cfg.vision.n_layers - 1
rows, columns = clean.images[0].grids[0]
attended_to = cache[f"vision.blocks.{last}.attn.hook_pattern"][0, :, 0, 1:].mean(0)
overlay(attended_to, clean, value_title="attention")

# %% [markdown]
# ## The visual tokens as words
#
# The projector's output lies in the space of the word embeddings: which are nearest?

# %%
visual = cache["projector.hook_out"][0]
near = (
    torch.nn.functional.normalize(visual, dim=-1)
    @ torch.nn.functional.normalize(model.W_E, dim=-1).T
)
words = [model.to_string([token]) for token in near.argmax(-1).tolist()]
for row in range(rows):
    print(" | ".join(words[row * columns : (row + 1) * columns]))

# %% [markdown]
# ## Which block of the tower tells Italy from France
#
# The corrupted run sees another flag; blocks of the tower are restored, all patches together. Position 0
# of the tower is the class token, which the language model never sees.

# %%
corrupted = swap_image(model, clean, other.open_images()[0])
patches = torch.arange(1, 1 + rows * columns)
trace = causal_trace(
    model, clean, corrupted, sites=("vision.resid_post", "vision.mlp_out"), positions=[patches]
)
print(f"P({trace.answer}) = {trace.clean:.2f}, with France's flag {trace.corrupted:.2f}")
trace.to_dataframe()

# %% [markdown]
# ## Without some visual tokens
#
# Quarters of the image, erased after the projector.

# %%
recording = model.record(clean)
answer = int(model(clean)[0, -1].argmax())
quarters = clean.tiles(2, 2)
branches = [[Intervention("input_embed", None, quarter, zero())] for quarter in quarters]
with torch.no_grad():
    left = recording.run(branches, lambda logits: logits[:, -1].softmax(-1)[:, answer])
left[:, 0]
