"""Causal tracing: which layers and positions carry the answer.

MultiModalCausalTrace (Basu et al. 2024), after ROME's causal tracing (Meng et al. 2022): a clean
run, a corrupted run, and for every cell (site, group of positions, layer) a corrupted run in which
the clean activations of that cell are put back. A cell matters as far as that brings the clean
answer's probability back.

This is written with what a user can call: `record`, `Intervention`, `window`, `run_with_cache`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from mmlens.answers import Measure, given_answer, make_answer, with_answer
from mmlens.beginnings import record_like
from mmlens.branching import Recording
from mmlens.hooks import restore
from mmlens.inputs import MultimodalInputs
from mmlens.interventions import Intervention, hook_names
from mmlens.trace_grid import (
    SITES,
    Group,
    check_pair,
    layer_centres,
    position_groups,
    window_layers,
)
from mmlens.trace_result import CausalTrace

if TYPE_CHECKING:
    from mmlens.model import HookedMultimodalTransformer

__all__ = ["CausalTrace", "causal_trace", "causal_trace_many"]

Progress = Callable[[int, int], None]


@torch.no_grad()
def causal_trace(
    model: HookedMultimodalTransformer,
    clean: MultimodalInputs,
    corrupted: MultimodalInputs,
    *,
    sites: Sequence[str] = SITES,
    layers: Iterable[int] | None = None,
    window: int = 1,
    positions: Sequence[Group] | None = None,
    answer: str | int | None = None,
    contrast: str | int | None = None,
    kl: bool = False,
    method: Literal["branch", "naive"] = "branch",
    batch_rows: int | None = None,
    progress: Progress | None = None,
) -> CausalTrace:
    """Restore clean activations in a corrupted run, cell by cell.

    Args:
        clean: one prompt.
        corrupted: the same positions with other words (`swap_span`), noise (`noise_span`), another
            picture.
        sites: short names of activations, see `mmlens.interventions.hook_name`; all of the decoder
            or all of the vision tower. With units in brackets only these are restored: "z[3]" is
            head 3, "post[0-99]" a group of neurons. Sites without layers ("projector.out",
            "vision.out", "input_embed") have a single column.
        layers: centres of the windows; all layers by default.
        window: layers restored together around each centre, see `mmlens.window`.
        positions: groups of positions, each restored together; None takes every position from the
            first that differs, one at a time. The tower's sites have positions of their own: 0 is
            the class token, then come the patches, row by row. `clean.tiles(4, 4)` are regions of
            the picture.
        answer: a text, a token id, or None for the clean run's most probable next token. A text of
            several tokens is scored by its joint probability.
        contrast: another answer; the difference of their first tokens' logits is followed as well.
        kl: whether to follow KL(clean || restored) of the whole next-token distribution as well.
        method: "branch" shares what the runs have in common; "naive" does one full hooked run per
            cell, and is the reference for the other.
        batch_rows: the most rows that "branch" computes at once; by default what fits into free
            memory.
        progress: called with (cells done, cells in all).

    Raises:
        ValueError: inputs that do not match or do not differ, positions or layers that are not
            there, unknown sites, an answer that the model has no tokens for.

    Example:
        >>> clean = model.prepare(question, picture, spans={"constraint": "this country"})
        >>> corrupted = swap_span(model, clean, "constraint", "Paris")
        >>> trace = causal_trace(model, clean, corrupted,
        ...                      positions=[clean.span("constraint"), clean.span("last")])
        >>> trace.indirect_effect     # [site, group, layer]
    """
    trace, _ = traced(
        model,
        clean,
        corrupted,
        sites=sites,
        layers=layers,
        window=window,
        positions=positions,
        answer=answer,
        contrast=contrast,
        kl=kl,
        method=method,
        batch_rows=batch_rows,
        progress=progress,
    )
    return trace


@torch.no_grad()
def causal_trace_many(
    model: HookedMultimodalTransformer,
    pairs: Iterable[tuple[MultimodalInputs, MultimodalInputs]],
    *,
    positions: Callable[[MultimodalInputs], Sequence[Group] | None] | None = None,
    answers: Sequence[str | int | None] | None = None,
    contrasts: Sequence[str | int | None] | None = None,
    progress: bool = True,
    **options: Any,
) -> list[CausalTrace]:
    """`causal_trace` of many questions, with a progress bar.

    Questions that begin alike (about one picture, one after the other) share what they have in
    common. Each question's cells fill the device by themselves: there are sites x layers of them at
    every position.

    Args:
        pairs: clean and corrupted inputs of each question.
        positions: from the clean inputs to the groups of positions to trace, such as
            `lambda clean: [clean.span("constraint"), clean.span("last")]`.
        answers: one per question.
        contrasts: the other answers that each is compared with, see `causal_trace`.
        progress: whether to show the bar (on stderr, one step per cell).
        options: of `causal_trace`.

    Raises:
        ValueError: as `causal_trace`; or another number of answers or contrasts than of pairs.

    Example:
        >>> pairs = [(clean, swap_span(model, clean, "constraint")) for clean in prompts]
        >>> traces = causal_trace_many(model, pairs, window=3)
    """
    pairs = list(pairs)
    nothing = [None] * len(pairs)
    followed = [nothing if each is None else list(each) for each in (answers, contrasts)]
    for each in followed:
        if len(each) != len(pairs):
            raise ValueError(f"{len(each)} answers for {len(pairs)} pairs of inputs")
    traces: list[CausalTrace] = []
    like: Recording | None = None
    with tqdm(total=0, desc="tracing", unit="cell", disable=not progress) as bar:

        def advance(done: int, total: int) -> None:
            finished = sum(trace.restored.numel() for trace in traces)
            # Questions to come are taken to be like this one.
            bar.total = finished + total * (len(pairs) - len(traces))
            bar.update(finished + done - bar.n)

        for (clean, corrupted), answer, contrast in zip(pairs, *followed, strict=True):
            groups = None if positions is None else positions(clean)
            trace, like = traced(
                model,
                clean,
                corrupted,
                like=like,
                positions=groups,
                answer=answer,
                contrast=contrast,
                progress=advance,
                **options,
            )
            traces.append(trace)
    return traces


def traced(
    model: HookedMultimodalTransformer,
    clean: MultimodalInputs,
    corrupted: MultimodalInputs,
    *,
    sites: Sequence[str] = SITES,
    layers: Iterable[int] | None = None,
    window: int = 1,
    positions: Sequence[Group] | None = None,
    answer: str | int | None = None,
    contrast: str | int | None = None,
    kl: bool = False,
    method: str = "branch",
    batch_rows: int | None = None,
    progress: Progress | None = None,
    like: Recording | None = None,
) -> tuple[CausalTrace, Recording | None]:
    """`causal_trace`, and what the next question on the same picture may begin like."""
    began = time.perf_counter()
    if method not in METHODS:
        raise ValueError(f"method {method!r}; there are {', '.join(METHODS)}")
    clean, corrupted = model.to_inputs(clean), model.to_inputs(corrupted)
    check_pair(clean, corrupted)
    centres = layer_centres(model, sites, layers)
    groups, labels = position_groups(model, clean, corrupted, sites, positions)
    windows = {
        site: [window_layers(model, site, centre, window) for centre in centres] for site in sites
    }
    names = {name for site in sites for each in windows[site] for name in hook_names(site, each)}

    def cells(cache: Mapping[str, Tensor]) -> list[list[Intervention]]:
        put_back = restore(cache)
        return [
            [Intervention(site, layers, group, put_back)]
            for site in sites
            for group in groups
            for layers in windows[site]
        ]

    run = METHODS[method](model, clean, answer, sorted(names), like)
    measure = Measure(
        run.target,
        None if contrast is None else given_answer(model, clean, contrast),
        run.logits[:, 0] if kl else None,
    )
    restored, base = run.restored(corrupted, cells, measure, batch_rows, progress)
    restored = restored.unflatten(0, (len(sites), len(groups), len(centres))).cpu()
    trace = CausalTrace(
        **measured_values(measure, restored, measure(run.logits).mean(dim=0), base.mean(dim=0)),
        sites=tuple(sites),
        layers=tuple(centres),
        window=window,
        groups=tuple(tuple(group.tolist()) for group in groups),
        group_labels=tuple(labels),
        answer=run.target.text,
        answer_tokens=tuple(run.target.tokens.tolist()),
        method=method,
        metadata={
            "model": model.cfg.model_name,
            "str_tokens": clean.labels(),
            "prompt": clean.texts[0] if clean.texts else "",
            "samples": 1 if corrupted.noise is None else len(corrupted.noise),
            "seconds": round(time.perf_counter() - began, 3),
        },
        contrast="" if measure.contrast is None else measure.contrast.text,
    )
    return trace, run.recording


def measured_values(
    measure: Measure,
    restored: Float[Tensor, "site group layer measure"],
    clean: Float[Tensor, " measure"],
    corrupted: Float[Tensor, " measure"],
) -> dict[str, Any]:
    """The fields of a trace in which measured values stand."""
    cells = measure.named(restored)
    clean_values, corrupted_values = (
        {name: value.item() for name, value in measure.named(each).items()}
        for each in (clean, corrupted)
    )
    return {
        "restored": cells["probability"],
        "clean": clean_values["probability"],
        "corrupted": corrupted_values["probability"],
        "logit_difference": cells.get("logit_difference"),
        "clean_logit_difference": clean_values.get("logit_difference"),
        "corrupted_logit_difference": corrupted_values.get("logit_difference"),
        "kl": cells.get("kl"),
        "corrupted_kl": corrupted_values.get("kl"),
    }


class Branching:
    """Clean and corrupted runs that share what they have in common, and cells as branches."""

    def __init__(
        self,
        model: HookedMultimodalTransformer,
        clean: MultimodalInputs,
        answer: str | int | None,
        names: Sequence[str],
        like: Recording | None,
    ) -> None:
        last = clean.n_pos - 1
        given = None if answer is None else given_answer(model, clean, answer)
        inputs = clean if given is None else with_answer(clean, given)
        self.recording = record_like(model, inputs, [] if like is None else [like], names)
        self.logits = self.recording.logits(None if given is None else given.positions)
        self.target = given or make_answer(model, [int(self.logits[0, 0].argmax())], last)

    def restored(
        self,
        corrupted: MultimodalInputs,
        cells: Callable[[Mapping[str, Tensor]], list[list[Intervention]]],
        measure: Measure,
        batch_rows: int | None,
        progress: Progress | None,
    ) -> tuple[Float[Tensor, "cell measure"], Float[Tensor, "row measure"]]:
        """What is measured of every cell (mean over rows), and of the corrupted run."""
        target = self.target
        recording = self.recording.record(with_answer(corrupted, target))
        branches = cells(self.recording.cache)
        done = 0

        def advance(n: int) -> None:
            nonlocal done
            done += n
            if progress is not None:
                progress(done, len(branches))

        restored = recording.run(
            branches,
            measure,
            positions=target.positions,
            batch_rows=batch_rows,
            progress=advance,
        )
        return restored.mean(dim=1), measure(recording.logits(target.positions))


class Naive:
    """The same by one full hooked forward pass per cell."""

    recording = None

    def __init__(
        self,
        model: HookedMultimodalTransformer,
        clean: MultimodalInputs,
        answer: str | int | None,
        names: Sequence[str],
        like: Recording | None,
    ) -> None:
        self.model = model
        last = clean.n_pos - 1
        given = None if answer is None else given_answer(model, clean, answer)
        resid, self.cache = model.run_with_cache(
            clean if given is None else with_answer(clean, given),
            names_filter=names,
            stop_at_layer=model.cfg.n_layers,
            return_cache_object=False,
        )
        self.logits = model.unembed(model.ln_final(resid)[:, last:])
        self.target = given or make_answer(model, [int(self.logits[0, 0].argmax())], last)

    def restored(
        self,
        corrupted: MultimodalInputs,
        cells: Callable[[Mapping[str, Tensor]], list[list[Intervention]]],
        measure: Measure,
        batch_rows: int | None,
        progress: Progress | None,
    ) -> tuple[Float[Tensor, "cell measure"], Float[Tensor, "row measure"]]:
        """What is measured of every cell (mean over rows), and of the corrupted run."""
        inputs, branches, restored = with_answer(corrupted, self.target), cells(self.cache), []
        base = self.read(inputs, measure)
        for done, cell in enumerate(branches, start=1):
            hooks = [pair for intervention in cell for pair in intervention.fwd_hooks()]
            with self.model.hooks(fwd_hooks=hooks):  # the hooks also see the final norm
                restored.append(self.read(inputs, measure).mean(dim=0))
            if progress is not None:
                progress(done, len(branches))
        return torch.stack(restored), base

    def read(self, inputs: MultimodalInputs, measure: Measure) -> Float[Tensor, "row measure"]:
        """What is measured of a run."""
        resid = self.model(inputs, stop_at_layer=self.model.cfg.n_layers)
        normalized = self.model.ln_final(resid)
        read = normalized[:, self.target.positions.to(normalized.device)]
        return measure(self.model.unembed(read))


METHODS: dict[str, type[Branching | Naive]] = {"branch": Branching, "naive": Naive}
