# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
#   kernelspec: {display_name: Python 3, language: python, name: python3}
# ---

# %% [markdown]
# # Patchscopes on visual tokens
#
# What does a visual token say? The logit lens reads it with the model's own unembedding. A Patchscope
# (Ghandeharioun et al. 2024) puts it into another prompt, and lets the model say it.

# %%
import torch

from mmlens import (
    HookedMultimodalTransformer,
    Intervention,
    demo_questions,
    logit_lens,
    token_erasure,
    word_map,
)
from mmlens.interventions.functions import transplant
from mmlens.plots import overlay
from mmlens.plots.words import plot_patch_words

torch.set_grad_enabled(False)
model = HookedMultimodalTransformer.from_pretrained("demo")
question = next(q for q in demo_questions(relation="capital") if q.subject == "Italy")
inputs = model.prepare(question.prompt(), question.open_images())
plot_patch_words(logit_lens(model, inputs, site="input_embed", positions="image"), 0)

# %% [markdown]
# The visual tokens of the embedded model were trained to spell a caption. Where the country's name should stand, the
# lens reads `<filename>`. "Italy" is more probable in this column than elsewhere, but the lens says it only after the
# last layer:

# %%
column = word_map(model, inputs, "Italy", site="input_embed").top(8, layer=0)
print("patches that say Italy most:", [inputs.grid[0, p, 2:].tolist() for p in column])
later = word_map(model, inputs, "Italy", layers=[0, 8, 16, 24, 29])
print("most of it in layers 0 ... 29:", [f"{p:.3f}" for p in later.log_probs.exp().amax(dim=1)])

# %% [markdown]
# ## The model reads its own tokens
#
# One visual token of the image, before layer 0 ... 20, takes the place of the x in a text without any image.

# %%
layers = [0, 4, 8, 12, 16, 20]
source = model.record(inputs, sites=[("resid_pre", layer) for layer in layers])


def into(prompt, layer, patch):
    x = prompt.str_tokens[0].index(" x")
    taken = transplant(source, "resid_pre", layer, patch)
    return [Intervention("resid_pre", layer, x, taken)]


repeat = model.to_inputs("cat -> cat; 135 -> 135; hello -> hello; x ->")
capital = model.to_inputs("The capital of x is the city of")
for layer in layers:
    said = [
        model.generate(prompt, 2, interventions=into(prompt, layer, column[0]))
        for prompt in (repeat, capital)
    ]
    print(f"layer {layer:2}: x is{said[0]!r}, and its capital is{said[1]!r}")

# %% [markdown]
# The token holds the country from the first layer on, where the lens finds nothing. Which patches do? One pass over
# all of them; each is a branch of the same short prompt.

# %%
rome = model.to_single_token(" Rome")
branches = [into(capital, 0, patch) for patch in inputs.span("image").tolist()]
found = model.record(capital).run(branches, lambda logits: logits[:, -1].softmax(-1)[:, rome])
figure = overlay(
    found[:, 0], inputs, value_title="P(“Rome”)", title="“The capital of x is the city of”"
)
figure.update_layout(width=480, height=400)

# %% [markdown]
# ## Does the answer need these tokens?
#
# The eight tokens that say Italy most are replaced by the mean of all visual tokens, and so are eight others, drawn
# at random twenty times.

# %%
erased = token_erasure(model, inputs, column, answer=" Rome")
erased.plot().update_layout(height=330)

# %% [markdown]
# Erasing any eight tokens takes much of the answer, so one number says little: these eight take more than any draw.

# %%
print(f"{erased.said_before!r} became {erased.said!r}; p = {erased.p_value:.3f}")
