"""What `generate` takes and returns: TransformerLens's meaning, against its own bridge.

Ended rows and texts are compared with transformers on the same checkpoint.
"""

from __future__ import annotations

import copy
import inspect
import logging
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from random_models import Shape, enliven, hooked, text_config
from small_models import picture, small_model, worded_model
from small_tokenizers import small_tokenizer
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module
from transformers import AutoTokenizer, GenerationConfig, LlamaForCausalLM, MaxLengthCriteria

from mmlens import HookedMultimodalTransformer

TEXTS = ["The capital of this country is", "What is the flag of the second country?"]
GREEDY: dict[str, Any] = {"do_sample": False, "stop_at_eos": False}
BRIDGE: dict[str, Any] = {"use_past_kv_cache": False}
"""With transformers since 5.2x its cache is not read, and its cached logits are not its own."""

Pair = tuple[HookedMultimodalTransformer, Any]


@pytest.fixture
def pair(seed: int, tmp_path: Path) -> Pair:
    """A language model with a tokenizer as ours and as transformers', in float64."""
    tokenizer = small_tokenizer("bytes")
    config = text_config(Shape(n_layers=2))
    config.vocab_size = len(tokenizer)
    config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    config.pad_token_id = tokenizer.pad_token_id
    hf = enliven(LlamaForCausalLM(config)).double()
    tokenizer.save_pretrained(tmp_path)
    return hooked(hf, tmp_path), hf


def bridge_of(pair: Pair) -> Any:
    """TransformerLens's bridge around a copy of the model."""
    model, hf = pair
    tokenizer = AutoTokenizer.from_pretrained(model.checkpoint)
    return build_bridge_from_module(
        copy.deepcopy(hf), type(hf).__name__, hf_config=hf.config, tokenizer=tokenizer
    )


def test_it_has_the_bridges_arguments() -> None:
    ours = inspect.signature(HookedMultimodalTransformer.generate).parameters
    theirs = inspect.signature(TransformerBridge.generate).parameters
    further = {"pixel_values", "attention_mask", "stop_strings", "stopping_criteria"}
    further |= {"forced_bos_token_id", "multimodal_kwargs"}  # among the options
    names = [name for name in theirs if name not in further]
    assert list(ours)[: len(names)] == names  # by position as well


def test_what_is_returned_is_what_the_bridge_returns(pair: Pair) -> None:
    model, _ = pair
    bridge = bridge_of(pair)
    tokens = model.prepare(TEXTS[0], template=None, prepend_bos=True).tokens
    for given, options in [
        (TEXTS[0], {"prepend_bos": True}),
        (TEXTS[0], {"prepend_bos": False}),
        (TEXTS[:1], {"prepend_bos": True}),
        (tokens, {}),
        (tokens, {"attention_mask": torch.ones_like(tokens)}),
    ]:
        for return_type in ("input", "str", "tokens"):
            options = {**GREEDY, **options, "return_type": return_type, "verbose": False}
            theirs = bridge.generate(given, 7, **BRIDGE, **options)
            for cached in (True, False):
                ours = model.generate(given, 7, use_past_kv_cache=cached, **options)
                assert type(ours) is type(theirs)
                same = ours.equal(theirs) if isinstance(ours, Tensor) else ours == theirs
                assert same, (given, return_type, cached)


def test_a_batch_is_what_the_bridge_returns_for_its_rows(pair: Pair) -> None:
    """In float64 the bridge's left-padded rows are NaN."""
    model, _ = pair
    bridge = bridge_of(pair)
    options = GREEDY | {"prepend_bos": True, "verbose": False}
    expected = [bridge.generate(text, 7, **BRIDGE, **options) for text in TEXTS]
    batch = model.prepare(TEXTS, template=None, prepend_bos=True)
    mask = {"attention_mask": batch.attention_mask.long()}
    assert not batch.attention_mask.all()
    for cached in (True, False):
        options["use_past_kv_cache"] = cached
        for side in (None, "left", "right"):
            assert model.generate(TEXTS, 7, padding_side=side, **options) == expected
        tokens = model.generate(TEXTS, 7, return_type="tokens", **options)
        assert torch.equal(tokens[:, : batch.n_pos], batch.tokens)
        assert torch.equal(model.generate(batch.tokens, 7, **mask, **options), tokens)
        text = model.generate(batch.tokens, 7, return_type="str", **mask, **options)
        assert text == expected


