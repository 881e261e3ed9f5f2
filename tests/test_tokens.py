"""One meaning of tokens: every door gives transformers' ids, and each row what it gives alone.

The references: transformers' tokenizers and processors, its models on one row at a time, and
TransformerLens's bridge.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import test_llava_code_prompts as llava_code
import torch
from hypothesis import Phase, assume, given, settings
from hypothesis import strategies as st
from PIL import Image
from random_models import SHAPES, Prompts, Shape, hooked, random_language_model, random_llava
from rounding import assert_same, rounded_otherwise
from small_models import language_model, small_inputs, small_model
from small_tokenizers import KINDS, tokenizer_with
from torch import Tensor
from transformers import (
    AutoTokenizer,
    CLIPImageProcessor,
    GenerationMixin,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from mmlens.branching.recording import Recording
from mmlens.inputs.collation import collate
from mmlens.model.components import KeyValueCache
from mmlens.model.transformer import HookedMultimodalTransformer

TEXTS = ["The city", "The capital of this country is", "What is the flag of the second country?"]
LANGUAGE_MODELS = ["grouped queries", "mistral, window", "qwen2, some windows", "phi", "tied"]
MULTIMODAL = ["grouped queries", "class token kept", "mistral", "phi on siglip", "qwen2"]


@dataclass
class Opened:
    """A random checkpoint with a tokenizer, opened here and by transformers."""

    hf: Any
    tokenizer: Any
    """Transformers' own, which nothing here has touched."""
    processor: Any
    model: HookedMultimodalTransformer

    @torch.no_grad()
    def alone(self, hf: Any, text: str, pictures: list[Image.Image], n_last: int = 0) -> Tensor:
        """Transformers' logits [pos, d_vocab] of one row by itself."""
        return hf(**self.given(text, pictures)).logits[0, -n_last:]

    def given(self, text: str, pictures: list[Image.Image]) -> dict[str, Tensor]:
        """What transformers makes of one row, in the model's dtype."""
        if not pictures:
            given = self.tokenizer(text, return_tensors="pt")
        else:
            given = self.processor(text=text, images=pictures, return_tensors="pt")
        dtype = self.hf.dtype
        return {name: x.to(dtype) if x.is_floating_point() else x for name, x in given.items()}

    def assert_rows(
        self, texts: list[str], images: list[Any], rows: list[Tensor], n_last: int = 0
    ) -> None:
        """Assert that logits are transformers' of each text alone, but for rounding."""

        def expected(hf: Any) -> dict[str, Tensor]:
            pairs = enumerate(zip(texts, images, strict=True))
            return {str(i): self.alone(hf, *pair, n_last=n_last) for i, pair in pairs}

        found = {str(i): row for i, row in enumerate(rows)}
        assert_same(found, expected(self.hf), lambda: expected(rounded_otherwise(self.hf)))

    def assert_first_words(self, texts: list[str], images: list[Any], tokens: Tensor) -> None:
        """Assert that the last tokens are the most probable ones after each text alone."""
        pairs = zip(texts, images, strict=True)
        logits = torch.stack([self.alone(self.hf, *pair, n_last=1)[0] for pair in pairs])
        if self.processor is not None:
            logits[:, self.processor.image_token_id] = -torch.inf  # no word
        best = logits.topk(2)
        sure = best.values[:, 0] - best.values[:, 1] > 1e-3  # else rounding may decide
        assert torch.equal(tokens[sure, -1], best.indices[sure, 0])


def opened(folder: Path, shape: Shape, tokenizer: Any, with_images: bool = False) -> Opened:
    """Written by transformers; a `[PAD]` after the words has no row in the embedding."""
    image_id = tokenizer.convert_tokens_to_ids("<image>")
    shape = replace(shape, vocabulary=image_id + 1, image_id=image_id)
    hf = random_llava(shape) if with_images else random_language_model(shape)
    tokenizer.save_pretrained(folder)
    model = hooked(hf, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)  # as transformers reads it beside a config
    processor = None
    if with_images:
        side = hf.config.vision_config.image_size
        size = {"height": side, "width": side}
        pictures = CLIPImageProcessor(size=size, crop_size=size)
        model.image_processor = pictures
        processor = LlavaProcessor(
            pictures,
            tokenizer,
            patch_size=shape.patch,
            vision_feature_select_strategy=shape.select,
            num_additional_image_tokens=int(shape.tower == "clip"),
        )
    return Opened(hf, tokenizer, processor, model)


def picture() -> Image.Image:
    return Image.fromarray(np.random.randint(0, 256, (11, 14, 3), dtype=np.uint8))


def real_rows(logits: Tensor, mask: Any) -> list[Tensor]:
    """Logits of each row without its padding."""
    return [row[torch.as_tensor(real).bool()] for row, real in zip(logits, mask, strict=True)]


# Any family and tokenizer, through every door

