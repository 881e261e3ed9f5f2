"""A benchmark of editing methods: every case, method and layer; resumable, with figures.

    bench = EditBench.open(BenchSettings(methods=("multedit", "fine_tune@all"), limit=100))
    bench.run("results")

What was found for one edit is one file, which appears when it is complete. A run with the same
settings goes on where an earlier one stopped, and more cases can be added with a larger limit.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import cached_property, lru_cache, partial
from inspect import signature
from itertools import product
from pathlib import Path
from typing import Any

from mmlens.data import EditCase, VisualQuestion
from mmlens.data.open import open_cases, open_questions
from mmlens.data.reading import lines_of, read_text
from mmlens.edit_bench.figures import figures
from mmlens.edit_bench.kept_keys import PreservedKeys
from mmlens.edit_bench.settings import (
    EVERYWHERE,
    SPREAD,
    BenchSettings,
    Variant,
    called,
    default_layer,
    open_unrelated,
)
from mmlens.editing import METHODS
from mmlens.editing.covariance import KeyCovariance, key_covariance
from mmlens.editing.edit_evaluation import EditEvaluation
from mmlens.editing.evaluation import Examination, Unrelated, evaluate_sequence, request_of
from mmlens.editing.examiner import Examiner
from mmlens.editing.references import References
from mmlens.editing.request import EditRequest
from mmlens.editing.sequential import SequentialEditor
from mmlens.model.transformer import HookedMultimodalTransformer
from mmlens.plots.figure_folder import write
from mmlens.utils.progress import Progress
from mmlens.utils.resumable import ResultFile, Resumable, as_json, locked, versions


class EditBench:
    """A model, cases to edit, and methods.

    Args:
        settings: what is to be done.
        model: the model.
        cases: to be edited; by default those that the settings name.
        unrelated: further questions by name; by default those that the settings name.

    Raises:
        ValueError: an unknown method, a layer that is not there, or as `open_cases`.
    """

    def __init__(
        self,
        settings: BenchSettings,
        model: HookedMultimodalTransformer,
        cases: Sequence[EditCase] | None = None,
        unrelated: Mapping[str, Sequence[VisualQuestion]] | None = None,
    ) -> None:
        self.settings, self.model = settings, model
        if cases is None:
            cases = open_cases(settings.data, settings.images, seed=settings.seed)
        self.all_cases = cases
        if unrelated is None:
            unrelated = open_unrelated(settings)
        self.unrelated = Unrelated(unrelated, settings.n_unrelated, settings.seed)
        layers = (default_layer(model),) if settings.layers is None else settings.layers
        self.variants = list(
            dict.fromkeys(v for text in settings.methods for v in Variant.parsed(text, layers))
        )
        for variant in self.variants:
            self._check(variant)

    @classmethod
    def open(cls, settings: BenchSettings, **options: Any) -> EditBench:
        """With the model that the settings name, loaded with `options` of `from_pretrained`."""
        bounds: dict[str, Any] = {
            "min_pixels": settings.min_pixels,
            "max_pixels": settings.max_pixels,
        }
        model = HookedMultimodalTransformer.from_pretrained(settings.model, **options, **bounds)
        return cls(settings, model)

    def _check(self, variant: Variant) -> None:
        n_layers, layer = self.model.cfg.n_layers, variant.layer
        named = () if layer is None else (layer,) if isinstance(layer, int) else layer
        if wrong := [each for each in named if not 0 <= each < n_layers]:
            raise ValueError(
                f"{variant.label}: layer {wrong[0]}; this model has 0 ... {n_layers - 1}"
            )
        if self.settings.references is not None:
            return
        if takes(variant, "covariance") and self.settings.texts is None:
            raise ValueError(
                f"{variant.method} needs texts, from which it estimates a covariance, or references"
            )
        if variant.method == "alphaedit":
            raise ValueError("alphaedit needs references: --references auto")

    # The cases

    @cached_property
    def chosen(self) -> tuple[list[EditCase], dict[str, int]]:
        """The first `limit` cases that can be asked, and how many were left out and why.

        Raises:
            ValueError: none can.
        """
        dropped: Counter[str] = Counter()
        cases: list[EditCase] = []
        considered = 0
        for case in self.all_cases:
            if len(cases) == self.settings.limit:
                break
            considered += 1
            try:
                self.request(case)
                for question in (each for group in case.groups().values() for each in group):
                    question.open_images(), question.spans()
                cases.append(case)
            except ValueError as error:
                dropped[f"cannot be asked ({type(error).__name__})"] += 1
        counts = {"considered": considered, **dropped, "used": len(cases)}
        if refused := getattr(self.all_cases, "refused", ()):
            counts["rows that could not be used"] = len(refused)
        if not cases:
            raise ValueError(f"none of {considered} cases can be asked: {counts}")
        return cases, counts

    def request(self, case: EditCase, span: str | None = None) -> EditRequest:
        """What a method is told."""
        return request_of(
            self.model,
            case,
            span=span,
            n_key_questions=self.settings.n_key_questions,
            n_kept=self.settings.n_kept,
            target_end=self.settings.target_end,
            template=self.settings.template,
        )

    def arguments(
        self,
        variant: Variant,
        asked: Sequence[VisualQuestion] = (),
        cases: Sequence[EditCase] = (),
    ) -> dict[str, Any]:
        """What a method is called with, beside the request.

        Args:
            asked: what the method must not be told to preserve.
            cases: what it edits.
        """
        given = {**self.settings.settings_of(variant), **variant.arguments}
        layer = list(variant.layer) if isinstance(variant.layer, tuple) else variant.layer
        if takes(variant, "references"):
            edited = [case.question for case in cases]
            known = self._references
            told = None if known is None else known.without(asked, edited)
            given.setdefault("references", told)
        if takes(variant, "covariance") and given.get("references") is None:
            given["covariance"] = self._covariance
        if takes(variant, "kept") and self._preserved is not None:
            place = EVERYWHERE if variant.keyed in SPREAD else variant.keyed
            given["kept"] = self._preserved.of(layer, asked, place)  # type: ignore[arg-type]
        return {"layer": layer, **given}

    @cached_property
    def _references(self) -> References | None:
        """What the settings name."""
        return References.of(self.settings.references, self.model)

    @cached_property
    def _preserved(self) -> PreservedKeys | None:
        """What the settings name."""
        chosen = self.settings
        if chosen.preserved is None:
            return None
        questions = open_questions(chosen.preserved, chosen.images, seed=chosen.seed)
        examiner = Examiner(self.model, template=chosen.template)
        counts = chosen.n_preserved, chosen.n_preserved_whole
        return PreservedKeys(examiner, questions, *counts, seed=chosen.seed)

    @cached_property
    def _covariance(self) -> KeyCovariance:
        """Of the layers of all variants that need one, from the settings' texts."""
        assert self.settings.texts is not None  # checked in __init__
        layers: set[int] = set()
        for variant in self.variants:
            if takes(variant, "covariance"):
                layer = range(self.model.cfg.n_layers) if variant.layer is None else variant.layer
                layers |= {layer} if isinstance(layer, int) else set(layer)
        lines = lines_of(read_text(self.settings.texts))
        texts = [line for line in lines if line.strip()]
        return key_covariance(self.model, texts, sorted(layers))

    # Running

    def run(self, out: str | Path, progress: Progress | None = None) -> list[Path]:
        """Evaluate what is not in the folder yet; returns the files of tables and figures.

        Args:
            out: a folder; it gets `edits/` (or `sequences/`) with what was found, and a folder for
                each figure.
            progress: called with the edits done and all.

        Raises:
            FolderInUse: (a ValueError) another benchmark of one of the methods writes to it.
            ValueError: no case can be asked.
        """
        return self.write(self.evaluations(out, progress), out)

    def write(self, found: Mapping[Variant, EditEvaluation], out: str | Path) -> list[Path]:
        """Tables and figures of what `evaluations` gave; returns their files."""
        where = self.settings, self.model.device, out
        drawn = figures(self.settings, self.chosen[1], found)
        return [path for made in drawn for path in write(made, *where)]

    def evaluations(
        self, out: str | Path, progress: Progress | None = None
    ) -> dict[Variant, EditEvaluation]:
        """What was found for each variant; from the folder where it is there already.

        `metadata["failed"]` counts the edits that could not be made, by the reason.
        """
        found: dict[Variant, list[EditEvaluation]] = {variant: [] for variant in self.variants}
        run = self._sequences if self.settings.sequential else self._single
        folder = Path(out) / ("sequences" if self.settings.sequential else "edits")
        with ExitStack() as held:
            for variant in self.variants:  # others may do other methods at the same time
                held.enter_context(locked(folder / variant.label, "edit benchmark"))
            for variant, evaluation in run(folder, progress):
                found[variant].append(evaluation)
        joined = {}
        for variant, each in found.items():
            reasons = Counter(one.metadata["failed"] for one in each if one.metadata["failed"])
            joined[variant] = EditEvaluation.joined(each, failed=dict(reasons))
        return joined

    def _single(
        self, out: Path, progress: Progress | None
    ) -> Iterator[tuple[Variant, EditEvaluation]]:
        """Give what was found for each edit, failed ones too: case by case, by all methods."""
        cases, files = self.chosen[0], {}
        stamps = {variant: self.stamp(variant) for variant in self.variants}
        for (row, case), variant in product(enumerate(cases), self.variants):
            path = out / variant.label / f"{file_name(case)}.safetensors"
            files[row, variant] = ResultFile(EditEvaluation, path, stamps[variant])
        examiner = Examiner(self.model, template=self.settings.template)

        @lru_cache(maxsize=1)  # what is asked before an edit is the same for all methods
        def examination(row: int) -> Examination:
            return Examination(examiner, cases[row], self.unrelated)

        def evaluated(item: tuple[int, Variant]) -> EditEvaluation:
            row, variant = item
            arguments = self.arguments(variant, examination(row).questions, [cases[row]])
            request = self.request(cases[row], variant.span)
            edit = partial(called, variant.method, self.model, request, **arguments)
            return examination(row).of(edit)

        for (_, variant), found in Resumable(files, progress).each(evaluated).items():
            yield variant, found

    def _sequences(
        self, out: Path, progress: Progress | None
    ) -> Iterator[tuple[Variant, EditEvaluation]]:
        """Give what was found for each method: all cases in a row."""
        cases = self.chosen[0]
        sources = tuple(case.source for case in cases)
        examiner = Examiner(self.model, template=self.settings.template)
        n_edits = len(cases) * len(self.variants)
        for index, variant in enumerate(self.variants):

            def moved(done: int, _: int = 0, before: int = index * len(cases)) -> None:
                if progress is not None:
                    progress(before + done, n_edits)

            stamp = {**self.stamp(variant), "failed": ""}
            files = {
                n: ResultFile(EditEvaluation, out / variant.label / f"{n}.safetensors", stamp)
                for n in {*self.settings.at, len(cases)}
            }
            run = Resumable(files)
            run.found = {n: each for n, each in run.found.items() if each.case == sources[:n]}
            method = METHODS[variant.method]
            examinations = [Examination(examiner, case, self.unrelated) for case in cases]
            asked = [question for each in examinations for question in each.questions]
            arguments = self.arguments(variant, asked, cases)
            with SequentialEditor(self.model, method, **arguments) as editor:
                found = evaluate_sequence(
                    editor,
                    partial(self.request, span=variant.span),
                    cases,
                    at=self.settings.at,
                    unrelated=self.unrelated,
                    template=self.settings.template,
                    done=run.found,
                    found=run.add,
                    progress=moved,
                )
            moved(len(cases))
            yield variant, replace(found, metadata=stamp)

    # Files

    def stamp(self, variant: Variant) -> dict[str, Any]:
        """What the numbers of a variant depend on, but for the case."""
        chosen = asdict(self.settings)
        for name in ("methods", "layers", "limit", "samples", "level", "at", "method_settings"):
            del chosen[name]
        return as_json(
            {
                **chosen,
                "method": variant.method,
                "layer": variant.layer,
                "keyed": variant.keyed,
                "method_settings": self.settings.settings_of(variant),
                **versions(["mmlens"]),
            }
        )


def takes(variant: Variant, name: str) -> bool:
    """Whether a variant's method has a parameter of this name."""
    return name in signature(METHODS[variant.method]).parameters


def file_name(case: EditCase) -> str:
    """A file's name for a case: readable, and another for every source and target."""
    digest = random.Random(f"{case.source} {case.target}").getrandbits(32)
    return f"{re.sub(r'[^A-Za-z0-9]+', '-', case.source)[-60:]}-{digest:08x}"
