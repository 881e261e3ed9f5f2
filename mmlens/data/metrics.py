"""Measures of whether an answer is right, each with the normalisation of its data set.

- `is_right`: does a model's continuation begin with an accepted answer (for base models that go on
  talking)?
- `soft_accuracy`: the VQA and OK-VQA measure, agreement with several annotators.
- `exact_match`: equal to an accepted answer after the same normalisation.
- `parse_choice`: which option of a multiple choice question was taken (MMMU).
- `yes_no_scores`: accuracy, precision, recall, F1 and the rate of yes (POPE).
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mmlens.utils.texts import check_several

#: what a model may say before the answer itself: "the Republic of Senegal" is Senegal
LEADING = re.compile(r"^(the|a|an|city of|country of|republic of|kingdom of|state of)\s+")
#: apostrophes, and the points of "D.C." but not that of "Guinea.A photo"
ABBREVIATION = re.compile(r"['ʻ’]|(?<=\b[a-z])\.")
#: the minus sign, and what NFKD has in a fraction
IN_NUMBERS = {0x2212: "-", 0x2044: "/"}
THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
#: no part of a word or a number
NO_PART = re.compile(r"[^\w\s.:/-]|(?<!\d)[.:/]|[.:/](?!\d)")

#: scripts in which a word without its accents or points is the same word
ACCENTED = ("LATIN", "GREEK", "CYRILLIC", "HEBREW", "ARABIC")

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


def is_mark(letter: str) -> bool:
    """Return whether this is a sign on another letter, which is no letter in `re`; "" is none."""
    return bool(letter) and unicodedata.category(letter).startswith("M")


def without_accents(text: str) -> str:
    """Drop the signs on letters of scripts that are read without them; of a text in NFKD."""
    found, accented = [], False
    for letter in text:
        if not is_mark(letter):
            accented = unicodedata.name(letter, "").startswith(ACCENTED)
        elif accented and unicodedata.combining(letter):
            continue
        found.append(letter)
    return "".join(found)


def normalise_answer(text: str) -> str:
    """Lower the case; drop accents, punctuation, quotes and leading articles.

    Hyphens stay, and what a number has in it ("3.5", "10:30", "1/2"), but for its commas ("1,500").
    Vowel signs and the like stay in scripts in which words differ by them ("दिल", "दाल").
    """
    text = without_accents(unicodedata.normalize("NFKD", text).translate(IN_NUMBERS)).lower()
    text = NO_PART.sub(
        lambda found: found[0] if is_mark(found[0]) else " ",
        THOUSANDS.sub("", ABBREVIATION.sub("", text)),
    )
    text = " ".join(text.split())
    while (shorter := LEADING.sub("", text)) != text:
        text = shorter
    return text


SENTENCE_END = re.compile(r"\n|(?<!\b[A-Z])(?<!\b[SM]t)(?<!\b[DM]r)[.!?](?=\s|$)")
"""The end of a line, or of a sentence; not after "U.S.", "St." or "Dr."."""


def answer_alone(continuation: str) -> str:
    """Return what a model says up to the end of its first sentence or line.

    A base model goes on after its answer, with another sentence that is no part of it.

    Example:
        >>> answer_alone("Nairobi. The flag of"), answer_alone("St. John's, on the island")
        ('Nairobi', "St. John's, on the island")
    """
    return SENTENCE_END.split(continuation.strip(), maxsplit=1)[0].strip(" ,;:")


def is_right(continuation: str, answers: Sequence[str]) -> bool:
    """Return whether a model's continuation begins with an accepted answer, as whole words.

    A plural "s" counts as the same word ("Austrians" for "Austrian"). An answer that is nothing but
    a sign ("+") is compared as it is.
    """
    check_several(answers=answers)
    said = normalise_answer(continuation)

    def begins_with(given: str) -> bool:
        if answer := normalise_answer(given):
            # What a number has in it stands there between digits alone.
            found = re.match(rf"{re.escape(answer)}s?(?![\w.:/-])", said)
            return found is not None and not is_mark(said[found.end() : found.end() + 1])
        sign = re.escape(given.strip())
        return bool(sign and re.match(rf"{sign}(?=[\s.,;!?]|$)", continuation.strip()))

    return any(map(begins_with, answers))


def normalise_vqa_answer(text: str) -> str:
    """Return an answer as the VQA evaluation compares it.

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
    """Return the VQA accuracy min(n / 3, 1); n annotators gave this answer (Antol et al. 2015).

    Answers of annotators are normalised as the model's is. (The published script normalises theirs
    less, because the released answers are processed already.)

    Args:
        said: the model's answer, and nothing after it.
        answers: one per annotator, repetitions included (OK-VQA has ten).
        leave_one_out: the mean over all sets of annotators with one left out, as the VQA evaluation
            does to be comparable with the accuracy of humans. It differs only where n is 1, 2 or 3:
            with ten annotators 3 agreeing ones give 0.9 instead of 1.

    Example:
        >>> soft_accuracy("Pony tails", ["pony tail", "pony tails", "pony tails", "braids"])
        0.6666666666666666
    """
    check_several(answers=answers)
    if not answers:
        return 0.0
    wanted = normalise_vqa_answer(said)
    n = sum(normalise_vqa_answer(answer) == wanted for answer in answers)
    if not leave_one_out:
        return min(n / 3, 1.0)
    share = n / len(answers)  # of the sets, in which one of the agreeing annotators is left out
    return share * min((n - 1) / 3, 1.0) + (1 - share) * min(n / 3, 1.0) if n else 0.0


