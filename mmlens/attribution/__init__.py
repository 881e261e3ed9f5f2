"""What attention brings where, and what it and the MLPs add to the answer.

- `attention_contribution`: what positions receive from others, by layer, head and source;
- `attention_knockout`: what happens if they receive nothing;
- `logit_lens`, `direct_logit_attribution`: the residual stream, and its parts, read as logits;
- `attribution_patching`: all of a causal trace by one gradient, and its error;
- `auroc`, `predict_correctness`: do contributions tell right answers from wrong ones?

Each is written with what a user can call, so each is an example for the next one.
"""

from mmlens.attribution.contributions import (
    AttentionContribution,
    attention_contribution,
    attention_vectors,
)
from mmlens.attribution.correctness import (
    CorrectnessPrediction,
    Interval,
    auroc,
    predict_correctness,
)
from mmlens.attribution.knockout import AttentionKnockout, attention_knockout
from mmlens.attribution.lens import LogitLens, logit_lens
from mmlens.attribution.logit_attribution import (
    DirectLogitAttribution,
    direct_logit_attribution,
)
from mmlens.attribution.patching import AttributionPatching, PatchingError, attribution_patching

__all__ = [
    "AttentionContribution",
    "AttentionKnockout",
    "AttributionPatching",
    "CorrectnessPrediction",
    "DirectLogitAttribution",
    "Interval",
    "LogitLens",
    "PatchingError",
    "attention_contribution",
    "attention_knockout",
    "attention_vectors",
    "attribution_patching",
    "auroc",
    "direct_logit_attribution",
    "logit_lens",
    "predict_correctness",
]
