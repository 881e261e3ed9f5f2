"""mmlens: mechanistic interpretability of multimodal language models.

Example:
    >>> import mmlens
    >>> model = mmlens.HookedMultimodalTransformer.from_pretrained("demo")
"""

from __future__ import annotations

import importlib
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

try:
    __version__ = version("mmlens")
except PackageNotFoundError:  # a source tree that is not installed
    __version__ = "0"

if TYPE_CHECKING:
    from mmlens.aggregation import AggregatedTraces, aggregate_traces, role_positions
    from mmlens.attribution import (
        AttentionContribution,
        AttentionKnockout,
        AttributionPatching,
        DirectLogitAttribution,
        LogitLens,
        attention_contribution,
        attention_knockout,
        attribution_patching,
        direct_logit_attribution,
        logit_lens,
    )
    from mmlens.branching import Recording
    from mmlens.checkpoints.errors import CheckpointError
    from mmlens.components import KeyValueCache
    from mmlens.config import MultimodalConfig, ProjectorConfig, VisionConfig
    from mmlens.corruptions import (
        blur_image,
        mean_image,
        noise_image,
        noise_span,
        swap_image,
        swap_span,
    )
    from mmlens.data import VisualQuestion, demo_questions
    from mmlens.editing import Edit, EditRequest, multedit, multedit_many
    from mmlens.hook_points import ActivationCache, HookPoint
    from mmlens.inputs import MultimodalInputs, collate
    from mmlens.interventions import Intervention, hook_name, window
    from mmlens.model import HookedMultimodalTransformer
    from mmlens.sweeps import Sweep, sweep
    from mmlens.tracing import CausalTrace, causal_trace, causal_trace_many

# Public names and where they live. They are imported when they are first used: torch and
# TransformerLens take seconds, which `mmlens --help` should not.
_PUBLIC = {
    "ActivationCache": "hook_points",
    "AggregatedTraces": "aggregation",
    "AttentionContribution": "attribution",
    "AttentionKnockout": "attribution",
    "AttributionPatching": "attribution",
    "CausalTrace": "tracing",
    "CheckpointError": "checkpoints.errors",
    "DirectLogitAttribution": "attribution",
    "Edit": "editing",
    "EditRequest": "editing",
    "HookPoint": "hook_points",
    "HookedMultimodalTransformer": "model",
    "Intervention": "interventions",
    "KeyValueCache": "components",
    "LogitLens": "attribution",
    "MultimodalConfig": "config",
    "MultimodalInputs": "inputs",
    "ProjectorConfig": "config",
    "Recording": "branching",
    "Sweep": "sweeps",
    "VisionConfig": "config",
    "VisualQuestion": "data",
    "aggregate_traces": "aggregation",
    "attention_contribution": "attribution",
    "attention_knockout": "attribution",
    "attribution_patching": "attribution",
    "blur_image": "corruptions",
    "causal_trace": "tracing",
    "causal_trace_many": "tracing",
    "collate": "inputs",
    "demo_questions": "data",
    "direct_logit_attribution": "attribution",
    "hook_name": "interventions",
    "logit_lens": "attribution",
    "mean_image": "corruptions",
    "multedit": "editing",
    "multedit_many": "editing",
    "noise_image": "corruptions",
    "noise_span": "corruptions",
    "role_positions": "aggregation",
    "swap_image": "corruptions",
    "swap_span": "corruptions",
    "sweep": "sweeps",
    "window": "interventions",
}

__all__ = [
    "ActivationCache",
    "AggregatedTraces",
    "AttentionContribution",
    "AttentionKnockout",
    "AttributionPatching",
    "CausalTrace",
    "CheckpointError",
    "DirectLogitAttribution",
    "Edit",
    "EditRequest",
    "HookPoint",
    "HookedMultimodalTransformer",
    "Intervention",
    "KeyValueCache",
    "LogitLens",
    "MultimodalConfig",
    "MultimodalInputs",
    "ProjectorConfig",
    "Recording",
    "Sweep",
    "VisionConfig",
    "VisualQuestion",
    "__version__",
    "aggregate_traces",
    "attention_contribution",
    "attention_knockout",
    "attribution_patching",
    "blur_image",
    "causal_trace",
    "causal_trace_many",
    "collate",
    "demo_questions",
    "direct_logit_attribution",
    "hook_name",
    "logit_lens",
    "mean_image",
    "multedit",
    "multedit_many",
    "noise_image",
    "noise_span",
    "role_positions",
    "swap_image",
    "swap_span",
    "sweep",
    "window",
]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'mmlens' has no attribute {name!r}")
    return getattr(importlib.import_module(f"mmlens.{_PUBLIC[name]}"), name)


def __dir__() -> list[str]:
    return __all__
