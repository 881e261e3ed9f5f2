"""Corruptions of words and images: what they change, and that they change nothing else."""

from __future__ import annotations

import math
import random
from contextlib import ExitStack
from dataclasses import replace

import numpy as np
import pytest
import torch
from random_models import N_SPECIAL, VOCABULARY, Shape, hooked, random_llama
from small_models import picture, small_inputs, small_model, worded_model
from small_tokenizers import KINDS
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

from mmlens import causal_trace, collate, noise_span, swap_span
from mmlens.analyses.corruptions import blur_image, mean_image, noise_image, swap_image

QUESTION = "What is the capital of this country?"


@pytest.fixture
def model(seed):
    return worded_model(seed)


def asked(model, question=QUESTION, phrase="this country", seed=0):
    return model.prepare(question, picture(seed), spans={"constraint": phrase}, template=None)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("word", ["flag", "second", "Paris", "Brazzaville"])
def test_every_token_becomes_the_words_first(seed, kind, word):
    model = worded_model(seed, kind)
    inputs = asked(model)
    corrupted = swap_span(model, inputs, "constraint", word)
    at = inputs.span("constraint")
    # The first token of the word where it stands, after a space.
    there = asked(model, QUESTION.replace("this country", word), word)
    token = there.span("constraint")[0]
    assert corrupted.tokens[0, at].tolist() == [int(there.tokens[0, token])] * len(at)
    assert len(at) > 1
    others = torch.ones(inputs.n_pos).index_fill(0, at, 0).bool()
    assert torch.equal(corrupted.tokens[0, others], inputs.tokens[0, others])
    assert corrupted.n_pos == inputs.n_pos
    assert corrupted.pixel_values is inputs.pixel_values
    assert torch.equal(corrupted.span("constraint"), at)
    labels = corrupted.labels()
    assert {labels[position] for position in at.tolist()} == {there.labels()[int(token)]}
    assert [labels[i] for i in range(len(labels)) if others[i]] == [
        inputs.labels()[i] for i in range(len(labels)) if others[i]
    ]
    assert QUESTION in inputs.texts[0]  # the clean inputs are as they were
    assert int(inputs.tokens[0, at[0]]) != int(corrupted.tokens[0, at[0]])


def test_the_default_is_paris(model):
    inputs = asked(model)
    default = swap_span(model, inputs, "constraint")
    assert torch.equal(default.tokens, swap_span(model, inputs, "constraint", "Paris").tokens)


def test_a_whole_phrase_of_the_same_length(model):
    inputs = asked(model)
    n = len(inputs.span("constraint"))
    same = next(
        phrase
        for phrase in ("the capital", "second flag", "the second", "the flag", "larger nation")
        if len(asked(model, f"What is the capital of {phrase}?", phrase).span("constraint")) == n
    )
    corrupted = swap_span(model, inputs, "constraint", same, pad=False)
    expected = asked(model, f"What is the capital of {same}?", same)
    assert torch.equal(corrupted.tokens, expected.tokens)
    assert corrupted.labels() == expected.labels()
    with pytest.raises(ValueError, match=f"tokens, the span 'constraint' {n}"):
        swap_span(model, inputs, "constraint", "What is the capital?", pad=False)


def test_a_token_id(model, seed):
    inputs = asked(model)
    at = inputs.span("constraint")
    corrupted = swap_span(model, inputs, "constraint", 300)
    assert corrupted.tokens[0, at].tolist() == [300] * len(at)
    # Inputs from tokens have no text, but ids do; and spans swapped before are gone.
    bare = small_model(seed)
    inputs = small_inputs(bare, seed, spans={"c": [1, 2]}, images=(0,))
    assert swap_span(bare, inputs, "c", 7).tokens[0, 1:3].tolist() == [7, 7]
    for model_, given, span in ((bare, inputs, "c"), (model, corrupted, "constraint")):
        with pytest.raises(ValueError, match="as a token id"):
            swap_span(model_, given, span, "Paris")