WITHOUT_SHRINKING = (Phase.explicit, Phase.reuse, Phase.generate)
"""Every example makes a model: shrinking would take minutes."""

tokenizers = st.builds(
    lambda kind, bos, adds_eos, pad, side: tokenizer_with(
        kind, bos=bos, adds_eos=adds_eos, pad=pad, padding_side=side
    ),
    st.sampled_from(KINDS),
    st.sampled_from(["added", "named", "none"]),
    st.booleans(),
    st.sampled_from(["inside", "outside", "eos"]),
    st.sampled_from(["left", "right"]),
)
words = "The capital city of this country is red, white 这个国家的首都 é🇫🇷 <s> \n".split(" ")
sentences = st.lists(st.sampled_from(words), min_size=1, max_size=9).map(" ".join)


def check_text(data: st.DataObject) -> None:
    """Ids, mask and logits of a random batch of text through every door."""
    torch.manual_seed(data.draw(st.integers(0, 2**31)))
    tokenizer = data.draw(tokenizers)
    shape = SHAPES[data.draw(st.sampled_from(LANGUAGE_MODELS))]
    texts = data.draw(st.lists(sentences, min_size=1, max_size=4))
    # Of a text that begins with BOS, transformers' tokenizer makes one with two of them.
    texts = [text if not text.startswith("<s>") else f"a{text}" for text in texts]
    with TemporaryDirectory() as folder:
        case = opened(Path(folder), shape, tokenizer)
    tokenizer = case.tokenizer
    model, images = case.model, [[]] * len(texts)
    expected = tokenizer(texts, padding=True, return_tensors="pt")
    left = tokenizer(texts, padding=True, padding_side="left", return_tensors="pt")

    tokens = model.to_tokens(texts)
    assert torch.equal(tokens, expected["input_ids"])
    prepared = model.prepare(texts, template=None)
    assert torch.equal(prepared.tokens, left["input_ids"])
    assert torch.equal(prepared.attention_mask, left["attention_mask"].bool())
    inferred = model.to_inputs(left["input_ids"])
    assert torch.equal(inferred.attention_mask, left["attention_mask"].bool())
    for span in ("last", "text"):
        for row in range(len(texts)):
            assert torch.equal(inferred.span(span, batch=row), prepared.span(span, batch=row))

    with torch.no_grad():
        by_text, losses = model(texts, return_type="both", loss_per_token=True)
        mask = expected["attention_mask"]
        case.assert_rows(texts, images, real_rows(by_text, mask))
        case.assert_rows(texts, images, real_rows(model(tokens), mask))
        case.assert_rows(texts, images, real_rows(model.run_with_cache(tokens)[0], mask))
        ours = model(prepared), left["attention_mask"]
        case.assert_rows(texts, images, real_rows(*ours))
        case.assert_rows(texts, images, real_rows(model(left["input_ids"]), ours[1]))
        recorded = model.record(left["input_ids"]).logits()
        case.assert_rows(texts, images, list(recorded), n_last=1)
        again = model(tokens, return_type="loss", loss_per_token=True)
        torch.testing.assert_close(again, losses, rtol=0, atol=0, equal_nan=True)
        each = [model(text, return_type="loss", loss_per_token=True)[0] for text in texts]
        for row, alone in zip(losses, each, strict=True):
            # Logits are the same within 1e-4 (`rounding`), and a loss moves by at most twice that.
            torch.testing.assert_close(row[~row.isnan()], alone, rtol=0, atol=2e-4)
        for prompt in (texts, left["input_ids"]):
            words = model.generate(prompt, 1, do_sample=False, return_type="tokens")
            case.assert_first_words(texts, images, words)


def check_images(data: st.DataObject) -> None:
    """The same of text and images."""
    seed = data.draw(st.integers(0, 2**31))
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    tokenizer = data.draw(tokenizers)
    shape = SHAPES[data.draw(st.sampled_from(MULTIMODAL))]
    rows = data.draw(st.lists(st.tuples(sentences, st.integers(0, 2)), min_size=1, max_size=3))
    texts = ["<image>" * n + text for text, n in rows]
    texts = [text if not text.startswith("<s>") else f"a{text}" for text in texts]
    images = [[picture() for _ in range(n)] for _, n in rows]
    with TemporaryDirectory() as folder:
        case = opened(Path(folder), shape, tokenizer, with_images=True)
    model, shown = case.model, [each for row in images for each in row]
    given = {"padding": True, "padding_side": "left", "return_tensors": "pt"}
    if shown:
        expected = case.processor(text=texts, images=[row for row in images if row], **given)
    else:
        expected = case.tokenizer(texts, **given)
    prepared = model.prepare(texts, images, template=None)
    assert torch.equal(prepared.tokens, expected["input_ids"])
    assert torch.equal(prepared.attention_mask, expected["attention_mask"].bool())
    with torch.no_grad():
        mask = expected["attention_mask"]
        case.assert_rows(texts, images, real_rows(model(prepared), mask))
        from_ids = model(expected["input_ids"], pixel_values=expected.get("pixel_values"))
        case.assert_rows(texts, images, real_rows(from_ids, mask))
        case.assert_first_words(
            texts, images, model.generate(prepared, 1, do_sample=False, return_type="tokens")
        )


