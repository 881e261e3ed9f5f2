"""Any data set by one name: what `--data` takes on the command line."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from mmlens.data.demo import demo_questions
from mmlens.data.encyclopedic_vqa import encyclopedic_vqa
from mmlens.data.local import local_questions
from mmlens.data.mmmu import mmmu
from mmlens.data.okvqa import okvqa
from mmlens.data.questions import QuestionSet, VisualQuestion
from mmlens.data.vqa_constraints import vqa_constraints

__all__ = ["open_questions"]

VQA_CONSTRAINTS = ("okvqa.csv", "multimodal_known.csv", "multimodal_movies.csv")

Opener = Callable[[Path, Path | None, QuestionSet | None, int], Sequence[VisualQuestion]]


def open_questions(
    data: str | Path,
    images: str | Path | None = None,
    annotations: tuple[str, str] | None = None,
    *,
    seed: int = 0,
) -> Sequence[VisualQuestion]:
    """The questions that a name stands for.

    Args:
        data: "demo"; a csv of VQA-Constraints, or a folder with its three; a jsonl file of your
            own, or a folder with `questions.jsonl`; or a data set's name and its path,
            "encyclopedic_vqa:val.csv", "okvqa:OpenEnded_mscoco_val2014_questions.json",
            "mmmu:MMMU/MMMU/Physics" (a folder, or a name on the hub, and a subject behind it).
        images: the folder of the pictures; by default that of the file.
        annotations: OK-VQA's questions and annotations, which have the answers to its questions.
        seed: of the choice where a question has several pictures.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file of another kind, or no such data set.

    Example:
        >>> questions = open_questions("vqa_constraints:vqa-constraints", "pictures")
    """
    if str(data) == "demo":
        return demo_questions()
    name, separator, rest = str(data).partition(":")
    if not separator or name not in OPENERS:
        name, rest = kind_of(Path(data)), str(data)
    answers = None
    if annotations is not None:
        answers = okvqa(*annotations, Path(annotations[0]).parent if images is None else images)
    return OPENERS[name](Path(rest), None if images is None else Path(images), answers, seed)


def kind_of(path: Path) -> str:
    """The data set that a file or a folder looks like.

    Raises:
        ValueError: none.
    """
    if path.suffix == ".csv" or any((path / name).is_file() for name in VQA_CONSTRAINTS):
        return "vqa_constraints"
    if path.is_dir() or path.suffix == ".jsonl":
        return "local"
    raise ValueError(
        f"{str(path)!r} is neither 'demo' nor a csv of VQA-Constraints, a jsonl file or a folder "
        f"with a questions.jsonl, nor NAME:PATH with a name among {', '.join(OPENERS)}"
    )


def _vqa_constraints(
    path: Path, images: Path | None, annotations: QuestionSet | None, seed: int
) -> Sequence[VisualQuestion]:
    """One file, or those of the three that a folder has, one after the other."""
    if not path.is_dir():
        return vqa_constraints(path, images, annotations=annotations, seed=seed)
    files = [path / name for name in VQA_CONSTRAINTS if (path / name).is_file()]
    if not files:
        raise FileNotFoundError(f"none of {', '.join(VQA_CONSTRAINTS)} in {path}")
    sets = [vqa_constraints(file, images, annotations=annotations, seed=seed) for file in files]
    return [question for each in sets for question in each]


def _encyclopedic_vqa(
    path: Path, images: Path | None, annotations: QuestionSet | None, seed: int
) -> Sequence[VisualQuestion]:
    """With iNaturalist's json, where the folder of the pictures holds one."""
    folder = path.parent if images is None else images
    indices = [folder / name for name in ("train.json", "val.json")]
    index = next((each for each in indices if each.is_file()), None)
    return encyclopedic_vqa(path, folder, inaturalist=index, seed=seed)


def _okvqa(
    path: Path, images: Path | None, annotations: QuestionSet | None, seed: int
) -> Sequence[VisualQuestion]:
    if annotations is not None:
        return annotations
    return okvqa(path, images=path.parent if images is None else images)


def _mmmu(
    path: Path, images: Path | None, annotations: QuestionSet | None, seed: int
) -> Sequence[VisualQuestion]:
    return mmmu(path.name, path=str(path.parent))


def _local(
    path: Path, images: Path | None, annotations: QuestionSet | None, seed: int
) -> Sequence[VisualQuestion]:
    return local_questions(path, seed=seed)


OPENERS: dict[str, Opener] = {
    "vqa_constraints": _vqa_constraints,
    "encyclopedic_vqa": _encyclopedic_vqa,
    "okvqa": _okvqa,
    "mmmu": _mmmu,
    "local": _local,
}
