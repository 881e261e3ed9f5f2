"""Edits one after the other, each made on the model that has the earlier ones.

editor = SequentialEditor(model)
for request in requests:
    editor.add(request)          # the model now answers this one, too
editor.edit.save("all.safetensors")
editor.revert()
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from mmlens.editing.applied import take_off
from mmlens.editing.edit import Edit
from mmlens.editing.multedit import multedit
from mmlens.editing.request import EditRequest, as_requests
from mmlens.inputs.multimodal_inputs import MultimodalInputs
from mmlens.utils.temporary import Changes, Temporary

if TYPE_CHECKING:
    from mmlens.model.transformer import HookedMultimodalTransformer


class SequentialEditor(Temporary["SequentialEditor"]):
    """A model that is edited again and again; in a `with` block, until its end.

    The sum of the edits so far is applied to the model, and its weights are kept once. An `add`
    that is interrupted leaves the model with the edits that it had; `revert` takes all of them off
    in any case.

    Args:
        model: the model, which is changed.
        method: any editing method.
        history: whether later edits know the earlier ones: their keys keep their values, but for
            those that are edited anew. Only `multedit` can; by default it does.
        settings: further arguments of the method: layer, references, ...

    Raises:
        ValueError: a history for another method than `multedit`.

    Example:
        >>> with SequentialEditor(model, layer=3) as editor:
        ...     for request in requests:
        ...         editor.add(request)
        ...         print(model.generate(requests[0].inputs))
    """

    def __init__(
        self,
        model: HookedMultimodalTransformer,
        method: Callable[..., Edit] = multedit,
        *,
        history: bool | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(self._until_the_end)
        if history and method is not multedit:
            raise ValueError("only multedit solves with the keys of earlier edits: history=False")
        self.model = model
        self.method = method
        self.history = method is multedit if history is None else history
        self.settings = settings
        self.edits: list[Edit] = []
        """In the order in which they were made."""
        self.edit: Edit | None = None
        """Their sum, which the model has; None before the first."""
        self._begun: list[Edit] = []
        """The sums that the model may have: one, but for the time of an `add`."""

    def add(self, request: MultimodalInputs | EditRequest, target: str | int | None = None) -> Edit:
        """Edit the model once more.

        Returns:
            This edit alone.

        Raises:
            ValueError: as the method.
        """
        [only] = as_requests(request, target)
        settings = dict(self.settings)
        if self.method is multedit and not self.history:
            settings["keeps_edits"] = False
        edit = self.method(self.model, only, **settings)
        total = edit if self.edit is None else self.edit + edit
        try:
            self._exchange(total)
        except BaseException:
            try:
                self._exchange(self.edit)
            finally:
                self._exchange(self.edit)
            raise
        self.edit, self.edits = total, [*self.edits, edit]
        return edit

    def _exchange(self, wanted: Edit | None) -> None:
        """Let the model have this sum, and no other of ours."""
        with self.model.run_lock.held(is_run=True):
            for other in self._begun:
                if other is not wanted and other.is_applied(self.model):
                    other.revert(self.model)
            if wanted is not None and not wanted.is_applied(self.model):
                self._begun = [*self._begun, wanted]
                wanted.apply(self.model)
            self._begun = [] if wanted is None else [wanted]

    def revert(self) -> None:
        """Take all edits off; the editor can then begin anew."""
        self._exchange(None)
        self.edit, self.edits = None, []

    def _until_the_end(self) -> Changes[SequentialEditor]:
        """What a `with` block does."""
        yield self.model.exclusive()
        yield self._take_off
        return self

    def _take_off(self) -> None:
        for each in self._begun:
            take_off(self.model, each)
        self.revert()
