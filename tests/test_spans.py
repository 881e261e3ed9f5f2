"""Phrases to characters, characters to tokens."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_tokenizers import KINDS, small_tokenizer

from mmlens.inputs.spans import (
    SpanNotFoundError,
    encode,
    find_span,
    token_strings,
    tokens_of_replacement,
)


@pytest.mark.parametrize(
    ("text", "phrase", "found"),
    [
        ("the capital of this country?", "this country", "this country"),
        ("the countryside of this country", "country", "country"),
        ("capital of This  Country", "this country", "This  Country"),
        ("capital of this\ncountry", "this country", "this\ncountry"),
        ("what is the U.S. flag", "US", "U.S"),
        ("the bus of the US", "us", "US"),
        ("this country's flag", "this country", "this country"),
        ("the capital of this country", " this country. ", "this country"),
        ("the capital of this country", "this count", "this count"),
        ("THE CAPITAL OF THIS COUNTRY", "this count", "THIS COUNT"),
        ("Côte d’Ivoire's capital", "côte d'ivoire", "Côte d’Ivoire"),
        ("Co\u0302te", "côte", "Co\u0302te"),
        ("这个国家的首都", "国家", "国家"),
        ("die Straße dort", "STRASSE", "Straße"),
        ("1.5 million and 15", "15", "15"),
        ("say (yes) now", "(yes)", "(yes)"),
        ("<image>\nwhat does the image show", "image", "image"),
        ("What?", "?", "?"),
    ],
)
def test_finds_the_phrase(text: str, phrase: str, found: str) -> None:
    start, end = find_span(text, phrase)
    assert text[start:end] == found
    if phrase == "country":
        assert start == text.rindex("country")
    if phrase == "image":
        assert start > 7


def test_first_whole_word_wins_and_within_limits() -> None:
    text = "this country and this country"
    assert find_span(text, "this country") == (0, 12)
    assert find_span(text, "this country", within=(5, len(text))) == (17, 29)
    with pytest.raises(SpanNotFoundError, match="between characters 0 and 5"):
        find_span(text, "country", within=(0, 5))


@pytest.mark.parametrize(
    ("text", "phrase"),
    [
        ("这个国家的首都在哪里？这个国家", "这个国家"),
        ("国家的国旗是国家", "国家"),
        ("请问USA的首都，USA", "USA"),
        ("この国の首都はどこですか。この国", "この国"),
        ("アメリカの首都 アメリカ", "アメリカ"),
        ("เมืองหลวงของประเทศนี้คือ ประเทศนี้", "ประเทศนี้"),
        ("이 나라의 수도는? 이 나라", "이 나라"),
        ("this country's capital, this country", "this country"),
        ("This Country's capital; THIS COUNTRY", "this country"),
        ("the countrywide countryside", "country"),
    ],
)
def test_the_first_of_several_with_and_without_spaces(text: str, phrase: str) -> None:
    start, end = find_span(text, phrase)
    assert start == text.casefold().index(phrase.casefold()) and end == start + len(phrase)
    later = text.casefold().rindex(phrase.casefold())
    assert find_span(text, phrase, within=(start + 1, len(text)))[0] == later


def test_no_letter_is_cut_from_its_marks() -> None:
    text = "ที่นี่ ที"  # the same consonant and vowel, first with a tone mark above
    assert find_span(text, "ที")[0] == text.rindex("ที")
    assert find_span("\u304b\u3099 か", "か")[0] == 3


@pytest.mark.parametrize("phrase", ["that nation", "", "  ", "!!", "ountrx", "image"])
def test_a_phrase_that_is_not_there_shows_the_text(phrase: str) -> None:
    with pytest.raises(SpanNotFoundError, match="capital of this country"):
        find_span("<image> capital of this country", phrase)


@given(st.text(min_size=1, max_size=40), st.data())
def test_every_substring_is_found_or_refused(text: str, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(text) - 1))
    phrase = text[start : data.draw(st.integers(start + 1, len(text)))]
    try:
        low, high = find_span(text, phrase)
    except SpanNotFoundError:
        assert not phrase.strip()
    else:
        assert 0 <= low < high <= len(text)


def covered(kind: str, text: str, phrase: str) -> str:
    encoded = encode(small_tokenizer(kind), text)
    indices = encoded.tokens_in(*find_span(text, phrase))
    assert indices == list(range(indices[0], indices[-1] + 1))
    return small_tokenizer(kind).decode([encoded.ids[i] for i in indices]).strip()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("text", "phrase"),
    [
        ("The capital of this country is", "this country"),
        ("this country is", "this country"),
        ("The flag 🇫🇷 of", "🇫🇷"),
        ("La capitale de la Côte d'Ivoire est", "Côte d'Ivoire"),
        ("国 is the word", "国"),
        ("<image>\nthis country", "this country"),
        ("the  this   country  is", "this   country"),
    ],
)
def test_tokens_of_a_phrase_and_no_others(kind: str, text: str, phrase: str) -> None:
    assert covered(kind, text, phrase) == phrase


@pytest.mark.parametrize("kind", KINDS)
def test_white_space_at_the_edges_adds_no_token(kind: str) -> None:
    text = "of \n 🇫🇷 \n is"
    encoded = encode(small_tokenizer(kind), text)
    wide, exact = encoded.tokens_in(2, text.index("is")), encoded.tokens_in(5, 7)
    assert wide == exact
    strings = token_strings(small_tokenizer(kind), [encoded.ids[i] for i in exact])
    assert all(string.strip() for string in strings)


@given(st.text(alphabet="ab é中🙂▁Ġ\n'", max_size=12), st.text("cdé中🙂", min_size=1, max_size=4))
@pytest.mark.parametrize("kind", KINDS)
def test_tokens_hold_all_characters_of_a_span(kind: str, around: str, phrase: str) -> None:
    text = f"{around} {phrase} {around}"
    start = len(around) + 1
    tokens = encode(small_tokenizer(kind), text)
    indices = tokens.tokens_in(start, start + len(phrase))
    offsets = [tokens.offsets[i] for i in indices]
    held = {place for first, last in offsets for place in range(first, last)}
    assert held >= set(range(start, start + len(phrase)))
    assert held <= set(range(start - 1, start + len(phrase) + 1))


@pytest.mark.parametrize("kind", KINDS)
def test_token_strings_add_up_to_the_text(kind: str) -> None:
    text = "What is the capital of this country?"
    strings = token_strings(small_tokenizer(kind), encode(small_tokenizer(kind), text).ids)
    assert "".join(strings).strip() == text


@pytest.mark.parametrize("kind", KINDS)
def test_replacement_is_tokenised_in_its_context(kind: str) -> None:
    tokenizer = small_tokenizer(kind)
    text = "<image>\nThe capital of this country is"
    ids = tokens_of_replacement(tokenizer, text, find_span(text, "this country"), "Paris")
    assert tokenizer.decode(ids).strip() == "Paris"
    whole = encode(tokenizer, text.replace("this country", "Paris")).ids
    assert any(whole[i : i + len(ids)] == ids for i in range(len(whole)))
    if kind.startswith("bytes"):
        ids = tokens_of_replacement(tokenizer, text, find_span(text, "this country"), "capital")
        assert ids == tokenizer(" capital", add_special_tokens=False)["input_ids"]
        assert len(ids) == 1


def test_replacement_errors() -> None:
    tokenizer = small_tokenizer("bytes")
    with pytest.raises(ValueError, match="not in a text of 5"):
        tokens_of_replacement(tokenizer, "short", (3, 9), "x")
    with pytest.raises(ValueError, match="empty"):
        tokens_of_replacement(tokenizer, "short", (0, 3), " ")


def test_slow_tokenizer_is_refused() -> None:
    class SlowTokenizer:
        is_fast = False

    with pytest.raises(
        ValueError, match=r"SlowTokenizer gives no character offsets.*tokenizer.json"
    ):
        encode(SlowTokenizer(), "text")
