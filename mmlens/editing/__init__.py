"""Editing: one fact changed in the weights, and taken back.

    request = EditRequest(inputs, "Rome")
    edit = multedit(model, request, layer=3)
    with edit.applied(model):
        model.generate(inputs)

Every method is called as `method(model, request or requests, *, layer=..., **settings)` and gives an
`Edit`; it leaves the model as it found it.
"""

from __future__ import annotations

from mmlens.editing.edit import Edit, LowRank
from mmlens.editing.request import EditRequest, augmented

__all__ = ["Edit", "EditRequest", "LowRank", "augmented"]
