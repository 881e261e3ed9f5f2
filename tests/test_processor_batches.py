"""What transformers' processor returns, given to a model as it is, in parts, or otherwise."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import jaxtyping
import pytest
import torch
from small_tiled_models import noise_picture, tiled_model
from transformers import BatchFeature, DynamicCache

from mmlens.model.transformer import HookedMultimodalTransformer


@pytest.fixture
def as_a_user() -> Iterator[None]:
    """Signatures are not enforced, as where no test runs: what is refused is refused by us."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def some_batch(seed: int) -> tuple[HookedMultimodalTransformer, BatchFeature]:
    """Two prompts, padded on the left, with one and two images."""
    chance = random.Random(seed)
    model = tiled_model(seed)
    sizes = [(chance.randint(1, 60), chance.randint(1, 60)) for _ in range(3)]
    one, two, three = (noise_picture(seed + i, *size) for i, size in enumerate(sizes))
    texts = ["<image> what is this", "of <image> and <image> which"]
    inputs = model.prepare(texts, [one, [two, three]], template=None)
    assert inputs.visual is not None
    mask = inputs.attention_mask.long()
    return model, BatchFeature(
        {"input_ids": inputs.tokens, "attention_mask": mask, **inputs.visual}
    )


@torch.no_grad()
def test_generate_takes_a_batch_and_is_greedy_as_transformers(seed: int) -> None:
    model, batch = some_batch(seed)
    given = dict(batch)
    inputs = model.inputs_from_tokens(given.pop("input_ids"), **given)
    greedy = model.generate(inputs, 5, return_type="tokens", do_sample=False)
    assert torch.equal(model.generate(**batch, max_new_tokens=5), greedy)
    pieces = model.generate_stream(**batch, max_new_tokens=5, max_tokens_per_yield=2)
    assert torch.equal(torch.cat(list(pieces), dim=1), greedy)
    with pytest.raises(TypeError, match="either inputs"):
        model.generate("a text", **batch)


@torch.no_grad()
def test_a_batch_as_a_whole_is_no_list_of_texts(as_a_user: None, seed: int) -> None:
    """Its keys were, so far: `input_ids` is a text like any other."""
    model, batch = some_batch(seed)
    for call in (model, model.run_with_cache, model.generate, model.record, model.verify_hooks):
        with pytest.raises(TypeError, match=r"not on BatchFeature; .* model\(\*\*batch\)"):
            call(batch)


@torch.no_grad()
def test_what_is_none_in_a_batch_is_left_out(seed: int) -> None:
    model, batch = some_batch(seed)
    text = {"input_ids": model.to_tokens("which is it"), "pixel_values": None, "image_sizes": None}
    assert torch.equal(model(**text), model(text["input_ids"]))
    assert torch.equal(model(**batch, pixel_attention_mask=None), model(**batch))
    ids = text.pop("input_ids")
    assert model.inputs_from_tokens(ids, **text).visual is None


@pytest.mark.parametrize("name", ["input_ids", "attention_mask", "pixel_values", "image_sizes"])
@pytest.mark.parametrize("as_other", [lambda x: x.numpy(), lambda x: x.tolist()])
def test_arrays_and_lists_ask_for_tensors(
    name: str, as_other: Any, as_a_user: None, seed: int
) -> None:
    model, batch = some_batch(seed)
    for call in (model, model.run_with_cache, model.generate):
        with pytest.raises(TypeError, match="return_tensors='pt'"):
            call(**{**batch, name: as_other(batch[name])})


def test_sizes_that_are_none(seed: int) -> None:
    model, batch = some_batch(seed)
    sizes = batch["image_sizes"]
    for wrong in (sizes[0], sizes * 0, sizes[:, :1], -sizes):
        with pytest.raises(ValueError, match=r"image_sizes must be \[image, 2\]"):
            model(**{**batch, "image_sizes": wrong})


def test_images_beside_inputs_that_have_theirs(seed: int) -> None:
    model, batch = some_batch(seed)
    inputs = model.prepare("which", noise_picture(seed, 9, 9))
    for name in ("pixel_values", "image_sizes"):
        with pytest.raises(ValueError, match="with token ids"):
            model(inputs, **{name: batch[name]})


