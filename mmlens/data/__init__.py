"""Readers of visual question answering data sets, and the demo's own questions.

One file per data set; each gives a lazy `QuestionSet` of `VisualQuestion`s (`questions`), whose
`report()` says what could not be matched (`report`). `metrics` says whether an answer is right.
Facts to change, with all that is asked about an edit, are `EditCase`s (`edits`); a question about
two images is an `ImagePair` (`image_pairs`). A row that cannot be used is left out and named, and
never stops the others (`reading`).
"""

from mmlens.data.chair import ChairScores, chair_scores, objects_in
from mmlens.data.coco import coco_captions
from mmlens.data.demo import demo_questions
from mmlens.data.demo_edits import demo_edits
from mmlens.data.edits import EditCase, EditSet, edit_cases
from mmlens.data.encyclopedic_vqa import encyclopedic_vqa
from mmlens.data.gqa import gqa
from mmlens.data.image_pairs import ImagePair, PairSet, image_pairs
from mmlens.data.local import local_questions
from mmlens.data.metrics import (
    YesNoScores,
    exact_match,
    is_right,
    normalise_answer,
    normalise_vqa_answer,
    parse_choice,
    says_yes,
    soft_accuracy,
    yes_no_scores,
)
from mmlens.data.mmedit import mmedit
from mmlens.data.mmmu import mmmu
from mmlens.data.okvqa import okvqa
from mmlens.data.open import open_pairs, open_questions
from mmlens.data.pope import pope
from mmlens.data.question_sets import QuestionSet
from mmlens.data.questions import VisualQuestion
from mmlens.data.regions import Region
from mmlens.data.report import Report, check_questions
from mmlens.data.vqa_constraints import vqa_constraints
from mmlens.data.whats_up import whats_up

__all__ = [
    "ChairScores",
    "EditCase",
    "EditSet",
    "ImagePair",
    "PairSet",
    "QuestionSet",
    "Region",
    "Report",
    "VisualQuestion",
    "YesNoScores",
    "chair_scores",
    "check_questions",
    "coco_captions",
    "demo_edits",
    "demo_questions",
    "edit_cases",
    "encyclopedic_vqa",
    "exact_match",
    "gqa",
    "image_pairs",
    "is_right",
    "local_questions",
    "mmedit",
    "mmmu",
    "normalise_answer",
    "normalise_vqa_answer",
    "objects_in",
    "okvqa",
    "open_pairs",
    "open_questions",
    "parse_choice",
    "pope",
    "says_yes",
    "soft_accuracy",
    "vqa_constraints",
    "whats_up",
    "yes_no_scores",
]