def check_llava_code(data: st.DataObject) -> None:
    """Ids and logits of text and images in the formats of LLaVA's code, which has no processor.

    Its ids are those of transformers' tokenizer on the same files, piece by piece.
    """
    seed = data.draw(st.integers(0, 2**31))
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    name = data.draw(st.sampled_from(list(llava_code.FORMATS)))
    rows = data.draw(st.lists(st.lists(sentences, min_size=1, max_size=3), min_size=1, max_size=3))
    rows = [[each.replace("<s>", "is") for each in pieces] for pieces in rows]
    texts = ["<image>".join(pieces) for pieces in rows]
    images = [[picture() for _ in pieces[1:]] for pieces in rows]
    with TemporaryDirectory() as folder:
        these, model, tokenizer = llava_code.opened(name, Path(folder))
    prepared = model.prepare(texts, images, template=None)
    ids = [
        llava_code.piece_by_piece(tokenizer, text, these.image_id, these.n_visual) for text in texts
    ]
    assume(prepared.n_pos <= model.cfg.n_ctx)
    mask = prepared.attention_mask
    real = [row[mask[i]].tolist() for i, row in enumerate(prepared.tokens)]
    assert real == ids
    assert mask.sum(dim=1).tolist() == [len(row) for row in ids] and mask[:, -1].all()
    for text, shown, expected in zip(texts, images, ids, strict=True):
        if not shown:
            assert model.to_tokens(text).tolist() == [expected]
            assert model.to_inputs(text).tokens.tolist() == [expected]

    def alone(these: llava_code.Parts) -> dict[str, Tensor]:
        logits = {}
        for i, row in enumerate(ids):
            tokens = torch.tensor([row])
            one = prepared.rows([i])
            prompts = Prompts(tokens, torch.ones_like(tokens), one.pixel_values)
            logits[str(i)] = these.decoder(**these.embeddings(prompts)).logits[0]
        return logits

    with torch.no_grad():
        found = {str(i): row for i, row in enumerate(real_rows(model(prepared), mask))}
        assert_same(found, alone(these), lambda: alone(these.rounded_otherwise()))


def check_generation(data: st.DataObject) -> None:
    """What each row of a batch says is what transformers says after it alone, to its own end."""
    seed = data.draw(st.integers(0, 2**31))
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    with_images = data.draw(st.booleans())
    shape = SHAPES[data.draw(st.sampled_from(MULTIMODAL if with_images else LANGUAGE_MODELS))]
    counts = st.integers(0, 2 * with_images)
    rows = data.draw(st.lists(st.tuples(sentences, counts), min_size=2, max_size=4))
    texts = ["<image>" * n + text.replace("<s>", "is") for text, n in rows]
    images = [[picture() for _ in range(n)] for _, n in rows]
    with TemporaryDirectory() as folder:
        case = opened(Path(folder), shape, data.draw(tokenizers), with_images)
    model, hf = case.model.double(), case.hf.double()  # where rounding decides no tie
    inputs = model.prepare(texts, images, template=None)
    assume(inputs.n_pos + 9 <= model.cfg.n_ctx)
    if inputs.pixel_values is not None:
        inputs = inputs.with_pixels(inputs.pixel_values.double())
    given = [case.given(*pair) for pair in zip(texts, images, strict=True)]
    unsaid = [case.processor.image_token_id] if with_images else None

    def said_alone(ends: list[int]) -> list[list[int]]:
        how = {"max_new_tokens": 9, "do_sample": False, "suppress_tokens": unsaid}
        return [
            hf.generate(**one, **how, eos_token_id=ends, pad_token_id=0)[
                0, one["input_ids"].shape[1] :
            ].tolist()
            for one in given
        ]

    free = said_alone([-1])
    ends = [free[0][data.draw(st.integers(0, 5))], free[1][data.draw(st.integers(0, 8))]]
    expected = said_alone(ends)
    words = case.tokenizer.batch_decode(expected, skip_special_tokens=True)
    embed = hf.get_input_embeddings()
    for cached in (True, False):
        how = {"eos_token_id": ends, "do_sample": False, "use_past_kv_cache": cached}
        assert model.generate(inputs, 9, return_type="str", **how) == words
        tokens = model.generate(inputs, 9, return_type="tokens", **how)[:, inputs.n_pos :]
        embeds = model.generate(inputs, 9, return_type="embeds", **how)
        assert tokens.shape[1] == max(map(len, expected))
        for row, ids in enumerate(expected):
            assert tokens[row, : len(ids)].tolist() == ids
            assert len(set(tokens[row, len(ids) :].tolist())) <= 1  # padding
            with torch.no_grad():
                entering = hf(**given[row], output_hidden_states=True).hidden_states[0][0]
                entering = torch.cat([entering, embed(torch.tensor(ids))])
            first = inputs.n_pos - given[row]["input_ids"].shape[1]
            torch.testing.assert_close(embeds[row, first : first + len(entering)], entering)


