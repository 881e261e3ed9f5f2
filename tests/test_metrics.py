"""What is compared of an answer."""

import pytest

from mmlens.data.metrics import answer_alone, is_right, normalise_answer


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
    assert is_right(f" {said}", [answer]) is right
    assert normalise_answer(normalise_answer(said)) == normalise_answer(said)