def test_inputs_with_named_positions_give_the_new_text(pair: Pair) -> None:
    model, _hf = pair
    inputs = model.prepare(TEXTS, template=None)
    tokens = model.generate(inputs, 6, return_type="tokens", stop_at_eos=False)
    new = tokens[:, inputs.n_pos :]
    said = [model.tokenizer.decode(row, skip_special_tokens=True) for row in new]
    for return_type in ("input", "str"):
        assert model.generate(inputs, 6, stop_at_eos=False, return_type=return_type) == said
    one = model.prepare(TEXTS[0], template=None)
    assert model.generate(one, 6, stop_at_eos=False) == said[0]
    assert torch.equal(model.generate(inputs, 0, return_type="tokens"), inputs.tokens)
    assert model.generate(one, 0) == ""


def test_embeddings_in_and_out(pair: Pair) -> None:
    model, _ = pair
    inputs = model.prepare(TEXTS, template=None)
    tokens = model.generate(inputs, 5, return_type="tokens", **GREEDY)
    expected = model.W_E[tokens]
    assert torch.equal(model.generate(inputs, 5, return_type="embeds", **GREEDY), expected)
    embeds, mask = expected[:, : inputs.n_pos], inputs.attention_mask
    for cached in (True, False):
        options = GREEDY | {"attention_mask": mask, "use_past_kv_cache": cached}
        assert torch.equal(model.generate(embeds, 5, **options), expected)
        new = model.generate(embeds, 5, return_type="tokens", **options)
        assert torch.equal(new, tokens[:, inputs.n_pos :])
        said = model.generate(embeds, 5, return_type="str", **options)
        assert said == model.generate(inputs, 5, **GREEDY)
    with pytest.raises(ValueError, match="return_cache"):
        model.generate(embeds, 5, return_cache=True, **options)


def test_images_and_embeddings(seed: int) -> None:
    model = worded_model(seed).double()
    inputs = model.prepare("What is this country?", picture(seed))
    embeds = model.generate(inputs, 3, return_type="embeds", **GREEDY)
    tokens = model.generate(inputs, 3, return_type="tokens", **GREEDY)
    assert torch.equal(embeds[:, : inputs.n_pos], model.input_embeddings(inputs))
    assert torch.equal(embeds[:, inputs.n_pos :], model.W_E[tokens[:, inputs.n_pos :]])


def test_more_to_return(pair: Pair) -> None:
    model, _hf = pair
    bridge = bridge_of(pair)
    options = GREEDY | BRIDGE | {"prepend_bos": True, "verbose": False}
    ours, theirs = (
        each.generate(TEXTS[0], 5, return_cache=True, return_input_tokens=True, **options)
        for each in (model, bridge)
    )
    assert ours[0] == theirs[0]
    assert torch.equal(ours[2], theirs[2])
    for name in ("blocks.1.hook_resid_post", "blocks.0.attn.hook_pattern"):
        # The bridge's rotary angles are float32: some 1e-6 of activations of order 1.
        assert torch.allclose(ours[1][name], theirs[1][name], atol=1e-4)
    (text, only), alone = (
        model.generate(TEXTS[0], 5, return_cache=True, names_filter="hook_embed", **options),
        model.generate(TEXTS[0], 5, **options),
    )
    assert text == alone and list(only) == ["hook_embed"]
    ours, theirs = (
        each.generate(TEXTS[0], 5, output_logits=True, **options) for each in (model, bridge)
    )
    assert type(ours) is type(theirs)
    assert torch.equal(ours.sequences, theirs.sequences)
    assert len(ours.logits) == 5
    for step, other in zip(ours.logits, theirs.logits, strict=True):
        assert torch.allclose(step.double(), other, atol=1e-4)