@settings(max_examples=2, phases=WITHOUT_SHRINKING)
@given(st.data())
def test_text_is_transformers_text_through_every_door(data: st.DataObject) -> None:
    check_text(data)


@settings(max_examples=2, phases=WITHOUT_SHRINKING)
@given(st.data())
def test_images_are_transformers_images_through_every_door(data: st.DataObject) -> None:
    check_images(data)


@settings(max_examples=2, phases=WITHOUT_SHRINKING)
@given(st.data())
def test_prompts_of_llavas_code_are_transformers_pieces(data: st.DataObject) -> None:
    check_llava_code(data)


@settings(max_examples=2, phases=WITHOUT_SHRINKING)
@given(st.data())
def test_rows_that_end_early_say_what_transformers_says(data: st.DataObject) -> None:
    check_generation(data)


@pytest.mark.slow
@pytest.mark.parametrize("check", [check_text, check_images, check_llava_code, check_generation])
@settings(max_examples=40, phases=WITHOUT_SHRINKING)
@given(data=st.data())
def test_many_families_and_tokenizers(check: Any, data: st.DataObject) -> None:
    check(data)


# Special tokens


@pytest.fixture(scope="module")
def bare() -> HookedMultimodalTransformer:
    """A language model whose tokenizer the tests choose; [PAD] (325) has no row."""
    return language_model(7, d_vocab=325)


@pytest.mark.parametrize("adds_eos", [False, True])
@pytest.mark.parametrize("bos", ["added", "named", "none"])
@pytest.mark.parametrize("kind", KINDS)
def test_bos_as_the_tokenizer_or_as_asked(
    kind: str, bos: str, adds_eos: bool, bare: HookedMultimodalTransformer
) -> None:
    tokenizer = bare.tokenizer = tokenizer_with(kind, bos=bos, adds_eos=adds_eos)
    text = "this country is"
    words = tokenizer(text, add_special_tokens=False)["input_ids"]
    end = [2] * adds_eos
    first = [] if bos == "none" else [1]
    for asked, expected in [
        (None, tokenizer(text)["input_ids"]),
        (True, [*first, *words, *end]),
        (False, [*words, *end]),
    ]:
        assert bare.to_tokens(text, prepend_bos=asked)[0].tolist() == expected
        prepared = bare.prepare(text, template=None, prepend_bos=asked)
        assert prepared.tokens[0].tolist() == expected
        assert bare.to_inputs(text, prepend_bos=asked).tokens[0].tolist() == expected
        strings = bare.to_str_tokens(text, prepend_bos=asked)
        assert strings == bare.to_str_tokens(torch.tensor(expected))
        with torch.no_grad():
            logits = bare(text, prepend_bos=asked)
            assert torch.equal(logits, bare(torch.tensor([expected])))
    given = bare.to_tokens(f"<s>{text}")[0].tolist()
    assert given.count(1) == 1  # and no second one
    bare.cfg.default_prepend_bos = True
    try:
        assert bare.to_tokens(text)[0].tolist() == [*first, *words, *end]
        assert bare.prepare(text).tokens[0].tolist() == [*first, *words, *end]
        assert bare.to_tokens(text, prepend_bos=False)[0].tolist() == [*words, *end]
    finally:
        bare.cfg.default_prepend_bos = None


def test_a_bert_like_tokenizer_keeps_cls_and_sep(bare: HookedMultimodalTransformer) -> None:
    tokenizer = tokenizer_with("bytes", bos="added", adds_eos=True)
    backend = tokenizer.backend_tokenizer
    bare.tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, cls_token="<s>", sep_token="</s>", pad_token="<pad>"
    )
    expected = bare.tokenizer("this country")["input_ids"]
    assert expected[0] == 1 and expected[-1] == 2
    assert bare.to_tokens("this country")[0].tolist() == expected
    assert bare.to_tokens("this country", prepend_bos=True)[0].tolist() == expected
    assert bare.to_tokens("this country", prepend_bos=False)[0].tolist() == expected[1:]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("bos", ["added", "named"])
def test_texts_longer_than_the_context_are_cut_as_by_transformers(
    bos: str, side: str, bare: HookedMultimodalTransformer
) -> None:
    bare.tokenizer = tokenizer_with("bytes", bos=bos, adds_eos=True, truncation_side=side)
    long = "the capital of this country " * 200
    expected = bare.tokenizer([long, "a"], truncation=True, max_length=bare.cfg.n_ctx, padding=True)
    tokens = bare.to_tokens([long, "a"])
    assert tokens.tolist() == expected["input_ids"] and tokens.shape[1] == bare.cfg.n_ctx
    assert bare.to_tokens(long, truncate=False).shape[1] > bare.cfg.n_ctx
    assert bare.to_tokens(long, prepend_bos=True).shape[1] == bare.cfg.n_ctx


