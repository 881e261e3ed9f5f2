"""Corruptions of images that a model sees whole and in tiles: each view shows the corrupted one."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from PIL import Image
from small_tiled_models import noise_picture, tiled_model
from test_corruptions import QUESTION, gaussian_blur
from torch.utils.flop_counter import FlopCounterMode

from mmlens import attribution_patching, causal_trace
from mmlens.analyses.corruptions import blur_image, mean_image, noise_image, swap_image
from mmlens.inputs.layouts.anyres import Tiling


@pytest.fixture
def tiled(seed):
    """A model that sees an image whole and in tiles, and a prompt for it."""
    model = tiled_model(seed, onevision=seed % 2 == 1)
    size = random.randint(20, 90), random.randint(20, 90)
    image = noise_picture(seed, *size)
    return model, model.prepare(QUESTION, image, spans={"constraint": "this country"})


@pytest.mark.parametrize("onevision", [True, False])
def test_one_of_several_images_of_inputs_made_from_tokens(onevision, seed):
    """OneVision sees each of several images in one tile, which the inputs do not say."""
    model = tiled_model(seed, onevision=onevision)
    images = [noise_picture(seed + n, 60, 21) for n in range(3)]
    text = "<image> <image> which is it"
    inputs = model.prepare(text, images[:2], template=None)
    batch = dict(inputs.visual)
    if onevision:
        batch["batch_num_images"] = torch.tensor([2])
    given = model.inputs_from_tokens(inputs.tokens, **batch)
    assert all(image.image is None for image in given.images)
    swapped = swap_image(model, given, images[2], which=1)
    expected = model.prepare(text, [images[0], images[2]], template=None)
    assert swapped.visual.counts == expected.visual.counts
    for name, tensor in expected.visual.items():
        assert torch.equal(swapped.visual[name], tensor)
    assert torch.equal(model(swapped), model(expected))
    assert swapped.images[1].image.tobytes() == images[2].tobytes()


def test_an_image_of_another_shape_is_brought_to_this_ones(tiled, seed):
    model, inputs = tiled
    (before,) = inputs.images
    width, height = before.image.size
    other = noise_picture(seed + 1, 17, 230)
    with pytest.raises(ValueError, match="give one of the same size, or fit=True"):
        swap_image(model, inputs, other)
    corrupted = swap_image(model, inputs, other, fit=True)
    (after,) = corrupted.images
    assert torch.equal(after.cells, before.cells) and after.views == before.views
    fitted = other.resize((width, height), Image.Resampling.BICUBIC)
    assert after.image.tobytes() == fitted.tobytes()
    there = model.prepare(QUESTION, fitted)
    assert torch.equal(there.tokens, corrupted.tokens)
    for name, tensor in there.visual.items():
        assert torch.equal(corrupted.visual[name], tensor)
    trace = causal_trace(
        model, inputs, corrupted, layers=[0], positions=[inputs.patches((0, 0, width, height))]
    )
    # The first layer's input at every token that shows the image, and at the ends of lines too.
    whole = causal_trace(
        model, inputs, corrupted, sites=["resid_post"], layers=[0], positions=[range(inputs.n_pos)]
    )
    assert whole.restored.item() == pytest.approx(whole.clean, abs=1e-5)
    assert trace.restored.shape == (3, 1, 1)
    embedded = swap_image(model, inputs, other, fit=True, level="embeddings")
    assert torch.allclose(model(embedded), model(corrupted), atol=1e-3)


def test_an_image_of_the_same_cells_needs_no_fitting(tiled, seed):
    model, inputs = tiled
    width, height = inputs.images[0].image.size
    other = noise_picture(seed + 1, 2 * width, 2 * height)
    if model.prepare(QUESTION, other).images[0].grids == inputs.images[0].grids:
        corrupted = swap_image(model, inputs, other)
        assert corrupted.images[0].image.size == (2 * width, 2 * height)
        assert torch.equal(model(corrupted), model(model.prepare(QUESTION, other)))


@pytest.mark.parametrize("kind", ["blur", "mean", "noise"])
def test_tiles_of_a_corrupted_image(tiled, seed, kind):
    """The image goes through the processor again: every view shows the corrupted one."""
    model, inputs = tiled
    pixels = np.array(inputs.images[0].image).astype(np.float64)
    if kind == "noise":
        noisy = noise_image(model, inputs, samples=2, seed=seed)
        generator = torch.Generator().manual_seed(seed)
        channels_first = torch.tensor(pixels).float().permute(2, 0, 1)
        for sample in range(2):
            drawn = torch.randn(channels_first.shape, generator=generator)
            shown = (channels_first + channels_first.std() * drawn).round().clamp(0, 255)
            there = model.prepare(QUESTION, shown.to(torch.uint8))
            found = model.input_embeddings(noisy)[sample]
            assert torch.allclose(found, model.input_embeddings(there)[0], atol=1e-4)
        return
    if kind == "blur":
        corrupted = blur_image(model, inputs, 1.7)
        maps = torch.tensor(pixels).permute(2, 0, 1)[None]
        expected = gaussian_blur(maps, 1.7)[0].permute(1, 2, 0).numpy()
    else:
        corrupted = mean_image(model, inputs)
        expected = np.broadcast_to(pixels.mean(axis=(0, 1)), pixels.shape)
    found = np.array(corrupted.images[0].image)
    assert np.abs(found - expected).max() <= 0.5 + 1e-3
    there = model.prepare(QUESTION, Image.fromarray(found))
    assert torch.equal(corrupted.visual["pixel_values"], there.visual["pixel_values"])
    assert torch.equal(corrupted.images[0].cells, inputs.images[0].cells)


def test_visual_tokens_of_every_view_become_their_mean(tiled):
    """Each view its own; what is no patch stays."""
    model, inputs = tiled
    (image,) = inputs.images
    before = model.input_embeddings(inputs)[0]
    after = model.input_embeddings(mean_image(model, inputs, level="embeddings"))[0]
    for view, (rows, columns) in enumerate(image.grids):
        at = inputs.block((0, 0, rows, columns), view=view)
        expected = before[at].double().mean(dim=0).float().expand(len(at), -1)
        assert torch.allclose(after[at], expected, atol=1e-5)
    others = inputs.grid[0, :, 1] < 0
    assert int(others.sum()) == inputs.n_pos - sum(r * c for r, c in image.grids)
    assert torch.equal(after[others], before[others])


def test_one_of_several_images_of_tiles(seed):
    """OneVision sees each image of several whole only, also when one is exchanged."""
    for onevision in (False, True):
        model = tiled_model(seed, onevision=onevision)
        images = [noise_picture(seed, 60, 25), noise_picture(seed + 1, 30, 70)]
        other = noise_picture(seed + 2, 30, 70)
        inputs = model.prepare(QUESTION, images)
        corrupted = swap_image(model, inputs, other, which=1)
        there = model.prepare(QUESTION, [images[0], other])
        assert torch.equal(corrupted.tokens, there.tokens)
        assert len(inputs.images[1].views) == (1 if onevision else 2)
        assert torch.equal(model(corrupted), model(there))


def test_a_blur_costs_its_radius_and_not_the_square(tiled):
    """A photograph of 12 megapixels takes seconds, where both axes at once take minutes."""
    model, inputs = tiled
    width, height = inputs.images[0].image.size
    with FlopCounterMode(display=False) as counted:
        blur_image(model, inputs, 4.0)
    kernels = sum(2 * min(12, side - 1) + 1 for side in (width, height))
    # Three channels, and the product with the other axis's kernel, which is 1.
    assert counted.get_total_flops() == 2 * kernels * (3 * width * height + 1)


@pytest.mark.parametrize("kind", ["blur", "mean"])
def test_visual_tokens_of_a_strip_whose_tiles_are_padding(seed, kind):
    """The tiles have no patch then; the whole image has all of its own."""
    model = tiled_model(seed, side=4)
    size = random.choice([(900, 1), (1, 900)])
    inputs = model.prepare(QUESTION, noise_picture(seed, *size))
    (image,) = inputs.images
    assert min(image.grids[1]) == 0
    if kind == "blur":
        corrupted = blur_image(model, inputs, 1.3, level="embeddings")
    else:
        corrupted = mean_image(model, inputs, level="embeddings")
    before, after = (model.input_embeddings(each)[0] for each in (inputs, corrupted))
    whole = inputs.block((0, 0, *image.grids[0]))
    maps = before[whole].T.unflatten(1, image.grids[0])[None].double()
    mean = maps.mean(dim=(2, 3), keepdim=True).expand_as(maps)
    expected = (gaussian_blur(maps, 1.3) if kind == "blur" else mean)[0].flatten(1).T
    assert torch.allclose(after[whole].double(), expected, atol=1e-4)
    others = torch.ones(inputs.n_pos, dtype=torch.bool)
    others[whole] = False
    assert torch.equal(after[others], before[others])


def test_runs_of_other_patches_are_not_traced(seed):
    """Two prompts made by hand may have as many visual tokens in other rows and columns."""
    model = tiled_model(seed, onevision=seed % 2 == 1)
    seen = {}
    for _ in range(4000):
        size = random.randint(4, 120), random.randint(4, 120)
        grid = Tiling.of(size[::-1], model.cfg.projector.anyres).grid
        others = seen.setdefault(grid[0] * (grid[1] + 1), {})
        others[grid] = size
        if len(others) > 1:
            break
    sizes = list(others.values())
    clean, other = (
        model.prepare(QUESTION, noise_picture(seed + i, *size)) for i, size in enumerate(sizes)
    )
    assert torch.equal(clean.is_image, other.is_image)
    for trace in (causal_trace, attribution_patching):
        with pytest.raises(ValueError, match=r"give one of the same size, or fit=True"):
            trace(model, clean, other, positions=[clean.images[0].positions])
