"""What is compared of an answer."""

import pytest

from mmlens.data.metrics import answer_alone


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
