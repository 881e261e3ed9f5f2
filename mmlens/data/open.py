"""Data sets by name, as `--data` takes them on the command line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mmlens.data.coco import coco_captions
from mmlens.data.demo import demo_questions
from mmlens.data.demo_edits import demo_edits
from mmlens.data.edits import EditCase, edit_cases
from mmlens.data.encyclopedic_vqa import encyclopedic_vqa
from mmlens.data.gqa import gqa
from mmlens.data.image_pairs import ImagePair, image_pairs
from mmlens.data.local import local_questions
from mmlens.data.mmedit import mmedit
from mmlens.data.mmmu import mmmu
from mmlens.data.okvqa import okvqa
from mmlens.data.pope import pope
from mmlens.data.question_sets import QuestionSet, joined_sets
from mmlens.data.questions import VisualQuestion
from mmlens.data.vqa_constraints import vqa_constraints
from mmlens.data.whats_up import whats_up

VQA_CONSTRAINTS = ("okvqa.csv", "multimodal_known.csv", "multimodal_movies.csv")
OTHER_IMAGES = 3
"""How often another image is drawn for a question of Encyclopedic-VQA, which has up to five."""

NAMES = ("vqa_constraints", "encyclopedic_vqa", "okvqa", "gqa", "pope", "coco", "mmmu", "local")
PAIRS = ("pairs", "whats_up")


def open_questions(
    data: str | Path,
    images: str | Path | None = None,
    annotations: tuple[str, str] | None = None,
    *,
    seed: int = 0,
) -> Sequence[VisualQuestion]:
    """Open the questions of a data set by its name, as `--data` takes it.

    Args:
        data: "demo"; a csv of VQA-Constraints, or a folder with its three; a jsonl file of your
            own, or a folder with `questions.jsonl`; or a data set's name and its path,
            "encyclopedic_vqa:val.csv", "okvqa:OpenEnded_mscoco_val2014_questions.json",
            "gqa:val_balanced_questions.json", "pope:coco_pope_random.json",
            "coco:instances_val2014.json" (images to describe, with the captions of
            "captions_val2014.json" beside it, if it is there),
            "mmmu:MMMU/MMMU/Physics" (a folder, or a name on the hub, and a subject after it).
        images: the folder of the images; by default that of the file.
        annotations: OK-VQA's questions and annotations, which have the answers to its questions.
        seed: of the choice where a question has several images.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file of another kind, or no such data set.

    Example:
        >>> questions = open_questions("vqa_constraints:vqa-constraints", "images")
    """
    if str(data) == "demo":
        return demo_questions()
    name, separator, rest = str(data).partition(":")
    if separator and name in PAIRS:
        raise ValueError(f"{data} are pairs of images, not questions: `open_pairs` opens them")
    if not separator or name not in NAMES:
        name, rest = kind_of(Path(data)), str(data)
    path = Path(rest)
    folder = path.parent if images is None else Path(images)
    answers = None
    if annotations is not None:
        answers = okvqa(*annotations, Path(annotations[0]).parent if images is None else images)
    match name:
        case "vqa_constraints":
            files = _files_in(path) if path.is_dir() else [path]
            sets = [vqa_constraints(x, images, annotations=answers, seed=seed) for x in files]
            if not sets:
                raise FileNotFoundError(f"none of {', '.join(VQA_CONSTRAINTS)} in {path}")
            return joined_sets(path.name, sets) if path.is_dir() else sets[0]
        case "encyclopedic_vqa":
            indices = (folder / each for each in ("train.json", "val.json"))
            index = next((each for each in indices if each.is_file()), None)
            return encyclopedic_vqa(path, folder, inaturalist=index, seed=seed)
        case "okvqa":
            return okvqa(path, images=folder) if answers is None else answers
        case "gqa" | "pope" | "coco":
            readers = {"gqa": gqa, "pope": pope, "coco": _coco}
            return readers[name](path, images=folder)
        case "mmmu":
            return mmmu(path.name, path=str(path.parent))
        case _:
            return local_questions(path, seed=seed)


def open_cases(
    data: str | Path, images: str | Path | None = None, *, seed: int = 0
) -> Sequence[EditCase]:
    """Open the edits of a data set by its name, as `--data` takes it.

    Args:
        data: "demo" (or "demo:correct"), "demo:counterfactual", "demo:invented", "mmedit:PATH",
            "vlkeb:PATH"; or questions as `open_questions` names them, whose answers are inserted.
        images: the folder of the images; by default that of the file.
        seed: of the choice where there are several.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no such data, or a file of another kind.
    """
    name, _, rest = str(data).partition(":")
    if name == "demo":
        return demo_edits(rest or "correct", seed=seed)
    if name in ("mmedit", "vlkeb"):
        return mmedit(rest, images or Path(rest).parent)
    seeds = range(seed, seed + 1 + OTHER_IMAGES * (name == "encyclopedic_vqa"))
    sets = [open_questions(data, images, seed=each) for each in seeds]
    return edit_cases(*sets, seed=seed)


def open_pairs(data: str | Path, images: str | Path | None = None) -> Sequence[ImagePair] | None:
    """Open pairs of images by their name, "pairs:FILE" or "whats_up:FILE"; None for another name.

    Args:
        data: as `--data` takes it.
        images: the folder of the images; by default that of the file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file of another kind.
    """
    name, separator, path = str(data).partition(":")
    if not separator or name not in PAIRS:
        return None
    return image_pairs(path, images) if name == "pairs" else whats_up(path, images)


def kind_of(path: Path) -> str:
    """Return which data set a file or a folder holds, by its form."""
    if path.suffix == ".csv" or _files_in(path):
        return "vqa_constraints"
    if path.is_dir() or path.suffix == ".jsonl":
        return "local"
    raise ValueError(
        f"{str(path)!r} is neither 'demo' nor a csv of VQA-Constraints, a jsonl file or a folder "
        f"with a questions.jsonl, nor NAME:PATH with a name among {', '.join(NAMES)}"
    )


def _coco(path: Path, images: Path) -> QuestionSet:
    """Return COCO's images, with the captions in the file beside, if it is there."""
    captions = path.with_name(path.name.replace("instances", "captions", 1))
    there = captions != path and captions.is_file()
    return coco_captions(path, captions if there else None, images)


def _files_in(folder: Path) -> list[Path]:
    """Return those of VQA-Constraints' three files that a folder has."""
    return [folder / name for name in VQA_CONSTRAINTS if (folder / name).is_file()]
