"""What becomes of an answer when some visual tokens are erased, and when others are.

Neo et al. 2024 ("Towards Interpreting Visual Information Processing in Vision-Language Models",
section 3): visual tokens of an object are replaced by a mean embedding before the first layer.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmlens.analyses.arguments import Where, check_single_run, positions_of
from mmlens.analyses.result import SavedResult, description
from mmlens.analyses.targets import record_with_answer
from mmlens.inputs.multimodal_inputs import MultimodalInputs
from mmlens.interventions.functions import HookFunction, mean, zero
from mmlens.interventions.intervention import Intervention, hook_names
from mmlens.utils.grad_mode import without_gradients
from mmlens.utils.threads import on_free_cores

if TYPE_CHECKING:
    import pandas as pd

    from mmlens.model.transformer import HookedMultimodalTransformer

SITE = "input_embed"
DEEPER = "deepstack"
"""Where some decoders (Qwen3-VL) add more of the image in the first blocks."""


@dataclass(frozen=True, eq=False)
class TokenErasure(SavedResult):
    """P(answer) with chosen visual tokens erased, and with as many others.

    Example:
        >>> erased.effect, erased.control_effect.mean(), erased.p_value
    """

    clean: float
    """P(answer) of the run as it is."""
    erased: float
    """P(answer) with the chosen tokens erased."""
    controls: Float[Tensor, " control"]
    """P(answer) with as many other visual tokens erased, drawn at random; one draw each."""
    positions: tuple[int, ...]
    """Of the chosen tokens."""
    labels: tuple[str, ...]
    answer: str
    said_before: str
    """The greedy continuation of the prompt as it is; empty where none was asked for."""
    said: str
    """The greedy continuation with the chosen tokens erased."""
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def effect(self) -> float:
        """Erased - clean: negative where the tokens served the answer."""
        return self.erased - self.clean

    @property
    def control_effect(self) -> Float[Tensor, " control"]:
        """The same of each draw of other tokens."""
        return self.controls - self.clean

    @property
    def p_value(self) -> float:
        """How often others lower the answer at least as far: (1 + these draws) / (1 + all)."""
        as_low = int((self.controls <= self.erased).sum())
        return (1 + as_low) / (1 + len(self.controls))

    def to_dataframe(self) -> pd.DataFrame:
        """One row for the chosen tokens, and one for each draw of others."""
        import pandas as pd

        values = [self.erased, *self.controls.tolist()]
        return pd.DataFrame(
            {
                "erased": ["chosen", *["others"] * len(self.controls)],
                "probability": values,
                "effect": [value - self.clean for value in values],
            }
        )


@without_gradients
@on_free_cores
def token_erasure(
    model: HookedMultimodalTransformer,
    inputs: MultimodalInputs,
    positions: Where,
    *,
    by: str | HookFunction = "mean",
    answer: str | int | None = None,
    controls: int = 20,
    seed: int = 0,
    max_new_tokens: int = 12,
) -> TokenErasure:
    """Erase visual tokens where they enter the language model, and measure what the answer loses.

    Args:
        inputs: one prompt.
        positions: visual tokens: a span, or positions (of `inputs.patches(box)`, say).
        by: "mean" puts the mean of all visual tokens of the prompt there, "zero" zeros; or a hook
            function. Where first blocks are given more of the image (`deepstack`, Qwen3-VL), that
            is erased alike, by a mean of its own in each block.
        answer: a text, a token id, or None for the most probable next token.
        controls: how many times as many other visual tokens are drawn and erased for comparison.
        seed: of these draws.
        max_new_tokens: of the greedy continuations before and after; 0 asks for none, nor does a
            model without a tokenizer.

    Raises:
        UnknownSpanError: (a KeyError) no span of that name.
        ValueError: a batch, positions that are no visual tokens, or fewer other visual tokens than
            a draw needs.

    Example:
        >>> dog = word_map(model, inputs, "dog", layers=[20])
        >>> token_erasure(model, inputs, dog.top(12, layer=20), answer="dog").p_value
    """
    check_single_run(inputs, "token_erasure")
    chosen = positions_of(inputs, positions)
    visual = torch.cat([image.positions for image in inputs.images] or [chosen[:0]])
    if outside := sorted(set(chosen.tolist()) - set(visual.tolist())):
        raise ValueError(f"positions {outside} are no visual tokens")
    others = visual[~torch.isin(visual, chosen)]
    if controls and len(others) < len(chosen):
        raise ValueError(
            f"{len(chosen)} of {len(visual)} visual tokens are erased, so there are not as many "
            "others to compare with: erase fewer, or give controls=0"
        )
    erasing = eraser(model, inputs, visual, by)
    generator = torch.Generator().manual_seed(seed)
    draws = [drawn(others, len(chosen), generator) for _ in range(controls)]
    branches = [
        [Intervention(site, layers, where, erasing) for site, layers in entrances(model)]
        for where in [chosen, *draws]
    ]
    recording, target = record_with_answer(model, inputs, answer)
    found = recording.run(branches, target.probability, positions=target.positions)[:, 0]
    said = ["", ""]
    if max_new_tokens and model.tokenizer is not None:
        said = [
            model.generate(
                inputs, max_new_tokens, do_sample=False, num_beams=1, interventions=interventions
            )
            for interventions in ([], branches[0])
        ]
    labels = inputs.labels()
    return TokenErasure(
        clean=target.probability(recording.logits(target.positions)).item(),
        erased=found[0].item(),
        controls=found[1:].cpu(),
        positions=tuple(chosen.tolist()),
        labels=tuple(labels[position] for position in chosen.tolist()),
        answer=target.text,
        said_before=said[0],
        said=said[1],
        metadata=description(model, inputs) | {"by": by if isinstance(by, str) else "a function"},
    )


def entrances(model: HookedMultimodalTransformer) -> list[tuple[str, range | None]]:
    """Return the sites, with their layers, where the image enters the language model."""
    deeper = range(model.cfg.n_deepstack)
    return [(SITE, None), *([(DEEPER, deeper)] if deeper else [])]


def eraser(
    model: HookedMultimodalTransformer,
    inputs: MultimodalInputs,
    visual: Int[Tensor, " visual_token"],
    by: str | HookFunction,
) -> HookFunction:
    """Return what is done to the tokens that are erased."""
    if not isinstance(by, str):
        return by
    if by not in ("mean", "zero"):
        raise ValueError(f"by={by!r}; it is 'mean', 'zero' or a hook function")
    if by == "zero":
        return zero()
    names = [name for site, layers in entrances(model) for name in hook_names(site, layers)]
    _, cache = model.run_with_cache(inputs, names_filter=names, stop_at_layer=model.cfg.n_deepstack)
    return mean({name: cache[name] for name in names}, among=visual)


def drawn(positions: Int[Tensor, " _"], n: int, generator: torch.Generator) -> Int[Tensor, " _"]:
    """Return n of the positions, ascending; which ones, the generator decides."""
    order = torch.randperm(len(positions), generator=generator)
    return positions[order[:n]].sort().values