# Padding


def masked(model: HookedMultimodalTransformer, rows: list[list[int]]) -> list[list[int]]:
    return model.inputs_from_tokens(torch.tensor(rows)).attention_mask.long().tolist()


def test_left_padding_is_told_from_token_ids(bare: HookedMultimodalTransformer) -> None:
    rows = [[3, 3, 1, 9], [1, 9, 3, 8], [3, 1, 3, 3], [1, 9, 9, 3]]
    bare.tokenizer = tokenizer_with(pad="inside")
    expected = [[0, 0, 1, 1], [1, 1, 1, 1], [0, 1, 1, 1], [1, 1, 1, 1]]
    assert masked(bare, rows) == expected  # a pad inside of a prompt, or at its end, stays
    at_left = torch.tensor(rows)[:1]
    settings = SimpleNamespace(
        _pad_token_tensor=torch.tensor(3), _eos_token_tensor=torch.tensor([2])
    )
    theirs = GenerationMixin._prepare_attention_mask_for_generation(None, at_left, settings, {})
    assert masked(bare, rows[:1]) == theirs.tolist()
    bare.tokenizer = None
    assert masked(bare, rows) == [[1] * 4] * 4  # nobody names a padding token
    bare.cfg.pad_token_id = 3
    try:
        assert masked(bare, rows) == expected
    finally:
        bare.cfg.pad_token_id = None
    assert masked(bare, [[3, 3]]) == [[1, 1]]


def test_padding_with_a_token_that_also_begins_or_ends_texts(
    bare: HookedMultimodalTransformer,
) -> None:
    bare.tokenizer = tokenizer_with(pad="eos", bos="named")
    assert masked(bare, [[2, 2, 7, 8], [5, 6, 7, 8]]) == [[0, 0, 1, 1], [1, 1, 1, 1]]
    assert masked(bare, [[2, 7, 8]]) == [[1, 1, 1]]  # alone it may be text, as transformers has it
    assert masked(bare, [[2, 2, 1, 8]]) == [[0, 0, 1, 1]]  # a BOS says where the text begins
    assert masked(bare, [[2, 2, 7], [2, 6, 7]]) == [[0, 1, 1], [1, 1, 1]]
    tokenizer = tokenizer_with(bos="named")
    tokenizer.pad_token = tokenizer.bos_token = tokenizer.eos_token  # as Phi-2's and GPT-2's
    bare.tokenizer = tokenizer
    texts = ["this country", "the capital of this country is"]
    for prepend_bos in (False, True):
        given = bare.to_tokens(texts, prepend_bos=prepend_bos, padding_side="left")
        expected = bare.prepare(texts, template=None, prepend_bos=prepend_bos)
        assert torch.equal(given, expected.tokens)
        assert torch.equal(bare.to_inputs(given).attention_mask, expected.attention_mask)


def test_nothing_is_padding_after_a_past(bare: HookedMultimodalTransformer) -> None:
    bare.tokenizer = tokenizer_with(pad="inside", padding_side="left")
    prompt, more = torch.tensor([[1, 9, 8]]), torch.tensor([[3, 3, 7]])
    cache = KeyValueCache(bare.cfg.n_layers)
    with torch.no_grad():
        bare(prompt, past_kv_cache=cache)
        together = bare(torch.cat([prompt, more], dim=1))[:, 3:]
        copied = copy.deepcopy(cache)
        torch.testing.assert_close(bare(more, past_kv_cache=cache), together)
        torch.testing.assert_close(bare.run_with_cache(more, past_kv_cache=copied)[0], together)
        bare.tokenizer = tokenizer_with(pad="outside")
        ended = torch.tensor([[325]])  # what fills a row that has ended
        assert bare(ended, past_kv_cache=cache).isfinite().all()
    with pytest.raises(ValueError, match="325, but this model's ids are"):
        bare(torch.tensor([[1, 325, 9]]))


