# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
#   kernelspec: {display_name: Python 3, language: python, name: python3}
# ---

# %% [markdown]
# # Steer against a hallucination
#
# After a sentence about Paris the embedded model names Paris as the capital of every country, whatever flag it
# sees. A vector that is added to its activations makes it answer by the image again.

# %%
from dataclasses import replace

import mmlens

model = mmlens.HookedMultimodalTransformer.from_pretrained("demo")
plain = [q for q in mmlens.demo_questions(relation="capital") if q.subject != "France"]
misled = [replace(q, question="Paris is a beautiful city. " + q.question) for q in plain]


def prepared(questions):
    return [model.prepare(q.prompt(), q.open_images()) for q in questions]


for asked in (plain[24], misled[24]):
    print(asked.question, "->", model.generate(*prepared([asked]), 3))

# %% [markdown]
# ## The vector
#
# Pairs of prompts that differ in the sentence alone; the vector is the mean difference of the residual stream at the
# last token. Every point below is one pair, measured along the direction of the *other* pairs.

# %%
pairs = prepared(plain[:6]), prepared(misled[:6])
vector = mmlens.steering_vector(model, *pairs, layers=range(14, 28, 2))
vector.save("vector.safetensors")
vector.plot().update_layout(height=340)

# %% [markdown]
# ## What it does, and what it costs
#
# Every layer tells the pairs apart. Does adding the vector change the answer in each of them? Other countries, with
# and without the sentence, in two layers and at three scales. A sweep can be stopped at any time and goes on.

# %%
options = {"vector": "vector.safetensors", "scales": (0, 1, 2), "layers": (20, 24)}
options |= {"max_new_tokens": 3, "progress": False}
found = {
    name: mmlens.sweep("steer", model, questions[24:28], f"runs/{name}", **options).results()
    for name, questions in (("misled", misled), ("plain", plain))
}
scores = mmlens.steering_scores(found)
scores.plot(title="right answers about four countries")

# %% [markdown]
# In layer 20 the vector makes the model answer by the flag, and plain questions keep their answers. In layer 24 it
# removes "Paris" as well, but layer 23, which reads the image, has gone by.

# %%
table = found["misled"]
table[table["layer"] == 20].pivot(index="question", columns="scale", values="said")

# %%
[inputs] = prepared([misled[24]])
steered = vector.of_answers(inputs, 2, layers=[20])
model.generate(inputs, 12, interventions=steered)
