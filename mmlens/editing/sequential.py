"""Edits one after the other, each made on the model that has the earlier ones.

editor = SequentialEditor(model, layer=3)
for request in requests:
    editor.add(request)          # the model now answers this one, too
editor.edit.save("all.safetensors")
editor.revert()
"""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mmlens.editing.edit import Edit
from mmlens.editing.multedit import MultEditSettings, keyed, multedit
from mmlens.editing.request import EditRequest, as_requests
from mmlens.inputs import MultimodalInputs

if TYPE_CHECKING:
    from mmlens.model import HookedMultimodalTransformer


class SequentialEditor:
    """A model that is edited again and again; in a `with` block, until its end.

    The sum of the edits so far is applied to the model, and its weights are kept once.

    Args:
        model: the model, which is changed.
        method: any editing method.
        history: whether later edits know the earlier ones: their keys keep their values, but for
            those that are edited anew. Only `multedit` can; by default it does.
        settings: of the method: layer, ...

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
        self._keys: list[Tensor] = []

    def add(self, request: MultimodalInputs | EditRequest, target: str | int | None = None) -> Edit:
        """Edit the model once more.

        Returns:
            This edit alone.

        Raises:
            ValueError: as the method.
        """
        [only] = as_requests(request, target)
        settings = dict(self.settings)
        if self.history and self._keys:
            given = [settings["kept"]] if settings.get("kept") is not None else []
            settings["kept"] = torch.cat([*given, *self._keys], dim=1)
        edit = self.method(self.model, only, **settings)
        total = edit if self.edit is None else self.edit + edit
        if self.history:
            self._keys.append(self._keys_of(only))
        if self.edit is not None:
            self.edit.revert(self.model)
        self.edit = total
        self.edit.apply(self.model)
        self.edits.append(edit)
        return edit

    def revert(self) -> None:
        """Take all edits off; the editor can then begin anew."""
        if self.edit is not None:
            self.edit.revert(self.model)
        self.edit, self.edits, self._keys = None, [], []

    def _keys_of(self, request: EditRequest) -> Tensor:
        """What is edited: keys at a layer do not depend on the edits of its down projection."""
        layer = self.settings["layer"]
        chosen = {k: v for k, v in self.settings.items() if k not in ("layer", "kept")}
        return keyed(self.model, request, layer, MultEditSettings(**chosen)).keys

    def __enter__(self) -> SequentialEditor:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.revert()
