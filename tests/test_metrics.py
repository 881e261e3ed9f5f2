"""What is compared of an answer."""

import pytest

from mmlens.data.metrics import (
    answer_alone,
    exact_match,
    is_right,
    normalise_answer,
    parse_choice,
)


def check_right(said: str, answer: str, right: bool) -> None:
    assert is_right(said, [answer]) is right
    assert normalise_answer(normalise_answer(said)) == normalise_answer(said)


@pytest.mark.parametrize(
    "said, answer",
    [
        (" Nairobi. The flag of", "Nairobi"),
        ("Nairobi, which is", "Nairobi, which is"),
        ("Nairobi,", "Nairobi"),
        ("Yes, it is!\nQ: what", "Yes, it is"),
        ("Rome?", "Rome"),
        ("St. John's. It lies", "St. John's"),
        ("the U.S. dollar", "the U.S. dollar"),
        ("3.14 metres", "3.14 metres"),
        ("No. There is", "No"),
        ("Mt. Fuji. It", "Mt. Fuji"),
        ("S\u00e3o Tom\u00e9. The", "S\u00e3o Tom\u00e9"),
        ("one\ntwo", "one"),
        ("", ""),
    ],
)
def test_an_answer_ends_with_its_sentence(said: str, answer: str) -> None:
    assert answer_alone(said) == answer


@pytest.mark.parametrize(
    "said, answer, right",
    [
        ("3.5 metres", "3.5", True),
        ("3.5 metres", "3", False),
        ("3. It is", "3", True),
        ("1,500 metres", "1", False),
        ("1500 metres", "1,500", True),
        ("1,500,000", "1500000", True),
        ("10:30", "10", False),
        ("10:30", "10:30", True),
        ("3/4", "3", False),
        ("\u00bd of it", "1/2", True),
        ("\u22125", "5", False),
        ("\u22125", "-5", True),
        ("3, 4", "3", True),
        ("1.Oslo", "1", True),
    ],
)
def test_a_number_is_one_word(said: str, answer: str, right: bool) -> None:
    check_right(f" {said}", answer, right)


@pytest.mark.parametrize(
    "said, answer, right",
    [
        ("\u0926\u093f\u0932", "\u0926\u093f\u0932", True),  # dil
        ("\u0926\u093e\u0932", "\u0926\u093f\u0932", False),  # daal
        ("\u0926\u093f\u0932\u094d\u0932\u0940", "\u0926\u093f\u0932", False),  # Dilli
        ("\u304b\u304e", "\u304b\u304d", False),  # kagi, kaki
        ("\u0e44\u0e01\u0e48", "\u0e44\u0e01", False),  # a tone
        ("Ti\u1ebfng Vi\u1ec7t", "tieng viet", True),
        ("\u0392\u03ad\u03c1\u03bd\u03b7", "\u0392\u03b5\u03c1\u03bd\u03b7", True),
        ("+", "+", True),
        ("+5", "+", False),
        ("-", "+", False),
    ],
)
def test_signs_tell_words_apart(said: str, answer: str, right: bool) -> None:
    """Vowel signs and the voicing of kana went as accents do; an answer "+" was never right."""
    check_right(f" {said}. And", answer, right)


@pytest.mark.parametrize(
    "said, options, taken",
    [
        ("-5", ["5", "-5"], 1),
        ("x > 0", ["x < 0", "x > 0"], 1),
        (">", ["<", ">", "="], 1),
        ("C++", ["C", "C++"], 1),
        ("The cat.", ["a dog", "cat"], 1),
        ("x = 0", ["x < 0", "x > 0"], None),  # without punctuation it would be both
        ("", ["a", "the cat"], None),
        ("<image>", ["<image>", "<image>"], 0),
    ],
)
def test_an_option_is_taken_as_it_stands(said: str, options: list[str], taken: int | None) -> None:
    assert parse_choice(said, options) == taken
    assert exact_match(said, [said]) and not exact_match("", ["the", "+"])
