# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
#   kernelspec: {display_name: Python 3, language: python, name: python3}
# ---

# %% [markdown]
# # Write your own intervention
#
# A hook function gets an activation and returns another. An `Intervention` says where it acts: then the
# function sees only that slice, and mmlens knows what it cannot change.

# %%
import torch

from mmlens import HookedMultimodalTransformer, Intervention, demo_questions, window

torch.set_grad_enabled(False)  # they would flow through branches as well
model = HookedMultimodalTransformer.from_pretrained("demo")
question = next(q for q in demo_questions(relation="capital") if q.subject == "Japan")
inputs = model.prepare(question.prompt(), question.open_images(), spans=question.spans())
logits = model(inputs)
answer = int(logits[0, -1].argmax())
print(repr(model.to_string([answer])), f"{logits[0, -1].softmax(-1)[answer]:.2f}")

# %% [markdown]
# ## A function of your own
#
# Rotate the residual stream at the visual tokens: keep its length, change its direction.


# %%
def turned(angle):
    def hook_function(resid, hook):  # [batch, positions of the slice, d_model]
        first, second = resid.chunk(2, dim=-1)
        cos, sin = torch.cos(torch.tensor(angle)), torch.sin(torch.tensor(angle))
        return torch.cat([cos * first - sin * second, sin * first + cos * second], dim=-1)

    return hook_function


def probability(logits):
    return logits[:, -1].float().softmax(-1)[:, answer]


turn = Intervention("resid_post", layers=5, positions=inputs.span("image"), hook=turned(0.6))
print(turn.fwd_hooks()[0][0])
probability(model.run_with_hooks(inputs, fwd_hooks=turn.fwd_hooks()))

# %% [markdown]
# ## Many of them at once
#
# A recording evaluates any number of interventions in one pass. Each starts where it first differs from
# the recorded run; what comes before is not computed again. The numbers are those of plain runs.

# %%
recording = model.record(inputs)
angles = [0.0, 0.3, 0.6, 1.2]
branches = [
    [Intervention("resid_post", layer, inputs.span("image"), turned(angle))]
    for angle in angles
    for layer in range(model.cfg.n_layers)
]
found = recording.run(branches, probability)[:, 0].unflatten(0, (len(angles), -1))
plain = probability(model.run_with_hooks(inputs, fwd_hooks=turn.fwd_hooks()))
assert torch.allclose(found[2, 5], plain, atol=1e-5)

# %%
import plotly.express as px

from mmlens.plots import Figure

figure = Figure(px.line(found.T.cpu(), labels={"index": "layer", "value": "P(answer)"}))
for line, angle in zip(figure.data, angles, strict=True):
    line.name = f"turned by {angle}"
figure.update_layout(legend_title="")

# %% [markdown]
# ## Several places, a window of layers, one head
#
# A list of interventions composes. Sites may name heads or neurons in brackets.

# %%
from mmlens.interventions.functions import scale, zero

both = [
    Intervention("mlp_out", window("mlp_out", 8, 3), inputs.span("constraint"), scale(0.5)),
    Intervention("z[4]", 23, inputs.span("last"), zero()),
]
recording.run([both], probability)
