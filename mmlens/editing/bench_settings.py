"""What a benchmark of editing does: which cases, by which methods, in which layers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmlens.data import EditCase, VisualQuestion, demo_edits, edit_cases, mmedit
from mmlens.data.opening import open_questions
from mmlens.editing import METHODS

if TYPE_CHECKING:
    from mmlens.editing import Edit
    from mmlens.editing.request import EditRequest
    from mmlens.inputs import MultimodalInputs
    from mmlens.model import HookedMultimodalTransformer

__all__ = [
    "EVERYWHERE",
    "BenchSettings",
    "UnknownSettingError",
    "Variant",
    "called",
    "default_layer",
    "open_cases",
    "open_unrelated",
]

ONE_LAYER = ("multedit", "rome")
"""Methods that edit one layer, and no more together."""
EVERYWHERE = "all"
"""Of `multedit`: a key and a value at every position."""
DEPTH = 2 / 32
"""Which layer is edited by default, as a share: the paper's is 2 of 32."""

OTHER_IMAGES = 3
"""How often another picture is drawn for a question of Encyclopedic-VQA, which has up to five."""


@dataclass(frozen=True)
class BenchSettings:
    """Everything that the results depend on; it is written next to them."""

    model: str = "demo"
    data: str = "demo"
    """"demo" (or "demo:correct"), "demo:counterfactual", "demo:invented", "mmedit:PATH",
    "vlkeb:PATH"; or questions as `open_questions` names them, whose answers are inserted."""
    images: str | None = None
    """The folder of the pictures; by default that of the file."""
    methods: tuple[str, ...] = ("multedit",)
    """Names of `METHODS`; NAME@2, NAME@2-4 or NAME@all is edited in these layers together,
    NAME-last@23 has its key at the last token of another span than the constraint, and
    multedit-all@17 has one at every position."""
    layers: tuple[int, ...] | None = None
    """For methods without an @: each of these layers by itself. None is `default_layer`."""
    limit: int = 100
    method_settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Arguments by the method's name: {"multedit": {"steps": 20}}; those by a longer name,
    "multedit-all", come on top."""
    n_key_questions: int = 0
    """How many of a case's `key_questions` a method is given."""
    n_kept: int = 0
    """How many of its `kept` neighbours."""
    target_end: str = ""
    """What methods are told to put behind every target, such as "."; it is not asked for."""
    preserved: str | None = None
    """Questions, as `open_questions` names them, whose keys `multedit` keeps; none is asked."""
    n_preserved: int = 200
    """How many of them keep theirs where the edit's are: at the key's place, or at every word."""
    n_preserved_whole: int = 0
    """How many further ones keep theirs at every position."""
    unrelated: tuple[str, ...] = ()
    """Data sets of questions that no edit is about, as `open_questions` names them."""
    unrelated_images: str | None = None
    """The folder of their pictures; by default that of each file."""
    annotations: tuple[str, str] | None = None
    """OK-VQA's questions and annotations, with its answers."""
    n_unrelated: int = 8
    """How many of each are drawn for each edit."""
    texts: str | None = None
    """A file of text, a paragraph per line, for the covariance that ROME and MEMIT need."""
    template: str | None = "auto"
    sequential: bool = False
    """Edit one case after the other instead, without taking the edits back."""
    at: tuple[int, ...] = (1, 2, 5, 10, 20, 50, 100)
    """After how many edits of a sequence to ask."""
    samples: int = 2000
    level: float = 0.95
    seed: int = 0

    def settings_of(self, variant: Variant) -> dict[str, Any]:
        """Of `method_settings`, those of a variant."""
        given = self.method_settings
        return {**given.get(variant.method, {}), **given.get(variant.named, {})}