def test_a_cache_of_a_batch_with_images(seed: int) -> None:
    """TransformerLens's has neither; it is that of a run on what was said."""
    model = worded_model(seed)
    images = [picture(seed), None]
    inputs = model.prepare(["What is this?", "The flag of this nation is"], images)
    tokens, cache = model.generate(
        inputs, 4, return_cache=True, return_type="tokens", names_filter="ln_final.hook_scale"
    )
    _, expected = model.run_with_cache(
        inputs.append(tokens[:, inputs.n_pos :]), names_filter="ln_final.hook_scale"
    )
    assert torch.equal(cache["ln_final.hook_scale"], expected["ln_final.hook_scale"])


# Drawing


def several(model: Any, given: Any, **options: Any) -> set[str]:
    """What three calls say."""
    return {str(model.generate(given, 8, stop_at_eos=False, **options)) for _ in range(3)}


def test_when_tokens_are_drawn(pair: Pair) -> None:
    """TransformerLens draws by default; `MultimodalInputs` are continued as in transformers."""
    model, _ = pair
    text, inputs = TEXTS[0], model.prepare(TEXTS[0], template=None)
    tokens = inputs.tokens
    for given in (text, [text], tokens, model.embed(tokens)):
        options = {"return_type": "str"}
        assert len(several(model, given, **options)) > 1
        assert len(several(model, given, temperature=3.0, **options)) > 1
        for greedy in ({"do_sample": False}, {"temperature": 0.0}, {"temperature": 0}):
            assert len(several(model, given, **options, **greedy)) == 1
    assert len(several(model, inputs)) == 1
    for option in ({"temperature": 3.0}, {"top_k": 9}, {"min_p": 0.001}, {"freq_penalty": 1.0}):
        assert len(several(model, inputs, **option)) > 1, option
    assert len(several(model, inputs, temperature=3.0, do_sample=False)) == 1
    model.generation_config = GenerationConfig(do_sample=True)
    assert len(several(model, inputs)) > 1
    assert len(several(model, inputs, do_sample=False)) == 1
    model.generation_config = GenerationConfig(do_sample=False)
    assert len(several(model, text)) == 1
    assert len(several(model, text, top_p=0.9999)) > 1


@pytest.mark.parametrize("given", ["text", "inputs"])
def test_top_k_off_draws_from_all(given: str, pair: Pair) -> None:
    """And left out it is off for TransformerLens's inputs, and 50 for others, as there."""
    model, hf = pair
    inputs = model.prepare(TEXTS[0], template=None, prepend_bos=True)
    cases: list[tuple[Any, dict[str, Any], dict[str, Any]]] = [
        (inputs, {"top_k": 0}, {"top_k": 0}),
        (inputs, {"top_k": 3}, {"top_k": 3}),
        (inputs, {}, {}),
        (inputs, {"top_p": 1.0}, {"top_p": 1.0}),
    ]
    if given == "text":
        cases = [
            (TEXTS[0], {"top_k": 0}, {"top_k": 0}),
            (TEXTS[0], {}, {"top_k": 0}),
            (inputs.tokens, {}, {"top_k": 0}),
            (inputs.tokens, {"top_k": 5}, {"top_k": 5}),
        ]
    for prompt, ours, theirs in cases:
        options = {"do_sample": True, "temperature": 4.0}
        torch.manual_seed(3)
        expected = hf.generate(
            inputs.tokens, max_new_tokens=20, eos_token_id=None, **options, **theirs
        )
        torch.manual_seed(3)
        options |= {"stop_at_eos": False, "return_type": "tokens", "prepend_bos": True}
        assert torch.equal(model.generate(prompt, 20, **options, **ours), expected)


