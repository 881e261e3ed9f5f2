"""Readers of visual question answering data sets, and the demo's own questions.

One file per data set; each gives a lazy `QuestionSet` of `VisualQuestion`s (`questions`), whose
`report()` says what could not be matched (`report`). `metrics` says whether an answer is right.
Facts to change, with all that is asked about an edit, are `EditCase`s (`edits`).
"""

from mmlens.data.demo import demo_questions
from mmlens.data.demo_edits import demo_edits
from mmlens.data.edits import EditCase, EditSet, edit_cases, mmedit
from mmlens.data.encyclopedic_vqa import encyclopedic_vqa
from mmlens.data.local import local_questions
from mmlens.data.metrics import (
    exact_match,
    is_right,
    normalise_answer,
    normalise_vqa_answer,
    parse_choice,
    soft_accuracy,
)
from mmlens.data.mmmu import mmmu
from mmlens.data.okvqa import okvqa
from mmlens.data.opening import open_questions
from mmlens.data.questions import QuestionSet, VisualQuestion
from mmlens.data.report import Report, check_questions
from mmlens.data.vqa_constraints import vqa_constraints

__all__ = [
    "EditCase",
    "EditSet",
    "QuestionSet",
    "Report",
    "VisualQuestion",
    "check_questions",
    "demo_edits",
    "demo_questions",
    "edit_cases",
    "encyclopedic_vqa",
    "exact_match",
    "is_right",
    "local_questions",
    "mmedit",
    "mmmu",
    "normalise_answer",
    "normalise_vqa_answer",
    "okvqa",
    "open_questions",
    "parse_choice",
    "soft_accuracy",
    "vqa_constraints",
]