@dataclass(frozen=True)
class Variant:
    """A method in some layers: what one line of the results is about."""

    method: str
    layer: int | tuple[int, ...] | None
    """None is all layers."""
    keyed: str | None = None
    """The span whose last token is the key's place; None is the constraint; or `EVERYWHERE`."""

    @property
    def label(self) -> str:
        """The method, and where it edits."""
        return f"{self.named}@{self.where}"

    @property
    def named(self) -> str:
        """The method, and where its keys are, unless that is the constraint."""
        return self.method if self.keyed is None else f"{self.method}-{self.keyed}"

    @property
    def span(self) -> str | None:
        """Of the request; None is the constraint."""
        return None if self.keyed == EVERYWHERE else self.keyed

    @property
    def arguments(self) -> dict[str, Any]:
        """What the method is told about where its keys are."""
        return {"positions": "all"} if self.keyed == EVERYWHERE else {}

    @property
    def where(self) -> str:
        """Its layers as text."""
        if self.layer is None:
            return "all"
        if isinstance(self.layer, int):
            return str(self.layer)
        return f"{self.layer[0]}-{self.layer[-1]}"

    @classmethod
    def parsed(cls, text: str, layers: Sequence[int]) -> list[Variant]:
        """The variants that a name stands for: "multedit", "rome-last@3", "memit@2-4", "lora@all".

        Args:
            layers: of a name without an @.

        Raises:
            ValueError: no such method, or no layers behind the @.
        """
        named, at, where = text.partition("@")
        name, _, place = named.partition("-")
        keyed = place or None
        if name not in METHODS:
            raise ValueError(f"no editing method {name!r}; there are {', '.join(METHODS)}")
        if keyed == EVERYWHERE and name != "multedit":
            raise ValueError(f"{text!r}: only multedit can have a key at every position")
        if not at:
            return [cls(name, layer, keyed) for layer in layers]
        found = re.fullmatch(r"(\d+)(?:-(\d+))?", where)
        if found is None and where != "all":
            raise ValueError(f"{text!r}: behind the @ is a layer, a range like 2-4, or 'all'")
        if name in ONE_LAYER and (found is None or found[2] not in (None, found[1])):
            raise ValueError(f"{text!r}: {name} edits one layer, like {name}@2")
        if found is None:
            return [cls(name, None, keyed)]
        first, last = int(found[1]), int(found[2] or found[1])
        if first > last:
            raise ValueError(f"{text!r}: layers {first} to {last} are none")
        together = first if first == last else tuple(range(first, last + 1))
        return [cls(name, together, keyed)]


def default_layer(model: HookedMultimodalTransformer) -> int:
    """An early layer: the paper's 2 of 32, in proportion. `causal_trace` says which are causal."""
    return min(model.cfg.n_layers - 1, max(1, round(DEPTH * model.cfg.n_layers)))


class UnknownSettingError(LookupError):
    """A setting that an editing method does not have."""


def called(
    method: str,
    model: HookedMultimodalTransformer,
    request: MultimodalInputs | EditRequest,
    *target: str,
    **arguments: Any,
) -> Edit:
    """The edit of a method that is given by its name.

    Raises:
        UnknownSettingError: the method takes no such argument.
        ValueError: the method cannot make the edit.
    """
    try:
        return METHODS[method](model, request, *target, **arguments)
    except TypeError as error:
        if "unexpected keyword argument" not in str(error):
            raise
        raise UnknownSettingError(f"{method}: {error}") from error


def open_unrelated(settings: BenchSettings) -> dict[str, Sequence[VisualQuestion]]:
    """The questions that no edit is about, by their data set's name: MMMU's subjects are one set.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no such data.
    """
    found: dict[str, Sequence[VisualQuestion]] = {}
    for text in settings.unrelated:
        name = text.partition(":")[0]
        questions = open_questions(
            text, settings.unrelated_images, settings.annotations, seed=settings.seed
        )
        found[name] = [*found[name], *questions] if name in found else questions
    return found


def open_cases(settings: BenchSettings) -> Sequence[EditCase]:
    """The cases that the settings name.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no such data, or a file of another kind.
    """
    name, _, rest = settings.data.partition(":")
    if name == "demo":
        return demo_edits(rest or "correct", seed=settings.seed)
    if name in ("mmedit", "vlkeb"):
        return mmedit(rest, settings.images or Path(rest).parent)
    seeds = range(settings.seed, settings.seed + 1 + OTHER_IMAGES * (name == "encyclopedic_vqa"))
    sets = [open_questions(settings.data, settings.images, seed=seed) for seed in seeds]
    return edit_cases(*sets, seed=settings.seed)
