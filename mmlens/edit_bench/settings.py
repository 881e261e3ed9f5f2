"""What a benchmark of editing does: which cases, by which methods, in which layers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mmlens.data import VisualQuestion
from mmlens.data.open import open_questions
from mmlens.editing import METHODS, Edit
from mmlens.editing.request import EditRequest
from mmlens.inputs.multimodal_inputs import MultimodalInputs
from mmlens.model.transformer import HookedMultimodalTransformer

ONE_LAYER = ("multedit", "rome")
"""Methods that edit one layer, and no more together."""
EVERYWHERE = "all"
"""Of `multedit`: a key and a value at every position."""
SPREAD = ("answer", "words", EVERYWHERE)
"""Of `multedit`: where the answer is computed, at every word, or at every position."""
DEPTH = 2 / 32
"""Which layer is edited by default, as a share: the paper's is 2 of 32."""


@dataclass(frozen=True)
class BenchSettings:
    """Everything that the results depend on; it is written next to them."""

    model: str = "demo"
    data: str = "demo"
    """"demo" (or "demo:correct"), "demo:counterfactual", "demo:invented"; "mmedit:FILE",
    "vlkeb:FILE"; or questions of your own (a jsonl file, or whatever `open_questions` takes), whose
    answers are inserted."""
    images: str | None = None
    """The folder of the images; by default that of the file."""
    methods: tuple[str, ...] = ("multedit",)
    """Names of `METHODS`; NAME@2, NAME@2-4, NAME@all say which layers are edited together,
    NAME-last@23 that the key is at the last token of another span than the constraint, and
    multedit-all@17 that there is one at every position, multedit-words@20 at every word,
    multedit-answer@26 where the answer is computed."""
    layers: tuple[int, ...] | None = None
    """For methods without an @: each of these layers by itself; by default 2 of 32, in
    proportion."""
    limit: int = 100
    """How many edits are made."""
    method_settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Arguments by the method's name: {"multedit": {"steps": 20}}; those by a longer name,
    "multedit-all", come on top."""
    n_key_questions: int = 0
    """How many further prompts of the fact a method is given."""
    n_kept: int = 0
    """How many of the case's neighbours a method is given to preserve."""
    target_end: str = ""
    """What methods put after every target, such as ".": where it ends; it is not asked for."""
    preserved: str | None = None
    """Questions (demo, okvqa:FILE, a jsonl file) whose keys multedit keeps; none is asked."""
    n_preserved: int = 200
    """How many of them keep theirs where the edit's are: at the key's place, or at every word."""
    n_preserved_whole: int = 0
    """How many further ones keep theirs at every position."""
    unrelated: tuple[str, ...] = ()
    """Questions that no edit is about, whose accuracy tells what is damaged: okvqa:FILE,
    mmmu:FOLDER/SUBJECT, demo ..."""
    unrelated_images: str | None = None
    """The folder of their images; by default that of each file."""
    annotations: tuple[str, str] | None = None
    """OK-VQA's questions and annotations (two files), with its answers."""
    n_unrelated: int = 8
    """How many of each are drawn for each edit."""
    references: str | None = None
    """Prompts whose answers are to stay, which every method is told: auto, a folder of images, or
    questions (demo, okvqa:FILE, a jsonl file); none of them is asked."""
    texts: str | None = None
    """A file of text, a paragraph per line, for the covariance of keys that ROME and MEMIT need."""
    template: str | None = "auto"
    min_pixels: int | None = None
    """The least pixels of an image, scaled: of models whose images have as many visual tokens as
    they ask for (see `Processor.bounded`). A model that is given has its own bounds."""
    max_pixels: int | None = None
    """The most; it decides what an image costs."""
    sequential: bool = False
    """Edit one case after the other instead, without taking the edits back."""
    at: tuple[int, ...] = (1, 2, 5, 10, 20, 50, 100)
    """After how many edits of a sequence to ask."""
    samples: int = 2000
    level: float = 0.95
    seed: int = 0
    """Of all choices and of the resampling."""

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
        where = "all" if self.layer is None else self.layer
        if isinstance(where, tuple):
            where = f"{where[0]}-{where[-1]}"
        return f"{self.named}@{where}"

    @property
    def named(self) -> str:
        """The method, and where its keys are, unless that is the constraint."""
        return self.method if self.keyed is None else f"{self.method}-{self.keyed}"

    @property
    def span(self) -> str | None:
        """Of the request; None is the constraint."""
        return None if self.keyed in SPREAD else self.keyed

    @property
    def arguments(self) -> dict[str, Any]:
        """What the method is told about where its keys are."""
        if self.method != "multedit":
            return {}
        return {"positions": self.keyed if self.keyed in SPREAD else "last"}

    @classmethod
    def parsed(cls, text: str, layers: Sequence[int]) -> list[Variant]:
        """The variants that a name stands for: "multedit", "rome-last@3", "memit@2-4", "lora@all".

        Args:
            layers: of a name without an @.

        Raises:
            ValueError: no such method, or no layers after the @.
        """
        named, at, where = text.partition("@")
        name, _, place = named.partition("-")
        keyed = place or None
        if name not in METHODS:
            raise ValueError(f"no editing method {name!r}; there are {', '.join(METHODS)}")
        if keyed in SPREAD and name != "multedit":
            raise ValueError(f"{text!r}: only multedit can have a key at every position")
        if not at:
            return [cls(name, layer, keyed) for layer in layers]
        found = re.fullmatch(r"(\d+)(?:-(\d+))?", where)
        if found is None and where != "all":
            raise ValueError(f"{text!r}: after the @ is a layer, a range like 2-4, or 'all'")
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