def test_frequency_penalty(seed: int) -> None:
    """Against the formula of TransformerLens: logits / temperature - penalty * count."""
    model = worded_model(seed).double()
    inputs = model.prepare(["The flag of the flag", "The flag of the flag of the"], template=None)
    penalty, temperature = 1.7, 2.5
    out = model.generate(
        inputs,
        6,
        freq_penalty=penalty,
        temperature=temperature,
        top_k=0,
        output_logits=True,
        stop_at_eos=False,
    )
    probabilities, draws = [], []
    for step, logits in enumerate(out.logits):
        n = inputs.n_pos + step
        for row, padding in enumerate((~inputs.attention_mask).sum(1).tolist()):
            counts = out.sequences[row, padding:n].bincount(minlength=model.cfg.d_vocab)
            scores = logits[row] / temperature - penalty * counts
            scores[model.cfg.image_token_id] = -torch.inf
            probabilities.append(scores.softmax(-1))
    # The same generator draws the same tokens from these probabilities.
    torch.manual_seed(seed)
    again = model.generate(
        inputs,
        1,
        freq_penalty=penalty,
        temperature=temperature,
        top_k=0,
        return_type="tokens",
        stop_at_eos=False,
    )
    torch.manual_seed(seed)
    draws = torch.multinomial(torch.stack(probabilities[:2]), 1)[:, 0]
    assert torch.equal(again[:, -1], draws)
    strong = model.generate(inputs, 30, freq_penalty=1e6, return_type="tokens", stop_at_eos=False)
    for row, mask in zip(strong, inputs.attention_mask, strict=True):
        said = row[inputs.n_pos :].tolist()
        assert len(set(said)) == 30 and not set(said) & set(row[: inputs.n_pos][mask].tolist())


@pytest.mark.parametrize("number", ["next", 2**32 - 1])
def test_a_placeholder_outside_of_the_vocabulary(seed: int, number: Any) -> None:
    """Penalties look up the prompt's tokens, of which it is one; whatever its number is.

    Rows of scores as long as the number would take gigabytes.
    """
    with_words = worded_model(seed)
    model = small_model(seed, d_vocab=with_words.cfg.image_token_id)
    model.cfg.image_token_id = model.cfg.d_vocab
    model.tokenizer, model.image_processor = with_words.tokenizer, with_words.image_processor
    inputs = model.prepare("What is this?", picture(seed))
    if number != "next":
        at = inputs.tokens == model.cfg.image_token_id
        model.cfg.image_token_id = number
        inputs = model.inputs_from_tokens(
            inputs.tokens.masked_fill(at, number), inputs.pixel_values
        )
    for drawn in ({"freq_penalty": 0.5}, {"encoder_repetition_penalty": 1.2}):
        options = {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, **drawn}
        tokens = model.generate(inputs, 12, return_type="tokens", stop_at_eos=False, **options)
        assert tokens.shape[1] == inputs.n_pos + 12
        assert int(tokens[:, inputs.n_pos :].max()) < model.cfg.d_vocab


@pytest.mark.parametrize(
    "settings",
    [{}, {"temperature": 0.6, "top_p": 0.9, "top_k": 30}, {"do_sample": True, "min_p": 0.1}],
    ids=["no settings", "settings of sampling", "the checkpoint samples"],
)
def test_no_warning_that_nobody_caused(
    settings: dict[str, Any], pair: Pair, caplog: pytest.LogCaptureFixture, monkeypatch: Any
) -> None:
    """Not of the settings of sampling that `generate` or a checkpoint has, where none is used."""
    model, _ = pair
    model.generation_config = GenerationConfig(**settings)
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    caplog.set_level(logging.WARNING, "transformers")  # TransformerLens's bridge silences it
    said_once = logging.Logger.warning_once  # type: ignore[attr-defined]  # transformers' own
    inputs = model.prepare(TEXTS[0])
    for input in (TEXTS[0], TEXTS, inputs, inputs.tokens):
        for chosen in ({"do_sample": False}, {"temperature": 0}, {"do_sample": True}, {}):
            said_once.cache_clear()
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                model.generate(input, 2, **chosen)
            assert not caplog.records, (chosen, caplog.text)
    said_once.cache_clear()
    model.generate(inputs, 2, do_sample=False, top_p=0.7)  # which somebody caused
    assert "top_p" in caplog.text


# Ended rows


