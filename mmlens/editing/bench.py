"""A benchmark of editing methods: every case, method and layer; resumable, with figures.

    bench = EditBench.open(BenchSettings(methods=("multedit", "fine_tune@all"), limit=100))
    bench.run("results")

What was found for one edit is one file, which appears when it is complete. A run with the same
settings goes on where an earlier one stopped, and more cases can be added with a larger limit.
"""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from functools import cached_property, partial
from importlib.metadata import version
from inspect import signature
from pathlib import Path
from typing import Any

import torch

from mmlens.data import EditCase, VisualQuestion
from mmlens.data.opening import open_questions
from mmlens.editing import METHODS
from mmlens.editing.asking import Examiner
from mmlens.editing.bench_settings import (
    BenchSettings,
    Variant,
    called,
    default_layer,
    open_cases,
    open_unrelated,
)
from mmlens.editing.covariance import KeyCovariance, key_covariance
from mmlens.editing.edit_evaluation import EditEvaluation
from mmlens.editing.evaluation import (
    Examination,
    Unrelated,
    evaluate_sequence,
    measured,
    request_of,
)
from mmlens.editing.preserved import PreservedKeys
from mmlens.editing.request import EditRequest
from mmlens.editing.sequential import SequentialEditor
from mmlens.model import HookedMultimodalTransformer

__all__ = ["EditBench"]