def test_right_padding_is_left_alone_or_refused(bare: HookedMultimodalTransformer) -> None:
    bare.tokenizer = tokenizer_with(pad="outside", padding_side="right")
    texts = ["this country", "the capital of this country is"]
    tokens = bare.to_tokens(texts)
    assert int(tokens[0, -1]) == 325 == bare.cfg.d_vocab
    with torch.no_grad():
        logits, losses = bare(tokens, return_type="both", loss_per_token=True)
        for row, text in enumerate(texts):
            alone = bare(text)[0]
            torch.testing.assert_close(logits[row, : len(alone)], alone)
            loss = bare(text, return_type="loss", loss_per_token=True)[0]
            torch.testing.assert_close(losses[row, : len(loss)], loss)
            assert losses[row, len(loss) :].isnan().all()
    for use in (bare.generate, bare.record, bare.to_inputs, bare.verify_hooks):
        with pytest.raises(ValueError, match=r"row 0 .* ends with padding \(id 325\).*'left'"):
            use(tokens)
    left = bare.to_tokens(texts, padding_side="left")
    new = bare.generate(left, 2, do_sample=False, return_type="tokens")
    assert torch.equal(new[:, : left.shape[1]], left)
    assert bare.to_inputs(tokens[1:]).n_pos == tokens.shape[1]
    bare.tokenizer.padding_side = "centre"
    with pytest.raises(ValueError, match="'left' or 'right', not 'centre'"):
        bare.to_tokens(texts)


def test_without_a_padding_token(bare: HookedMultimodalTransformer) -> None:
    bare.tokenizer = tokenizer_with(bos="none", pad="none")
    bare.tokenizer.eos_token = None
    bare.cfg.bos_token_id = None
    try:
        with pytest.raises(ValueError, match=r"no padding token: set model\.tokenizer\.pad_token"):
            bare.to_tokens(["this", "this country is"])
        assert bare.to_tokens(["this country", "this country"]).shape[0] == 2
        inputs = bare.prepare(["this", "this country is"])
        assert inputs.attention_mask.sum(dim=1).tolist() != [inputs.n_pos] * 2
    finally:
        bare.cfg.bos_token_id = 1
    with pytest.raises(ValueError, match="list of texts is empty"):
        bare.to_tokens([])


def test_a_padding_token_without_an_embedding_everywhere(seed: int, tmp_path: Path) -> None:
    tokenizer = tokenizer_with(pad="outside")
    case = opened(tmp_path, SHAPES["grouped queries"], tokenizer, with_images=True)
    model, images = case.model, [[], [picture()], [picture(), picture()]]
    inputs = model.prepare(TEXTS, images, template=None, spans=None)
    assert int(inputs.tokens.max()) == 325 == model.cfg.d_vocab
    rows = [model.prepare(*pair, template=None) for pair in zip(TEXTS, images, strict=True)]
    texts = [row.texts[0] for row in rows if row.texts]
    with torch.no_grad():
        case.assert_rows(texts, images, real_rows(model(inputs), inputs.attention_mask))
        together = collate(rows, model.tokenizer.pad_token_id)
        case.assert_rows(texts, images, real_rows(model(together), inputs.attention_mask))
        for row, recording in zip(rows, Recording.of_each(model, rows), strict=True):
            torch.testing.assert_close(
                recording.logits()[0], model(row)[:, -1], rtol=1e-4, atol=1e-4
            )
        alone = [model.generate(row, 5, return_type="tokens")[0, row.n_pos :] for row in rows]
        batch = model.generate(inputs, 5, return_type="tokens")[:, inputs.n_pos :]
        for found, expected in zip(batch, alone, strict=True):
            assert found.tolist()[: len(expected)] == expected.tolist()


# TransformerLens's methods


