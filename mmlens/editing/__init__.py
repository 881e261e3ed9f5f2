"""Editing: one fact changed in the weights, and taken back.

    request = EditRequest(inputs, "Rome")
    edit = multedit(model, request, layer=3)
    with edit.applied(model):
        model.generate(inputs)

Every method is called as `method(model, request or requests, *, layer=..., **settings)` and gives
an `Edit`; it leaves the model as it found it. `SequentialEditor` edits one model again and again.
"""

from __future__ import annotations

from collections.abc import Callable

from mmlens.editing.covariance import KeyCovariance, key_covariance
from mmlens.editing.edit import Edit, LowRank
from mmlens.editing.edit_evaluation import EditEvaluation
from mmlens.editing.evaluation import evaluate, evaluate_sequence, request_of
from mmlens.editing.fine_tuning import constrained_fine_tune, fine_tune
from mmlens.editing.lora import lora
from mmlens.editing.multedit import MultEditSettings, keys_of, multedit, multedit_many
from mmlens.editing.request import EditRequest, augmented
from mmlens.editing.rome import memit, rome
from mmlens.editing.sequential import SequentialEditor

__all__ = [
    "METHODS",
    "Edit",
    "EditEvaluation",
    "EditRequest",
    "KeyCovariance",
    "LowRank",
    "MultEditSettings",
    "SequentialEditor",
    "augmented",
    "constrained_fine_tune",
    "evaluate",
    "evaluate_sequence",
    "fine_tune",
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
    "fine_tune": fine_tune,
    "constrained_fine_tune": constrained_fine_tune,
    "lora": lora,
}
"""By name. `rome` and `memit` need a `covariance` (see `key_covariance`), `lora` needs peft."""