def test_a_box_of_three_numbers(seed: int) -> None:
    model, _ = some_batch(seed)
    inputs = model.prepare("which", noise_picture(seed, 9, 9))
    with pytest.raises(ValueError, match="a box is"):
        inputs.patches((1, 2, 3))


@torch.no_grad()
def test_transformers_arguments_that_ask_for_nothing(seed: int) -> None:
    """What scripts give to transformers' models beside a batch."""
    model, batch = some_batch(seed)
    plain = model(**batch)
    types = {"token_type_ids": torch.zeros_like(batch["input_ids"])}
    types["mm_token_type_ids"] = (batch["input_ids"] == model.cfg.image_token_id).long()
    common = {"output_attentions": False, "output_hidden_states": None, "past_key_values": None}
    common |= {"cache": None, "mm_encoder_outputs": None}
    given = {**batch, **types, **common, "return_dict": False, "logits_to_keep": 0}
    assert torch.equal(model(**given, use_cache=False), plain)
    logits, cache = model.run_with_cache(**given, use_cache=False, names_filter="hook_embed")
    assert torch.equal(logits, plain) and list(cache) == ["hook_embed"]
    ids = {**batch}
    assert torch.equal(model(model.inputs_from_tokens(ids.pop("input_ids"), **ids, **types)), plain)
    said = model.generate(**batch, max_new_tokens=4)
    settings = {
        "synced_gpus": False,
        "tokenizer": None,
        "return_dict_in_generate": False,
        "max_new_tokens": 4,
    }
    for use_cache in (True, False, None):
        again = model.generate(**batch, **types, **common, **settings, use_cache=use_cache)
        assert torch.equal(again, said)


def test_use_cache_is_use_past_kv_cache(seed: int) -> None:
    model, batch = some_batch(seed)
    lengths: list[int] = []

    def count(activation: torch.Tensor, hook: Any) -> None:
        lengths.append(activation.shape[1])

    for use_cache, later in ((True, [1, 1]), (False, [1, 2])):
        lengths.clear()
        with model.hooks(fwd_hooks=[("blocks.0.hook_resid_post", count)]):
            model.generate(**batch, max_new_tokens=3, min_new_tokens=3, use_cache=use_cache)
        n = batch["input_ids"].shape[1]
        assert lengths == [n, *(later if use_cache else [n + more for more in later])]


@pytest.mark.parametrize(
    ("call", "name", "value", "instead"),
    [
        ("forward", "use_cache", True, "past_kv_cache=KeyValueCache"),
        ("forward", "cache", DynamicCache(), "past_kv_cache=KeyValueCache"),
        ("generate", "cache", DynamicCache(), "past_kv_cache=KeyValueCache"),
        ("forward", "mm_encoder_outputs", object(), "projector.hook_out"),
        ("generate", "tokenizer", object(), "stop_strings are told by model.tokenizer"),
        ("forward", "output_attentions", True, "run_with_cache"),
        ("forward", "return_dict", True, "logits as a tensor"),
        ("forward", "inputs_embeds", torch.zeros(1, 2, 3), "start_at_layer=0"),
        ("forward", "logits_to_keep", 1, r"logits\[:, -n:\]"),
        ("forward", "vision_feature_layer", -2, r"model\.cfg\.vision\.feature_layers"),
        ("generate", "generation_config", object(), "to_diff_dict"),
        ("generate", "logits_processor", [], "suppress_tokens"),
    ],
)
def test_others_are_refused_in_one_line(
    call: str, name: str, value: Any, instead: str, seed: int
) -> None:
    model, batch = some_batch(seed)
    with pytest.raises(NotImplementedError, match=instead) as refused:
        (model if call == "forward" else model.generate)(**batch, **{name: value})
    assert "\n" not in str(refused.value) and str(refused.value).startswith(f"{call}({name}=")


def test_labels_are_refused_in_one_line(seed: int) -> None:
    model, batch = some_batch(seed)
    with pytest.raises(NotImplementedError, match="cross_entropy") as refused:
        model(**batch, labels=batch["input_ids"])
    assert "\n" not in str(refused.value)
