# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
#   kernelspec: {display_name: Python 3, language: python, name: python3}
# ---

# %% [markdown]
# # An image in tiles
#
# LLaVA-NeXT, LLaVA-OneVision, Idefics3 and SmolVLM see an image several times: the whole of it, and in tiles
# of a higher resolution. In mmlens each is a *view* of the image. This notebook names a region of an image by
# its pixels, and measures it in all views.
#
# It makes a small LLaVA-NeXT with random weights, so it needs no download. The numbers mean nothing, then; with
# a published checkpoint (`llava-hf/llava-v1.6-mistral-7b-hf`), the same cells give numbers that do.

# %%
import tempfile

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    PreTrainedTokenizerFast,
)

torch.manual_seed(0)
torch.set_grad_enabled(False)
letters = sorted(pre_tokenizers.ByteLevel.alphabet())
vocabulary = {token: i for i, token in enumerate(["<s>", "</s>", "<pad>", "<image>", *letters])}
bytes_alone = Tokenizer(models.BPE(vocabulary, []))
bytes_alone.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
bytes_alone.decoder = decoders.ByteLevel()
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=bytes_alone, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
)
tokenizer.add_tokens([AddedToken("<image>", special=True)])

SIDE, PATCH = 48, 8
tower = CLIPVisionConfig(
    hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
    image_size=SIDE, patch_size=PATCH,
)  # fmt: skip
decoder = LlamaConfig(
    vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=6,
    num_attention_heads=4, num_key_value_heads=2, bos_token_id=0, eos_token_id=1, pad_token_id=2,
)  # fmt: skip
tilings = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]
hf = LlavaNextForConditionalGeneration(
    LlavaNextConfig(
        vision_config=tower,
        text_config=decoder,
        image_token_index=3,
        image_grid_pinpoints=tilings,
    )
)
for weight in hf.parameters():
    if weight.ndim > 1:  # as large as keeps activations near 1
        weight.normal_(std=weight[0].numel() ** -0.5)
images = LlavaNextImageProcessor(
    size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE},
    image_grid_pinpoints=tilings,
)  # fmt: skip
processor = LlavaNextProcessor(images, tokenizer, PATCH, num_additional_image_tokens=1)
checkpoint = tempfile.TemporaryDirectory()
processor.save_pretrained(checkpoint.name)
hf.save_pretrained(checkpoint.name)

# %% [markdown]
# ## The views of an image
#
# View 0 is the whole image in one tile, view 1 are the tiles as one finer grid. `inputs.images` says of each
# position which patch of which view it is. An end of a line has a token of its own, which is no patch.

# %%
from PIL import Image, ImageDraw

from mmlens import HookedMultimodalTransformer, attention_contribution, causal_trace, swap_image
from mmlens.plots import overlay

model = HookedMultimodalTransformer.from_pretrained(checkpoint.name)
scene = Image.new("RGB", (240, 160), (226, 232, 238))
draw = ImageDraw.Draw(scene)
draw.rectangle((0, 110, 240, 160), fill=(120, 160, 90))
draw.ellipse((150, 20, 210, 80), fill=(200, 40, 40))
draw.polygon([(30, 120), (70, 50), (110, 120)], fill=(60, 80, 150))
inputs = model.prepare("<image>\nWhat is red?", scene, spans={"constraint": "red"})
image = inputs.images[0]
for number, view in enumerate(image.views):
    print(f"view {number}: {view.grid[0]} x {view.grid[1]} patches show {view.box}")
print(f"{image.length} positions, {len(image.marks)} of them ends of lines")
scene

# %% [markdown]
# ## A region
#
# `inputs.patches(box)` gives the visual tokens of all views that show a box of the image, in its own pixels: here
# the box around the red disc. They have labels of their view, row and column.

# %%
disc = inputs.patches((150, 20, 210, 80))
labels = inputs.labels()
print([labels[position] for position in disc])
by_view = [disc[inputs.grid[0, disc, 1] == view] for view in range(len(image.views))]
print([len(positions) for positions in by_view], "tokens of the views show the disc")

# %% [markdown]
# ## Contributions by view
#
# `attention_contribution` measures how much the last token receives from every visual token. An overlay shows one view, or all
# of them: then every area has the mean of the patches that show it.

# %%
seen = attention_contribution(model, inputs, "image", "last")
overlay(seen, inputs, view=0, title="the whole image, view 0")

# %%
overlay(seen, inputs, view=1, title="the tiles, view 1")

# %%
overlay(seen, inputs, view="all", title="both views")

# %% [markdown]
# `image_grid` has the numbers of one view. The tiles have more patches, so they give more in all; one patch of
# them gives about as much as one of the whole image.

# %%
for number in range(len(image.views)):
    grid = seen.image_grid(view=number)[:, 0]  # [layer, row, column]
    total, each = grid.sum((1, 2)), grid.mean((1, 2))
    print(
        f"view {number}, by layer: in all {total.numpy().round(2)}, a patch {each.numpy().round(3)}"
    )

# %% [markdown]
# ## A trace over regions
#
# The corrupted run sees another image. `fit=True` brings it to the size of the first, so that both have the same
# patches; without it, an image of another shape has other tiles, and is refused. Then the regions are restored,
# each in all views: two rows of three. `resid_pre` is what enters a layer.

# %%
other = Image.new("RGB", (90, 130), (40, 40, 60))
ImageDraw.Draw(other).ellipse((20, 30, 70, 100), fill=(250, 220, 120))
try:
    swap_image(model, inputs, other)
except ValueError as error:
    print(error)
corrupted = swap_image(model, inputs, other, fit=True)
regions = [
    inputs.patches((80 * column, 80 * row, 80 * column + 80, 80 * row + 80))
    for row in range(2)
    for column in range(3)
]
trace = causal_trace(model, inputs, corrupted, sites=("resid_pre",), positions=regions)
print(f"P({trace.answer!r}) = {trace.clean:.3f}, with the other image {trace.corrupted:.3f}")
trace.plot()

# %% [markdown]
# ## Which view carries it
#
# The same with all patches of a view at a time, and with the ends of lines.

# %%
view_of = inputs.grid[0, image.positions, 1]
groups = {
    "view 0": image.positions[view_of == 0],
    "view 1": image.positions[view_of == 1],
    "ends of lines": image.positions[view_of < 0],
    "all": image.positions,
}
trace = causal_trace(
    model, inputs, corrupted, sites=("resid_pre",), positions=list(groups.values())
)
for name, effect in zip(groups, trace.recovery[0], strict=True):
    print(f"{name:14}", effect.numpy().round(2))
assert abs(trace.recovery[0, -1, 0] - 1) < 1e-3  # before the first layer nothing else differs