def exact_match(said: str, answers: Sequence[str]) -> bool:
    """Return whether an answer equals an accepted one, both after `normalise_vqa_answer`.

    Example:
        >>> exact_match("The Eiffel Tower.", ["Eiffel tower"])
        True
    """
    check_several(answers=answers)
    wanted = normalise_vqa_answer(said)
    return any(
        normalise_vqa_answer(answer) == wanted if wanted else is_verbatim(said, answer)
        for answer in answers
    )


def is_verbatim(said: str, answer: str) -> bool:
    """Return whether two texts are the same but for case, and marks at their ends.

    Without the punctuation, "<" and ">" would be the same: nothing.
    """
    one, other = (text.strip().lower() for text in (said, answer))
    ends = EDGES + " \n"
    return one == other or one.strip(ends) == other.strip(ends) != ""


def letter(index: int) -> str:
    """Return the letter of an option: "A" for 0."""
    return chr(ord("A") + index)


def parse_choice(said: str, options: Sequence[str]) -> int | None:
    """Return which option an answer to a multiple-choice question takes; None if none is found.

    As MMMU's evaluation reads answers (MMMU-Benchmark/MMMU, eval/eval_utils.py): the last letter
    in brackets, "(B)"; else the last letter that stands alone; else, in an answer of more than five
    words, the option whose text comes last. That script guesses at random where nothing is found;
    here it is nobody's answer. An answer that is nothing but an option's text is taken as well:
    as it stands ("-5" is not "5"), or without its punctuation where one option alone reads so.

    Example:
        >>> parse_choice("The answer is (B).", ["a cat", "a dog"])
        1
    """
    check_several(options=options)
    text = f" {said.strip().strip(EDGES).strip()} "
    letters = list(map(letter, range(len(options))))
    for form in ("({})", " {} "):
        if (found := _last([text.rfind(form.format(each)) for each in letters])) is not None:
            return found
    for alike in (is_verbatim, lambda said, option: exact_match(said, [option])):
        same = [index for index, option in enumerate(options) if alike(said, option)]
        if len(same) == 1 or (same and alike is is_verbatim):
            return same[0]
    if len(text.split()) <= 5:
        return None
    return _last([text.lower().rfind(option.lower()) if option else -1 for option in options])


@dataclass(frozen=True)
class YesNoScores:
    """How well questions are answered with yes or no; yes is what precision and recall count."""

    accuracy: float
    precision: float
    """The share of right ones among answers yes; NaN where no answer is yes."""
    recall: float
    """The share of answers yes where yes is right; NaN where it never is."""
    f1: float
    yes_rate: float
    """The share of answers yes, right or not."""
    n: int
    """How many questions."""


def says_yes(said: str) -> bool:
    """Return whether an answer means yes, as POPE's evaluation takes it.

    Of its first sentence, without commas: an answer with the word "No", "no" or "not" means no, and
    every other one yes (RUCAIBox/POPE, evaluate.py). Here the end of a line parts words, too.

    Example:
        >>> says_yes("Yes, there is a dog."), says_yes("There is not."), says_yes("I see a dog")
        (True, False, True)
    """
    words = said.partition(".")[0].replace(",", "").split()
    return not {"No", "no", "not"} & set(words)


def yes_no_scores(said: Sequence[str], answers: Sequence[str]) -> YesNoScores:
    """Score answers to questions whose right answer is yes or no, as POPE does (Li et al. 2023).

    Args:
        said: what the model says to each question.
        answers: the right answer to each, "yes" or "no".

    Raises:
        ValueError: no questions, other numbers of them, or a right answer that is neither.

    Example:
        >>> questions = pope("coco_pope_random.json", "val2014")
        >>> yes_no_scores(said, [question.answers[0] for question in questions]).f1
    """
    from sklearn.metrics import accuracy_score, precision_recall_fscore_support

    check_several(said=said, answers=answers)
    wanted = [answer.strip().lower() for answer in answers]
    if not wanted or len(said) != len(wanted) or set(wanted) - {"yes", "no"}:
        others = sorted(set(wanted) - {"yes", "no"})[:3]
        raise ValueError(
            f"{len(said)} answers of a model and {len(wanted)} right ones must be as many, at "
            f"least one, and the right ones yes or no{f', not {others}' if others else ''}"
        )
    yes, is_yes = [answer == "yes" for answer in wanted], [says_yes(each) for each in said]
    precision, recall, f1, _ = precision_recall_fscore_support(
        yes, is_yes, average="binary", zero_division=np.nan
    )
    return YesNoScores(
        accuracy=float(accuracy_score(yes, is_yes)),
        precision=float(precision),
        recall=float(recall),
        f1=float(f1),
        yes_rate=float(np.mean(is_yes)),
        n=len(yes),
    )


def _last(places: Sequence[int]) -> int | None:
    """Return the index of the largest place; None where all are -1."""
    best = max(places, default=-1)
    return places.index(best) if best >= 0 else None