Progress = Callable[[int, int], None]


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
        self.all_cases = open_cases(settings) if cases is None else cases
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
        model = HookedMultimodalTransformer.from_pretrained(settings.model, **options)
        return cls(settings, model)

    def _check(self, variant: Variant) -> None:
        n_layers, layer = self.model.cfg.n_layers, variant.layer
        named = () if layer is None else (layer,) if isinstance(layer, int) else layer
        if wrong := [each for each in named if not 0 <= each < n_layers]:
            raise ValueError(
                f"{variant.label}: layer {wrong[0]}; this model has 0 ... {n_layers - 1}"
            )
        if self._needs_covariance(variant) and self.settings.texts is None:
            raise ValueError(f"{variant.method} needs texts, from which it estimates a covariance")

    def _needs_covariance(self, variant: Variant) -> bool:
        return "covariance" in signature(METHODS[variant.method]).parameters

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

    def arguments(self, variant: Variant, asked: Sequence[VisualQuestion] = ()) -> dict[str, Any]:
        """What a method is called with, beside the request.

        Args:
            asked: what the method must not be told to preserve.
        """
        given = {**self.settings.settings_of(variant), **variant.arguments}
        layer = list(variant.layer) if isinstance(variant.layer, tuple) else variant.layer
        takes = signature(METHODS[variant.method]).parameters
        if "covariance" in takes:
            given["covariance"] = self._covariance
        if "kept" in takes and self._preserved is not None:
            given["kept"] = self._preserved.of(layer, asked, variant.keyed)  # type: ignore[arg-type]
        return {"layer": layer, **given}

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
        for variant in filter(self._needs_covariance, self.variants):
            layer = range(self.model.cfg.n_layers) if variant.layer is None else variant.layer
            layers |= {layer} if isinstance(layer, int) else set(layer)
        lines = Path(self.settings.texts).read_text(encoding="utf-8").splitlines()
        texts = [line for line in lines if line.strip()]
        return key_covariance(self.model, texts, sorted(layers))

    # Running

    def run(self, out: str | Path, progress: Progress | None = None) -> list[Path]:
        """Evaluate what is not in the folder yet, and write tables and figures.

        Args:
            out: a folder; it gets `edits/` (or `sequences/`) with what was found, and a folder for
                each figure.
            progress: called with the edits done and all.

        Returns:
            The files of the figures.

        Raises:
            ValueError: no case can be asked.
        """
        return self.write(self.evaluations(out, progress), out)

    def write(self, found: Mapping[Variant, EditEvaluation], out: str | Path) -> list[Path]:
        """Tables and figures of what `evaluations` gave; returns their files."""
        from mmlens.editing.bench_figures import figures
        from mmlens.reproduce.figure import write

        return [path for made in figures(self, found) for path in write(made, self, out)]

    def evaluations(
        self, out: str | Path, progress: Progress | None = None
    ) -> dict[Variant, EditEvaluation]:
        """What was found for each variant; from the folder where it is there already.

        `metadata["failed"]` counts the edits that could not be made, by the reason.
        """
        run = self._sequences if self.settings.sequential else self._single
        found: dict[Variant, list[EditEvaluation]] = {variant: [] for variant in self.variants}
        total = len(self.chosen[0]) * len(self.variants)

        def moved(done: int) -> None:
            if progress is not None:
                progress(done, total)

        for variant, evaluation in run(Path(out), moved):
            found[variant].append(evaluation)
        return {
            variant: EditEvaluation.joined(each, failed=failures(each))
            for variant, each in found.items()
        }

    def _single(
        self, out: Path, moved: Callable[[int], None]
    ) -> Iterator[tuple[Variant, EditEvaluation]]:
        """Case by case, by all methods."""
        done = 0
        examiner = Examiner(self.model, template=self.settings.template)
        for case in self.chosen[0]:
            examination = Examination(examiner, case, self.unrelated)
            for variant in self.variants:
                path = out / "edits" / variant.label / f"{file_name(case)}.safetensors"
                found = self._read(path, variant)
                if found is None:
                    found = self._evaluated(examination, variant)
                    path.parent.mkdir(parents=True, exist_ok=True)
                    found.save(path)
                done += 1
                moved(done)
                yield variant, found

    def _evaluated(self, examination: Examination, variant: Variant) -> EditEvaluation:
        """One edit; where it cannot be made, the model as it is, counted as failed."""
        examination.begin()
        seconds, memory, failed = torch.nan, 0, ""
        applied: AbstractContextManager[Any] = nullcontext()
        arguments = self.arguments(variant, examination.questions)  # what all cases have in common
        try:
            request = self.request(examination.case, variant.span)
            edit, seconds, memory = measured(
                self.model, lambda: called(variant.method, self.model, request, **arguments)
            )
            applied = edit.applied(self.model)
        except ValueError as error:
            failed = str(error)
        with applied:
            found = examination.after(seconds=seconds, memory=memory)
        return replace(found, metadata={**self.stamp(variant), "failed": failed})

    def _sequences(
        self, out: Path, moved: Callable[[int], None]
    ) -> Iterator[tuple[Variant, EditEvaluation]]:
        """Method by method, all cases in a row."""
        cases = self.chosen[0]
        examiner = Examiner(self.model, template=self.settings.template)
        for index, variant in enumerate(self.variants):
            folder = out / "sequences" / variant.label
            folder.mkdir(parents=True, exist_ok=True)
            files = {n: folder / f"{n}.safetensors" for n in {*self.settings.at, len(cases)}}
            read = {n: self._read(path, variant, cases[:n]) for n, path in files.items()}
            metadata = {**self.stamp(variant), "failed": ""}

            def keep(
                number: int,
                found: EditEvaluation,
                files: dict[int, Path] = files,
                metadata: dict[str, Any] = metadata,
            ) -> None:
                replace(found, metadata=metadata).save(files[number])

            method = METHODS[variant.method]
            examinations = [Examination(examiner, case, self.unrelated) for case in cases]
            asked = [question for each in examinations for question in each.questions]
            with SequentialEditor(self.model, method, **self.arguments(variant, asked)) as editor:
                found = evaluate_sequence(
                    editor,
                    partial(self.request, span=variant.span),
                    cases,
                    at=self.settings.at,
                    unrelated=self.unrelated,
                    template=self.settings.template,
                    done={n: each for n, each in read.items() if each is not None},
                    found=keep,
                    progress=lambda done, total, before=index: moved(before * total + done),  # type: ignore[misc]
                )
            moved((index + 1) * len(cases))
            yield variant, replace(found, metadata=metadata)

    # Files

    def stamp(self, variant: Variant) -> dict[str, Any]:
        """What the numbers of a variant depend on, but for the case."""
        chosen = asdict(self.settings)
        for name in ("methods", "layers", "limit", "samples", "level", "at", "method_settings"):
            del chosen[name]
        record = {
            **chosen,
            "method": variant.method,
            "layer": variant.layer,
            "keyed": variant.keyed,
            "method_settings": self.settings.settings_of(variant),
            "mmlens": version("mmlens"),
        }
        return json.loads(json.dumps(record))

    def _read(
        self, path: Path, variant: Variant, cases: Sequence[EditCase] = ()
    ) -> EditEvaluation | None:
        """What an earlier run found, if it was with these settings (and of these cases)."""
        if not path.is_file():
            return None
        found = EditEvaluation.load(path)
        expected = self.stamp(variant)
        same = {name: found.metadata.get(name) for name in expected} == expected
        known = not cases or found.case == tuple(case.source for case in cases)
        return found if same and known else None


def failures(evaluations: Sequence[EditEvaluation]) -> dict[str, int]:
    """The reasons for which edits could not be made, and how many each stopped."""
    return dict(Counter(each.metadata["failed"] for each in evaluations if each.metadata["failed"]))


def file_name(case: EditCase) -> str:
    """A file's name for a case: readable, and another for every source and target."""
    digest = random.Random(f"{case.source} {case.target}").getrandbits(32)
    return f"{re.sub(r'[^A-Za-z0-9]+', '-', case.source)[-60:]}-{digest:08x}"