def test_what_cannot_be_swapped(model):
    inputs = asked(model)
    with pytest.raises(KeyError, match="no span is called 'subject'"):
        swap_span(model, inputs, "subject")
    with pytest.raises(ValueError, match="visual tokens"):
        swap_span(model, inputs, "image", 300)
    for token in (-1, model.cfg.d_vocab, model.cfg.image_token_id):
        with pytest.raises(ValueError, match=f"replacement={token} is no word"):
            swap_span(model, inputs, "constraint", token)
    with pytest.raises(ValueError, match="empty"):
        swap_span(model, inputs, "constraint", "  ")
    batch = collate([inputs, inputs], model.tokenizer.pad_token_id)
    for corrupt in (swap_span, noise_span):
        with pytest.raises(ValueError, match="one prompt at a time; this batch has 2"):
            corrupt(model, batch, "constraint")


def test_noise_hits_its_spans_with_its_size(model):
    inputs = asked(model)
    noisy = noise_span(model, inputs, ["constraint", "image"], multiple=2.0, samples=400, seed=5)
    hit = torch.cat([inputs.span("constraint"), inputs.span("image")])
    others = torch.ones(inputs.n_pos).index_fill(0, hit, 0).bool()
    assert noisy.noise.shape == (400, inputs.n_pos, model.cfg.d_model)
    assert noisy.noise[:, others].eq(0).all()
    visual = model.input_embeddings(inputs)[0, inputs.span("image")].std()
    for span, std in (("constraint", model.W_E.std()), ("image", visual)):
        drawn = noisy.noise[:, inputs.span(span)] / (2.0 * std)
        assert abs(drawn.mean()) < 6 / drawn.numel() ** 0.5
        assert abs(drawn.std() - 1) < 6 / (2 * drawn.numel()) ** 0.5
    assert torch.equal(noisy.tokens, inputs.tokens)


def test_noise_has_the_size_of_embeddings_that_are_scaled(seed):
    """As Gemma's are, of whose embeddings transformers has a class."""
    model = small_model(seed, embed_scale=random.uniform(10, 60))
    inputs = small_inputs(model, seed, images=(0,), spans={"word": [1, 2]})
    cfg, at = model.cfg, inputs.span("word")
    hf = Gemma3TextScaledWordEmbedding(cfg.d_vocab, cfg.d_model, 0, cfg.embed_scale)
    hf.weight.data.copy_(model.W_E)
    noise = noise_span(model, inputs, "word", multiple=2.0, samples=3, seed=seed).noise
    drawn = torch.randn(noise.shape, generator=torch.Generator().manual_seed(seed))[:, at]
    std = hf(torch.arange(cfg.d_vocab)).double().std()
    # A sum of n float32 numbers is off by n roundings at most, relatively.
    off = model.W_E.numel() * torch.finfo(torch.float32).eps
    assert torch.allclose(noise[:, at].double(), 2.0 * std * drawn.double(), rtol=off, atol=0)


def test_noise_repeats(model):
    inputs = asked(model)
    first, again, other = (
        noise_span(model, inputs, "constraint", samples=3, seed=seed).noise for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first[0], first[1])


def test_noise_is_added_where_the_visual_tokens_stand(model):
    inputs = asked(model)
    noisy = noise_span(model, inputs, ["image", "constraint"], samples=2)
    embedded = model.input_embeddings(inputs)
    assert torch.allclose(model.input_embeddings(noisy), embedded + noisy.noise)
    logits = model(noisy)
    assert logits.shape[0] == 2
    for sample in range(2):
        alone = model.run_with_hooks(
            inputs,
            fwd_hooks=[("hook_input_embed", lambda x, hook: x + noisy.noise[sample])],  # noqa: B023
        )
        assert torch.allclose(logits[sample], alone[0], atol=1e-3)


