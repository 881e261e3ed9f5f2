"""The figure of each kind of result: what its `plot` draws."""

from __future__ import annotations

from functools import singledispatch
from typing import Any

from mmlens.analyses.aggregation import AggregatedTraces
from mmlens.analyses.attention_contribution import AttentionContribution
from mmlens.analyses.attention_knockout import AttentionKnockout
from mmlens.analyses.attention_sinks import AttentionSinks
from mmlens.analyses.attribution_patching import AttributionPatching
from mmlens.analyses.direct_logit_attribution import DirectLogitAttribution
from mmlens.analyses.logit_lens import LogitLens
from mmlens.analyses.patch import Patched
from mmlens.analyses.result import SavedResult
from mmlens.analyses.steering_scores import SteeringScores
from mmlens.analyses.steering_vector import SteeringVector
from mmlens.analyses.token_erasure import TokenErasure
from mmlens.analyses.trace_result import CausalTrace
from mmlens.analyses.word_map import WordMap
from mmlens.editing.edit_check import EditCheck
from mmlens.editing.edit_evaluation import EditEvaluation
from mmlens.plots.contributions import plot_contribution
from mmlens.plots.editing import plot_check, plot_evaluation
from mmlens.plots.figure import Figure
from mmlens.plots.grid import plot_grid
from mmlens.plots.knockout import plot_knockout
from mmlens.plots.layer_profile import plot_aggregated
from mmlens.plots.lens import plot_lens, plot_logit_attribution
from mmlens.plots.sinks import plot_sinks
from mmlens.plots.steering import plot_steering_scores, plot_steering_vector
from mmlens.plots.trace import plot_patching, plot_trace
from mmlens.plots.words import plot_token_erasure, plot_word_map


@singledispatch
def draw(result: SavedResult, *arguments: Any, **options: Any) -> Figure:
    """Draw a result with the function of its kind, which is given the other arguments."""
    raise TypeError(f"there is no figure of a {type(result).__name__}")


draw.register(AggregatedTraces, plot_aggregated)
draw.register(AttentionContribution, plot_contribution)
draw.register(AttentionKnockout, plot_knockout)
draw.register(AttentionSinks, plot_sinks)
draw.register(AttributionPatching, plot_patching)
draw.register(CausalTrace, plot_trace)
draw.register(DirectLogitAttribution, plot_logit_attribution)
draw.register(EditCheck, plot_check)
draw.register(EditEvaluation, plot_evaluation)
draw.register(LogitLens, plot_lens)
draw.register(Patched, plot_grid)
draw.register(SteeringScores, plot_steering_scores)
draw.register(SteeringVector, plot_steering_vector)
draw.register(TokenErasure, plot_token_erasure)
draw.register(WordMap, plot_word_map)
