"""Was the answer right? The measures of the data sets, each with its own normalisation.

- `is_right`: does a model's continuation begin with an accepted answer (for base models that go on
  talking)?
- `soft_accuracy`: the VQA and OK-VQA measure, agreement with several annotators.
- `exact_match`: equal to an accepted answer after the same normalisation.
- `parse_choice`: which option of a multiple choice question was taken (MMMU).
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

__all__ = [
    "exact_match",
    "is_right",
    "normalise_answer",
    "normalise_vqa_answer",
    "parse_choice",
    "soft_accuracy",
]

#: what a model may say before the answer itself: "the Republic of Senegal" is Senegal
LEADING = re.compile(r"^(the|a|an|city of|country of|republic of|kingdom of|state of)\s+")
#: apostrophes, and the points of "D.C." but not that of "Guinea.A photo"
ABBREVIATION = re.compile(r"['ʻ’]|(?<=\b[a-z])\.")

# The tables of the VQA evaluation (GT-Vision-Lab/VQA, PythonEvaluationTools/vqaEvaluation/
# vqaEval.py; described on visualqa.org/evaluation.html).
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
NUMBERS = {
    word: str(number)
    for number, word in enumerate("zero one two three four five six seven eight nine ten".split())
} | {"none": "0"}
ARTICLES = ("a", "an", "the")
CONTRACTIONS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
    haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've
    might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've
    shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll
    someone's something'd something'd've something'll that's there'd there'd've there're there's
    they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're
    what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're
    why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're
    you've
""".split()
#: a contraction that lacks one of its apostrophes, and how it is written
RESTORED = {
    word[:at] + word[at + 1 :]: word
    for word in CONTRACTIONS
    for at, letter in enumerate(word)
    if letter == "'"
}
#: marks that may surround an answer to a multiple choice question
EDGES = ",.!?;:'"


def normalise_answer(text: str) -> str:
    """Lower case, without accents, punctuation (hyphens stay), quotes and leading articles."""
    text = unicodedata.normalize("NFKD", text)
    text = "".join(letter for letter in text if not unicodedata.combining(letter)).lower()
    text = " ".join(re.sub(r"[^\w\s-]", " ", ABBREVIATION.sub("", text)).split())
    while (shorter := LEADING.sub("", text)) != text:
        text = shorter
    return text


def is_right(continuation: str, answers: Sequence[str]) -> bool:
    """Whether a model's continuation begins with an accepted answer, as whole words.

    A plural "s" counts as the same word ("Austrians" for "Austrian").
    """
    said = normalise_answer(continuation)
    accepted = filter(None, map(normalise_answer, answers))
    return any(re.match(rf"{re.escape(answer)}s?(?![\w-])", said) for answer in accepted)


def normalise_vqa_answer(text: str) -> str:
    """An answer as the VQA evaluation compares it.

    Punctuation becomes a space, or nothing where a space or a digits' comma shows that it parts no
    words; points stay only before a digit; lower case; "two" is "2"; articles go; "dont" is
    "don't" (GT-Vision-Lab/VQA, vqaEval.py).

    Example:
        >>> normalise_vqa_answer("The two-door car, dont you know.")
        "2 door car don't you know"
    """
    given = text.replace("\n", " ").replace("\t", " ").strip()
    in_number = re.search(r"\d,\d", given) is not None
    cleaned = given
    for mark in PUNCTUATION:
        parts_no_words = in_number or f"{mark} " in given or f" {mark}" in given
        cleaned = cleaned.replace(mark, "" if parts_no_words else " ")
    cleaned = re.sub(r"\.(?!\d)", "", cleaned)
    words = (NUMBERS.get(word, word) for word in cleaned.lower().split())
    return " ".join(RESTORED.get(word, word) for word in words if word not in ARTICLES)


def soft_accuracy(said: str, answers: Sequence[str], *, leave_one_out: bool = False) -> float:
    """The VQA accuracy, min(n / 3, 1), where n annotators gave this answer (Antol et al. 2015).

    Answers of annotators are normalised as the model's is. (The published script normalises theirs
    less, because the released answers are processed already.)

    Args:
        said: the model's answer, and nothing behind it.
        answers: one per annotator, repetitions included (OK-VQA has ten).
        leave_one_out: the mean over all sets of annotators with one left out, as the VQA evaluation
            does to be comparable with the accuracy of humans. It differs only where n is 1, 2 or 3:
            with ten annotators 3 agreeing ones give 0.9 instead of 1.

    Example:
        >>> soft_accuracy("Pony tails", ["pony tail", "pony tails", "pony tails", "braids"])
        0.6666666666666666
    """
    if not answers:
        return 0.0
    wanted = normalise_vqa_answer(said)
    n = sum(normalise_vqa_answer(answer) == wanted for answer in answers)
    if not leave_one_out:
        return min(n / 3, 1.0)
    share = n / len(answers)  # of the sets, in which one of the agreeing annotators is left out
    return share * min((n - 1) / 3, 1.0) + (1 - share) * min(n / 3, 1.0) if n else 0.0


def exact_match(said: str, answers: Sequence[str]) -> bool:
    """Whether the model's answer equals an accepted one, both as `normalise_vqa_answer` has them.

    Example:
        >>> exact_match("The Eiffel Tower.", ["Eiffel tower"])
        True
    """
    wanted = normalise_vqa_answer(said)
    return any(normalise_vqa_answer(answer) == wanted for answer in answers)


def letter(index: int) -> str:
    """Of an option: "A" for 0."""
    return chr(ord("A") + index)


def parse_choice(said: str, options: Sequence[str]) -> int | None:
    """Which option a model's answer to a multiple choice question takes; None where none is found.

    As MMMU's evaluation reads answers (MMMU-Benchmark/MMMU, eval/eval_utils.py): the last letter
    in brackets, "(B)"; else the last letter that stands alone; else, in an answer of more than five
    words, the option whose text comes last. That script guesses at random where nothing is found;
    here it is nobody's answer. An answer that is nothing but an option's text is taken as well.

    Example:
        >>> parse_choice("The answer is (B).", ["a cat", "a dog"])
        1
    """
    text = f" {said.strip().strip(EDGES).strip()} "
    letters = list(map(letter, range(len(options))))
    for form in ("({})", " {} "):
        if (found := _last([text.rfind(form.format(each)) for each in letters])) is not None:
            return found
    for index, option in enumerate(options):
        if exact_match(said, [option]):
            return index
    if len(text.split()) <= 5:
        return None
    return _last([text.lower().rfind(option.lower()) if option else -1 for option in options])


def _last(places: Sequence[int]) -> int | None:
    """The index of the largest place; None where all are -1."""
    best = max(places, default=-1)
    return places.index(best) if best >= 0 else None