def test_what_cannot_be_made_noisy(model):
    inputs = asked(model)
    with pytest.raises(KeyError, match="no span is called 'subject'"):
        noise_span(model, inputs, ["constraint", "subject"])
    with pytest.raises(ValueError, match="at least 1"):
        noise_span(model, inputs, "constraint", samples=0)
    with pytest.raises(ValueError, match="noise already"):
        noise_span(model, noise_span(model, inputs, "constraint"), "image")
    for std in (-1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match=f"std={std}; it is 0 or more"):
            noise_span(model, inputs, "constraint", std=std)


def test_generation_has_a_row_for_every_sample_of_noise(model):
    clean = asked(model)
    noisy = noise_span(model, clean, "constraint", samples=3)
    tokens = model.generate(noisy, 4, return_type="tokens", stop_at_eos=False)
    assert tokens.shape == (3, clean.n_pos + 4)


# Images


def several(model, seed, n_images=2):
    """A prompt with several images."""
    pictures = [picture(seed + index) for index in range(n_images)]
    return model.prepare(QUESTION, pictures, spans={"constraint": "this country"}, template=None)


def visual(model, inputs):
    """The visual tokens [image, token, d_model] that the decoder is given, by sample of noise."""
    embedded = model.input_embeddings(inputs)
    return torch.stack([embedded[:, image.positions] for image in inputs.images], dim=1)


@pytest.mark.parametrize("level", ["pixels", "embeddings"])
def test_another_image(model, seed, level):
    inputs = several(model, seed)
    corrupted = swap_image(model, inputs, picture(seed + 9), which=1, level=level)
    there = model.prepare(QUESTION, [picture(seed), picture(seed + 9)], template=None)
    assert torch.allclose(visual(model, corrupted), visual(model, there), atol=1e-4)
    assert torch.allclose(model(corrupted), model(there), atol=1e-3)
    assert torch.equal(corrupted.tokens, inputs.tokens)
    if level == "pixels":
        assert corrupted.images[1].image.tobytes() == picture(seed + 9).tobytes()
        assert corrupted.images[0] is inputs.images[0]
    else:
        assert corrupted.pixel_values is inputs.pixel_values


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_another_images_visual_tokens_come_back(seed, dtype):
    """What is added is after - before, in float32, and the sum is rounded once.

    With u = 2^-24 the sum is off by at most 2 u (|before| + |after|) (and a little), and rounds to
    `after` where that is less than half the distance of its neighbours: at least 2^-9 |after| in
    bfloat16, 2^-12 |after| in float16 (above its subnormals, whose distances are larger).
    """
    model = worded_model(seed).to(dtype)
    inputs = several(model, seed)
    corrupted = swap_image(model, inputs, picture(seed + 9), which=1, level="embeddings")
    there = swap_image(model, inputs, picture(seed + 9), which=1)
    before, after, found = map(model.input_embeddings, (inputs, there, corrupted))
    assert found.dtype == dtype and not torch.equal(before, after)
    before, after, found = (each.double() for each in (before, after, found))
    off = 4 * 2.0**-24 * (before.abs() + after.abs())
    if dtype == torch.float32:
        assert ((found - after).abs() <= off).all()
    else:
        half_gap = (2.0**-9 if dtype == torch.bfloat16 else 2.0**-12) * after.abs()
        surely = off < half_gap
        assert surely.double().mean() > 0.9
        assert torch.equal(found[surely], after[surely])


def gaussian_blur(maps, sigma):
    """Sums over reflected neighbours with normalised Gaussian weights, radius 3 sigma."""
    for axis in (2, 3):
        size = maps.shape[axis]
        radius = min(math.ceil(3 * sigma), size - 1)
        offsets = range(-radius, radius + 1)
        weights = [math.exp(-(offset**2) / (2 * sigma**2)) for offset in offsets]
        rows = []
        for place in range(size):
            total = 0
            for offset, weight in zip(offsets, weights, strict=True):
                at = abs(place + offset)
                at = at if at < size else 2 * (size - 1) - at
                total = total + weight * maps.select(axis, at)
            rows.append(total / sum(weights))
        maps = torch.stack(rows, dim=axis)
    return maps


