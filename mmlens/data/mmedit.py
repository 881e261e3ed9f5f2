"""MMEdit's E-VQA, and VLKEB: facts to insert, and questions around each of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from mmlens.data.edits import EditCase, EditSet, paraphrased
from mmlens.data.questions import VisualQuestion, demonstrative
from mmlens.data.reading import (
    Refused,
    RowError,
    expect,
    json_file,
    json_lines,
    read_text,
    sift,
)

TEXTS = ("a text", "a list of texts")
REQUIRED = {"src": ("a text",), "alt": TEXTS, "image": ("a text",)}
"""Fields of MMEdit's records without which there is no edit."""
OPTIONAL = {
    **dict.fromkeys(("rephrase", "loc", "loc_ans", "m_loc_q", "m_loc_a"), TEXTS),
    **dict.fromkeys(("image_rephrase", "m_loc"), ("a text",)),
    "port_new": ("a list",),
}


def mmedit(
    path: str | Path, images: str | Path, *, rephrased_images: str | Path | None = None
) -> EditSet:
    """Read MMEdit's E-VQA (Cheng et al. 2023), or VLKEB (Huang et al. 2024) with the same fields.

    A record is `src` (the question), `alt` (the new answer), `image`; `rephrase` and
    `image_rephrase` (the same in other words, and in another image); `loc`, `loc_ans` (a question
    without image: the neighbours "text"); `m_loc`, `m_loc_q`, `m_loc_a` (an image of something
    else and its question: "unrelated image"); and in VLKEB `port_new`, questions that follow from
    the new fact. `pred`, which the data gives as the answer before, goes to `extra["pred"]`; it
    need not be true. As in EasyEdit, records with an empty `alt` are left out (zjunlp/EasyEdit,
    easyeditor/dataset/vqa.py; VLKEB/VLKEB, easyeditor/dataset/coco_caption.py).

    The files name no visual constraint: it is the first "this ..." of a question, or nothing.

    A record without question, new answer or image is left out, and listed in `refused`; what is
    missing of the rest (a neighbour without its question, say) is listed in `parts`, and the rest
    is asked. A neighbour without an answer is asked, too: whether the answer changes can be told.
    `report()` names them all.

    Args:
        path: `vqa_train.json`, `vqa_eval.json`, `eval.json`, `eval_multihop.json`; or the same
            records one per line.
        images: the folder that `image` and `m_loc` are relative to.
        rephrased_images: that of `image_rephrase`, if it is another one.

    Raises:
        ValueError: no list of objects, or none of them can be used; the message has the first's
            number.
    """
    path = Path(path)
    rows, refused = sift(path.stem, _records(path), _mmedit_record, path)
    root = Path(images)
    rephrased = root if rephrased_images is None else Path(rephrased_images)

    def make(row: int) -> EditCase:
        return _mmedit_case(rows[row][0], f"{path.stem}/{row}", root, rephrased)

    parts = [
        Refused(row, f"{path.stem}/{row}", why)
        for row, (_, problems) in rows.items()
        for why in problems
    ]
    with_target = [row for row, (record, _) in rows.items() if first(record["alt"])]
    return EditSet(path.stem, with_target, make, refused, parts)


def _records(path: Path) -> Iterable[tuple[str, Any]]:
    """Return the objects of a json list, or of lines."""
    if not read_text(path, errors="surrogateescape").lstrip().startswith("["):
        return json_lines(path)
    return ((f"record {number}", record) for number, record in enumerate(json_file(path)))


def _mmedit_record(record: Any) -> tuple[dict[str, Any], list[str]]:
    """Return a record without the parts that cannot be used, and what is wrong with these."""
    for name, kinds in REQUIRED.items():
        if not every(expect(record, name, *kinds)) and name != "alt":
            raise RowError(f"{name} is empty")
    used, problems = dict(record), []

    def usable(fields: Any, name: str, *kinds: str, prefix: str = "") -> bool:
        try:
            value = expect(fields, name, *kinds)
        except RowError as error:
            problems.append(f"{prefix}{error}")
            return False
        found = bool(every(value) if "a text" in kinds else value)
        if prefix and not found:
            problems.append(f"{prefix}{name} is empty")
        return found

    for name in OPTIONAL.keys() & record.keys():
        if not record[name] or not usable(record, name, *OPTIONAL[name]):
            used[name] = None
    for one, other in (("m_loc", "m_loc_q"), ("m_loc_q", "m_loc")):
        if used.get(one) and not used.get(other):
            problems.append(f"{one} without {other}")
    following = []
    for number, each in enumerate(used.get("port_new") or ()):
        where = f"port_new {number}: "
        if (
            usable(each, "Q&A", "an object", prefix=where)
            and usable(each["Q&A"], "Question", "a text", prefix=where)
            and usable(each["Q&A"], "Answer", *TEXTS, prefix=where)
        ):
            following.append(each["Q&A"])
    used["port_new"] = following
    return used, problems


def _mmedit_case(record: dict[str, Any], source: str, root: Path, rephrased: Path) -> EditCase:
    target = first(record["alt"])
    image = root / record["image"]

    def asked(kind: str, text: str, shown: Path | None, answers: Any = None) -> VisualQuestion:
        answer = first(answers)
        return VisualQuestion(
            question=text,
            image=shown,
            visual_constraint=demonstrative(text) if shown else "",
            answers=(answer,) if answer else (),
            source=f"{source}/{kind}" if kind else source,
        )

    question = replace(asked("", record["src"], image), extra={"pred": record.get("pred")})
    neighbours = {}
    if record.get("loc"):
        text = first(record["loc"])
        neighbours["text"] = (asked("text", text, None, record.get("loc_ans")),)
    if record.get("m_loc") and record.get("m_loc_q"):
        text, other_image = first(record["m_loc_q"]), root / record["m_loc"]
        found = asked("other", text, other_image, record.get("m_loc_a"))
        neighbours["unrelated image"] = (found,)
    other = record.get("image_rephrase")
    return EditCase(
        question=question,
        target=target,
        paraphrases=paraphrased(question, every(record.get("rephrase"))),
        other_images=(asked("picture", record["src"], rephrased / other),) if other else (),
        neighbours=neighbours,
        portability=tuple(
            asked(f"portability/{number}", each["Question"], image, each["Answer"])
            for number, each in enumerate(record["port_new"])
        ),
    )


def every(value: Any) -> list[str]:
    """Return a text or a list of texts as a list, without those that are empty or blank."""
    several = value if isinstance(value, list) else [value]
    return [str(each) for each in several if each and str(each).strip()]


def first(value: Any) -> str:
    """Return the text, or the first of several; empty where there is none."""
    return next(iter(every(value)), "")
