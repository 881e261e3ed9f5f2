"""Editing: one fact changed in the weights, and taken back.

    edit = multedit(model, inputs, "Rome")
    edit.check().summary()
    with edit.applied(model):
        model.generate(inputs)

Every method is called as `method(model, request or requests, *, layer=..., **settings)` and gives
an `Edit`; it leaves the model as it found it. `SequentialEditor` edits one model again and again.
"""

from __future__ import annotations

from collections.abc import Callable

from mmlens.editing.alphaedit import alphaedit
from mmlens.editing.covariance import KeyCovariance, key_covariance
from mmlens.editing.edit import Edit, LowRank
from mmlens.editing.edit_check import EditCheck
from mmlens.editing.edit_evaluation import EditEvaluation
from mmlens.editing.evaluation import evaluate, evaluate_sequence, request_of
from mmlens.editing.fine_tuning import constrained_fine_tune, fine_tune
from mmlens.editing.in_context import InContextEdit, in_context
from mmlens.editing.lora import lora
from mmlens.editing.multedit import keys_of, multedit, multedit_many
from mmlens.editing.multedit_settings import MultEditSettings
from mmlens.editing.references import References
from mmlens.editing.request import EditRequest, augmented
from mmlens.editing.rome import memit, rome
from mmlens.editing.sequential import SequentialEditor

__all__ = [
    "METHODS",
    "Edit",
    "EditCheck",
    "EditEvaluation",
    "EditRequest",
    "InContextEdit",
    "KeyCovariance",
    "LowRank",
    "MultEditSettings",
    "References",
    "SequentialEditor",
    "alphaedit",
    "augmented",
    "constrained_fine_tune",
    "evaluate",
    "evaluate_sequence",
    "fine_tune",
    "in_context",
    "key_covariance",
    "keys_of",
    "lora",
    "memit",
    "multedit",
    "multedit_many",
    "request_of",
    "rome",
]

METHODS: dict[str, Callable[..., Edit]] = {
    "multedit": multedit,
    "rome": rome,
    "memit": memit,
    "alphaedit": alphaedit,
    "fine_tune": fine_tune,
    "constrained_fine_tune": constrained_fine_tune,
    "lora": lora,
    "in_context": in_context,
}
"""By name. `rome` and `memit` need a `covariance` (see `key_covariance`) or `references`,
`alphaedit` needs references, `lora` needs peft."""