@pytest.mark.parametrize("kind", ["blur", "mean"])
@pytest.mark.parametrize("which", [None, 1])
def test_blurred_and_mean_pixels(model, seed, kind, which):
    inputs = several(model, seed)
    if kind == "blur":
        corrupted = blur_image(model, inputs, 0.8, which=which)
    else:
        corrupted = mean_image(model, inputs, which=which)
    for index, (before, after) in enumerate(zip(inputs.images, corrupted.images, strict=True)):
        pixels = torch.tensor(np.array(before.image)).permute(2, 0, 1)[None].double()
        if kind == "blur":
            expected = gaussian_blur(pixels, 0.8)
        else:
            expected = pixels.mean(dim=(2, 3), keepdim=True).expand_as(pixels)
        found = torch.tensor(np.array(after.image)).permute(2, 0, 1)[None].double()
        if which in (None, index):
            assert (found - expected).abs().max() <= 0.5 + 1e-3  # rounded to whole levels
        else:
            assert torch.equal(found, pixels)
    there = model.prepare(QUESTION, [image.image for image in corrupted.images], template=None)
    assert torch.equal(corrupted.pixel_values, there.pixel_values)
    assert not torch.equal(corrupted.pixel_values, inputs.pixel_values)


@pytest.mark.parametrize("kind", ["blur", "mean"])
def test_blurred_and_mean_visual_tokens(model, seed, kind):
    inputs = several(model, seed)
    rows, columns = inputs.images[0].grids[0]
    before = visual(model, inputs)[0]
    n_class = inputs.images[0].length - rows * columns
    maps = before[:, n_class:].unflatten(1, (rows, columns)).permute(0, 3, 1, 2)
    if kind == "blur":
        corrupted = blur_image(model, inputs, 1.3, which=1, level="embeddings")
        expected = gaussian_blur(maps.double(), 1.3).float()
    else:
        corrupted = mean_image(model, inputs, which=1, level="embeddings")
        expected = maps.mean(dim=(2, 3), keepdim=True).expand_as(maps)
    after = visual(model, corrupted)[0]
    assert torch.allclose(after[1, n_class:], expected[1].flatten(1).T, atol=1e-4)
    assert torch.equal(after[0], before[0]) and torch.equal(after[1, :n_class], before[1, :n_class])
    words = ~inputs.is_image[0]
    embedded = model.input_embeddings(corrupted)[0, words]
    assert torch.equal(embedded, model.input_embeddings(inputs)[0, words])
    trace = causal_trace(model, inputs, corrupted, layers=[0], positions=[inputs.span("image")])
    assert trace.restored.shape == (3, 1, 1)


def test_noise_on_pixels(model, seed):
    inputs = asked(model)
    noisy = noise_image(model, inputs, multiple=0.5, samples=3, seed=seed)
    again = noise_image(model, inputs, multiple=0.5, samples=3, seed=seed)
    assert torch.equal(noisy.noise, again.noise)
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.tensor(np.array(inputs.images[0].image)).permute(2, 0, 1).float()
    after = visual(model, noisy)
    for sample in range(3):
        drawn = torch.randn(1, *pixels.shape, generator=generator)[0]
        shown = (pixels + 0.5 * pixels.std() * drawn).round().clamp(0, 255).to(torch.uint8)
        there = model.prepare(QUESTION, shown, template=None)
        assert torch.allclose(after[sample], visual(model, there)[0], atol=1e-4)
    assert len(model(noisy)) == 3