@pytest.mark.parametrize("end", ["ordinary", "special", "several"])
def test_texts_of_rows_that_end_at_different_times(end: str, pair: Pair) -> None:
    """Each is that of its row alone in transformers; padding may be an ordinary token."""
    model, hf = pair
    tokenizer = model.tokenizer
    inputs = model.prepare([*TEXTS, "Paris"], template=None)
    free = model.generate(inputs, 12, return_type="tokens", **GREEDY)[:, inputs.n_pos :]
    ends = [int(free[0, 3])]
    if end == "several":
        ends.append(int(free[2, 5]))
    if end == "special":  # what row 0 says fourth is then said at "</s>"
        ends = [tokenizer.eos_token_id]
        with torch.no_grad():
            hf.lm_head.weight[ends[0]] = hf.lm_head.weight[int(free[0, 3])] * 1.001
            model.unembed.weight[ends[0]] = hf.lm_head.weight[ends[0]]
    padding = int(free[1, 0])
    alone = []
    for row, mask in zip(inputs.tokens, inputs.attention_mask, strict=True):
        prompt = row[mask][None]
        # The padding token may be a word of the prompt, which transformers would mask.
        given = {"attention_mask": torch.ones_like(prompt), "pad_token_id": padding}
        out = hf.generate(prompt, max_new_tokens=12, do_sample=False, eos_token_id=ends, **given)
        alone.append(tokenizer.decode(out[0, prompt.shape[1] :], skip_special_tokens=True))
    options: dict[str, Any] = {"eos_token_id": ends, "pad_token_id": padding, "do_sample": False}
    assert model.generate(inputs, 12, **options) == alone
    if len(ends) == 1:
        assert model.generate(inputs, 12, **options | {"eos_token_id": ends[0]}) == alone
    whole = model.generate(inputs.tokens, 12, attention_mask=inputs.attention_mask, **options)
    expected = hf.generate(
        inputs.tokens, attention_mask=inputs.attention_mask, max_new_tokens=12, **options
    )
    assert torch.equal(whole, expected)
    texts = model.generate([*TEXTS, "Paris"], 12, **options)
    for text, prompt, said in zip(texts, [*TEXTS, "Paris"], alone, strict=True):
        assert text == prompt + said


def test_other_ways_to_end(pair: Pair) -> None:
    model, hf = pair
    inputs = model.prepare(TEXTS[0], template=None)
    stop = list("abcdefghijklmnopqrstuvwxyz")  # one of them comes soon
    out = hf.generate(
        inputs.tokens,
        max_new_tokens=40,
        do_sample=False,
        eos_token_id=None,
        stop_strings=stop,
        tokenizer=model.tokenizer,
    )
    expected = model.tokenizer.decode(out[0, inputs.n_pos :], skip_special_tokens=True)
    assert len(expected) < len(model.generate(inputs, 40, **GREEDY))
    assert model.generate(inputs, 40, stop_strings=stop, **GREEDY) == expected
    model.generation_config.stop_strings = stop
    assert model.generate(inputs, 40, **GREEDY) == expected
    model.generation_config.stop_strings = None
    criterion = MaxLengthCriteria(inputs.n_pos + 3)
    for criteria in (criterion, [criterion]):
        tokens = model.generate(
            inputs, 12, stopping_criteria=criteria, return_type="tokens", **GREEDY
        )
        assert tokens.shape[1] == inputs.n_pos + 3


@pytest.mark.parametrize("cached", [True, False])
def test_a_text_as_long_as_the_model_was_made_for(cached: bool, pair: Pair) -> None:
    model, _ = pair
    inputs = model.prepare(TEXTS, template=None)
    longest = int(inputs.attention_mask.sum(1).max())
    options = GREEDY | {"return_type": "tokens", "use_past_kv_cache": cached}
    free = model.generate(inputs, 9, **options)
    model.cfg.n_ctx = longest + 4
    with pytest.warns(UserWarning, match="ended after 5 tokens"):
        ended = model.generate(inputs, 9, **options)
    assert torch.equal(ended, free[:, : inputs.n_pos + 5])  # the last one is not run
    assert torch.equal(model.generate(inputs, 5, **options), ended)
    model.cfg.n_ctx = longest - 1
    with pytest.raises(ValueError, match="shorten the prompt"):
        model.generate(inputs, 1, **options)


