"""Metrics: what an analysis follows of a run's logits, by name or as a function.

| name | what it is |
|---|---|
| "probability" | the joint probability of the answer's tokens |
| "logit_diff" | the logit of the answer's first token - that of the contrast's |
| "kl" | KL(reference || run) of the next token, in nats; of the run without changes by default |
| "loss" | the mean negative log-likelihood of the answer's tokens, in nats |
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from jaxtyping import Float, Int
from torch import Tensor

from mmlens.analyses.targets import Answer, Measure, given_answer, make_answer, with_answer
from mmlens.branching.recording import Recording
from mmlens.model.components.norm import float32_or_wider
from mmlens.utils.tensors import flat_positions

MetricName = Literal["probability", "logit_diff", "kl", "loss"]
MetricFunction = Callable[[Float[Tensor, "row n d_vocab"]], Float[Tensor, "row ..."]]
Metric = MetricName | MetricFunction
"""A name, or a function of the logits at the positions that are read: a number for each row."""
FALLING: tuple[MetricName, ...] = ("kl", "loss")
"""Those that get smaller as a run comes back to the answer."""


@dataclass(frozen=True, eq=False)
class Followed:
    """A metric of one recording's branches."""

    recording: Recording
    """Of the prompt, with the answer's tokens but the last after it."""
    function: MetricFunction
    positions: Int[Tensor, " _"]
    """Where logits are read."""
    name: str
    answer: Answer | None

    def baseline(self) -> Float[Tensor, " *measure"]:
        """Return the metric of the recorded run, the mean over its rows."""
        return self.function(self.recording.logits(self.positions)).mean(dim=0)


def followed(
    recording: Recording,
    metric: Metric,
    answer: str | int | None = None,
    contrast: str | int | None = None,
    positions: Sequence[int] | Tensor | None = None,
    reference: Recording | None = None,
) -> Followed:
    """Return what is followed of the branches of a recording.

    Args:
        metric: a name of the table above, or a function of the logits [row, n, d_vocab].
        answer: a text, a token id, or None for the recorded run's most probable next token.
        contrast: the other answer of "logit_diff".
        positions: where a function reads; by default where the answer's tokens are predicted, or
            else the last position.
        reference: whose next token, after its own last position, "kl" compares with: of one row, or
            of as many as the recording; by default the recorded run.

    Raises:
        ValueError: an unknown name, a contrast that is missing, a contrast or a reference that
            nothing reads, a reference of another number of rows, positions for a name, an answer
            without tokens; when it is called, a function that does not return something for each
            row.
    """
    model, inputs = recording.model, recording.inputs
    check_metric(metric, contrast)
    name = name_of(metric)
    if reference is not None and metric != "kl":
        raise ValueError(f"reference is what 'kl' compares with; metric={name!r} has no use for it")
    if reference is not None and reference.n_rows not in (1, recording.n_rows):
        raise ValueError(
            f"a reference of {reference.n_rows} rows for a recording of {recording.n_rows}: 'kl' "
            "compares all rows with the reference's only one, or each with its own"
        )
    if not isinstance(metric, str):
        metric = of_each_row(metric)
    if isinstance(metric, str) and positions is not None:
        raise ValueError(f"positions are for a function; metric={metric!r} reads the answer")
    if not isinstance(metric, str) and answer is None:
        at = flat_positions([inputs.n_pos - 1] if positions is None else positions)
        return Followed(recording, metric, at, name, None)
    target = most_probable(recording) if answer is None else given_answer(model, inputs, answer)
    longer = with_answer(inputs, target)
    if longer is not inputs:
        recording = recording.record(longer)
    if not isinstance(metric, str):
        at = target.positions if positions is None else flat_positions(positions)
        return Followed(recording, metric, at, name, target)
    other = None if contrast is None else given_answer(model, inputs, contrast)
    function = metric_of(metric, target, other, recording, reference)
    return Followed(recording, function, target.positions, name, target)


def check_metric(metric: Metric, contrast: str | int | None) -> None:
    """Raise a ValueError for an unknown name, a contrast that is missing, or that nothing reads."""
    if isinstance(metric, str) and metric not in get_args(MetricName):
        raise ValueError(
            f"metric={metric!r}; it is {', '.join(map(repr, get_args(MetricName)))}, or a function "
            "of the logits [row, n, d_vocab] that returns a number for each row"
        )
    if (contrast is None) == (metric == "logit_diff"):
        raise ValueError(
            "metric='logit_diff' needs contrast=..., the answer whose logit is subtracted"
            if contrast is None
            else f"contrast={contrast!r} is for metric='logit_diff', not for {metric!r}"
        )


def gap(metric: str, clean: Any, corrupted: Any) -> Any:
    """Return by how much a corrupted run is further from the answer than the clean one."""
    return corrupted - clean if metric in FALLING else clean - corrupted


def of_each_row(function: MetricFunction) -> MetricFunction:
    """Return a metric that refuses what a function gives, unless it is of each row."""

    def checked(logits: Tensor) -> Tensor:
        values, n_rows = function(logits), len(logits)
        shape = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        if not isinstance(values, Tensor) or values.shape[:1] != (n_rows,):
            raise ValueError(
                f"metric {name_of(function)!r} gives {shape} for {n_rows} "
                f"row{'s' * (n_rows != 1)} of logits; it returns a tensor with a number, or "
                "several, for each row"
            )
        # Whether an answer is right, or its rank, is a number whose mean is taken.
        return values if values.is_floating_point() else values.double()

    return checked


def check_one_number(metric: Metric, values: Tensor, n_rows: int) -> None:
    """Raise a ValueError unless these are what a metric gives of some rows: one number of each."""
    if tuple(values.shape) != (n_rows,):
        raise ValueError(
            f"metric {name_of(metric)!r} gives {tuple(values.shape)} for {n_rows} row"
            f"{'s' * (n_rows != 1)} of logits; one number for each row is followed here (patch and "
            "ablation_scan follow several)"
        )


def name_of(metric: Metric) -> str:
    """Return a metric's name, or what a function is called."""
    if isinstance(metric, str):
        return metric
    return getattr(metric, "__name__", type(metric).__name__)


def most_probable(recording: Recording) -> Answer:
    """Return the recorded run's most probable next token, by the mean over its rows."""
    probability = float32_or_wider(recording.logits()[:, 0]).softmax(dim=-1).mean(dim=0)
    token = int(probability.argmax())
    return make_answer(recording.model, [token], recording.inputs.n_pos - 1)


def metric_of(
    metric: Metric,
    answer: Answer,
    contrast: Answer | None,
    recording: Recording,
    reference: Recording | None = None,
) -> MetricFunction:
    """Return a metric as a function of logits at the answer's positions.

    "kl" compares with the recording there, or with the last position of `reference`, whose prompt
    may be of another length.
    """
    if not isinstance(metric, str):
        return of_each_row(metric)
    if metric == "probability":
        return answer.probability
    if metric == "loss":
        return lambda logits: -answer.log_probability(logits) / len(answer.tokens)
    if metric == "logit_diff":
        return Measure(answer, contrast).logit_difference
    clean = recording.logits(answer.positions[:1]) if reference is None else reference.logits()
    return Measure(answer, clean=clean[:, 0]).kl