def test_images_that_cannot_be_corrupted(model, seed):
    inputs = several(model, seed)
    corruptions = [
        lambda given, **options: swap_image(model, given, picture(0), **options),
        lambda given, **options: blur_image(model, given, 2.0, **options),
        lambda given, **options: mean_image(model, given, **options),
    ]
    for corrupt in [*corruptions, lambda given, **options: noise_image(model, given, **options)]:
        with pytest.raises(ValueError, match=r"which=2; the prompt has 2 image\(s\)"):
            corrupt(inputs, which=2)
        with pytest.raises(ValueError, match="have no image"):
            corrupt(model.prepare(QUESTION, template=None))
        batch = collate([inputs, inputs], model.tokenizer.pad_token_id)
        with pytest.raises(ValueError, match="one prompt at a time; this batch has 2"):
            corrupt(batch)
    noisy = noise_span(model, inputs, "image", samples=1)
    for corrupt in corruptions:
        with pytest.raises(ValueError, match="noise already"):
            corrupt(noisy, level="embeddings")
    for sigma in (0, -1.5, math.inf, math.nan):
        with pytest.raises(ValueError, match=f"sigma={sigma}; it must be positive"):
            blur_image(model, inputs, sigma)
    model.image_processor = None
    with pytest.raises(ValueError, match="no image processor"):
        swap_image(model, inputs, picture(0))


# ROME


def rome_trace(hf, tokens, noise, answer, position, layer, kind, width):
    """P(answer) after "corrupted-with-restoration" (Meng et al. 2022, section 2.1), by batch.

    Row 0 runs clean, the others with noise on the embeddings; at one token the clean row's state
    (of `width` layers around `layer`, for a module's output) is put into the others; the
    probability of the answer is averaged over them.
    """
    blocks = hf.model.layers
    modules = {"resid_post": blocks, "mlp_out": [b.mlp for b in blocks]}
    modules["attn_out"] = [b.self_attn for b in blocks]

    def corrupt(module, args, output):
        output = output.clone()
        output[1:] += noise
        return output

    def put_clean(module, args, output):
        first = (output[0] if isinstance(output, tuple) else output).clone()
        first[1:, position] = first[0, position]
        return (first, *output[1:]) if isinstance(output, tuple) else first

    low = max(0, layer - width // 2)
    high = min(len(blocks), layer - (-width // 2))
    with ExitStack() as stack:
        stack.callback(hf.model.embed_tokens.register_forward_hook(corrupt).remove)
        for module in modules[kind][low:high]:
            stack.callback(module.register_forward_hook(put_clean).remove)
        logits = hf(input_ids=tokens.expand(1 + len(noise), -1)).logits
    return logits[1:, -1].softmax(-1).mean(dim=0)[answer].item()


@torch.no_grad()
def test_the_noise_trace_is_romes(seed, tmp_path):
    """A text-only model, the same noise: every cell equals the published procedure's."""
    hf = random_llama(Shape(n_layers=4))
    model = hooked(hf, tmp_path)
    tokens = torch.randint(N_SPECIAL, VOCABULARY, (1, 7))
    inputs = model.inputs_from_tokens(tokens, spans={"subject": [2, 3]})
    spread = float(model.W_E[tokens[0, 2:4]].std())
    corrupted = noise_span(model, inputs, "subject", std=spread, samples=4, seed=seed)
    noise = corrupted.noise
    assert noise[:, [2, 3]].ne(0).all() and noise[:, [0, 1, 4, 5, 6]].eq(0).all()
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(noise.shape, generator=generator)
    assert torch.allclose(noise[:, 2:4], 3 * spread * drawn[:, 2:4])
    answer = random.randrange(N_SPECIAL, VOCABULARY)
    for kind, width in (("resid_post", 1), ("mlp_out", 3), ("attn_out", 2)):
        trace = causal_trace(
            model, inputs, corrupted, sites=(kind,), window=width, answer=answer, positions=[3, 6]
        )
        for group, position in enumerate((3, 6)):
            for layer in range(4):
                expected = rome_trace(hf, tokens, noise, answer, position, layer, kind, width)
                assert trace.restored[0, group, layer].item() == pytest.approx(expected, abs=1e-5)


def test_words_without_a_tokenizer_are_shown_by_their_ids(seed):
    model = small_model(seed)
    inputs = small_inputs(model, seed, images=(0,), spans={"c": [2, 3]})
    named = replace(inputs, str_tokens=([f"w{i}" for i in range(inputs.n_pos)],))
    swapped = swap_span(model, named, "c", 7)
    assert swapped.str_tokens[0][1:5] == ["w1", "[7]", "[7]", "w4"]
