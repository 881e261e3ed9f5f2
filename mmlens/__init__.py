"""mmlens: mechanistic interpretability of multimodal language models.

Example:
    >>> import mmlens
    >>> model = mmlens.HookedMultimodalTransformer.from_pretrained("demo")
"""

from __future__ import annotations

import ast
import importlib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

try:
    __version__ = version("mmlens")
except PackageNotFoundError:  # a source tree that is not installed
    __version__ = "0"

# The one table of public names, which type checkers read as it stands. While the program runs, a
# name is imported when it is first used: torch and TransformerLens take seconds, and
# `mmlens --help` should not.
if TYPE_CHECKING:
    from mmlens.analyses.ablation_scan import ablation_scan as ablation_scan
    from mmlens.analyses.aggregation import (
        AggregatedTraces as AggregatedTraces,
        aggregate_traces as aggregate_traces,
        role_positions as role_positions,
    )
    from mmlens.analyses.attention_contribution import (
        AttentionContribution as AttentionContribution,
        attention_contribution as attention_contribution,
    )
    from mmlens.analyses.attention_knockout import (
        AttentionKnockout as AttentionKnockout,
        attention_knockout as attention_knockout,
    )
    from mmlens.analyses.attention_sinks import (
        AttentionSinks as AttentionSinks,
        attention_sinks as attention_sinks,
    )
    from mmlens.analyses.attribution_patching import (
        AttributionPatching as AttributionPatching,
        attribution_patching as attribution_patching,
    )
    from mmlens.analyses.causal_trace import (
        CausalTrace as CausalTrace,
        causal_trace as causal_trace,
        causal_trace_many as causal_trace_many,
    )
    from mmlens.analyses.corruptions import (
        blur_image as blur_image,
        mean_image as mean_image,
        noise_image as noise_image,
        noise_span as noise_span,
        swap_image as swap_image,
        swap_span as swap_span,
    )
    from mmlens.analyses.direct_logit_attribution import (
        DirectLogitAttribution as DirectLogitAttribution,
        direct_logit_attribution as direct_logit_attribution,
    )
    from mmlens.analyses.logit_lens import LogitLens as LogitLens, logit_lens as logit_lens
    from mmlens.analyses.patch import Patched as Patched, patch as patch
    from mmlens.analyses.path_patch import PathPatch as PathPatch, path_patch as path_patch
    from mmlens.analyses.scan import Scan as Scan
    from mmlens.analyses.steering_scores import (
        SteeringScores as SteeringScores,
        steering_scores as steering_scores,
    )
    from mmlens.analyses.steering_vector import (
        SteeringVector as SteeringVector,
        steering_vector as steering_vector,
    )
    from mmlens.analyses.token_erasure import (
        TokenErasure as TokenErasure,
        token_erasure as token_erasure,
    )
    from mmlens.analyses.word_map import WordMap as WordMap, word_map as word_map
    from mmlens.branching.recording import Recording as Recording
    from mmlens.checkpoints.errors import CheckpointError as CheckpointError
    from mmlens.config import (
        MultimodalConfig as MultimodalConfig,
        ProjectorConfig as ProjectorConfig,
        VisionConfig as VisionConfig,
    )
    from mmlens.data import VisualQuestion as VisualQuestion, demo_questions as demo_questions
    from mmlens.editing import (
        Edit as Edit,
        EditRequest as EditRequest,
        multedit as multedit,
        multedit_many as multedit_many,
    )
    from mmlens.inputs.collation import collate as collate
    from mmlens.inputs.multimodal_inputs import MultimodalInputs as MultimodalInputs
    from mmlens.interventions.in_tile import InTile as InTile
    from mmlens.interventions.intervention import (
        Intervention as Intervention,
        hook_name as hook_name,
        window as window,
    )
    from mmlens.model.activation_cache import ActivationCache as ActivationCache
    from mmlens.model.components import KeyValueCache as KeyValueCache
    from mmlens.model.hook_points import HookPoint as HookPoint
    from mmlens.model.transformer import HookedMultimodalTransformer as HookedMultimodalTransformer
    from mmlens.sweeps import Sweep as Sweep, sweep as sweep

_MODULES = {
    name.name: statement.module
    for part in ast.parse(Path(__file__).read_text(encoding="utf-8")).body
    if isinstance(part, ast.If)
    for statement in part.body
    if isinstance(statement, ast.ImportFrom) and statement.module
    for name in statement.names
}
__all__ = sorted([*_MODULES, "__version__"])


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'mmlens' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return __all__
