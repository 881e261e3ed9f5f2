"""Causal tracing: which layers and positions carry the answer.

MultiModalCausalTrace (Basu et al. 2024), after ROME's causal tracing (Meng et al. 2022): a clean
run, a corrupted run, and for every cell (site, group of positions, layer) a corrupted run in which
the clean activations of that cell are put back. A cell matters as far as that brings the clean
answer's probability back, or another metric's value.

This is `patch` over `restore`, written with what a user can call: `record`, `Intervention`,
`window`, `patch`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

from jaxtyping import Float
from torch import Tensor

from mmlens.analyses.metrics import Metric, check_metric, check_one_number, metric_of, name_of
from mmlens.analyses.patch import patch
from mmlens.analyses.result import description
from mmlens.analyses.targets import Measure, given_answer, record_with_answer, with_answer
from mmlens.analyses.trace_grid import (
    SITES,
    Group,
    check_pair,
    layer_centres,
    position_groups,
    tiles_of,
    window_layers,
)
from mmlens.analyses.trace_result import CausalTrace
from mmlens.inputs.multimodal_inputs import MultimodalInputs
from mmlens.interventions.functions import restore
from mmlens.interventions.intervention import Intervention, hook_names
from mmlens.utils.grad_mode import without_gradients
from mmlens.utils.progress import Progress
from mmlens.utils.texts import check_several
from mmlens.utils.threads import on_free_cores

if TYPE_CHECKING:
    from mmlens.branching.recording import Recording
    from mmlens.model.transformer import HookedMultimodalTransformer

Method = Literal["branch", "naive"]


@without_gradients
@on_free_cores
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
    metric: Metric = "probability",
    contrast: str | int | None = None,
    kl: bool = False,
    method: Method = "branch",
    batch_rows: int | None = None,
    earlier: list[Recording] | None = None,
    progress: Progress | None = None,
) -> CausalTrace:
    """Restore clean activations in a corrupted run, cell by cell.

    Args:
        clean: one prompt.
        corrupted: the same positions with other words (`swap_span`), noise (`noise_span`), another
            image.
        sites: short names of activations, see `mmlens.interventions.intervention.hook_name`; all of
            the decoder or all of the vision tower. With units in brackets only these are restored:
            "z[3]" is head 3, "post[0-99]" a group of neurons. Sites without layers
            ("projector.out", "vision.out", "input_embed") have a single column.
        layers: centres of the windows; all layers by default.
        window: layers restored together around each centre, see `mmlens.window`.
        positions: groups of positions, each restored together; None takes every position from the
            first that differs, one at a time. The tower's sites have positions of their own: 0 is
            the class token, then come the patches, row by row. Where it sees several tiles, numbers
            mean these patches of every tile, `InTile(2, numbers)` those of one, and a list of
            `InTile`s is one group. `clean.tiles(4, 4)` are regions of the image.
        answer: a text, a token id, or None for the clean run's most probable next token. A text of
            several tokens is scored by its joint probability.
        metric: what `restored`, `clean` and `corrupted` are: "probability" of the answer,
            "logit_diff" (with `contrast`), "kl" (KL(clean || run) of the next token), "loss" of the
            answer's tokens, or a function of the logits [row, n, d_vocab] that predict the answer's
            tokens, which returns a number for each row.
        contrast: another answer; the difference of their first tokens' logits is followed as well.
        kl: whether to follow KL(clean || restored) of the whole next-token distribution as well.
        method: "branch" shares what the runs have in common; "naive" does one full hooked run per
            cell, and is the reference for the other.
        batch_rows: the most rows that "branch" computes at once; None takes what fits into free
            memory.
        earlier: a list that is handed from trace to trace: what "branch" recorded of the clean run
            takes the place of what is in it, which the clean run may begin like (the same image).
        progress: called with (cells done, cells in all).

    Raises:
        ValueError: inputs that do not match or do not differ, positions or layers that are not
            there, unknown sites, an answer that the model has no tokens for; a metric that lacks
            its contrast, or that gives several numbers for a row.

    Example:
        >>> clean = model.prepare(question, image, spans={"constraint": "this country"})
        >>> corrupted = swap_span(model, clean, "constraint", "Paris")
        >>> trace = causal_trace(model, clean, corrupted,
        ...                      positions=[clean.span("constraint"), clean.span("last")])
        >>> trace.indirect_effect     # [site, group, layer]
    """
    began = time.perf_counter()
    if method not in get_args(Method):
        raise ValueError(f"method {method!r}; there are {', '.join(get_args(Method))}")
    clean, corrupted = model.to_inputs(clean), model.to_inputs(corrupted)
    check_pair(clean, corrupted)
    check_metric(metric, contrast if metric == "logit_diff" else None)
    centres = layer_centres(model, sites, layers)
    groups = position_groups(model, clean, corrupted, sites, positions)
    windows = {
        site: [window_layers(model, site, centre, window) for centre in centres] for site in sites
    }
    names = {name for site in sites for each in windows[site] for name in hook_names(site, each)}
    known = [] if earlier is None or method == "naive" else earlier
    run, target = record_with_answer(model, clean, answer, sorted(names), known)
    known[:] = [run]
    put_back = restore(run.cache)
    cells = {
        (site, number, centre): [Intervention(site, layers, part, put_back) for part in group.parts]
        for site in sites
        for number, group in enumerate(groups)
        for centre, layers in zip(centres, windows[site], strict=True)
    }
    clean_logits = run.logits(target.positions)
    other_answer = None if contrast is None else given_answer(model, clean, contrast)
    function = metric_of(metric, target, other_answer, run)
    check_one_number(metric, function(clean_logits), len(clean_logits))
    measure = Measure(target, other_answer, clean_logits[:, 0] if kl else None, function)
    other = with_answer(corrupted, target)
    base = model.record(other) if method == "naive" else run.record(other)
    restored = patch(
        base,
        cells,
        measure,
        positions=target.positions,
        batch_rows=batch_rows,
        progress=progress,
        plain=method == "naive",
    ).values
    return CausalTrace(
        **measured_values(measure, restored, clean_logits, base.logits(target.positions)),
        sites=tuple(sites),
        layers=tuple(centres),
        window=window,
        groups=tuple(group.numbers for group in groups),
        group_labels=tuple(group.label for group in groups),
        answer=target.text,
        answer_tokens=tuple(target.tokens.tolist()),
        method=method,
        metadata=description(model, clean)
        | {
            "str_tokens": clean.labels(),
            "samples": 1 if corrupted.noise is None else len(corrupted.noise),
            "seconds": round(time.perf_counter() - began, 3),
        }
        | tiles_of(groups),
        metric=name_of(metric),
        contrast="" if measure.contrast is None else measure.contrast.text,
    )


@without_gradients
def causal_trace_many(
    model: HookedMultimodalTransformer,
    pairs: Iterable[tuple[MultimodalInputs, MultimodalInputs]],
    *,
    positions: Callable[[MultimodalInputs], Sequence[Group] | None] | None = None,
    answers: Sequence[str | int | None] | None = None,
    contrasts: Sequence[str | int | None] | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> list[CausalTrace]:
    """`causal_trace` of many questions.

    Questions that begin alike (about one image, one after the other) share what they have in
    common. Each question's cells fill the device by themselves: there are sites x layers of them at
    every position.

    Args:
        pairs: clean and corrupted inputs of each question.
        positions: from the clean inputs to the groups of positions to trace, such as
            `lambda clean: [clean.span("constraint"), clean.span("last")]`.
        answers: one per question.
        contrasts: the other answers that each is compared with, see `causal_trace`.
        progress: called with (cells done, cells in all), where questions to come are taken to be
            like the one before; `mmlens.utils.progress.progress_bar` shows it.
        options: of `causal_trace`.

    Raises:
        ValueError: as `causal_trace`; or another number of answers or contrasts than of pairs.

    Example:
        >>> pairs = [(clean, swap_span(model, clean, "constraint")) for clean in prompts]
        >>> traces = causal_trace_many(model, pairs, window=3)
    """
    check_several(answers=answers, contrasts=contrasts)
    pairs = list(pairs)
    nothing = [None] * len(pairs)
    followed = [nothing if each is None else list(each) for each in (answers, contrasts)]
    for each in followed:
        if len(each) != len(pairs):
            raise ValueError(f"{len(each)} answers for {len(pairs)} pairs of inputs")
    traces: list[CausalTrace] = []
    earlier: list[Recording] = []

    def advance(done: int, total: int) -> None:
        finished = sum(trace.restored.numel() for trace in traces)
        if progress is not None:
            progress(finished + done, finished + total * (len(pairs) - len(traces)))

    for (clean, corrupted), answer, contrast in zip(pairs, *followed, strict=True):
        groups = None if positions is None else positions(clean)
        options |= {"positions": groups, "answer": answer, "contrast": contrast}
        options |= {"earlier": earlier, "progress": advance}
        traces.append(causal_trace(model, clean, corrupted, **options))
    return traces


def measured_values(
    measure: Measure,
    restored: Float[Tensor, "site group layer measure"],
    clean: Float[Tensor, "row n d_vocab"],
    corrupted: Float[Tensor, "samples n d_vocab"],
) -> dict[str, Any]:
    """The fields of a trace in which measured values stand."""
    cells = measure.named(restored)
    clean_values, corrupted_values = (
        {name: value.item() for name, value in measure.named(measure(each).mean(dim=0)).items()}
        for each in (clean, corrupted)
    )
    return {
        "restored": cells["metric"],
        "clean": clean_values["metric"],
        "corrupted": corrupted_values["metric"],
        "logit_difference": cells.get("logit_difference"),
        "clean_logit_difference": clean_values.get("logit_difference"),
        "corrupted_logit_difference": corrupted_values.get("logit_difference"),
        "kl": cells.get("kl"),
        "corrupted_kl": corrupted_values.get("kl"),
    }
