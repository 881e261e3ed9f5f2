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
import mmlens
from mmlens.interventions.functions import transplant
from mmlens.plots.words import plot_patch_words

model = mmlens.HookedMultimodalTransformer.from_pretrained("demo")
question = next(q for q in mmlens.demo_questions(relation="capital") if q.subject == "Italy")
inputs = model.prepare(question.prompt(), question.open_images())
lens = mmlens.logit_lens(model, inputs, site="input_embed", positions="image")
plot_patch_words(lens, 0).update_layout(height=295, margin={"t": 45, "b": 40})

# %% [markdown]
# The visual tokens of the embedded model were trained to spell a caption. Where the country's name should stand, the
# lens reads `<filename>`. "Italy" is most probable in that column, but the lens says it only after the last layer:

# %%
column = mmlens.word_map(model, inputs, "Italy", site="input_embed").top(8, layer=0)
later = mmlens.word_map(model, inputs, "Italy", layers=[0, 8, 16, 24, 29])
print("columns of the patches that say it most:", [int(inputs.grid[0, p, 3]) for p in column])
print("most of it after layers 0 ... 29:", [f"{p:.3f}" for p in later.log_probs.exp().amax(dim=1)])

# %% [markdown]
# ## The model reads its own tokens
#
# One visual token of that column, before layer 0 ... 16, takes the place of the x in a text without any image.

# %%
layers = [0, 4, 8, 12, 16]
source = model.record(inputs, sites=[("resid_pre", layer) for layer in layers])


def into(prompt, layer, patch=column[0]):
    x, taken = prompt.str_tokens[0].index(" x"), transplant(source, "resid_pre", layer, patch)
    return [mmlens.Intervention("resid_pre", layer, x, taken)]


repeat = model.to_inputs("cat -> cat; 135 -> 135; hello -> hello; x ->")
capital = model.to_inputs("The capital of x is the city of")
for layer in layers:
    x, its = (model.generate(p, 2, interventions=into(p, layer)) for p in (repeat, capital))
    print(f"layer {layer:2}: x is{x!r}, and its capital is{its!r}")

# %% [markdown]
# The token holds the country from the first layer on, where the lens finds nothing. Which patches do? One pass over
# all of them, each a branch of the same short prompt, gives P("Rome") after "The capital of x is the city of":

# %%
rome = model.to_single_token(" Rome")
branches = [into(capital, 0, patch) for patch in inputs.span("image").tolist()]
found = model.record(capital).run(branches, lambda logits: logits[:, -1].softmax(-1)[:, rome])
figure = mmlens.plots.overlay(found[:, 0], inputs, value_title="P(“Rome”)", title="")
figure.update_layout(width=380, height=225, margin={"t": 10, "b": 10})

# %% [markdown]
# ## Does the answer need these tokens?
#
# The eight tokens that say Italy most are replaced by the mean of all visual tokens, and so are eight others, drawn
# at random twenty times. Erasing any eight takes much of the answer, but these take more than any draw:

# %%
erased = mmlens.token_erasure(model, inputs, column, answer=" Rome")
print(f"{erased.said_before!r} became {erased.said!r}; p = {erased.p_value:.3f}")
erased.plot().update_layout(height=260)
