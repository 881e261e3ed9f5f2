"""`swap_span` and `noise_span`: what they change, and that they change nothing else."""

from __future__ import annotations

import pytest
import torch
from small_models import picture, small_inputs, small_model, worded_model
from small_tokenizers import KINDS

from mmlens import collate, noise_span, swap_span

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
    # The first token of the word where it stands, behind a space.
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


def test_generation_has_a_row_for_every_sample_of_noise(model):
    clean = asked(model)
    noisy = noise_span(model, clean, "constraint", samples=3)
    tokens = model.generate(noisy, 4, return_type="tokens", stop_at_eos=False)
    assert tokens.shape == (3, clean.n_pos + 4)
