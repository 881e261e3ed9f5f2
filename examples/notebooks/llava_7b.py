# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
#   kernelspec: {display_name: Python 3, language: python, name: python3}
# ---

# %% [markdown]
# # LLaVA-1.5-7B
#
# Needs a GPU with 16 GB and the Hugging Face hub. With `CHECK = True` everything runs on the demo model
# instead, on any machine.

# %%
import os

import torch

from mmlens import (
    HookedMultimodalTransformer,
    attention_contribution,
    causal_trace,
    demo_questions,
    swap_span,
)

CHECK = os.environ.get("MMLENS_CHECK", "") == "1"

# %%
if CHECK:
    model = HookedMultimodalTransformer.from_pretrained("demo")
    question = next(q for q in demo_questions(relation="capital") if q.subject == "Italy")
    picture, text, constraint = question.open_images()[0], question.prompt(), "this country"
    template = "auto"
else:
    from PIL import Image

    model = HookedMultimodalTransformer.from_pretrained(
        "llava-hf/llava-1.5-7b-hf", device="cuda", dtype=torch.float16
    )
    picture = Image.open("building.jpg")  # your own
    text, constraint = "What city is this building in?", "this building"
    template = "<image>\nUSER: {question} Answer in a few words.\nASSISTANT:"  # the paper's

# %%
clean = model.prepare(text, picture, spans={"constraint": constraint}, template=template)
print(model.generate(clean, max_new_tokens=8))
print(len(clean.span("image")), "visual tokens of", clean.n_pos, "positions")

# %% [markdown]
# ## The trace
#
# The paper's: every text position from the constraint on, and the last token, attention and MLP outputs.

# %%
corrupted = swap_span(model, clean, "constraint", "Paris")
trace = causal_trace(model, clean, corrupted, sites=("attn_out", "mlp_out"))
print(
    f"{trace.answer!r}: {trace.clean:.2f} -> {trace.corrupted:.2f}, {trace.metadata['seconds']} s"
)
trace.plot()

# %% [markdown]
# In this family the paper finds MLPs of layers 1 to 4 at the constraint. Layer 0 nearly restores the word.

# %%
constraint_trace = causal_trace(
    model, clean, corrupted, positions=[clean.span("constraint")], sites=("mlp_out",), window=3
)
constraint_trace.to_dataframe().nlargest(5, "indirect_effect")

# %% [markdown]
# ## What the constraint gathers from the image

# %%
seen = attention_contribution(model, clean, "image", "constraint")
seen.plot()
