"""What'sUp (Kamath et al. 2023): the same two objects, left, right, on, under, before or behind.

Its files of controlled images (amitakamath/whatsup_vlms) are one json list of objects with
`image_path` and `caption_options`, the right caption first. Images of the same two objects have the
same captions, so an image and that of the opposite caption are a pair.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from mmlens.data.image_pairs import ImagePair, PairSet
from mmlens.data.questions import VisualQuestion
from mmlens.data.reading import Refused, RowError, expect, json_file, shown, sift

OPPOSITES = (
    (" to the left of ", " to the right of "),
    (" left of ", " right of "),
    (" on ", " under "),
    (" in front of ", " behind "),
)
QUESTION = "Which caption describes the image?"


def whats_up(path: str | Path, images: str | Path | None = None) -> PairSet:
    """Read a file of What'sUp's controlled images: each image with that of the opposite caption.

    Every image is the clean one of a pair once. The question has the captions as options, in the
    order of the alphabet, since the right one would be the first. A row that lacks something, or
    whose opposite is not in the file, is left out and listed in `refused` and in `report()`.

    Args:
        path: `controlled_images_dataset.json` or `controlled_clevr_dataset.json`.
        images: the folder that `image_path` is relative to, or that has its file or its last
            folder; by default the file's own.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is no list, or none of the rows can be used.

    Example:
        >>> pairs = whats_up("data/controlled_clevr_dataset.json")
        >>> pairs[0].clean.answers, pairs[0].counterfactual.answers
        (('A mug to the right of a knife',), ('A mug to the left of a knife',))
    """
    listed = json_file(path)
    if not isinstance(listed, list):
        raise ValueError(f"{path} is no list of What'sUp's images: {shown(listed)}")
    name = Path(path).stem
    found, refused = sift(
        name, ((f"row {number}", row) for number, row in enumerate(listed)), _checked, path
    )
    row_of = {_key(fields): row for row, fields in found.items()}
    other_of: dict[int, int] = {}
    alone: list[Refused] = []
    for row, fields in found.items():
        try:
            other_of[row] = row_of[_key(_opposite(fields))]
        except RowError as error:
            alone.append(Refused(row, f"{name}/{row}", f"row {row}: {error}"))
        except KeyError:
            why = f"no image shows {_opposite(fields)['caption_options'][0]!r}"
            alone.append(Refused(row, f"{name}/{row}", f"row {row}: {why}"))
    if found and not other_of:
        raise ValueError(f"{path}: no image has its opposite in the file; {alone[0].why}")
    folder = Path(path).parent if images is None else Path(images)

    def make(row: int) -> ImagePair:
        fields, other = found[row], found[other_of[row]]
        about = VisualQuestion(
            question=QUESTION,
            image=_image(folder, fields["image_path"]),
            answers=(fields["caption_options"][0],),
            options=tuple(sorted(fields["caption_options"])),
            source=f"{name}/{row}",
        )
        return ImagePair(
            about,
            replace(
                about,
                image=_image(folder, other["image_path"]),
                answers=(other["caption_options"][0],),
            ),
        )

    return PairSet(name, list(other_of), make, sorted([*refused, *alone], key=lambda x: x.row))


def _checked(row: Any) -> dict[str, Any]:
    """Return a row with an image and two captions or more."""
    if not expect(row, "image_path", "a text").strip():
        raise RowError("image_path is empty")
    captions = expect(row, "caption_options", "a list of texts")
    if len(set(captions)) < 2 or not all(each.strip() for each in captions):
        raise RowError(f"caption_options must be at least two texts, not {shown(captions)}")
    return row


def _key(fields: dict[str, Any]) -> tuple[str, frozenset[str]]:
    """Return what tells images apart: the right caption, and all captions."""
    return fields["caption_options"][0], frozenset(fields["caption_options"])


def _opposite(fields: dict[str, Any]) -> dict[str, Any]:
    """Return the same row with the opposite caption as the right one.

    Raises:
        RowError: none of the captions is the opposite of the right one.
    """
    right, *others = fields["caption_options"]
    for pair in OPPOSITES:
        for words, opposite in (pair, pair[::-1]):
            if (turned := right.replace(words, opposite)) != right and turned in others:
                return {**fields, "caption_options": [turned, *fields["caption_options"]]}
    raise RowError(f"none of its captions is the opposite of {shown(right)}")


def _image(folder: Path, name: str) -> Path:
    """Return where an image is: its path, its last folder and name, or its name in the folder."""
    parts = Path(name).parts
    candidates = [folder.joinpath(*parts[-n:]) for n in (len(parts), 2, 1)]
    return next((each for each in candidates if _is_file(each)), candidates[0])


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name that no file can have
        return False