# Errors


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"max_new_tokens": -1}, ValueError, "max_new_tokens=-1"),
        ({"max_new_tokens": 2.5}, Exception, "max_new_tokens"),
        ({"max_new_tokens": True}, ValueError, "max_new_tokens=True"),
        ({"temperature": -1.0}, ValueError, "temperature=-1.0"),
        ({"temperature": float("nan")}, ValueError, "temperature=nan"),
        ({"top_k": -3}, ValueError, "top_k=-3"),
        ({"top_p": 1.5}, ValueError, "top_p=1.5"),
        ({"top_p": -0.1}, ValueError, "top_p=-0.1"),
        ({"repetition_penalty": 0.0, "do_sample": False}, ValueError, "penalty"),
        ({"freq_penalty": -1.0}, ValueError, "freq_penalty=-1.0"),
        ({"padding_side": "up"}, Exception, "padding_side"),
        ({"max_tokens": 3}, TypeError, "no option 'max_tokens'.*max_new_tokens"),
        ({"temprature": 3.0}, TypeError, "no option 'temprature'; did you mean temperature"),
        ({"past_kv_cache": None}, TypeError, "no option 'past_kv_cache'.*use_past_kv_cache"),
        ({"output_hidden_states": True}, NotImplementedError, "run_with_cache"),
        ({"return_dict_in_generate": True}, NotImplementedError, "output_logits=True"),
        ({"cache_implementation": "static"}, NotImplementedError, "='static'.*decided here"),
        ({"streamer": object()}, NotImplementedError, "generate_stream"),
        ({"num_beams": 2}, ValueError, "num_beams=2"),
    ],
)
def test_what_cannot_be_is_said(
    options: dict[str, Any], error: type[Exception], says: str, pair: Pair
) -> None:
    model, _ = pair
    tokens = model.prepare(TEXTS[0], template=None).tokens
    with pytest.raises(error, match=says):
        model.generate(tokens, **{"max_new_tokens": 2, **options})


def test_ids_that_are_padded_on_the_right(pair: Pair) -> None:
    """Nothing can be said after padding."""
    model, _ = pair
    tokens = model.to_tokens(TEXTS, padding_side="right")
    with pytest.raises(ValueError, match="row 0 .*pad on the left"):
        model.generate(tokens, 3, padding_side="right")
    left = model.to_tokens(TEXTS, padding_side="left")
    said = model.generate(left, 3, padding_side="left", return_type="str", **GREEDY)
    assert said == model.generate(TEXTS, 3, **GREEDY)


def test_an_unknown_return_type(pair: Pair) -> None:
    model, _ = pair
    given: Any = {"return_type": "text"}
    with pytest.raises(Exception, match="return_type"):  # the test's type checker may be first
        model.generate(TEXTS[0], 2, **given)
    model.tokenizer = None
    tokens = torch.tensor([[5, 6]])
    assert model.generate(tokens, 2).shape == (1, 4)
    with pytest.raises(ValueError, match="no tokenizer.*return_type='tokens'"):
        model.generate(tokens, 2, return_type="str")


# A stream


def test_a_stream_is_the_whole_in_pieces(pair: Pair) -> None:
    model, _hf = pair
    bridge = bridge_of(pair)
    options = GREEDY | BRIDGE | {"max_tokens_per_yield": 3, "verbose": False}
    tokens = model.prepare(TEXTS[0], template=None, prepend_bos=True).tokens
    ours, theirs = (list(each.generate_stream(tokens, 11, **options)) for each in (model, bridge))
    assert [piece.tolist() for piece in ours] == [piece.tolist() for piece in theirs]
    ours, theirs = (
        list(each.generate_stream(TEXTS[0], 11, prepend_bos=True, **options))
        for each in (model, bridge)
    )
    assert "".join(ours) == "".join(theirs)
    assert len(ours) > 1
    pieces = list(model.generate_stream(TEXTS, 11, **options))
    texts = ["".join(row) for row in zip(*pieces, strict=True)]
    assert texts == model.generate(TEXTS, 11, **GREEDY)
    inputs = model.prepare(TEXTS[0], template=None)
    pieces = list(model.generate_stream(inputs, 11, **options))
    assert "".join(pieces) == model.generate(inputs, 11, **GREEDY)
    with pytest.raises(TypeError, match="generate_stream has no option 'return_cache'"):
        next(model.generate_stream(inputs, 11, return_cache=True))
    with pytest.raises(ValueError, match="max_tokens_per_yield=0"):
        next(model.generate_stream(inputs, 11, max_tokens_per_yield=0))
