# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
#   kernelspec: {display_name: Python 3, language: python, name: python3}
# ---

# %% [markdown]
# # The paper's figures
#
# `mmlens reproduce` makes the analogues of the figures of Basu et al. 2024 on any model and questions. Here
# are two of them in Python, with few questions so that they take a minute; the intervals say how few.
# [Findings](../../docs/findings.md) has all of them.

# %%
from mmlens.reproduce import FIGURES, Settings, Study

study = Study.open(Settings(model="demo", limit=3, asked=8, samples=500))

# %% [markdown]
# ## Which layers, seeing and told
#
# The paper: in LLaVA early MLPs, layers 1 to 4, at the constraint; in the language model alone layers 4 to 7.

# %%
layers = FIGURES["layers"](study)
layers.figure

# %%
layers.counts  # which questions were considered, and why others fell out

# %% [markdown]
# ## Which visual tokens the constraint reads
#
# The paper: the last sixteenth of them, through the first attention layer.

# %%
visual = FIGURES["visual-tokens"](study)
visual.figure

# %%
table = visual.tables["table"]
table[table["measure"] == "late share"].head()