def test_methods_equal_the_bridge(seed: int, tmp_path: Path) -> None:
    tokenizer = tokenizer_with("bytes", bos="added", padding_side="left")
    case = opened(tmp_path, SHAPES["grouped queries"], tokenizer)
    model = case.model
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    source = "transformer_lens.model_bridge.sources._bridge_builder"
    bridge = pytest.importorskip(source).build_bridge_from_module(
        copy.deepcopy(case.hf), type(case.hf).__name__, hf_config=case.hf.config, tokenizer=theirs
    )
    for prepend_bos in (True, False):
        for side in ("left", "right"):
            how = {"prepend_bos": prepend_bos, "padding_side": side}
            assert torch.equal(model.to_tokens(TEXTS, **how), bridge.to_tokens(TEXTS, **how))
    long = " ".join(TEXTS * 12)
    for how in ({}, {"move_to_device": False}, {"truncate": False}):
        assert torch.equal(model.to_tokens(long, **how), bridge.to_tokens(long, **how))
    tokens = model.to_tokens(TEXTS)
    assert model.to_string(tokens) == bridge.to_string(tokens)
    assert model.to_string(tokens[1].tolist()) == bridge.to_string(tokens[1].tolist())
    assert model.to_string(tokens[1, 4]) == bridge.to_string(tokens[1, 4])
    for some in (TEXTS[0], TEXTS, tokens[:1], tokens[1], tokens[1].numpy(), list(tokens)):
        assert model.to_str_tokens(some) == bridge.to_str_tokens(some)
    for prepend_bos in (True, False):
        ours = model.to_str_tokens(TEXTS, prepend_bos=prepend_bos)
        assert ours == bridge.to_str_tokens(TEXTS, prepend_bos=prepend_bos)
    assert model.to_single_token(" country") == bridge.to_single_token(" country")
    assert model.to_single_str_token(300) == bridge.to_single_str_token(300)
    text = "this country or that country and this"
    for mode in ("first", "last"):
        for token in (" country", model.to_single_token(" country")):
            for where in (text, model.to_tokens(text), model.to_tokens(text)[0]):
                ours = model.get_token_position(token, where, mode=mode)
                assert ours == bridge.get_token_position(token, where, mode=mode)
    ours = model.get_token_position(" country", text, prepend_bos=False)
    assert ours == bridge.get_token_position(" country", text, prepend_bos=False)

    with torch.no_grad():
        logits = model(TEXTS, prepend_bos=False, padding_side="right")
        theirs = bridge(TEXTS, prepend_bos=False, padding_side="right")
        right = model.to_tokens(TEXTS, prepend_bos=False, padding_side="right")
        torch.testing.assert_close(logits, theirs, rtol=0, atol=1e-4)
        for mask in (None, right != tokenizer.pad_token_id):
            for per_token in (False, True):
                one = slice(2, 3) if mask is None else slice(None)  # the longest is not padded
                args = logits[one], right[one], mask, per_token
                torch.testing.assert_close(model.loss_fn(*args), bridge.loss_fn(*args))
        resid, ids, nothing, mask = model.input_to_embed(TEXTS)
        theirs = bridge.input_to_embed(TEXTS)
        torch.testing.assert_close(resid[mask], theirs[0][mask], rtol=0, atol=1e-5)
        assert torch.equal(ids, theirs[1]) and torch.equal(mask, theirs[3].bool())
        assert nothing is theirs[2] is None
        again = model(resid, start_at_layer=0, attention_mask=mask)
        torch.testing.assert_close(again, model(TEXTS))


def test_the_loss_of_tokens_and_of_inputs(bare: HookedMultimodalTransformer) -> None:
    bare.tokenizer = tokenizer_with(padding_side="left", pad="eos")
    tokens, inputs = bare.to_tokens(TEXTS), bare.prepare(TEXTS)
    with torch.no_grad():
        logits, loss = bare(tokens, return_type="both")
    assert torch.equal(bare.loss_fn(logits, tokens), loss)
    assert torch.equal(bare.loss_fn(logits, inputs), loss)
    each = [bare(text, return_type="loss", loss_per_token=True) for text in TEXTS]
    torch.testing.assert_close(loss, torch.cat(each, dim=1).mean())
    by_token = bare.loss_fn(logits, tokens, per_token=True)
    torch.testing.assert_close(by_token.sum() / sum(one.numel() for one in each), loss)


@pytest.mark.parametrize("images", [(1, 2), (0, 0)], ids=str)
def test_a_run_with_images_goes_on_from_its_embeddings(images: tuple[int, ...], seed: int) -> None:
    """With what `resuming` says where images attend to themselves in both directions."""
    model = small_model(seed, n_layers=3, attention_blocks="image")
    inputs = small_inputs(model, seed, images=images)
    resid, *_, mask = model.input_to_embed(inputs)
    assert torch.equal(mask, inputs.attention_mask)
    logits = model(resid, start_at_layer=0, **model.resuming(inputs, 0))
    assert torch.equal(logits[mask], model(inputs)[mask])
    alone = model(resid, start_at_layer=0, attention_mask=mask)
    if not any(images):
        assert torch.equal(alone[mask], logits[mask])


def test_the_loss_of_samples_of_noise(seed: int) -> None:
    """One row for each sample; the tokens are those of the one prompt."""
    model = small_model(seed, n_layers=2).double()
    inputs = small_inputs(model, seed)
    inputs = inputs.with_pixels(inputs.pixel_values.double())
    noise = torch.randn(3, inputs.n_pos, model.cfg.d_model, dtype=torch.float64)
    noisy = replace(inputs, noise=noise)
    logits, loss = model(noisy, return_type="both")
    counted = [at for at in range(1, inputs.n_pos) if not inputs.is_image[0, at]]
    expected = torch.zeros(3, len(counted), dtype=torch.float64)
    for sample in range(3):
        alone = model(replace(inputs, noise=noise[sample : sample + 1]))[0].log_softmax(-1)
        for number, at in enumerate(counted):
            expected[sample, number] = -alone[at - 1, inputs.tokens[0, at]]
    per_token = model(noisy, return_type="loss", loss_per_token=True)
    assert per_token.shape == (3, inputs.n_pos - 1)
    index = torch.tensor(counted) - 1
    for found, wanted in [
        (loss, expected.mean()),
        (per_token[:, index], expected),
        (model.loss_fn(logits, noisy), expected.mean()),
        (model.loss_fn(logits, noisy.tokens), expected.mean()),
        (model.loss_fn(logits, noisy, per_token=True)[:, index], expected),
    ]:
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.slow
def test_the_demo_begins_with_bos_and_pads_with_its_end_token() -> None:
    """SmolLM2's tokenizer adds no BOS; the demo was trained with one."""
    model = HookedMultimodalTransformer.from_pretrained("demo", device="cpu")
    texts = ["The capital of Italy is the city of", "What is the name of the river in the city of"]
    tokens, bos = model.to_tokens(texts), model.tokenizer.bos_token_id
    assert model.tokenizer.pad_token_id in model.cfg.eos_token_ids
    assert model.tokenizer(texts[0])["input_ids"] == tokens[0, -8:].tolist()
    assert model.prepare(texts).attention_mask.sum(dim=1).tolist() == [9, 12]
    assert tokens[0, -9] == tokens[1, 0] == bos
    with torch.no_grad():
        logits, loss = model(tokens, return_type="both")
        by_text = model(texts, return_type="both")
        assert torch.equal(logits, by_text[0]) and torch.equal(loss, by_text[1])
        rome = model.to_single_token(" Rome")
        assert 0.81 < float(logits[0, -1].softmax(-1)[rome]) < 0.82
        for row, text in enumerate(texts):
            alone = model(text)
            for given in (logits[row], model(tokens[row : row + 1])[0]):
                # 30 layers in float32 that round at other places.
                torch.testing.assert_close(given[-alone.shape[1] :], alone[0], rtol=0, atol=1e-3)


def test_what_are_no_token_ids_is_refused(bare: HookedMultimodalTransformer) -> None:
    """Fractions would be cut off; ids and other streams would fail deep inside of the model."""
    width = bare.cfg.d_model
    ids = torch.tensor([[5, 6, 7]])
    for use, kind, message in [
        (lambda: bare(ids.float()), TypeError, r"whole numbers, not torch.float32: .*start_at"),
        (lambda: bare(ids.bool()), TypeError, r"whole numbers, not torch.bool: .*attention_mask="),
        (lambda: bare(ids[:, :0]), ValueError, r"there are no tokens: .*\(1, 0\)"),
        (lambda: bare(ids[:0]), ValueError, r"there are no tokens: .*\(0, 3\)"),
        (lambda: bare.generate(ids[:, :0]), ValueError, "there are no tokens"),
        (lambda: bare(ids, start_at_layer=1), TypeError, rf"batch, pos, {width}\], not a .*int64"),
        (lambda: bare("text", start_at_layer=1), TypeError, rf"batch, pos, {width}\], not str"),
        (
            lambda: bare(torch.randn(3, width), start_at_layer=1),
            ValueError,
            rf"start_at_layer takes .*{width}\], not \(3, {width}\)",
        ),
        (
            lambda: bare.generate(torch.randn(1, 3, width + 1)),
            ValueError,
            rf"generate takes a .*not \(1, 3, {width + 1}\)",
        ),
    ]:
        with pytest.raises(kind, match=message):
            use()


@pytest.mark.parametrize("n_images", [0, 1, 2])
def test_where_a_token_stands_in_inputs(n_images: int, seed: int) -> None:
    model = small_model(seed)
    inputs = small_inputs(model, seed, images=(n_images,))
    for position in inputs.span("text").tolist():
        token = int(inputs.tokens[0, position])
        same = [at for at, other in enumerate(inputs.tokens[0].tolist()) if other == token]
        assert model.get_token_position(token, inputs) == same[0]
        assert model.get_token_position(token, inputs, mode="last") == same[-1]
    with pytest.raises(TypeError, match=r"inputs.texts .*to_str_tokens\(inputs\)"):
        model.to_string(inputs)


def test_what_is_not_there_says_so(bare: HookedMultimodalTransformer) -> None:
    bare.tokenizer = tokenizer_with(padding_side="left")
    tokens = bare.to_tokens(TEXTS)
    for use, message in [
        (
            lambda: bare.to_str_tokens(tokens),
            r"are several rows: .*to_str_tokens\(list\(tokens\)\)",
        ),
        (lambda: bare.to_string(tokens[None]), r"\[pos\] or \[batch, pos\]"),
        (lambda: bare.get_token_position(" country", "the city"), "does not occur.*'the city'"),
        (lambda: bare.get_token_position("the city", "the city"), r"'the city' is \d tokens"),
        (lambda: bare.get_token_position(9, tokens), "takes one row"),
        (lambda: bare.get_token_position(9, tokens[0], mode="middle"), "'first' or 'last'"),
        (lambda: bare("text", pixel_values=torch.zeros(1, 3, 4, 4)), "go with token ids"),
        (lambda: bare.to_tokens(["this", ""], prepend_bos=False), "text 1 of 2 has no tokens"),
    ]:
        with pytest.raises(ValueError, match=message):
            use()
    assert bare.to_str_tokens([5, 6]) == [bare.to_single_str_token(5), bare.to_single_str_token(6)]
